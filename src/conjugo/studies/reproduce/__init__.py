"""Headline results of papers, set beside what comes out on this machine.

``reproduce("nlcg", scale="cpu", out=...)`` does the runs, keeps them in a run directory that can be resumed, and gives a
result that says what reproduced and what did not. Each paper is a module with a `Paper` of its own, listed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from conjugo.errors import check, unknown
from conjugo.studies.reproduce.paper import Paper, Request, Result

__all__ = ["Paper", "Result", "names", "paper", "reproduce"]


def _papers() -> dict[str, Paper]:
    # Here, not above: the list of names must not cost the import of the training code.
    from conjugo.studies.reproduce.adagrad_norm import PAPER as ADAGRAD_NORM
    from conjugo.studies.reproduce.advisor import PAPER as ADVISOR
    from conjugo.studies.reproduce.batch_size import PAPER as BATCH_SIZE
    from conjugo.studies.reproduce.bngd import PAPER as BNGD
    from conjugo.studies.reproduce.frontier import PAPER as FRONTIER
    from conjugo.studies.reproduce.frsgd import PAPER as FRSGD
    from conjugo.studies.reproduce.hessian_spectrum import PAPER as HESSIAN_SPECTRUM
    from conjugo.studies.reproduce.mclr import PAPER as MCLR
    from conjugo.studies.reproduce.nlcg import PAPER as NLCG
    from conjugo.studies.reproduce.tabular_cg import PAPER as TABULAR_CG
    from conjugo.studies.reproduce.width import PAPER as WIDTH

    return {
        "nlcg": NLCG,
        "frsgd": FRSGD,
        "adagrad-norm": ADAGRAD_NORM,
        "mclr": MCLR,
        "batch-size": BATCH_SIZE,
        "tabular-cg": TABULAR_CG,
        "hessian-spectrum": HESSIAN_SPECTRUM,
        "bngd": BNGD,
        "width": WIDTH,
        "advisor": ADVISOR,
        "frontier": FRONTIER,
    }


def names() -> tuple[str, ...]:
    """The papers that :func:`reproduce` knows."""
    return tuple(_papers())


def paper(name: str) -> Paper:
    """Title, source and scales of a paper; raises UnknownName, with the nearest names, if there is none of that name."""
    known = _papers()
    if name not in known:
        unknown("paper", name, known)
    return known[name]


def reproduce(
    name: str,
    *,
    scale: Literal["cpu", "gpu", "full"] = "cpu",
    out: Path | None = None,
    jobs: int = 1,
    workers: int = 1,
    resume: bool = False,
    progress: bool | None = None,
    force: bool = False,
) -> Result:
    """Do the experiment of paper *name* at *scale*.

    scale: ``cpu`` takes minutes on two cores, ``gpu`` hours on one accelerator, ``full`` runs nothing and says what
    the original experiment would take. out: run directory; receives config.json, journal.jsonl (every run as it ends),
    results.json and the figures as PNG and SVG, and a sub-folder for a further part; None writes nothing. jobs: training
    runs at the same time. workers: processes that share each of them. resume: go on with what is in *out*; the result is
    that of the uninterrupted experiment, and a part that was left out before is considered again. progress: None shows a
    bar if standard error is a terminal. force: run scale ``gpu`` on a CPU all the same, and a part of scale ``cpu`` that is
    too slow here.

    Raises UnknownName for a paper or scale that does not exist; ValueError if *out* holds an experiment and *resume* is
    False, if it holds none or another one and *resume* is True, and for scale ``gpu`` without an accelerator;
    DataUnavailable if the data is not there.
    """
    scales = paper(name).scales
    if scale not in scales:
        unknown(f"scale of {name!r}", scale, scales)
    check(jobs >= 1, "reproduce", "jobs", jobs, ">= 1")
    check(workers >= 1, "reproduce", "workers", workers, ">= 1")
    request = Request(
        out=None if out is None else Path(out),
        jobs=jobs,
        workers=workers,
        resume=resume,
        progress=progress,
        force=force,
    )
    return scales[scale](request)
