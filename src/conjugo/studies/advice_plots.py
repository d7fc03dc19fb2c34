"""Pictures of an advice: steps and time against the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from conjugo.studies.advice import Advice
from conjugo.studies.drawing import COLORS, INK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["steps_and_time"]

LINE, MARK = COLORS[1], COLORS[0]


def steps_and_time(advice: Advice) -> Figure:
    """Steps to the target with their interval of 95 %, and time, against the batch; what was tried, what is advised."""
    shown = advice.batches()
    batches = np.geomspace(shown[0], shown[-1], 120)
    steps = [advice.steps(batch) for batch in batches]
    best = advice.recommended_batch
    with new_figure((9.0, 3.4)) as figure:
        left, right = figure.subplots(1, 2)
        left.fill_between(batches, [s.low for s in steps], [s.high for s in steps], color=LINE, alpha=0.2, linewidth=0)
        left.plot(batches, [s.value for s in steps], color=LINE)
        tried = [probe.batch for probe in advice.probes for _ in probe.steps]
        measured = [each for probe in advice.probes for each in probe.steps]
        left.plot(tried, measured, "o", color=INK, markersize=3.5, label="measured")
        critical = advice.critical_batch
        left.axvspan(critical.low, critical.high, color="#808080", alpha=0.15, linewidth=0)
        left.axvline(critical.value, color="#808080", linestyle="--", linewidth=1)
        left.annotate(
            "critical batch",
            (critical.value, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize=8,
        )
        left.plot([best], [advice.steps(best).value], "D", color=MARK, label="advised")
        left.set_ylabel(f"steps to a training loss of {advice.target_loss:.3g}")
        left.legend(frameon=False, fontsize=8, loc="lower left")
        workers = sorted({1, advice.world_size})
        for count, color in zip(workers, (LINE, COLORS[2]), strict=False):
            fits = batches >= count
            times = [advice.seconds_to_target(batch, world_size=count) for batch in batches[fits]]
            right.plot(batches[fits], times, color=color, label=f"{count} worker{'s' * (count > 1)}")
        right.plot([best], [advice.seconds_to_target(best)], "D", color=MARK, label="advised")
        right.set_ylabel("seconds to it")
        right.legend(frameon=False, fontsize=8)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("batch")
            axes.set_xlim(shown[0] / 1.1, shown[-1] * 1.1)
            ticks = [2**k for k in range(round(math.log2(shown[0])), round(math.log2(shown[-1])) + 1)]
            ticks = ticks[:: max(1, -(-len(ticks) // 7))]
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    return figure
