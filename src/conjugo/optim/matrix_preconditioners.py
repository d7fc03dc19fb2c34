"""What preconditioners that treat a weight as a matrix have in common.

A weight [out, in, ...] is the matrix [out, in * ...]: a kernel of a convolution has a row for each channel that it makes.
What is no matrix (vectors, complex parameters, and what the option *matrices* leaves out) gets Adam's scaling. The matrices
must be whole on each rank: one process or DDP, without ``shard_state``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from conjugo._space import is_dtensor
from conjugo.errors import check
from conjugo.optim.adaptive_preconditioner import AdamDiagonal, State
from conjugo.optim.preconditioners import Block, Secant

__all__ = ["Matrices", "MatrixPreconditioner", "is_count", "picked", "shape_of"]

T = TypeVar("T")


@dataclass
class Matrices:
    """Whole matrices of one type that are worked on together; the lists run over them."""

    states: list[State]
    gradients: list[Tensor] = field(default_factory=list)
    """[out, ...] each, in the type of the state; all 0 in a step that is skipped."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What the preconditioner wants to remember on the host; nothing of it is saved."""


@dataclass(frozen=True, kw_only=True)
class MatrixPreconditioner(AdamDiagonal):
    """Base class: matrices in the way of the subclass, all else as :class:`AdamDiagonal`.

    Which is which is settled when the optimizer is made, and then seen from the names of the state.

    matrices: says of a parameter with two dimensions or more whether it is one of the matrices; None: by its shape, as the
    subclass says. Pickling the optimizer wants a function of a module, or None.
    """

    beta2: float = 0.95
    matrices: Callable[[Tensor], bool] | None = None

    @abstractmethod
    def suits(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape is one to begin with, unless *matrices* decides."""

    @abstractmethod
    def matrix_state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a matrix."""

    @abstractmethod
    def treats(self, state: State) -> bool:
        """Whether *state* is that of a matrix."""

    def learn(self, matrices: Matrices, finite: Tensor) -> None:
        """Learn from the gradients, in place; nothing may change where not *finite*, 0-d bool: all gradients are 0 then."""
        return

    @abstractmethod
    def treat(self, matrices: Matrices, vectors: list[Tensor]) -> list[Tensor]:
        """P v for each of *vectors*: new tensors; ``matrices.gradients`` itself is what was learned last."""

    def is_matrix(self, p: Tensor) -> bool:
        """Whether *p* is one of the matrices; complex and empty parameters and vectors never are."""
        if p.is_complex() or p.ndim < 2 or p.numel() == 0:
            return False
        return self.suits(*shape_of(p)) if self.matrices is None else bool(self.matrices(p))

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """By :meth:`matrix_state` or as Adam's; raises ValueError for a matrix that is cut over ranks."""
        if not self.is_matrix(p):
            return super().init_state(p)
        given = f"one of shape {list(p.shape)} that is cut over ranks"
        accepted = (
            "whole on every rank: take DDP without shard_state instead of FSDP, tensor parallelism or shard_state; "
            "precond='adam' or 'bfgs'; or matrices=..., a function that is false for it"
        )
        check(_is_whole(p), self._name, "the matrices", given, accepted)
        return self.matrix_state(p)

    def update(self, block: Block, secant: Secant) -> None:
        """Matrices by :meth:`learn`, Adam's scaling for all else."""
        indices, others = self.parts(block)
        self.learn_squares(picked(block.states, others), picked(block.gradients, others), secant.finite, block.foreach)
        if indices:
            matrices = self._matrices(block)
            matrices.gradients = picked(block.gradients, indices)
            self.learn(matrices, secant.finite)

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """Matrices by :meth:`treat`, Adam's scaling for all else."""
        indices, others = self.parts(block)
        results = list(vectors)
        found = self.divided(picked(block.states, others), picked(vectors, others), block.foreach)
        if indices:
            matrices = self._matrices(block)
            given = matrices.gradients if vectors is block.gradients else picked(vectors, indices)
            found += self.treat(matrices, given)
            matrices.gradients = []
        for i, z in zip([*others, *indices], found, strict=True):
            same = z.stride() == vectors[i].stride()
            results[i] = z if same else torch.empty_like(vectors[i]).copy_(z)
        return results

    def _matrices(self, block: Block) -> Matrices:
        """The matrices of *block*."""
        if "matrices" not in block.memo:
            block.memo["matrices"] = Matrices(picked(block.states, self.parts(block)[0]))
        matrices: Matrices = block.memo["matrices"]
        return matrices

    def diagonal(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """None: P as a whole is not diagonal."""
        return None

    def parts(self, block: Block) -> tuple[list[int], list[int]]:
        """Numbers of the matrices of *block*, and of all else."""
        if "parts" not in block.memo:
            found: tuple[list[int], list[int]] = [], []
            for i, state in enumerate(block.states):
                found[not self.treats(state)].append(i)
            block.memo["parts"] = found
        parts: tuple[list[int], list[int]] = block.memo["parts"]
        return parts


def shape_of(p: Tensor) -> tuple[int, int]:
    """Rows and columns of the matrix that *p*, [out, ...], is."""
    return p.shape[0], math.prod(p.shape[1:])


def _is_whole(p: Tensor) -> bool:
    if not is_dtensor(p):
        return True
    return all(q.is_replicate() or p.device_mesh.size(i) == 1 for i, q in enumerate(p.placements))


def picked(items: Sequence[T], indices: Sequence[int]) -> list[T]:
    """Those of *items* at *indices*."""
    return [items[i] for i in indices]


def is_count(value: object) -> bool:
    """Whether *value* is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
