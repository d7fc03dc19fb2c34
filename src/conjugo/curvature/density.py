"""The density of all eigenvalues of an operator from some Lanczos runs with random vectors.

phi(t) = (1/P) sum_i delta(t - lambda_i). For a random unit vector v with E[v v'] = I / P, the Gauss quadrature that m Lanczos
steps from v give (nodes theta_l, masses w_l) estimates it: stochastic Lanczos quadrature, the method of Ghorbani, Krishnan &
Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", ICML 2019.

The masses of isolated eigenvalues, 1/P each, come out with a relative error of sqrt(2 / probes) that way, and those make most
of the error of the trace. Here the first run also yields the eigenvectors of the eigenvalues that it has found (deflation);
these count 1/P each, exactly, and all other runs are about what is orthogonal to them.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from conjugo._files import write_aside
from conjugo.curvature._blocks import Random, norms
from conjugo.curvature._ranks import agree
from conjugo.curvature.eigenpairs import eigsh
from conjugo.curvature.lanczos import Basis, Recurrence, check_basis
from conjugo.curvature.operator import Operator
from conjugo.errors import CorruptFile, check, unknown

__all__ = ["Probe", "SpectralDensity", "spectral_density"]

Probe: TypeAlias = Literal["rademacher", "gaussian", "orthogonal"]

FOUND = 1e-5
"""A Ritz pair whose residual is at most this times the largest value is an eigenpair."""

APART = 0.1
"""And at most this times the distance to the next Ritz value: at the edge of a bulk Ritz values are none of its eigenvalues."""

SINGLE = 16.0
"""A mass of more than this many 1/P is not that of one eigenvector (a chance of 6e-5) but of many with nearly equal values."""

POINTS = 10_000
"""Of a grid, at least."""

AT_ONCE = 2**22
"""Values of the kernel that are in memory at once."""

SAME = 1e-3
"""Relative difference of the first coefficients up to which an operator counts as the one of a checkpoint."""

TOGETHER = 2**31
"""Bytes that the bases of runs that are made at once take at most."""

SAVE_SECONDS = 300.0
"""Between two states of a run that are written, within a probe."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SpectralDensity:
    """The density of the eigenvalues of an operator (P, P), as masses at points: a measure of total mass 1.

    The points are the *eigenvalues* that were found, with mass 1/P each, and the *nodes* of each probe, with its *weights* over
    the number of probes.
    """

    nodes: list[Tensor]
    """Of each probe [m], ascending; float64 on the CPU, like all that follows."""
    weights: list[Tensor]
    """Of each probe [m]; they add up to (P - K) / P."""
    eigenvalues: Tensor
    """[K], descending: those known one by one."""
    eigenvectors: Tensor | None = None
    """[K, P]: their unit vectors, in the operator's type and place. None: not kept (by ``save``, or with a sharded basis)."""
    size: int
    """P."""
    steps: int
    probe: str
    seed: int
    n_matvec: int
    """Products that it took."""
    about: dict[str, Any] = field(default_factory=dict)
    """Of the operator: its class, dtype and, for a network, kind, bn_mode, method, names, n_examples; plain values."""

    @cached_property
    def measure(self) -> tuple[Tensor, Tensor]:
        """All points, ascending, and their masses."""
        t = torch.cat([*self.nodes, self.eigenvalues])
        masses = [w / len(self.weights) for w in self.weights] + [torch.full_like(self.eigenvalues, 1 / self.size)]
        t, order = t.sort(stable=True)
        return t, torch.cat(masses)[order]

    @property
    def probes(self) -> int:
        """Random vectors; 0: all eigenvalues are known."""
        return len(self.nodes)

    @property
    def exact(self) -> bool:
        """All eigenvalues are known one by one."""
        return len(self.eigenvalues) == self.size

    @property
    def lmax(self) -> float:
        """The largest point: not above the largest eigenvalue, up to rounding."""
        return float(self.measure[0][-1])

    @property
    def lmin(self) -> float:
        """The smallest point."""
        return float(self.measure[0][0])

    @property
    def tolerance(self) -> float:
        """4 sqrt(P) eps max|t|, eps of the operator's type: about what rounding makes of an eigenvalue that is zero."""
        eps = torch.finfo(getattr(torch, self.about.get("dtype", "float32"))).eps
        return 4 * math.sqrt(self.size) * eps * max(self.lmax, -self.lmin)

    # ---- numbers ----

    def moment(self, p: int) -> float:
        """The mean of the p-th power of the eigenvalues, p >= 0."""
        check(p >= 0, "SpectralDensity.moment", "p", p, ">= 0")
        t, w = self.measure
        return float(w @ t**p)

    def moment_stderr(self, p: int) -> float:
        """Standard error of :meth:`moment`, from the spread of the probes.

        NaN with one probe, 0 if all is known. The eigenvalues that are known one by one count as exact: with deflation this is
        the error of what the random vectors have left to say.
        """
        return _stderr([w @ t**p for t, w in zip(self.nodes, self.weights)])

    @property
    def mean(self) -> float:
        """The mean eigenvalue."""
        return self.moment(1)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return self.size * self.mean

    @property
    def trace_stderr(self) -> float:
        """Standard error of the trace; see :meth:`moment_stderr`."""
        return self.size * self.moment_stderr(1)

    @property
    def stderr(self) -> float:
        """How far, in the Wasserstein distance, the random vectors leave the density from what more of them would give.

        The integral of the standard error of :meth:`cdf` (over probes) along t, in units of t. The distance is smaller by 20 %
        on average where errors are normal. NaN with one probe, 0 if all is known. What m steps do not resolve is not in it.
        """
        if self.probes == 0:
            return 0.0
        if self.probes == 1:
            return math.nan
        t = torch.cat(self.nodes).sort().values
        curves = torch.stack([_cdf(a, w, t[:-1]) for a, w in zip(self.nodes, self.weights)])
        return float(curves.std(0) @ t.diff()) / math.sqrt(self.probes)

    def negative_mass(self, tol: float | None = None) -> float:
        """The part of the eigenvalues below -tol; tol >= 0, None: :attr:`tolerance`."""
        tol = self.tolerance if tol is None else tol
        check(tol >= 0, "SpectralDensity.negative_mass", "tol", tol, ">= 0 or None")
        t, w = self.measure
        return float(w[t < -tol].sum())

    def energy(self, p: int = 1) -> tuple[float, float]:
        """Integrals of |t|^p over positive and over negative t: the mean over all eigenvalues, p >= 1."""
        check(p >= 1, "SpectralDensity.energy", "p", p, ">= 1")
        t, w = self.measure
        parts = w * t.abs() ** p
        return float(parts[t > 0].sum()), float(parts[t < 0].sum())

    @property
    def effective_rank(self) -> float:
        """(sum |lambda|)^2 / sum lambda^2: so many equal eigenvalues would have these sums. From 1 to P; NaN for zeros."""
        squares = self.moment(2)
        return self.size * sum(self.energy()) ** 2 / squares if squares > 0 else math.nan

    def ratio(self, k: int) -> float:
        """lambda_1 / lambda_k of the k largest eigenvalues; NaN unless these are known one by one, and lambda_k is positive."""
        check(1 <= k <= self.size, "SpectralDensity.ratio", "k", k, f"from 1 to P = {self.size}")
        if k > len(self.eigenvalues):
            return math.nan
        last = float(self.eigenvalues[k - 1])
        highest = max((float(t[-1]) for t in self.nodes), default=-math.inf)
        return float(self.eigenvalues[0]) / last if last > 0 and highest <= last else math.nan

    def summary(self) -> dict[str, float]:
        """The main numbers: lambda_max, lambda_min, trace, negative_mass, effective_rank, ... NaN: not known."""
        positive, negative = self.energy()
        positive_square, negative_square = self.energy(2)
        return {
            "lambda_max": self.lmax,
            "lambda_min": self.lmin,
            "mean": self.mean,
            "trace": self.trace,
            "trace_stderr": self.trace_stderr,
            "stderr": self.stderr,
            "negative_mass": self.negative_mass(),
            "positive_energy": positive,
            "negative_energy": negative,
            "positive_square": positive_square,
            "negative_square": negative_square,
            "effective_rank": self.effective_rank,
            "largest_stable_step": 2 / self.lmax if self.lmax > 0 else math.inf,
            "known": float(len(self.eigenvalues)),
            "size": float(self.size),
            "probes": float(self.probes),
            "steps": float(self.steps),
            "n_matvec": float(self.n_matvec),
        }

    # ---- curves ----

    def cdf(self, t: Tensor) -> Tensor:
        """The part of the eigenvalues up to each of *t*: float64."""
        return _cdf(*self.measure, torch.as_tensor(t, dtype=torch.float64))

    def quantile(self, q: float) -> float:
        """The smallest point up to which at least the part *q*, in [0, 1], of the eigenvalues lies."""
        check(0 <= q <= 1, "SpectralDensity.quantile", "q", q, "in [0, 1]")
        t, w = self.measure
        return float(t[min(int(torch.searchsorted(w.cumsum(0), q - 1e-12)), len(t) - 1)])

    def density(
        self,
        grid: Tensor | None = None,
        *,
        sigma: float | None = None,
        sigma_squared_ref: float | None = None,
        normalize: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The density with each point smoothed to a normal distribution: (t [n], phi [n]), float64.

        grid: where; None: evenly from 4 standard deviations below the smallest point to 4 above the largest.
        sigma: standard deviation, > 0; None: the range of the points / steps. sigma_squared_ref: the variance is this times
        max(1, R), with R the mean over probes of the largest node minus that of the smallest, plus 0.02, as in the paper's
        published code (which has 1e-5 to 1e-1 there).
        normalize: divide by the sum over the grid times its spacing.

        Raises ValueError for values out of range, or both widths.
        """
        s = self._width(sigma, sigma_squared_ref)
        t = self._grid(s) if grid is None else torch.as_tensor(grid, dtype=torch.float64)
        phi = _smooth(t, *self.measure, s)
        return t, phi / (phi.sum() * (t[1] - t[0])) if normalize else phi

    def density_stderr(
        self, grid: Tensor | None = None, *, sigma: float | None = None, sigma_squared_ref: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The standard error of :meth:`density` (without *normalize*) at each t; NaN with one probe, see
        :meth:`moment_stderr`."""
        s = self._width(sigma, sigma_squared_ref)
        t = self._grid(s) if grid is None else torch.as_tensor(grid, dtype=torch.float64)
        mean, squares = torch.zeros_like(t), torch.zeros_like(t)
        if self.probes == 1:
            return t, torch.full_like(t, math.nan)
        for count, (nodes, weights) in enumerate(zip(self.nodes, self.weights), start=1):  # Welford 1962
            off = _smooth(t, nodes, weights, s) - mean
            mean += off / count
            squares += off.square() * (1 - 1 / count)
        return t, (squares / max(1, self.probes * (self.probes - 1))).sqrt()

    def log_density(
        self, points: int = 2000, *, threshold: float | None = None, sigma: float = 0.05
    ) -> tuple[Tensor, Tensor]:
        """The density along a symmetric-logarithmic axis, on which masses near zero and far outliers can be seen.

        Its coordinate is x = asinh(t / (2 threshold)) / ln 10: about sign(t) log10(|t| / threshold) for |t| above *threshold*,
        linear below. Gives t [points] (evenly spaced in x) and the mass per unit of x, that is per decade: float64.
        threshold: > 0; None: 1e-5 max|t|. sigma: standard deviation of the smoothing in x, > 0.
        """
        t, w = self.measure
        size = max(self.lmax, -self.lmin)
        threshold = 1e-5 * (size or 1.0) if threshold is None else threshold
        check(threshold > 0, "SpectralDensity.log_density", "threshold", threshold, "> 0 or None")
        check(sigma > 0, "SpectralDensity.log_density", "sigma", sigma, "> 0")
        check(points >= 2, "SpectralDensity.log_density", "points", points, ">= 2")
        x = torch.asinh(t / (2 * threshold)) / math.log(10)
        axis = torch.linspace(float(x[0]) - 4 * sigma, float(x[-1]) + 4 * sigma, points, dtype=torch.float64)
        return 2 * threshold * torch.sinh(axis * math.log(10)), _smooth(axis, x, w, sigma)

    def wasserstein(self, other: Tensor | SpectralDensity) -> float:
        """The distance (W1) to *other*, exactly: the integral of |difference of the cdf|, in units of t.

        other: another density, or eigenvalues [n] with mass 1/n each.
        """
        if isinstance(other, SpectralDensity):
            points, masses = other.measure
        else:
            points = other.detach().to("cpu", torch.float64).reshape(-1).sort().values
            check(len(points) > 0, "SpectralDensity.wasserstein", "the number of eigenvalues", 0, ">= 1")
            masses = torch.full_like(points, 1 / len(points))
        t, w = self.measure
        all_points, order = torch.cat([t, points]).sort()
        # Both have the mass 1, up to rounding.
        difference = torch.cat([w / w.sum(), -masses / masses.sum()])[order].cumsum(0)
        return float(difference[:-1].abs() @ all_points.diff())

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        """All but the eigenvectors, as plain values."""
        return {
            "format": 1,
            "size": self.size,
            "steps": self.steps,
            "probe": self.probe,
            "seed": self.seed,
            "n_matvec": self.n_matvec,
            "about": dict(self.about),
            "eigenvalues": self.eigenvalues.tolist(),
            "nodes": [t.tolist() for t in self.nodes],
            "weights": [w.tolist() for w in self.weights],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The density of which :meth:`to_dict` gave *values*. Raises CorruptFile if they are not whole."""
        try:
            if values["format"] != 1:
                raise ValueError(f"format {values['format']!r} instead of 1")
            nodes, weights = ([_numbers(x) for x in values[name]] for name in ("nodes", "weights"))
            if [len(x) for x in nodes] != [len(x) for x in weights]:
                raise ValueError("nodes and weights do not belong together")
            plain = {name: values[name] for name in ("size", "steps", "probe", "seed", "n_matvec")}
            found = cls(
                nodes=nodes,
                weights=weights,
                eigenvalues=_numbers(values["eigenvalues"]),
                about=dict(values["about"]),
                **plain,
            )
            if not math.isclose(float(found.measure[1].sum()), 1.0, abs_tol=1e-6):
                raise ValueError("the masses do not add up to 1")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptFile(f"not a spectral density ({type(error).__name__}: {error})") from error
        return found

    def save(self, path: Path | str) -> None:
        """Write a JSON file, whole or not at all; the eigenvectors are left out."""
        write_aside(Path(path), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read such a file: the same numbers to the last bit. Raises CorruptFile if it is damaged or something else."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(values)
        except (ValueError, CorruptFile) as error:
            raise CorruptFile(f"{path}: {error}") from error

    def _width(self, sigma: float | None, squared: float | None) -> float:
        owner = "SpectralDensity.density"
        check(sigma is None or squared is None, owner, "sigma", sigma, "None where sigma_squared_ref is given")
        check(sigma is None or sigma > 0, owner, "sigma", sigma, "> 0 or None")
        check(squared is None or squared > 0, owner, "sigma_squared_ref", squared, "> 0 or None")
        if sigma is not None:
            return sigma
        if squared is not None:
            known = [self.eigenvalues] if len(self.eigenvalues) else []
            draws = [torch.cat([t, *known]) for t in self.nodes] or known
            extent = sum(float(t.max() - t.min()) for t in draws) / len(draws) + 0.02
            return math.sqrt(squared * max(1.0, extent))
        extent = self.lmax - self.lmin
        return (extent or abs(self.lmax) or 1.0) / self.steps

    def _grid(self, s: float) -> Tensor:
        low, high = self.lmin - 4 * s, self.lmax + 4 * s
        points = min(max(POINTS, math.ceil(4 * (high - low) / s)), 100 * POINTS)
        return torch.linspace(low, high, points, dtype=torch.float64)


def spectral_density(
    op: Operator,
    probes: int = 10,
    steps: int = 80,
    *,
    probe: Probe = "rademacher",
    deflate: bool = True,
    seed: int = 0,
    probes_at_once: int | Literal["auto"] = "auto",
    tol: float | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    shard_basis: bool = False,
    checkpoint: Path | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> SpectralDensity:
    """The density of all eigenvalues of *op* (P, P), by *probes* Lanczos runs of *steps* products each.

    probes: random vectors, >= 1; the error falls as 1 / sqrt(probes). steps: >= 1, clipped to P with a warning; the finest
    detail within the bulk is about the range of the spectrum / steps.
    probe: their law: ``"rademacher"`` (signs, no variance from the diagonal), ``"gaussian"``, or ``"orthogonal"`` (Gaussian and
    orthogonal to each other; at most P of them, and all are in memory).
    deflate: the eigenvalues that the first run finds (residual <= 1e-5 max|theta|; at most steps / 2 of them, unless the run
    ends early) have the mass 1/P each, and the other runs are orthogonal to their eigenvectors. A value of which the run's
    random vector has more than 16/P is left to the quadrature: it is that of a cluster. With steps >= P, all eigenvalues are
    computed. False: the paper's method.
    seed: of the random vectors.
    probes_at_once: runs whose vectors are multiplied as one block, which takes as many bases in memory (the first run is alone
    where it deflates); ``"auto"``: ``op.rows_at_once`` if it has one, else 1, while the bases take at most 2 GiB together.
    tol: no more probes once there are at least 3 and :attr:`SpectralDensity.stderr` is at most *tol* times the range of the
    spectrum; None: all of *probes*.
    basis_dtype, basis_device, shard_basis: of the Lanczos vectors, see :func:`lanczos`. With *shard_basis* the result has no
    eigenvectors.
    checkpoint: a file for the state, written after each probe and every 5 minutes within one. If it exists, the run goes on
    from it, to the same bits (on the same machine), with one more product to see that the operator is the same; also to more
    probes. The file stays. Of a process group, rank 0 reads and writes it.
    callback: is called with the products so far and those planned, after each step.

    With a process group all ranks call this together and get the same. Raises ValueError for values out of range, or a
    checkpoint of another operator or other settings; UnknownName for another *probe*; CorruptFile for a damaged checkpoint;
    FloatingPointError if a product is not finite.

    >>> from conjugo.curvature import from_matvec
    >>> sizes = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> sizes[:2] = torch.tensor([50.0, -20.0])
    >>> found = spectral_density(from_matvec(lambda v: sizes * v, 2000, dtype=torch.float64), probes=3, steps=30)
    >>> [round(x, 6) for x in found.eigenvalues.tolist()], found.wasserstein(sizes) < 0.01, found.n_matvec
    ([50.0, -20.0], True, 90)
    """
    check_basis(op, "spectral_density", basis_dtype, shard_basis)
    check(probes >= 1, "spectral_density", "probes", probes, ">= 1")
    check(steps >= 1, "spectral_density", "steps", steps, ">= 1")
    if probe not in get_args(Probe):
        unknown("spectral_density probe", probe, get_args(Probe))
    if probe == "orthogonal":
        check(probes <= op.size, "spectral_density", "orthogonal probes", probes, f"at most P = {op.size}")
    accepted = probes_at_once == "auto" or probes_at_once >= 1
    check(accepted, "spectral_density", "probes_at_once", probes_at_once, ">= 1 or 'auto'")
    check(tol is None or tol > 0, "spectral_density", "tol", tol, "> 0 or None")
    if steps > op.size:
        warnings.warn(f"spectral_density: steps = {steps} is more than P = {op.size}, which is taken", stacklevel=2)
        steps = op.size
    if deflate and steps == op.size:
        return _all_of_it(op, steps, probe, seed)
    job = _Job(op, steps, probe, deflate, seed, lambda room: Basis(op, room, basis_dtype, basis_device, shard_basis))
    if checkpoint is not None:
        job.resume(Path(checkpoint))
    return job.run(probes, None if probes_at_once == "auto" else probes_at_once, tol, callback)


class _Job:
    """The runs that make a density."""

    def __init__(
        self, op: Operator, steps: int, probe: Probe, deflate: bool, seed: int, basis: Callable[[int], Basis]
    ) -> None:
        self.op, self.steps, self.probe, self.deflate, self.seed, self.basis = op, steps, probe, deflate, seed, basis
        self.done = 0
        self.nodes: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.eigenvalues = torch.zeros(0, dtype=torch.float64)
        self.locked: Basis | None = None
        self.runs: list[Recurrence] = []
        self.first: list[float] = []
        """The first alpha and beta: the operator can be told by them."""
        self.path: Path | None = None
        self.draw(0)

    def run(
        self, probes: int, at_once: int | None, tol: float | None, callback: Callable[[int, int], None] | None
    ) -> SpectralDensity:
        planned = probes * self.steps
        saved = time.monotonic()
        while self.runs or not self.enough(probes, tol):
            if not self.runs:
                count = (
                    1
                    if self.deflate and self.locked is None
                    else min(at_once or self.block(), probes - len(self.nodes))
                )
                starts = [self.start() for _ in range(min(count, self.room()))]
                self.runs = [self.recurrence(start) for start in starts]
            while going := [run for run in self.runs if not run.done]:
                vectors = going[0].vector[None] if len(going) == 1 else torch.stack([run.vector for run in going])
                for run, product in zip(going, self.op.matmat(vectors), strict=True):
                    run.take(product)
                self.first = self.first or [self.runs[0].alpha[0], self.runs[0].beta[0]]
                self.done += len(going)
                if self.path is not None and agree(time.monotonic() - saved > SAVE_SECONDS, self.op.group):
                    self.save()
                    saved = time.monotonic()
                if callback is not None:
                    callback(self.done, planned)
            for run in self.runs:
                self.settle(run)
            self.runs = []
            if self.path is not None:
                self.save()
                saved = time.monotonic()
        return self.result()

    def enough(self, probes: int, tol: float | None) -> bool:
        if len(self.nodes) >= probes or not self.room():
            return True
        if tol is None or len(self.nodes) < 3:
            return False
        found = self.result()
        return agree(found.stderr <= tol * (found.lmax - found.lmin), self.op.group)

    def room(self) -> int:
        """Random vectors that there is room for."""
        return self.op.size - len(self.eigenvalues) - (self.starts.n if self.probe == "orthogonal" else 0)

    def block(self) -> int:
        """How many runs to make at once. An operator knows it better once it has made products."""
        room = TOGETHER // (self.steps * self.starts.rows.shape[1] * self.starts.rows.element_size())
        return agree(max(1, min(int(getattr(self.op, "rows_at_once", 1)), room)), self.op.group)

    def draw(self, count: int) -> None:
        """Begin the random vectors anew, and skip *count* of them."""
        self.random = Random(self.op, self.seed)
        self.started = 0
        self.starts = self.basis(0)
        for _ in range(count):
            self.start()

    def start(self) -> Tensor:
        """The next random vector, a unit vector orthogonal to what it should be orthogonal to."""
        self.started += 1
        spaces = ([self.locked] if self.locked is not None else []) + ([self.starts] if self.starts.n else [])
        while True:
            vector = (self.random.signs(1) if self.probe == "rademacher" else self.random.normal(1))[0]
            length = float(norms(vector[None]))
            vector /= length
            for _ in range(2):
                for space in spaces:
                    vector = space.project(vector)
            left = agree(float(norms(vector[None])), self.op.group)
            if left > math.sqrt(torch.finfo(self.op.dtype).eps):  # else nothing but rounding noise
                break
        vector /= left
        if self.probe == "orthogonal":
            self.starts = self.starts.grown(vector)
        return vector

    def recurrence(self, start: Tensor) -> Recurrence:
        basis = self.basis(self.steps)
        return Recurrence(self.op, start, self.steps, basis, locked=self.locked, owner="spectral_density")

    def settle(self, run: Recurrence) -> None:
        """Take the quadrature of a finished run in."""
        result = run.result()
        values, weights, residuals = result.ritz()
        size = self.op.size
        deflating = self.deflate and self.locked is None
        if deflating:
            gaps = torch.cat([values.new_full((1,), math.inf), values.diff(), values.new_full((1,), math.inf)])
            known = residuals <= torch.minimum(FOUND * values.abs().max(), APART * torch.minimum(gaps[1:], gaps[:-1]))
            found = known & (weights * size <= SINGLE)
            chosen = found.nonzero()[:, 0]
            if result.breakdown is None:
                chosen = chosen[residuals[chosen].argsort(stable=True)[: self.steps // 2]]
            chosen = chosen.sort(descending=True).values
            self.eigenvalues = values[chosen]
            self.lock(result.ritz_parts(chosen))
            rest = torch.ones(len(values), dtype=torch.bool)
            rest[chosen] = False
            values, weights = values[rest], weights[rest]
        share = (size - len(self.eigenvalues)) / size
        counts = float(weights.sum()) > share / 2  # else next to nothing was left of the vector
        if counts:
            self.nodes.append(values)
            self.weights.append(weights * (share / weights.sum()))
        if deflating:
            self.draw(int(counts))

    def lock(self, parts: Tensor) -> None:
        locked = self.basis(len(parts))
        for part in parts:
            for _ in range(2):
                locked.remove(part)
                part /= locked.length(part)
            locked.append(part)
        self.locked = locked

    def result(self) -> SpectralDensity:
        vectors = None
        if self.locked is None:
            vectors = torch.zeros(0, self.op.size, dtype=self.op.dtype, device=self.op.device)
        elif not self.locked.sharded:
            vectors = self.locked.rows[: self.locked.n].to(device=self.op.device, dtype=self.op.dtype)
        return SpectralDensity(
            nodes=list(self.nodes),
            weights=list(self.weights),
            eigenvalues=self.eigenvalues,
            eigenvectors=vectors,
            size=self.op.size,
            steps=self.steps,
            probe=self.probe,
            seed=self.seed,
            n_matvec=self.done,
            about=_about(self.op),
        )

    # ---- state ----

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        own = {name: getattr(self, name) for name in ("steps", "probe", "deflate", "seed")}
        about = {
            name: value for name, value in _about(self.op).items() if name != "method"
        }  # known after a product only
        return {**own, "size": self.op.size, "basis_dtype": str(self.starts.rows.dtype), **about}

    def save(self) -> None:
        assert self.path is not None
        state = {
            "format": "conjugo spectral density 1",
            "settings": self.settings,
            "done": self.done,
            "nodes": self.nodes,
            "weights": self.weights,
            "eigenvalues": self.eigenvalues,
            "first": self.first,
            "started": self.started,
            "locked": None if self.locked is None else self.locked.saved(),
            "runs": [run.state() for run in self.runs],
        }
        if _rank(self.op) == 0:
            write_aside(self.path, lambda file: torch.save(state, file))

    def resume(self, path: Path) -> None:
        """Keep the state in *path*, and go on from what is there."""
        self.path = path
        state = self.read(path)
        if state is None:
            return
        for name in ("done", "nodes", "weights", "eigenvalues", "first"):
            setattr(self, name, state[name])
        if self.first:
            self.see_that_it_is_the_same(path)
        if state["locked"] is not None:
            self.locked = self.basis(len(state["locked"]))
            self.locked.restore(state["locked"])
        before = state["started"] - len(state["runs"])
        self.draw(before)
        for saved in state["runs"]:
            run = self.recurrence(self.start())
            run.restore(saved)
            self.runs.append(run)

    def read(self, path: Path) -> dict[str, Any] | None:
        """What rank 0 finds in *path*, on all ranks; None: there is no file. An error is raised on all."""
        found: list[Any] = [None, None]
        if _rank(self.op) == 0:
            try:
                found = [self.checked(path), None]
            except (CorruptFile, ValueError) as error:
                found = [None, error]
        if self.op.group is not None:
            dist.broadcast_object_list(found, src=dist.get_global_rank(self.op.group, 0), group=self.op.group)
        if found[1] is not None:
            raise found[1]
        state: dict[str, Any] | None = found[0]
        return state

    def checked(self, path: Path) -> dict[str, Any] | None:
        check(path.parent.is_dir(), "spectral_density", "the folder of checkpoint", str(path.parent), "there")
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
            if state["format"] != "conjugo spectral density 1":
                raise ValueError(state["format"])
        except Exception as error:  # whatever a damaged archive makes torch raise
            raise CorruptFile(f"{path}: not a checkpoint of spectral_density ({error})") from error
        for name, mine in self.settings.items():
            check(settings.get(name) == mine, "spectral_density", f"{name} of {path}", settings.get(name), repr(mine))
        return state

    def see_that_it_is_the_same(self, path: Path) -> None:
        """One product with the first random vector."""
        locked, self.locked = self.locked, None
        self.draw(0)
        run = Recurrence(self.op, self.start(), 1, self.basis(1), owner="spectral_density")
        run.take(self.op.matvec(run.vector))
        self.locked = locked
        alpha, beta = self.first
        off = abs(run.alpha[0] - alpha) + abs(run.beta[0] - beta)
        same = off <= SAME * (abs(alpha) + beta)
        accepted = f"that of the operator here, ({run.alpha[0]:.6g}, {run.beta[0]:.6g})"
        check(same, "spectral_density", f"the first Lanczos coefficients of {path}", (alpha, beta), accepted)


def _all_of_it(op: Operator, steps: int, probe: Probe, seed: int) -> SpectralDensity:
    pairs = eigsh(op, op.size, max_matvec=op.size)
    return SpectralDensity(
        nodes=[],
        weights=[],
        eigenvalues=pairs.values,
        eigenvectors=pairs.vectors,
        size=op.size,
        steps=steps,
        probe=probe,
        seed=seed,
        n_matvec=pairs.n_matvec,
        about=_about(op),
    )


def _about(op: Operator) -> dict[str, Any]:
    about: dict[str, Any] = {"operator": type(op).__name__, "dtype": str(op.dtype).removeprefix("torch.")}
    for name in ("kind", "bn_mode", "method", "n_examples"):
        if hasattr(op, name):
            about[name] = getattr(op, name)
    if hasattr(op, "names"):
        about["names"] = list(op.names)
    return about


def _rank(op: Operator) -> int:
    return 0 if op.group is None else dist.get_rank(op.group)


def _numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _cdf(points: Tensor, masses: Tensor, t: Tensor) -> Tensor:
    """The mass of ascending *points* up to each of *t*."""
    sums = torch.cat([masses.new_zeros(1), masses.cumsum(0)])
    return sums[torch.searchsorted(points, t, right=True)]


def _smooth(t: Tensor, points: Tensor, masses: Tensor, s: float) -> Tensor:
    """The sum of normal densities of standard deviation *s* around *points* with *masses*, at each of *t*."""
    if not len(points):
        return torch.zeros_like(t)
    phi = torch.empty_like(t)
    rows = max(1, AT_ONCE // len(points))
    for start in range(0, len(t), rows):
        part = t[start : start + rows, None]
        phi[start : start + rows] = torch.exp(((part - points) / s).square_().mul_(-0.5)) @ masses
    return phi / (s * math.sqrt(2 * math.pi))


def _stderr(samples: list[Tensor]) -> float:
    if len(samples) < 2:
        return 0.0 if not samples else math.nan
    return float(torch.stack(samples).std()) / math.sqrt(len(samples))
