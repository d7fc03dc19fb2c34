"""The noise scale of SGD: its formulas, networks in two parameterisations, stacks of them, and the best value."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conjugo.errors import UnknownName
from conjugo.scaling import normalized_noise_scale, width
from conjugo.scaling.width import (
    NTKConv2d,
    NTKLinear,
    OptimalNoiseScale,
    StackedMLP,
    batch_for,
    convert,
    convnet,
    critical_width,
    hidden_layers,
    layer_noise_scales,
    lr_for,
    mlp,
    optimal_noise_scale,
    parameter_groups,
    sgd_noise_scale,
    widened,
    width_law,
)

# ---- formulas ----


def test_the_noise_scale_of_a_known_case():
    assert normalized_noise_scale(0.1, 128, 50_000, 2 / 512) == 10_000
    assert normalized_noise_scale(0.01, 128, 50_000, 2 / 512, momentum=0.9) == pytest.approx(10_000, rel=1e-12)
    assert sgd_noise_scale(0.1, 128, 50_000) == 0.1 * 50_000 / 128


def test_exact_is_without_repetition():
    assert sgd_noise_scale(2.0, 100, 400) == 8
    assert sgd_noise_scale(2.0, 100, 400, exact=True) == 6
    assert normalized_noise_scale(2.0, 400, 400, 0.5, exact=True) == 0
    assert sgd_noise_scale(1.0, 1, 10**6, exact=True) == pytest.approx(sgd_noise_scale(1.0, 1, 10**6), rel=1e-5)


@pytest.mark.parametrize(("momentum", "exact"), [(0.0, False), (0.9, False), (0.0, True), (0.9, True)])
def test_inverses(momentum, exact):
    gbar = normalized_noise_scale(0.3, 48, 1000, 0.02, momentum, exact=exact)
    assert lr_for(gbar, 48, 1000, 0.02, momentum, exact=exact) == pytest.approx(0.3, rel=1e-12)
    assert batch_for(gbar, 0.3, 1000, 0.02, momentum, exact=exact) == pytest.approx(48, rel=1e-12)


def test_the_noise_that_is_meant():
    """The variance of the mean of B values out of N: 1 / B of one value's with repetition; without, it goes with N / B - 1."""
    n, b = 6, 3
    g = torch.randn(n, dtype=torch.float64)
    with_repetition = torch.stack([g[list(rows)].mean() for rows in itertools.product(range(n), repeat=b)])
    without = torch.stack([g[list(rows)].mean() for rows in itertools.combinations(range(n), b)])
    one = g.var(correction=0)
    assert with_repetition.var(correction=0) / one == pytest.approx(sgd_noise_scale(1.0, b, n) / n, rel=1e-12)
    exact = sgd_noise_scale(1.0, b, n, exact=True)
    assert without.var(correction=0) / one == pytest.approx(exact / (n - 1), rel=1e-12)


def test_critical_width():
    assert critical_width(kappa=2.0, n_train=400, lr_max=4.0, init_var=0.5) == 1600
    w = critical_width(kappa=2.0, n_train=400, lr_max=4.0, init_var=0.5)
    assert batch_for(2.0 * w, 4.0, 400, 0.5) == pytest.approx(1)


def test_widened():
    """A network four times as wide has four times the gbar, at the same distance from the limit of stability."""
    lr, batch = widened(2.0, 64, 4, parameterization="ntk")
    assert (lr, batch) == (2.0, 16)
    assert normalized_noise_scale(lr, batch, 1000, 1.0) == 4 * normalized_noise_scale(2.0, 64, 1000, 1.0)
    lr, batch = widened(0.1, 64, 4, parameterization="standard")
    assert lr / 0.1 == pytest.approx((1 / 400) / (1 / 100))  # the largest stable one falls with the fan-in
    gbar = normalized_noise_scale(lr, batch, 1000, 1 / 400)
    assert gbar == pytest.approx(4 * normalized_noise_scale(0.1, 64, 1000, 1 / 100))
    assert widened(2.0, 64, 0.5, parameterization="ntk").batch == 128


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd_noise_scale(0.0, 8, 100), "sgd_noise_scale: lr must be a finite number > 0, got 0.0"),
        (lambda: sgd_noise_scale(math.nan, 8, 100), "lr must be"),
        (lambda: sgd_noise_scale(0.1, 101, 100), r"batch must be in \(0, n_train = 100\], got 101"),
        (lambda: sgd_noise_scale(0.1, 0, 100), "batch must be"),
        (lambda: sgd_noise_scale(0.1, 8, 0), "n_train must be >= 1"),
        (lambda: sgd_noise_scale(0.1, 8, 100, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: normalized_noise_scale(0.1, 8, 100, 0.0), "normalized_noise_scale: init_var must be"),
        (lambda: lr_for(-1.0, 8, 100, 1.0), "lr_for: gbar must be"),
        (lambda: lr_for(1.0, 8, 100, math.inf), "lr_for: init_var must be"),
        (lambda: lr_for(1.0, 100, 100, 1.0, exact=True), "less than n_train = 100"),
        (lambda: batch_for(1.0, 0.0, 100, 1.0), "batch_for: lr must be"),
        (lambda: batch_for(math.inf, 1.0, 100, 1.0), "batch_for: gbar must be"),
        (lambda: critical_width(0.0, 100, 1.0, 1.0), "critical_width: kappa must be"),
        (lambda: critical_width(1.0, 100, 1.0, -1.0), "critical_width: init_var must be"),
        (lambda: widened(1.0, 8, 16, parameterization="ntk"), "factor must be at most 8"),
        (lambda: widened(1.0, 8, 0, parameterization="ntk"), "factor must be"),
        (lambda: mlp((5,)), "at least two numbers"),
        (lambda: mlp((5, 0, 2)), "at least two numbers"),
        (lambda: mlp((5, 2), weight_var=0.0), "weight_var"),
        (lambda: convnet(1, 0, 10), "width must be >= 1"),
        (lambda: NTKLinear(3, 2, weight_var=-1.0), "NTKLinear: weight_var"),
        (lambda: NTKConv2d(3, 2, 3, weight_var=math.inf), "NTKConv2d: weight_var"),
        (lambda: hidden_layers(nn.Linear(3, 2)), "at least two linear layers"),
        (lambda: parameter_groups(nn.Linear(3, 2), 0.0), "lr must be"),
        (lambda: StackedMLP((3, 2), seeds=[]), "one seed for each run"),
        (lambda: StackedMLP((3, 2), seeds=[0], momentum=1.0), "momentum must be"),
        (lambda: StackedMLP((3, 2), seeds=[0]).model(1), r"run must be in \[0, 1\)"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_parameterization_gets_suggestions():
    for call in (
        lambda: widened(1.0, 8, 2, parameterization="standart"),
        lambda: mlp((3, 2), "standart"),
        lambda: convnet(1, 2, 3, "standart"),
        lambda: convert(nn.Linear(3, 2), "standart"),
    ):
        with pytest.raises(UnknownName, match="did you mean 'standard'"):
            call()


def test_exports():
    assert width.normalized_noise_scale is normalized_noise_scale


# ---- two parameterisations ----

NETWORKS = {
    "mlp": (lambda form: mlp((12, 20, 16, 5), form, weight_var=2.0, seed=3, dtype=torch.float64), (24, 12)),
    "convnet": (lambda form: convnet(3, 6, 5, form, weight_var=2.0, seed=3, dtype=torch.float64), (24, 3, 8, 8)),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_both_parameterisations_are_one_function_at_every_step(name, momentum):
    build, shape = NETWORKS[name]
    inputs, targets = torch.randn(shape, dtype=torch.float64), torch.randint(5, shape[:1])
    models = [build("ntk"), build("standard")]
    optimizers = [torch.optim.SGD(parameter_groups(model, 0.5), lr=1.0, momentum=momentum) for model in models]
    begun = models[0](inputs).detach()
    assert begun.std() > 0.1
    for _ in range(20):
        outputs = [model(inputs) for model in models]
        assert (outputs[0] - outputs[1]).abs().max() < 1e-12
        for out, optimizer in zip(outputs, optimizers):
            optimizer.zero_grad()
            F.cross_entropy(out, targets).backward()
            optimizer.step()
    assert (models[0](inputs) - begun).abs().max() > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_gbar_is_the_same_in_both_parameterisations(name):
    build, _ = NETWORKS[name]
    forms = {form: build(form) for form in ("ntk", "standard")}
    noise = {}
    for form, model in forms.items():
        rates = {id(p): group["lr"] for group in parameter_groups(model, 0.5) for p in group["params"]}
        modules = dict(model.named_modules())
        noise[form] = [
            normalized_noise_scale(rates[id(modules[layer.name].weight)], 8, 400, layer.init_var)
            for layer in hidden_layers(model)
        ]
    assert noise["ntk"] == pytest.approx(noise["standard"], rel=1e-12)


def test_layers_are_drawn_as_they_say():
    torch.manual_seed(1)
    dense, conv = NTKLinear(300, 200, weight_var=0.7), NTKConv2d(8, 64, 5, groups=2, weight_var=2.0)
    assert dense.weight.var().item() == pytest.approx(0.7, rel=0.03)
    assert conv.weight.var().item() == pytest.approx(2.0, rel=0.05)
    assert not dense.bias.any()
    x = torch.randn(500, 300)
    assert dense(x).var().item() == pytest.approx(0.7, rel=0.05)  # whatever the width
    assert conv(torch.randn(4, 8, 9, 9)).var().item() == pytest.approx(2.0, rel=0.15)
    assert NTKLinear(3, 2, bias=False).bias is None
    standard = mlp((300, 200, 5), "standard", weight_var=0.7)[1]
    assert type(standard) is nn.Linear
    assert standard.weight.var().item() == pytest.approx(0.7 / 300, rel=0.03)


def test_converting_there_and_back():
    torch.manual_seed(2)
    tied = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), tied, nn.LayerNorm(6), tied, nn.Linear(6, 2, bias=False)).double()
    model[5].weight.requires_grad_(False)
    x, kept = torch.randn(7, 4, dtype=torch.float64), model.state_dict()
    kept = {name: value.clone() for name, value in kept.items()}
    ntk = convert(model, "ntk")
    assert [type(layer) for layer in ntk] == [NTKLinear, nn.ReLU, NTKLinear, nn.LayerNorm, NTKLinear, NTKLinear]
    assert ntk[2] is ntk[4]
    assert not ntk[5].weight.requires_grad
    assert (ntk(x) - model(x)).abs().max() < 1e-14
    back = convert(ntk, "standard")
    assert type(back[0]) is nn.Linear
    assert (back(x) - model(x)).abs().max() < 1e-14
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())  # the model is as it was
    assert type(convert(nn.Linear(3, 2), "ntk")) is NTKLinear
    assert type(convert(ntk, "ntk")[0]) is NTKLinear  # nothing to do


def test_a_weight_shared_with_another_kind_of_module_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"convert: model must be .* got \['Embedding'\]"):
        convert(model, "ntk")


def test_rates_of_a_standard_network():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    groups = parameter_groups(model, 0.9)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model[0].weight)] == pytest.approx(0.9 / 18)
    assert rates[id(model[3].weight)] == pytest.approx(0.9 / 16)
    assert {rates[id(p)] for p in (model[0].bias, model[1].weight, model[3].bias)} == {0.9}
    assert len(rates) == len(list(model.parameters()))
    assert [group["lr"] for group in parameter_groups(convert(model, "ntk"), 0.9)] == [0.9]


def test_hidden_layers():
    model = mlp((30, 400, 300, 5), "standard", weight_var=2.0)
    first, second = hidden_layers(model)
    assert (first.name, first.fan_in, second.fan_in) == ("3", 400, 300)
    assert first.init_var == pytest.approx(2 / 400, rel=0.02)
    noise = layer_noise_scales(model, 0.1, 8, 400)
    assert noise["3"] == pytest.approx(0.1 * 400 / 8 * 400 / 2, rel=0.02)
    assert set(noise) == {"3", "5"}
    nn.init.zeros_(model[5].weight)
    with pytest.raises(ValueError, match="layer '5' must be weights that are finite and not all 0"):
        layer_noise_scales(model, 0.1, 8, 400)


# ---- stacks ----


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_a_stack_is_a_loop_over_single_networks(momentum):
    """With own weights, data, learning rate and batch size of each run."""
    sizes, seeds, sharing = (7, 11, 9, 4), (5, 2, 8), torch.tensor([6, 2, 5])
    rates = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    stack = StackedMLP(sizes, seeds, weight_var=2.0, momentum=momentum, dtype=torch.float64)
    assert stack.runs == 3
    models = [mlp(sizes, weight_var=2.0, seed=seed, dtype=torch.float64) for seed in seeds]
    optimizers = [torch.optim.SGD(m.parameters(), lr=float(r), momentum=momentum) for m, r in zip(models, rates)]
    for _ in range(15):
        inputs, targets = torch.randn(3, 6, 7, dtype=torch.float64), torch.randint(4, (3, 6))
        losses = stack.step(inputs, targets, rates, sharing)
        for r, (model, optimizer) in enumerate(zip(models, optimizers)):
            rows = slice(0, int(sharing[r]))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[r, rows]), targets[r, rows])
            loss.backward()
            optimizer.step()
            assert abs(float(losses[r]) - loss.item()) < 1e-12
    test = torch.randn(5, 7, dtype=torch.float64)
    for r, model in enumerate(models):
        assert (stack.logits(test)[r] - model(test)).abs().max() < 1e-12
        assert (stack.model(r)(test) - model(test)).abs().max() < 1e-12
    own = torch.randn(3, 5, 7, dtype=torch.float64)
    assert (stack.logits(own)[1] - models[1](own[1])).abs().max() < 1e-12


def test_one_rate_and_whole_batches_in_a_stack():
    stack = StackedMLP((7, 5, 4), (1, 2), dtype=torch.float64)
    model = mlp((7, 5, 4), seed=2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, targets = torch.randn(2, 6, 7, dtype=torch.float64), torch.randint(4, (2, 6))
    stack.step(inputs, targets, 0.5)
    F.cross_entropy(model(inputs[1]), targets[1]).backward()
    optimizer.step()
    assert (stack.model(1)(inputs[1]) - model(inputs[1])).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(6, 7)}, r"inputs must be of shape \[2, B, 7\], got \(6, 7\)"),
        ({"inputs": torch.zeros(1, 6, 7)}, "inputs must be"),
        ({"inputs": torch.zeros(2, 6, 8)}, "inputs must be"),
        ({"inputs": torch.zeros(2, 0, 7)}, "inputs must be"),
        ({"targets": torch.zeros(2, 5, dtype=torch.int64)}, r"targets must be of shape \[2, 6\]"),
        ({"lr": torch.ones(3)}, r"lr must be of shape \[2\], got \(3,\)"),
        ({"counts": torch.ones(1)}, "counts must be"),
    ],
)
def test_a_step_of_other_shapes_is_refused(change, message):
    stack = StackedMLP((7, 5, 4), (1, 2))
    before = [weight.clone() for weight in stack.weights]
    arguments = {"inputs": torch.zeros(2, 6, 7), "targets": torch.zeros(2, 6, dtype=torch.int64), "lr": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        stack.step(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, stack.weights))


def test_a_run_that_diverges_leaves_the_others_alone():
    together, alone = (StackedMLP((6, 8, 3), seeds) for seeds in ((0, 1), (1,)))
    rates = torch.tensor([1e20, 0.1])
    for _ in range(8):
        inputs, targets = torch.randn(2, 4, 6), torch.randint(3, (2, 4))
        together.step(inputs, targets, rates)
        alone.step(inputs[1:], targets[1:], 0.1)
    assert together.finite().tolist() == [False, True]
    assert torch.allclose(together.weights[0][1], alone.weights[0][0], atol=1e-6)


# ---- the best noise scale ----

BATCHES = [2.0**k for k in range(10)]
RUNS = {"lr": 2.0, "n_train": 1000, "init_var": 0.5}


def scan(best=4.3, sd=0.006, seeds=12, seed=0, bend=0.002):
    """Accuracies whose mean is a parabola in log2 of the batch with its top at *best*."""
    noise = np.random.default_rng(seed).normal(size=(len(BATCHES), seeds))
    return 0.9 - bend * (np.log2(BATCHES)[:, None] - best) ** 2 + sd * noise


def test_a_parabola_without_noise_is_found_exactly():
    found = optimal_noise_scale(scan(sd=0.0), BATCHES, **RUNS)
    assert found.batch == pytest.approx(2**4.3, rel=1e-9)
    assert found.gbar == pytest.approx(2.0 * 1000 / (2**4.3 * 0.5), rel=1e-9)
    assert found.accuracy == pytest.approx(0.9 - 0.002 * 0.3**2)
    assert found.points == 5
    assert found.interval == pytest.approx((found.gbar, found.gbar))
    assert (found.at_edge, found.edge_share, found.diverged) == (False, 0.0, 0)


def test_the_interval_contains_the_truth_as_often_as_it_says():
    truth = normalized_noise_scale(batch=2**4.3, **RUNS)
    found = [optimal_noise_scale(scan(seed=s), BATCHES, **RUNS, resamples=100, seed=s) for s in range(300)]
    covered = np.mean([low <= truth <= high for low, high in (f.interval for f in found)])
    assert 0.91 <= covered <= 0.985  # of 300 at 95 %: three standard errors are 0.038
    errors = np.log([f.gbar / truth for f in found])
    assert abs(errors.mean()) < 3 * errors.std() / math.sqrt(300)
    assert np.mean([f.log_stderr for f in found]) == pytest.approx(errors.std(), rel=0.15)
    narrow = [optimal_noise_scale(scan(seed=s), BATCHES, **RUNS, resamples=50, level=0.5) for s in range(100)]
    assert 0.35 <= np.mean([low <= truth <= high for low, high in (f.interval for f in narrow)]) <= 0.65


def test_next_to_a_cliff_the_parabola_is_narrower():
    """Training breaks down at small batches; a parabola through five points there would have its top far off."""
    table = scan(best=4.0, sd=0.004)
    table[:4] = 0.1 + 0.01 * np.random.default_rng(5).normal(size=(4, 12))  # up to batch 8; the best is at 16
    found = optimal_noise_scale(table, BATCHES, **RUNS)
    assert found.points == 3
    assert 16 <= found.batch <= 16 * 2**0.5
    low, high = found.interval
    assert low < found.gbar < high
    assert found.accuracy == found.means[4]
    usual = [optimal_noise_scale(scan(seed=s), BATCHES, **RUNS).points for s in range(200)]
    assert np.mean(np.array(usual) < 5) < 0.04  # the test's level is 1 %
    shared = scan() + np.random.default_rng(1).normal(size=12)  # what seeds share does not hide the cliff
    shared[:4] -= 0.8
    assert optimal_noise_scale(shared, BATCHES, **RUNS).points == 3
    assert optimal_noise_scale(table, BATCHES, **RUNS, points=6).points in (3, 4)
    bump = scan(best=4.0, sd=0.004)
    bump[2] -= 0.02  # small, but ten times the error of what is orthogonal to parabolas
    assert optimal_noise_scale(bump, BATCHES, **RUNS).points == 3


def test_what_all_batch_sizes_of_a_seed_share_does_not_widen_the_interval():
    shared = np.random.default_rng(1).normal(size=12)
    one, other = (optimal_noise_scale(table, BATCHES, **RUNS) for table in (scan(), scan() + shared))
    assert other.gbar == pytest.approx(one.gbar, rel=1e-9)
    assert other.log_stderr == pytest.approx(one.log_stderr, rel=1e-9)


def test_the_order_of_rows_and_the_unit_do_not_matter():
    order = np.random.default_rng(2).permutation(len(BATCHES))
    found = optimal_noise_scale(100 * scan()[order], [BATCHES[i] for i in order], **RUNS)
    straight = optimal_noise_scale(scan(), BATCHES, **RUNS)
    assert found.gbar == pytest.approx(straight.gbar, rel=1e-9)
    assert found.interval == pytest.approx(straight.interval, rel=1e-9)
    assert found.batches == tuple(BATCHES)


def test_momentum_and_variance_are_in_the_result():
    plain = optimal_noise_scale(scan(), BATCHES, **RUNS)
    with_momentum = optimal_noise_scale(scan(), BATCHES, **RUNS, momentum=0.9)
    assert with_momentum.gbar == pytest.approx(10 * plain.gbar)
    assert with_momentum.batch == pytest.approx(plain.batch)


def test_an_optimum_at_the_edge_is_flagged():
    for best, end in ((-3.0, BATCHES[0]), (12.0, BATCHES[-1])):
        found = optimal_noise_scale(scan(best=best), BATCHES, **RUNS)
        assert found.at_edge
        assert found.edge_share > 0.9
        assert found.batch == pytest.approx(end)


def test_a_best_batch_in_a_valley_is_no_optimum():
    valley = optimal_noise_scale(scan(bend=-0.002), BATCHES, **RUNS)
    assert valley.at_edge
    rows = np.array([0.0, 10.0, 0.0, 10.1, 0.0, 10.0, 0.0])  # the five around the best bend upwards
    found = optimal_noise_scale(np.stack([rows, rows], 1), BATCHES[:7], **RUNS)
    assert found.at_edge
    assert found.batch == pytest.approx(BATCHES[3])


def test_runs_that_diverged_are_dropped():
    table = scan(sd=0.001)
    table[0] = math.nan  # the smallest batch: all
    table[1, 1:] = math.inf  # all but one
    table[4, 3] = math.nan
    found = optimal_noise_scale(table, BATCHES, **RUNS)
    assert found.diverged == 12 + 11 + 1
    assert found.batches == tuple(BATCHES[2:])
    assert found.batch == pytest.approx(2**4.3, rel=0.05)
    assert found.means[2] == pytest.approx(np.nanmean(table[4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracies": [1.0, 2.0]}, "accuracies must be a table"),
        ({"accuracies": scan()[:, :1]}, "at least two seeds"),
        ({"accuracies": scan()[:9]}, "batches must be one for each of 9 rows"),
        ({"accuracies": np.full((10, 5), math.nan)}, "at least 5 batch sizes"),
        ({"batches": [1.0] * 10}, "distinct sizes"),
        ({"batches": [2.0**k for k in range(1, 11)]}, "batch must be"),
        ({"points": 2}, "points must be >= 3"),
        ({"resamples": 5}, "resamples must be >= 50"),
        ({"level": 1.0}, "level must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"momentum": -0.1}, "momentum must be"),
    ],
)
def test_bad_scans_are_named(change, message):
    arguments = {"accuracies": scan(), "batches": BATCHES, **RUNS, **change}
    with pytest.raises(ValueError, match=message):
        optimal_noise_scale(arguments.pop("accuracies"), arguments.pop("batches"), **arguments)


def optimum(gbar, log_stderr=0.1, at_edge=False):
    return OptimalNoiseScale(
        gbar=gbar,
        interval=(gbar / 2, gbar * 2),
        log_stderr=log_stderr,
        batch=1.0,
        accuracy=0.9,
        at_edge=at_edge,
        edge_share=float(at_edge),
        points=5,
        batches=(),
        means=(),
        diverged=0,
    )


def test_a_power_law_is_found():
    widths = [16, 32, 64, 128]
    law = width_law(widths, [optimum(3 * w**0.8) for w in widths])
    assert law.exponent == pytest.approx(0.8)
    assert law.factor == pytest.approx(3)
    assert law.gbar(256) == pytest.approx(3 * 256**0.8)
    # By hand: points at log 16 + (0, 1, 2, 3) log 2, errors 0.1 and no scatter, t of two degrees of freedom.
    stderr = 0.1 / (math.log(2) * math.sqrt(5))
    assert law.stderr == pytest.approx(stderr)
    assert law.interval == pytest.approx((0.8 - 4.30265 * stderr, 0.8 + 4.30265 * stderr), rel=1e-5)
    proportional = width_law(widths, [optimum(5.0 * w) for w in widths])
    assert proportional.kappa == pytest.approx(5)


def test_the_law_weighs_its_points_and_leaves_out_edges():
    widths = [16, 32, 64, 128, 256]
    found = [optimum(float(w)) for w in widths[:3]] + [optimum(1e6, log_stderr=100.0), optimum(1e9, at_edge=True)]
    law = width_law(widths, found)
    assert law.exponent == pytest.approx(1, abs=1e-3)
    assert (law.widths, law.left_out) == ((16, 32, 64, 128), (256,))


def test_scatter_beyond_the_errors_widens_the_interval():
    widths, off = [16, 32, 64, 128], [1.0, 2.0, 0.5, 1.0]
    laws = [width_law(widths, [optimum(w * o, s) for w, o in zip(widths, off)]) for s in (1e-3, 1e-2, 0.0)]
    assert laws[0].stderr == pytest.approx(laws[1].stderr, rel=1e-6)
    assert laws[2].stderr == pytest.approx(laws[1].stderr, rel=1e-6)
    assert laws[0].stderr > 0.2


def test_coverage_of_the_exponent():
    rng = np.random.default_rng(3)
    widths = np.array([16, 32, 64, 128, 256])
    errors = np.array([0.1, 0.2, 0.1, 0.3, 0.1])
    hits = []
    for _ in range(400):
        gbars = 3 * widths * np.exp(errors * rng.normal(size=5))
        low, high = width_law(widths.tolist(), [optimum(g, e) for g, e in zip(gbars, errors)]).interval
        hits.append(low <= 1 <= high)
    assert np.mean(hits) >= 0.93  # t with three degrees of freedom is wide where the errors are known


@pytest.mark.parametrize(
    ("widths", "optima", "message"),
    [
        ([1, 2], [optimum(1.0)] * 3, "one for each of 2 widths"),
        ([1, 2, 0], [optimum(1.0)] * 3, "widths must be"),
        ([1, 2, 3], [optimum(1.0), optimum(1.0), optimum(1.0, at_edge=True)], "at least three different widths"),
        ([2, 2, 3], [optimum(1.0)] * 3, "at least three different widths"),
    ],
)
def test_bad_laws_are_named(widths, optima, message):
    with pytest.raises(ValueError, match=message):
        width_law(widths, optima)
    with pytest.raises(ValueError, match="level"):
        width_law([1, 2, 3], [optimum(1.0)] * 3, level=0.0)
    with pytest.raises(ValueError, match=r"WidthLaw\.gbar"):
        width_law([1, 2, 3], [optimum(1.0)] * 3).gbar(-1)
