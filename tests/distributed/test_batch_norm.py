"""Batch norm over ranks: what one process gives on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from conjugo.distributed import average_statistics, share, sync_batch_norm, warn_of_small_micro_batch
from conjugo.distributed.batch_norm import GlobalBatchNorm


def network(kind):
    torch.manual_seed(0)
    if kind == "table":
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(16, 3)).double()


def data(kind):
    torch.manual_seed(1)
    x = torch.randn(11, 4) if kind == "table" else torch.randn(11, 3, 6, 6)
    return 3 + x.double(), torch.randint(3, (11,))


def gradients(kind, steps=3):
    """Gradients of the last of some steps, and all buffers; ranks have 6 and 5 examples, or 4, 4 and 3."""
    model = sync_batch_norm(network(kind))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    inputs, targets = data(kind)
    x, y = share(inputs, rank, world), share(targets, rank, world)
    for _ in range(steps):
        model.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(x), y)
        (loss * len(x) * world / len(inputs)).backward()
    grads = [p.grad for p in model.parameters()]
    buffers = dict(model.named_buffers())
    model.eval()
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return grads, buffers, model(inputs).detach(), kinds


@pytest.mark.parametrize("kind", ["table", "images"])
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_and_statistics_are_those_of_the_whole_batch(kind, world):
    grads, buffers, out, _ = gradients(kind)
    for found_grads, found_buffers, found, kinds in ranks.run(world, gradients, kind):
        assert kinds == {GlobalBatchNorm}
        for a, b in zip(found_grads, grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
        assert found_buffers.keys() == buffers.keys()
        for name, value in buffers.items():
            assert torch.allclose(found_buffers[name], value, rtol=1e-10), name
        assert torch.allclose(found, out, rtol=1e-10)


def low_precision():
    torch.manual_seed(0)
    norm = sync_batch_norm(nn.Sequential(nn.BatchNorm1d(8)))
    x = (100 + torch.randn(32, 8)).bfloat16().requires_grad_()
    out = norm(x)
    out.float().square().sum().backward()
    whole = nn.BatchNorm1d(8)(x.detach().float())
    return out.dtype, x.grad.dtype, (out.float() - whole).abs().max().item()


def test_low_precision_is_normalised_in_float32():
    for dtype, grad_dtype, error in ranks.run(2, low_precision):
        assert (dtype, grad_dtype) == (torch.bfloat16, torch.bfloat16)
        assert error < 0.02


def same_tensors():
    model = network("images")
    before = dict(model.state_dict(keep_vars=True))
    converted = sync_batch_norm(model)
    after = dict(converted.state_dict(keep_vars=True))
    single = sync_batch_norm(nn.BatchNorm1d(3))
    return converted is model, all(before[k] is after[k] for k in before), before.keys() == after.keys(), type(single)


def test_conversion_keeps_parameters_and_buffers():
    assert ranks.run(2, same_tensors) == [(True, True, True, GlobalBatchNorm)] * 2
    model = network("table")
    assert sync_batch_norm(model) is model
    assert type(model[1]) is nn.BatchNorm1d  # alone there is nothing to do
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        nn.BatchNorm1d(3)(torch.ones(3))


def averaged():
    model = network("images")
    with torch.no_grad():
        for i, buffer in enumerate(model.buffers()):
            buffer.fill_(i + 10 * dist.get_rank())
    with CommDebugMode() as mode:
        average_statistics(model)
    return [b.flatten()[0].item() for b in model.buffers()], mode.get_total_counts()


def test_statistics_are_averaged_with_one_collective():
    for rank, (values, count) in enumerate(ranks.run(3, averaged)):
        assert values == [10.0, 11.0, 2 + 10 * rank, 13.0, 14.0, 5 + 10 * rank]  # counters stay
        assert count == 1
    model = network("images")
    before = copy.deepcopy(model.state_dict())
    average_statistics(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_warning_of_small_micro_batches():
    with pytest.warns(UserWarning, match="batch norm sees 15 examples at a time"):
        warn_of_small_micro_batch(network("table"), 15)
    warn_of_small_micro_batch(network("table"), 16)
    warn_of_small_micro_batch(network("table").eval(), 1)
