"""The advice: it disturbs nothing, is the same again, follows units, and says what can be checked."""

import copy
import json
import math
import random
import shlex
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.distributed.ranks import run
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from conjugo.cli.train import Arguments
from conjugo.optim import NLCG
from conjugo.scaling.laws import optimal_lr
from conjugo.studies import advice_plots, advise
from conjugo.studies.advice import duration, size
from conjugo.studies.probes import Problem
from conjugo.training.optimizers import names

LIMIT = {"max_examples": 60_000}


def data(n=512, d=8):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, d, generator=generator)
    return inputs, ((inputs * torch.linspace(0.2, 1, d)).sum(1) > 0).long()


def network(seed=0, extra=()):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), *extra, nn.Tanh(), nn.Linear(16, 2))


@pytest.fixture(scope="module")
def advice():
    return advise(network(), F.cross_entropy, data(), "sgd", target_loss=0.3, world_size=2, all_reduce=1e-3, **LIMIT)


# It disturbs nothing ----------------------------------------------------------------------------------------------------


def everything(model, optimizer):
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return (
        [tensor.clone() for tensor in tensors],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),  # noqa: NPY002
    )


def same(before, after):
    return (
        all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        and torch.equal(before[1], after[1])
        and before[2] == after[2]
        and (before[3] == after[3]).all()
    )


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.Adam(p, lr=0.01), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)]
)
@pytest.mark.parametrize("breaks", [False, True])
def test_model_gradients_optimizer_and_random_numbers_stay_as_they_were(make, breaks):
    model = network(extra=(nn.BatchNorm1d(16), nn.Dropout(0.1)))
    optimizer = make(model.parameters())
    inputs, targets = data()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[:64]), targets[:64]).backward()
        optimizer.step()
    calls = 0

    def loss_fn(outputs, wanted):
        nonlocal calls
        calls += 1
        if breaks and calls > 100:
            raise ZeroDivisionError
        return F.cross_entropy(outputs, wanted)

    before = everything(model, optimizer)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    call = lambda: advise(model, loss_fn, (inputs, targets), optimizer, **{**LIMIT, "max_examples": 20_000})  # noqa: E731
    if breaks:
        with pytest.raises(ZeroDivisionError):
            call()
    else:
        call()
    assert same(before, everything(model, optimizer))
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert model.training


def made_by(monkeypatch):
    """The optimizers of all probes that are made from now on."""
    made = []
    original = Problem.fresh

    def spy(self, lr):
        model, optimizer = original(self, lr)
        made.append((lr, optimizer))
        return model, optimizer

    monkeypatch.setattr(Problem, "fresh", spy)
    return made


def test_a_given_optimizer_is_gone_on_with(monkeypatch):
    """With its state, its settings and the ratios of its learning rates, frozen parameters and a warm-up that is at 0."""
    model = network()
    model[0].bias.requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    optimizer = torch.optim.Adam(groups, amsgrad=True)
    inputs, targets = data()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    made = made_by(monkeypatch)
    advise(model, F.cross_entropy, (inputs, targets), optimizer, mode="fast", max_examples=8000)
    assert len(made) > 5
    own = {id(p) for p in model.parameters()}
    for lr, other in made:
        assert [float(group["lr"]) for group in other.param_groups] == pytest.approx([lr, lr / 10])
        assert other.defaults["amsgrad"]
        assert not any(id(p) in own for g in other.param_groups for p in g["params"])
        step = next(iter(other.state.values()))["step"]
        assert float(step) >= 1


def test_nlcg_keeps_what_is_in_no_group(monkeypatch):
    model = network()
    inputs, targets = data()
    given = NLCG(model.parameters(), lr=0.1, rule="pr", line_search="online", precond="bfgs")
    made = made_by(monkeypatch)
    advise(model, F.cross_entropy, (inputs, targets), given, mode="fast", max_examples=20_000)
    assert made
    assert all(other.rule == "pr" and other.needs_loss for _, other in made)


@pytest.mark.parametrize(
    ("given", "power", "factor"),
    [
        ("sgd", 1.0, 2.5),
        ("momentum", 1.0, 5.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1.0, 5.0),
        (lambda p: torch.optim.NAdam(p, lr=0.1), 0.5, 2.5),
        (lambda p: NLCG(p, lr=0.1, precond="bfgs"), 0.75, 2.5),
    ],
)
def test_what_an_optimizer_is_goes_by_itself_and_not_by_its_name(given, power, factor):
    model = network()
    optimizer = given if isinstance(given, str) else given(model.parameters())
    found = advise(model, F.cross_entropy, data(), optimizer, target_loss=0.4, mode="fast", **LIMIT)
    assert found.lr_power == power
    b_crit = found.critical_batch
    assert b_crit.high / b_crit.low == pytest.approx(factor**2, rel=0.05)
    if not isinstance(given, str):
        with pytest.raises(ValueError, match="the optimizer must be one of conjugo train"):
            found.command()


@pytest.mark.parametrize("name", [name for name in names() if name not in ("nlcg-hutchinson", "nlcg-gauss-newton")])
def test_every_optimizer_of_the_catalogue_can_be_asked_about(name):
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    found = advise(network(), F.cross_entropy, data(), name, mode="fast", max_examples=20_000)
    assert found.target_loss < 0.75


def test_optimizers_that_measure_curvature_are_given_it():
    found = advise(network(), F.cross_entropy, data(), "nlcg-hutchinson", mode="fast", max_examples=6000)
    assert found.target_loss < 0.7


def test_an_optimizer_without_learning_rate_and_one_with_closures_are_refused():
    model = network()
    with pytest.raises(ValueError, match="learning rate of the optimizer must be > 0"):
        advise(model, F.cross_entropy, data(), torch.optim.SGD(model.parameters(), lr=0.0), **LIMIT)
    with pytest.raises(ValueError, match="steps need no closure"):
        advise(model, F.cross_entropy, data(), torch.optim.LBFGS(model.parameters()), **LIMIT)


def test_an_optimizer_of_another_model_is_refused():
    other = torch.optim.SGD(network(1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="one of the model's parameters"):
        advise(network(), F.cross_entropy, data(), other, **LIMIT)


# It is the same again ---------------------------------------------------------------------------------------------------

TIMED = ("seconds", "step_time", "memory", "fastest_batch", "recommended_batch", "rows")


def untimed(advice):
    return {name: value for name, value in advice.to_dict().items() if name not in TIMED}


def test_equal_seeds_give_equal_advice_and_others_do_not(advice):
    again = advise(network(), F.cross_entropy, data(), "sgd", target_loss=0.3, world_size=2, all_reduce=1e-3, **LIMIT)
    assert untimed(again) == untimed(advice)
    other = advise(network(), F.cross_entropy, data(), "sgd", target_loss=0.3, seed=5, **LIMIT)
    assert untimed(other)["probes"] != untimed(advice)["probes"]


def test_all_forms_of_data_and_of_optimizers_give_the_same(advice):
    dataset = TensorDataset(*data())
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    found = advise(
        network(),
        F.cross_entropy,
        loader,
        lambda params, lr: torch.optim.SGD(params, lr=lr),
        target_loss=0.3,
        world_size=2,
        all_reduce=1e-3,
        **LIMIT,
    )
    assert found.critical_batch == pytest.approx(advice.critical_batch, rel=1e-3)


def test_the_unit_of_the_loss_goes_into_the_learning_rate_only(advice):
    k = 8.0  # a power of two: rounding stays the same
    found = advise(
        network(),
        lambda outputs, targets: k * F.cross_entropy(outputs, targets),
        data(),
        "sgd",
        target_loss=0.3 * k,
        **LIMIT,
    )
    assert found.critical_batch == pytest.approx(advice.critical_batch, rel=1e-6)
    assert found.noise_scale.b_simple == pytest.approx(advice.noise_scale.b_simple, rel=1e-6)
    assert found.lambda_max == pytest.approx(advice.lambda_max * k, rel=1e-6)
    for batch in (4, 64, 512):
        assert found.lr(batch) == pytest.approx(advice.lr(batch) / k, rel=1e-6)
        assert found.steps(batch).value == pytest.approx(advice.steps(batch).value, rel=1e-6)


@pytest.mark.parametrize("extra", [(), (nn.BatchNorm1d(16),)])
def test_micro_batches_are_kept_to_and_change_neither_steps_nor_their_time(extra, advice):
    seen = []

    class Watched(nn.Linear):
        def forward(self, inputs):
            seen.append(len(inputs))
            return super().forward(inputs)

    torch.manual_seed(0)
    plain = network(extra=extra)
    model = nn.Sequential(Watched(8, 16), *plain[1:])
    model.load_state_dict(plain.state_dict())
    found = advise(model, F.cross_entropy, data(500), "sgd", target_loss=0.3, micro_batch=9, **LIMIT)
    assert max(seen) <= 16 if extra else max(seen) <= 9  # the noise of batch norm is measured with 16 at least
    assert min(seen) >= 2
    # A step with 512 examples takes 57 passes.
    small, large = found.step_time.measured[0][0], found.step_time.measured[-1][0]
    assert small == 9
    assert found.step_time.seconds(large) > 2 * found.step_time.seconds(small)


def test_more_time_than_examples_asks_for_makes_no_difference():
    def slow(outputs, targets):
        time.sleep(0.002)
        return F.cross_entropy(outputs, targets)

    quick = advise(network(), F.cross_entropy, data(), "sgd", target_loss=0.5, mode="fast", max_examples=10_000)
    later = advise(network(), slow, data(), "sgd", target_loss=0.5, mode="fast", max_examples=10_000)
    assert untimed(quick) == untimed(later)


def test_data_that_draw_random_numbers_are_the_same_again():
    inputs, targets = data(256)

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 256

        def __getitem__(self, i):
            jitter = torch.rand(8) + np.random.rand() + random.random()  # noqa: NPY002
            return inputs[i] + 0.01 * jitter, targets[i]

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        state = random.getstate()
        found.append(untimed(advise(network(), F.cross_entropy, Noisy(), "sgd", mode="fast", max_examples=8000)))
        assert random.getstate() == state
    assert found[0] == found[1]


def test_buffers_that_are_replaced_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = network()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, inputs):
            self.calls = self.calls + 1
            return self.linear(inputs)

    model = Counting()
    advise(model, F.cross_entropy, data(), "sgd", mode="fast", max_examples=5000)
    assert model.calls == 0


def test_bfloat16_models():
    model = network().bfloat16()
    inputs, targets = data()
    found = advise(model, F.cross_entropy, (inputs.bfloat16(), targets), "sgd", mode="fast", max_examples=20_000)
    assert found.lambda_max > 0
    assert not any("curvature" in warning for warning in found.warnings)


# What it says holds -----------------------------------------------------------------------------------------------------


def test_steps_are_those_that_runs_take(advice):
    """Trained by hand, without anything of ours."""
    inputs, targets = data()
    for batch in (16, 128, 512):
        taken = []
        for seed in range(6):
            model = network()
            generator = torch.Generator().manual_seed(seed)
            order = torch.empty(0, dtype=torch.long)
            optimizer = torch.optim.SGD(model.parameters(), lr=advice.lr(batch))
            step, loss = 0, math.inf
            while loss > 0.3:
                step += 1
                if len(order) < batch:
                    order = torch.randperm(len(inputs), generator=generator)
                rows, order = order[:batch], order[batch:]
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                optimizer.step()
                with torch.no_grad():
                    loss = float(F.cross_entropy(model(inputs), targets))
            taken.append(step)
        low, high = advice.steps(batch)[1:]
        assert low - 1 <= np.mean(taken) <= high + 1


def test_laws_between_and_beyond_the_probes(advice):
    batches = [2.0**k for k in range(1, 12)]
    steps = [advice.steps(b).value for b in batches]
    assert all(a > b for a, b in pairwise(steps))
    assert steps[0] / steps[1] > 1.7  # in proportion where batches are small
    assert steps[-2] / steps[-1] < 1.3
    lrs = [advice.lr(b) for b in batches]
    assert lrs[0] < lrs[4]
    b_crit = advice.critical_batch.value
    far = advice.lr(1) / advice.lr(2)
    assert far == pytest.approx(optimal_lr(1, 1, b_crit) / optimal_lr(2, 1, b_crit), rel=0.15)


def test_what_exploded_with_a_larger_batch_is_not_advised_for_a_smaller_one(advice):
    *smaller, large = advice.probes
    limit = advice.lr(32) / 2
    careful = replace(advice, probes=(*smaller, replace(large, race=replace(large.race, failed=(limit,)))))
    assert careful.lr(32) == pytest.approx(limit / math.sqrt(2))
    assert careful.lr(large.batch) == pytest.approx(limit / math.sqrt(2))
    assert careful.lr(large.batch + 1) == pytest.approx(advice.lr(large.batch + 1))


def test_batches_that_are_advised(advice):
    b_crit = advice.critical_batch.value
    assert advice.useful_batch == round(b_crit)
    assert advice.recommended_batch <= advice.max_batch
    assert 2 ** int(math.log2(advice.recommended_batch)) == advice.recommended_batch
    for efficiency in (0.3, 0.5, 0.8):
        careful = replace(advice, efficiency=efficiency)
        reached = 1 / (1 + careful.recommended_batch / b_crit)
        assert reached >= efficiency * 0.999 or careful.recommended_batch == advice.world_size
    many = replace(advice, world_size=96)
    assert many.recommended_batch >= 96
    assert min(many.batches()) >= 96
    grid = range(2, advice.max_batch + 1)
    fastest = min(grid, key=lambda batch: advice.seconds_to_target(batch))
    if 4 < advice.fastest_batch < advice.max_batch:
        # The law has no departure from the hyperbola: near enough in time, if not in size.
        assert advice.seconds_to_target(advice.fastest_batch) <= 1.1 * advice.seconds_to_target(fastest)
    base = advice.seconds_to_target(8, world_size=1)
    assert advice.speedup(64, 8) == pytest.approx(base / advice.seconds_to_target(64))
    step = advice.step_time
    two = step.seconds(64, workers=2, all_reduce=1e-3)
    assert two == pytest.approx(step.fixed + step.per_example * 32 + 1e-3)


@pytest.mark.parametrize("name", ["adam", "nlcg", "momentum"])
def test_other_optimizers(name):
    found = advise(network(), F.cross_entropy, data(), name, target_loss=0.3, max_examples=200_000)
    assert found.reached
    assert len(found.probes) == 3
    assert found.noise_along[0].metric == {"adam": "adamw", "nlcg": "nlcg", "momentum": "euclidean"}[name]
    assert found.steps(8).value > found.steps(64).value


def test_fast_mode_tries_one_batch_and_is_less_sure():
    limited = advise(network(), F.cross_entropy, data(), "sgd", target_loss=0.3, mode="fast", **LIMIT)
    assert len(limited.probes) == 1
    assert limited.critical_batch.value == pytest.approx(limited.expected_batch, rel=0.01)
    assert limited.critical_batch.high / limited.critical_batch.low == pytest.approx(2.5**2, rel=0.05)


def test_a_target_out_of_reach_is_told():
    found = advise(network(), F.cross_entropy, data(), "sgd", target_loss=1e-9, **{**LIMIT, "max_examples": 8000})
    assert not found.reached
    assert found.target_loss > 1e-9
    assert any("was not reached" in warning for warning in found.warnings)
    assert "Note: the target 1e-09 was not reached" in str(found)


def test_batch_norm_is_told():
    model = network(extra=(nn.BatchNorm1d(16),))
    found = advise(model, F.cross_entropy, data(), "sgd", target_loss=0.3, mode="fast", **LIMIT)
    assert any("batch norm" in warning for warning in found.warnings)
    assert found.noise_scale.micro_batch > 1


# What is shown ----------------------------------------------------------------------------------------------------------


def test_the_command_is_one_that_conjugo_train_accepts(advice):
    import tyro

    words = shlex.split(advice.command({"data": "digits", "model": "mlp"}))
    assert words[:2] == ["conjugo", "train"]
    read = tyro.cli(Arguments, args=words[2:])
    assert read.train.batch_size == advice.recommended_batch
    assert read.train.lr == pytest.approx(advice.lr(advice.recommended_batch), rel=0.01)
    assert read.train.steps == math.ceil(advice.steps(advice.recommended_batch).value)
    assert (read.train.optimizer, read.train.schedule, read.train.warmup, read.workers) == ("sgd", "constant", 0, 2)


def test_table_sentences_numbers_and_picture(advice, tmp_path):
    text = str(advice)
    assert f"Take batches of {advice.recommended_batch:,}" in text
    assert "95 %" in text
    advice.save(tmp_path / "advice.json")
    saved = json.loads((tmp_path / "advice.json").read_text())
    assert saved == json.loads(json.dumps(advice.to_dict()))
    assert [row["batch"] for row in saved["rows"]] == advice.batches()
    assert advice.batches()[-1] == advice.max_batch
    figure = advice_plots.steps_and_time(advice)
    assert len(figure.axes) == 2


def test_units():
    assert (duration(0.5), duration(200), duration(7200)) == ("500 ms", "3.33 min", "2 h")
    assert (size(0), size(3 * 2**30)) == ("0 B", "3.0 GiB")


# Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "branhc"}, "did you mean 'branch'"),
        ({"seconds": 0}, "seconds must be > 0"),
        ({"max_examples": 0}, "max_examples must be > 0"),
        ({"micro_batch": 1, "norm": True}, "micro_batch must be at least 2 with batch norm"),
        ({"efficiency": 1.0}, r"efficiency must be in \(0, 1\)"),
        ({"target_loss": math.nan}, "target_loss must be finite"),
        ({"target_loss": 99.0}, "target_loss must be below"),
        ({"world_size": 0}, "world_size must be >= 1"),
        ({"micro_batch": 0}, "micro_batch must be >= 1"),
        ({"all_reduce": -1.0}, "all_reduce must be"),
        ({"max_batch": 513}, r"max_batch must be in \[2, 512\]"),
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"optimizer": 3}, "optimizer must be a name"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"optimizer": "sgd", **LIMIT, **change}
    model = network(extra=(nn.BatchNorm1d(16),) if arguments.pop("norm", False) else ())
    with pytest.raises(ValueError, match=message):
        advise(model, F.cross_entropy, data(), **arguments)


def test_models_and_losses_that_cannot_be_are_named():
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="number of trainable parameters"):
        advise(frozen, F.cross_entropy, data(), **LIMIT)
    with pytest.raises(ValueError, match="the loss"):
        advise(network(), lambda o, t: F.cross_entropy(o, t) * math.nan, data(), **LIMIT)
    with pytest.raises(ValueError, match=r"the loss of a batch must be a 0-d tensor, got \(\d+,\)"):
        advise(network(), lambda o, t: F.cross_entropy(o, t, reduction="none"), data(), **LIMIT)
    with pytest.raises(ValueError, match="there was not enough time"):
        advise(network(), F.cross_entropy, data(), seconds=0.01)
    with pytest.raises(ValueError, match="no learning rate brings the loss down"):
        advise(network(), lambda o, t: 0 * F.cross_entropy(o, t) + 1, data(), **{**LIMIT, "max_examples": 200_000})


def test_a_batch_below_one_is_refused(advice):
    with pytest.raises(ValueError, match="batch must be in"):
        advice.steps(0)
    with pytest.raises(ValueError, match="batch must be in"):
        advice.lr(0.5)


def test_an_optimizer_that_cannot_be_copied_is_told():
    class Strange(torch.optim.SGD):
        def __deepcopy__(self, memo):
            raise TypeError("not this one")

    model = network()
    with pytest.raises(ValueError, match=r"Strange cannot be copied \(not this one\).* function of \(parameters, lr\)"):
        advise(model, F.cross_entropy, data(), Strange(model.parameters(), 0.1), **LIMIT)


def test_nlcg_goes_on_with_its_state():
    model = network()
    inputs, targets = data()
    nlcg = NLCG(model.parameters(), lr=0.1, precond="bfgs")
    for _ in range(3):
        nlcg.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        nlcg.step()
    found = advise(model, F.cross_entropy, (inputs, targets), nlcg, target_loss=0.3, mode="fast", **LIMIT)
    assert found.reached
    assert found.noise_along[0].metric == "nlcg"


# Several ranks ----------------------------------------------------------------------------------------------------------


def advise_on_a_rank(target):
    model = network(seed=torch.distributed.get_rank())  # rank 0's is the one that counts
    try:
        found = advise(model, F.cross_entropy, data(), "sgd", target_loss=target, mode="fast", **LIMIT)
    except ValueError as error:
        return str(error)
    return untimed(found), found.all_reduce


def test_all_ranks_get_what_rank_0_finds_alone():
    alone = untimed(advise(network(), F.cross_entropy, data(), "sgd", target_loss=0.3, mode="fast", **LIMIT))
    (first, took), (second, took_too) = run(2, advise_on_a_rank, 0.3)
    assert first == second
    assert took == took_too > 0
    assert first["world_size"] == 2
    assert {k: v for k, v in first.items() if k not in ("world_size", "all_reduce")} == {
        k: v for k, v in alone.items() if k not in ("world_size", "all_reduce")
    }
    messages = run(2, advise_on_a_rank, 99.0)
    assert messages[0] == messages[1]
    assert "target_loss must be below" in messages[0]


def test_where_memory_asks_for_large_micro_batches_small_steps_are_timed(monkeypatch):
    """And not two of the largest kind, which may take minutes."""
    monkeypatch.setattr("conjugo.studies.throughput.available_memory", lambda device: 39_000)
    found = advise(network(), F.cross_entropy, data(), "sgd", target_loss=0.4, mode="fast", **LIMIT)
    assert found.micro_batch == 256
    assert found.step_time.measured[0][0] == 4
