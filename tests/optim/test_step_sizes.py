"""Step sizes as rules: on arrays and tensors, inside NLCG, and in front of optimizers from elsewhere."""

import copy
import math

import numpy as np
import pytest
import torch
from tests.contract.problems import Regression, assert_same, parameters
from torch import nn

from conjugo.optim import NLCG, AdaGradNorm
from conjugo.optim._fused import kernels
from conjugo.optim.line_search import LineSearch
from conjugo.optim.step_sizes import Constant, Distance, NormGrowth, Polyak, Seen, StepSizeController

PATHS = [{"fused": False, "foreach": False}, {"fused": False, "foreach": True}] + ([{"fused": True}] if kernels else [])
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: "".join(k for k, v in path.items() if v) or "plain")

RULES = [
    Constant(),
    NormGrowth(b0=0.5),
    NormGrowth(first_step=0.1, bounds=(0.01, 0.5)),
    Distance(initial_distance=0.1),
    Polyak(minimum=0.2, bounds=(0.0, 3.0)),
    LineSearch(kind="online"),
]


def follow(rule, make):
    """Lengths and state over some steps of made-up measurements, in two independent scopes."""
    state = tuple(make([value, value]) for value in rule.start.values())
    rows = []
    for t in range(6):
        seen = Seen(
            step=make([float(t), float(t)]),
            lr=make([0.5, 2.0]),
            square=make([4.0 / (t + 1), 0.0 if t == 0 else 1.0]),
            loss=make([1.0 + (t == 3), 0.1]),
            norm=make([3.0, 0.0]),
            distance=make([0.1 * t, 0.0]),
        )
        verdict = rule(seen, state)
        state = verdict.state
        rows.append(np.array([np.asarray(verdict.length), *(np.asarray(value) for value in state)]))
    return np.array(rows)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_arrays_and_tensors_agree(rule):
    on_host = follow(rule, np.array)
    on_device = follow(rule, lambda values: torch.tensor(values, dtype=torch.float64))
    np.testing.assert_allclose(on_host, on_device, rtol=1e-15)
    assert np.isfinite(on_host).all()
    assert len(on_host[0]) == 1 + len(rule.start)


def test_polyak_by_hand():
    def length(loss, square=4.0):
        one = np.array(1.0)
        return Polyak(minimum=0.5)(Seen(step=0 * one, lr=one, square=square * one, loss=loss * one), ()).length

    assert length(2.5) == 0.5
    assert length(0.4) == 0.0  # below the minimum that was claimed: stay
    assert length(2.5, square=0.0) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NormGrowth(),
            r"NormGrowth: b0 must be given if first_step is None, and only then \(got None\), got None",
        ),
        (lambda: NormGrowth(b0=1.0, first_step=1.0), "NormGrowth: b0 must be given"),
        (lambda: NormGrowth(b0=math.inf), r"NormGrowth: b0 must be in \[0, inf\), got inf"),
        (lambda: NormGrowth(first_step=-1.0), r"NormGrowth: first_step must be in \(0, inf\), got -1.0"),
        (lambda: Distance(initial_distance=0.0), "Distance: initial_distance must be"),
        (lambda: Polyak(minimum=math.nan), "Polyak: minimum must be a finite number, got nan"),
        (lambda: Polyak(bounds=(0.0, 0.0)), r"Polyak: bounds must be a pair .* got \(0.0, 0.0\)"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- inside NLCG ----


@paths
def test_nlcg_without_momentum_takes_the_steps_of_adagrad_norm(path):
    """With beta 0 and no preconditioner both are gradient descent with the same rule."""
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    rule = NormGrowth(first_step=0.1)
    a = NLCG(ours, lr=3.0, precond="none", beta_max=0.0, line_search=rule, **path)
    b = AdaGradNorm(theirs, lr=3.0, first_step=0.1, **path)
    for t in range(6):
        for p, q in zip(ours, theirs):
            p.grad, q.grad = p.detach() * (t + 1), q.detach() * (t + 1)
        a.step()
        b.step()
        assert a.last["step_size"].item() == pytest.approx(b.last["step_size"].item(), rel=1e-13)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@paths
def test_nlcg_adds_up_what_the_preconditioner_makes_of_gradients(path):
    problem = Regression(torch.float64)
    optimizer = NLCG(problem.params, lr=1.0, line_search=NormGrowth(b0=0.5), **path)
    total = 0.25
    for _ in range(5):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
        total += optimizer.last["rho"].item()
        assert optimizer.last["step_size"].item() == pytest.approx(1 / math.sqrt(total), rel=1e-12)
        assert optimizer.last["base_lr"].item() == pytest.approx(optimizer.last["step_size"].item())


@paths
def test_nlcg_resumes_with_its_rule_bit_for_bit(path):
    problem = Regression()
    rule = NormGrowth(first_step=0.5)

    def step(optimizer, model):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()

    optimizer = NLCG(problem.params, lr=1.0, line_search=rule, **path)
    for _ in range(3):
        step(optimizer, problem)
    twin = copy.deepcopy(problem)
    fresh = NLCG(twin.params, lr=9.0, line_search=rule, **path)
    fresh.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        step(optimizer, problem)
        step(fresh, twin)
    assert_same([p.detach() for p in problem.params], [p.detach() for p in twin.params])


def test_a_rule_tames_a_learning_rate_that_is_a_thousand_times_too_large():
    losses = {}
    for name, rule in (("none", "none"), ("growth", NormGrowth(b0=1e-3))):
        problem = Regression(torch.float64)
        optimizer = NLCG(problem.params, lr=300.0, precond="none", beta_max=0.9, line_search=rule)
        for _ in range(200):
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["growth"] < 1e-2
    assert not losses["none"] < 1e3


def test_nlcg_takes_polyak_steps():
    problem = Regression(torch.float64)
    optimizer = NLCG(problem.params, lr=1.0, precond="none", beta_max=0.0, line_search=Polyak())
    first = problem.loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        optimizer.step(loss=loss)
    assert loss.item() < 1e-6 * first
    with pytest.raises(ValueError, match=r"line_search=Polyak.* needs the loss of each step"):
        optimizer.step()


def test_rules_that_nlcg_does_not_take():
    with pytest.raises(
        ValueError, match="NLCG: line_search must be a step size that needs no distance, got 'Distance'"
    ):
        NLCG(parameters(), line_search=Distance(), precond="bfgs")
    with pytest.raises(ValueError, match="NLCG: mode must be 'exact' with line_search=NormGrowth, got 'reference'"):
        NLCG(parameters(), line_search=NormGrowth(b0=1.0), mode="reference", precond="bfgs")


# ---- in front of others ----


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_sgd_under_control_is_adagrad_norm(tensor):
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    sgd = torch.optim.SGD(ours, lr=torch.tensor(3.0, dtype=torch.float64) if tensor else 3.0)
    StepSizeController(sgd, NormGrowth(b0=0.1))
    other = AdaGradNorm(theirs, lr=3.0, b0=0.1)
    for t in range(6):
        for p, q in zip(ours, theirs):
            p.grad, q.grad = p.detach() * (t + 1), q.detach() * (t + 1)
        sgd.step()
        other.step()
        assert float(sgd.param_groups[0]["lr"]) == pytest.approx(other.last["step_size"].item(), rel=1e-13)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def controlled(rule, params, lr=0.5):
    optimizer = torch.optim.SGD(params, lr=lr)
    return optimizer, StepSizeController(optimizer, rule)


def test_controller_by_hand():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, controller = controlled(NormGrowth(b0=1.0), [w])
    for square in (2.0, 3.0):
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert controller.step_size == pytest.approx(1 / math.sqrt(square))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / math.sqrt(square))
    w.grad = torch.full_like(w, math.nan)
    optimizer.step()
    assert controller.step_size == pytest.approx(1 / math.sqrt(3.0))  # not poisoned
    optimizer.zero_grad()
    optimizer.step()  # nothing to see


def test_controller_resumes_and_lets_go():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, controller = controlled(NormGrowth(first_step=0.1), [w])
    w.grad = torch.ones_like(w)
    optimizer.step()
    twin = copy.deepcopy(w)
    other, fresh = controlled(NormGrowth(first_step=0.1), [twin], lr=9.0)
    fresh.load_state_dict(controller.state_dict())
    for p, o in ((w, optimizer), (twin, other)):
        p.grad = torch.ones_like(p)
        o.step()
    assert controller.step_size == fresh.step_size
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    controller.remove()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 7.0


def test_controller_needs_the_loss_for_some_rules():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, controller = controlled(Polyak(), [w], lr=1.0)
    w.grad = torch.tensor([2.0], dtype=w.dtype)
    with pytest.raises(ValueError, match="StepSizeController: Polyak needs the loss: call observe_loss first"):
        optimizer.step()
    controller.observe_loss(torch.tensor(2.0))  # of w^2 / 2
    optimizer.step()
    assert w.item() == 1.0  # Polyak's step on a parabola goes half way
    with pytest.raises(ValueError, match="StepSizeController: rule must be one without distances, got 'Distance'"):
        StepSizeController(optimizer, Distance())
