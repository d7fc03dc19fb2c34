"""Adam's scaling, orthogonalised gradients and the Kronecker eigenbasis on several ranks."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.distributed.test_nlcg import entire, fitted, wrapped
from tests.test_space import laid_out
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from conjugo._space import to_local
from conjugo.distributed import Checkpointer
from conjugo.optim import NLCG, orthogonal
from conjugo.optim.adaptive_preconditioner import AdamDiagonal
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.orthogonal import Orthogonal


def everything(p):
    return True


def nothing(p):
    return False


def options_of(**common):
    """Options of NLCG by name, where all preconditioners have the options *common*."""
    return {
        "orthogonal": {"precond": Orthogonal(matrices=everything, **common), "lr": 0.05},
        "orthogonal pr": {"precond": Orthogonal(matrices=everything, **common), "lr": 0.1, "rule": "pr"},
        "kron": {"precond": Kronecker(period=3, **common), "lr": 0.01},
        "kron pr": {"precond": Kronecker(period=2, **common), "lr": 0.01, "rule": "pr"},
    }


# Models ---------------------------------------------------------------------------------------------------------------


MATRICES = options_of()
SINGLE_VALUES = {
    "adam": {"precond": AdamDiagonal(), "lr": 0.01},
    "adam constant": {"precond": "adam", "lr": 0.01, "rule": "constant"},
    "orthogonal, no matrices": {"precond": Orthogonal(matrices=nothing), "lr": 0.01},
    "kron, no matrices": {"precond": Kronecker(matrices=nothing), "lr": 0.01},
}
STEPS = 20


def fits(kind, options):
    return {name: fitted(kind, STEPS, {"beta_max": 0.9} | chosen) for name, chosen in options.items()}


@pytest.fixture(scope="module")
def alone():
    return fits("alone", MATRICES | SINGLE_VALUES)


def compare(everyone, wanted):
    """All ranks have the same bits, and what one process has to rounding, which an eigenbasis amplifies step by step."""
    for name in everyone[0]:
        losses = wanted[name][0]
        assert losses[-1] < 0.8 * losses[0], name
        for found, params in (rank[name] for rank in everyone):
            steps, rel = (6, 0.02) if "kron" in name else (STEPS, 1e-3)
            assert found[:steps] == pytest.approx(losses[:steps], rel=rel), name
            assert all(torch.equal(a, b) for a, b in zip(params, everyone[0][name][1], strict=True)), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("spread", [None, False, True])
def test_whole_matrices_on_every_rank(world, spread, alone):
    compare(ranks.run(world, fits, "ddp", options_of(spread=spread)), alone)


@pytest.mark.parametrize(
    ("kind", "world"), [("fsdp", 2), ("fsdp", 4), pytest.param("hsdp", 4, marks=pytest.mark.slow), ("tp", 2)]
)
def test_matrices_that_are_cut(kind, world, alone):
    """Rows that two ranks, and four, share unevenly; columns in tensor parallelism."""
    compare(ranks.run(world, fits, kind, MATRICES), alone)


@pytest.mark.parametrize("world", [2, 4])
def test_matrices_whose_state_is_cut(world, alone):
    options = {name: chosen | {"shard_state": True} for name, chosen in MATRICES.items()}
    compare(ranks.run(world, fits, "ddp", options), alone)


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("tp", 2), ("fsdp x tp", 4)])
def test_what_acts_on_single_values_may_be_cut(kind, world, alone):
    for name, (found, params) in (
        (name, rank[name]) for rank in ranks.run(world, fits, kind, SINGLE_VALUES) for name in rank
    ):
        losses, wanted = alone[name]
        assert losses[-1] < 0.7 * losses[0], name
        assert found == pytest.approx(losses, rel=1e-3), name
        for a, b in zip(params, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("spread", [pytest.param(None, marks=pytest.mark.slow), True])
def test_matrices_that_are_cut_in_two_ways(spread, alone):
    compare(ranks.run(4, fits, "fsdp x tp", options_of(spread=spread)), alone)


def one_rank(options):
    return fitted("fsdp", 6, {"beta_max": 0.9} | options)[0]


@pytest.mark.parametrize("name", MATRICES)
def test_shards_of_one_rank_are_whole(name, alone):
    (found,) = ranks.run(1, one_rank, MATRICES[name])
    assert found == pytest.approx(alone[name][0][:6], rel=1e-3)


# Layouts ----------------------------------------------------------------------------------------------------------------


SHAPES = [(6, 5), (), (5, 2, 3), (7,), (2, 9), (4, 4)]
"""A scalar, which is never cut, between matrices; fewer rows than ranks; a square, whose factors look like it."""
CUT = ["fsdp", "tensor parallel", "mixed with whole"]
SLOW = ["mixed meshes"]
FOUR = [*SLOW, "hsdp"]
"""Those that want four ranks; cuts over two dimensions of a mesh are among the tests above, too."""
PLACES = ["whole", "slices", *CUT, *FOUR]
GROUPS = {
    "one group": lambda ps: [{"params": ps}],
    "two groups": lambda ps: [{"params": ps[::2]}, {"params": ps[1::2], "beta_max": 0.5}],
}
LAID_OUT = {
    "orthogonal": {},
    "orthogonal, tensor": {"scope": "tensor"},
    "orthogonal, group": {"scope": "group", "groups": "two groups"},
    "orthogonal pr": {"rule": "pr", "weight_decay": 0.01},
    "kron": {},
    "kron, tensor": {"scope": "tensor"},
    "kron pr, group": {"rule": "pr", "scope": "group", "groups": "two groups"},
}


def values(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def made(layout, name, spread, params):
    options = {"lr": 0.02, "beta_max": 0.9, "shard_state": layout == "slices"} | LAID_OUT[name]
    groups = GROUPS[options.pop("groups", "one group")](params)
    precond = Orthogonal(matrices=everything, spread=spread)
    if name.startswith("kron"):
        precond = Kronecker(period=3, spread=spread)
    return NLCG(groups, precond=precond, **options)


def parameters(layout, dtype=torch.float64):
    return [nn.Parameter(p) for p in laid_out(values(0, dtype), layout)]


def go(optimizer, params, layout, steps):
    """Take *steps* with gradients that do not depend on the parameters."""
    for step in steps:
        for p, g in zip(params, laid_out(values(100 + step, params[0].dtype), layout)):
            p.grad = g
        optimizer.step()
    return [p.clone() for p in entire(params)]


def walks(layout, spread, dtype):
    found = {}
    for name in LAID_OUT:
        params = parameters(layout, dtype)
        optimizer = made(layout, name, spread, params)
        found[name] = [go(optimizer, params, layout, [step]) for step in range(9)]
    return found


@pytest.fixture(scope="module")
def steps_of_one_process():
    return {dtype: walks("whole", None, dtype) for dtype in (torch.float64, torch.bfloat16)}


WORLDS = [
    pytest.param(world, layout, marks=pytest.mark.slow if layout in SLOW or (world == 2 and layout in CUT) else [])
    for layout in PLACES
    for world in ((2, 4) if layout == "mixed meshes" else (4,) if layout == "hsdp" else (2, 3))
]


@pytest.mark.parametrize(("world", "layout"), WORLDS)
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_every_layout_takes_the_steps_of_one_process(world, layout, dtype, steps_of_one_process):
    everyone = ranks.run(world, walks, layout, True, dtype)
    for name, wanted in steps_of_one_process[dtype].items():
        for rank in everyone:
            for found, expected, first in zip(rank[name], wanted, everyone[0][name], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), name
                rtol, atol = (1e-6, 1e-8) if dtype == torch.float64 else (0.02, 0.01)
                torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def resumed(layout, spread, dtype):
    """Whether runs that go on from a saved state are, bit for bit, those that were not interrupted."""
    good = {}
    for name in LAID_OUT:
        params = parameters(layout, dtype)
        optimizer = made(layout, name, spread, params)
        for at in (1, 4, 5):
            go(optimizer, params, layout, range(max(at - 3, 0) if at == 4 else at - 1, at))
            if at == 4:  # either of the two finds the state as it is now
                saved = optimizer.state_dict()
                twin = copy.deepcopy(optimizer)
            else:
                twin = copy.deepcopy(optimizer)
                saved = twin.state_dict()
            copies = [nn.Parameter(p.detach().clone()) for p in params]
            other = made(layout, name, spread, copies)
            other.load_state_dict(copy.deepcopy(saved))
            twins = [p for group in twin.param_groups for p in group["params"]]
            in_order = [p for group in optimizer.param_groups for p in group["params"]]
            twins = [twins[[q is p for q in in_order].index(True)] for p in params]
            results = [go(o, ps, layout, [at, at + 1]) for o, ps in ((other, copies), (twin, twins))]
            wanted = go(optimizer, params, layout, [at, at + 1])
            good[name, at] = all(torch.equal(a, b) for found in results for a, b in zip(found, wanted, strict=True))
    return good


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(dtype, layout, marks=pytest.mark.slow if (at and layout != "fsdp") or layout in FOUR else [])
        for at, dtype in enumerate((torch.float64, torch.bfloat16))
        for layout in PLACES
    ],
)
def test_a_resumed_run_is_the_same_run_bit_for_bit(dtype, layout):
    for good in ranks.run(4 if layout in FOUR else 2, resumed, layout, True, dtype):
        assert all(good.values()), [at for at, same in good.items() if not same]


def interrupted(layout):
    """A group that joins later; and whether state that was loaded stays what it is until the next step."""
    params = parameters(layout)
    optimizer = made(layout, "kron", True, params[:3])
    go(optimizer, params[:3], layout, range(4))
    optimizer.add_param_group({"params": params[3:]})
    found = go(optimizer, params, layout, range(4, 8))
    params = parameters(layout)
    optimizer = made(layout, "kron", True, params[:3])
    go(optimizer, params[:3], layout, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    first = made(layout, "kron", True, params[:3])
    go(first, params[:3], layout, range(2))
    first.load_state_dict(saved)
    pairs = [(saved["state"][i], s) for i, s in first.state_dict()["state"].items()]
    return found, all(torch.equal(to_local(a[name]), to_local(b[name])) for a, b in pairs for name in a)


@pytest.mark.parametrize("layout", ["whole", "slices", "fsdp"])
def test_groups_that_join_and_state_that_is_loaded(layout):
    wanted, _ = interrupted("whole")
    for found, same in ranks.run(2, interrupted, layout):
        assert same
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def counted(layout, spread, name="orthogonal"):
    """What this rank orthogonalises in a step, the collectives, and how much of the state it keeps."""
    calls = []
    inner = orthogonal.orthogonalized

    def spy(matrices, *args, **options):
        calls.extend([tuple(matrices.shape[-2:])] * math.prod(matrices.shape[:-2]))
        return inner(matrices, *args, **options)

    orthogonal.orthogonalized = spy
    try:
        params = parameters(layout)
        optimizer = made(layout, name, spread, params)
        go(optimizer, params, layout, [0])
        calls.clear()
        with CommDebugMode() as mode:
            go(optimizer, params, "whole" if layout == "slices" else layout, [1])
    finally:
        orthogonal.orthogonalized = inner
    names = {str(op).partition("_c10d_functional.")[2] or str(op): n for op, n in mode.get_comm_counts().items()}
    return calls, {name: n for name, n in names.items() if n}


@pytest.mark.parametrize("layout", ["whole", "slices", "fsdp"])
def test_each_matrix_is_worked_on_by_one_rank_and_all_travel_together(layout):
    everyone = ranks.run(2, counted, layout, True)
    works = [sorted(math.prod(shape) for shape in calls) for calls, _ in everyone]
    assert sorted(works[0] + works[1]) == [16, 18, 30, 30]
    assert sum(works[0]) in (46, 48)  # shared out evenly: one large one each
    exchanges = [sum(n for op, n in counts.items() if "alltoall" in op) for _, counts in everyone]
    assert exchanges == [0 if layout == "whole" else 2] * 2
    for calls, _ in ranks.run(2, counted, layout, False):
        assert len(calls) == 4 if layout == "whole" else len(calls) == 2


@pytest.mark.parametrize("layout", ["whole", "fsdp"])
def test_matrices_with_scalars_of_their_own_are_shared_out_evenly_too(layout):
    everyone = ranks.run(2, counted, layout, True, "orthogonal, tensor")
    works = [sum(math.prod(shape) for shape in calls) for calls, _ in everyone]
    assert sum(works) == 94
    assert min(works) >= 46


def kept():
    params = [nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(4, 3))]
    optimizer = NLCG(params, precond=Kronecker(), shard_state=True)
    return [{n: tuple(to_local(t).shape) for n, t in optimizer.state[p].items() if t.ndim > 1} for p in params]


def test_each_rank_keeps_its_rows_of_the_state():
    for first, second in ranks.run(2, kept):
        assert first == {
            "direction": (4, 6),
            "square": (4, 6),
            "left": (4, 8),
            "left_basis": (4, 8),
            "right": (3, 6),
            "right_basis": (3, 6),
        }
        assert second["left"] == (2, 4)
    rows = [rank[1]["right_basis"][0] for rank in ranks.run(2, kept)]
    assert sum(rows) == 3


def skipping(layout, name):
    params = parameters(layout)
    optimizer = made(layout, name, True, params)
    go(optimizer, params, layout, range(4))
    before = (
        entire(params),
        {n: [to_local(t).clone() for t in s.values()] for n, s in optimizer.state_dict()["state"].items()},
    )
    for p, g in zip(params, laid_out(values(104), layout), strict=True):
        p.grad = g
    if layout == "whole" or dist.get_rank() == dist.get_world_size() - 1:
        to_local(params[0].grad).view(-1)[-1] = math.nan
    for _ in range(3):  # also where a basis is due
        optimizer.step()
    after = entire(params), {n: [to_local(t) for t in s.values()] for n, s in optimizer.state_dict()["state"].items()}
    same = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    scalars = optimizer.state_dict()["state"][0]["scalars"].shape
    for i, tensors in before[1].items():
        same &= all(torch.equal(a, b) for a, b in zip(tensors, after[1][i], strict=True) if a.shape != scalars)
    return same, optimizer.skipped_steps.item(), all(p.isfinite().all() for p in go(optimizer, params, layout, [4]))


@pytest.mark.parametrize("name", ["orthogonal pr", "kron"])
@pytest.mark.parametrize("layout", ["whole", "slices", "fsdp"])
def test_a_nan_on_one_rank_is_skipped_by_all(layout, name):
    assert ranks.run(2, skipping, layout, name) == [(True, 3, True)] * 2


def a_head_left_out():
    params = parameters("slices")
    head = params[0]
    optimizer = NLCG(params, precond=Kronecker(matrices=lambda p: p is not head), shard_state=True)
    return ["left" in optimizer.state[p] for p in params]


def test_a_parameter_is_left_out_by_itself_where_its_state_is_cut():
    assert ranks.run(2, a_head_left_out)[0] == [False, False, True, False, True, True]


# Checkpoints ------------------------------------------------------------------------------------------------------------


KINDS = {
    "alone": ("alone", {}),
    "ddp": ("ddp", {"precond": Kronecker(period=3, spread=True)}),
    "fsdp": ("fsdp", {}),
    "tp": ("tp", {}),
    "shard_state": ("ddp", {"shard_state": True}),
}


def moved(kind, root, legs):
    """After each of *legs* (step to load, 0: none; steps to take; whether to save) parameters and state, whole."""
    place, options = KINDS[kind]
    found = []
    for start, steps, save in legs:
        model, _, _ = wrapped(place)
        optimizer = NLCG(model.parameters(), **{"precond": Kronecker(period=3), "lr": 0.01, "beta_max": 0.9} | options)
        checkpoints = Checkpointer(root)
        if start:
            checkpoints.load(start, model=model, optimizer=optimizer)
        for at in range(start, start + steps):
            generator = torch.Generator().manual_seed(at)
            x, y = (
                torch.randn(8, 6, generator=generator),
                torch.randn(8, 7, generator=generator),
            )  # the same on all ranks
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        if save:
            checkpoints.save(start + steps, model=model, optimizer=optimizer)
        state = [dict(zip(s, entire(s.values()), strict=True)) for s in optimizer.state_dict()["state"].values()]
        found.append((entire(model.parameters()), state))
    return found


def on(kind, world, *arguments):
    return moved(kind, *arguments) if kind == "alone" else ranks.run(world, moved, kind, *arguments)[-1]


@pytest.mark.parametrize(
    ("first", "second", "world"),
    [
        ("fsdp", "fsdp", 3),
        ("fsdp", "alone", 1),
        ("alone", "fsdp", 3),
        ("ddp", "tp", 2),
        ("shard_state", "ddp", 3),
        ("tp", "shard_state", 2),
    ],
)
def test_checkpoints_move_between_layouts_and_numbers_of_ranks(first, second, world, tmp_path):
    (saved,) = on(first, 2, tmp_path, [(0, 5, True)])
    again, later = on(second, world, tmp_path, [(5, 0, False), (5, 2, False)])
    torch.testing.assert_close(again, saved, rtol=0, atol=0)
    assert sum("left" in state for state in again[1]) == 2
    (wanted,) = moved("alone", tmp_path, [(5, 2, False)])
    torch.testing.assert_close(later[0], wanted[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(later[0][0], saved[0][0], rtol=1e-3, atol=1e-4)
