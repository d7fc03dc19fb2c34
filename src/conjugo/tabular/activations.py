"""Activation functions of hidden layers, in place, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtr

__all__ = ["ACTIVATIONS", "Activation", "FloatArray", "gelu", "identity", "logistic", "relu", "softplus", "tanh"]

FloatArray = npt.NDArray[np.float64]

Activation = Callable[[FloatArray, FloatArray | None], None]
"""``activation(z, slope)`` overwrites *z* with its activations, and *slope*, of the same shape, with the derivatives there.

None as *slope* spares the derivatives.
"""


def tanh(z: FloatArray, slope: FloatArray | None) -> None:
    """Hyperbolic tangent.

    >>> z, slope = np.zeros(1), np.zeros(1)
    >>> tanh(z, slope)
    >>> z.item(), slope.item()
    (0.0, 1.0)
    """
    np.tanh(z, out=z)
    if slope is not None:
        np.multiply(z, z, out=slope)
        np.subtract(1.0, slope, out=slope)


def relu(z: FloatArray, slope: FloatArray | None) -> None:
    """max(z, 0); the derivative at 0 is taken as 0."""
    if slope is not None:
        np.greater(z, 0.0, out=slope)
    np.maximum(z, 0.0, out=z)


def gelu(z: FloatArray, slope: FloatArray | None) -> None:
    """z Phi(z) with the normal distribution function Phi, exact (Hendrycks & Gimpel 2016)."""
    below = ndtr(z)
    if slope is not None:
        np.multiply(z, z, out=slope)
        slope *= -0.5
        np.exp(slope, out=slope)
        slope *= z / sqrt(2 * pi)
        slope += below
    z *= below


def softplus(z: FloatArray, slope: FloatArray | None) -> None:
    """log(1 + exp(z))."""
    if slope is not None:
        expit(z, out=slope)
    tail = np.log1p(np.exp(-np.abs(z)))
    np.maximum(z, 0.0, out=z)
    z += tail


def logistic(z: FloatArray, slope: FloatArray | None) -> None:
    """1 / (1 + exp(-z))."""
    # By the hyperbolic tangent, which numpy vectorises.
    z *= 0.5
    np.tanh(z, out=z)
    z += 1.0
    z *= 0.5
    if slope is not None:
        np.subtract(1.0, z, out=slope)
        slope *= z


def identity(z: FloatArray, slope: FloatArray | None) -> None:
    """Z itself: the network is a linear map of low rank."""
    if slope is not None:
        slope.fill(1.0)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "identity": identity,
    "logistic": logistic,
    "relu": relu,
    "softplus": softplus,
    "tanh": tanh,
}
"""The functions by name."""
