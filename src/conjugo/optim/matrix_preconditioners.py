"""What preconditioners that treat a weight as a matrix have in common.

A weight [out, in, ...] is the matrix [out, in * ...]: a kernel of a convolution has a row for each channel that it makes.
What is no matrix (vectors, complex parameters, and what the option *matrices* leaves out) gets Adam's scaling.

Matrices whose pieces lie on several ranks are shared out: each has one rank, its owner, which gets the whole gradient, works
on it as one process would, and sends the pieces of the result back. Matrices that are whole on all ranks may be shared out too,
and so those that are cut over more than one dimension of a mesh, of which all ranks get the whole first.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conjugo._space import chunk, is_dtensor
from conjugo.errors import check
from conjugo.optim._owners import Cut, Exchange, Keeper, assigned, cut_of, piece_of, spreading_pays, whole_of
from conjugo.optim.adaptive_preconditioner import AdamDiagonal, State
from conjugo.optim.preconditioners import Block, Secant

__all__ = ["Matrices", "MatrixPreconditioner", "is_count", "picked", "shape_of"]

T = TypeVar("T")


@dataclass
class Matrices:
    """Whole matrices of one type that are worked on together; the lists run over them."""

    states: Sequence[State]
    gradients: list[Tensor] = field(default_factory=list)
    """[out, ...] each, in the type of the state; all 0 in a step that is skipped."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What the preconditioner wants to remember on the host; nothing of it is saved."""


@dataclass
class _Team:
    """Matrices of a block that the ranks of one group share out, or that this rank has alone."""

    indices: list[int]
    """In the block."""
    params: list[Tensor]
    matrices: Matrices
    """Those that this rank works on."""
    exchange: Exchange | None = None
    keeper: Keeper | None = None
    has_gradients: bool = False
    """Whether the gradients of this step were gathered; the same on all ranks."""

    def gather(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """What this rank works on, of the *pieces* of all. Collective if they are cut."""
        wholes = [whole_of(piece, p) for piece, p in zip(pieces, self.params, strict=True)]
        return wholes if self.exchange is None else self.exchange.gather(wholes)

    def scatter(self, results: list[Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
        """This rank's pieces of all results. Collective if they are shared out."""
        found = results if self.exchange is None else self.exchange.scatter(results, pieces)
        return [piece_of(z, p) for z, p in zip(found, self.params, strict=True)]


@dataclass(frozen=True, kw_only=True)
class MatrixPreconditioner(AdamDiagonal):
    """Base class: matrices in the way of the subclass, all else as :class:`AdamDiagonal`.

    Which is which is settled when the optimizer is made, and then seen from the names of the state.

    matrices: says of a parameter with two dimensions or more whether it is one of the matrices; None: by its shape, as the
    subclass says. Pickling the optimizer wants a function of a module, or None.

    spread: whether the ranks share the work on matrices that all of them have whole (DDP), and exchange the results; None:
    where that seems to pay, and never where matrices have state. With True such state is up to date with the owners only, and
    ``state_dict`` of the optimizer is collective, as it is for all state of matrices that are cut along one dimension.
    """

    beta2: float = 0.95
    matrices: Callable[[Tensor], bool] | None = None
    spread: bool | None = None

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        check(self.spread in (None, True, False), self._name, "spread", self.spread, "None, True or False")

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

    def cost(self, rows: int, columns: int) -> float:
        """About how many operations a step takes for a matrix."""
        return 10.0 * rows * columns * (rows + columns)

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """By :meth:`matrix_state` or as Adam's."""
        return self.state_of(p, p)

    def state_of(self, p: Tensor, home: Tensor) -> dict[str, Tensor]:
        """As :meth:`init_state`. Of a matrix that is cut along one dimension all tensors are cut, into rows if not of its
        shape; of all other matrices every rank has the whole state.
        """
        if not self.is_matrix(p):
            return super().init_state(home)
        state, cut = self.matrix_state(home), cut_of(home)
        if cut is None:
            return state
        return {name: _laid_out(tensor, home, cut) if tensor.ndim else tensor for name, tensor in state.items()}

    def update(self, block: Block, secant: Secant) -> None:
        """Matrices by :meth:`learn`, Adam's scaling for all else. Collective where matrices are shared out."""
        _, others = self.parts(block)
        self.learn_squares(picked(block.states, others), picked(block.gradients, others), secant.finite, block.foreach)
        for team in self._teams(block):
            own = team.matrices
            own.gradients, team.has_gradients = team.gather(picked(block.gradients, team.indices)), True
            if own.gradients:
                self.learn(own, secant.finite)
            if team.keeper is not None:
                team.keeper.changed = True

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """Matrices by :meth:`treat`, Adam's scaling for all else. Collective where matrices are shared out."""
        _, others = self.parts(block)
        results = list(vectors)
        found = self.divided(picked(block.states, others), picked(vectors, others), block.foreach)
        for i, z in zip(others, found, strict=True):
            results[i] = _like(vectors[i], z)
        for team in self._teams(block):
            pieces, own = picked(vectors, team.indices), team.matrices
            known = team.has_gradients and vectors is block.gradients
            whole = own.gradients if known else team.gather(pieces)
            treated = self.treat(own, whole) if whole else []
            own.gradients, team.has_gradients = [], False
            for i, z in zip(team.indices, team.scatter(treated, pieces), strict=True):
                results[i] = _like(vectors[i], z)
        return results

    def _teams(self, block: Block) -> list[_Team]:
        """Who works on which matrix of *block*. Collective when called first, where their state is cut."""
        if "teams" not in block.memo:
            block.memo["teams"] = self._share_out(block)
        teams: list[_Team] = block.memo["teams"]
        return teams

    def _share_out(self, block: Block) -> list[_Team]:
        slices = None if block.space is None else block.space.slices
        whole: list[int] = []
        cuts: dict[tuple[int, ...], list[tuple[int, Cut]]] = {}
        for i in self.parts(block)[0]:
            cut = cut_of(block.params[i], slices)
            if cut is None:
                whole.append(i)
            else:
                cuts.setdefault(tuple(dist.get_process_group_ranks(cut.group)), []).append((i, cut))
        teams = [self._team(block, whole, self._sharing(block, whole), None)] if whole else []
        for items in cuts.values():
            teams.append(self._team(block, [i for i, _ in items], items[0][1].group, [cut.dim for _, cut in items]))
        return teams

    def _sharing(self, block: Block, indices: Sequence[int]) -> Any:
        """The group of ranks that share the work on matrices that are whole on all of them; None: this rank does it all."""
        params, space = picked(block.params, indices), block.space
        if space is None or space.group is None or self.spread is False:
            return None
        if any(is_dtensor(p) and p.device_mesh.size() < space.world_size for p in params):
            return None
        shapes = [shape_of(p) for p in params]
        costs, sizes = [self.cost(*shape) for shape in shapes], [math.prod(shape) for shape in shapes]
        pays = spreading_pays(costs, sizes, space.world_size, params[0].device.type)
        stateless = not any(self._names(block.states[i]) for i in indices)
        return space.group if self.spread or (stateless and pays) else None

    def _team(self, block: Block, indices: list[int], group: Any, dims: list[int] | None) -> _Team:
        """The matrices *indices*, cut along *dims* (None: whole), shared out over *group*, if there is one.

        Collective where state is cut.
        """
        params, states = picked(block.params, indices), picked(block.states, indices)
        if group is None:
            return _Team(indices, params, Matrices(states))
        loads: dict[tuple[int, ...], list[float]] = block.common.setdefault("loads", {})
        ranks = dist.get_process_group_ranks(group)
        owners = assigned([self.cost(*shape_of(p)) for p in params], loads.setdefault(tuple(ranks), [0.0] * len(ranks)))
        exchange = Exchange(group, [p.shape for p in params], dims, owners)
        if not any(self._names(state) for state in states):
            return _Team(indices, params, Matrices(picked(states, exchange.own)), exchange)
        shapes = [{name: tensor.shape for name, tensor in self.matrix_state(_bare(p)).items()} for p in params]
        cuts = None
        if dims is not None:
            cuts = [
                {name: dim if shape == p.shape else 0 for name, shape in of_one.items()}
                for p, dim, of_one in zip(params, dims, shapes, strict=True)
            ]
        keeper = Keeper(group, states, shapes, cuts, owners)
        block.common.setdefault("settle", []).append(keeper.settle)
        return _Team(indices, params, Matrices(keeper.states), exchange, keeper)

    def _names(self, state: State) -> set[str]:
        """The names of what a matrix remembers."""
        return set(state) - {"direction", "grad_prev", "scalars"}

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


def _laid_out(tensor: Tensor, p: Any, cut: Cut) -> Tensor:
    """*tensor*, whole on all ranks, as a DTensor cut over the ranks over which *p* is: like *p*, or into rows."""
    from torch.distributed.tensor import DTensor, Shard

    dim = cut.dim if tensor.shape == p.shape else 0
    placements = [q if q.is_replicate() else Shard(dim) for q in p.placements]
    rank, world_size = dist.get_rank(cut.group), dist.get_world_size(cut.group)
    piece = tensor.narrow(dim, *chunk(tensor.shape[dim], world_size, rank)).clone()
    return DTensor.from_local(
        piece, p.device_mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _bare(p: Tensor) -> Tensor:
    """A tensor without memory that has the whole shape and the type of *p*."""
    return torch.empty(p.shape, dtype=p.dtype, device="meta")


def _like(vector: Tensor, result: Tensor) -> Tensor:
    """*result* with the strides of *vector*."""
    return result if result.stride() == vector.stride() else torch.empty_like(vector).copy_(result)


def picked(items: Sequence[T], indices: Sequence[int]) -> list[T]:
    """Those of *items* at *indices*."""
    return [items[i] for i in indices]


def is_count(value: object) -> bool:
    """Whether *value* is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
