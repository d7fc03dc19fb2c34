"""CBLR and MCLR against known quadratics, LARS, and a plain NumPy twin."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from conjugo.optim import CBLR, LARS, MCLR

IMPLEMENTATIONS = pytest.mark.parametrize(
    "how", [{"fused": False, "foreach": False}, {"foreach": True}, {}], ids=["plain", "foreach", "default"]
)
ESTIMATORS = ["ratio", "secant", "hutchinson", "fisher"]


def parameter(values):
    return nn.Parameter(torch.tensor(np.asarray(values, dtype=np.float64)))


def step(optimizer, *gradients):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients):
        p.grad = torch.as_tensor(g, dtype=p.dtype).clone()
    optimizer.step()


class Quadratic:
    """f = sum over layers of a/2 |w - c|^2: the curvature of layer l is a_l, whatever the statistic."""

    CURVATURES = (0.01, 1.0, 3000.0)

    def __init__(self, centre=0.0):
        rng = np.random.default_rng(8)
        self.centre = centre
        self.params = [parameter(rng.normal(size=shape)) for shape in ((3, 4), (5, 2), (2, 3, 2))]

    def loss(self):
        pairs = zip(self.CURVATURES, self.params)
        return sum(a / 2 * (w - self.centre).square().sum() for a, w in pairs)

    def closure(self):
        grads = torch.autograd.grad(self.loss(), self.params, create_graph=True)
        for p, g in zip(self.params, grads):
            p.grad = g
        return self.loss()


# ---- quadratics ----


@IMPLEMENTATIONS
@pytest.mark.parametrize("statistic", ["norm", "median", "mean", "max"])
@pytest.mark.parametrize("estimator", ["ratio", "secant", "hutchinson"])
def test_one_step_reaches_the_minimum_of_a_quadratic(how, estimator, statistic):
    problem = Quadratic()
    optimizer = CBLR(problem.params, trust=1.0, momentum=0.0, estimator=estimator, statistic=statistic, **how)
    optimizer.step(problem.closure)
    assert optimizer.last["curvature"].tolist() == pytest.approx(problem.CURVATURES, rel=1e-6)
    assert all(p.abs().max() < 1e-5 for p in problem.params)


@pytest.mark.parametrize("statistic", ["norm", "median", "max"])
def test_away_from_zero_secant_and_hutchinson_find_the_curvature_and_ratio_does_not(statistic):
    found = {}
    for estimator in ("ratio", "secant", "hutchinson"):
        problem = Quadratic(centre=3.0)
        optimizer = CBLR(problem.params, trust=0.1, estimator=estimator, statistic=statistic)
        for _ in range(3):
            optimizer.step(problem.closure)
        found[estimator] = optimizer.last["curvature"].tolist()
    assert found["secant"] == pytest.approx(Quadratic.CURVATURES, rel=1e-9)
    assert found["hutchinson"] == pytest.approx(Quadratic.CURVATURES, rel=1e-9)
    assert all(abs(k / a - 1) > 0.5 for k, a in zip(found["ratio"], Quadratic.CURVATURES))


def test_hutchinson_bounds_the_diagonal_of_a_matrix():
    """|v_i (H v)_i| is the diagonal where H is one, and on average the length of a row of H at most."""
    rng = np.random.default_rng(9)
    root = rng.normal(size=(12, 12))
    hessian = torch.tensor(root @ root.T)
    w = parameter(rng.normal(size=(3, 4)))
    optimizer = CBLR([w], lr=0.0, estimator="hutchinson", statistic="mean", every=1)
    seen = []
    for _ in range(400):
        (w.grad,) = torch.autograd.grad(w.flatten() @ hessian @ w.flatten() / 2, w, create_graph=True)
        optimizer.step()
        assert not w.grad.requires_grad
        seen.append(optimizer.last["curvature"].item())
    assert len(set(seen)) > 350  # other signs each time
    assert hessian.diag().mean().item() * 0.95 < np.mean(seen) < hessian.norm(dim=1).mean().item()


def test_hutchinson_measures_every_so_many_steps():
    problem = Quadratic()
    optimizer = CBLR(problem.params, trust=0.01, estimator="hutchinson", every=3)
    asked = []
    for t in range(7):
        asked.append(optimizer.needs_graph)
        if optimizer.needs_graph:
            with pytest.raises(RuntimeError, match=r"hutchinson.*backward\(create_graph=True\)"):
                step(optimizer, *(p.detach() for p in problem.params))
            optimizer.step(problem.closure)
        else:
            step(optimizer, *(t * 7.0 * p.detach() for p in problem.params))  # which no curvature is taken from
        assert optimizer.last["curvature"].tolist() == pytest.approx(problem.CURVATURES)
    assert asked == [True, False, False, True, False, False, True]


def test_parameters_without_gradient_need_no_graph():
    problem = Quadratic()
    optimizer = CBLR([nn.Parameter(torch.ones(3, 3)), *problem.params], estimator="hutchinson")
    optimizer.step(problem.closure)
    assert not optimizer.needs_graph
    twin = copy.deepcopy(optimizer)
    assert twin.last == {}
    assert twin.needs_graph  # which parameters take part is not known before its first step
    assert not CBLR(problem.params).needs_graph


# ---- LARS ----


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("nesterov", [False, True])
def test_with_ratio_and_norm_it_is_lars(how, decay, nesterov):
    """At a constant learning rate: LARS keeps it inside the velocity."""
    rng = np.random.default_rng(10)
    start = [rng.normal(size=shape) for shape in ((4, 3), (2, 3, 2), (4,))]
    ours, theirs = ([parameter(w) for w in start] for _ in range(2))
    options = {"lr": 0.7, "weight_decay": decay, "nesterov": nesterov}
    cblr = CBLR(ours, trust=0.1, exempt_scale=1.0, **options, **how)
    lars = LARS(theirs, trust_coefficient=0.1, eps=0.0, **options)
    for _ in range(10):
        gradients = [rng.normal(size=w.shape) for w in start]
        step(cblr, *gradients)
        step(lars, *gradients)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# ---- the twin ----


class Twin:
    """The method in NumPy, for a list of arrays."""

    def __init__(self, ws, *, estimator, statistic, lr, momentum, decay, trust, nesterov=False, maximize=False):
        self.ws = [np.array(w) for w in ws]
        self.ms = [np.zeros_like(w) for w in self.ws]
        self.memory = [None] * len(ws)
        self.estimator, self.statistic = estimator, statistic
        self.lr, self.momentum, self.decay, self.trust = lr, momentum, decay, trust
        self.nesterov, self.sign = nesterov, -1.0 if maximize else 1.0

    def summary(self, above, below, delta):
        if self.statistic == "norm":
            return np.linalg.norm(above.ravel()) / np.linalg.norm(below.ravel())
        use = (above != 0) & (np.abs(below) >= 1e-12)
        k = np.sort(np.abs(above[use]) / (np.abs(below[use]) + delta))
        return {"median": lambda: k[(len(k) - 1) // 2], "mean": k.mean, "max": k.max}[self.statistic]()

    def curvature(self, i, w, g):
        if self.estimator == "ratio":
            return self.summary(g, w, 1e-8)
        if self.estimator == "fisher":
            average, t = self.memory[i] or (np.zeros_like(g), 0)
            average = 0.9 * average + 0.1 * g * g
            self.memory[i] = average, t + 1
            return self.summary(average, np.ones_like(g), 0.0) / (1 - 0.9 ** (t + 1))
        if self.memory[i] is None:
            found = self.summary(g, w, 0.0)
            self.memory[i] = g, w, None
            return found
        g_prev, w_prev, mean = self.memory[i]
        found = self.summary(g - g_prev, w - w_prev, 0.0)
        mean = found if mean is None else 0.9 * mean + 0.1 * found
        self.memory[i] = g, w, mean
        return mean

    def step(self, gs):
        for i, g in enumerate(gs):
            w, rate = self.ws[i], self.trust
            if w.ndim > 1:
                rate = self.trust / (self.curvature(i, w, g) + self.decay)
            update = rate * (self.sign * g + self.decay * w)
            self.ms[i] = self.momentum * self.ms[i] + update
            self.ws[i] = w - self.lr * (self.momentum * self.ms[i] + update if self.nesterov else self.ms[i])


@IMPLEMENTATIONS
@pytest.mark.parametrize("statistic", ["norm", "median", "mean", "max"])
@pytest.mark.parametrize("estimator", ["ratio", "secant", "fisher"])
@pytest.mark.parametrize("options", [{}, {"nesterov": True, "decay": 0.05, "maximize": True}], ids=["-", "all"])
def test_follows_the_twin(how, statistic, estimator, options):
    rng = np.random.default_rng(11)
    start = [rng.normal(size=(4, 3)), rng.normal(size=4), rng.normal(size=(2, 3, 2))]
    settings = {"lr": 0.3, "momentum": 0.8, "decay": 0.0, "trust": 0.02} | options
    twin = Twin(start, estimator=estimator, statistic=statistic, **settings)
    params = [parameter(w) for w in start]
    named = {"weight_decay" if name == "decay" else name: value for name, value in settings.items()}
    optimizer = CBLR(params, estimator=estimator, statistic=statistic, **named, **how)
    for _ in range(8):
        gradients = [rng.normal(size=w.shape) + w for w in start]
        twin.step(gradients)
        step(optimizer, *gradients)
    for p, w in zip(params, twin.ws):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-9, atol=1e-12)


# ---- the rule ----


@IMPLEMENTATIONS
def test_median_rates_by_hand(how):
    w = parameter(2.0 ** np.arange(10).reshape(2, 5))
    g = np.ones((2, 5))
    g[1, 4] = 0
    optimizer = MCLR([w], trust=0.5, momentum=0.0, **how)
    step(optimizer, g)
    assert optimizer.last["rates"].item() == pytest.approx(8.0, rel=1e-7)  # 16 * trust
    assert w[0].tolist() == pytest.approx([1 - 8, 2 - 8, 4 - 8, 8 - 8, 16 - 8], rel=1e-6, abs=1e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("nonzero", [0, 7])
def test_without_a_median_the_fallback_counts(how, nonzero):
    w, g = parameter(np.full((4, 4), 2.0)), np.zeros((4, 4))
    g.flat[:nonzero] = 1.0
    optimizer = MCLR([w], lr=0.5, trust=0.01, fallback=4.0, weight_decay=0.1, momentum=0.0, **how)
    step(optimizer, g)
    assert optimizer.last["rates"].item() == pytest.approx(0.04)
    assert optimizer.last["curvature"].isnan().all()
    np.testing.assert_allclose(w.detach().numpy(), 2 - 0.5 * 0.04 * (g + 0.1 * 2.0), rtol=1e-12)


@IMPLEMENTATIONS
def test_rate_bounds_and_exempt_parameters(how):
    a, b, bias = (parameter(np.ones(shape)) for shape in ((4, 4), (4, 4), (4,)))
    optimizer = CBLR([a, b, bias], trust=1.0, rate_bounds=(0.5, 2.0), exempt_scale=0.25, **how)
    step(optimizer, 100 * np.ones((4, 4)), 0.001 * np.ones((4, 4)), np.ones(4))
    assert optimizer.last["rates"].tolist() == [0.5, 2.0, 0.25]
    assert optimizer.last["curvature"].isnan().tolist() == [False, False, True]


def test_exempt_sees_names():
    params = [("head.weight", parameter(np.ones((4, 4)))), ("body.weight", parameter(np.ones((4, 4))))]
    optimizer = MCLR(params, trust=0.125, exempt=lambda name, p: name.startswith("head"))
    step(optimizer, 2 * np.ones((4, 4)), 2 * np.ones((4, 4)))
    assert optimizer.last["rates"].tolist() == pytest.approx([0.125, 0.0625])


def test_a_zero_matrix_is_not_frozen():
    """As LoRA's second factor, or the last layer of a residual branch; LARS's rate would be 1 without any trust."""
    for options in ({}, {"statistic": "median"}, {"statistic": "max"}):
        w = parameter(np.zeros((4, 4)))
        step(CBLR([w], trust=0.01, momentum=0.0, **options), np.ones((4, 4)))
        np.testing.assert_allclose(w.detach().numpy(), -0.01)


@pytest.mark.parametrize("statistic", ["norm", "median"])
def test_scaling_the_loss_changes_nothing(statistic):
    rng = np.random.default_rng(12)
    a, b = (parameter(np.random.default_rng(13).normal(size=(5, 5))) for _ in range(2))
    first, second = (CBLR([w], statistic=statistic) for w in (a, b))
    for _ in range(5):
        g = rng.normal(size=(5, 5))
        step(first, g)
        step(second, 1e6 * g)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_the_learning_rate_is_outside_the_momentum():
    w = parameter(np.ones((3, 3)))
    optimizer = CBLR([w], trust=0.1, momentum=0.5)
    step(optimizer, np.ones((3, 3)))
    optimizer.param_groups[0]["lr"] = 0.0
    before = w.detach().clone()
    step(optimizer, np.ones((3, 3)))
    assert torch.equal(w.detach(), before)


def test_each_group_has_its_own_options():
    a, b = parameter(np.ones((3, 3))), parameter(np.ones((3, 3)))
    groups = [{"params": [a]}, {"params": [b], "trust": 0.2, "nesterov": True, "lr": 0.5}]
    step(MCLR(groups, trust=0.1), np.ones((3, 3)), np.ones((3, 3)))
    assert a[0, 0].item() == pytest.approx(0.9, rel=1e-7)
    assert b[0, 0].item() == pytest.approx(1 - 0.5 * (0.9 + 1) * 0.2, rel=1e-7)


# ---- memory, skipped steps ----


@pytest.mark.parametrize("estimator", ["secant", "fisher"])
@pytest.mark.parametrize("foreach", [False, True])
def test_what_is_learned_survives_a_skipped_step(estimator, foreach):
    rng = np.random.default_rng(14)
    w = parameter(rng.normal(size=(4, 4)))
    optimizer = CBLR([w], estimator=estimator, foreach=foreach, fused=False)
    for _ in range(3):
        step(optimizer, rng.normal(size=(4, 4)))
    before = optimizer.last["curvature"], {n: t.clone() for n, t in optimizer.state[w].items() if n != "scalars"}
    step(optimizer, np.full((4, 4), math.nan))
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.last["rates"].item() == 0
    assert torch.equal(optimizer.last["curvature"], before[0])
    assert all(torch.equal(t, optimizer.state[w][n]) for n, t in before[1].items())


def test_secant_keeps_its_curvature_where_nothing_moved():
    problem = Quadratic(centre=2.0)
    optimizer = CBLR(problem.params, trust=0.1, estimator="secant")
    for lr in (1.0, 0.0, 0.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(problem.closure)
    assert optimizer.last["curvature"].tolist() == pytest.approx(problem.CURVATURES, rel=1e-9)


def test_gradients_too_large_for_their_norm_are_skipped():
    w = nn.Parameter(torch.ones(3, 3))
    optimizer = MCLR([w])
    step(optimizer, torch.full((3, 3), 3e38))
    assert optimizer.skipped_steps.item() == 1
    assert w.tolist() == [[1.0] * 3] * 3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_state_names(estimator):
    w = nn.Parameter(torch.ones(2, 2))
    expected = {"secant": {"grad_prev", "weight_prev"}, "fisher": {"exp_avg_sq"}}.get(estimator, set())
    assert set(CBLR([w], estimator=estimator).state[w]) == {"momentum_buffer", "scalars"} | expected
