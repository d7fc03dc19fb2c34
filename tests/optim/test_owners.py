"""Matrices and their owners: who gets what, and how pieces travel there and back."""

import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from conjugo._space import Slices, to_local
from conjugo.optim import Kronecker, Orthogonal
from conjugo.optim._owners import (
    Exchange,
    Keeper,
    assigned,
    cut_of,
    is_tangled,
    piece_of,
    spreading_pays,
    whole_of,
)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_owners_are_balanced(world):
    """No rank has more than 4/3 of what the best sharing could give the busiest (Graham 1969), or one task."""
    generator = torch.Generator().manual_seed(world)
    costs = (torch.rand(40, generator=generator) ** 3 * 100).tolist()
    loads = [0.0] * world
    owners = assigned(costs, loads)
    assert loads == pytest.approx([sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(world)])
    assert max(loads) <= 4 / 3 * max(sum(costs) / world, max(costs))
    assert set(owners) == set(range(world))


def test_the_dearest_comes_first_and_what_ranks_have_counts():
    loads = [10.0, 0.0, 0.0]
    assert assigned([1.0, 4.0, 4.0, 2.0], loads) == [2, 1, 2, 1]
    assert loads == [10.0, 6.0, 5.0]
    assert assigned([], loads) == []


def test_when_ranks_share_work_that_each_could_do():
    large, small = (2e9, 512 * 512), (1e5, 16 * 16)
    for (cost, size), pays in ((large, True), (small, False)):
        assert spreading_pays([cost] * 4, [size] * 4, 2, "cpu") == pays
    assert not spreading_pays([2e9], [512 * 512], 2, "cpu")  # one matrix has one owner
    assert not spreading_pays([2e9] * 4, [512 * 512] * 4, 2, "cuda")  # there it takes no time
    assert spreading_pays([1e12] * 8, [4096 * 4096] * 8, 8, "cuda")


def test_costs_grow_with_the_matrix():
    for precond in (Orthogonal(), Kronecker()):
        assert 0 < precond.cost(16, 16) < precond.cost(16, 32) < precond.cost(32, 32)
        assert precond.cost(16, 32) == pytest.approx(precond.cost(32, 16))
    assert Kronecker(max_dim=20).cost(16, 32) < Kronecker().cost(16, 32)


def test_spread_is_checked():
    for kind in (Orthogonal, Kronecker):
        with pytest.raises(ValueError, match=f"{kind.__name__}: spread must be None, True or False, got 'yes'"):
            kind(spread="yes")


SHAPES = [(7, 3), (2, 5), (4, 3, 2), (1, 1), (6, 6), (5,)]
DIMS = [0, 1, 2, 0, 1, 0]


def numbers():
    return [torch.arange(math.prod(s), dtype=torch.float64).view(s) + 1000 * i for i, s in enumerate(SHAPES)]


def pieces_of(wholes, dims):
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    cut = [distribute_tensor(w, mesh, [Shard(d)], src_data_rank=None) for w, d in zip(wholes, dims, strict=True)]
    return [to_local(t) for t in cut], rank


def there_and_back(owners, cut):
    wholes = numbers()
    pieces, rank = pieces_of(wholes, DIMS) if cut else (wholes, dist.get_rank())
    exchange = Exchange(dist.group.WORLD, SHAPES, DIMS if cut else None, owners)
    gathered = exchange.gather(pieces)
    right = exchange.own == [i for i, owner in enumerate(owners) if owner == rank]
    right &= all(torch.equal(g, wholes[i]) for g, i in zip(gathered, exchange.own, strict=True))
    results = exchange.scatter([-g.mT.contiguous().mT if g.ndim > 1 else -g for g in gathered], pieces)
    return right and all(torch.equal(r, -p) for r, p in zip(results, pieces, strict=True))


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("owners", [[0, 1, 2, 0, 1, 2], [1] * 6, [2, 2, 0, 0, 0, 2]])
def test_pieces_travel_to_owners_and_results_back(owners, cut):
    """Uneven pieces, empty ones, ranks that own nothing."""
    assert all(ranks.run(3, there_and_back, owners, cut))


def kept(cut):
    rank = dist.get_rank()
    wholes = [{"a": torch.ones(5, 2) * i, "b": torch.ones(3, 3), "n": torch.tensor(float(i))} for i in range(3)]
    states = wholes
    if cut:
        states = [{"n": s["n"]} | dict(zip("ab", pieces_of([s["a"], s["b"]], [0, 0])[0], strict=True)) for s in wholes]
    shapes = [{name: t.shape for name, t in s.items()} for s in wholes]
    dims = [{"a": 0, "b": 0}] * 3 if cut else None
    keeper = Keeper(dist.group.WORLD, states, shapes, dims, [1, 0, 1])
    own = [1] if rank == 0 else [0, 2]
    before = [s["a"].clone() for s in states]
    for i, state in zip(own, keeper.states, strict=True):
        assert state["a"].shape == (5, 2)
        assert state["n"] == i
        state["a"] += 10
        state["n"] += 0.5
    keeper.settle()  # nothing is known to have changed
    unsettled = torch.equal(states[0]["a"], before[0])
    keeper.changed = True
    keeper.settle()
    good = all(torch.equal(s["a"], b + 10) for s, b in zip(states, before, strict=True))
    return unsettled == (cut or rank == 0), good, [s["n"].item() for s in states], keeper.changed


@pytest.mark.parametrize("cut", [True, False])
def test_what_owners_have_is_written_back(cut):
    assert ranks.run(2, kept, cut) == [(True, True, [0.5, 1.5, 2.5], False)] * 2


def cuts():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = torch.arange(30.0).view(6, 5)

    def laid_out(*placements):
        return distribute_tensor(whole, mesh, list(placements), src_data_rank=None)

    found = []
    for placements in (
        (Replicate(), Replicate()),
        (Replicate(), Shard(0)),
        (Shard(-1), Replicate()),
        (Shard(0), Shard(1)),
    ):
        p = laid_out(*placements)
        cut = cut_of(p)
        ranks_of_cut = None if cut is None else (dist.get_process_group_ranks(cut.group), cut.dim)
        assert torch.equal(piece_of(whole_of(to_local(p), p), p), to_local(p))
        found.append((ranks_of_cut, is_tangled(p), tuple(whole_of(to_local(p), p).shape)))
    assert cut_of(whole) is None
    assert not is_tangled(whole)
    assert cut_of(whole, Slices(dist.group.WORLD, "cpu")).dim == 0
    return found


def test_how_parameters_are_cut():
    for rank, found in enumerate(ranks.run(4, cuts)):
        row, column = rank // 2, rank % 2
        assert found[0] == (None, False, (6, 5))
        assert found[1] == (([2 * row, 2 * row + 1], 0), False, (3, 5))
        assert found[2][:2] == (([column, column + 2], 1), False)
        assert found[3] == (None, True, (6, 5))
