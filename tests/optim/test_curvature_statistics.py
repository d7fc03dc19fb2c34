"""The curvature of a layer: known quadratics, numbers worked out by hand, NumPy, and what does not count."""

import math

import numpy as np
import pytest
import torch

from conjugo.errors import UnknownName
from conjugo.optim import LARS, layer_curvature, layer_rates
from conjugo.optim.curvature_statistics import Quotient, Summary, curvature_rates, samples
from conjugo.optim.lars import lars_trust_ratio

STATISTICS = [("norm", None), ("median", None), ("mean", None), ("max", None), ("quantile", 0.3)]
LISTS = pytest.mark.parametrize("lists", [False, True], ids=["one by one", "lists"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def powers(*, zero):
    """Weights 1, 2, ..., 512 as a matrix, and gradients 1, the last one 0 if *zero*."""
    w = 2.0 ** torch.arange(10, dtype=torch.float64).reshape(2, 5)
    g = torch.ones_like(w)
    g[1, 4] = 0.0 if zero else 1.0
    return w, g


# ---- what it should be ----


@pytest.mark.parametrize(("statistic", "quantile"), STATISTICS)
def test_a_quadratic_with_its_minimum_at_zero(statistic, quantile):
    ws, curvatures = [random(3, 4), random(2, 3, 4, seed=1), random(30, 2, seed=2)], [0.5, 100.0, 3e-4]
    gs = [a * w for a, w in zip(curvatures, ws)]
    found = layer_curvature(gs, ws, statistic=statistic, quantile=quantile, delta=0.0)
    assert found.tolist() == pytest.approx(curvatures, rel=1e-12)


def test_norms_are_the_quotient_of_lars():
    w, g = random(20, 30), random(20, 30, seed=1)
    curvature = layer_curvature([g], [w], statistic="norm")
    assert curvature.item() == pytest.approx((g.norm() / w.norm()).item(), rel=1e-12)
    for decay in (0.0, 0.1):
        rate = curvature_rates(curvature, trust=0.02, weight_decay=decay, fallback=1.0, bounds=(0.0, math.inf))
        lars = lars_trust_ratio(w.norm(), g.norm(), coefficient=0.02, weight_decay=decay, eps=0.0)
        assert rate.item() == pytest.approx(lars.item(), rel=1e-12)


@LISTS
def test_coordinates_without_gradient_do_not_count(lists):
    w, g = powers(zero=True)
    parts = Summary("median").parts([[Quotient(g.flatten(), w.flatten())]], None, lists=lists)
    assert parts[:, 0].tolist() == [2.0**-4, 9]
    assert layer_curvature([g], [w]).item() == pytest.approx(2.0**-4, rel=1e-7)


def test_the_median_of_an_even_number_is_the_lower_one():
    w, g = powers(zero=False)
    assert layer_curvature([g], [w]).item() == pytest.approx(2.0**-5, rel=1e-7)
    w, g = 2.0 ** torch.arange(8.0).reshape(2, 4), torch.ones(2, 4)
    assert layer_curvature([g], [w]).item() == pytest.approx(2.0**-4, rel=1e-6)


def test_pruned_weights_do_not_count():
    w, g = random(10, 10), random(10, 10, seed=1)
    few = layer_curvature([g[:4]], [w[:4]])
    w[4:] = 0
    assert layer_curvature([g], [w]).item() == few.item()


@pytest.mark.parametrize("statistic", ["median", "mean", "max", "norm"])
def test_where_there_is_no_curvature(statistic):
    zero, w = torch.zeros(4, 4), torch.ones(4, 4)
    found = layer_curvature([zero, w, w[:0]], [w, zero, w[:0]], statistic=statistic).tolist()
    assert not any(math.isfinite(value) and value > 0 for value in found)


def test_fewer_than_eight_coordinates_have_no_median():
    w, g = torch.ones(4, 4), torch.zeros(4, 4)
    g.view(-1)[:7] = 1
    assert layer_curvature([g], [w]).isnan().all()
    g.view(-1)[7] = 1
    assert layer_curvature([g], [w]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("statistic", ["norm", "median", "mean", "max"])
def test_laws_of_scale(statistic):
    w, g = random(9, 9), random(9, 9, seed=1)
    one = layer_curvature([g], [w], statistic=statistic, delta=0.0)
    # A net whose output does not change with the scale of its weights; its relative step does not change either.
    other = layer_curvature([g / 4], [4 * w], statistic=statistic, delta=0.0)
    torch.testing.assert_close(other, one / 16, rtol=1e-12, atol=0)
    scaled = layer_curvature([1e5 * g], [w], statistic=statistic, delta=0.0)
    torch.testing.assert_close(scaled, 1e5 * one, rtol=1e-12, atol=0)


# ---- samples ----


def test_samples_are_of_all_columns():
    rows = torch.arange(256.0).expand(512, 256).contiguous()
    (taken,), weight = samples([rows], 2048, torch.float64)
    assert len(set(taken.tolist())) == 256
    assert len(taken) <= 2048
    assert weight * len(taken) == pytest.approx(rows.numel())


def test_samples_of_tensors_in_different_order_are_aligned():
    a = random(40, 50)
    b = a.t().contiguous().t()
    assert a.stride() != b.stride()
    (x, y), _ = samples([a, b], 100, torch.float64)
    assert torch.equal(x, y)


def test_the_error_of_a_sample_is_as_promised():
    errors = []
    for seed in range(12):
        w, g = random(300, 400, seed=seed), random(300, 400, seed=100 + seed)
        exact = layer_curvature([g], [w], sample=None)
        assert exact.item() == pytest.approx(np.median((g / w).abs().numpy()), rel=1e-4)
        errors.append((layer_curvature([g], [w], sample=1000) / exact - 1).item())
    assert 0 < np.sqrt(np.mean(np.square(errors))) < 1.6 / math.sqrt(1000)


@LISTS
@pytest.mark.parametrize("position", [0.001, 0.25, 0.5, 0.9, 0.999])
def test_elements_of_sorted_lists(lists, position):
    """All layers at once, some of them empty, give what NumPy gives for each."""
    rng = np.random.default_rng(3)
    layers = [rng.normal(size=n) * (rng.random(n) < 0.7) for n in (50, 0, 1, 333, 8, 0)]
    quotients = [[Quotient(torch.tensor(x), None)] for x in layers]
    element, count = Summary("quantile", position).parts(quotients, None, lists=lists)
    assert count.tolist() == [np.count_nonzero(x) for x in layers]
    for value, x in zip(element.tolist(), layers):
        sizes = np.sort(np.abs(x[x != 0]))
        if len(sizes):
            assert value == sizes[math.floor(position * (len(sizes) - 1))]


# ---- rates ----


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_rates(kind):
    curvature = kind([2.0, 0.0, math.nan, math.inf, 1e-3])
    options = {"trust": 0.5, "weight_decay": 0.5, "fallback": 3.0}
    rates = curvature_rates(curvature, bounds=(0.0, math.inf), **options)
    assert rates.tolist() == pytest.approx([0.2, 1.5, 1.5, 1.5, 0.5 / 0.501])
    assert curvature_rates(curvature, bounds=(0.4, 0.9), **options).tolist() == pytest.approx([0.4, 0.9, 0.9, 0.9, 0.9])


def test_rates_in_front_of_another_optimizer():
    """With the norm LARS is gradient descent whose gradients are scaled."""
    ours, theirs = ([torch.nn.Parameter(random(4, 3)), torch.nn.Parameter(random(3))] for _ in range(2))
    descent = torch.optim.SGD(ours, lr=1.0)
    lars = LARS(theirs, lr=1.0, momentum=0.0, trust_coefficient=0.1, eps=0.0)
    for step in range(3):
        for params in (ours, theirs):
            for p in params:
                p.grad = random(*p.shape, seed=step)
        rates = layer_rates(ours, trust=0.1, statistic="norm", exempt_scale=1.0)
        assert [(r.shape, r.dtype) for r in rates] == [((), torch.float64)] * 2
        torch._foreach_mul_([p.grad for p in ours], rates)
        descent.step()
        lars.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 0.5}, "layer_curvature: quantile must be None unless statistic='quantile', got 0.5"),
        ({"statistic": "quantile", "quantile": 0.0}, r"quantile must be in \(0, 1\) .*, got 0.0"),
        ({"sample": 0}, "layer_curvature: sample must be None or >= 8, got 0"),
        ({"delta": -1.0}, r"layer_curvature: delta must be in \[0, inf\), got -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        layer_curvature([torch.ones(2, 2)], [torch.ones(2, 2)], **options)


def test_unknown_statistics_and_shapes_that_differ():
    with pytest.raises(UnknownName, match="unknown layer_curvature statistic 'meen'; did you mean 'mean'"):
        layer_curvature([torch.ones(2, 2)], [torch.ones(2, 2)], statistic="meen")
    with pytest.raises(ValueError, match=r"shapes of grads must be those of params, \[\(2, 3\)\], got \[\(2, 2\)\]"):
        layer_curvature([torch.ones(2, 2)], [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="shapes of grads must be"):
        layer_curvature([], [])
    with pytest.raises(ValueError, match="layer_rates: params without gradient must be none, got 1"):
        layer_rates([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"layer_rates: trust must be in \(0, inf\), got 0.0"):
        layer_rates([torch.nn.Parameter(torch.ones(2, 2))], trust=0.0)
