"""The gradient noise scale against what is known: linear regression on Gaussian data, identities, invariances."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from tests.distributed.ranks import run
from torch import nn
from torch.nn import functional as F

from conjugo.optim import NLCG
from conjugo.scaling import diagonal_metric, gradient_noise_scale
from conjugo.scaling.noise_scale import Moments, jackknife, moments, student975, undisturbed

SPECTRUM = torch.tensor([2.0, 1.0, 0.5, 0.5, 0.2], dtype=torch.float64)
ERROR = torch.tensor([0.3, -0.5, 1.0, 0.2, -1.0], dtype=torch.float64)
NOISE = 1.5


def regression(n, seed=0):
    """x ~ N(0, H) with a diagonal H, targets of 0 with noise, and the weights are the ERROR."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64) * SPECTRUM.sqrt()
    y = NOISE * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return x, y


def linear(weight=ERROR):
    model = nn.Linear(len(weight), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    return model


def truth():
    """B_simple and B_noise of single examples: Sigma = H e e' H + (e' H e + s^2) H."""
    h, e = SPECTRUM, ERROR
    variance = float((e * h * e).sum()) + NOISE**2
    simple = 1 + variance * float(h.sum() / (h * e).square().sum())
    noise = 1 + variance * float(h.square().sum() / (e * h**3 * e).sum())
    return simple, noise


def in_batches(data, size):
    return list(zip(*(part.split(size) for part in data)))


def test_truths_of_linear_regression():
    found = gradient_noise_scale(
        linear(), F.mse_loss, regression(2**14), micro_batch=64, max_examples=2**14, precision=1.0001, hessian=True
    )
    simple, noise = truth()
    assert (simple, noise) == pytest.approx((16.692307692, 18), rel=1e-8)
    assert found.examples == 2**14
    assert found.ci95[0] < simple < found.ci95[1]
    assert found.b_simple == pytest.approx(simple, rel=0.15)
    assert found.b_noise == pytest.approx(noise, rel=0.2)
    h, e = SPECTRUM, ERROR
    assert found.grad_norm2 == pytest.approx(4 * float((h * e).square().sum()), rel=0.05)  # mse has a factor of 2


def gradients(model, data, size):
    rows = []
    for x, y in in_batches(data, size):
        (g,) = torch.autograd.grad(F.mse_loss(model(x), y), model.parameters())
        rows.append(g.reshape(-1))
    return torch.stack(rows)


def test_it_is_the_sample_variance_and_the_form_of_two_batches():
    model, data = linear(), regression(96)
    g = gradients(model, data, 8)
    found = gradient_noise_scale(model, F.mse_loss, in_batches(data, 24), micro_batch=8, precision=1.0001)
    n, s2 = 12, float((g - g.mean(0)).square().sum() / 11)
    assert (found.micro_batches, found.micro_batch, found.examples) == (12, 8, 96)
    assert found.trace == pytest.approx(8 * s2, rel=1e-12)
    assert found.grad_norm2 == pytest.approx(float(g.mean(0).square().sum()) - s2 / n, rel=1e-12)
    two = moments(float(g.square().sum(1).mean()), float(g.mean(0).square().sum()), 8, 96)
    assert tuple(two) == pytest.approx((8 * s2, float(g.mean(0).square().sum()) - s2 / n), rel=1e-12)


def test_without_replacement_the_whole_set_leaves_no_doubt_about_the_gradient():
    model, data = linear(), regression(96)
    g = gradients(model, data, 1)
    found = gradient_noise_scale(model, F.mse_loss, data, micro_batch=1, precision=1.0001)
    assert found.grad_norm2 == pytest.approx(float(g.mean(0).square().sum()), rel=1e-12)
    part = gradient_noise_scale(model, F.mse_loss, data, micro_batch=1, max_examples=48, precision=1.0001)
    assert part.examples == 48
    assert moments(5.0, 2.0, 1, 10, population=20).grad_norm2 == pytest.approx(2 - 3 / 0.9 / 10 * 0.5)


def test_equal_gradients_have_no_noise():
    x, y = regression(1)
    found = gradient_noise_scale(linear(), F.mse_loss, [(x.expand(32, 5), y.expand(32, 1))] * 4, micro_batch=8)
    assert found.trace == pytest.approx(0, abs=1e-12 * found.grad_norm2)
    assert found.b_simple == pytest.approx(0, abs=1e-10)
    assert not found.lower_bound_only


def test_both_moments_are_unbiased():
    """2,000 draws of 8 micro-batches of 4 examples with G = (1, 0, 0) and tr Sigma = 6."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    center = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    g = center + scale * torch.randn(2000, 8, 4, 3, generator=generator, dtype=torch.float64)
    means = g.mean(2)
    found = torch.tensor(
        [
            moments(float(draw.square().sum(1).mean()), float(draw.mean(0).square().sum()), 4, 32)
            for draw in means.unbind()
        ]
    )
    error = found.std(0) / math.sqrt(2000)
    assert (found.mean(0) - torch.tensor([6.0, 1.0])).abs().div(error).max() < 3


def test_the_interval_covers_the_truth_as_often_as_it_says():
    simple, _ = truth()
    model = linear()
    covered = []
    for seed in range(300):
        data = in_batches(regression(256, seed), 256)
        low, high = gradient_noise_scale(model, F.mse_loss, data, micro_batch=8, precision=1.0001).ci95
        covered.append(low < simple < high)
    assert 0.88 <= statistics.mean(covered) <= 0.99


def test_a_hidden_gradient_gives_a_bound():
    model = linear(torch.zeros(5))
    bounds = 0
    for seed in range(20):
        data = in_batches(regression(64, seed), 64)
        found = gradient_noise_scale(model, F.mse_loss, data, micro_batch=8)
        if found.lower_bound_only:
            bounds += 1
            assert (found.b_simple, found.ci95) == (32, (32, math.inf))
            assert found.grad_norm2 <= 0
            assert found.to_dict()["ci95"] == [32, None]
    assert bounds >= 5


def test_it_grows_until_it_is_exact_enough():
    model, data = linear(), regression(2**14)
    rough = gradient_noise_scale(model, F.mse_loss, data, micro_batch=4, precision=3.0)
    exact = gradient_noise_scale(model, F.mse_loss, data, micro_batch=4, precision=1.3)
    assert rough.examples < exact.examples < 2**14
    for found, factor in ((rough, 3.0), (exact, 1.3)):
        assert found.b_simple / factor <= found.ci95[0]
        assert found.ci95[1] <= found.b_simple * factor
        assert found.examples >= 4 * found.b_simple


# ---- invariances ----


def test_the_scale_of_the_loss_does_not_matter():
    model, data = linear(), regression(256)
    one = gradient_noise_scale(model, F.mse_loss, data)
    three = gradient_noise_scale(model, lambda out, y: 3 * F.mse_loss(out, y), data)
    assert three.trace == pytest.approx(9 * one.trace, rel=1e-12)
    assert three.grad_norm2 == pytest.approx(9 * one.grad_norm2, rel=1e-12)
    assert three.b_simple == pytest.approx(one.b_simple, rel=1e-12)
    assert three.ci95 == pytest.approx(one.ci95, rel=1e-9)


def test_data_that_are_there_twice():
    """All examples one by one: the variance is the same, but for the correction of the sample."""
    model, (x, y) = linear(), regression(60)
    one = gradient_noise_scale(model, F.mse_loss, (x, y), micro_batch=1, precision=1.0001)
    two = gradient_noise_scale(model, F.mse_loss, (x.repeat(2, 1), y.repeat(2, 1)), micro_batch=1, precision=1.0001)
    assert two.grad_norm2 == pytest.approx(one.grad_norm2, rel=1e-12)
    assert two.trace == pytest.approx(one.trace * (59 / 60) * (120 / 119), rel=1e-12)


def test_a_rotation_of_the_weights_does_not_matter():
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    x, y = regression(512)
    one = gradient_noise_scale(linear(), F.mse_loss, (x, y))
    other = gradient_noise_scale(linear(rotation.T @ ERROR), F.mse_loss, (x @ rotation, y))
    assert other.b_simple == pytest.approx(one.b_simple, rel=1e-10)
    assert other.ci95 == pytest.approx(one.ci95, rel=1e-8)


def test_the_order_of_micro_batches_does_not_matter():
    batches = in_batches(regression(128), 8)
    one = gradient_noise_scale(linear(), F.mse_loss, batches, micro_batch=8, precision=1.0001)
    other = gradient_noise_scale(linear(), F.mse_loss, batches[::-1], micro_batch=8, precision=1.0001)
    assert other.b_simple == pytest.approx(one.b_simple, rel=1e-12)
    assert other.ci95 == pytest.approx(one.ci95, rel=1e-9)


def test_merged_rows_give_the_same_estimate():
    batches = in_batches(regression(2048), 8)
    every, merged = (
        gradient_noise_scale(linear(), F.mse_loss, batches, micro_batch=8, precision=1.0001, memory=memory)
        for memory in (2**29, 0)
    )
    assert merged.micro_batches == every.micro_batches == 256
    assert merged.trace == pytest.approx(every.trace, rel=1e-12)
    assert merged.grad_norm2 == pytest.approx(every.grad_norm2, rel=1e-12)
    assert merged.ci95 != every.ci95  # eight groups instead of 128
    assert merged.ci95[0] < every.b_simple < merged.ci95[1]


def of_rank(world, hessian):
    import torch.distributed as dist

    mine = in_batches(regression(64), 8)[dist.get_rank() :: world]
    return gradient_noise_scale(linear(), F.mse_loss, mine, micro_batch=8, precision=1.0001, hessian=hessian)


@pytest.mark.parametrize(("world", "hessian"), [(4, False), (2, True)])
def test_ranks_find_what_one_process_finds(world, hessian):
    batches = in_batches(regression(64), 8)
    alone = gradient_noise_scale(linear(), F.mse_loss, batches, micro_batch=8, precision=1.0001, hessian=hessian)
    ranks = run(world, of_rank, world, hessian)
    assert all(found == ranks[0] for found in ranks)
    names = ["trace", "grad_norm2", "b_simple", "ci95", "micro_batches", "examples"]
    for name in [*names, "b_noise"] if hessian else names:
        assert getattr(ranks[0], name) == pytest.approx(getattr(alone, name), rel=1e-6), name


# ---- metrics ----


def test_in_the_metric_of_adam_it_is_that_of_scaled_coordinates():
    model, data = linear(), regression(256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-9, eps=1e-3)
    for x, y in in_batches(data, 64):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    model.weight.grad = None
    (metric,) = diagonal_metric(optimizer).values()
    found = gradient_noise_scale(model, F.mse_loss, data, optimizer=optimizer)
    root = metric.sqrt().reshape(-1)  # w = root z, so that gradients by z are root times those by w
    scaled = linear(ERROR / root)
    expected = gradient_noise_scale(scaled, F.mse_loss, (data[0] * root, data[1]))
    assert found.b_simple == pytest.approx(expected.b_simple, rel=1e-6)
    assert found.metric == "adam"


def test_metrics_of_optimizers():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    assert diagonal_metric(torch.optim.SGD([p], lr=0.1)) == {}
    adam = torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.5), eps=0.1)
    with pytest.raises(ValueError, match="at least one: its metric is in its state"):
        diagonal_metric(adam)
    for gradient in ([1.0, 2.0], [3.0, 1.0]):
        p.grad = torch.tensor(gradient)
        adam.step()
    second = torch.tensor([0.25 * 1 + 0.5 * 9, 0.25 * 4 + 0.5 * 1]) / 0.75
    torch.testing.assert_close(diagonal_metric(adam)[p], 1 / (second.sqrt() + 0.1))
    nlcg = NLCG([p], lr=0.1, precond="bfgs")
    assert set(diagonal_metric(nlcg)) == {p}


# ---- nothing is left behind ----


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x):
        return self.parts(x)


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_numbers_stay_as_they_were(fails):
    torch.manual_seed(4)
    model = Noisy()
    x, y = (part.float() for part in regression(64))
    F.mse_loss(model(x), y).backward()
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    state = torch.get_rng_state()
    calls = []

    def loss_fn(out, target):
        calls.append(1)
        if fails and len(calls) == 3:
            raise RuntimeError("midway")
        return F.mse_loss(out, target)

    if fails:
        with pytest.raises(RuntimeError, match="midway"):
            gradient_noise_scale(model, loss_fn, (x, y), micro_batch=8)
    else:
        gradient_noise_scale(model, loss_fn, (x, y), micro_batch=8)
    assert len(calls) == (3 if fails else 8)
    after = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_draws_the_same():
    torch.manual_seed(4)
    model = Noisy()
    data = tuple(part.float() for part in regression(64))
    one, same, other = (gradient_noise_scale(model, F.mse_loss, data, micro_batch=8, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one.trace != other.trace


def test_undisturbed_puts_buffers_back():
    model = Noisy()
    mean = model.parts[1].running_mean.clone()
    with undisturbed(model, 0):
        model(torch.randn(8, 5))
        assert not torch.equal(model.parts[1].running_mean, mean)
    assert torch.equal(model.parts[1].running_mean, mean)


# ---- what is refused ----

DATA = regression(64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be an integer >= 1"),
        ({"max_examples": 31}, "max_examples must be >= 32, two micro-batches, got 31"),
        ({"precision": 1.0}, "precision must be > 1"),
        ({"micro_batch": 40, "max_examples": 80}, "data must be at least two micro-batches of 40 examples"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"gradient_noise_scale: {message}"):
        gradient_noise_scale(linear(), F.mse_loss, DATA, **arguments)


def test_bad_losses_models_and_data():
    with pytest.raises(ValueError, match="the loss of a batch must be a finite 0-d tensor"):
        gradient_noise_scale(linear(), lambda out, y: out - y, DATA)
    with pytest.raises(ValueError, match="the loss of a batch must be a finite 0-d tensor"):
        gradient_noise_scale(linear(), lambda out, y: F.mse_loss(out, y) / 0, DATA)
    with pytest.raises(ValueError, match="the number of trainable parameters must be at least 1, got 0"):
        gradient_noise_scale(linear().requires_grad_(False), F.mse_loss, DATA)
    with pytest.raises(ValueError, match="micro_batch must be at least 2 with batch norm"):
        gradient_noise_scale(Noisy(), F.mse_loss, DATA, micro_batch=1)
    with pytest.raises(ValueError, match="the number of targets must be 64"):
        gradient_noise_scale(linear(), F.mse_loss, (DATA[0], DATA[1][:3]))
    with pytest.raises(ValueError, match="a batch must be a pair"):
        gradient_noise_scale(linear(), F.mse_loss, [DATA[0]])
    with pytest.raises(ValueError, match="0 < small < big"):
        moments(2.0, 1.0, 4, 4)
    with pytest.raises(ValueError, match=r"big must be at most 30 \(population\)"):
        moments(2.0, 1.0, 4, 40, population=30)


# ---- the jackknife ----


def test_the_interval_where_little_is_known():
    assert jackknife(Moments(2.0, 0.0), [], examples=10) == (5, (5, math.inf), True)
    assert jackknife(Moments(-1.0, 2.0), [], examples=10) == (0.0, (0.0, 0.0), False)
    assert jackknife(Moments(2.0, 1.0), [], examples=10) == (2.0, (0.0, math.inf), False)
    hardly = [Moments(2.0, 1.0), Moments(2.0, -0.1)]
    assert jackknife(Moments(2.0, 1.0), hardly, examples=10) == (2.0, (2.0, math.inf), False)


def test_quantiles_of_student():
    for freedom, expected in ((1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (15, 2.131), (127, 1.979)):
        assert student975(freedom) == pytest.approx(expected, abs=2e-3)
    assert all(a > b for a, b in pairwise(student975(k) for k in range(1, 50)))
