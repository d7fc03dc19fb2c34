"""LARS against hand-computed numbers, a plain NumPy twin, and limits in which it is momentum SGD."""

import math

import numpy as np
import pytest
import torch

from conjugo.optim import LARS
from conjugo.optim.lars import lars_trust_ratio

IMPLEMENTATIONS = pytest.mark.parametrize("foreach", [False, True], ids=["plain", "foreach"])


def parameter(values) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(optimizer, *gradients) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients):
        p.grad = torch.as_tensor(g, dtype=p.dtype).clone()
    optimizer.step()


class Twin:
    """Algorithm 1 of You, Gitman & Ginsburg 2017 in NumPy, for a list of arrays."""

    def __init__(self, ws, *, lr, momentum, decay, eta, eps, bounds=(0.0, math.inf), nesterov=False, vectors=False):
        self.ws = [np.array(w) for w in ws]
        self.vs = [np.zeros_like(w) for w in self.ws]
        self.lr, self.momentum, self.decay, self.eta, self.eps = lr, momentum, decay, eta, eps
        self.bounds, self.nesterov, self.vectors = bounds, nesterov, vectors

    def step(self, gs):
        for i, g in enumerate(gs):
            w, ratio = self.ws[i], 1.0
            if w.ndim > 1 or self.vectors:
                w_norm, g_norm = math.sqrt((w * w).sum()), math.sqrt((g * g).sum())
                if w_norm > 0 and g_norm > 0:
                    ratio = self.eta * w_norm / (g_norm + self.decay * w_norm + self.eps)
                ratio = min(max(ratio, self.bounds[0]), self.bounds[1])
            update = self.lr * ratio * (g + self.decay * w)
            self.vs[i] = self.momentum * self.vs[i] + update
            self.ws[i] = w - (self.momentum * self.vs[i] + update if self.nesterov else self.vs[i])


@IMPLEMENTATIONS
def test_hand_computed_steps(foreach):
    w = parameter([[3.0, 4.0]])
    optimizer = LARS([w], lr=1.0, momentum=0.5, trust_coefficient=0.1, eps=0.0, foreach=foreach)
    step(optimizer, [[0.0, 2.0]])  # ratio 0.1 * 5 / 2 = 0.25, v = (0, 0.5)
    assert w.tolist() == [[3.0, 3.5]]
    step(optimizer, [[4.0, 0.0]])  # ratio 0.1 * sqrt(21.25) / 4, v = 0.5 (0, 0.5) + (0.1 sqrt(21.25), 0)
    assert w[0, 0].item() == pytest.approx(3 - 0.1 * math.sqrt(21.25), rel=1e-15)
    assert w[0, 1].item() == pytest.approx(3.25, rel=1e-15)


def test_weight_decay_enters_ratio_and_velocity():
    w = parameter([[3.0, 4.0]])
    optimizer = LARS([w], lr=1.0, momentum=0.0, weight_decay=0.2, trust_coefficient=0.1, eps=0.0)
    step(optimizer, [[0.0, 1.0]])  # ratio 0.1 * 5 / (1 + 0.2 * 5) = 0.25; g + 0.2 w = (0.6, 1.8)
    assert w[0].tolist() == pytest.approx([2.85, 3.55], rel=1e-15)


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"vectors": True}, {"bounds": (0.5, 1.5), "eta": 1.0}, {"eps": 0.3}],
    ids=lambda o: "".join(o) or "-",
)
def test_follows_the_twin(foreach, decay, nesterov, options):
    rng = np.random.default_rng(5)
    start = [rng.normal(size=(4, 3)), rng.normal(size=4), np.zeros((2, 2)), rng.normal(size=(2, 3, 2))]
    settings = {"lr": 0.3, "momentum": 0.8, "decay": decay, "eta": 0.05, "eps": 1e-9, "nesterov": nesterov} | options
    twin = Twin(start, **settings)
    params = [parameter(w) for w in start]
    optimizer = LARS(
        params,
        lr=0.3,
        momentum=0.8,
        weight_decay=decay,
        nesterov=nesterov,
        trust_coefficient=settings["eta"],
        eps=settings["eps"],
        trust_bounds=settings.get("bounds", (0.0, math.inf)),
        adapt_vectors=settings.get("vectors", False),
        foreach=foreach,
    )
    for _ in range(15):
        gradients = [rng.normal(size=w.shape) for w in start]
        twin.step(gradients)
        step(optimizer, *gradients)
    for p, w in zip(params, twin.ws):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-14)


@IMPLEMENTATIONS
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_a_ratio_of_one_it_is_momentum_sgd(foreach, nesterov, decay):
    """At a constant learning rate: LARS keeps it inside the velocity, SGD outside."""
    torch.manual_seed(6)
    w = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    v = torch.nn.Parameter(w.detach().clone())
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": decay}
    lars, sgd = LARS([w], trust_bounds=(1.0, 1.0), foreach=foreach, **options), torch.optim.SGD([v], **options)
    for _ in range(20):
        g = torch.randn_like(w) + w.detach()
        step(lars, g)
        step(sgd, g)
    torch.testing.assert_close(w, v, rtol=1e-12, atol=1e-13)


def test_scaling_the_gradient_of_a_layer_changes_nothing():
    torch.manual_seed(7)
    a = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    b = torch.nn.Parameter(a.detach().clone())
    first, second = LARS([a], lr=1.0, eps=0.0), LARS([b], lr=1.0, eps=0.0)
    for _ in range(5):
        g = torch.randn_like(a)
        step(first, g)
        step(second, 1e6 * g)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(3,), ()])
def test_vectors_take_plain_steps_unless_told(foreach, shape):
    w, v = parameter(np.full(shape, 2.0)), parameter(np.full(shape, 2.0))
    options = {"lr": 0.5, "momentum": 0.0, "trust_coefficient": 0.1, "eps": 0.0, "foreach": foreach}
    step(LARS([w], **options), np.full(shape, 4.0))
    step(LARS([v], adapt_vectors=True, **options), np.full(shape, 4.0))
    assert w.detach().flatten()[0].item() == pytest.approx(0.0)
    assert v.detach().flatten()[0].item() == pytest.approx(2 - 0.5 * 0.1 * (2 / 4) * 4)


def test_the_learning_rate_acts_on_new_gradients_only():
    w = parameter([[1.0, 0.0]])
    optimizer = LARS([w], lr=1.0, momentum=0.5, trust_bounds=(1.0, 1.0))
    step(optimizer, [[1.0, 0.0]])
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, [[5.0, 5.0]])
    assert w.tolist() == [[-0.5, 0.0]]


def test_each_group_has_its_own_options():
    a, b = parameter([[3.0, 4.0]]), parameter([[3.0, 4.0]])
    optimizer = LARS(
        [{"params": [a]}, {"params": [b], "trust_coefficient": 0.2, "foreach": True}],
        lr=1.0,
        trust_coefficient=0.1,
        eps=0.0,
    )
    step(optimizer, [[0.0, 2.0]], [[0.0, 2.0]])
    assert a.tolist() == [[3.0, 3.5]]
    assert b.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_trust_ratio(kind):
    weight, grad = kind([2.0, 0.0, 3.0, 0.0]), kind([0.5, 1.0, 0.0, 0.0])
    options = {"coefficient": 0.001, "weight_decay": 0.1, "eps": 1e-8}
    expected = 0.002 / (0.5 + 0.2 + 1e-8)
    assert lars_trust_ratio(weight, grad, **options).tolist() == pytest.approx([expected, 1, 1, 1])
    clamped = lars_trust_ratio(weight, grad, bounds=(0.5, 0.75), **options)
    assert clamped.tolist() == pytest.approx([0.5, 0.75, 0.75, 0.75])


def test_gradients_too_large_for_their_norm_are_skipped():
    w = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w])
    step(optimizer, torch.full((2, 2), 3e38))
    assert optimizer.skipped_steps.item() == 1
    assert w.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_weights_too_large_for_their_norm_do_not_stop_the_step():
    w, v = torch.nn.Parameter(torch.full((2, 2), 3e38)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w, v], momentum=0.0)
    step(optimizer, torch.ones(2, 2), torch.ones(2, 2))
    assert v.isfinite().all()
    assert not torch.equal(v.detach(), torch.ones(2, 2))
