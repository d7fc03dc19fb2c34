"""The noise scale of SGD in units of the weights, and how its best value changes with the width of a network.

Park, Sohl-Dickstein, Le & Smith 2019, "The effect of network width on stochastic gradient descent and generalization: an
empirical study" (ICML; arXiv:1905.03776). SGD with learning rate eps and batch B on N examples has the noise scale
g = eps N / B (Smith & Le 2018). It depends on how the weights are parameterised; divided by the variance v with which they
are drawn, it does not: gbar = eps N / (B v). Without batch norm, so the paper, the gbar of the best test accuracy is
proportional to the width. What this module computes follows from these two sentences; the formula for gbar is a
reconstruction (the text of the paper was not at hand).

Use it to say in one number how noisy a run of SGD is, to find what to change with the batch so that this stays,
and to measure the best value. It says nothing about optimizers with learning rates of their own for each weight, nor about
networks with batch norm, whose function does not depend on the size of their weights. And g has nothing to do with the noise of
a gradient compared to its mean (the gradient noise scale, in examples): it is set by hyperparameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from conjugo.errors import check
from conjugo.scaling._stacked import StackedMLP
from conjugo.scaling._width_networks import (
    HiddenLayer,
    NTKConv2d,
    NTKLinear,
    Parameterization,
    check_parameterization,
    convert,
    convnet,
    hidden_layers,
    mlp,
    parameter_groups,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "HiddenLayer",
    "NTKConv2d",
    "NTKLinear",
    "OptimalNoiseScale",
    "Parameterization",
    "Setting",
    "StackedMLP",
    "WidthLaw",
    "batch_for",
    "convert",
    "convnet",
    "critical_width",
    "hidden_layers",
    "layer_noise_scales",
    "lr_for",
    "mlp",
    "normalized_noise_scale",
    "optimal_noise_scale",
    "parameter_groups",
    "sgd_noise_scale",
    "widened",
    "width_law",
]

Values = np.ndarray[Any, np.dtype[np.float64]]


# ---- the noise scale ----


def sgd_noise_scale(lr: float, batch: float, n_train: int, momentum: float = 0.0, *, exact: bool = False) -> float:
    """g = eps N / (B (1 - m)), the noise scale of SGD (Smith & Le 2018).

    lr: eps > 0. batch: B in (0, N]. n_train: N, training examples. momentum: m in [0, 1), heavy-ball. exact: (N / B - 1) in
    the place of N / B, as for batches drawn without repetition; it is 0 for the full batch, and nearly the same for
    B much smaller than N. Raises ValueError for values out of range.

    >>> sgd_noise_scale(0.1, 128, 50_000), sgd_noise_scale(2.0, 100, 400), sgd_noise_scale(2.0, 100, 400, exact=True)
    (39.0625, 8.0, 6.0)
    """
    owner = "sgd_noise_scale"
    _check_positive(owner, "lr", lr)
    _check_run(owner, batch, n_train, momentum)
    return lr * (n_train / batch - exact) / (1 - momentum)


def normalized_noise_scale(
    lr: float, batch: float, n_train: int, init_var: float, momentum: float = 0.0, *, exact: bool = False
) -> float:
    """gbar = g / v, the noise scale of SGD in units of the variance of the weights at the beginning.

    It is the same for all parameterisations of the same function: eps / v is. init_var: v > 0, of the weights as they are
    stored: s in NTK parameterisation, s / n_in in the standard one, where hidden layers of different fan-in differ
    (:func:`layer_noise_scales`). Other arguments and errors: see :func:`sgd_noise_scale`.

    A layer of width 512, drawn by He's rule:

    >>> normalized_noise_scale(0.1, 128, 50_000, 2 / 512)
    10000.0
    """
    owner = "normalized_noise_scale"
    _check_positive(owner, "lr", lr)
    _check_positive(owner, "init_var", init_var)
    _check_run(owner, batch, n_train, momentum)
    return lr * (n_train / batch - exact) / ((1 - momentum) * init_var)


def lr_for(
    gbar: float, batch: float, n_train: int, init_var: float, momentum: float = 0.0, *, exact: bool = False
) -> float:
    """The learning rate that gives the normalised noise scale *gbar* at this batch; the linear rule is among its cases.

    It knows nothing of stability: the largest learning rate with which training is stable has to be found out. gbar: > 0. Other
    arguments and errors: see :func:`normalized_noise_scale`; with *exact*, batch < n_train.

    >>> lr_for(10_000, 256, 50_000, 2 / 512)  # twice the batch, twice the rate
    0.2
    """
    owner = "lr_for"
    _check_positive(owner, "gbar", gbar)
    _check_positive(owner, "init_var", init_var)
    _check_run(owner, batch, n_train, momentum)
    check(not exact or batch < n_train, owner, "batch", batch, f"less than n_train = {n_train}, whose noise is 0")
    return gbar * init_var * (1 - momentum) / (n_train / batch - exact)


def batch_for(
    gbar: float, lr: float, n_train: int, init_var: float, momentum: float = 0.0, *, exact: bool = False
) -> float:
    """The batch size, not rounded, that gives the normalised noise scale *gbar* at this learning rate.

    A result below 1 says that there is none: the learning rate is too small for so much noise. One above N (without *exact*)
    says that there is none either: it is too large for so little. gbar, lr: > 0. Other arguments and errors: see
    :func:`normalized_noise_scale`.

    >>> batch_for(10_000, 0.1, 50_000, 2 / 512)
    128.0
    """
    owner = "batch_for"
    _check_positive(owner, "gbar", gbar)
    _check_positive(owner, "lr", lr)
    _check_positive(owner, "init_var", init_var)
    _check_run(owner, 1, n_train, momentum)
    return n_train / (gbar * init_var * (1 - momentum) / lr + exact)


def layer_noise_scales(
    model: nn.Module, lr: float, batch: float, n_train: int, momentum: float = 0.0, *, exact: bool = False
) -> dict[str, float]:
    """gbar of each hidden layer of *model*, by the name of its module, if all are trained with the learning rate *lr*.

    *model* must be as it was initialised: variances are read from its weights (:func:`hidden_layers`, which also says
    which layers count). Other arguments and errors: see :func:`sgd_noise_scale`; ValueError, too, if the weights of such
    a layer are all 0.

    >>> found = layer_noise_scales(mlp((64, 512, 512, 10), "standard", weight_var=2.0), 0.1, 128, 50_000)
    >>> {name: round(gbar, -2) for name, gbar in found.items()}
    {'3': 10000.0, '5': 9900.0}
    """
    g = sgd_noise_scale(lr, batch, n_train, momentum, exact=exact)
    layers = hidden_layers(model)
    for layer in layers:
        accepted = "weights that are finite and not all 0"
        check(0 < layer.init_var < math.inf, "layer_noise_scales", f"layer {layer.name!r}", layer.init_var, accepted)
    return {layer.name: g / layer.init_var for layer in layers}


def _check_positive(owner: str, name: str, value: float) -> None:
    check(0 < value < math.inf, owner, name, value, "a finite number > 0")


def _check_run(owner: str, batch: float, n_train: int, momentum: float) -> None:
    check(1 <= n_train < math.inf, owner, "n_train", n_train, ">= 1")
    check(0 < batch <= n_train, owner, "batch", batch, f"in (0, n_train = {n_train}]")
    check(0 <= momentum < 1, owner, "momentum", momentum, "in [0, 1)")


# ---- the law of width ----


class Setting(NamedTuple):
    """A learning rate and a batch size, not rounded."""

    lr: float
    batch: float


def widened(lr: float, batch: float, factor: float, *, parameterization: Parameterization) -> Setting:
    """What becomes of a tuned learning rate and batch size when a network is made *factor* times as wide.

    By the paper's law the best gbar grows with the width. In NTK parameterisation that takes eps / B times *factor*, and
    the largest stable eps stays: B / factor. In the standard one gbar grows with n_in by itself, so that eps / B stays, but the
    largest stable eps falls with 1 / n_in: both are divided by *factor*. The parameterisation has to be said: a learning
    rate cannot be carried to another width without it. The law is one for networks without batch norm, constant
    learning rate and late times; on small data it need not hold (``conjugo reproduce width``).

    lr, batch, factor: > 0; a factor below 1 makes the network narrower. Raises ValueError, also if the batch falls below 1
    (:func:`critical_width`); UnknownName.

    >>> widened(2.0, 64, 4, parameterization="ntk"), widened(0.1, 64, 4, parameterization="standard")
    (Setting(lr=2.0, batch=16.0), Setting(lr=0.025, batch=16.0))
    """
    check_parameterization(parameterization)
    for name, value in (("lr", lr), ("batch", batch), ("factor", factor)):
        _check_positive("widened", name, value)
    accepted = f"at most {batch:g}, where the batch is 1 and cannot get smaller"
    check(batch / factor >= 1, "widened", "factor", factor, accepted)
    return Setting(lr if parameterization == "ntk" else lr / factor, batch / factor)


def critical_width(kappa: float, n_train: int, lr_max: float, init_var: float) -> float:
    """Where the best gbar = kappa w needs a batch below 1: w = eps_max N / (kappa v). Conjectured in the paper.

    Beyond it SGD cannot make as much noise as would be best, and wider networks should gain nothing more by noise alone. kappa:
    gbar per unit of width (:class:`WidthLaw`). lr_max: the largest stable learning rate. init_var: v. In standard
    parameterisation both fall with the width and their quotient does not: take them at the same width. All > 0. Raises
    ValueError.

    >>> critical_width(kappa=20.0, n_train=50_000, lr_max=4.0, init_var=1.0)
    10000.0
    """
    for name, value in (("kappa", kappa), ("n_train", n_train), ("lr_max", lr_max), ("init_var", init_var)):
        _check_positive("critical_width", name, value)
    return lr_max * n_train / (kappa * init_var)


# ---- measuring the best noise scale ----


@dataclass(frozen=True)
class OptimalNoiseScale:
    """The normalised noise scale with the best accuracy, from a scan over batch sizes."""

    gbar: float
    """Where the parabola has its top."""
    interval: tuple[float, float]
    """Confidence interval of gbar."""
    log_stderr: float
    """Standard error of log(gbar), natural logarithm, from the bootstrap."""
    batch: float
    """The batch size that belongs to gbar at the learning rate of the scan, not rounded."""
    accuracy: float
    """Mean accuracy at the best of the batch sizes that were tried, in their unit."""
    at_edge: bool
    """Whether the best batch is the smallest or the largest of the scan, or the parabola has no top within it: then the
    optimum may lie beyond, and gbar is only the best that the scan can say."""
    edge_share: float
    """Part of the bootstrap samples for which that is so. From a few percent on the interval is too short."""
    points: int
    """Batch sizes through which the parabola goes: fewer than were asked for where those do not lie on one."""
    batches: tuple[float, ...]
    """The batch sizes that were used, ascending."""
    means: tuple[float, ...]
    """Mean accuracy of each."""
    diverged: int
    """Runs that were dropped because their accuracy is not finite."""


def optimal_noise_scale(
    accuracies: ArrayLike,
    batches: Sequence[float],
    *,
    lr: float,
    n_train: int,
    init_var: float,
    momentum: float = 0.0,
    points: int = 5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> OptimalNoiseScale:
    """The gbar of the best accuracy, by a parabola in log B through the top of a scan over batch sizes, with an interval.

    Train with one learning rate, well inside stability, and each batch size for the same number of steps (the same
    physical time eps T), with at least 8 seeds; take the accuracy at late times, a mean over the last half of the steps, say.

    accuracies: [K, S] of K batch sizes and S seeds, any unit; NaN or infinite for a run that diverged, which is dropped; a
    batch size with fewer than two runs left is left out. A column is one seed, and may share initial weights and data.
    batches: [K] distinct sizes, in any order. lr, n_train, init_var, momentum: of the runs, for
    :func:`normalized_noise_scale` with N / B.
    points: neighbouring batch sizes around the best one through which the parabola goes, >= 3. Where they surely do not lie
    on one (Hotelling's test, 1 %; next to the noise at which training breaks down, for one) there are two fewer, down to
    three; with three the top is within half a step of the best batch, and the interval does not know of more than that.
    resamples: of the bootstrap over seeds (columns), >= 50; in each the best batch is chosen anew. level: of the interval, in
    (0, 1), by Student's t distribution with S - 1 degrees of freedom on log(gbar). seed: of the bootstrap. Raises ValueError.

    >>> rng = np.random.default_rng(0)
    >>> sizes = 2.0 ** np.arange(9)
    >>> scan = 0.9 - 0.002 * (np.log2(sizes)[:, None] - 4) ** 2 + 0.004 * rng.normal(size=(9, 12))  # best at batch 16
    >>> found = optimal_noise_scale(scan, sizes, lr=2.0, n_train=400, init_var=1.0)
    >>> round(found.gbar), [round(end) for end in found.interval], found.at_edge
    (50, [42, 60], False)
    """
    owner = "optimal_noise_scale"
    table = np.asarray(accuracies, dtype=np.float64)
    sizes = np.asarray(batches, dtype=np.float64)
    check(table.ndim == 2, owner, "accuracies", table.shape, "a table [batch sizes, seeds]")
    check(sizes.shape == table.shape[:1], owner, "batches", sizes.shape, f"one for each of {len(table)} rows")
    check(len(set(batches)) == len(sizes), owner, "batches", list(batches), "distinct sizes")
    check(table.shape[1] >= 2, owner, "accuracies", table.shape, "a table with at least two seeds (columns)")
    check(points >= 3, owner, "points", points, ">= 3")
    check(resamples >= 50, owner, "resamples", resamples, ">= 50")
    check(0 < level < 1, owner, "level", level, "in (0, 1)")
    for batch in batches:
        normalized_noise_scale(lr, batch, n_train, init_var, momentum)  # raises

    order = np.argsort(sizes)
    table, sizes = table[order], sizes[order]
    there = np.isfinite(table)
    enough = there.sum(1) >= 2
    accepted = f"runs of at least {points} batch sizes, two or more of each, that did not diverge"
    check(int(enough.sum()) >= points, owner, "accuracies", f"{int(enough.sum())} such batch sizes", accepted)
    diverged = int(there.size - there.sum())
    table, there, sizes = np.where(there, table, 0.0)[enough], there[enough], sizes[enough]

    seeds = table.shape[1]
    means = table.sum(1) / there.sum(1)
    x = np.log(sizes)
    drawn = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    counts = drawn @ there.T
    sampled = np.where(counts > 0, drawn @ table.T / np.maximum(counts, 1), means)  # [resamples, K]
    while points > 3 and not _on_a_parabola(x, means, sampled, points, seeds):
        points = max(3, points - 2)
    top, tops = _tops(x, means[None], points), _tops(x, sampled, points)
    # The bootstrap's variance is that of a sample of S with S in the denominator.
    stderr = float(np.std(tops.place)) * math.sqrt(seeds / (seeds - 1))
    batch = math.exp(float(top.place[0]))
    gbar = normalized_noise_scale(lr, batch, n_train, init_var, momentum)
    reach = math.exp(_quantile(level, seeds - 1) * stderr)
    return OptimalNoiseScale(
        gbar=gbar,
        interval=(gbar / reach, gbar * reach),
        log_stderr=stderr,
        batch=batch,
        accuracy=float(means.max()),
        at_edge=bool(top.edge[0]),
        edge_share=float(tops.edge.mean()),
        points=points,
        batches=tuple(sizes.tolist()),
        means=tuple(means.tolist()),
        diverged=diverged,
    )


class _Tops(NamedTuple):
    """Of each row of means."""

    place: Values
    edge: np.ndarray[Any, np.dtype[np.bool_]]


def _tops(x: Values, means: Values, points: int) -> _Tops:
    """The tops of the parabolas through the *points* neighbours around the best of each row; x: [K], means: [n, K]."""
    best = means.argmax(1)
    starts = _starts(best, points, len(x))
    windows = np.lib.stride_tricks.sliding_window_view(x, points)
    centres = windows.mean(1)
    solvers = np.linalg.pinv((windows - centres[:, None])[..., None] ** np.arange(3))  # [windows, 3, points]
    inside = np.take_along_axis(means, starts[:, None] + np.arange(points), 1)
    _, b, a = np.einsum("nij,nj->in", solvers[starts], inside)
    bent = a < 0
    away = np.where(bent, -b / np.where(bent, 2 * a, 1.0), x[best] - centres[starts])
    place = centres[starts] + away
    edge = ~bent | (best == 0) | (best == len(x) - 1) | (place < x[0]) | (place > x[-1])
    return _Tops(np.clip(place, x[0], x[-1]), edge)


def _starts(best: Any, points: int, size: int) -> Any:
    """Where the window of *points* around *best* begins."""
    return np.clip(best - points // 2, 0, size - points)


def _on_a_parabola(x: Values, means: Values, sampled: Values, points: int, seeds: int) -> bool:
    """Whether the means around the best may lie on a parabola in x: Hotelling's test, 1 %, of what is orthogonal to parabolas.

    sampled: [resamples, K], bootstrap means, for the covariance of the means. True where there are too few seeds to say.
    """
    from scipy.special import fdtri

    contrasts = points - 3
    if seeds <= contrasts:
        return True
    start = int(_starts(means.argmax(), points, len(x)))
    window = slice(start, start + points)
    parabolas = (x[window] - x[window].mean())[:, None] ** np.arange(3)
    rest = np.linalg.qr(parabolas, mode="complete")[0][:, 3:]
    off = means[window] @ rest
    if np.abs(off).max() <= 1e-9 * max(float(np.ptp(means[window])), float(np.abs(means[window]).max())):
        return True  # exactly
    covariance = np.cov(sampled[:, window] @ rest, rowvar=False).reshape(contrasts, contrasts) * seeds / (seeds - 1)
    statistic = float(off @ np.linalg.pinv(covariance, hermitian=True) @ off)
    spread = float(np.trace(covariance))
    limit = contrasts * (seeds - 1) / (seeds - contrasts) * float(fdtri(contrasts, seeds - contrasts, 0.99))
    return spread > 0 and statistic <= limit


def _quantile(level: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))


@dataclass(frozen=True)
class WidthLaw:
    """gbar = factor w^exponent, fitted to the best noise scales of several widths."""

    factor: float
    exponent: float
    """1 by the paper."""
    interval: tuple[float, float]
    """Confidence interval of the exponent."""
    stderr: float
    """Its standard error."""
    kappa: float
    """gbar / w if the exponent is taken to be 1: for :func:`critical_width`."""
    widths: tuple[float, ...]
    """Those that were used."""
    left_out: tuple[float, ...]
    """Those whose optimum lies at the edge of its scan."""

    def gbar(self, width: float) -> float:
        """The best noise scale at another width, by the fitted exponent. width: > 0. Raises ValueError."""
        _check_positive("WidthLaw.gbar", "width", width)
        return self.factor * float(width**self.exponent)


def width_law(widths: Sequence[float], optima: Sequence[OptimalNoiseScale], *, level: float = 0.95) -> WidthLaw:
    """The regression of log(gbar) on log(width), each point with its own standard error.

    widths: > 0. optima: of each width; those at the edge of their scan are left out. level: of the interval, in (0, 1), by
    Student's t with two degrees of freedom fewer than points. Where the points scatter by more than their errors say,
    the standard error grows accordingly. Raises ValueError for fewer than three different widths left.
    """
    owner = "width_law"
    check(len(widths) == len(optima), owner, "optima", len(optima), f"one for each of {len(widths)} widths")
    check(0 < level < 1, owner, "level", level, "in (0, 1)")
    for width in widths:
        _check_positive(owner, "widths", width)
    used = [(width, found) for width, found in zip(widths, optima) if not found.at_edge]
    accepted = "at least three different widths with an optimum inside their scan"
    check(len({width for width, _ in used}) >= 3, owner, "widths", [width for width, _ in used], accepted)
    x = np.log([width for width, _ in used])
    y = np.log([found.gbar for _, found in used])
    errors = np.array([found.log_stderr for _, found in used])
    weights = 1 / errors**2 if errors.all() else np.ones_like(errors)
    mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
    spread = float((weights * (x - mean_x) ** 2).sum())
    exponent = float((weights * (x - mean_x) * (y - mean_y)).sum()) / spread
    rest = float((weights * (y - mean_y - exponent * (x - mean_x)) ** 2).sum()) / (len(x) - 2)
    stderr = math.sqrt((max(1.0, rest) if errors.all() else rest) / spread)
    half = _quantile(level, len(x) - 2) * stderr
    return WidthLaw(
        factor=math.exp(mean_y - exponent * mean_x),
        exponent=exponent,
        interval=(exponent - half, exponent + half),
        stderr=stderr,
        kappa=math.exp(mean_y - mean_x),
        widths=tuple(width for width, _ in used),
        left_out=tuple(width for width, found in zip(widths, optima) if found.at_edge),
    )
