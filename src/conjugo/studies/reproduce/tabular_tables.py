"""The tables of the loan experiments: two that come with scikit-learn, and German credit where it is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conjugo.errors import CorruptFile, DataUnavailable, unknown

__all__ = ["NAMES", "Table", "german_path", "load", "read_german"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """inputs: [N, d]. bad: 1 for the class that must not be missed, 0 for the other [N]."""

    name: str
    inputs: FloatArray
    bad: npt.NDArray[np.intp]


def _breast_cancer() -> Table:
    from sklearn.datasets import load_breast_cancer

    inputs, benign = load_breast_cancer(return_X_y=True)
    return Table("breast_cancer", inputs, 1 - benign)


def _made() -> Table:
    from sklearn.datasets import make_classification

    inputs, minority = make_classification(
        n_samples=1000, n_features=20, n_informative=8, weights=[0.7], flip_y=0.05, random_state=0
    )
    return Table("made", inputs, minority)


def german_path() -> Path:
    """Where ``german.csv`` is looked for: in the folder ``tabular`` of the one that CONJUGO_DATA names.

    Raises DataUnavailable if it is not there.
    """
    root = os.environ.get("CONJUGO_DATA")
    path = Path(root or "") / "tabular" / "german.csv"
    if not root or not path.exists():
        where = f"{path} is not there" if root else "CONJUGO_DATA is not set"
        raise DataUnavailable(
            "German credit is not bundled: get german.data of the UCI data set 'Statlog (German Credit Data)', write it with "
            f"commas as $CONJUGO_DATA/tabular/german.csv ({where})"
        )
    return path


def read_german(path: Path) -> Table:
    """Statlog German credit: 1,000 loans, 7 numbers and 13 categories, which become one column for each value.

    The last field is 1 for a good loan, 2 for a bad one. Raises CorruptFile for anything else.
    """
    try:
        rows = [line.split(",") for line in path.read_text().splitlines() if line]
        columns = list(zip(*rows, strict=True))
        # Categories are words like A34.
        parts = [_one_hot(column) if column[0].startswith("A") else [column] for column in columns[:-1]]
        inputs = np.array([column for part in parts for column in part], dtype=np.float64).T
        classes = np.array(columns[-1], dtype=np.intp)
        if not set(classes.tolist()) == {1, 2}:
            raise ValueError(f"classes {sorted(set(classes.tolist()))}")
    except (ValueError, IndexError) as error:
        raise CorruptFile(f"{path}: not the German credit table ({error})") from error
    return Table("german", np.ascontiguousarray(inputs), classes - 1)


def _one_hot(column: tuple[str, ...]) -> list[list[float]]:
    return [[float(value == which) for value in column] for which in sorted(set(column))]


_LOADERS: dict[str, Callable[[], Table]] = {
    "breast_cancer": _breast_cancer,
    "made": _made,
    "german": lambda: read_german(german_path()),
}
NAMES = tuple(_LOADERS)


def load(name: str) -> Table:
    """One of NAMES.

    ``breast_cancer``: bad is malignant. ``made``: ``make_classification`` with the size and balance of German credit.

    Raises UnknownName; DataUnavailable, which says how to get the data; CorruptFile.
    """
    if name not in _LOADERS:
        unknown("table", name, NAMES)
    return _LOADERS[name]()
