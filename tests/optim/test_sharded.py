"""Optimizers and the weight average on parameters that lie on several ranks: the steps of one process."""

import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.distributed.test_nlcg import entire, fresh, problem
from tests.distributed.test_virtual_batch import cross_entropy, examples, network, wrapped
from tests.test_space import EVEN, LAYOUTS, laid_out
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode

from conjugo._space import to_local
from conjugo.distributed import share
from conjugo.optim import CBLR, FRSGD, LAMB, LARS, AdaGradNorm, WeightEMA

OPTIMIZERS = {
    "lars": lambda groups: LARS(groups, lr=20.0),
    "lars, nesterov, decay, vectors": lambda groups: LARS(
        groups, lr=20.0, nesterov=True, weight_decay=0.01, adapt_vectors=True
    ),
    "lamb": lambda groups: LAMB(groups, lr=0.05),
    "lamb, decay, vectors, ascent": lambda groups: LAMB(
        groups, lr=0.01, weight_decay=0.1, adapt_vectors=True, maximize=True
    ),
    "frsgd": lambda groups: FRSGD(groups, lr=0.01),
    "frsgd, nesterov, tensors": lambda groups: FRSGD(groups, lr=0.01, nesterov=True, scope="tensor", beta_max=0.9),
    "frsgd, groups, decoupled": lambda groups: FRSGD(groups, lr=0.01, scope="group", decoupled=True, lr_in_buffer=True),
    "adagrad-norm": lambda groups: AdaGradNorm(groups, lr=3.0, first_step=0.1),
    "adagrad-norm, momentum, tensors": lambda groups: AdaGradNorm(groups, b0=0.1, momentum=0.9, scope="tensor"),
    "adagrad-norm, distance": lambda groups: AdaGradNorm(groups, distance=True, initial_distance=0.01),
    "cblr": lambda groups: CBLR(groups, lr=0.5, trust=0.1),
    "cblr, nesterov, decay, vectors": lambda groups: CBLR(
        groups, lr=0.5, trust=0.1, nesterov=True, weight_decay=0.1, exempt=lambda name, p: False
    ),
    "cblr, mean": lambda groups: CBLR(groups, lr=0.5, trust=0.1, statistic="mean"),
    "cblr, max": lambda groups: CBLR(groups, lr=0.5, trust=0.1, statistic="max"),
    "cblr, secant": lambda groups: CBLR(groups, lr=0.5, trust=0.1, estimator="secant"),
    "cblr, secant, max, ascent": lambda groups: CBLR(
        groups, lr=0.05, trust=0.1, estimator="secant", statistic="max", maximize=True
    ),
    "cblr, fisher": lambda groups: CBLR(groups, lr=0.5, trust=1e-3, estimator="fisher", statistic="mean"),
    "cblr, hutchinson": lambda groups: CBLR(groups, lr=0.5, trust=0.1, estimator="hutchinson", every=3),
}
LAYOUTS = [layout for layout in LAYOUTS if layout != "slices"]
STEPS = 20


def grouped(name, params):
    half = len(params) // 2
    return OPTIMIZERS[name]([{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.03}])


def step(params, layout, optimizer, number):
    _, grads = problem(entire(params), number)
    for i, (p, g) in enumerate(zip(params, laid_out(grads, layout), strict=True)):
        p.grad = g + (i + 1) * (p * p.detach() - p.detach() ** 2) if getattr(optimizer, "needs_graph", False) else g
        if layout == "tensor parallel" and g.ndim == 0:  # as with sequence parallelism
            p.grad = DTensor.from_local(g.to_local() / dist.get_world_size(), g.device_mesh, [Partial()])
    optimizer.step()


def trained(layout):
    found = {}
    for name in OPTIMIZERS:
        params = fresh(layout)
        optimizer = grouped(name, params)
        for number in range(STEPS):
            step(params, layout, optimizer, number)
        found[name] = entire(params), getattr(optimizer, "last", {})
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
                assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), name
            assert found[name][1].keys() == last.keys()
            for key, value in last.items():
                torch.testing.assert_close(
                    found[name][1][key], value, rtol=1e-6, atol=0, equal_nan=True, msg=f"{name}: {key}"
                )
            assert all(torch.equal(p, q) for p, q in zip(found[name][0], everyone[0][name][0], strict=True))


def trained_model(layout):
    """Weights after training, and on examples the outputs of the averaged weights, and of these again."""
    x, y = examples(8)
    model = wrapped(layout)
    if dist.is_initialized():
        x, y = (share(t, dist.get_rank(), dist.get_world_size()) for t in (x, y))
    found = {}
    for name in OPTIMIZERS:
        if "hutchinson" in name:  # needs gradients with a graph
            continue
        optimizer = grouped(name, list(model.parameters()))
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model, (x, y)).backward()
            optimizer.step()
        found[name] = entire(model.parameters())
    return found


@pytest.mark.parametrize(("world", "layout"), [(2, "ddp"), (2, "fsdp"), (4, "hsdp")])
def test_training_a_model(world, layout):
    torch.manual_seed(0)
    wanted = trained_model("alone")
    everyone = ranks.run(world, trained_model, layout)
    for name, weights in wanted.items():
        for found in everyone:
            for p, q in zip(found[name], weights, strict=True):
                assert torch.allclose(p, q, rtol=1e-5, atol=1e-8), name
            assert all(torch.equal(p, q) for p, q in zip(found[name], everyone[0][name], strict=True))


def collectives(layout, name):
    params = fresh(layout)
    optimizer = grouped(name, params)
    step(params, layout, optimizer, 0)
    _, grads = problem(entire(params), 1)
    for p, g in zip(params, laid_out(grads, layout), strict=True):
        p.grad = g
    with CommDebugMode() as mode:
        optimizer.step()
    return mode.get_total_counts()


@pytest.mark.parametrize(
    ("layout", "name", "count"),
    [
        ("whole", "lars", 0),
        ("whole", "lamb", 0),
        ("fsdp", "lars", 1),
        ("fsdp", "lamb", 2),
        ("mixed with whole", "lamb", 2),
        ("whole", "frsgd", 0),
        ("fsdp", "frsgd", 1),
        ("fsdp", "frsgd, nesterov, tensors", 1),
        ("fsdp", "adagrad-norm", 1),
        ("fsdp", "adagrad-norm, distance", 2),
        ("whole", "cblr", 0),
        ("whole", "cblr, mean", 0),
        ("whole", "cblr, max", 0),
        ("whole", "cblr, secant", 0),
        ("whole", "cblr, fisher", 0),
        ("fsdp", "cblr", 1),
        ("fsdp", "cblr, mean", 1),
        ("fsdp", "cblr, max", 1),
        ("fsdp", "cblr, secant", 1),
        ("fsdp", "cblr, fisher", 1),
    ],
)
def test_norms_travel_packed(layout, name, count):
    assert ranks.run(2, collectives, layout, name) == [count] * 2


def skipping(name):
    params = fresh("fsdp")
    optimizer = grouped(name, params)
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


@pytest.mark.parametrize(
    "name", ["lars", "lamb", "frsgd", "adagrad-norm", "adagrad-norm, distance", "cblr", "cblr, secant", "cblr, fisher"]
)
def test_a_nan_in_one_shard_is_skipped_by_all(name):
    for changed, skipped, n in ranks.run(2, skipping, name):
        assert skipped == 1
        assert changed == n  # the counters


def round_trip(name, saved, layout):
    params = [nn.Parameter(p) for p in laid_out(saved["params"], layout)]
    optimizer = grouped(name, params)
    optimizer.load_state_dict(saved["optimizer"])
    step(params, layout, optimizer, 3)
    state = optimizer.state_dict()
    values = {i: dict(zip(s, entire(s.values()), strict=True)) for i, s in state["state"].items()}
    return {"params": entire(params), "optimizer": state | {"state": values}}


@pytest.mark.parametrize("name", ["lars", "lamb", "frsgd", "adagrad-norm, distance", "cblr", "cblr, secant"])
def test_state_moves_between_layouts(name):
    params = fresh("whole")
    optimizer = grouped(name, params)
    for number in range(3):
        step(params, "whole", optimizer, number)
    saved = {"params": entire(params), "optimizer": optimizer.state_dict()}
    later = round_trip(name, ranks.run(3, round_trip, name, saved, "fsdp")[1], "whole")
    for _ in range(2):
        step(params, "whole", optimizer, 3)
    for p, q in zip(params, later["params"], strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


class Holder(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.params = nn.ParameterList(fresh(layout))


def averages(layout, loaded=None):
    """Averages after some updates, what the model has while they are lent, and its own weights again."""
    model = Holder(layout)
    ema = WeightEMA(model, 0.9)
    if loaded is not None:
        ema.load_state_dict(loaded)
    with CommDebugMode() as mode:
        for number in range(3):
            with torch.no_grad():
                for p in model.params:
                    to_local(p).mul_(1 + number)
            ema.update()
        with ema.averaged():
            lent = [to_local(p).detach().clone() for p in model.params]
    state = ema.state_dict()
    found = dict(zip(state["averages"], entire(state["averages"].values()), strict=True))
    assert mode.get_total_counts() == 0
    assert all(torch.equal(a, to_local(b)) for a, b in zip(lent, state["averages"].values(), strict=True))
    return state | {"averages": found}, entire(model.params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_average(layout):
    wanted, own = averages("whole")
    onward, _ = averages("whole", wanted)
    for found, weights in ranks.run(2, averages, layout):
        assert found["updates"] == 3
        for name, average in wanted["averages"].items():
            assert torch.equal(found["averages"][name], average)
        assert all(torch.equal(a, b) for a, b in zip(weights, own, strict=True))
    found, _ = ranks.run(2, averages, layout, wanted)[1]
    assert all(torch.equal(found["averages"][name], onward["averages"][name]) for name in onward["averages"])


def lent_to_shards(whole_modules):
    """Outputs with the own weights, the averages, and the own again; *whole_modules* keep whole parameters after each."""
    model = network().double()
    if dist.is_initialized():
        for part in (model[0], model) if whole_modules else (model,):
            fully_shard(part, reshard_after_forward=not whole_modules)
    x, _ = examples(8)
    with torch.no_grad():
        model(x)
        ema = WeightEMA(model, 0.9)
        for p in ema._parameters.values():
            to_local(p).add_(1.0)
        ema.update()
        model.eval()
        model(x)
        outputs = [model(x)]
        with ema.averaged():
            outputs.append(model(x))
        outputs.append(model(x))
    return outputs


@pytest.mark.parametrize("whole_modules", [True, False])
def test_averages_reach_modules_that_kept_whole_parameters(whole_modules):
    alone = lent_to_shards(whole_modules)
    for outputs in ranks.run(2, lent_to_shards, whole_modules):
        for found, wanted in zip(outputs, alone, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-12)
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.allclose(outputs[0], outputs[1])


def by_rows(layout):
    params = fresh(layout)
    optimizer = AdaGradNorm(params, b0=0.1, scope="row", momentum=0.5)
    for number in range(STEPS):
        step(params, layout, optimizer, number)
    return entire(params), entire(optimizer.state[p]["row_squares"] for p in params)


def test_rows_of_shards_are_rows():
    wanted = by_rows("whole")
    for found in ranks.run(2, by_rows, "fsdp"):
        for ours, theirs in zip(found, wanted, strict=True):
            for p, q in zip(ours, theirs, strict=True):
                assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


def refused():
    with pytest.raises(RuntimeError, match="AdaGradNorm: scope='row' takes parameters sharded by rows, got"):
        AdaGradNorm(fresh("tensor parallel"), b0=0.1, scope="row")
    return True


def test_rows_that_are_cut_are_refused():
    assert all(ranks.run(2, refused))


def clipped(layout):
    """FRSGD with the norm that clipping has worked out."""
    x, y = examples(8)
    model = wrapped(layout)
    if dist.is_initialized():
        x, y = (share(t, dist.get_rank(), dist.get_world_size()) for t in (x, y))
    optimizer, betas = FRSGD(model.parameters(), lr=0.05), []
    for _ in range(6):
        optimizer.zero_grad()
        cross_entropy(model, (x, y)).backward()
        optimizer.step(grad_norm=nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        betas.append(optimizer.last["beta"].item())
    return betas


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_norm_from_clipping(layout):
    torch.manual_seed(0)
    wanted = clipped("alone")
    assert len({round(beta, 3) for beta in wanted}) > 2  # clipping alone would make all norms equal
    for found in ranks.run(2, clipped, layout):
        assert found == pytest.approx(wanted, rel=1e-4)
