"""Virtual batches: the gradient of the whole batch, reduced once, the same function at each call."""

import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.distributed.test_nlcg import entire
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from conjugo.distributed import VirtualBatch, gradient_sync, micro_batches
from conjugo.optim import NLCG


def network(dropout=0.0, norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(7) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 7), middle, nn.Dropout(dropout), nn.Tanh(), nn.Linear(7, 3)).double()


def examples(n=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def wrapped(layout, dtype=torch.float64, **options):
    model = network(**options).to(dtype)
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout in ("fsdp", "hsdp"):
        world = dist.get_world_size()
        shape, names = ((2, world // 2), ("replicas", "shards")) if layout == "hsdp" else ((world,), ("shards",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for part in (model[0], model[4], model):
            fully_shard(part, mesh=mesh)
    if layout == "fsdp, the last layer with the root":
        fully_shard(model[0])
        fully_shard(model)
    return model


def cross_entropy(model, part):
    return nn.functional.cross_entropy(model(part[0]), part[1])


def closure_of(model, n, size, loss_fn=cross_entropy, seed=1):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = examples(n, seed)
    parts, weights = micro_batches(torch.arange(n), rank, world, size=size)
    return VirtualBatch(model, loss_fn).closure([(x[i], y[i]) for i in parts], weights)


class Collectives(TorchDispatchMode):
    """Names of the collectives that are called. (CommDebugMode cannot follow several passes through a model.)"""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def evaluated(layout, n, size):
    model = wrapped(layout)
    closure = closure_of(model, n, size)
    with Collectives() as seen:
        value = closure()
    return value, entire(p.grad for p in model.parameters()), seen.names


@pytest.mark.parametrize("size", [1, 2, None])
@pytest.mark.parametrize(
    ("layout", "world"), [("plain", 1), ("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)]
)
def test_loss_and_gradient_are_those_of_the_whole_batch(layout, world, size):
    n = 8  # 3, 3 and 2 over three ranks
    model = network()
    loss = cross_entropy(model, examples(n))
    loss.backward()
    results = [evaluated(layout, n, size)] if world == 1 else ranks.run(world, evaluated, layout, n, size)
    for value, grads, names in results:
        assert value.item() == pytest.approx(loss.item(), rel=1e-12)
        assert value.item() == results[0][0].item()
        for found, p in zip(grads, model.parameters(), strict=True):
            assert torch.allclose(found, p.grad, rtol=1e-12, atol=1e-15)
        if layout == "ddp":  # gradient and loss, however many micro-batches
            assert [name.partition("_")[0] for name in names] == ["allreduce"] * 2
        if layout == "fsdp":
            assert sum("reduce_scatter" in name for name in names) == 2  # two blocks, in the last micro-batch only


def repeated(layout):
    model = wrapped(layout, dropout=0.5, norm=True)
    torch.manual_seed(10 + (dist.get_rank() if dist.is_initialized() else 0))
    closure = closure_of(model, 8, 2)
    first = closure(), entire(p.grad for p in model.parameters()), entire(model.buffers())
    drawn = torch.rand(3)
    after_first = torch.get_rng_state()
    again = closure(), entire(p.grad for p in model.parameters()), entire(model.buffers())
    same = all(torch.equal(a, b) for x, y in zip(first[1:], again[1:], strict=True) for a, b in zip(x, y, strict=True))
    other = closure_of(model, 8, 2)
    return (
        first[0].item() == again[0].item(),
        same,
        torch.equal(torch.get_rng_state(), after_first),
        closure.calls,
        other().item() != first[0].item(),
        drawn,
    )


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp"])
def test_each_call_computes_the_same_function(layout):
    results = [repeated("plain")] if layout == "plain" else ranks.run(2, repeated, layout)
    for same_loss, same_rest, random_kept, calls, fresh_masks, _ in results:
        assert same_loss
        assert same_rest
        assert random_kept
        assert calls == 2
        assert fresh_masks


def after_an_evaluation():
    """A forward pass alone leaves whole parameters in sight, whose gradients are not those of the optimizer's."""
    model = wrapped("fsdp, the last layer with the root")
    closure_of(model, 8, 2)()
    first = entire(p.grad for p in model.parameters())
    with torch.no_grad():
        model(examples()[0])
    closure = closure_of(model, 8, 2)
    closure()
    return first, entire(p.grad for p in model.parameters())


def test_gradients_start_at_zero_also_after_an_evaluation():
    for first, second in ranks.run(2, after_an_evaluation):
        for a, b in zip(first, second, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def failing_micro_batch():
    """Gradients of a pass by hand after a micro-batch that was not the last one has failed."""
    model = wrapped("fsdp")
    x, y = examples(8)
    with pytest.raises(RuntimeError, match="out of memory"), gradient_sync(model, last=False):
        raise RuntimeError("out of memory")
    part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    cross_entropy(model, (x[part], y[part])).backward()
    return entire(p.grad for p in model.parameters())


def test_gradients_are_reduced_again_after_an_exception():
    model = network()
    cross_entropy(model, examples(8)).backward()
    for grads in ranks.run(2, failing_micro_batch):
        for found, p in zip(grads, model.parameters(), strict=True):
            assert torch.allclose(found, p.grad, rtol=1e-12, atol=1e-15)


def independent_models():
    """DDP over groups of one rank: nobody shares anything."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    model = DistributedDataParallel(network(), process_group=groups[dist.get_rank()])
    part = examples(4, seed=dist.get_rank())
    value = VirtualBatch(model, cross_entropy).closure([part])()
    return value.item(), cross_entropy(network(), part).item()


def test_the_ranks_are_those_of_ddp():
    for found, wanted in ranks.run(2, independent_models):
        assert found == pytest.approx(wanted, rel=1e-12)


def nan_on_one_rank():
    model = wrapped("ddp")
    x, y = examples(4)
    if dist.get_rank() == 1:
        x[0, 0] = math.nan
    return VirtualBatch(model, cross_entropy).closure([(x, y)])().item()


def test_a_nan_on_one_rank_is_the_loss_on_all():
    assert all(math.isnan(value) for value in ranks.run(2, nan_on_one_rank))


def line_search():
    """NLCG with a line search on problems that differ between the ranks: 100 short runs."""
    counts = []
    for seed in range(100):
        model = DistributedDataParallel(network())
        optimizer = NLCG(model.parameters(), lr=2.0, line_search="online", precond="bfgs")
        for step in range(3):
            closure = closure_of(model, 6, 2, seed=1000 * seed + step)
            optimizer.step(closure)
            counts.append(closure.calls)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return counts, weights, optimizer.last["base_lr"].item()


def test_all_ranks_call_equally_often_and_agree():
    first, second = ranks.run(2, line_search)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]


def unequal_parts():
    x, y = examples(4)
    try:
        VirtualBatch(wrapped("ddp"), cross_entropy).closure([(x, y)] * (1 + dist.get_rank()))
    except ValueError as error:
        return str(error)
    return None


def test_bad_calls():
    virtual = VirtualBatch(network(), cross_entropy)
    part = examples(4)
    with pytest.raises(ValueError, match="at least one micro-batch, got 0"):
        virtual.closure([])
    with pytest.raises(ValueError, match="weights must be 1, one for each part, got 2"):
        virtual.closure([part], [1, 2])
    with pytest.raises(ValueError, match="weights must be all >= 0"):
        virtual.closure([part], [-1])
    with pytest.raises(ValueError, match="sum of the weights must be > 0"):
        virtual.closure([part], [0])
    for message in ranks.run(2, unequal_parts):
        assert "the number of parts must be the same on all ranks" in message
