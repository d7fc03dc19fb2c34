"""Tables before training: a canonical order of the rows, a held-out part, standardised columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conjugo.errors import check
from conjugo.tabular.activations import FloatArray

__all__ = ["Rows", "Standardizer", "check_finite", "merged", "split"]

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Rows:
    """Weighted examples: inputs [N, d], targets [N, K] (labels: K = 1), weights [N] that add up to 1."""

    inputs: FloatArray
    targets: FloatArray
    weights: FloatArray

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: Indices) -> Rows:
        weights = self.weights[rows]
        return Rows(self.inputs[rows], self.targets[rows], weights / weights.sum())


def check_finite(values: FloatArray, owner: str, argument: str, names: npt.NDArray[np.object_] | None = None) -> None:
    """Raise ValueError, with the column's name or number and the row, unless all of *values* [N, d] is finite."""
    if np.isfinite(values).all():
        return
    row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
    where = column if names is None else names[column]
    place = (
        f"{argument}, row {row}"
        if values.shape[1] == 1 and names is None
        else f"{argument}, row {row}, column {where!r}"
    )
    check(False, owner, place, float(values[row, column]), "finite, neither NaN nor infinity")


def merged(inputs: FloatArray, targets: FloatArray, weights: FloatArray) -> Rows:
    """The rows of positive weight in lexicographic order, equal ones as one with the sum of their weights.

    What is trained on the result does not depend on the order of the rows, and weights mean repetitions, bit for bit.

    >>> rows = merged(np.array([[2.0], [1.0], [2.0]]), np.zeros((3, 1)), np.array([1.0, 2.0, 1.0]))
    >>> rows.inputs.tolist(), rows.weights.tolist()
    ([[1.0], [2.0]], [0.5, 0.5])
    """
    if not weights.all():
        inputs, targets, weights = (array[weights > 0] for array in (inputs, targets, weights))
    # Weights are the last key, so that sums of weights do not depend on the order either.
    order = np.lexsort((weights, *targets.T[::-1], *inputs.T[::-1]))
    inputs, targets, weights = inputs[order], targets[order], weights[order]
    new = np.ones(len(weights), dtype=bool)
    new[1:] = (inputs[1:] != inputs[:-1]).any(1) | (targets[1:] != targets[:-1]).any(1)
    weights = np.add.reduceat(weights, np.flatnonzero(new))
    return Rows(inputs[new], targets[new], weights / weights.sum())


def split(strata: npt.NDArray[np.generic], fraction: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Indices to train on and to hold out: *fraction* of each stratum, rounded, but never all of it; both ascending.

    strata: [N], one value for each row.
    """
    held_out = np.zeros(len(strata), dtype=bool)
    for stratum in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        held_out[members[: min(round(fraction * len(members)), len(members) - 1)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@dataclass(frozen=True)
class Standardizer:
    """(x - mean) / scale. mean, scale: [d]."""

    mean: FloatArray
    scale: FloatArray

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")  # columns too large for a variance: it is inf or NaN
    def of(cls, values: FloatArray, weights: FloatArray) -> Standardizer:
        """Weighted mean and standard deviation of the columns of *values* [N, d]; the scale of constant ones is 1.

        weights: [N], with sum 1.
        """
        mean = weights @ values
        scale = np.sqrt(weights @ np.square(values - mean))
        constant = scale <= 10 * np.finfo(np.float64).eps * np.abs(values).max(0)
        return cls(mean, np.where(constant, 1.0, scale))

    @classmethod
    def neutral(cls, columns: int) -> Standardizer:
        """Changes nothing."""
        return cls(np.zeros(columns), np.ones(columns))

    def __call__(self, values: FloatArray) -> FloatArray:
        """Standardised *values* [N, d]."""
        return (values - self.mean) / self.scale

    def undo(self, values: FloatArray) -> FloatArray:
        """What :meth:`__call__` would turn into *values* [N, d]."""
        return values * self.scale + self.mean
