"""Watching over workers: bits that flipped in the memory of one, and one that is slower than the others."""

from __future__ import annotations

import datetime
import functools
import logging
import re
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conjugo._space import ParamSpace, is_dtensor, to_local
from conjugo._tensors import flat
from conjugo.distributed.virtual_batch import parameters_of
from conjugo.errors import ReplicasDiffer, check

__all__ = ["ReplicaCheck", "StragglerMonitor", "WorkerTime", "fingerprint"]

_log = logging.getLogger(__name__)

_ROW = 65536
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class ReplicaCheck:
    """Compares, from time to time, the parameters of workers that should hold the same bits.

    Cosmic rays and failing chips change values silently; with synchronous training the worker then goes its own way. Of each
    parameter a :func:`fingerprint` is taken on its device. They travel while training goes on, and are looked at after the
    next step.

    Args:
        params: a model, or parameters, the same on all ranks. Whole ones are compared over all ranks, DTensors over the
            replicas of their shards (HSDP). Buffers are not: those of batch norm differ by intention.
        every: steps between comparisons, at least 1.
        optimizer: whose state is compared too. Damage there reaches the parameters with the next step; this says where it
            came from.
        on_mismatch: ``"raise"`` ReplicasDiffer on all ranks, or ``"warn"``: the first rank logs the same words.
        process_group: the ranks; None: all, if torch.distributed is initialised.

    Making it is collective, as are all methods. With one worker nothing is done.

    Raises ValueError for an argument out of range, and on all ranks if they do not have the same parameters.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor],
        *,
        every: int = 100,
        optimizer: torch.optim.Optimizer | None = None,
        on_mismatch: Literal["raise", "warn"] = "raise",
        process_group: Any = None,
    ) -> None:
        check(every >= 1, "ReplicaCheck", "every", every, ">= 1")
        check(on_mismatch in ("raise", "warn"), "ReplicaCheck", "on_mismatch", on_mismatch, "'raise' or 'warn'")
        self._every, self._optimizer, self._raises = every, optimizer, on_mismatch == "raise"
        named: Iterable[tuple[str, Tensor]]
        if isinstance(params, nn.Module):
            parameters_of(params)  # from now on the model shows the pieces that are trained
            named = params.named_parameters()
        else:
            named = ((str(i), p) for i, p in enumerate(params))
        self._params = dict(named)
        self._group, self._ranks = _ranks(process_group)
        ParamSpace(self._params.values(), group=process_group, labels=list(self._params), owner="ReplicaCheck")
        self._sets = self._replica_sets() if len(self._ranks) > 1 else []
        self._all_see = all(dist.get_world_size(group) == len(self._ranks) for group, _ in self._sets)
        self._steps = 0
        self._taken_at = 0
        self._taken: dict[str, Tensor] = {}
        self._pending: list[tuple[Any, Tensor]] = []

    def after_step(self) -> None:
        """Count a step; look at the comparison in flight, and begin the next one if it is due.

        Raises ReplicasDiffer on all ranks, naming step, parameter and the ranks in the minority.
        """
        self._steps += 1
        self.finish()
        if self._steps % self._every == 0:
            self._begin()

    def compare(self) -> None:
        """Compare now, and wait for the outcome: before a checkpoint, say. Raises ReplicasDiffer on all ranks."""
        self.finish()
        self._begin()
        self.finish()

    def finish(self) -> None:
        """Wait for a comparison in flight. Raises ReplicasDiffer on all ranks."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        differs = False
        for work, extremes in pending:
            work.wait()
            largest, smallest = extremes.chunk(2)
            differs |= not torch.equal(largest, ~smallest)
        if not self._all_see:  # those who see a difference may be few, and all have to stop
            flag = torch.tensor(int(differs), device=pending[0][1].device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            differs = bool(flag)
        if not differs:
            return
        explanation = self._explanation()
        if self._raises:
            raise ReplicasDiffer(explanation)
        if dist.get_rank() == self._ranks[0]:
            _log.warning("%s", explanation)

    def _replica_sets(self) -> list[tuple[Any, list[str]]]:
        """Groups of ranks, and the parameters that are to be equal on all of each."""
        sets: dict[Any, list[str]] = defaultdict(list)
        for name, p in self._params.items():
            if not is_dtensor(p):
                sets[self._group].append(name)
                continue
            for dimension, placement in enumerate(p.placements):
                if placement.is_replicate() and p.device_mesh.size(dimension) > 1:
                    sets[p.device_mesh.get_group(dimension)].append(name)
        return list(sets.items())

    def _begin(self) -> None:
        self._taken_at = self._steps
        settle = getattr(self._optimizer, "settle", None)
        if settle is not None:  # state that is up to date on one rank only
            settle()
        watched = {name for _, names in self._sets for name in names}
        self._taken = {name: self._prints(p) for name, p in self._params.items() if name in watched}
        for group, names in self._sets:
            prints = torch.cat([self._taken[name] for name in names])
            extremes = torch.cat([prints, ~prints])  # the largest, and the complement of the smallest
            self._pending.append(
                (dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group, async_op=True), extremes)
            )

    def _prints(self, p: Tensor) -> Tensor:
        """Fingerprints of a parameter and of its optimizer state, [2]; or of the parameter only, [1]."""
        prints = [fingerprint(to_local(p))]
        if self._optimizer is not None:
            state = torch.zeros((), dtype=torch.int64, device=p.device)
            for _, tensor in sorted(self._optimizer.state.get(p, {}).items()):
                # Slices of the state of whole parameters exist once.
                if isinstance(tensor, Tensor) and (is_dtensor(p) or not is_dtensor(tensor)):
                    state = 31 * state + fingerprint(to_local(tensor)).to(p.device)
            prints.append(state)
        return torch.stack(prints)

    def _explanation(self) -> str:
        """Collective: what differed where, when the fingerprints were taken."""
        mine = {name: (self._copy_of(self._params[name]), prints.tolist()) for name, prints in self._taken.items()}
        everyone: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(everyone, (socket.gethostname(), mine), group=self._group)
        hosts = [host for host, _ in everyone]
        found = []
        for name, prints in self._taken.items():
            for at in range(len(prints)):
                by_copy: dict[Any, dict[int, int]] = defaultdict(dict)
                for place, (_, theirs) in enumerate(everyone):
                    of, values = theirs[name]
                    by_copy[of][place] = values[at]
                for holders in by_copy.values():
                    odd, clear = _minority(holders)
                    if odd:
                        named = _named(odd, self._ranks, hosts)
                        verdict = (
                            f"differ{'s' * (len(odd) == 1)} from the others"
                            if clear
                            else "do not agree, and there is no majority"
                        )
                        found.append(f"{'the optimizer state of ' * at}parameter {name!r}: {named} {verdict}")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return (
            f"after step {self._taken_at} workers hold different bits of {found[0]}{more}; go on from a checkpoint before "
            "that, and have the memory tested"
        )

    def _copy_of(self, p: Tensor) -> Any:
        """What this rank's piece of *p* is a copy of."""
        if not is_dtensor(p):
            return ()
        coordinate = p.device_mesh.get_coordinate() or ()
        return tuple(-1 if q.is_replicate() else c for c, q in zip(coordinate, p.placements))


def _minority(holders: dict[int, int]) -> tuple[list[int], bool]:
    """Which of the *holders* (place to value) differ from most of them, and whether there is a majority; else all."""
    (usual, votes), *others = Counter(holders.values()).most_common()
    clear = 2 * votes > len(holders)
    return [place for place, value in holders.items() if others and (value != usual or not clear)], clear


def _named(places: Iterable[int], ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return ", ".join(f"rank {ranks[place]} on host {hosts[place]}" for place in places)


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit number, 0-d int64, that depends on all bits of *tensor* and on their order; on its device, no waiting.

    The bits, read as integers of at most 32 bits, each times an odd random number that belongs to its place, are added up
    modulo 2^64. A change within one of them, such as a flipped bit, is always seen. Changes of several are missed with a
    probability below 2^-26 if only their highest bits changed, falling to 2^-57 where the lowest did.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    >>> bool(fingerprint(a) == fingerprint(a.clone())), bool(fingerprint(a) == fingerprint(b))
    (True, False)
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = flat(real.detach())
    # 64 bits as two halves: the difference of two numbers of opposite sign would vanish in twice 2^63.
    bits = values.to(torch.int8) if real.dtype == torch.bool else values.view(_INTEGERS[real.element_size()])
    columns, rows = _weights(tensor.device)
    whole = len(bits) - len(bits) % _ROW
    # A CPU keeps a row in its cache; elsewhere few, large operations are best.
    parts = torch.split(bits[:whole].view(-1, _ROW), 1 if bits.device.type == "cpu" else 64)
    sums = [(part * columns).sum(-1) for part in parts]
    rest = bits[whole:]
    sums.append((rest * columns[: len(rest)]).sum().view(1))
    each = torch.cat(sums)
    total: Tensor = (each * rows.repeat(-(-len(each) // _ROW))[: len(each)]).sum()
    return total


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers for columns and for rows, the same on all ranks."""
    generator = torch.Generator().manual_seed(0x5DC)
    numbers = torch.randint(-(2**62), 2**62, (2, _ROW), generator=generator)
    return (2 * numbers + 1).to(device)


class WorkerTime(NamedTuple):
    """How long a worker computes in a step: mean and longest of the steps since the report before, in seconds."""

    rank: int
    host: str
    mean: float
    longest: float


class StragglerMonitor:
    """Finds workers that are slower than the others, by the time that each computes between waits.

    Put what the worker does by itself, without collectives, into ``with monitor.computing():``, once in each step or more
    often; call ``after_step()``. Every *every* steps the times are exchanged in the background; after the next step the first
    rank logs a warning for each worker that takes more than *threshold* times the median.

    every: at least 1. threshold: above 1. device: a CUDA device, whose time is then measured by events; None: wall clock.
    process_group: the ranks; None: all. Making it is collective; with one worker nothing is done.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        threshold: float = 1.5,
        device: torch.device | None = None,
        process_group: Any = None,
    ) -> None:
        check(every >= 1, "StragglerMonitor", "every", every, ">= 1")
        check(threshold > 1, "StragglerMonitor", "threshold", threshold, "> 1")
        self._every, self._threshold = every, threshold
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._group, self._ranks = _ranks(process_group)
        self._gloo = self._group
        self._now: list[Any] = []  # of this step: seconds, or pairs of events
        self._steps: list[list[Any]] = []  # since the last exchange
        self._pending: tuple[Any, Tensor] | None = None
        self._report: list[WorkerTime] = []
        self._hosts = [socket.gethostname()]
        if len(self._ranks) > 1:
            found: list[Any] = [None] * len(self._ranks)
            dist.all_gather_object(found, socket.gethostname(), group=self._group)
            self._hosts = found
            if dist.get_backend(self._group) != "gloo":  # also where it is one of several: monitored_barrier refuses
                self._gloo = dist.new_group(list(self._ranks), backend="gloo", use_local_synchronization=True)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Measures the block."""
        if len(self._ranks) == 1:
            yield
        elif self._cuda is not None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(torch.cuda.current_stream(self._cuda))  # type: ignore[no-untyped-call]
            yield
            end.record(torch.cuda.current_stream(self._cuda))  # type: ignore[no-untyped-call]
            self._now.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._now.append(time.perf_counter() - start)

    def after_step(self) -> None:
        """Count a step; look at the exchange in flight, and begin the next one if it is due. Collective then."""
        if len(self._ranks) == 1:
            return
        self.finish()
        self._steps.append(self._now)
        self._now = []
        if len(self._steps) == self._every:
            self._begin()

    def finish(self) -> None:
        """Wait for an exchange in flight, and report it."""
        if self._pending is None:
            return
        (work, times), self._pending = self._pending, None
        work.wait()
        self._report = [WorkerTime(*of) for of in zip(self._ranks, self._hosts, *times.tolist(), strict=True)]
        # Of an even number the lower one: half of the workers may be slow.
        middle = statistics.median_low(worker.mean for worker in self._report)
        if dist.get_rank() != self._ranks[0] or middle <= 0:
            return
        for worker in self._report:
            if worker.mean > self._threshold * middle:
                _log.warning(
                    "rank %d on host %s is slow: it computes %.3g s in a step, %.1f times the median of all workers",
                    worker.rank,
                    worker.host,
                    worker.mean,
                    worker.mean / middle,
                )

    def report(self) -> list[WorkerTime]:
        """The times of all workers as they were exchanged last, by rank; empty before that, and with one worker."""
        return list(self._report)

    def barrier(self, timeout: float) -> None:
        """Wait until all workers are here, or raise TimeoutError on the first rank that names those missing and their hosts.

        timeout: seconds. On the other ranks it is RuntimeError then.
        """
        if len(self._ranks) == 1:
            return
        try:
            dist.monitored_barrier(self._gloo, datetime.timedelta(seconds=timeout), wait_all_ranks=True)
        except RuntimeError as error:
            missing = _missing(str(error))
            if not missing:
                raise
            named = _named(missing, self._ranks, self._hosts)
            raise TimeoutError(f"within {timeout:g} s nothing was heard of {named}") from error

    def _begin(self) -> None:
        seconds = [sum(map(_seconds, step)) for step in self._steps]
        self._steps = []
        times = torch.zeros(2, len(self._ranks), dtype=torch.float64, device=self._cuda or "cpu")
        times[:, self._ranks.index(dist.get_rank())] = torch.tensor([statistics.fmean(seconds), max(seconds)])
        self._pending = dist.all_reduce(times, group=self._group, async_op=True), times


def _seconds(span: Any) -> float:
    if isinstance(span, float):
        return span
    begin, end = span
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _ranks(group: Any) -> tuple[Any, Sequence[int]]:
    """The group (None: all) and its ranks; only this one where nothing is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return None, [0]
    group = dist.group.WORLD if group is None else group
    return group, dist.get_process_group_ranks(group)


def _missing(message: str) -> list[int]:
    """The places in the group that gloo lists: "[Rank 0]: Ranks 1, 2 failed to pass monitoredBarrier in 500 ms"."""
    found = re.search(r"Ranks ([\d, ]+) failed", message)
    return [int(place) for place in found[1].split(",")] if found else []
