"""Hessians of networks against dense ones from torch.func, and a model that stays what it was."""

import pytest
import torch
import torch.distributed as dist
from tests.distributed.ranks import run
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from conjugo.curvature import eigsh, fisher, ggn, gradient_covariance, hessian


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


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, x):
        return self.head(self.block(self.embed(x))).transpose(1, 2)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y.sin() if y.sum() > 0 else y.tanh()


def convolutions():
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.GELU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def zoo(name):
    torch.manual_seed(0)
    labels, tokens = torch.randint(0, 3, (9,)), torch.randint(0, 7, (4, 5))
    model, x, y = {
        "norms": (network(nn.LayerNorm(5)), torch.randn(9, 4), labels),
        "dropout": (network(nn.Dropout(0.5)), torch.randn(9, 4), labels),
        "images": (convolutions(), torch.randn(9, 1, 8, 8), labels),
        "recurrent": (Recurrent(), torch.randn(9, 6, 4), labels),
        "transformer": (Tokens(), tokens, tokens.roll(1, 1)),
    }[name]
    return model.double(), (x.double() if x.is_floating_point() else x, y)


def empirical(*arguments, **options):
    return fisher(*arguments, kind="empirical", **options)


@pytest.mark.parametrize("matrix", [hessian, ggn, empirical, fisher, gradient_covariance])
@pytest.mark.parametrize("name", ["norms", "dropout", "images", "recurrent", "transformer"])
def test_traced_products_are_those_of_autograd(name, matrix):
    model, data = zoo(name)
    traced = matrix(model, F.cross_entropy, data, method="linearized")
    vectors = torch.randn(2, traced.size).double()
    found = traced.matmat(vectors)
    assert traced.method == "linearized"
    assert traced.cached
    by_autograd = matrix(model, F.cross_entropy, data, method="autograd", cache=False)
    assert torch.allclose(found, by_autograd.matmat(vectors), rtol=0, atol=1e-12 * found.abs().max())
    assert torch.equal(traced.matmat(vectors), found)  # from what is kept
    assert by_autograd.method == "autograd"


@pytest.mark.parametrize(
    "loss_fn",
    [F.mse_loss, F.huber_loss, F.binary_cross_entropy_with_logits, nn.CrossEntropyLoss(label_smoothing=0.1)],
    ids=["mse", "huber", "bce", "probabilities"],
)
@pytest.mark.parametrize("matrix", [hessian, ggn])
def test_losses_of_other_kinds_can_be_traced(matrix, loss_fn):
    model, (x, y) = network(), examples()
    data = x, F.one_hot(y, 3).double()
    traced, by_autograd = (matrix(model, loss_fn, data, method=method) for method in ("linearized", "autograd"))
    vector = torch.randn(traced.size).double()
    assert torch.allclose(traced @ vector, by_autograd @ vector, rtol=0, atol=1e-14)


def test_what_cannot_be_traced_falls_back_and_says_why():
    model, data = Branching().double(), examples()
    operator = hessian(model, F.cross_entropy, data)
    found = operator.to_dense()
    assert operator.method == "autograd"
    assert "trac" in operator.fallback
    assert not operator.cached
    assert torch.allclose(found, dense(model, *data), rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match="choose method 'auto'"):
        hessian(model, F.cross_entropy, data, method="linearized") @ torch.ones(operator.size).double()


def jacobian(model, x):
    """[n, K, P]"""
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(x).flatten()]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).unflatten(0, (len(x), -1))


def test_gauss_newton_and_fisher_matrices_are_what_their_formulas_say():
    model, (x, y) = network(), examples()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    j, outputs = jacobian(model, x), model(x).detach()
    p = outputs.softmax(1)
    b = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    wanted = torch.einsum("nkp,nkl,nlq->pq", j, b, j) / 12
    assert torch.allclose(ggn(model, F.cross_entropy, batches).to_dense(), wanted, rtol=0, atol=1e-14)
    slopes = torch.einsum("nk,nkp->np", p - F.one_hot(y, 3), j)
    found = fisher(model, F.cross_entropy, batches, kind="empirical").to_dense()
    assert torch.allclose(found, slopes.T @ slopes / 12, rtol=0, atol=1e-14)
    means = torch.stack([slopes[:5].mean(0), slopes[5:].mean(0)])
    found = gradient_covariance(model, F.cross_entropy, batches).to_dense()
    assert torch.allclose(found, means.T @ means / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "make"),
    [
        (nn.CrossEntropyLoss, lambda y: y),
        (nn.BCEWithLogitsLoss, lambda y: F.one_hot(y, 3).double()),
        (nn.MSELoss, lambda y: F.one_hot(y, 3).double()),
    ],
)
def test_targets_drawn_from_the_model_give_the_gauss_newton_matrix_on_average(loss, make, reduction):
    model, (x, y) = network(), examples()
    data, loss_fn = (x, make(y)), loss(reduction=reduction)
    vectors = torch.eye(43, dtype=torch.float64)[::6]
    wanted = ggn(model, loss_fn, data, reduction=reduction).matmat(vectors)
    errors = []
    for samples in (10, 160):
        found = fisher(model, loss_fn, data, mc_samples=samples, reduction=reduction, seed=3, method="autograd")
        errors.append(float((found.matmat(vectors) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 2


def test_sums_are_n_times_means_and_float64_is_a_choice():
    model, (x, y) = network().float(), examples()
    batches = [(x[:5].float(), y[:5]), (x[5:].float(), y[5:])]
    mean = hessian(model, F.cross_entropy, batches, dtype=torch.float64)
    total = hessian(model, nn.CrossEntropyLoss(reduction="sum"), batches, reduction="sum", dtype=torch.float64)
    assert mean.dtype == torch.float64
    assert next(model.parameters()).dtype == torch.float32
    assert torch.allclose(total.to_dense(), 12 * mean.to_dense(), rtol=0, atol=1e-13)
    single = hessian(model, F.cross_entropy, batches).to_dense()
    assert torch.allclose(single, mean.to_dense().float(), rtol=0, atol=1e-6)
    assert single.dtype == torch.float32


def test_products_follow_the_parameters():
    model, (x, y) = network(), examples()
    operator = hessian(model, F.cross_entropy, (x, y))
    operator.to_dense()
    with torch.no_grad():
        model[0].weight *= 1.5
    assert torch.allclose(operator.to_dense(), dense(model, x, y), rtol=0, atol=1e-13)


def test_modes_are_those_of_the_beginning():
    model = network(nn.BatchNorm1d(5).double())
    operator = hessian(model, F.cross_entropy, examples())
    vector = torch.ones(operator.size).double()
    before = operator @ vector
    model.eval()
    assert torch.equal(operator @ vector, before)


def test_blocks_and_parts_go_by_names():
    model, data = network(), examples()
    operator = hessian(model, F.cross_entropy, data)
    block = operator.block("weight$")
    assert block.names == ("0.weight", "2.weight")
    places = torch.cat([torch.arange(0, 20), torch.arange(25, 40)])
    assert torch.allclose(block.to_dense(), operator.to_dense()[places][:, places], rtol=0, atol=1e-14)
    parts = operator.split(torch.arange(43.0).double())
    assert [tuple(part.shape) for part in parts.values()] == [(5, 4), (5,), (3, 5), (3,)]
    assert parts["2.bias"].tolist() == [40, 41, 42]
    with pytest.raises(ValueError, match="params must be a pattern"):
        operator.block("nothing")


@pytest.mark.parametrize("cache", [True, False])
def test_a_loader_that_shuffles_gives_the_same_batches_in_each_pass(cache):
    model, (x, y) = network(nn.BatchNorm1d(5).double()), examples()
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    for loader in (
        DataLoader(TensorDataset(x, y), 4, shuffle=True),
        DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=generator),
    ):
        random = torch.get_rng_state()
        operator = hessian(model, F.cross_entropy, loader, cache=cache)
        vector = torch.ones(operator.size).double()
        first = operator @ vector
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(generator.get_state(), state)
        torch.rand(1), torch.rand(1, generator=generator)
        assert torch.equal(operator @ vector, first)
        generator.set_state(state)


def test_data_that_changes_is_refused():
    model, (x, y) = network(), examples()

    class Noisy:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(x, y), (x + self.passes, y)])

    operator = hessian(model, F.cross_entropy, Noisy(), cache=False)
    with pytest.raises(ValueError, match="another batch 1"):
        operator @ torch.ones(operator.size).double()


def test_inputs_may_be_dictionaries():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, inputs):
            return {"logits": self.inner(inputs["x"])}

    model, (x, y) = Named(), examples()
    operator = hessian(model, lambda out, y: F.cross_entropy(out["logits"], y["label"]), [({"x": x}, {"label": y})])
    assert torch.allclose(operator.to_dense(), dense(model.inner, x, y), rtol=0, atol=1e-13)
    assert operator.method == "linearized"


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


class Custom(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_an_operation_without_second_derivatives_is_named():
    operator = hessian(network(Custom()), F.cross_entropy, examples())
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*Once"):
        operator @ torch.ones(operator.size).double()


def test_a_product_or_a_loss_that_becomes_infinite_is_told():
    model, (x, y) = network(), examples()
    operator = hessian(model, F.cross_entropy, [(x[:6], y[:6]), (x[6:], y[6:])])
    vector = torch.ones(operator.size).double()
    operator @ vector
    with pytest.raises(FloatingPointError, match="a product is not finite, though the loss is"):
        operator @ (vector * float("inf"))
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss of batch 0 is nan"):
        operator @ vector


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
    with pytest.raises(ValueError, match="method must be auto, linearized or autograd"):
        ggn(model, F.cross_entropy, data, method="fast")
    with pytest.raises(ValueError, match="cache must be auto, True or False"):
        ggn(model, F.cross_entropy, data, cache="some")
    with pytest.raises(TypeError, match="unexpected argument 'weight'"):
        ggn(model, F.cross_entropy, data, weight=1)
    with pytest.raises(ValueError, match="weight_decay must be left out"):
        fisher(model, F.cross_entropy, data, weight_decay=1.0)
    with pytest.raises(ValueError, match="likelihood must be categorical, bernoulli or normal"):
        fisher(model, lambda out, y: F.cross_entropy(out, y), data)
    with pytest.raises(ValueError, match="mc_samples must be >= 1"):
        fisher(model, F.cross_entropy, data, mc_samples=0)
    with pytest.raises(ValueError, match="a batch must be a pair"):
        hessian(model, F.cross_entropy, [data[0]])
    with pytest.raises(ValueError, match="number of trainable parameters"):
        hessian(model.requires_grad_(False), F.cross_entropy, data)
