"""Losses of the scores that a network gives, with their derivatives.

All are weighted sums over the examples; with weights that add up to 1 they are weighted means.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from conjugo.tabular.activations import FloatArray

__all__ = ["Logistic", "Loss", "Softmax", "Squared"]


class Loss(Protocol):
    """A loss on a fixed set of N examples."""

    outputs: int
    """Scores of an example, K."""

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Losses [S] of *scores* [S, K, N], which are overwritten with the derivatives of the losses."""

    def part(self, rows: slice) -> Loss:
        """The part of the sum that *rows* contribute."""


class Logistic:
    """Negative log likelihood of two classes: the sum of w log(1 + exp(-s z)) with s = 1 for class 1, -1 for class 0.

    labels: 0 or 1 [N]. weights: w [N].

    >>> scores = np.zeros((1, 1, 2))
    >>> Logistic(np.array([0, 1]), np.array([0.5, 0.5]))(scores).round(4), scores
    (array([0.6931]), array([[[ 0.25, -0.25]]]))
    """

    outputs = 1

    def __init__(self, labels: npt.NDArray[np.intp], weights: FloatArray) -> None:
        self.labels, self.weights = labels, weights
        self.signs = 1.0 - 2.0 * labels  # minus s
        self.signed_weights = self.signs * weights

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Losses [S] of *scores* [S, 1, N], which are overwritten with the derivatives."""
        z = scores[:, 0]
        z *= self.signs
        decay = np.exp(-np.abs(z))
        losses = np.log1p(decay)
        losses += np.maximum(z, 0.0)
        losses *= self.weights
        # The probability of the other class; of exp(z) and exp(-z) only the one below 1 is ever taken.
        np.divide(np.where(z < 0, decay, 1.0), 1.0 + decay, out=z)
        z *= self.signed_weights
        total: FloatArray = losses.sum(-1)
        return total

    def part(self, rows: slice) -> Logistic:
        """The part of the sum that *rows* contribute."""
        return Logistic(self.labels[rows], self.weights[rows])


class Softmax:
    """Negative log likelihood of K classes: the sum of w (log sum exp(z) - z[label]).

    labels: 0 to K - 1 [N]. weights: w [N].
    """

    def __init__(self, labels: npt.NDArray[np.intp], weights: FloatArray, classes: int) -> None:
        self.outputs = classes
        self.labels, self.weights = labels, weights
        self.entries = (slice(None), labels, np.arange(len(labels)))

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Losses [S] of *scores* [S, K, N], which are overwritten with the derivatives."""
        scores -= scores.max(1, keepdims=True)
        own = scores[self.entries]
        np.exp(scores, out=scores)
        normalizer = scores.sum(1)
        losses = np.log(normalizer)
        losses -= own
        losses *= self.weights
        scores *= (self.weights / normalizer)[:, None]
        scores[self.entries] -= self.weights
        total: FloatArray = losses.sum(-1)
        return total

    def part(self, rows: slice) -> Softmax:
        """The part of the sum that *rows* contribute."""
        return Softmax(self.labels[rows], self.weights[rows], self.outputs)


class Squared:
    """Half the squared error, summed over the outputs: the sum of w |z - y|^2 / 2.

    targets: y [N, K]. weights: w [N].
    """

    def __init__(self, targets: FloatArray, weights: FloatArray) -> None:
        self.targets = np.ascontiguousarray(targets.T)
        self.outputs = len(self.targets)
        self.weights = weights

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Losses [S] of *scores* [S, K, N], which are overwritten with the derivatives."""
        scores -= self.targets
        losses = scores * scores
        scores *= self.weights
        losses *= 0.5 * self.weights
        total: FloatArray = losses.reshape(len(losses), -1).sum(-1)
        return total

    def part(self, rows: slice) -> Squared:
        """The part of the sum that *rows* contribute."""
        return Squared(self.targets.T[rows], self.weights[rows])
