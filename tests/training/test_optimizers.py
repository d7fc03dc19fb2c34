"""The catalogue: every name builds, trains, and says truthfully what is worth tuning."""

import inspect
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from conjugo.errors import UnknownName
from conjugo.training import optimizers
from conjugo.training.optimizers import build, entry, names


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([[2.0, -1.0], [0.5, 1.5]]))


def test_the_names():
    assert set(names()) == {
        "nlcg",
        "nlcg-online",
        "nlcg-step",
        "nlcg-fr",
        "nlcg-pr",
        "nlcg-hutchinson",
        "nlcg-gauss-newton",
        "nlcg-adam",
        "nlcg-orthogonal",
        "nlcg-kron",
        "sgd",
        "momentum",
        "nesterov",
        "frsgd",
        "adagrad-norm",
        "adamw",
        "muon",
        "soap",
        "rmsprop",
        "lars",
        "lamb",
        "mclr",
        "cblr",
        "cblr-secant",
    }


HERE = [name for name in names() if name != "soap" or find_spec("pytorch_optimizer")]
"""Those that can be built here."""


@pytest.mark.parametrize("name", HERE)
def test_each_one_lowers_a_loss(name):
    w = parameter()
    optimizer = build(name, [w])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (w.square() * torch.tensor([1.0, 3.0])).sum() / 2
        loss.backward()
        losses.append(loss.item())
        if getattr(optimizer, "needs_curvature", False):
            optimizer.observe([torch.tensor([1.0, 3.0]).expand(2, 2)])
        optimizer.step(**({"loss": loss.detach()} if entry(name).needs_loss else {}))
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("name", HERE)
def test_what_is_tuned_exists_and_both_ends_are_valid(name):
    item = entry(name)
    assert item.lr_range[0] <= item.lr <= item.lr_range[1]
    for lr in item.lr_range:
        assert build(name, [parameter()], lr=lr).param_groups[0]["lr"] == lr
    if item.second is not None:
        assert not item.second.log or item.second.low > 0
        for value in (item.second.low, item.second.high):
            optimizer = build(name, [parameter()], **{item.second.name: value})
            group = optimizer.param_groups[0]
            known = {**group, "beta1": group.get("betas", [None])[0]}
            if name == "adagrad-norm":
                known["first_step"] = optimizer.rule.first_step
            assert known[item.second.name] == value


def test_the_default_learning_rate_is_that_of_the_catalogue():
    for name in HERE:
        assert build(name, [parameter()]).param_groups[0]["lr"] == entry(name).lr


def test_fixed_options_and_what_overrides_them():
    group = build("rmsprop", [parameter()]).param_groups[0]
    assert (group["alpha"], group["momentum"], group["eps"]) == (0.9, 0.9, 1.0)
    assert build("rmsprop", [parameter()], eps=1e-8).param_groups[0]["eps"] == 1e-8
    assert build("nesterov", [parameter()]).param_groups[0]["nesterov"] is True
    assert build("sgd", [parameter()]).param_groups[0]["momentum"] == 0
    nlcg = build("nlcg-pr", [parameter()])
    assert nlcg.rule == "pr"


def test_scalar_betas_change_only_their_part():
    assert build("adamw", [parameter()], beta1=0.8).param_groups[0]["betas"] == (0.8, 0.999)
    assert build("lamb", [parameter()], beta2=0.95).param_groups[0]["betas"] == (0.9, 0.95)
    assert build("adamw", [parameter()], betas=(0.5, 0.6), beta1=0.7).param_groups[0]["betas"] == (0.7, 0.6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adamw"])
def test_torch_s_own_are_fused(name):
    assert build(name, [parameter()]).param_groups[0]["fused"] is True
    assert build(name, [parameter()], fused=False).param_groups[0]["fused"] is False


@pytest.mark.parametrize("name", ["nlcg", "adamw", "lars"])
def test_parameter_groups_and_generators(name):
    model = nn.Linear(3, 2)
    groups = [{"params": (p for p in [model.weight])}, {"params": model.bias, "weight_decay": 0.0}]
    optimizer = build(name, groups, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(2, 3), (2,)]
    assert len(build(name, model.parameters()).param_groups[0]["params"]) == 2


def test_only_the_line_search_needs_the_loss():
    assert [name for name in names() if entry(name).needs_loss] == ["nlcg-online", "nlcg-step"]
    w = parameter()
    w.sum().backward()
    with pytest.raises(ValueError, match="loss"):
        build("nlcg-step", [w]).step()


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownName, match="unknown optimizer 'adam'; did you mean 'adamw'"):
        entry("adam")
    with pytest.raises(UnknownName, match="'momentun'; did you mean 'momentum'"):
        build("sgd", [parameter()], momentun=0.9)
    with pytest.raises(UnknownName, match="option of optimizer 'sgd' 'beta1'"):
        build("sgd", [parameter()], beta1=0.9)


def test_bad_values_are_refused_by_the_optimizer():
    with pytest.raises(ValueError, match="beta_max"):
        build("nlcg", [parameter()], beta_max=2.0)
    with pytest.raises(ValueError, match="momentum"):
        build("lars", [parameter()], momentum=1.0)


def test_options_of_the_catalogue_are_options_of_the_optimizer():
    for name in names():
        item = optimizers.entry(name)
        assert set(item.options) <= set(inspect.signature(item.factory).parameters)


def test_parameters_in_bfloat16_on_a_cpu_are_moved():
    """The fused SGD of torch 2.13 leaves them nearly where they are."""
    p = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    for name in ("sgd", "momentum", "adamw"):
        optimizer = optimizers.build(name, [p], lr=0.25)
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (before - p >= 0.2).all(), name
