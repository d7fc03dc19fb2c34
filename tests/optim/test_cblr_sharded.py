"""CBLR and MCLR on parameters that lie on several ranks: the steps of one process, where medians allow."""

import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.distributed.test_nlcg import entire, fresh, problem
from tests.test_space import EVEN, LAYOUTS, laid_out
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from conjugo._space import to_local
from conjugo.optim import CBLR, MCLR, layer_curvature, layer_rates

OPTIONS = {
    "ratio": {},
    "ratio, nesterov, decay, vectors": {"nesterov": True, "weight_decay": 0.1, "exempt": lambda name, p: False},
    "mean": {"statistic": "mean"},
    "max": {"statistic": "max"},
    "secant": {"estimator": "secant"},
    "secant, max": {"estimator": "secant", "statistic": "max", "maximize": True},
    "fisher": {"estimator": "fisher", "statistic": "mean"},
    "hutchinson": {"estimator": "hutchinson", "every": 3},
}
LAYOUTS = [layout for layout in LAYOUTS if layout != "slices"]
STEPS = 8


def made(name, params):
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.03}]
    return CBLR(groups, lr=0.5, trust=0.1, **OPTIONS[name])


def step(params, layout, optimizer, number):
    _, grads = problem(entire(params), number)
    for i, (p, g) in enumerate(zip(params, laid_out(grads, layout), strict=True)):
        p.grad = g + (i + 1) * (p * p.detach() - p.detach() ** 2) if optimizer.needs_graph else g
    optimizer.step()


def trained(layout):
    found = {}
    for name in OPTIONS:
        params = fresh(layout)
        optimizer = made(name, params)
        for number in range(STEPS):
            step(params, layout, optimizer, number)
        found[name] = entire(params), optimizer.last
    return found


@pytest.fixture(scope="module")
def alone():
    return trained("whole")


WORLDS = [
    pytest.param(world, layout, marks=pytest.mark.slow if world == 4 and layout not in EVEN else [])
    for world in (2, 3, 4)
    for layout in LAYOUTS
    if world % 2 == 0 or layout not in EVEN
]


@pytest.mark.parametrize(("world", "layout"), WORLDS)
def test_every_layout_takes_the_steps_of_one_process(world, layout, alone):
    everyone = ranks.run(world, trained, layout)
    for name, (wanted, last) in alone.items():
        assert all(not torch.equal(p, q) for p, q in zip(wanted, fresh("whole"), strict=True))
        for found in everyone:
            for p, q in zip(found[name][0], wanted, strict=True):
                assert torch.allclose(p, q, rtol=1e-6, atol=1e-9), name
            for key, value in last.items():
                assert torch.allclose(found[name][1][key], value, rtol=1e-6, equal_nan=True), name
            assert all(torch.equal(p, q) for p, q in zip(found[name][0], everyone[0][name][0], strict=True))


# ---- medians ----


def large(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(37, 50), (64, 32, 3, 3), (400, 100)]
    return [torch.randn(shape, generator=generator) * 10.0**-i for i, shape in enumerate(shapes)]


def medians(layout, sample):
    """Curvatures in a step, quantiles, rates, and the collectives of the next step."""
    ws, gs = large(1), large(2)
    gs[0][:9] = 0  # dead units, most of them on one rank
    params = [nn.Parameter(w) for w in laid_out(ws, layout)]
    for p, g in zip(params, laid_out(gs, layout), strict=True):
        p.grad = g
    quantiles = [
        layer_curvature([p.grad for p in params], params, statistic="quantile", quantile=q, sample=sample)
        for q in (0.1, 0.5, 0.9)
    ]
    rates = layer_rates(params, sample=sample)
    optimizer = MCLR(params, sample=sample)
    optimizer.step()
    curvature = optimizer.last["curvature"]
    with CommDebugMode() as mode:
        optimizer.step()
    return curvature, torch.stack(quantiles), torch.stack(rates), mode.get_total_counts()


@pytest.mark.parametrize(
    ("world", "layout"), [(2, "fsdp"), (3, "tensor parallel"), (4, "hsdp"), (2, "mixed with whole")]
)
def test_medians_come_from_histograms(world, layout):
    """To 2 % of the median of one process; all ranks agree."""
    (exact, quantiles, rates, _), everyone = medians("whole", None), ranks.run(world, medians, layout, None)
    for found in everyone:
        torch.testing.assert_close(found[0], exact, rtol=0.02, atol=0)
        torch.testing.assert_close(found[1], quantiles, rtol=0.02, atol=0)
        torch.testing.assert_close(found[2], rates, rtol=0.02, atol=0)
        assert found[3] == 1
        assert all(torch.equal(a, b) for a, b in zip(found[:3], everyone[0][:3], strict=True))


def test_samples_of_shards():
    exact = medians("whole", None)[0]
    for found in ranks.run(2, medians, "fsdp", 4096):
        torch.testing.assert_close(found[0], exact, rtol=0.06, atol=0)  # over twice the standard error
        assert not torch.equal(found[0], exact)


# ---- collectives, skipped steps, state ----


def collectives(layout, name):
    params = fresh(layout)
    optimizer = made(name, params)
    step(params, layout, optimizer, 0)
    _, grads = problem(entire(params), 1)
    for p, g in zip(params, laid_out(grads, layout), strict=True):
        p.grad = g
    with CommDebugMode() as mode:
        optimizer.step()
    return mode.get_total_counts()


@pytest.mark.parametrize("name", ["ratio", "mean", "max", "secant", "fisher"])
def test_one_collective_a_step(name):
    assert ranks.run(2, collectives, "fsdp", name) == [1, 1]
    assert ranks.run(2, collectives, "whole", name) == [0, 0]


def skipping(name):
    params = fresh("fsdp")
    optimizer = made(name, params)
    step(params, "fsdp", optimizer, 0)
    before = [*entire(params), *(to_local(t).clone() for p in params for t in optimizer.state[p].values())]
    _, grads = problem(entire(params), 1)
    for p, g in zip(params, laid_out(grads, "fsdp"), strict=True):
        p.grad = g
    if dist.get_rank() == 1:
        to_local(params[0].grad).view(-1)[0] = math.nan
    optimizer.step()
    after = [*entire(params), *(to_local(t) for p in params for t in optimizer.state[p].values())]
    changed = [a for a, b in zip(after, before, strict=True) if not torch.equal(a, b)]
    return len(changed), optimizer.skipped_steps.item(), len(params)


@pytest.mark.parametrize("name", ["ratio", "secant", "fisher"])
def test_a_nan_in_one_shard_is_skipped_by_all(name):
    for changed, skipped, n in ranks.run(2, skipping, name):
        assert skipped == 1
        assert changed == n  # the counters


def round_trip(name, saved, layout):
    params = [nn.Parameter(p) for p in laid_out(saved["params"], layout)]
    optimizer = made(name, params)
    optimizer.load_state_dict(saved["optimizer"])
    step(params, layout, optimizer, 3)
    state = optimizer.state_dict()
    values = {i: dict(zip(s, entire(s.values()), strict=True)) for i, s in state["state"].items()}
    return {"params": entire(params), "optimizer": state | {"state": values}}


@pytest.mark.parametrize("name", ["ratio", "secant"])
def test_state_moves_between_layouts(name):
    params = fresh("whole")
    optimizer = made(name, params)
    for number in range(3):
        step(params, "whole", optimizer, number)
    saved = {"params": entire(params), "optimizer": optimizer.state_dict()}
    later = round_trip(name, ranks.run(3, round_trip, name, saved, "fsdp")[1], "whole")
    for _ in range(2):
        step(params, "whole", optimizer, 3)
    for p, q in zip(params, later["params"], strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
