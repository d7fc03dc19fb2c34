"""What ``conjugo bngd`` does: maps of both learning rates, least squares of data, layers before batch norm."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from conjugo._files import write_aside
from conjugo.errors import check, unknown
from conjugo.scaling import LayerCondition, bngd, effective_condition, scale_invariant_groups
from conjugo.scaling.bn_layers import LayerMatrix
from conjugo.scaling.bngd import OLS, Asymptotes, ConvergenceMap, Spectrum

__all__ = [
    "DATA",
    "DataSummary",
    "Start",
    "layers",
    "least_squares",
    "plain",
    "random_problem",
    "save_map",
    "summary",
    "taken",
]

Start = Literal["random", "g"]

DATA = ("diabetes", "breast_cancer", "wine")
"""Of scikit-learn. Classes are numbers: least squares does not ask whether that is wise."""


def random_problem(spectrum: str, *, seed: int = 0, start: Start = "random") -> tuple[OLS, Tensor]:
    """Least squares with the eigenvalues that *spectrum* names, u uniform on the sphere, and a start w0 of length 1.

    spectrum: ``logspace:LOW:HIGH:D`` or ``linspace:LOW:HIGH:D``, or numbers with commas between them. start: ``"random"``, or
    ``"g"`` for w0 = g / |g|, from which giant steps lead to the saddle. Raises ValueError for anything else.

    >>> problem, start = random_problem("logspace:1:80:100")
    >>> round(problem.spectrum().kappa, 6), tuple(start.shape)
    (80.0, (100,))
    """
    accepted = "logspace:LOW:HIGH:D, linspace:LOW:HIGH:D with 0 < LOW <= HIGH and D >= 1, or numbers such as 1,2,4"
    kind, *rest = spectrum.split(":")
    try:
        if rest:
            low, high, d = float(rest[0]), float(rest[1]), int(rest[2])
            fits = kind in ("logspace", "linspace") and len(rest) == 3 and 0 < low <= high < math.inf and d >= 1
            check(fits, "bngd", "--spectrum", spectrum, accepted)
            ends = (math.log10(low), math.log10(high)) if kind == "logspace" else (low, high)
            lam = getattr(torch, kind)(*ends, d, dtype=torch.float64)
        else:
            lam = torch.tensor([float(number) for number in spectrum.split(",")], dtype=torch.float64)
    except (ValueError, IndexError):
        check(False, "bngd", "--spectrum", spectrum, accepted)
        raise
    u, w = torch.randn(2, len(lam), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    problem = OLS(lam, u=u / u.norm())
    return problem, (problem.g / problem.g.norm() if start == "g" else w / w.norm())


def save_map(found: ConvergenceMap, path: Path) -> None:
    """Write *found* as an .npz file: lrs, lr_as, steps, excess, relative, eff_lr, rate, status."""
    buffer = io.BytesIO()
    names = ("lrs", "lr_as", "excess", "relative", "eff_lr", "rate")
    arrays: dict[str, Any] = {name: getattr(found, name).numpy() for name in names}
    np.savez_compressed(buffer, **arrays, steps=found.steps, status=np.array(found.status))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, buffer.getvalue())


def least_squares(name: str) -> OLS:
    """A data set as least squares, inputs and targets standardised.

    name: one of `DATA`, or a .csv file of numbers whose last column is the target; a first row of names is skipped.
    Raises UnknownName, FileNotFoundError; ValueError for a file that holds something else, and for a singular H.
    """
    if name.endswith(".csv"):
        inputs, targets = _columns(Path(name))
    elif name in DATA:
        from sklearn import datasets

        inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    else:
        unknown("data set of bngd", name, [*DATA, "FILE.csv"])
    spread = float(np.std(targets))
    check(spread > 0, "bngd", "the targets", "all equal", "of at least two values")
    return OLS.from_data(inputs, (targets - np.mean(targets)) / spread, standardize=True)


def _columns(path: Path) -> tuple[Any, Any]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    for number, row in enumerate(rows):
        try:
            rows[number] = [float(cell) for cell in row]  # type: ignore[misc]
        except ValueError:
            check(number == 0, "bngd", f"row {number + 1} of {path}", ",".join(row), "numbers")
    numbers = rows[1:] if rows and any(isinstance(cell, str) for cell in rows[0]) else rows
    widths = {len(row) for row in numbers}
    fits = len(numbers) > 1 and len(widths) == 1 and min(widths) >= 2
    check(fits, "bngd", str(path), f"{len(numbers)} rows of {sorted(widths)} numbers", "rows of equal length >= 2")
    table = np.array(numbers, dtype=np.float64)
    return table[:, :-1], table[:, -1]


@dataclass(frozen=True)
class DataSummary:
    """Least squares of data: what its spectrum says, and how many steps both methods take to an excess of tol S.

    gd: for each part of 2 / lambda_max the steps; bngd: for each learning rate. None: more than the budget.
    """

    problem: OLS
    spectrum: Spectrum
    asymptotes: Asymptotes
    gd: dict[float, int | None]
    lrs: Tensor
    bngd: list[int | None]

    @property
    def best(self) -> tuple[float, int] | None:
        """The learning rate of BNGD with the fewest steps, and these; None where there is none."""
        found = [(steps, lr) for lr, steps in zip(self.lrs.tolist(), self.bngd) if steps is not None]
        return None if not found else (min(found)[1], min(found)[0])

    def range(self, factor: float = math.inf) -> tuple[float, float] | None:
        """Learning rates of BNGD within *factor* times the fewest steps (by default: the budget), smallest and largest."""
        best = self.best
        if best is None:
            return None
        good = [lr for lr, n in zip(self.lrs.tolist(), self.bngd) if n is not None and n <= factor * best[1]]
        return min(good), max(good)


def summary(
    problem: OLS, *, steps: int = 20_000, tol: float = 1e-6, seed: int = 0, lrs: Tensor | None = None
) -> DataSummary:
    """Run both methods on *problem*: gradient descent from 0, BNGD from a random start with a0 = 1.

    lrs: of BNGD; None: 61 from 1e-6 to 1e6. Raises what :func:`conjugo.scaling.bngd.run` raises.
    """
    lrs = torch.logspace(-6, 6, 61, dtype=torch.float64) if lrs is None else lrs
    spectrum = problem.spectrum()
    parts = (0.99, 0.5, 0.1, 0.01)
    rates = [part * spectrum.gd_lr_max for part in parts]
    descent = bngd.run(problem, rates, method="gd", steps=steps, tol=tol, record=None)
    ours = bngd.run(problem, lrs, a0=1.0, steps=steps, tol=tol, record=None, seed=seed)
    start = bngd.run(problem, 1.0, a0=1.0, steps=0, seed=seed).w[0]
    return DataSummary(
        problem, spectrum, bngd.asymptotes(problem, start, 1.0), dict(zip(parts, taken(descent))), lrs, taken(ours)
    )


def taken(run: bngd.Run) -> list[int | None]:
    """Steps of each run to its tol; None: it did not come to it."""
    return [int(n) if status == "converged" else None for n, status in zip(run.steps.tolist(), run.status)]


def layers(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    names: Sequence[str] = (),
    matrix: LayerMatrix = "hessian",
    k: int = 10,
    steps: int = 80,
    seed: int = 0,
    progress: Callable[[str], object] = lambda name: None,
) -> list[LayerCondition]:
    """The conditioning of the layers *names*, or of all that are scale-invariant.

    Those are found by their gradients or, where these show none, by what comes before batch norm. progress: is called with
    each name before its turn. Raises ValueError where there is none, and what
    :func:`conjugo.scaling.effective_condition` raises.
    """
    if not names:
        groups = scale_invariant_groups(model, loss_fn, data) or scale_invariant_groups(
            model, loss_fn, data, structural=True
        )
        check(len(groups) > 0, "bngd", "the model", type(model).__name__, "one with layers before batch norm")
        names = [group.name for group in groups]
    found = []
    for name in names:
        progress(name)
        found.append(effective_condition(model, loss_fn, data, name, matrix, k, steps, seed=seed))
    return found


def plain(found: LayerCondition, lr: float | None) -> dict[str, Any]:
    """*found* as plain values, ready for JSON; infinite numbers are None."""
    numbers = {
        "lam_max": found.lam_max,
        "lam_min_pos": found.lam_min_pos,
        "kappa_eff": found.kappa_eff,
        "kappa_50": found.kappa(0.5),
        "kappa_10": found.kappa(0.1),
        "raw_lam_max": found.raw_lam_max,
        "kappa_raw": found.kappa_raw,
        "free_lam_max": found.free_lam_max,
        "kappa_free": found.kappa_free,
        "edge": None if lr is None else found.edge(lr),
    }
    return {
        "name": found.name,
        "matrix": found.matrix,
        "exact": found.exact,
        "parameters": found.parameters,
        **{name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()},
        "norms": found.norms.tolist(),
        "eff_lr": None if lr is None else found.eff_lr(lr).tolist(),
        "eigenvalues": found.eigenvalues.tolist(),
    }
