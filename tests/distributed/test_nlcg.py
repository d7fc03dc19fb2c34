"""NLCG on several ranks: in every layout of the parameters it takes the steps that one process takes."""

import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.test_space import EVEN, LAYOUTS, SHAPES, laid_out, vectors
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from conjugo._space import to_local
from conjugo.optim import NLCG
from conjugo.optim.preconditioners import Preconditioner

STEPS = 8


class Magnitude(Preconditioner):
    """P = 1 / (0.1 + running root mean square): a preconditioner of a user."""

    def init_state(self, p):
        return {"square": torch.zeros_like(p)}

    def update(self, block, secant):
        for square, g in zip(block.state("square"), block.gradients, strict=True):
            square.mul_(torch.where(secant.finite, 0.9, 1.0)).addcmul_(g, g, value=0.1)

    def apply(self, block, vectors, fresh):
        return [v / (0.1 + square.sqrt()) for v, square in zip(vectors, block.state("square"), strict=True)]


OPTIONS = {
    "fr": {},
    "pr": {"rule": "pr"},
    "without preconditioner": {"precond": "none"},
    "pr without preconditioner": {"rule": "pr", "precond": "none"},
    "lists of tensors": {"foreach": True},
    "PyTorch operations": {"fused": False},
    "pr in PyTorch operations": {"rule": "pr", "fused": False},
    "reference": {"mode": "reference"},
    "own preconditioner": {"precond": Magnitude()},
    "line search": {"line_search": "online", "lr": 0.1},
    "line search every third step": {"line_search": "step", "period": 3, "lr": 0.1, "removal": "current"},
    "coupled decay": {"weight_decay": 0.05},
    "decoupled decay, no ascent": {"weight_decay": 0.05, "decoupled": True, "restart_on_ascent": True},
    "lars": {"lars": 0.1},
    "scope tensor": {"scope": "tensor"},
    "scope group": {"scope": "group"},
    "shared by all": {"sync_scalars": True},
}


def problem(whole, step):
    """Loss and gradients at *whole*: quartic, with noise that depends on the step; float64."""
    generator = torch.Generator().manual_seed(100 + step)
    loss, grads = 0.0, []
    for i, w in enumerate(whole):
        center = torch.randn(w.shape, generator=generator, dtype=torch.float64) * 0.1
        e = (w - center) * (1 + i / 4)
        loss += (e**2 / 2 + e**4 / 4).sum().item()
        grads.append((e + e**3) * (1 + i / 4))
    return loss, grads


def entire(tensors):
    return [(t.full_tensor() if isinstance(t, DTensor) else t.clone()).detach() for t in tensors]


def optimizer_of(params, options):
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "beta_max": 0.9}]
    return NLCG(groups, **{"lr": 0.05, "precond": "bfgs"} | options)


def train(params, layout, optimizer, steps):
    """The losses of *steps*; gradients and losses are those of the whole problem, but the loss differs between ranks."""
    losses, shortest = [], torch.tensor(1.0, dtype=torch.float64)
    for step in steps:
        loss, grads = problem(entire(params), step)
        for p, g in zip(params, laid_out(grads, layout), strict=True):
            p.grad = g
            if layout == "tensor parallel" and g.ndim == 0:  # as with sequence parallelism
                part = g.to_local() / dist.get_world_size()
                p.grad = DTensor.from_local(part, g.device_mesh, [Partial()])
        spread = 0.0
        if dist.is_initialized():  # the mean over ranks is what counts
            spread = 0.3 * (dist.get_rank() - (dist.get_world_size() - 1) / 2)
        seen = 1 + loss / 100 + 0.5 * (step >= 6)  # a jump, so that the line search has something to do
        optimizer.step(loss=seen * (1 + spread))
        losses.append(loss)
        shortest = torch.minimum(shortest, optimizer.last["base_lr"].min())
    return losses, shortest


def fresh(layout):
    return [nn.Parameter(p) for p in laid_out([v / 2 for v in vectors(1)], layout)]


def trained(layout, names):
    found = {}
    for name in names:
        params = fresh(layout)
        sliced = {"shard_state": True} if layout == "slices" else {}
        optimizer = optimizer_of(params, OPTIONS[name] | sliced)
        losses, shortest = train(params, layout, optimizer, range(STEPS))
        found[name] = losses, entire(params), optimizer.last | {"shortest": shortest}
    return found


ALONE = {}


def alone(name):
    if name not in ALONE:
        ALONE.update(trained("whole", [name]))
    return ALONE[name]


WORLDS = [
    pytest.param(world, layout, marks=pytest.mark.slow if world == 4 and layout not in EVEN else [])
    for world in (2, 3, 4)
    for layout in LAYOUTS
    if world % 2 == 0 or layout not in EVEN
]


@pytest.mark.parametrize(("world", "layout"), WORLDS)
def test_every_layout_takes_the_steps_of_one_process(world, layout):
    everyone = ranks.run(world, trained, layout, list(OPTIONS))
    for name in OPTIONS:
        losses, params, last = alone(name)
        assert losses[-1] < losses[0]
        if name.startswith("line search"):
            assert last["shortest"] < 1  # it has really intervened
        for rank in range(world):
            found_losses, found_params, found_last = everyone[rank][name]
            assert found_losses == pytest.approx(losses, rel=1e-9), name
            for found, wanted in zip(found_params, params, strict=True):
                assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10), name
            for key, value in last.items():
                assert torch.allclose(found_last[key], value, rtol=1e-6, atol=1e-12), (name, key)
            # Not merely close: the ranks have decided alike.
            assert all(torch.equal(a, b) for a, b in zip(found_params, everyone[0][name][1], strict=True)), name
            assert found_losses == everyone[0][name][0], name


def collectives(layout, options):
    params = fresh(layout)
    optimizer = optimizer_of(params, options)
    train(params, layout, optimizer, range(2))
    loss, grads = problem(entire(params), 2)
    for p, g in zip(params, laid_out(grads, layout), strict=True):
        p.grad = g
    with CommDebugMode() as mode:
        optimizer.step(loss=loss)
    return {str(op): count for op, count in mode.get_comm_counts().items()}


@pytest.mark.parametrize(
    ("layout", "options", "sums", "gathers"),
    [
        ("whole", {}, 0, 0),
        ("whole", {"line_search": "online"}, 1, 0),
        ("whole", {"sync_scalars": True}, 2, 0),
        ("whole", {"sync_scalars": True, "line_search": "online"}, 2, 0),
        ("fsdp", {}, 2, 0),
        ("fsdp", {"rule": "pr", "line_search": "step", "restart_on_ascent": True}, 2, 0),
        ("fsdp", {"precond": "none"}, 1, 0),
        ("fsdp", {"precond": "none", "line_search": "online"}, 1, 0),
        ("fsdp", {"fused": False}, 2, 0),
        ("fsdp", {"lars": 0.1}, 3, 0),
        ("tensor parallel", {}, 2, 0),
        ("mixed with whole", {}, 2, 0),
        ("slices", {"shard_state": True}, 2, 1),
    ],
)
def test_sums_of_a_step_travel_packed(layout, options, sums, gathers):
    for counts in ranks.run(2, collectives, layout, options):
        assert sum(n for op, n in counts.items() if "allreduce" in op) == sums
        assert sum(counts.values()) == sums + gathers


def skipping(layout, where):
    params = fresh(layout)
    optimizer = optimizer_of(params, {"shard_state": layout == "slices"})
    train(params, layout, optimizer, range(3))
    before = entire(params)
    state = [t.clone() for p in params for t in map(to_local, optimizer.state[p].values())]
    loss, grads = problem(before, 3)
    for p, g in zip(params, laid_out(grads, layout), strict=True):
        p.grad = g
    if where == "gradient" and dist.get_rank() == dist.get_world_size() - 1:
        to_local(params[0].grad).view(-1)[-1] = math.nan
    nan_loss = where == "loss" and dist.get_rank() == 0
    optimizer.step(loss=math.nan if nan_loss else loss)
    same = all(torch.equal(a, b) for a, b in zip(entire(params), before, strict=True))
    after = [t for p in params for t in map(to_local, optimizer.state[p].values())]
    row = (len(optimizer._start),)
    tables = [t for t in after if t.shape == row]
    same_state = all(torch.equal(a, b) for a, b in zip(state, after, strict=True) if a.shape != row)
    return same, same_state, len(tables), optimizer.skipped_steps.item(), bool(optimizer.last["skipped"])


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("layout", ["fsdp", "tensor parallel", "mixed with whole", "slices"])
def test_a_nan_on_one_rank_is_skipped_by_all(layout, where):
    assert ranks.run(2, skipping, layout, where) == [(True, True, len(SHAPES), 1, True)] * 2


def round_trip(layout, saved, steps):
    """Train on from *saved* (a state dict of whole tensors and whole parameters); the same, later."""
    params = [nn.Parameter(p) for p in laid_out(saved["params"], layout)]
    options = {"shard_state": True} if layout == "slices" else {}
    optimizer = optimizer_of(params, options)
    optimizer.load_state_dict(saved["optimizer"])
    losses, _ = train(params, layout, optimizer, steps)
    state = optimizer.state_dict()
    again = optimizer_of([nn.Parameter(p.detach().clone()) for p in params], options)
    again.load_state_dict(state)  # laid out like it
    for p, q in zip(optimizer.param_groups[0]["params"], again.param_groups[0]["params"], strict=True):
        for a, b in zip(optimizer.state[p].values(), again.state[q].values(), strict=True):
            assert torch.equal(to_local(a), to_local(b))
    values = {
        i: {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in s.items()}
        for i, s in state["state"].items()
    }
    return losses, {"params": entire(params), "optimizer": state | {"state": values}}


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "whole"])
def test_state_moves_between_layouts(layout):
    params = fresh("whole")
    optimizer = optimizer_of(params, {})
    first, _ = train(params, "whole", optimizer, range(3))
    saved = {"params": entire(params), "optimizer": optimizer.state_dict()}
    world = 4 if layout in ("hsdp", "mixed meshes") else 3
    losses, later = ranks.run(world, round_trip, layout, saved, range(3, 6))[0]
    last, _ = round_trip("whole", later, range(6, 9))
    params = fresh("whole")
    assert first + losses + last == pytest.approx(
        train(params, "whole", optimizer_of(params, {}), range(9))[0], rel=1e-9
    )


def state_sizes():
    params = [nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))]
    optimizer = NLCG(params, shard_state=True, precond="bfgs")
    return [sum(to_local(t).numel() for n, t in optimizer.state[p].items() if n != "scalars") for p in params]


def test_each_rank_keeps_its_part_of_the_state():
    sizes = ranks.run(4, state_sizes)
    assert [s[0] for s in sizes] == [3 * 48 // 4] * 4
    assert [s[1] for s in sizes] == [3, 3, 3, 0]  # 3 rows on 4 ranks
    assert [s[2] for s in sizes] == [3] * 4
    assert sum(state_sizes()) == 3 * (48 + 3 + 1)  # without ranks nothing is cut


def touched_by_torch():
    """What torch does to a fresh optimizer in order to learn the layout of its state."""
    model = nn.Linear(4, 5)
    fully_shard(model)
    optimizer = NLCG(model.parameters(), lr=1.0, line_search="online", precond="bfgs")
    before = entire(model.parameters())
    state = get_optimizer_state_dict(model, optimizer)["state"]
    same = all(torch.equal(a, b) for a, b in zip(before, entire(model.parameters()), strict=True))
    counters = [optimizer.state[p]["scalars"][0].item() for p in model.parameters()]
    return same, counters, sorted(state["weight"])


def test_torch_may_ask_for_the_state_of_a_fresh_optimizer():
    names = ["direction", "grad_prev", "h", "scalars"]
    assert ranks.run(2, touched_by_torch) == [(True, [0.0, 0.0], names)] * 2


def different_parameters(when):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    if when == "construction" and dist.get_rank() == 1:
        params[1] = nn.Parameter(torch.ones(4))
    try:
        optimizer = NLCG(params, precond="bfgs")
        for p in params if dist.get_rank() == 0 else params[:1]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("construction", r"NLCG: all ranks must have the same parameters, got on rank 1 .* parameter 1: shape \[4\]"),
        (
            "first step",
            "NLCG: all ranks must have the same parameters, got on rank 1 .* 1 parameters, on rank 0 parameter 1",
        ),
    ],
)
def test_different_parameters_are_an_error_on_all_ranks(when, said):
    messages = ranks.run(2, different_parameters, when)
    assert messages[0] == messages[1]
    with pytest.raises(ValueError, match=said):
        raise ValueError(messages[0])


# Models ---------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Rows that two ranks, and four, share unevenly; layer norm, and a bias that nobody splits in tensor parallelism."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 10), nn.LayerNorm(6), nn.Linear(10, 7)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(self.norm(x))))


def batch(step):
    generator = torch.Generator().manual_seed(step % 3)
    return torch.randn(8, 6, generator=generator), torch.randint(7, (8,), generator=generator)


def wrapped(kind):
    """The model in layout *kind*, and the rank among, and number of, those that share the batch."""
    torch.manual_seed(5)
    model = Net()
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if kind == "alone":
        return model, 0, 1
    if kind == "ddp":
        return DistributedDataParallel(model), rank, world
    if kind in ("tp", "fsdp x tp"):
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"inner": ColwiseParallel(), "outer": RowwiseParallel()})
        if kind == "fsdp x tp":
            fully_shard(model, mesh=mesh["data"])
        return model, rank // 2, world // 2
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shards",))
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    for part in (model.inner, model.outer, model):
        fully_shard(part, mesh=mesh)
    return model, rank, world


def fitted(kind, steps, options):
    model, rank, world = wrapped(kind)
    optimizer = NLCG(model.parameters(), **options)
    losses = []
    for step in range(steps):
        x, y = (torch.chunk(t, world)[rank] for t in batch(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step(loss=loss.detach())
        losses.append(nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).item())
    return losses, entire(model.parameters())


@pytest.mark.parametrize(
    ("kind", "world"),
    [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 2), ("fsdp x tp", 4)],
)
@pytest.mark.parametrize("options", [{}, {"line_search": "online", "lr": 1.0}, {"shard_state": True}], ids=str)
def test_models_train_as_in_one_process(kind, world, options):
    options = {"lr": 0.4, "precond": "bfgs"} | options
    wanted, _ = fitted("alone", 50, options)
    everyone = ranks.run(world, fitted, kind, 50, options)
    assert min(wanted) < 0.5 * wanted[0]
    for losses, params in everyone:
        assert losses == pytest.approx(wanted, rel=1e-5)
        for found, other in zip(params, everyone[0][1], strict=True):
            assert torch.equal(found, other)
