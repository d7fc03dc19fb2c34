"""Watching over workers: bits that flipped in the memory of one, and one that is slower than the others."""

from __future__ import annotations

import datetime
import logging
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conjugo._space import is_dtensor, to_local
from conjugo._tensors import flat
from conjugo.errors import ReplicasDiffer, check

__all__ = ["ReplicaCheck", "StragglerMonitor", "fingerprint"]

_log = logging.getLogger(__name__)

_ROW = 65536
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck:
    """Compares, from time to time, the parameters of workers that should hold the same bits.

    Cosmic rays and failing chips change values silently; with synchronous training the worker then goes its own way. Of each
    parameter a 64-bit fingerprint is taken: a single flipped bit is always found, anything else but for chance, 2^-63. The
    comparison travels while training goes on, and is looked at when the next one is due.

    model: its parameters are compared: whole ones over all ranks, DTensors over the replicas of their shards (HSDP). Buffers
    are not: those of batch norm differ by intention. every: steps between comparisons, at least 1. process_group: the ranks;
    None: all, if torch.distributed is initialised.

    Making it is collective, as are all methods. With one worker nothing is done.
    """

    def __init__(self, model: nn.Module, *, every: int = 100, process_group: Any = None) -> None:
        check(every >= 1, "ReplicaCheck", "every", every, ">= 1")
        self._every = every
        self._params = dict(model.named_parameters())
        self._group, self._ranks = _ranks(process_group)
        self._sets = self._replica_sets() if len(self._ranks) > 1 else []
        self._steps = 0
        self._pending: list[tuple[Any, Tensor]] = []
        self._taken_at = 0

    def after_step(self) -> None:
        """Count a step; look at the last comparison and begin the next one, if it is due.

        Raises ReplicasDiffer on all ranks, naming step, parameter and the ranks in the minority.
        """
        self._steps += 1
        if self._steps % self._every == 0:
            self.finish()
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
        # Those who see a difference may be few, and all have to stop.
        flag = torch.tensor(int(differs), device=pending[0][1].device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if flag:
            raise ReplicasDiffer(self._explanation())

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
        for group, names in self._sets:
            prints = torch.stack([fingerprint(to_local(self._params[name])) for name in names])
            extremes = torch.cat([prints, ~prints])  # the largest, and the complement of the smallest
            self._pending.append(
                (dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group, async_op=True), extremes)
            )

    def _explanation(self) -> str:
        """Collective: which parameter differs where."""
        mine = {name: (self._copy_of(p), fingerprint(to_local(p)).item()) for name, p in self._params.items()}
        everyone: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(everyone, (socket.gethostname(), mine), group=self._group)
        for name in self._params:
            by_copy: dict[Any, list[tuple[int, int]]] = defaultdict(list)
            for rank, (_, theirs) in zip(self._ranks, everyone, strict=True):
                of, found = theirs[name]
                by_copy[of].append((rank, found))
            for holders in by_copy.values():
                counts = Counter(found for _, found in holders)
                if len(counts) == 1:
                    continue
                (usual, votes), *_ = counts.most_common()
                clear = 2 * votes > len(holders)
                odd = [rank for rank, found in holders if found != usual or not clear]
                hosts = {rank: host for rank, (host, _) in zip(self._ranks, everyone, strict=True)}
                named = ", ".join(f"rank {rank} on host {hosts[rank]}" for rank in odd)
                agree = "" if clear else " do not agree, and there is no majority"
                return (
                    f"after step {self._taken_at} workers hold different bits of parameter {name!r}: {named}"
                    f"{agree or ' differ' + ('s' if len(odd) == 1 else '') + ' from the others'}; go on from a checkpoint "
                    "before that, and have the memory tested"
                )
        return f"after step {self._taken_at} workers held different bits, and hold the same again now"

    def _copy_of(self, p: Tensor) -> Any:
        """What this rank's piece of *p* is a copy of."""
        if not is_dtensor(p):
            return ()
        coordinate = p.device_mesh.get_coordinate() or ()
        return tuple(-1 if q.is_replicate() else c for c, q in zip(coordinate, p.placements))


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit number, 0-d int64, that depends on all bits of *tensor* and on their order; on its device, no waiting.

    The sum of the bits as integers, each times an odd number that depends on its place, modulo 2^64.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    >>> bool(fingerprint(a) == fingerprint(a.clone())), bool(fingerprint(a) == fingerprint(b))
    (True, False)
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = (
        flat(real.detach()).view(_INTEGERS[real.element_size()])
        if real.dtype != torch.bool
        else flat(real).to(torch.int8)
    )
    weights = _weights(tensor.device)
    rows = [(row.to(torch.int64) * weights[: len(row)]).sum() for row in torch.split(bits, _ROW)]
    sums = torch.stack(rows)
    total: Tensor = (sums * weights.repeat(-(-len(sums) // _ROW))[: len(sums)]).sum()
    return total


_cache: dict[torch.device, Tensor] = {}


def _weights(device: torch.device) -> Tensor:
    """Odd numbers, the same on all ranks."""
    if device not in _cache:
        generator = torch.Generator().manual_seed(0x5DC)
        numbers = torch.randint(-(2**62), 2**62, (_ROW,), generator=generator)
        _cache[device] = (2 * numbers + 1).to(device)
    return _cache[device]


class StragglerMonitor:
    """Finds workers that are slower than the others, by the time that each computes between waits.

    Put what the worker does by itself, without collectives, into ``with monitor.computing():``, once in each step or more
    often; call ``after_step()``. Every *every* steps the mean times are exchanged in the background; the next time rank 0
    logs a warning for each worker that takes more than *threshold* times the median.

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
        self._steps = 0
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._pending: tuple[Any, Tensor] | None = None
        self.times: list[float] = []
        """Mean seconds of a step of each worker, as they were exchanged last."""
        self.hosts: list[str] = [socket.gethostname()]
        if len(self._ranks) > 1:
            found: list[Any] = [None] * len(self._ranks)
            dist.all_gather_object(found, socket.gethostname(), group=self._group)
            self.hosts = found

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Measures the block."""
        if self._cuda is not None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(torch.cuda.current_stream(self._cuda))  # type: ignore[no-untyped-call]
            yield
            end.record(torch.cuda.current_stream(self._cuda))  # type: ignore[no-untyped-call]
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def after_step(self) -> None:
        """Count a step; exchange times if it is time for it. Collective then."""
        self._steps += 1
        if self._steps % self._every or len(self._ranks) == 1:
            return
        self._look()
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        place = self._ranks.index(dist.get_rank())
        times = torch.zeros(len(self._ranks), dtype=torch.float64, device=self._cuda or "cpu")
        times[place] = self._seconds / self._every
        self._pending = dist.all_reduce(times, group=self._group, async_op=True), times
        self._seconds, self._events = 0.0, []

    def finish(self) -> None:
        """Wait for an exchange in flight, and report it."""
        self._look()

    def _look(self) -> None:
        if self._pending is None:
            return
        (work, times), self._pending = self._pending, None
        work.wait()
        self.times = times.tolist()
        middle = statistics.median(self.times)
        if dist.get_rank() != self._ranks[0] or middle <= 0:
            return
        for rank, host, seconds in zip(self._ranks, self.hosts, self.times, strict=True):
            if seconds > self._threshold * middle:
                _log.warning(
                    "rank %d on host %s is slow: it computes %.3g s in a step, %.1f times the median of all workers",
                    rank,
                    host,
                    seconds,
                    seconds / middle,
                )

    def barrier(self, timeout: float) -> None:
        """Wait until all workers are here, or raise TimeoutError on the first rank that names those missing and their hosts.

        timeout: seconds. On the other ranks it is RuntimeError then. Needs a process group with gloo.
        """
        if len(self._ranks) == 1:
            return
        try:
            dist.monitored_barrier(self._group, datetime.timedelta(seconds=timeout), wait_all_ranks=True)
        except RuntimeError as error:
            missing = _numbers_in(str(error), self._ranks)
            if not missing:
                raise
            named = ", ".join(f"rank {rank} on host {self.hosts[self._ranks.index(rank)]}" for rank in missing)
            raise TimeoutError(f"within {timeout:g} s nothing was heard of {named}") from error


def _ranks(group: Any) -> tuple[Any, Sequence[int]]:
    """The group (None: all) and its ranks; only this one where nothing is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return None, [0]
    group = dist.group.WORLD if group is None else group
    return group, dist.get_process_group_ranks(group)


def _numbers_in(message: str, ranks: Sequence[int]) -> list[int]:
    """The ranks that gloo's message lists at its end."""
    _, found, listed = message.partition("Ranks ")
    numbers = [int(word) for word in listed.split(" failed")[0].replace(",", " ").split() if word.isdecimal()]
    return [rank for rank in numbers if rank in ranks] if found else []
