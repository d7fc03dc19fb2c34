"""Functions with known minima, for tensors and for NumPy."""

import math

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rosenbrock_start(n=10, dtype=torch.float64):
    return torch.tensor([-1.2, 1.0] * (n // 2), dtype=dtype)


SPECTRUM = torch.from_numpy(np.geomspace(1, 20, 10))


def quadratic(x):
    """x' A x / 2 with the minimum 0 at 0."""
    return 0.5 * (SPECTRUM.to(x.dtype) * x * x).sum()


def logistic():
    """Logistic regression on breast_cancer, lambda = 1e-3, bias not penalised: the minimum is 0.05982794."""
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    signs = 2.0 * y - 1

    def fun(w):
        margins = signs * (X @ w[:-1] + w[-1])
        share = -signs / (1 + np.exp(margins)) / len(signs)
        value = np.logaddexp(0, -margins).mean() + 0.5e-3 * w[:-1] @ w[:-1]
        return value, np.append(X.T @ share + 1e-3 * w[:-1], share.sum())

    return fun, X, y


def barrier(x):
    """-sum log(1 - x^2) - x_0: finite inside a cube only; NaN and infinity outside."""
    return -torch.log(1 - x**2).sum() - x[0]


BARRIER_MINIMUM = math.sqrt(2) - 1
"""The minimiser of the barrier in x_0: 2 x / (1 - x^2) = 1; 0 in the others."""
