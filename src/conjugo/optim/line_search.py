"""The step-size control of Adya, Palakkode & Tuzel: no extra evaluation, only the losses that training sees anyway.

A base factor multiplies the learning rate. When the loss grows against its running average, the base shrinks and part of the
last move is taken back; otherwise the base recovers towards 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim.step_sizes import Seen, StepSize, Verdict

__all__ = ["LineSearch", "degradation"]

EDGES = (0.01, 0.025, 0.05, 0.075, 0.10, 0.125, 0.15)
SHRINK = (1.0, 1.0, 0.975, 0.95, 0.9, 0.8, 0.7, 0.5)
REMOVE = (0.0, 0.1, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SMALLEST_BASE = 1e-4


def degradation(ratio: Array, threshold: float) -> tuple[Array, Array]:
    """Factor on the base and part of the last move to remove for *ratio* = new loss / old loss.

    Eight steps from (1, 0) at ratio <= 1 + 0.01 threshold (or NaN) to (0.5, 0.9) beyond 1 + 0.15 threshold.
    """
    xp = namespace(ratio)
    # Filled one by one: a tensor made from a list would be copied to a GPU, and that copy waits for the GPU.
    shrink, remove = xp.full_like(ratio, SHRINK[0]), xp.full_like(ratio, REMOVE[0])
    for edge, k, w in zip(EDGES, SHRINK[1:], REMOVE[1:], strict=True):
        beyond = ratio > 1 + edge * threshold
        shrink = xp.where(beyond, k, shrink)
        remove = xp.where(beyond, w, remove)
    return shrink, remove


@dataclass(frozen=True, kw_only=True)
class LineSearch(StepSize):
    """``kind="online"`` compares each loss with its running average; ``"step"`` compares averages every *period* steps.

    threshold > 0 scales the relative growth (1 % to 15 %) at which the search reacts.
    """

    kind: str
    period: int = 5
    threshold: float = 1.0

    start: ClassVar[Mapping[str, float]] = {"base": 1.0, "ema": 0.0, "ema_prev": 0.0}
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        check(self.period >= 1, "NLCG", "period", self.period, "an integer >= 1")
        check(0 < self.threshold < float("inf"), "NLCG", "threshold", self.threshold, "a finite number > 0")

    def __call__(self, seen: Seen, state: tuple[Array, ...]) -> Verdict:
        """The length of this step and the part of the last one to be taken back, in [0, 0.9].

        State: the factor on the learning rate, in [1e-4, 1]; the running average of the loss; that average at the last
        comparison (kind "step").
        """
        base, ema, ema_prev = state
        xp = namespace(base)
        first = seen.step == 0
        ema = xp.where(first, seen.loss, 0.7 * ema + 0.3 * seen.loss)
        if self.kind == "online":
            ratio, compared, recovery = seen.loss / ema, ~first, 1.02
        else:
            compared = ~first & (seen.step % self.period == 0)
            # ema_prev is 0 before the first step, where nothing is compared.
            ratio, recovery = ema / xp.where(first, 1.0, ema_prev), 1.05
            ema_prev = xp.where(first | compared, ema, ema_prev)
        shrink, remove = degradation(ratio, self.threshold)
        better = ratio < 1 + EDGES[0] * self.threshold
        recovered, reduced = (base * recovery).clip(max=1.0), (base * shrink).clip(min=SMALLEST_BASE)
        base = xp.where(compared, xp.where(better, recovered, reduced), base)
        remove = xp.where(compared & ~better, remove, 0.0)
        return Verdict(seen.lr * base, (base, ema, ema_prev), remove)
