"""Hessian-vector products over ranks: those of one process with all the data."""

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.distributed.test_nlcg import entire
from tests.distributed.test_virtual_batch import Collectives, cross_entropy, examples, wrapped
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from conjugo.distributed import curvature_along, hessian, hvp, share, sync_batch_norm

SHARES = {2: [4, 4], 3: [3, 3, 2], 4: [2, 2, 2, 2]}


def vector(model):
    g = torch.Generator().manual_seed(7)
    whole = [torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for p in model.parameters()]
    return [
        distribute_tensor(v, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else v
        for v, p in zip(whole, model.parameters(), strict=True)
    ]


def exact():
    """The whole Hessian, in one process, times the vector."""
    model = wrapped("plain")
    shapes = [p.shape for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    sizes = [s.numel() for s in shapes]

    def loss(flat):
        values = {n: x.view(s) for n, x, s in zip(names, flat.split(sizes), shapes, strict=True)}
        x, y = examples(8)
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    v = torch.cat([v.flatten() for v in vector(model)])
    product = torch.autograd.functional.hessian(loss, flat) @ v
    return [x.view(s) for x, s in zip(product.split(sizes), shapes, strict=True)], v @ product


def products(layout, mode, dtype):
    model = wrapped(layout, dtype)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = (share(t, rank, world) for t in examples(8))
    part = x.to(dtype), y
    v = vector(model)
    before = entire(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    product = hvp(model, cross_entropy, part, v, mode, weight=len(x))
    assert all(type(a) is type(b) for a, b in zip(product, v, strict=True))
    with Collectives() as seen:
        along = curvature_along(model, cross_entropy, part, v, mode, weight=len(x))
    unchanged = all(torch.equal(a, b) for a, b in zip(entire(model.parameters()), before, strict=True))
    unchanged &= all((g == 3.0).all() for g in entire(p.grad for p in model.parameters()))
    # Training goes on as ever.
    model.zero_grad()
    cross_entropy(model, part).backward()
    return entire(product), along, unchanged, len(seen.names), entire(p.grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["auto", "fd"])
@pytest.mark.parametrize(
    ("layout", "world"), [("plain", 1), ("plain", 2), ("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)]
)
def test_products_are_those_of_the_whole_batch(layout, world, mode, dtype):
    wanted, curvature = exact()
    results = [products(layout, mode, dtype)] if world == 1 else ranks.run(world, products, layout, mode, dtype)
    tolerance = {("auto", torch.float64): 1e-11, ("auto", torch.float32): 3e-6, ("fd", torch.float64): 1e-8}
    limit = tolerance.get((mode, dtype), 3e-3)
    scale = torch.cat([w.flatten() for w in wanted]).norm()
    for found, along, unchanged, count, grads in results:
        error = torch.cat([(a - b).flatten() for a, b in zip(found, wanted, strict=True)]).norm()
        assert error < limit * scale
        assert along.item() == pytest.approx(curvature.item(), rel=20 * limit)
        assert along.item() == results[0][1].item()
        assert unchanged
        if layout == "ddp" and mode == "auto":
            assert count == 2  # the weights of the ranks, and one number
        if layout != "plain":
            assert all(torch.equal(a, b) for a, b in zip(grads, results[0][4], strict=True))


def with_state(mode):
    """Dropout and batch norm: the same masks on both sides of a difference, statistics untouched."""
    model = wrapped("fsdp", dropout=0.5, norm=True)
    torch.manual_seed(dist.get_rank())
    random, buffers = torch.get_rng_state(), entire(model.buffers())
    x, y = (share(t, dist.get_rank(), 2) for t in examples(8))
    found = entire(hvp(model, cross_entropy, (x, y), vector(model), mode))
    same = torch.equal(random, torch.get_rng_state())
    same &= all(torch.equal(a, b) for a, b in zip(buffers, entire(model.buffers()), strict=True))
    return found, same


def test_random_numbers_and_buffers_stay():
    for (a, same), (b, same_too) in zip(ranks.run(2, with_state, "auto"), ranks.run(2, with_state, "fd"), strict=True):
        assert same
        assert same_too
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", ["autograd", "fd"])
def test_frozen_and_unused_parameters_and_straight_losses(mode):
    model = wrapped("plain")
    model[0].weight.requires_grad_(False)
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = hvp(model, cross_entropy, examples(8), vector(model), mode)
    zero = [not p.any() for p in found]
    names = [n for n, _ in model.named_parameters()]
    assert dict(zip(names, zero, strict=True)) == {
        "extra": True, "0.weight": True, "0.bias": False, "4.weight": False, "4.bias": False
    }  # fmt: skip
    line = nn.Linear(2, 1)
    straight = hvp(line, lambda model, x: model(x).mean(), torch.ones(3, 2), [torch.ones(1, 2), torch.ones(1)], mode)
    assert all(p.abs().max() < 1e-3 for p in straight)


def failing_in_the_middle():
    model = wrapped("fsdp")
    before = entire(model.parameters())

    def loss_fn(model, part):
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        hvp(model, loss_fn, None, vector(model), "fd")
    return all(torch.equal(a, b) for a, b in zip(before, entire(model.parameters()), strict=True))


def test_parameters_are_restored_after_an_exception():
    assert ranks.run(2, failing_in_the_middle) == [True, True]


def own_share(n):
    return [share(t, dist.get_rank(), dist.get_world_size()) for t in examples(n)]


def failing_after_forward():
    """What a sharded model says before and after a product that failed between forward and backward pass."""
    model = wrapped("fsdp, the last layer with the root")
    x, _ = examples(8)

    def loss_fn(model, part):
        model(part)
        raise RuntimeError("in the loss")

    with torch.no_grad():
        before = model(x)
    with pytest.raises(RuntimeError, match="in the loss"):
        hvp(model, loss_fn, x, vector(wrapped("fsdp, the last layer with the root")), "fd", eps=1.0)
    with torch.no_grad():
        return torch.equal(before, model(x))


def test_no_moved_weights_are_left_after_an_exception():
    assert ranks.run(2, failing_after_forward) == [True, True]


def after_an_evaluation(mode):
    model = wrapped("fsdp, the last layer with the root")
    part, v = own_share(8), vector(model)
    first = entire(hvp(model, cross_entropy, part, v, mode))
    with torch.no_grad():
        model(part[0])  # leaves whole parameters in sight
    return all(torch.equal(a, b) for a, b in zip(first, entire(hvp(model, cross_entropy, part, v, mode)), strict=True))


@pytest.mark.parametrize("mode", ["auto", "fd"])
def test_an_evaluation_before_changes_nothing(mode):
    assert ranks.run(2, after_an_evaluation, mode) == [True, True]


def normalised(mode, first):
    """Batch norm over all ranks, which have 4 and 3 examples; *first*: also of the data."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(4)] * first + [nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)]
    model = nn.Sequential(*layers).double()
    part = examples(7)
    if dist.is_initialized():
        model, part = nn.parallel.DistributedDataParallel(sync_batch_norm(model)), own_share(7)
    v = vector(model)
    return [*hvp(model, cross_entropy, part, v, mode, weight=len(part[0])), curvature_along(
        model, cross_entropy, part, v, mode, weight=len(part[0])
    )]  # fmt: skip


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mode", ["auto", "fd"])
def test_batch_norm_over_ranks(mode, first):
    wanted = normalised("auto", first)
    tolerance = 1e-11 if mode == "auto" else 1e-6
    for found in ranks.run(2, normalised, mode, first):
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def chosen_modes():
    """Products in mode "auto" of a model that counts as large, beside those of the other modes; hooks of users."""
    model = wrapped("fsdp")
    model[0].register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
    part, v = own_share(8), vector(model)
    exact, rough = (entire(hvp(model, cross_entropy, part, v, mode)) for mode in ("auto", "fd"))
    hessian.LARGE = 10
    large = entire(hvp(model, cross_entropy, part, v))
    equal = all(torch.equal(a, b) for a, b in zip(large, rough, strict=True))
    close = all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(exact, rough, strict=True))
    synced = nn.SyncBatchNorm(3).double()
    with pytest.raises(ValueError, match="mode must be fd or auto with torch"):
        hvp(synced, cross_entropy, part, list(synced.parameters()), "autograd")
    return equal, close, any(torch.equal(a, b) for a, b in zip(exact, rough, strict=True))


def test_modes_of_large_models_and_hooks_of_users():
    assert ranks.run(2, chosen_modes) == [(True, True, False)] * 2


def test_attention_and_compiled_models():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(self.queries(x), x, x)

    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 1, 4, 8, dtype=torch.float64)
    results = [
        hvp(each, lambda model, x: model(x).square().mean(), x, vector(model), mode)
        for each in (model, torch.compile(model, backend="eager"))
        for mode in ("autograd", "fd")
    ]
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def bad_for_shards():
    model = wrapped("fsdp")
    messages = []
    for vec, mode in ((vector(model), "autograd"), (entire(vector(model)), "auto")):
        try:
            hvp(model, cross_entropy, None, vec, mode)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_an_operation_without_second_derivatives_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    model = nn.Linear(2, 1)
    vec = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        hvp(model, lambda model, x: Once.apply(model(x)).square().mean(), torch.eye(2), vec)


def test_bad_arguments():
    model = wrapped("plain")
    v = vector(model)
    with pytest.raises(ValueError, match="mode must be auto, autograd, functional or fd, got 'exact'"):
        hvp(model, cross_entropy, examples(8), v, "exact")
    with pytest.raises(ValueError, match="shapes of vec must be those of the parameters"):
        hvp(model, cross_entropy, examples(8), v[1:])
    with pytest.raises(ValueError, match="weight must be >= 0"):
        hvp(model, cross_entropy, examples(8), v, weight=-1)
    with pytest.raises(ValueError, match="eps must be > 0"):
        hvp(model, cross_entropy, examples(8), v, "fd", eps=0.0)
    for first, second in ranks.run(2, bad_for_shards):
        assert "mode must be functional or fd for sharded parameters" in first
        assert "the types of vec must be DTensors where the parameters are" in second
