"""The predictions of the advisor, kept in a file that is sealed before anything is measured."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from conjugo._files import write_aside
from conjugo.errors import CorruptFile
from conjugo.scaling import Interval, gradient_noise_scale
from conjugo.studies.reproduce.advisor_problems import Problem

__all__ = ["Ask", "Prediction", "plain", "predict", "sealed"]

_FIRST_MODEL = 1000
"""Advise seed i sees the weights of this seed plus i; measured are the seeds from 0 on, and tuning seeds far above."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the advisor says about a problem and an optimizer.

    written: when, in UTC. steps, lr: by batch size. critical: batch, in examples. initial: B_simple of the untrained network
    in the Euclidean metric, for the naive rule that uses nothing else. seconds: it took. advice: its own plain values.
    error: why there is no advice; steps and lr are empty then.
    """

    problem: str
    optimizer: str
    seed: int
    written: str
    steps: Mapping[int, Interval]
    lr: Mapping[int, float]
    critical: Interval
    initial: float
    seconds: float
    warnings: tuple[str, ...]
    advice: Mapping[str, Any]
    error: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """Problem, optimizer and seed."""
        return self.problem, self.optimizer, self.seed

    @property
    def anchor(self) -> int:
        """The batch size from which the naive rules start: the one nearest to the predicted critical batch."""
        critical = self.critical.value
        return min(self.steps, key=lambda batch: abs(math.log(batch / max(critical, 1e-9))))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; None stands for infinity."""
        content = plain({**asdict(self), "advice": dict(self.advice)})
        assert isinstance(content, dict)
        return content

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        read = {
            "steps": {int(batch): _interval(values) for batch, values in data["steps"].items()},
            "lr": {int(batch): float(lr) for batch, lr in data["lr"].items()},
            "critical": _interval(data["critical"]),
            "initial": _number(data["initial"]),
            "warnings": tuple(data["warnings"]),
        }
        return cls(**{**data, **read})


def plain(value: Any) -> Any:
    """*value* with numbers that JSON does not know replaced by None, and with names as keys."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _interval(values: Sequence[float | None]) -> Interval:
    value, low, high = map(_number, values)
    return Interval(value, low, high)


def predict(
    problem: Problem, optimizer: str, seed: int, *, seconds: float, mode: Literal["fast", "branch"]
) -> Prediction:
    """Ask the advisor; it sees the problem with weights of its own. seconds, mode: as it takes them.

    That it raises an exception is a result, too.
    """
    from conjugo.studies.advise import advise

    model, data = problem.model(_FIRST_MODEL + seed), problem.examples()
    begun = datetime.now(UTC)
    found: dict[str, Any] = {
        "steps": {},
        "lr": {},
        "critical": Interval(math.inf, 0.0, math.inf),
        "warnings": (),
        "advice": {},
    }
    try:
        advice = advise(
            model,
            problem.loss,
            data,
            optimizer=optimizer,
            target_loss=problem.target,
            seconds=seconds,
            mode=mode,
            seed=seed,
        )
        found = {
            "steps": {batch: Interval(*advice.steps(batch)) for batch in problem.batches},
            "lr": {batch: advice.lr(batch) for batch in problem.batches},
            "critical": Interval(*advice.critical_batch),
            "warnings": tuple(advice.warnings),
            "advice": advice.to_dict(),
        }
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    ended = datetime.now(UTC)
    return Prediction(
        problem=problem.name,
        optimizer=optimizer,
        seed=seed,
        written=ended.isoformat(timespec="seconds"),
        initial=gradient_noise_scale(model, problem.loss, data, seed=seed).b_simple,
        seconds=(ended - begun).total_seconds(),
        **found,
    )


Ask = Callable[[Problem, str, int], Prediction]
"""Makes the prediction for a problem, an optimizer and an advise seed."""


def sealed(
    asked: Sequence[tuple[Problem, str, int]], out: Path | None, ask: Ask, *, shown: bool
) -> tuple[tuple[Prediction, ...], str]:
    """The predictions *asked* for, and the SHA-256 of their file: those in *out* as they are, the others made now and written.

    The seal, predictions.sha256, is written when they are complete; runs without it, and a file that does not match
    it, raise CorruptFile.
    """
    path, seal = (None, None) if out is None else (out / "predictions.json", out / "predictions.sha256")
    known: dict[tuple[str, str, int], Prediction] = {}
    text = ""
    if path is not None and path.exists():
        text = path.read_text()
        try:
            known = {p.key: p for p in map(Prediction.from_dict, json.loads(text)["predictions"])}
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{path}: not a file of predictions ({error})") from error
    digest = hashlib.sha256(text.encode()).hexdigest()
    if seal is not None and seal.exists():
        if seal.read_text().split()[:1] != [digest]:
            raise CorruptFile(f"{path}: changed since it was sealed ({seal.name}); measurements have begun after that")
        return tuple(known.values()), digest
    if out is not None and (out / "journal.jsonl").exists():
        raise CorruptFile(f"{out}: holds measurements, but no sealed predictions from before them")
    for i, (problem, name, seed) in enumerate(asked):
        if (problem.name, name, seed) in known:
            continue
        if shown:
            print(f"prediction {i + 1} of {len(asked)}: {problem.name}, {name}, seed {seed}", file=sys.stderr)
        prediction = ask(problem, name, seed)
        known[prediction.key] = prediction
        text = json.dumps({"predictions": [p.to_dict() for p in known.values()]}, allow_nan=False, indent=1)
        if path is not None:
            write_aside(path, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if seal is not None:
        write_aside(seal, f"{digest}  predictions.json\n")  # as sha256sum -c reads it
    # From the text: so are they on resuming, to the last bit.
    return tuple(map(Prediction.from_dict, json.loads(text)["predictions"])), digest
