"""Sums over parameters that lie whole, sharded, replicated or both on several ranks."""

import functools

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from conjugo._space import ParamSpace, Slices, from_local, to_local

SHAPES = [(5, 3), (7,), (4, 2, 3), (1, 6), ()]
LAYOUTS = ["whole", "slices", "fsdp", "hsdp", "tensor parallel", "mixed meshes", "mixed with whole"]
EVEN = ("hsdp", "mixed meshes")
"""Layouts that need an even number of ranks."""


def vectors(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]


mesh_of = functools.cache(functools.partial(init_device_mesh, "cpu"))  # groups are dear to make


def laid_out(tensors, layout):
    """The whole *tensors* (equal on all ranks) as a model in *layout* would hold them."""
    if layout in ("whole", "slices"):
        return list(tensors)
    world = dist.get_world_size()
    cut = functools.partial(distribute_tensor, src_data_rank=None)
    if layout == "hsdp":
        mesh, first, rest = mesh_of((2, world // 2)), [Replicate(), Shard(0)], [Replicate(), Replicate()]
    elif layout == "tensor parallel":
        mesh, first, rest = mesh_of((world,)), [Shard(-1)], [Replicate()]
    elif layout == "mixed meshes":
        mesh = mesh_of((world // 2, 2), mesh_dim_names=("data", "tensor"))
        both, one = [Shard(0), Shard(1)], [Shard(0)]
        return [
            cut(t, mesh, both) if t.ndim > 1 else cut(t, mesh["data"], one if t.ndim else [Replicate()])
            for t in tensors
        ]
    else:
        mesh, first, rest = mesh_of((world,)), [Shard(0)], [Replicate()]
    held = [cut(t, mesh, first if t.ndim else rest) for t in tensors]
    return [
        t if layout == "mixed with whole" and i % 2 else d for i, (t, d) in enumerate(zip(tensors, held, strict=True))
    ]


def sums(layout):
    xs, ys = vectors(1), vectors(2)
    params, others = laid_out(xs, layout), laid_out(ys, layout)
    slices = Slices(dist.group.WORLD, "cpu") if layout == "slices" else None
    space = ParamSpace(params, slices=slices)
    ones = laid_out([torch.ones_like(x) for x in xs], layout)
    with CommDebugMode() as collectives:
        dots = space.dots([(params, others), (others, others), (ones, ones)])
    return dots, space.norm(params), space.sharded, collectives.get_total_counts(), space.isfinite(params)


def bits_and_counts(world, layout):
    return ranks.run(world, sums, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_sums_are_global_and_the_same_bits_everywhere(world, layout):
    if world % 2 and layout in EVEN:
        pytest.skip("needs an even number of ranks")
    xs, ys = vectors(1), vectors(2)
    wanted = [sum((a * b).sum() for a, b in zip(u, v)).item() for u, v in ((xs, ys), (ys, ys))]
    everyone = ranks.run(world, sums, layout)
    for dots, norm, sharded, collectives, finite in everyone:
        assert dots[:2].tolist() == pytest.approx(wanted, rel=1e-12)
        assert dots[2] == sum(x.numel() for x in xs)  # what is replicated counts once, exactly
        assert norm.item() == pytest.approx(sum(x.square().sum() for x in xs).sqrt().item(), rel=1e-12)
        assert torch.equal(dots, everyone[0][0])
        assert sharded == (layout != "whole")
        assert collectives == (1 if sharded else 0)
        assert finite


def nan_in_one_shard(layout):
    xs = laid_out(vectors(1), layout)
    if dist.get_rank() == 1:
        to_local(xs[0]).view(-1)[0] = float("nan")
    space = ParamSpace(xs)
    return space.isfinite(xs), space.isfinite(xs[1:]), torch.isnan(space.norm(xs)).item()


def test_everybody_sees_a_nan_in_one_shard():
    assert ranks.run(2, nan_in_one_shard, "fsdp") == [(False, True, True)] * 2
    assert [seen[0] for seen in ranks.run(2, nan_in_one_shard, "whole")] == [False, False]


def different(kind):
    shape = (3, 3) if kind == "shape" and dist.get_rank() == 1 else (3, 2)
    params = [torch.zeros(2), torch.zeros(shape)]
    if kind == "number" and dist.get_rank() == 1:
        params.pop()
    if kind == "type" and dist.get_rank() == 1:
        params[0] = params[0].double()
    try:
        ParamSpace(params, owner="NLCG")
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("shape", r"parameter 1: shape \[3, 3\], torch.float32, on rank 0 parameter 1: shape \[3, 2\]"),
        ("number", "1 parameters, on rank 0 parameter 1"),
        ("type", "parameter 0: shape .2., torch.float64"),
    ],
)
def test_parameters_that_differ_between_ranks_are_refused_on_all(kind, said):
    for message in ranks.run(3, different, kind):
        assert message is not None
        assert pytest.raises(ValueError, match=f"NLCG: all ranks must have the same parameters, got on rank 1 .*{said}")
        with pytest.raises(ValueError, match=f"^NLCG: .* on rank 1 .*{said}"):
            raise ValueError(message)


def partial_gradient():
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    space = ParamSpace([p])
    (grad,) = space.canonical_grads()
    whole = torch.zeros(3, requires_grad=True)
    whole.grad = torch.zeros(3)
    try:
        ParamSpace([DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)])
    except ValueError as error:
        return to_local(grad).tolist(), p.grad is grad, str(error)


def test_partial_gradients_are_summed_and_partial_parameters_refused():
    for grad, kept, message in ranks.run(2, partial_gradient):
        assert grad == [2.0] * 3
        assert kept
        assert "parameter 0 must be sharded or replicated" in message


def slices_and_back(dtype):
    group = dist.group.WORLD
    slices = Slices(group, "cpu")
    tensors = [x.to(dtype) for x in vectors(3)] + [
        torch.zeros(4, 8, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    ]
    for t in tensors:
        slices.piece(t).fill_(1.0 + dist.get_rank())
    home = slices.home(tensors[0])
    slices.gather(tensors, bucket=20)
    return tensors, home.full_tensor()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_come_back_from_all_ranks(dtype):
    for tensors, home in ranks.run(3, slices_and_back, dtype):
        for t in tensors:
            rows = -(-len(t) // 3) if t.ndim else 0
            wanted = torch.stack([torch.full(t.shape[1:], 1.0 + i // rows) for i in range(len(t))]) if rows else t
            assert torch.equal(t, wanted.to(dtype))
        assert torch.equal(home, tensors[0])


def state_like_a_strided_piece():
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(6, 4, 2, 2).to(memory_format=torch.channels_last)
    like = Slices(dist.group.WORLD, "cpu").home(whole)
    made = from_local(
        torch.view_as_real(torch.zeros(3, 4, dtype=torch.complex64)), distribute_tensor(torch.zeros(6, 4), mesh)
    )
    return from_local(to_local(like).clone(), like).stride() == whole.stride(), tuple(made.shape)


def test_state_has_the_layout_of_its_parameter():
    assert ranks.run(2, state_like_a_strided_piece) == [(True, (6, 4, 2))] * 2


def fsdp_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    whole = [p.detach().clone() for p in model.parameters()]
    fully_shard(model)
    space = ParamSpace(model.parameters())
    return space.norm(list(model.parameters())).item() - sum(p.square().sum() for p in whole).sqrt().item()


def test_sums_over_a_sharded_model():
    assert ranks.run(3, fsdp_gradients) == pytest.approx([0.0] * 3, abs=1e-6)


def test_one_process_communicates_nothing():
    space = ParamSpace(vectors(1))
    assert (space.group, space.world_size, space.rank, space.sharded) == (None, 1, 0, False)
    assert space.mean(torch.tensor(3.0)) == 3.0


def test_bad_parameters_are_refused():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="ParamSpace: params must be at least one parameter"):
        ParamSpace([])
    with pytest.raises(ValueError, match="ParamSpace: params must be all different"):
        ParamSpace([x, x])
