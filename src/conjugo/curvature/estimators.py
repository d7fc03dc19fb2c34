"""Trace and diagonal of a symmetric operator from some products with random vectors, and how well they are known.

With w a random vector, E[w w'] = I, tr A = E[w' A w] and diag A = E[w * A w] entry by entry (Hutchinson 1990). The large
eigenvalues make most of the variance; Hutch++ (Meyer, Musco, Musco & Woodruff 2021) and, with every product used twice, XTrace
and XDiag (Epperly, Tropp & Webber 2024, "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
Matrix Anal. Appl. 45:1-23) find their space first and estimate the rest only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from conjugo._tensors import wide_dtype
from conjugo.curvature._blocks import (
    ROWS,
    Random,
    combine,
    inner,
    norms,
    orthonormal,
    pieces,
    products,
    remove,
    require_finite,
)
from conjugo.curvature._ranks import agree
from conjugo.curvature.operator import Operator
from conjugo.errors import check, unknown

__all__ = ["DiagonalMethod", "Estimate", "TraceMethod", "diagonal", "trace"]

TraceMethod: TypeAlias = Literal["xtrace", "hutch++", "hutchinson"]
DiagonalMethod: TypeAlias = Literal["hutchinson", "xdiag"]

Value = TypeVar("Value", float, Tensor)

SHIFTS = 3
"""Covariances of XDiag's samples are taken over the pairs (i, i + shift) for so many shifts."""


@dataclass(frozen=True)
class Estimate(Generic[Value]):
    """An estimated number, or tensor entry by entry, and its uncertainty."""

    value: Value
    stderr: Value
    """Standard error, estimated from the spread of the samples; 0 where the value is exact."""
    degrees_of_freedom: int
    """Of the standard error; 0: the value is exact."""
    n_matvec: int
    """Products that it took."""

    def interval(self, level: float = 0.95) -> tuple[Value, Value]:
        """Lower and upper end of the confidence interval, by Student's t distribution.

        level: chance that the interval contains the truth, in (0, 1); as far as the samples are near to normal. Raises
        ValueError for another level.
        """
        check(0 < level < 1, "Estimate.interval", "level", level, "in (0, 1)")
        if not self.degrees_of_freedom:
            return self.value, self.value
        from scipy.special import stdtrit

        half = float(stdtrit(self.degrees_of_freedom, (1 + level) / 2)) * self.stderr
        return self.value - half, self.value + half


def trace(op: Operator, method: TraceMethod = "xtrace", matvecs: int = 30, *, seed: int = 0) -> Estimate[float]:
    """The trace of *op* (P, P): the sum of its eigenvalues.

    matvecs: products at most, at least 4 (``"xtrace"``), 6 (``"hutch++"``) or 2 (``"hutchinson"``). From P on, the trace is
    computed from P products. seed: of the random vectors.
    method: ``"hutchinson"`` has a relative error of about sqrt(2 / matvecs) |A|_F / tr A, and needs memory for 16 vectors;
    ``"hutch++"`` and ``"xtrace"`` are better by far where a few eigenvalues are much larger than the others, and not worse
    elsewhere; they keep about matvecs and 2 matvecs vectors.

    The standard error is that of the samples' spread; for ``"hutch++"`` of the last third of the products, which is all that
    is random once the large eigenvalues are found; for ``"xtrace"`` with what the samples have in common, as they share their
    vectors. With a process group all ranks call this together and get the same. Raises ValueError for values out of range,
    UnknownName for another method, FloatingPointError if a product is not finite.

    >>> from conjugo.curvature import from_matvec
    >>> sizes = 1 / torch.arange(1.0, 1001.0, dtype=torch.float64) ** 2
    >>> found = trace(from_matvec(lambda v: sizes * v, 1000, dtype=torch.float64))
    >>> abs(found.value - float(sizes.sum())) < 0.02, found.stderr < 0.01, found.n_matvec
    (True, True, 30)
    """
    fewest = {"xtrace": 4, "hutch++": 6, "hutchinson": 2}
    if method not in get_args(TraceMethod):
        unknown("trace method", method, get_args(TraceMethod))
    _check(op, "trace", f"matvecs of {method}", matvecs, fewest[method])
    if matvecs >= op.size:
        return Estimate(agree(float(_exact(op, "trace").sum(dtype=torch.float64)), op.group), 0.0, 0, op.size)
    before, random = op.n_matvec, Random(op, seed)
    estimate = {"xtrace": _xtrace, "hutch++": _hutch, "hutchinson": _hutchinson}[method]
    value, stderr, freedom = agree(estimate(op, matvecs, random), op.group).tolist()
    return Estimate(value, stderr, int(freedom), op.n_matvec - before)


def diagonal(
    op: Operator, method: DiagonalMethod = "hutchinson", matvecs: int = 30, *, seed: int = 0
) -> Estimate[Tensor]:
    """The diagonal of *op* (P, P), and the standard error of each entry: [P], in the operator's type and on its device.

    matvecs: products at most, at least 2 (``"hutchinson"``) or 4 (``"xdiag"``). From P on, the diagonal is computed from P
    products. seed: of the random vectors.
    method: ``"hutchinson"`` gives entry i an error of sqrt(sum over j != i of A_ij^2 / matvecs) and needs memory for 16
    vectors; ``"xdiag"`` is better by far where a few eigenvalues are much larger than the others, and keeps 2 matvecs vectors.

    With a process group all ranks call this together and get the same. Raises ValueError for values out of range, UnknownName
    for another method, FloatingPointError if a product is not finite.

    >>> from conjugo.curvature import from_matvec
    >>> sizes = torch.arange(1.0, 101.0)
    >>> found = diagonal(from_matvec(lambda v: sizes * v, 100), matvecs=5)
    >>> torch.equal(found.value, sizes), float(found.stderr.max())
    (True, 0.0)
    """
    if method not in get_args(DiagonalMethod):
        unknown("diagonal method", method, get_args(DiagonalMethod))
    _check(op, "diagonal", f"matvecs of {method}", matvecs, {"hutchinson": 2, "xdiag": 4}[method])
    if matvecs >= op.size:
        exact = agree(_exact(op, "diagonal"), op.group)
        return Estimate(exact, torch.zeros_like(exact), 0, op.size)
    random = Random(op, seed)
    before = op.n_matvec
    estimate = {"hutchinson": _diagonal_hutchinson, "xdiag": _xdiag}[method]
    found = agree(estimate(op, matvecs, random), op.group).to(op.dtype)
    freedom = (matvecs // 2 if method == "xdiag" else matvecs) - 1
    return Estimate(found[0], found[1], freedom, op.n_matvec - before)


class _Sketch(NamedTuple):
    """What the products with random vectors say of the operator's large eigenvalues; *k* vectors w_i, rank r <= k."""

    basis: Tensor
    """Q, [r, P]: orthonormal rows that span all A w_i."""
    coordinates: Tensor
    """R, [r, k]: A w_i = R[:, i] @ Q. float64 on the CPU, as are the directions."""
    directions: Tensor
    """S, [r, k]: the span of all A w_j but A w_i consists of those y @ Q that have y @ S[:, i] = 0; a column of S is a unit
    vector, or 0 if the span is the same without A w_i."""

    def second(self) -> tuple[Tensor, Tensor]:
        """a and b, [k, k]: a_ij s_i + b_ij s_j is the unit vector orthogonal to s_j that the span loses with A w_i when it has
        lost A w_j already, or 0 if it loses nothing (i = j, for one). s_i are the columns of S.
        """
        cosines = self.directions.T @ self.directions
        rest = 1 - cosines.square()
        new = (rest > 1e-12) & (cosines.diagonal()[:, None] > 0.5)
        new.fill_diagonal_(False)
        a = new / rest.clamp(min=1e-12).sqrt()
        return a, -a * cosines


def _sketch(op: Operator, vectors: Tensor, owner: str) -> _Sketch:
    """Of the products with *vectors* [k, P].

    From the singular values R = U diag(s) V', Q and R are rotated so that R = diag(s) V'. The direction that is lost without
    column i is orthogonal to all other columns: it is R^-T e_i, here diag(1/s) V' e_i, if column i is not a combination of the
    others, that is if row i of V has unit length.
    """
    found = products(op, vectors, owner)
    eps = torch.finfo(op.dtype).eps
    q, r = orthonormal(found, eps * float(norms(found).max()), op.group)
    if not len(q):
        return _Sketch(q, r, r)
    u, s, vt = torch.linalg.svd(r, full_matrices=False)
    packed = agree(torch.cat([u, s[None], vt.T]), op.group)
    u, s, vt = packed[: len(u)], packed[len(u)], packed[len(u) + 1 :].T
    rank = int((s > eps * s[0]).sum())
    u, s, vt = u[:, :rank], s[:rank, None], vt[:rank]
    needed = vt.square().sum(0) > 1 - math.sqrt(eps)
    lost = vt * (s[-1] / s)
    return _Sketch(combine(u.T, q), s * vt, needed * lost / lost.norm(dim=0).clamp(min=1e-300))


def _hutchinson(op: Operator, matvecs: int, random: Random) -> Tensor:
    samples = []
    for start in range(0, matvecs, ROWS):
        vectors = random.signs(min(ROWS, matvecs - start))
        samples.append(_forms(vectors, products(op, vectors, "trace")))
    return _summary(torch.cat(samples))


def _hutch(op: Operator, matvecs: int, random: Random) -> Tensor:
    """tr A = tr Q A Q' + tr (I - Q'Q) A (I - Q'Q): the first exactly, the second from the products that are left."""
    count = matvecs // 3
    found = products(op, random.signs(count), "trace")
    q, _ = orthonormal(found, torch.finfo(op.dtype).eps * float(norms(found).max()), op.group)
    known = _forms(q, products(op, q, "trace")).sum()
    rest = []
    left = matvecs - count - len(q)
    for start in range(0, left, ROWS):
        vectors = random.signs(min(ROWS, left - start))
        remove(q, vectors)
        rest.append(_forms(vectors, products(op, vectors, "trace")))
    return _summary(known + torch.cat(rest))


def _xtrace(op: Operator, matvecs: int, random: Random) -> Tensor:
    """The mean of the samples i = 1...k: with Q_i spanning all A w_j but A w_i, and p = w_i - Q_i'Q_i w_i,
    tr A = tr Q_i A Q_i' + (P - rank Q_i) E[p'Ap / p'p].
    """
    vectors = random.normal(matvecs // 2)
    sketch = _sketch(op, vectors, "trace")
    h = inner(sketch.basis, products(op, sketch.basis, "trace"))
    along, squares = inner(sketch.basis, vectors), norms(vectors).square()

    def samples(*lost: Tensor) -> Tensor:
        inside = along - sum(d * (d * along).sum(0) for d in lost)  # coordinates in Q of Q_i'Q_i w_i
        known = h.trace() - sum((d * (h @ d)).sum(0) for d in lost)
        form = ((along - 2 * inside) * sketch.coordinates).sum(0) + (inside * (h @ inside)).sum(0)
        dimension = op.size - len(h) + sum(d.square().sum(0).round() for d in lost)
        return known + dimension * form / (squares - inside.square().sum(0))

    found = samples(sketch.directions)
    a, b = sketch.second()
    gaps = []  # row j, column i: what sample i owes to w_j
    for j, one in enumerate(sketch.directions.T):
        both = one[:, None].expand_as(along), a[:, j] * sketch.directions + b[:, j] * one[:, None]
        gaps.append(found - samples(*both))
    gap = torch.stack(gaps).fill_diagonal_(0)
    k = len(found)
    shared = (gap * gap.T).sum() / (k * (k - 1))
    return torch.stack([found.mean(), _stderr(found, shared), torch.tensor(k - 1.0, dtype=torch.float64)])


def _diagonal_hutchinson(op: Operator, matvecs: int, random: Random) -> Tensor:
    wide = wide_dtype(op.device)
    mean, squares = (torch.zeros(op.size, dtype=wide, device=op.device) for _ in range(2))
    for start in range(0, matvecs, ROWS):
        vectors = random.signs(min(ROWS, matvecs - start))
        found = products(op, vectors, "diagonal")
        for count, (vector, product) in enumerate(zip(vectors, found, strict=True), start=start + 1):  # Welford 1962
            off = (vector * product).to(wide) - mean
            mean.add_(off, alpha=1 / count)
            squares.addcmul_(off, off, value=1 - 1 / count)
    return torch.stack([mean, (squares / (matvecs * (matvecs - 1))).sqrt()])


def _xdiag(op: Operator, matvecs: int, random: Random) -> Tensor:
    """The mean of the samples i = 1...k: with Q_i as in XTrace, diag A = diag Q_i'Q_i A + E[w_i * (I - Q_i'Q_i) A w_i].

    Where Q_i'Q_i = Q'Q - u_i u_i', u_i = s_i' Q, v_i = A u_i, and A w_i is in the span of Q, sample i is
    diag Q'Q A - u_i * v_i + c_i u_i * w_i, c_i = u_i' A w_i. Without w_j, Q'Q becomes Q'Q - u_j u_j' and u_i becomes
    a_ij u_i + b_ij u_j.
    """
    vectors = random.signs(matvecs // 2)
    sketch = _sketch(op, vectors, "diagonal")
    images = products(op, sketch.basis, "diagonal")
    k, wide = len(vectors), wide_dtype(op.device)
    result = torch.empty(2, op.size, dtype=wide, device=op.device)
    own = (sketch.directions * sketch.coordinates).sum(0)
    turned, a, b, c = (x.to(op.device, wide) for x in (sketch.directions.T, *sketch.second(), own[:, None]))
    shifts = range(1, min(k // 2, SHIFTS) + 1)
    for piece in pieces(op.size, op.device):
        q, z, w = (x[:, piece].to(wide) for x in (sketch.basis, images, vectors))
        u, v, cw = turned @ q, turned @ z, c * w
        found = u * (cw - v)
        result[0, piece] = (q * z).sum(0) + found.mean(0)
        shared = torch.zeros_like(found[0])
        for shift in shifts:
            other = torch.arange(k, device=op.device).roll(-shift)
            gaps = []
            for i, j in ((torch.arange(k, device=op.device), other), (other, torch.arange(k, device=op.device))):
                x, y = a[i, j][:, None], b[i, j][:, None]
                both = x * u[i] + y * u[j]
                gaps.append(found[i] + u[j] * v[j] - both * (x * cw[i] - x * v[i] - y * v[j]))
            shared += (gaps[0] * gaps[1]).mean(0) / len(shifts)
        result[1, piece] = _stderr(found, shared)
    return result


def _summary(samples: Tensor) -> Tensor:
    """Mean of independent samples [n], its standard error and the degrees of freedom of that: [3]."""
    n = len(samples)
    return torch.stack([samples.mean(), samples.std() / math.sqrt(n), torch.tensor(n - 1.0, dtype=torch.float64)])


def _stderr(samples: Tensor, shared: Tensor) -> Tensor:
    """Standard error of the mean of the samples [k, ...] of XTrace or XDiag, which share their random vectors.

    shared: an estimate of their covariance. Sample i, less the truth, is 0 on average over w_i, whatever the other vectors; so
    is sample i without w_j. Therefore (sample i - sample i without w_j) (sample j - sample j without w_i) is on average the
    covariance of samples i and j: all other terms of that product are 0 on average over w_i or w_j.
    """
    return (samples.var(0) / len(samples) + shared.clamp(min=0)).sqrt()


def _forms(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of *x* with the same rows of *y*: float64 [k] on the CPU."""
    pairs = [inner(a[None], b[None]).reshape(()) for a, b in zip(x, y, strict=True)]
    return torch.stack(pairs) if pairs else torch.zeros(0, dtype=torch.float64)


def _exact(op: Operator, owner: str) -> Tensor:
    dense = op.to_dense(rows_at_once=ROWS)
    require_finite(dense, op, owner)
    return dense.diagonal().clone()


def _check(op: Operator, owner: str, argument: str, matvecs: int, fewest: int) -> None:
    check(op.dtype in (torch.float32, torch.float64), owner, "the dtype of op", op.dtype, "float32 or float64")
    check(matvecs >= fewest, owner, argument, matvecs, f">= {fewest}")
