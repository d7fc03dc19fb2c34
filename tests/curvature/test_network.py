"""Hessians of networks against dense ones from torch.func, and a model that stays what it was."""

import pytest
import torch
import torch.distributed as dist
from tests.distributed.ranks import run
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from conjugo.curvature import eigsh, hessian


def network(*extra):
    return nn.Sequential(nn.Linear(4, 5), *extra, nn.Tanh(), nn.Linear(5, 3)).double()


def examples(n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def dense(model, x, y):
    """The Hessian of the mean loss, by torch.func."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(flat):
        values = dict(zip(names, (v.view(s) for v, s in zip(flat.split(sizes), shapes, strict=True)), strict=True))
        return F.cross_entropy(functional_call(model, (values, {k: b.clone() for k, b in buffers.items()}), (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3), (1, 11)])
def test_batches_of_any_sizes_give_the_dense_hessian(sizes):
    model, (x, y) = network(), examples()
    batches = list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))
    found = hessian(model, F.cross_entropy, batches).to_dense()
    assert torch.allclose(found, dense(model, x, y), rtol=0, atol=1e-13)


def test_eigenvalues_are_those_of_the_dense_one():
    model, (x, y) = network(), examples()
    found = eigsh(hessian(model, F.cross_entropy, (x, y)), k=3)
    wanted = torch.linalg.eigvalsh(dense(model, x, y)).flip(0)[:3]
    assert torch.allclose(found.values, wanted, rtol=1e-8, atol=0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_in_both_modes_leaves_no_trace(mode):
    model, (x, y) = network(nn.BatchNorm1d(5).double()), examples()
    model[1].running_var.fill_(2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    model.train(mode == "eval")  # the other one
    found = hessian(model, F.cross_entropy, (x, y), bn_mode=mode).to_dense()
    assert all(module.training == (mode == "eval") for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    model.train(mode == "train")
    assert torch.allclose(found, dense(model, x, y), rtol=0, atol=1e-13)


def test_a_bias_in_front_of_batch_norm_is_flat():
    model, data = network(nn.BatchNorm1d(5).double()), examples()
    bias = hessian(model, F.cross_entropy, data, "^0.bias", bn_mode="train")
    assert bias.names == ("0.bias",)
    assert bias.to_dense().abs().max() < 1e-12


def test_dropout_draws_the_same_masks_in_each_product():
    operator = hessian(network(nn.Dropout(0.5)), F.cross_entropy, examples())
    vector = torch.randn(operator.size).double()
    assert torch.equal(operator @ vector, operator @ vector)


def test_weight_decay_gradient_and_loss():
    model, (x, y) = network(), examples()
    loss = F.cross_entropy(model(x), y)
    grad = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    operator = hessian(model, F.cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], weight_decay=0.5)
    assert operator.loss() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(operator.gradient(), grad + 0.5 * weights, rtol=0, atol=1e-14)
    assert torch.allclose(operator.to_dense(), dense(model, x, y) + 0.5 * torch.eye(operator.size), rtol=0, atol=1e-13)


def product_of_a_share(model, vector):
    x, y = examples()
    own = slice(0, 8) if dist.get_rank() == 0 else slice(8, 12)
    return hessian(model, F.cross_entropy, (x[own], y[own])) @ vector


def test_two_ranks_with_unequal_shares_give_the_product_of_one():
    model = network()
    operator = hessian(model, F.cross_entropy, examples())
    vector = torch.randn(operator.size).double()
    first, second = run(2, product_of_a_share, model, vector)
    assert torch.equal(first, second)
    assert torch.allclose(first, operator @ vector, rtol=0, atol=1e-14)


def test_bad_input():
    model, data = network(), examples()
    with pytest.raises(ValueError, match="bn_mode must be as_is, train or eval"):
        hessian(model, F.cross_entropy, data, bn_mode="frozen")
    with pytest.raises(ValueError, match="params must be a pattern"):
        hessian(model, F.cross_entropy, data, "nothing")
    with pytest.raises(ValueError, match="number of examples must be at least 1"):
        hessian(model, F.cross_entropy, [])
    with pytest.raises(ValueError, match="read many times"):
        hessian(model, F.cross_entropy, (batch for batch in [data]))
    vector = torch.ones(43).double()
    with pytest.raises(ValueError, match="shape of the loss must be"):
        hessian(model, lambda out, y: F.cross_entropy(out, y, reduction="none"), data) @ vector
    with pytest.raises(FloatingPointError, match="batch 1"):
        hessian(model, F.cross_entropy, [data, (data[0] / 0, data[1])]) @ vector
    with pytest.raises(ValueError, match="number of trainable parameters"):
        hessian(model.requires_grad_(False), F.cross_entropy, data)
