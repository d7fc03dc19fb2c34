"""Gradient descent with batch norm (BNGD) on least squares: trajectories, exact rates and maps over both learning rates.

The problem: x centred, H = E[x x'], g = E[x y], c = E[y^2], u = H^-1 g the minimiser, S = u'Hu. The model predicts
a x'w / s with s = sqrt(w'Hw): batch norm over the full batch, with a as its scale. One step, with p = w'g, is::

    a+ = a + lr_a (p / s - a)
    w+ = w + lr (a / s) (g - (p / s^2) H w)

The second line is w+ = w + lr (a / s) H e with e = u - (p / s^2) w, and w'He = 0: |w| never decreases, and what counts is
the effective learning rate lr a p / s^3, which adjusts itself through s. Gradient descent without batch norm is
w+ = w + lr (g - H w).

All runs are float64, on the CPU, in the eigenbasis of H; many learning rates go side by side.

Source: Y. Cai, Q. Li, Z. Shen, "A Quantitative Analysis of the Effect of Batch Normalization on Gradient Descent",
ICML 2019, arXiv:1810.00122.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor

from conjugo.errors import check, unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "OLS",
    "Asymptotes",
    "ConvergenceMap",
    "Method",
    "Order",
    "Record",
    "Run",
    "Spectrum",
    "asymptotes",
    "convergence_map",
    "equivalent_lr",
    "run",
    "transform",
]

Method: TypeAlias = Literal["bngd", "gd"]
Order: TypeAlias = Literal["simultaneous", "alternating"]
Record: TypeAlias = Literal["all", "log"]
Values: TypeAlias = Any
"""A number, a sequence of numbers, an array or a tensor."""

STATUSES = ("converged", "progressing", "stalled", "saddle", "diverged")

CONVERGED = 1e-12
"""Excess over S at which a run without *tol* counts as converged."""

FLOOR = 1e-24
"""Excess over S below which rates are not measured: rounding is not far."""

STALLED = 1e-3
"""What counts as next to nothing in the statuses of a run."""

DIVERGED = 1e6
"""Excess over the first one above which a run counts as diverged."""

HUGE = 1e100
"""sqrt(w'Hw) at which w is scaled down, and the learning rate with it."""

SEEDS = 1_000_000_007
"""Where the seeds of starts begin: one that also drew the problem must not give the minimiser as the start."""

UNCHANGED = 1e-6
"""Of what a map still shows: relative change of a run over all that is left, below which it is not continued."""


@dataclass(frozen=True)
class Spectrum:
    """What the eigenvalues of H say about both methods.

    Rates are factors per step of the error in H-norm; the excess loss falls by their square.
    """

    lam: Tensor
    """[d]: eigenvalues of H, ascending."""
    lam_star: Tensor
    """[d - 1]: eigenvalues of H* = H - g g'/S without the zero that belongs to u, ascending. They interlace those of H."""
    kappa: float
    """Condition number of H."""
    kappa_star: float
    """Effective condition number, lam_star[-1] / lam_star[0] <= kappa; 1 for d = 1."""
    gd_lr_max: float
    """2 / lam[-1]: gradient descent converges below it."""
    gd_lr_opt: float
    """2 / (lam[0] + lam[-1])."""
    gd_rate_opt: float
    """(kappa - 1) / (kappa + 1)."""
    eff_lr_max: float
    """2 / lam_star[-1]: effective learning rates of BNGD do not stay above it; infinite for d = 1."""
    eff_lr_opt: float
    """2 / (lam_star[0] + lam_star[-1]); infinite for d = 1."""
    bn_rate_opt: float
    """(kappa_star - 1) / (kappa_star + 1)."""

    def bn_rate(self, eff_lr: float) -> float:
        """max |1 - eff_lr lam_star|: the asymptotic rate of BNGD at an effective learning rate."""
        return float((1 - eff_lr * self.lam_star).abs().max()) if len(self.lam_star) else 0.0

    def gd_rate(self, lr: float) -> float:
        """max |1 - lr lam|: the rate of gradient descent."""
        return float((1 - lr * self.lam).abs().max())


class OLS:
    """A least-squares problem with a unique minimiser that is not zero.

    Args:
        H: [d, d] symmetric positive definite, or its diagonal [d]. The second moments of the centred inputs.
        g: [d]: E[x y]. Exactly one of g and u is given.
        u: [d]: the minimiser H^-1 g.
        c: E[y^2] >= S; None: S, so that the smallest loss is 0.

    Raises ValueError for an H that is not symmetric (to 1e-10 of its largest entry) or has an eigenvalue below 1e-12 of the
    largest one, wrong shapes, values that are not finite, both or neither of g and u, u = 0, and c < S.

    >>> problem = OLS([1.0, 4.0], u=[1.0, 1.0])
    >>> problem.S, problem.spectrum().kappa, problem.spectrum().kappa_star
    (5.0, 4.0, 1.0)
    """

    def __init__(self, H: Values, g: Values = None, u: Values = None, c: float | None = None) -> None:
        owner = "OLS"
        matrix = _tensor(H, owner, "H")
        square = matrix.ndim == 1 or (matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1])
        check(square and matrix.numel() > 0, owner, "the shape of H", tuple(matrix.shape), "(d, d), or (d,)")
        if matrix.ndim == 2:
            off = float((matrix - matrix.T).abs().max())
            size = float(matrix.abs().max())
            check(
                off <= 1e-10 * size,
                owner,
                "H",
                f"entries that differ by {off:.3g} from their mirror image",
                "symmetric",
            )
            lam, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
        else:
            lam, basis = matrix.clone(), None
        smallest, largest = float(lam.min()), float(lam.max())
        positive = smallest > 1e-12 * largest
        check(positive, owner, "the smallest eigenvalue of H", smallest, f"above 1e-12 of the largest, {largest:.6g}")
        check((g is None) != (u is None), owner, "g and u", "neither" if g is None else "both", "given one of the two")
        given = _tensor(u if g is None else g, owner, "u" if g is None else "g")
        d = len(lam)
        check(given.shape == (d,), owner, f"the shape of {'u' if g is None else 'g'}", tuple(given.shape), f"({d},)")
        inside = given if basis is None else basis.T @ given
        self.d = d
        """Dimension."""
        self._lam = lam
        self._basis = basis
        self._u = inside if g is None else inside / lam
        self._root = lam.sqrt()
        self._b = self._root * self._u
        check(
            bool((given != 0).any()), owner, "u" if g is None else "g", "a vector of zeros", "a vector with a direction"
        )
        self.S = float(self._b @ self._b)
        """u'Hu: the part of c that can be explained."""
        check(0 < self.S < math.inf, owner, "u'Hu", self.S, "a positive finite number")
        check(c is None or c >= self.S * (1 - 1e-12), owner, "c", c, f"at least u'Hu = {self.S:.6g}, or None")
        self.c = self.S if c is None else float(c)
        """E[y^2]."""

    @classmethod
    def from_data(cls, X: Values, y: Values, standardize: bool = False, ridge: float = 0.0) -> Self:
        """The problem of data: X [n, d] and y [n], which are centred; H = X'X / n, g = X'y / n, c = y'y / n.

        standardize: columns of X are scaled to variance 1. ridge >= 0 is added to the diagonal of H, as noise of this
        variance in the inputs would.

        Raises ValueError for wrong shapes, values that are not finite, constant columns that are to be standardised, and a
        singular H.
        """
        owner = "OLS.from_data"
        inputs, targets = _tensor(X, owner, "X"), _tensor(y, owner, "y")
        check(inputs.ndim == 2 and len(inputs) > 1, owner, "the shape of X", tuple(inputs.shape), "(n, d) with n >= 2")
        n = len(inputs)
        check(targets.shape == (n,), owner, "the shape of y", tuple(targets.shape), f"({n},)")
        check(0 <= ridge < math.inf, owner, "ridge", ridge, ">= 0")
        inputs, targets = inputs - inputs.mean(0), targets - targets.mean()
        if standardize:
            spread = inputs.square().mean(0).sqrt()
            constant = (spread <= 1e-14 * spread.max()).nonzero().flatten().tolist()
            check(
                not constant, owner, "X", f"constant columns {constant}", "without constant columns, to standardise it"
            )
            inputs = inputs / spread
        matrix = inputs.T @ inputs / n
        if ridge:
            matrix = matrix + ridge * torch.eye(len(matrix), dtype=torch.float64)
        else:
            lam = torch.linalg.eigvalsh(matrix)
            singular = (
                f"of full rank (eigenvalues reach from {float(lam[0]):.3g} to {float(lam[-1]):.3g}), or ridge > 0"
            )
            check(float(lam[0]) > 1e-12 * float(lam[-1]), owner, "H = X'X / n", "a singular matrix", singular)
        return cls(matrix, g=inputs.T @ targets / n, c=float(targets @ targets) / n)

    @property
    def H(self) -> Tensor:
        """[d, d]."""
        return torch.diag(self._lam) if self._basis is None else (self._basis * self._lam) @ self._basis.T

    @property
    def g(self) -> Tensor:
        """[d]."""
        return self._outside(self._lam * self._u)

    @property
    def u(self) -> Tensor:
        """[d]: the minimiser of gradient descent, and the direction of the minimisers of BNGD."""
        return self._outside(self._u)

    @property
    def min_loss(self) -> float:
        """(c - S) / 2, of both models."""
        return (self.c - self.S) / 2

    def spectrum(self) -> Spectrum:
        """Eigenvalues, condition numbers, best and largest learning rates; computed once, in O(d^3)."""
        return self._spectrum

    @cached_property
    def _spectrum(self) -> Spectrum:
        lam = self._lam.sort().values
        g = self._lam * self._u
        reduced = torch.linalg.eigvalsh(torch.diag(self._lam) - torch.outer(g, g) / self.S)
        # The smallest is the zero of direction u. Rounding must not break the interlacing, which is exact.
        star = torch.minimum(torch.maximum(reduced[1:], lam[:-1]), lam[1:])
        low, high = float(lam[0]), float(lam[-1])
        kappa = high / low
        some = len(star) > 0
        kappa_star = float(star[-1] / star[0]) if some else 1.0
        return Spectrum(
            lam=lam,
            lam_star=star,
            kappa=kappa,
            kappa_star=kappa_star,
            gd_lr_max=2 / high,
            gd_lr_opt=2 / (low + high),
            gd_rate_opt=(kappa - 1) / (kappa + 1),
            eff_lr_max=2 / float(star[-1]) if some else math.inf,
            eff_lr_opt=2 / float(star[0] + star[-1]) if some else math.inf,
            bn_rate_opt=(kappa_star - 1) / (kappa_star + 1),
        )

    def _inside(self, w: Tensor) -> Tensor:
        """Vectors [..., d] in the eigenbasis."""
        return w if self._basis is None else w @ self._basis

    def _outside(self, w: Tensor) -> Tensor:
        return w if self._basis is None else w @ self._basis.T

    def __repr__(self) -> str:
        found = self._lam.aminmax()
        return f"OLS(d={self.d}, eigenvalues from {float(found.min):.6g} to {float(found.max):.6g}, S={self.S:.6g})"


@dataclass(frozen=True, eq=False)
class Run:
    """B runs, side by side. Where a run has stopped at *tol* its records repeat the last one."""

    lr: Tensor
    """[B]"""
    lr_a: Tensor
    """[B]"""
    at: Tensor
    """[records], int64: the steps that are recorded; 0 is the start."""
    excess: Tensor
    """[B, records]: loss above the smallest one."""
    dir_excess: Tensor
    """[B, records]: |e|_H^2 / 2, the excess that the direction of w leaves with the best a (for GD the best length of w)."""
    a: Tensor
    """[B, records]; NaN for GD."""
    norm_w: Tensor
    """[B, records]: |w|."""
    sigma: Tensor
    """[B, records]: sqrt(w'Hw)."""
    eff_lr: Tensor
    """[B, records]: lr a p / s^3; for GD lr."""
    status: list[str]
    """converged: excess <= tol S (1e-12 S without tol). saddle: a and w'g near 0, excess near S / 2. diverged: not finite, or
    above 1e6 times the start. stalled: the last tenth of the steps lowers the excess by less than 0.1 %, and eff_lr is below
    0.1 % of its bound 2 / lam_star[-1]. progressing: none of these."""
    rate: Tensor
    """[B]: factor of the excess per step over about the last fifth of the run, above 1e-24 S; NaN where there is none."""
    steps: Tensor
    """[B], int64: steps done; fewer than asked for where *tol* was reached."""
    w: Tensor
    """[B, d]: the last weights."""


@dataclass(frozen=True, eq=False)
class ConvergenceMap:
    """Where BNGD stands after some steps, for every pair of learning rates."""

    lrs: Tensor
    """[n]"""
    lr_as: Tensor
    """[m]"""
    steps: int
    excess: Tensor
    """[n, m], as of :class:`Run`, like the others."""
    relative: Tensor
    """[n, m]: excess / S."""
    eff_lr: Tensor
    """[n, m]"""
    rate: Tensor
    """[n, m]"""
    status: list[list[str]]
    """[n][m]"""

    def counts(self) -> dict[str, int]:
        """How many pairs have each status; those that occur."""
        found = [status for row in self.status for status in row]
        return {status: found.count(status) for status in STATUSES if status in found}

    def plot(self, axes: Axes | None = None, *, low: float = CONVERGED) -> Axes:
        """Draw the excess over S in colours, from *low* to 1, lr to the right and lr_a upwards; diverged runs stay white.

        axes: of matplotlib, which is needed; None makes new ones.
        """
        try:
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'conjugo[study]'") from error
        if axes is None:
            axes = Figure(figsize=(5.0, 3.6), layout="constrained").add_subplot()
        shown = self.relative.clamp(min=low).T.clone()
        shown[~torch.isfinite(shown) | (shown > DIVERGED)] = math.nan
        mesh = axes.pcolormesh(
            self.lrs.numpy(),
            self.lr_as.numpy(),
            shown.numpy(),
            norm=LogNorm(low, 1.0),
            cmap="cividis",
            shading="nearest",
            rasterized=True,
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(False)
        axes.set_xlabel("learning rate of w")
        axes.set_ylabel("learning rate of a")
        bar = axes.figure.colorbar(mesh, ax=axes, extend="both")
        bar.set_label(f"excess loss / S after {self.steps:,} steps")
        return axes


@dataclass(frozen=True)
class Asymptotes:
    """Effective learning rates at both ends: C1 lr for a small lr, C2 lr^-power for a large one."""

    C1: float
    C2: float
    """0 where w0 moves along no direction that matters; see case."""
    power: int
    """1, in general; 3 where w0 is parallel to g."""
    C2_late: float
    """C2_late / lr is what a run with a large lr comes to when it has converged, after steps in proportion to lr."""
    plateau: tuple[float, float]
    """Learning rates between which about the best effective learning rate is reached."""
    width: float
    """Upper end of the plateau over the lower one."""
    case: Literal["generic", "w0_parallel_g", "w0_parallel_u"]
    """w0_parallel_g: the first giant step lands beside the saddle. w0_parallel_u: w never moves, C2 is infinite."""


def run(
    problem: OLS,
    lr: Values,
    lr_a: Values = 1.0,
    w0: Values = None,
    a0: Values = None,
    steps: int = 1000,
    *,
    method: Method = "bngd",
    order: Order = "simultaneous",
    record: Record | None = "all",
    tol: float | None = None,
    seed: int = 0,
) -> Run:
    """Do *steps* steps of BNGD or gradient descent, for all given learning rates and starts at once.

    Args:
        problem: The least squares.
        lr: > 0, of w; a number or [B].
        lr_a: > 0, of a; a number or [B]. From 2 on a diverges; above 1 there is a warning, as the theorem ends there.
        w0: [d] or [B, d]. None: a random direction of length 1 from *seed*, the same for all runs; for GD, zeros.
        a0: A number or [B]. None: the best one, p / s. For BNGD.
        steps: >= 0.
        method: ``"bngd"``, or ``"gd"`` without batch norm.
        order: ``"simultaneous"`` updates a and w from the old a and w, as the paper does; ``"alternating"`` w from the new a.
        record: ``"all"`` steps, about a hundred at even distances of their logarithm (``"log"``), or the last one (None).
        tol: A run stops at the first step with excess <= tol S. None: never.

    Where lr, lr_a, w0 and a0 have a length B it must be the same. Raises ValueError for arguments out of range, w0 = 0 and
    lr / w0'Hw0 above 1e200.

    >>> found = run(OLS([1.0, 4.0], u=[1.0, 1.0]), 0.1, w0=[1.0, 0.0], a0=1.0, steps=3)
    >>> [round(x, 6) for x in found.excess[0].tolist()], [round(x, 6) for x in found.eff_lr[0].tolist()]
    ([2.0, 0.969741, 0.203438, 0.053981], [0.1, 0.123796, 0.221354, 0.196664])
    """
    owner = "run"
    if method not in get_args(Method):
        unknown("bngd method", method, get_args(Method))
    if order not in get_args(Order):
        unknown("bngd order", order, get_args(Order))
    if record is not None and record not in get_args(Record):
        unknown("bngd record", record, get_args(Record))
    check(steps >= 0, owner, "steps", steps, ">= 0")
    check(tol is None or 0 < tol < math.inf, owner, "tol", tol, "positive, or None")
    check(method == "bngd" or a0 is None, owner, "a0", a0, "left out for gd, which has none")
    rates = _starts(problem, lr, lr_a, w0, a0, method, seed, owner)
    state = _GD(problem, rates) if method == "gd" else _BNGD(problem, rates, order == "alternating")
    if record == "all":
        recorded = list(range(steps + 1))
    elif record == "log":
        recorded = _spread(steps, 100)
    else:
        recorded = [steps]
    return _go(problem, state, rates, steps, recorded, tol=tol, every=1, until_unchanged=False)


def convergence_map(
    problem: OLS,
    lrs: Values,
    lr_as: Values,
    steps: int = 2000,
    w0: Values = None,
    a0: float | None = None,
    *,
    order: Order = "simultaneous",
    tol: float = CONVERGED,
    seed: int = 0,
) -> ConvergenceMap:
    """BNGD for every pair of *lrs* [n] and *lr_as* [m], from one start.

    Runs end early at excess <= tol S, and where nothing can change any more: what is shown of these is right to about 1e-6.
    Arguments and exceptions are those of :func:`run`.

    >>> found = convergence_map(OLS([1.0, 2.0, 4.0], u=[1.0, 1.0, 1.0]), [1e-3, 1.0, 1e9], [0.1, 1.0], steps=500)
    >>> found.status
    [['progressing', 'progressing'], ['converged', 'converged'], ['stalled', 'stalled']]
    """
    owner = "convergence_map"
    columns = _tensor(lrs, owner, "lrs"), _tensor(lr_as, owner, "lr_as")
    for name, values in zip(("lrs", "lr_as"), columns, strict=True):
        check(values.ndim == 1 and len(values) > 0, owner, f"the shape of {name}", tuple(values.shape), "(n,), n >= 1")
    if order not in get_args(Order):
        unknown("bngd order", order, get_args(Order))
    check(steps >= 1, owner, "steps", steps, ">= 1")
    check(0 < tol < math.inf, owner, "tol", tol, "positive")
    grid = torch.cartesian_prod(*columns)
    rates = _starts(problem, grid[:, 0], grid[:, 1], w0, a0, "bngd", seed, owner)
    state = _BNGD(problem, rates, order == "alternating")
    found = _go(problem, state, rates, steps, [steps], tol=tol, every=16, until_unchanged=True)
    shape = len(columns[0]), len(columns[1])
    excess = found.excess.view(shape)
    m = shape[1]
    return ConvergenceMap(
        lrs=columns[0],
        lr_as=columns[1],
        steps=steps,
        excess=excess,
        relative=excess / problem.S,
        eff_lr=found.eff_lr.view(shape),
        rate=found.rate.view(shape),
        status=[found.status[i * m : (i + 1) * m] for i in range(shape[0])],
    )


def asymptotes(problem: OLS, w0: Values, a0: float | None = None) -> Asymptotes:
    """The final effective learning rate for small and for large learning rates, and the plateau between them.

    With e0 = u - (p0 / s0^2) w0: C1 = |u|^2 / |w0|^2, as a small step keeps |w|;
    C2 = s0^2 (e0'H^2 u)^2 / (a0^2 (e0'H^3 e0)^2), as a giant first step makes w = lr (a0 / s0) H e0. The plateau reaches from
    opt / C1 to C2 / opt, with opt the best effective learning rate. Where w0 is parallel to g, e0'H^2 u = 0, and the second
    law is C2 lr^-3, given for lr_a = 1 and simultaneous updates: the run stands beside the saddle, which it leaves after a
    number of steps in proportion to lr. In the long run p / s grows while |w| stays, up to
    C2_late = |u|^2 s0^2 / (a0^2 |H e0|^2).

    w0: [d]. a0: not 0; None: the best one, p0 / s0. Raises ValueError for w0 = 0, a0 = 0, and w0 orthogonal to g without an a0.
    (Derived for conjugo, and checked against runs.)

    >>> found = asymptotes(OLS([1.0, 2.0, 4.0], u=[1.0, 1.0, 1.0]), [1.0, -0.5, 0.7], a0=1.0)
    >>> round(found.C1, 4), round(found.C2, 4), found.case
    (1.7241, 0.7248, 'generic')
    """
    owner = "asymptotes"
    start = _tensor(w0, owner, "w0")
    check(start.shape == (problem.d,), owner, "the shape of w0", tuple(start.shape), f"({problem.d},)")
    check(bool((start != 0).any()), owner, "w0", "a vector of zeros", "another one")
    start = problem._inside(start)
    v = problem._root * start
    s0, p0 = float(v.norm()), float(v @ problem._b)
    a = p0 / s0 if a0 is None else float(a0)
    check(math.isfinite(a) and a != 0, owner, "a0", a, "a number other than 0 (and w0 not orthogonal to g)")
    lam, u = problem._lam, problem._u
    e = u - (p0 / s0**2) * start
    he = lam * e
    C1 = float(u @ u) / float(start @ start)
    best = problem.spectrum().eff_lr_opt
    low = best / C1
    if float(problem._b.norm()) * 1e-12 >= float((problem._root * e).norm()):
        return Asymptotes(C1, math.inf, 1, math.inf, (low, math.inf), math.inf, "w0_parallel_u")
    third = float(he @ (lam * he))
    along = float(he @ (lam * u))
    power = 1
    if abs(along) > 1e-12 * float(he.norm()) * float((lam * u).norm()):
        C2 = (s0 * along / (a * third)) ** 2
        case: Literal["generic", "w0_parallel_g"] = "generic"
    else:
        # p stays p0 in the first step and gains (p0 / (a0 sqrt(e0'H^3 e0))) |g|^2 in the second.
        g = lam * u
        p = p0 * (1 + float(g @ g) / (a * math.sqrt(third)))
        C2, power, case = (p * s0**2 / (a**2 * third)) ** 2, 3, "w0_parallel_g"
    high = (C2 / best) ** (1 / power)
    late = float(u @ u) * s0**2 / (a**2 * float(he @ he))
    return Asymptotes(C1, C2, power, late, (low, high), high / low, case)


def transform(problem: OLS, mu: float = 1.0, gamma: float = 1.0, Q: Values = None) -> OLS:
    """The problem with H -> mu Q'HQ and g -> gamma sqrt(mu) Q'g.

    That is: inputs scaled by sqrt(mu) and rotated, targets scaled by gamma.

    BNGD from gamma a0 and r Q'w0 with the learning rate :func:`equivalent_lr` goes through gamma a and r Q'w, for any r > 0:
    scaling the inputs changes nothing.

    mu, gamma: > 0. Q: [d, d] orthogonal (to 1e-10); None: the identity. Raises ValueError.
    """
    for name, value in (("mu", mu), ("gamma", gamma)):
        check(0 < value < math.inf, "transform", name, value, "positive and finite")
    c = gamma**2 * problem.c
    if Q is None:
        if problem._basis is None:
            return OLS(mu * problem._lam, u=gamma / math.sqrt(mu) * problem._u, c=c)
        return OLS(mu * problem.H, g=gamma * math.sqrt(mu) * problem.g, c=c)
    rotation = _tensor(Q, "transform", "Q")
    d = problem.d
    check(rotation.shape == (d, d), "transform", "the shape of Q", tuple(rotation.shape), f"({d}, {d})")
    off = float((rotation.T @ rotation - torch.eye(d, dtype=torch.float64)).abs().max())
    check(off <= 1e-10, "transform", "Q", f"a matrix with |Q'Q - 1| up to {off:.3g}", "orthogonal")
    turned = rotation.T @ problem.H @ rotation
    return OLS(mu * (turned + turned.T) / 2, g=gamma * math.sqrt(mu) * (rotation.T @ problem.g), c=c)


def equivalent_lr(lr: float, r: float = 1.0, gamma: float = 1.0) -> float:
    """lr r^2 / gamma^2: the learning rate of w for weights r times as long and targets gamma times as large.

    >>> equivalent_lr(0.1, r=3.0)
    0.9
    """
    for name, value in (("lr", lr), ("r", r), ("gamma", gamma)):
        check(0 < value < math.inf, "equivalent_lr", name, value, "positive and finite")
    return lr * r**2 / gamma**2


# Starts -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Starts:
    """lr, lr_a, a: [B]; w: [B, d] in the eigenbasis. A NaN in a is to be the best value."""

    lr: Tensor
    lr_a: Tensor
    w: Tensor
    a: Tensor


def _starts(
    problem: OLS, lr: Values, lr_a: Values, w0: Values, a0: Values, method: Method, seed: int, owner: str
) -> _Starts:
    found = {"lr": _tensor(lr, owner, "lr"), "lr_a": _tensor(lr_a, owner, "lr_a")}
    if a0 is not None:
        found["a0"] = _tensor(a0, owner, "a0")
    for name, values in found.items():
        fits = values.ndim <= 1 and values.numel() > 0
        check(fits, owner, f"the shape of {name}", tuple(values.shape), "a number or (B,)")
        if name != "a0":
            least = float(values.min())
            check(least > 0, owner, name, least, "> 0")
    if method == "bngd" and float(found["lr_a"].max()) > 1:
        warnings.warn("lr_a > 1 lies outside the convergence theorem (from 2 on, a diverges)", stacklevel=3)
    d = problem.d
    if w0 is None:
        if method == "gd":
            start = torch.zeros(d, dtype=torch.float64)
        else:
            start = torch.randn(d, generator=torch.Generator().manual_seed(SEEDS + seed), dtype=torch.float64)
            start /= start.norm()
    else:
        start = _tensor(w0, owner, "w0")
        fits = start.ndim in (1, 2) and start.shape[-1] == d and start.numel() > 0
        check(fits, owner, "the shape of w0", tuple(start.shape), f"({d},) or (B, {d})")
    if method == "bngd":
        check(bool((start != 0).any(-1).all()), owner, "w0", "a vector of zeros", "another one: it has no direction")
    lengths = {name: len(values) for name, values in found.items() if values.ndim == 1 and len(values) > 1}
    if start.ndim == 2 and len(start) > 1:
        lengths["w0"] = len(start)
    check(len(set(lengths.values())) <= 1, owner, "the lengths", lengths, "equal where they are not 1")
    size = max(lengths.values(), default=1)
    whole = {name: values.expand(size).clone() for name, values in found.items()}
    a = whole.get("a0", torch.full((size,), math.nan, dtype=torch.float64))
    return _Starts(whole["lr"], whole["lr_a"], problem._inside(start).expand(size, d).clone(), a)


def _tensor(values: Values, owner: str, name: str) -> Tensor:
    """A copy of *values* as float64 on the CPU. Raises ValueError unless all are finite numbers."""
    try:
        found = torch.as_tensor(values, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError):
        check(False, owner, name, values, "numbers")
        raise
    finite = bool(torch.isfinite(found).all())
    check(finite, owner, name, found.item() if found.ndim == 0 else "values that are not finite", "finite")
    return found


def _spread(steps: int, n: int) -> list[int]:
    """0, *steps*, and about *n* steps between them at even distances of their logarithm."""
    if steps == 0:
        return [0]
    return sorted({0, *(round(steps ** (i / (n - 1))) for i in range(n)), steps})


# The runs ---------------------------------------------------------------------------------------------------------------------


class _BNGD:
    """Some runs of BNGD at one step, in the coordinates v = sqrt(H) w, where s = |v| and p = v'b with b = sqrt(H) u."""

    def __init__(self, problem: OLS, starts: _Starts, alternating: bool) -> None:
        self.lam, self.root, self.b = problem._lam, problem._root, problem._b
        self.highest = float(self.lam.max())
        self.alternating = alternating
        self.v = self.root * starts.w
        # Lengths do not matter (w -> r w, lr -> r^2 lr): begin near 1, by a power of 2, which rounds nothing.
        peak = self.v.abs().amax(1)
        self.scale = torch.exp2(peak.log2().round())
        for extreme in (float(peak.min()), float(peak.max())):
            check(0 < extreme < math.inf, "run", "sqrt(H) w0", f"a largest entry of {extreme}", "not 0 and finite")
        self.v /= self.scale[:, None]
        self.lr = starts.lr / self.scale / self.scale
        greatest = float(self.lr.max())
        check(greatest <= 1e200, "run", "lr / w0'Hw0", greatest, "at most 1e200")
        self.lr_a = starts.lr_a
        self.a = starts.a
        self.e = torch.empty_like(self.v)
        self._project()
        self.a = torch.where(self.a.isnan(), self.p / self.s, self.a)

    def _project(self) -> None:
        """s and p of v, after v has been scaled down where it is huge."""
        self.s = torch.linalg.vector_norm(self.v, dim=1)
        if not float(self.s.max()) <= HUGE:
            peak = self.v.abs().amax(1)
            factor = torch.where((self.s <= HUGE) | ~torch.isfinite(peak), torch.ones_like(peak), peak)
            self.v /= factor[:, None]
            self.scale *= factor
            self.lr = self.lr / factor / factor
            self.s = torch.linalg.vector_norm(self.v, dim=1)
        self.p = self.v @ self.b

    def _error(self) -> Tensor:
        """sqrt(H) e = b - (p / s^2) v, [B, d]. Not by differences of its length: these would round at 1e-16 S."""
        return torch.addcmul(self.b, self.v, (self.p / self.s / self.s)[:, None], value=-1, out=self.e)

    def advance(self) -> None:
        """One step."""
        a = self.a
        self.a = torch.addcmul(a, self.lr_a, self.p / self.s - a)
        push = self.lr * (self.a if self.alternating else a) / self.s
        self.v.addcmul_(self._error().mul_(self.lam), push[:, None])
        self._project()

    def excess(self) -> Tensor:
        """[B]"""
        excess: Tensor = (
            (self.a - self.p / self.s).square() + torch.linalg.vector_norm(self._error(), dim=1).square()
        ) / 2
        return excess

    def measure(self) -> dict[str, Tensor]:
        """What is recorded of a step, [B] each."""
        direction = torch.linalg.vector_norm(self._error(), dim=1).square() / 2
        return {
            "excess": (self.a - self.p / self.s).square() / 2 + direction,
            "dir_excess": direction,
            "a": self.a,
            "norm_w": torch.linalg.vector_norm(self.v / self.root, dim=1) * self.scale,
            "sigma": self.s * self.scale,
            "eff_lr": self.lr * self.a * (self.p / self.s) / self.s / self.s,
        }

    def weights(self) -> Tensor:
        """[B, d], in the eigenbasis."""
        w: Tensor = self.v / self.root * self.scale[:, None]
        return w

    def settled(self, left: int, S: float) -> Tensor:
        """[B]: whether w can hardly move in *left* steps. Of the relative change this is a bound, as long as it is small."""
        best = self.p / self.s
        largest = best.abs() + (self.a - best).abs()
        change = left * self.lr * largest * math.sqrt(S) * self.highest / self.s / self.s
        still: Tensor = (change < UNCHANGED) & (self.lr_a < 2)
        return still

    def excess_after(self, steps: Tensor, direction: Tensor) -> Tensor:
        """The excess after *steps* [k] more steps in which only a moves, [B, k]. direction: the excess that stays, [B]."""
        off = (self.a - self.p / self.s)[:, None] * (1 - self.lr_a)[:, None] ** steps
        excess: Tensor = off.square() / 2 + direction[:, None]
        return excess

    def finish(self, which: Tensor, steps: int) -> None:
        """*steps* more steps of the runs *which* [B] in which only a moves."""
        best = self.p / self.s
        self.a = torch.where(which, best + (1 - self.lr_a) ** steps * (self.a - best), self.a)

    def keep(self, which: Tensor) -> None:
        """Go on with the runs *which* only."""
        for name in ("v", "scale", "lr", "lr_a", "a", "s", "p"):
            setattr(self, name, getattr(self, name)[which])
        self.e = torch.empty_like(self.v)


class _GD:
    """Some runs of gradient descent: their errors sqrt(H) (u - w), whose coordinates do not mix."""

    def __init__(self, problem: OLS, starts: _Starts) -> None:
        self.root, self.b = problem._root, problem._b
        self.error = self.b - self.root * starts.w
        self.lr = starts.lr
        self.factors = 1 - self.lr[:, None] * problem._lam

    def advance(self) -> None:
        """One step."""
        self.error.mul_(self.factors)

    def excess(self) -> Tensor:
        """[B]"""
        excess: Tensor = torch.linalg.vector_norm(self.error, dim=1).square() / 2
        return excess

    def measure(self) -> dict[str, Tensor]:
        """What is recorded of a step, [B] each."""
        v = self.b - self.error
        s = torch.linalg.vector_norm(v, dim=1)
        t = torch.where(s > 0, (v @ self.b) / s / s, torch.zeros_like(s))
        return {
            "excess": self.excess(),
            "dir_excess": torch.linalg.vector_norm(self.b - t[:, None] * v, dim=1).square() / 2,
            "a": torch.full_like(s, math.nan),
            "norm_w": torch.linalg.vector_norm(v / self.root, dim=1),
            "sigma": s,
            "eff_lr": self.lr.clone(),
        }

    def weights(self) -> Tensor:
        """[B, d], in the eigenbasis."""
        w: Tensor = (self.b - self.error) / self.root
        return w

    def keep(self, which: Tensor) -> None:
        """Go on with the runs *which* only."""
        for name in ("error", "lr", "factors"):
            setattr(self, name, getattr(self, name)[which])


QUANTITIES = ("excess", "dir_excess", "a", "norm_w", "sigma", "eff_lr")


def _go(
    problem: OLS,
    state: _BNGD | _GD,
    starts: _Starts,
    steps: int,
    recorded: Sequence[int],
    *,
    tol: float | None,
    every: int,
    until_unchanged: bool,
) -> Run:
    """Do the steps; what is *recorded* ends with the last one. every: steps between tests whether a run has come to *tol*."""
    size, S = len(starts.lr), problem.S
    looks = sorted({*_spread(steps, 60), *(round(steps * i / 20) for i in range(21))})
    out = {name: torch.empty(size, len(recorded), dtype=torch.float64) for name in QUANTITIES}
    seen = torch.full((size, len(looks)), math.nan, dtype=torch.float64)
    columns, look_columns = ({step: j for j, step in enumerate(found)} for found in (recorded, looks))
    done = torch.full((size,), steps)
    w = torch.empty(size, problem.d, dtype=torch.float64)
    active = torch.arange(size)
    # Without tol there is an end as well: numbers near the smallest ones make everything slow.
    enough = 1e-200 * S if tol is None else tol * S
    for step in range(steps + 1):
        if step:
            state.advance()
        column, look = columns.get(step), look_columns.get(step)
        asked = column is not None or look is not None
        if not asked and (tol is None or step % every or bool((state.excess() > enough).all())):
            continue
        found = state.measure()
        if column is not None:
            for name in QUANTITIES:
                out[name][active, column] = found[name]
        if look is not None:
            seen[active, look] = found["excess"]
        stop = ~(found["excess"] > enough) | ~torch.isfinite(found["excess"]) | (step == steps)
        done[active[stop]] = step
        if until_unchanged and isinstance(state, _BNGD):
            settled = state.settled(steps - step, S) & ~stop
            if bool(settled.any()):
                ahead = torch.tensor([later - step for later in looks if later > step])
                seen[active[settled], -len(ahead) :] = state.excess_after(ahead, found["dir_excess"])[settled]
                state.finish(settled, steps - step)
                found = state.measure()
                stop |= settled
        if bool(stop.any()):
            rows = active[stop]
            for name in QUANTITIES:
                out[name][rows, bisect_left(recorded, step) :] = found[name][stop, None]
            w[rows] = state.weights()[stop]
            active = active[~stop]
            state.keep(~stop)
            if not len(active):
                break
    last = {name: values[:, -1] for name, values in out.items()}
    return Run(
        lr=starts.lr,
        lr_a=starts.lr_a,
        at=torch.tensor(recorded),
        **out,
        status=_statuses(problem, last, seen, looks, CONVERGED if tol is None else tol),
        rate=_rates(seen, looks, FLOOR * S),
        steps=done,
        w=problem._outside(w),
    )


def _statuses(problem: OLS, last: dict[str, Tensor], seen: Tensor, looks: Sequence[int], tol: float) -> list[str]:
    S, excess = problem.S, last["excess"]
    tenth = max(j for j, step in enumerate(looks) if step <= 0.9 * looks[-1])
    still = seen[:, tenth] - excess < STALLED * seen[:, tenth]
    slow = last["eff_lr"].abs() < STALLED * problem.spectrum().eff_lr_max
    explained = (S - 2 * last["dir_excess"]).clamp(min=0)
    small = STALLED * math.sqrt(S)
    masks = {
        "diverged": ~(excess <= DIVERGED * seen[:, 0]),
        "converged": excess <= tol * S,
        "saddle": (last["a"].abs() <= small) & (explained.sqrt() <= small),
        "stalled": still & slow,
    }
    found = ["progressing"] * len(excess)
    for name, mask in reversed(masks.items()):
        for i in mask.nonzero().flatten().tolist():
            found[i] = name
    return found


def _rates(seen: Tensor, looks: Sequence[int], floor: float) -> Tensor:
    """Factor of the excess per step, [B], from the last look above *floor* and the last one a fifth of the steps before."""
    above = torch.isfinite(seen) & (seen > floor)
    numbers = torch.arange(len(looks))
    end = torch.where(above, numbers, -torch.ones_like(numbers)).max(1).values.clamp(min=0)
    begins = torch.tensor([max([0, *(i for i in range(j) if looks[i] <= 0.8 * looks[j])]) for j in range(len(looks))])
    begin = begins[end]
    at = torch.tensor(looks, dtype=torch.float64)
    first, final = (seen.gather(1, place[:, None])[:, 0] for place in (begin, end))
    factor: Tensor = ((final / first).log() / (at[end] - at[begin])).exp()
    return torch.where((end > 0) & (first > floor) & (final > floor), factor, torch.full_like(factor, math.nan))
