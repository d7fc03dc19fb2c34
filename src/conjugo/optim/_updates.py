"""The vector work of a step with momentum, for any device and type: what SGD's relatives share.

With x = first * gradient + second * parameter the gradient that the method sees (``Scale``), and m the momentum buffer:

* ``squares``: <x, x> of each parameter;
* ``move``: m <- beta m + gain x, p <- keep p - tau m - look x.

Every parameter has its own coefficients. :class:`TensorUpdates` is the specification: PyTorch operations on one tensor
after the other, or on lists; scalars are tensors on the device and nothing waits for it. :class:`FusedUpdates` does the same
with the compiled CPU kernels, with 4 and 20 bytes of memory traffic per float32 parameter; scalars are numpy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conjugo._tensors import Array
from conjugo.optim._base import as_real, state_dtype
from conjugo.optim._fused import KernelTable, kernels
from conjugo.optim._vectors import Scale, add, dots, effective_gradients, minus, plus, scale
from conjugo.optim.preconditioners import Block

__all__ = ["BUFFER", "INITIAL", "FusedUpdates", "Momentum", "TensorUpdates"]

BUFFER = "momentum_buffer"
"""The state that holds m; a parameter without momentum has none, and then *beta*, *gain* and *tau* do not matter."""


INITIAL = "initial"
"""The state that holds the parameters from before the first step, if the method needs them."""


class Momentum(NamedTuple):
    """The coefficients of ``move``, float64 [n]; None: the neutral value in brackets."""

    beta: Array = None  # [1]
    gain: Array = None  # [1]
    tau: Array = None  # [0]
    look: Array = None  # [0]
    keep: Array = None  # [1]


_NEUTRAL = Momentum(1.0, 1.0, 0.0, 0.0, 1.0)
_NOTHING = Momentum(1.0, 0.0, 0.0, 0.0, 1.0)


class TensorUpdates:
    """The work on *blocks*; within a block, lists of tensors at once (``foreach``) or one tensor after the other.

    shared: the parameters of a block have equal coefficients, so that one of each serves all.
    """

    on_host = False
    """Whether reading a scalar costs nothing, so that Python may branch on it."""

    def __init__(self, blocks: Sequence[Block], *, shared: bool) -> None:
        starts = [sum(len(b.params) for b in blocks[:i]) for i in range(len(blocks))]
        self._blocks = [(block, slice(i, i + len(block.params))) for i, block in zip(starts, blocks, strict=True)]
        self._shared = shared

    def begin(self) -> None:
        """To be called first in each step."""

    def squares(self, scales: Sequence[Scale]) -> Tensor:
        """[n]."""
        return self._squares([effective_gradients(block, scales[span]) for block, span in self._blocks])

    def both_squares(self) -> tuple[Tensor, Tensor]:
        """<g, g> and <p, p> of each parameter, g the gradient as it is: two of [n]."""
        gradients = self.squares([(1.0, 0.0)] * sum(len(block.params) for block, _ in self._blocks))
        return gradients, self._squares([_parameters(block) for block, _ in self._blocks])

    def squared_distances(self) -> Tensor:
        """<p - q, p - q> with q where p started: [n]."""
        return self._squares([minus(_parameters(b), b.state(INITIAL), b.foreach) for b, _ in self._blocks])

    def _squares(self, lists: Sequence[list[Tensor]]) -> Tensor:
        return torch.cat([dots(xs, xs, block.foreach) for xs, (block, _) in zip(lists, self._blocks, strict=True)])

    def move(self, scales: Sequence[Scale], move: Momentum, finite: Tensor) -> None:
        """Update parameters and buffers; where not *finite* (0-d bool) some x holds NaN or infinity, and nothing changes."""
        skip = torch.logical_not(finite)
        safe = Momentum(
            *(None if c is None else torch.where(finite, c, no) for c, no in zip(move, _NOTHING, strict=True))
        )
        against = {
            name: -value for name, value in safe._asdict().items() if name in ("tau", "look") and value is not None
        }
        safe = safe._replace(**against)
        for block, span in self._blocks:
            # NaN * 0 is NaN: only a selection rids a skipped step of its gradient.
            xs = [x.masked_fill(skip, 0.0) for x in effective_gradients(block, scales[span])]
            ps, dtype = [as_real(p) for p in block.pieces()], xs[0].dtype
            beta, gain, tau, look, keep = (
                None if c is None else c[span.start].to(dtype) if self._shared else c[span].to(dtype).unbind()
                for c in safe
            )
            if keep is not None:
                scale(ps, keep, block.foreach)
            if look is not None:
                add(ps, xs, look, block.foreach)
            if BUFFER in block.states[0]:
                ms = block.state(BUFFER)
                if beta is not None:
                    scale(ms, beta, block.foreach)
                if gain is not None:
                    scale(xs, gain, block.foreach)
                plus(ms, xs, block.foreach)
                if tau is not None:
                    add(ps, ms, tau, block.foreach)


class FusedUpdates:
    """The work by the compiled CPU kernels; arguments and results as those of :class:`TensorUpdates`, but of numpy."""

    on_host = True

    def __init__(self, blocks: Sequence[Block], *, owner: str) -> None:
        self._table = KernelTable(blocks, {BUFFER: kernels.DIR, INITIAL: kernels.PREV}, owner=owner)

    def begin(self) -> None:
        """To be called first in each step."""
        self._table.bind()

    def squares(self, scales: Sequence[Scale]) -> Array:
        """[n]."""
        self._table.scale(scales)
        return self._table.run(kernels.OP_GRADIENT)[:, 0]

    def both_squares(self) -> tuple[Array, Array]:
        """<g, g> and <p, p> of each parameter in one pass, g the gradient as it is: two of [n]."""
        table, column = self._table, kernels.DIR
        table.scale([(1.0, 0.0)] * len(table.params))
        before = table.pointers[:, column].copy()
        table.pointers[:, column] = table.pointers[:, kernels.PARAM]  # p in the place of m
        sums = table.run(kernels.OP_GRADIENT, kernels.F_DIRECTION)
        table.pointers[:, column] = before
        return sums[:, 0], sums[:, 3]

    def squared_distances(self) -> Array:
        """<p - q, p - q> with q where p started: [n]; only in a step that is finite."""
        self._table.scale([(0.0, 1.0)] * len(self._table.params))  # p in the place of x
        return self._table.run(kernels.OP_DIFFERENCE)[:, 0]

    def move(self, scales: Sequence[Scale], move: Momentum, finite: Array) -> None:
        """Update parameters and buffers; only in a step that is *finite*."""
        k, c = kernels, self._table.coefficients
        self._table.scale(scales)
        columns = (k.BETA, k.GAIN, k.TAU, k.LOOK, k.KEEP)
        for column, values, neutral in zip(columns, move, _NEUTRAL, strict=True):
            c[:, column] = neutral if values is None else values
        self._table.run(k.OP_MOMENTUM)
        self._table.release()


def _parameters(block: Block) -> list[Tensor]:
    """This rank's pieces of the parameters, real, in the type of their state."""
    return [as_real(p).to(state_dtype(p)) for p in block.pieces()]
