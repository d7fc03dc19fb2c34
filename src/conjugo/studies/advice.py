"""What :func:`conjugo.studies.advise.advise` has found out, and what follows from it for any batch."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conjugo._files import write_aside
from conjugo.errors import check
from conjugo.scaling.forecast import StepsForecast, krige
from conjugo.scaling.laws import Interval, efficient_batch, fastest_batch
from conjugo.scaling.noise_scale import NoiseScale
from conjugo.studies.probes import Raced
from conjugo.studies.throughput import Memory, StepTime

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Advice", "Probe"]


@dataclass(frozen=True)
class Probe:
    """Runs at one batch size."""

    batch: int
    lr: float
    """The best learning rate."""
    steps: tuple[float, ...]
    """To the target, with other batches of examples each."""
    race: Raced
    confirmed: bool
    """Whether the steps are those of runs that had no part in choosing the learning rate."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Batch, learning rate, steps and time of a training run to a loss; all intervals are of 95 %.

    Batches are global: over all workers and micro-batches.
    """

    optimizer: str
    """Its name."""
    catalogue_name: str | None
    """What ``conjugo train`` calls it; None: it was not asked for by name."""
    lr_power: float
    """The power of 1 / (1 + B_crit / B) that the best learning rate follows between the probes' ones."""
    examples: int
    """In the data."""
    target_loss: float
    """The training loss that steps lead to."""
    reached: bool
    """Whether it is the one that was asked for, if one was."""
    efficiency: float
    max_batch: int
    world_size: int
    all_reduce: float
    """Seconds in which the workers add up their gradients."""
    forecast: StepsForecast
    probes: tuple[Probe, ...]
    """By batch, ascending."""
    noise_scale: NoiseScale
    """At the beginning."""
    noise_along: tuple[NoiseScale, ...]
    """Along a run with the best learning rate, in the metric of the optimizer."""
    expected_batch: float
    """The critical batch, by the noise scales alone."""
    lambda_max: float | None
    """Largest eigenvalue of the Hessian at the beginning; None: not measured."""
    step_time: StepTime
    memory: Memory
    micro_batch: int | None
    """Most examples that go through the model at once; None: all of a worker's share."""
    mode: str
    seed: int
    seconds: float
    """That the advice took."""
    probed_examples: int
    """Sent forward and backward for it."""
    warnings: tuple[str, ...] = ()

    # What follows ------------------------------------------------------------------------------------------------------

    @property
    def critical_batch(self) -> Interval:
        """The batch with which training needs twice the fewest steps, and twice the fewest examples."""
        return self.forecast.b_crit

    @property
    def useful_batch(self) -> int:
        """The largest batch that wastes no more examples than *efficiency* allows, at most `max_batch`; >= 1."""
        return max(1, min(self.max_batch, round(efficient_batch(self.critical_batch.value, self.efficiency))))

    @property
    def fastest_batch(self) -> int:
        """The batch with which `world_size` workers are done soonest, at most `max_batch`; >= world_size."""
        time = self.step_time
        if time.per_example <= 0:
            return self.max_batch
        fixed = time.fixed + self.all_reduce * (self.world_size > 1)
        best = fastest_batch(fixed, time.per_example, self.critical_batch.value, workers=self.world_size)
        return min(self.max_batch, max(self.world_size, round(best)))

    @property
    def recommended_batch(self) -> int:
        """The largest power of 2 up to the smaller one of `useful_batch` and `fastest_batch`, beyond which nothing is gained.

        Where `fastest_batch` lies below all probes, the smallest of these takes its place; and it is at least `world_size`.
        """
        best = min(self.useful_batch, max(self.fastest_batch, min(probe.batch for probe in self.probes)))
        least = 2 ** math.ceil(math.log2(self.world_size))
        return int(max(least, 2 ** int(math.log2(min(best, self.max_batch)))))

    def steps(self, batch: float) -> Interval:
        """Steps to the target with batches of *batch* examples, in [1, inf), and the advised learning rate."""
        self._check(batch)
        found = self.forecast.steps(batch)
        return Interval(*(max(1.0, value) for value in found))

    def lr(self, batch: float) -> float:
        """The learning rate for batches of *batch* examples: through the best ones of the probes, by the law between them."""
        self._check(batch)
        power, b_crit = self.lr_power, self.critical_batch.value
        logs = [math.log(probe.lr) + power * math.log1p(b_crit / probe.batch) for probe in self.probes]
        places = [math.log(probe.batch) for probe in self.probes]
        level = krige(math.log(batch), places, logs, deviation=0.4, noise=0.15, width=math.log(8))
        lr = math.exp(level - power * math.log1p(b_crit / batch))
        # What was too large for a larger batch is so for this one, too.
        failed = [value for probe in self.probes if probe.batch >= batch for value in probe.race.failed]
        return min([lr, *(value / math.sqrt(2) for value in failed)])

    def seconds_to_target(self, batch: float, *, world_size: int | None = None) -> float:
        """Seconds until the target is reached, evaluation and loading of data not included."""
        workers = self.world_size if world_size is None else world_size
        step = self.step_time.seconds(batch, workers=workers, all_reduce=self.all_reduce)
        return self.steps(batch).value * step

    def speedup(self, batch: float, base: float, *, world_size: int | None = None, base_world_size: int = 1) -> float:
        """How many times as fast as with batches of *base* on *base_world_size* workers the target is reached."""
        before = self.seconds_to_target(base, world_size=base_world_size)
        return before / self.seconds_to_target(batch, world_size=world_size)

    def _check(self, batch: float) -> None:
        check(1 <= batch < math.inf, "Advice", "batch", batch, "in [1, inf)")

    # What is shown -----------------------------------------------------------------------------------------------------

    def batches(self) -> list[int]:
        """Powers of 2 from a quarter of the smallest batch that was tried, the largest that there is, and the advised one."""
        low = max(2 ** math.ceil(math.log2(self.world_size)), 2 ** int(math.log2(self.probes[0].batch)) // 4)
        high = self.max_batch
        powers = [2**k for k in range(int(math.log2(low)), int(math.log2(high)) + 1)]
        while len(powers) > 11:
            powers = powers[::2] if len(powers) % 2 else powers[1::2]
        return sorted({*powers, high, self.recommended_batch})

    def command(self, train: Mapping[str, Any] | None = None) -> str:
        """The call of ``conjugo train`` that follows the advice; *train*: its other settings, such as data and model."""
        accepted = "one of conjugo train: conjugo.training.optimizers.names()"
        check(self.catalogue_name is not None, "Advice.command", "the optimizer", self.optimizer, accepted)
        batch = self.recommended_batch
        words = {
            **(train or {}),
            "optimizer": self.catalogue_name,
            "batch-size": batch,
            "lr": float(f"{self.lr(batch):.3g}"),
            "steps": math.ceil(self.steps(batch).value),
            "schedule": "constant",
            "warmup": 0,
        }
        if self.micro_batch is not None and self.micro_batch < batch / self.world_size:
            words["micro-batch"] = self.micro_batch
        if self.world_size > 1:
            words["workers"] = self.world_size
        return "conjugo train " + shlex.join(
            word for name, value in words.items() for word in (f"--{name}", str(value))
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row for each of :meth:`batches`: plain values."""
        found = []
        for batch in self.batches():
            steps = self.steps(batch)
            found.append(
                {
                    "batch": batch,
                    "lr": self.lr(batch),
                    "steps": steps.value,
                    "steps_low": steps.low,
                    "steps_high": steps.high,
                    "examples": steps.value * batch,
                    "efficiency": 1 / (1 + batch / self.critical_batch.value),
                    "seconds": self.seconds_to_target(batch),
                }
            )
        return found

    def table(self) -> Table:
        """For the terminal."""
        from rich import box
        from rich.table import Table

        workers = f", {self.world_size} workers" if self.world_size > 1 else ""
        title = f"Steps and time to a training loss of {self.target_loss:.3g} ({self.optimizer}{workers})"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left", pad_edge=False)
        for name in ("batch", "lr", "steps", "95 %", "examples", "useful", "time", "speed-up"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = self.rows()
        base = rows[0]["seconds"]
        tried = {probe.batch for probe in self.probes}
        for row in rows:
            best = row["batch"] == self.recommended_batch
            table.add_row(
                f"{row['batch']:,}{' *' if row['batch'] in tried else '  '}",
                f"{row['lr']:.3g}",
                f"{row['steps']:,.0f}",
                f"{row['steps_low']:,.0f} to {row['steps_high']:,.0f}",
                f"{row['examples']:,.0f}",
                f"{100 * row['efficiency']:.0f} %",
                duration(row["seconds"]),
                f"{base / row['seconds']:.1f}",
                style="bold" if best else None,
            )
        return table

    def summary(self) -> str:
        """The advice in a few sentences, one a line."""
        b_crit, batch = self.critical_batch, self.recommended_batch
        steps = self.steps(batch)
        lines = [
            f"Critical batch: {b_crit.value:,.0f} ({b_crit.low:,.0f} to {b_crit.high:,.0f}). "
            f"Noise scale: {_noise_text(self.noise_scale)} at the beginning"
            + (f", {self.expected_batch:,.0f} on average along a run." if self.noise_along else "."),
            f"Take batches of {batch:,} with lr {self.lr(batch):.3g}: about {steps.value:,.0f} steps "
            f"({steps.low:,.0f} to {steps.high:,.0f}), {duration(self.seconds_to_target(batch))}"
            + (f" on {self.world_size} workers." if self.world_size > 1 else "."),
            f"Up to {self.useful_batch:,} the efficiency is at least {100 * self.efficiency:.0f} %; "
            f"{self.fastest_batch:,} would be done soonest"
            + (f" on {self.world_size} workers." if self.world_size > 1 else " on this device."),
        ]
        if self.memory.largest is not None:
            lines.append(
                f"Memory: {size(self.memory.fixed)} and {size(self.memory.per_example)} per example; "
                f"{self.memory.largest:,} examples fit at once."
            )
        took = f"{self.probed_examples:,} examples in {self.seconds:.0f} s"
        lines.append(f"Measured with batches of {_listed([p.batch for p in self.probes])} (*), {took}.")
        lines += [f"Note: {warning}." for warning in self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, file=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return f"{capture.get().rstrip()}\n\n{self.summary()}"

    # Plain values ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: everything that was measured, and :meth:`rows`."""
        names = (
            "optimizer",
            "examples",
            "target_loss",
            "reached",
            "efficiency",
            "max_batch",
            "world_size",
            "all_reduce",
        )
        more = ("expected_batch", "lambda_max", "micro_batch", "mode", "seed", "seconds", "probed_examples")
        plain = {name: getattr(self, name) for name in (*names, *more)}
        plain |= {
            "critical_batch": list(self.critical_batch),
            "recommended_batch": self.recommended_batch,
            "useful_batch": self.useful_batch,
            "fastest_batch": self.fastest_batch,
            "rows": self.rows(),
            "probes": [
                {
                    "batch": probe.batch,
                    "lr": probe.lr,
                    "steps": list(probe.steps),
                    "confirmed": probe.confirmed,
                    "raced": [[lr, s if math.isfinite(s) else None] for lr, s in sorted(probe.race.results.items())],
                    "failed": list(probe.race.failed),
                }
                for probe in self.probes
            ],
            "noise_scale": self.noise_scale.to_dict(),
            "noise_along": [noise.to_dict() for noise in self.noise_along],
            "step_time": asdict(self.step_time),
            "memory": asdict(self.memory),
            "warnings": list(self.warnings),
        }
        return plain

    def save(self, path: Path | str) -> None:
        """Write :meth:`to_dict` as JSON, aside and renamed."""
        write_aside(Path(path), json.dumps(self.to_dict(), indent=1))


def _noise_text(noise: NoiseScale) -> str:
    more = "more than " if noise.lower_bound_only else ""
    return f"{more}{noise.b_simple:,.0f}"


def _listed(numbers: Sequence[int]) -> str:
    texts = [f"{number:,}" for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def duration(seconds: float) -> str:
    """In the unit that fits.

    >>> duration(0.0123), duration(75), duration(9000)
    ('12 ms', '75 s', '2.5 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def size(count: float) -> str:
    """Bytes, in the unit that fits.

    >>> size(2**21), size(100)
    ('2.0 MiB', '100 B')
    """
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= divisor:
            return f"{count / divisor:.1f} {unit}"
    return f"{count:.0f} B"
