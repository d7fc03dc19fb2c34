r"""Step sizes that look at the loss once more: along the new direction, or in the plane of it and the last move.

* :class:`Parabola`: one more loss in a step, at a trial point on the new direction, seldom two. About 1.35 passes a step;
* :class:`Subspace`: the minimum of the Gauss-Newton model over gradient and last move, on a part of the batch: 1.33 passes
  with a quarter of it.

Passes are counted as in :attr:`conjugo.optim.NLCG.passes`: forward and backward 1, forward alone 1/3, a product with the
derivative of the outputs (a forward pass that carries a vector along) 2/3.

Both want the batch before the forward pass of a step, :meth:`conjugo.optim.NLCG.observe_batch`, and find the step size by
themselves: the learning rate, with its schedule, is a factor on it, near 1. What is decided is decided on the host, from
numbers that all ranks have alike; so a step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from conjugo._tensors import Array
from conjugo.errors import check
from conjugo.optim.step_sizes import Seen, StepSize, Verdict

__all__ = ["NAMES", "Found", "Parabola", "Plane", "ProbedStep", "Subspace", "parabola_minimum"]

FORWARD = 1 / 3
"""What a forward pass costs, of a forward and backward one."""
ALONG = 2 / 3
"""What a forward pass that carries a vector along costs."""


class Found(NamedTuple):
    """What a search along the direction gave."""

    alpha: float
    """The step size, for this step and as the first trial of the next one; 0: its scale is not known yet."""
    move: bool
    """Whether to go that far; False: stay."""
    trials: int
    """How many losses were computed."""


class Plane(NamedTuple):
    """The model of the loss over -z and the last update u: the slopes <g, z> and <g, u>, and products with the curvature."""

    gz: float
    gu: float
    zz: float
    zu: float
    uu: float


@dataclass(frozen=True, kw_only=True)
class ProbedStep(StepSize):
    """A step size for which the optimizer asks more of the batch. Its numbers: the step size, and passes beyond one a step.

    initial: the first trial, or what serves where nothing is known; above 0.
    """

    initial: float = 1e-3

    start: ClassVar[Mapping[str, float]] = {"alpha": 0.0, "extra_passes": 0.0}
    needs_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        check(0 < self.initial < math.inf, type(self).__name__, "initial", self.initial, "in (0, inf)")

    def __call__(self, seen: Seen, state: tuple[Array, ...]) -> Verdict:
        """The learning rate times the last step size that was found."""
        return Verdict(seen.lr * state[0], state)


@dataclass(frozen=True, kw_only=True)
class Parabola(ProbedStep):
    r"""The minimum of a parabola through the loss, its slope and the loss at one trial point along the new direction d.

    .. math:: \alpha^* = \frac{-f'(0)\, t^2}{2\, (f(t) - f(0) - f'(0)\, t)}, \qquad f'(0) = \langle g, d \rangle, \quad
        \alpha \leftarrow \operatorname{clip}(\alpha^*, t / c, t\, c)

    with t the step size of the step before and c = *growth*. The move is the learning rate times :math:`\alpha d`.

    * The first step looks for the scale: from *initial* on it tries again where the last parabola points, by at most a
      factor of 10, until that is within the factor *growth*; at most *tries* times.
    * No curvature or a negative one: :math:`\alpha = t c`.
    * The loss at t is above f(0), and the minimum nearer than t / c: t / c is tried as well, and so on. That is rare, and
      without it a step that was much too long leads to more of them.
    * The new loss is not finite: t / c is tried instead (t / 10 in the first step). If all *tries* fail nothing moves; if they
      do in the first step, the next one is the first again.
    * After such trials :math:`\alpha` is at most the t of the last one.
    * d leads uphill, or is 0: no trial, and nothing moves; uphill :math:`\alpha` becomes :math:`\alpha / c`. It happens by
      rounding only, or with ``grad_scale`` and ``lars``, because the optimizer restarts with :math:`\beta = 0` where d would.
    * Neither the loss nor what the slope says of it changes by more than rounding: :math:`\alpha = t c`, so that the trial
      comes to where it says something, but at most 2 t; in the first step 10 t is tried.
    * In the first step the loss at 0 is computed as well, and must be the one that was given.

    Args:
        growth: the most by which :math:`\alpha` changes with one trial, as a factor, above 1.
        initial: the first trial, above 0.
        tries: the most losses in a step, at least 1.

    Raises:
        ValueError: an argument is out of its range.

    >>> Parabola().search(0.5, loss=1.0, slope=-2.0, trial=lambda t: 1.0 - 2.0 * t + 2.0 * t * t)
    Found(alpha=0.5, move=True, trials=1)
    """

    growth: float = 2.0
    tries: int = 12

    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        check(1 < self.growth < math.inf, "Parabola", "growth", self.growth, "in (1, inf)")
        check(isinstance(self.tries, int) and self.tries >= 1, "Parabola", "tries", self.tries, "an integer >= 1")

    def search(
        self,
        alpha: float,
        *,
        loss: float,
        slope: float,
        trial: Callable[[float], float],
        eps: Callable[[], float] = lambda: 2.0**-23,
    ) -> Found:
        """The step size along a direction on which the loss is *loss* and has the *slope* at 0.

        alpha: that of the step before; 0: none yet. trial: gives the loss at t > 0. eps: tells, after a trial, the
        relative rounding error of losses.
        """
        first = alpha == 0
        if not slope < 0:
            return Found(alpha if slope == 0 else alpha / self.growth, False, 0)
        t = self.initial if first else alpha
        failed = False
        for count in range(1, self.tries + 1):
            value = trial(t)
            if not math.isfinite(value):
                failed = True
                t /= _LEAP if first else self.growth
                continue
            # A loss that rises is enough: its minimum is near, however flat the slope.
            clear = max(-slope * t, abs(value - loss)) > _NOISE * eps() * abs(loss)
            best = parabola_minimum(loss, slope, t, value) if clear else math.inf
            most = self.growth if clear or first else min(self.growth, _BLIND)
            low, high = t / self.growth, t if failed else t * most
            if first and not failed and not low <= best <= high and count < self.tries:
                t = min(max(best, t / _LEAP), t * _LEAP)
                continue
            if not first and best < low and value > loss and count < self.tries:
                failed = True
                t = low
                continue
            return Found(min(max(best, low), high), True, count)
        return Found(0.0 if first else t, False, self.tries)


@dataclass(frozen=True, kw_only=True)
class Subspace(ProbedStep):
    r"""The minimum of the Gauss-Newton model of the loss over -z = -P g and the last update u, on a part of the batch.

    .. math:: \min_{\alpha, \mu}\ -\alpha \langle g, z \rangle + \mu \langle g, u \rangle +
        \tfrac12 \langle v, G v \rangle, \qquad v = -\alpha z + \mu u

    (Martens & Grosse 2015, section 7, for K-FAC.) The update is the learning rate times v, which takes the place of
    :math:`\beta`, whatever the rule: :math:`\beta = \mu \tau' / \alpha`. On a linear model with squared errors, with P = 1, the
    whole batch, no *damping* and no limit *mu_max* these are conjugate gradients.

    * :math:`\mu` is clipped to [0, *mu_max*], and :math:`\alpha` is the best for it. In the first step, and where the matrix
      is not positive definite or :math:`\alpha` would be 0 or less, :math:`\mu = 0`.
    * Without positive curvature along z, or with one that is not finite, :math:`\mu = 0` and :math:`\alpha` is what it was
      in the step before (*initial* in the first one).

    * v is shortened where :math:`-\langle g, v \rangle > 2 (f - m)`, m = *minimum*: a quadratic that is nowhere below m does
      not fall as steeply. It happens where the part of the batch is fitted and the whole is not; without it small parts let
      training diverge.

    The curvature of a coupled weight decay is added, and the decay to f.

    Args:
        fraction: of the examples of each rank, on which G is taken, in (0, 1].
        damping: added to the diagonal of the 2x2 matrix, relative to it, at least 0.
        mu_max: above 0.
        minimum: a lower bound of the loss. It is disregarded where the loss is below; -infinity: none.
        initial: see above.

    Raises:
        ValueError: an argument is out of its range.

    Source: J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
    arXiv:1503.05671.

    >>> Subspace(damping=0.0).solve(Plane(gz=4.0, gu=0.0, zz=2.0, zu=1.0, uu=2.0), last=0.0)
    (2.5, 1.0)
    """

    fraction: float = 0.25
    damping: float = 1e-3
    mu_max: float = 1.0
    minimum: float = 0.0

    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        check(0 < self.fraction <= 1, "Subspace", "fraction", self.fraction, "in (0, 1]")
        check(0 <= self.damping < math.inf, "Subspace", "damping", self.damping, "in [0, inf)")
        check(self.mu_max > 0, "Subspace", "mu_max", self.mu_max, "above 0")
        check(self.minimum < math.inf, "Subspace", "minimum", self.minimum, "below inf")

    def solve(self, plane: Plane, *, last: float, loss: float = math.inf) -> tuple[float, float]:
        """The coefficients of -z, above 0, and of u. last: the one of -z in the step before; 0: none yet."""
        alpha, mu = self._lowest(plane, last)
        fall, most = alpha * plane.gz - mu * plane.gu, 2 * (loss - self.minimum)
        factor = most / fall if fall > most > 0 else 1.0
        return factor * alpha, factor * mu

    def _lowest(self, plane: Plane, last: float) -> tuple[float, float]:
        """:meth:`solve` where the loss has no lower bound."""
        gz, gu, zz, zu, uu = plane
        zz, uu = (1 + self.damping) * zz, (1 + self.damping) * uu
        alone = gz / zz if zz > 0 else math.nan
        if not 0 < alone < math.inf:
            return last or self.initial, 0.0
        det = zz * uu - zu * zu
        if not 0 < det < math.inf:
            return alone, 0.0
        mu = min(max((zu * gz - zz * gu) / det, 0.0), self.mu_max)
        alpha = (gz + mu * zu) / zz
        # A much smaller alpha would make beta = mu tau' / alpha a number without meaning.
        return (alpha, mu) if _SHORTEST * alone < alpha < math.inf else (alone, 0.0)


NAMES: Mapping[str, Callable[[], ProbedStep]] = {"parabola": Parabola, "subspace": Subspace}
"""What they are called where options are words."""

_LEAP = 10.0
_BLIND = 2.0
_NOISE = 4.0
_SHORTEST = 1e-6


def parabola_minimum(loss: float, slope: float, t: float, value: float) -> float:
    """Where the parabola with *loss* and *slope* < 0 at 0 and *value* at *t* is lowest; infinity if it is open below.

    >>> parabola_minimum(1.0, -1.0, 0.5, 1.0)
    0.25
    """
    bend = value - loss - slope * t
    return -slope * t * t / (2 * bend) if bend > 0 else math.inf
