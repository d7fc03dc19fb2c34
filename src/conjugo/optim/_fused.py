"""The vector work of the optimizers' steps on CPU tensors by the optional C kernels.

:class:`FusedPasses` does what :mod:`conjugo.optim._passes` specifies. Without temporaries the passes cost what their memory
traffic costs: 56 bytes per float32 parameter with the BFGS preconditioner, 40 with Adam's scaling (AdamW: 28), 24 without
preconditioner (SGD with momentum: 20). What treats whole matrices gets gradients as tensors and gives tensors; the kernels
do the rest. :class:`KernelTable` is what a kernel reads and writes; :mod:`conjugo.optim._updates` has one too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from conjugo._tensors import CHUNK, Array
from conjugo.optim._passes import Move
from conjugo.optim._vectors import Scale, effective_gradients
from conjugo.optim.adaptive_preconditioner import AdamDiagonal
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.matrix_preconditioners import MatrixPreconditioner, picked
from conjugo.optim.orthogonal import Orthogonal
from conjugo.optim.preconditioners import Block, DiagonalBFGS, Identity, Secant

try:
    from conjugo.optim import _kernels as kernels  # type: ignore[attr-defined]
except ImportError:  # the package was built without a C compiler
    kernels = None

__all__ = ["SERIAL", "FusedPasses", "KernelTable", "kernels", "share", "suits"]

SERIAL = 4 * CHUNK
"""Below this number of values a second thread costs more than it saves."""

_BUILT_IN = (Identity, DiagonalBFGS, AdamDiagonal, Orthogonal, Kronecker)

_BOOLS = (torch.tensor(False), torch.tensor(True))

_pools: dict[int, ThreadPoolExecutor] = {}
"""By number of threads."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def suits(blocks: Sequence[Block]) -> bool:
    """Whether the kernels can do the work.

    That is: dense CPU parameters of one type, float32 or float64, and built-in preconditioners: one, or Adam's scaling and
    those that fall back on it.
    """
    preconds = [block.precond for block in blocks]
    if kernels is None or any(type(precond) not in _BUILT_IN for precond in preconds):
        return False
    alike = all(precond == preconds[0] for precond in preconds)
    if not (alike or all(isinstance(precond, AdamDiagonal) for precond in preconds)):
        return False
    params = [p for block in blocks for p in block.pieces()]
    return all(
        type(p) in (Tensor, torch.nn.Parameter)
        and p.device.type == "cpu"
        and p.dtype in (torch.float32, torch.float64)
        and p.dtype == params[0].dtype
        and torch.ops.aten.is_non_overlapping_and_dense(p)
        for p in params
    )


class KernelTable:
    """Addresses and coefficients of the parameters of *blocks*, and the kernels that run over them.

    The work is cut into pieces that do not depend on the number of threads; those that PyTorch may use share it.

    columns: columns of the table of addresses, by the name of the state that they point to, where there is such a state.
    """

    def __init__(self, blocks: Sequence[Block], columns: Mapping[str, int], *, owner: str) -> None:
        k = kernels
        self._owner = owner
        self._blocks = blocks
        params = [p for block in blocks for p in block.pieces()]
        states = [state for block in blocks for state in block.states]
        self._layouts = [(p.dtype, p.stride()) for p in params]
        self._double = params[0].dtype == torch.float64
        n, sizes = len(params), [p.numel() for p in params]
        self._threaded = sum(sizes) > SERIAL

        self.params: list[Tensor] = params
        self.pointers = np.zeros((n, k.N_POINTERS), dtype=np.int64)
        for name, column in columns.items():
            for i, state in enumerate(states):
                if name in state:
                    self.pointers[i, column] = state[name].data_ptr()
        # An empty parameter has one empty piece.
        pieces = [
            (i, at, min(CHUNK, size - at)) for i, size in enumerate(sizes) for at in range(0, max(size, 1), CHUNK)
        ]
        self._pieces = np.array(pieces, dtype=np.int64)
        self._first_pieces = np.searchsorted(self._pieces[:, 0], np.arange(n))
        self._sums = np.zeros((len(pieces), k.N_SUMS))
        self.coefficients = np.zeros((n, k.N_COEFFICIENTS))
        tables = (self.pointers, self.coefficients, self._pieces, self._sums)
        self._addresses = [table.ctypes.data for table in tables]
        self.gradients: list[Tensor] = []
        """Of this step, laid out as the parameters."""

    def bind(self) -> None:
        """Take the addresses of this step's gradients, and those of the parameters, which may have been exchanged."""
        self.params = [p for block in self._blocks for p in block.pieces()]
        raw = [g for block in self._blocks for g in block.raw_gradients()]
        self.gradients = gradients = []
        for p, g, (dtype, stride) in zip(self.params, raw, self._layouts, strict=True):
            if p.dtype != dtype or p.stride() != stride or p.device.type != "cpu":
                raise RuntimeError(
                    f"{self._owner}: a parameter of shape {tuple(p.shape)} changed its type, device or strides"
                )
            gradients.append(g if g.stride() == stride and g.dtype == dtype else torch.empty_like(p).copy_(g))
        self.pointers[:, kernels.PARAM] = [p.data_ptr() for p in self.params]
        self.pointers[:, kernels.GRAD] = [g.data_ptr() for g in gradients]

    def scale(self, scales: Sequence[Scale]) -> None:
        """Set what the kernels see of gradient and parameter, for each parameter."""
        numbers = [(float(factor), float(decay)) for factor, decay in scales]
        self.coefficients[:, [kernels.SCALE, kernels.DECAY]] = numbers

    def aligned(self, rows: Sequence[int], values: Sequence[Tensor], column: int) -> list[Tensor]:
        """*values* laid out as the parameters *rows* are, for the kernels to read in *column*; the caller keeps them alive."""
        found = [
            x if x.stride() == self._layouts[i][1] else torch.empty_like(self.params[i]).copy_(x)
            for i, x in zip(rows, values, strict=True)
        ]
        self.pointers[rows, column] = [x.data_ptr() for x in found]
        return found

    def run(self, op: int, flags: int = 0) -> Array:
        """One pass; its sums per parameter, float64 [n, 4]."""

        def part(begin: int, end: int) -> None:
            kernels.run(op, flags, self._double, *self._addresses, begin, end)

        threads = torch.get_num_threads() if self._threaded else 1
        if threads == 1:
            part(0, len(self._pieces))
        else:
            share(part, len(self._pieces), threads)
        return np.add.reduceat(self._sums, self._first_pieces, axis=0)

    def release(self) -> None:
        """The step is done: let go of the gradients, and tell autograd that the parameters have changed."""
        self.gradients = []
        torch.autograd.graph.increment_version(self.params)


class FusedPasses:
    """The passes over all parameters of *blocks*. Scalars are numpy arrays here."""

    on_host = True

    def __init__(self, blocks: Sequence[Block]) -> None:
        k = kernels
        first = blocks[0].precond
        self._bfgs = first if isinstance(first, DiagonalBFGS) else None
        self._adam = isinstance(first, AdamDiagonal)
        self._hessian = k.F_HESSIAN if self._bfgs else 0
        self._store = k.F_STORE if "grad_prev" in blocks[0].states[0] and not self._hessian else 0
        columns = {"grad_prev": k.PREV, "h": k.HESS, "square": k.HESS, "direction": k.DIR}
        self._table = KernelTable(blocks, columns, owner="NLCG")
        self._direction = 0
        self._matrices: list[tuple[list[int], Block]] = []
        """Numbers of parameters that are treated as matrices, and blocks of them alone."""
        self._scaled: list[tuple[AdamDiagonal, list[int], list[Array]]] = []
        """Numbers of those with Adam's scaling, and how many squares were learned of each, on the memory of the state."""
        self._results: list[list[Tensor]] = []
        if self._bfgs:
            c = self._table.coefficients
            c[:, k.LOW], c[:, k.HIGH] = self._bfgs.limits
        if self._adam:
            self._part(blocks)

    def _part(self, blocks: Sequence[Block]) -> None:
        """Find out which parameters are matrices."""
        k, c, start = kernels, self._table.coefficients, 0
        for block in blocks:
            n, precond = len(block.params), block.precond
            assert isinstance(precond, AdamDiagonal)
            matrices, others = precond.parts(block) if isinstance(precond, MatrixPreconditioner) else ([], range(n))
            if matrices:
                params, states = picked(block.params, matrices), picked(block.states, matrices)
                alone = dataclasses.replace(block, params=params, states=states, memo={})
                self._matrices.append(([start + i for i in matrices], alone))
                c[self._matrices[-1][0], k.FORM] = k.F_GIVEN
            if others:
                rows = [start + i for i in others]
                self._scaled.append((precond, rows, [block.states[i]["updates"].numpy() for i in others]))
                c[rows, k.FORM] = k.F_SQUARE
                c[rows, k.MEMORY], c[rows, k.NEW] = precond.beta2, 1 - precond.beta2
            start += n

    def gradient(self, scales: Sequence[Scale], *, direction: bool, cross: bool, fresh: Array) -> Array:
        """[n, 4], see :mod:`conjugo.optim._passes`."""
        k = kernels
        self._table.bind()
        self._table.scale(scales)
        for rows, block in self._matrices:
            self._see(rows, block, scales)
        if self._bfgs:
            self._table.coefficients[:, k.EPS] = self._bfgs.eps(fresh)
        elif cross and self._adam:
            self._divide()
            self._results = [
                self._apply(rows, block, block.state("grad_prev"), fresh) for rows, block in self._matrices
            ]
        self._direction = k.F_DIRECTION if direction else 0
        return self._table.run(k.OP_GRADIENT, self._direction | (k.F_CROSS | self._hessian if cross else 0))

    def _see(self, rows: list[int], block: Block, scales: Sequence[Scale]) -> None:
        """Have the gradients of matrices as the method sees them: they are tensors for the preconditioner."""
        k, c = kernels, self._table.coefficients
        if all(type(scales[i][0]) is float and scales[i] == (1.0, 0.0) for i in rows):
            block.gradients = picked(self._table.gradients, rows)
            return
        xs = effective_gradients(block, picked(scales, rows))
        block.gradients = self._table.aligned(rows, xs, k.GRAD)
        c[rows, k.SCALE], c[rows, k.DECAY] = 1.0, 0.0

    def _apply(self, rows: list[int], block: Block, vectors: list[Tensor], fresh: Array) -> list[Tensor]:
        """P v for matrices, where the kernels find it."""
        found = block.precond.apply(block, vectors, _BOOLS[bool(fresh[rows[0]])])
        return self._table.aligned(rows, found, kernels.HESS)

    def _divide(self) -> None:
        """Set what Adam's scaling divides by, from the counts as they are."""
        k, c = kernels, self._table.coefficients
        for precond, rows, counts in self._scaled:
            c[rows, k.GAIN], c[rows, k.EPS] = precond.divisor(np.array(counts))

    def difference(self) -> Array:
        """[n], see :mod:`conjugo.optim._passes`."""
        return self._table.run(kernels.OP_DIFFERENCE)[:, 0]

    def precondition(self, secant: Secant, *, fresh: Array) -> Array:
        """[n, 4], see :mod:`conjugo.optim._passes`; the caller has seen that the step is finite.

        Without preconditioner 0: all is known from the first pass.
        """
        k, c = kernels, self._table.coefficients
        if self._adam:
            for count in (count for _, _, counts in self._scaled for count in counts):
                count += 1
            self._divide()
            self._results = []
            for rows, block in self._matrices:
                block.precond.update(block, secant._replace(finite=_BOOLS[True]))
                self._results.append(self._apply(rows, block, block.gradients, fresh))
            return self._table.run(k.OP_PRECONDITION, self._direction)
        if not self._bfgs:
            return np.zeros((len(c), 4))
        c[:, k.EPS] = self._bfgs.eps(fresh)
        c[:, k.ROOT_A], c[:, k.ROOT_B], c[:, k.SHIFT] = self._bfgs.coefficients(secant)
        flags = k.F_UPDATE if c[:, k.ROOT_A].any() else 0
        return self._table.run(k.OP_PRECONDITION, flags | (k.F_ABSOLUTE if self._bfgs.reference else 0))

    def move(self, move: Move) -> Array:
        """[n, 2], see :mod:`conjugo.optim._passes`."""
        k, c = kernels, self._table.coefficients
        c[:, k.BETA], c[:, k.TAU] = move.beta, move.tau
        c[:, k.UNDO] = 0.0 if move.undo is None else move.undo
        c[:, k.KEEP] = 1.0 if move.keep is None else move.keep
        flags = self._hessian | self._store | (0 if move.undo is None else k.F_UNDO)
        totals = self._table.run(k.OP_MOVE, flags)[:, :2]
        self._table.release()
        self._results = []
        for _, block in self._matrices:
            block.gradients = []
        return totals


def share(part: Callable[[int, int], None], n: int, threads: int) -> None:
    """Have *part(begin, end)* done for all of the *n* pieces, by so many threads."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(max_workers=threads - 1, thread_name_prefix="conjugo")
    edges = [n * i // threads for i in range(threads + 1)]
    others = [_pools[threads].submit(part, a, b) for a, b in pairwise(edges[1:])]
    part(edges[0], edges[1])
    for future in others:
        future.result()
