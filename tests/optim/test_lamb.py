"""LAMB against hand-computed numbers, a plain NumPy twin, and the limit in which it is AdamW."""

import math

import numpy as np
import pytest
import torch

from conjugo.optim import LAMB
from conjugo.optim.lamb import lamb_trust_ratio

IMPLEMENTATIONS = pytest.mark.parametrize("foreach", [False, True], ids=["plain", "foreach"])


def parameter(values) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(optimizer, *gradients) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients):
        p.grad = torch.as_tensor(g, dtype=p.dtype).clone()
    optimizer.step()


class Twin:
    """Algorithm 2 of You et al. 2020 in NumPy, for a list of arrays."""

    def __init__(self, ws, *, lr, betas, eps, decay, bounds=(0.0, math.inf), vectors=False):
        self.ws = [np.array(w) for w in ws]
        self.ms = [np.zeros_like(w) for w in self.ws]
        self.vs = [np.zeros_like(w) for w in self.ws]
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.bounds, self.vectors, self.t = bounds, vectors, 0

    def step(self, gs):
        self.t += 1
        b1, b2 = self.betas
        for i, g in enumerate(gs):
            w = self.ws[i]
            self.ms[i] = b1 * self.ms[i] + (1 - b1) * g
            self.vs[i] = b2 * self.vs[i] + (1 - b2) * g**2
            m, v = self.ms[i] / (1 - b1**self.t), self.vs[i] / (1 - b2**self.t)
            u = m / (np.sqrt(v) + self.eps) + self.decay * w
            ratio = 1.0
            if w.ndim > 1 or self.vectors:
                w_norm, u_norm = np.sqrt((w**2).sum()), np.sqrt((u**2).sum())
                ratio = min(max(w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0, self.bounds[0]), self.bounds[1])
            self.ws[i] = w - self.lr * ratio * u


@IMPLEMENTATIONS
def test_the_first_step_by_hand(foreach):
    """The first update is the sign of the gradient, its norm sqrt(2); that of the weights is 5."""
    w = parameter([[3.0, 4.0]])
    optimizer = LAMB([w], lr=0.1, eps=1e-12, foreach=foreach)
    step(optimizer, [[7.0, -0.1]])
    move = 0.1 * 5 / math.sqrt(2)
    assert w[0].tolist() == pytest.approx([3 - move, 4 + move], rel=1e-10)
    assert optimizer.state[w]["step"].item() == 1
    assert optimizer.state[w]["exp_avg"][0].tolist() == pytest.approx([0.7, -0.01])
    assert optimizer.state[w]["exp_avg_sq"][0].tolist() == pytest.approx([0.049, 1e-5])


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "options", [{}, {"vectors": True}, {"bounds": (0.5, 1.5)}, {"eps": 0.3}], ids=lambda o: "".join(o) or "-"
)
def test_follows_the_twin(foreach, decay, options):
    rng = np.random.default_rng(8)
    start = [rng.normal(size=(4, 3)), rng.normal(size=4), np.zeros((2, 2)), rng.normal(size=(2, 3, 2))]
    settings = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "decay": decay} | options
    twin = Twin(start, **settings)
    params = [parameter(w) for w in start]
    optimizer = LAMB(
        params,
        lr=0.05,
        betas=(0.8, 0.95),
        eps=settings["eps"],
        weight_decay=decay,
        trust_bounds=settings.get("bounds", (0.0, math.inf)),
        adapt_vectors=settings.get("vectors", False),
        foreach=foreach,
    )
    for _ in range(15):
        gradients = [rng.normal(size=w.shape) for w in start]
        twin.step(gradients)
        step(optimizer, *gradients)
    for p, w in zip(params, twin.ws):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11, atol=1e-13)


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_a_ratio_of_one_it_is_adamw(foreach, decay):
    torch.manual_seed(9)
    w = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    v = torch.nn.Parameter(w.detach().clone())
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": decay}
    lamb, adamw = LAMB([w], trust_bounds=(1.0, 1.0), foreach=foreach, **options), torch.optim.AdamW([v], **options)
    for _ in range(20):
        g = torch.randn_like(w) + w.detach()
        step(lamb, g)
        step(adamw, g)
    torch.testing.assert_close(w, v, rtol=1e-11, atol=1e-13)


def test_scaling_the_weights_scales_the_steps():
    """With the trust ratio a layer ten times as large moves ten times as far: directions are the same for ever."""
    torch.manual_seed(10)
    a = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    b = torch.nn.Parameter(10 * a.detach())
    first, second = LAMB([a], lr=0.1), LAMB([b], lr=0.1)
    for _ in range(5):
        g = torch.randn_like(a)
        step(first, g)
        step(second, g)
    torch.testing.assert_close(10 * a, b, rtol=1e-13, atol=0)


def test_parameters_count_their_own_steps():
    """Bias correction of a parameter that joins late begins at its first gradient."""
    a, b = parameter([[1.0, 2.0]]), parameter([[1.0, 2.0]])
    optimizer = LAMB([a, b], lr=0.1, foreach=True)
    a.grad = torch.ones_like(a)
    optimizer.step()
    first = a.detach().clone()
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert torch.equal(b.detach(), first)
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [2, 1]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_trust_ratio(kind):
    weight, update = kind([2.0, 0.0, 3.0, 0.0]), kind([0.5, 1.0, 0.0, 0.0])
    assert lamb_trust_ratio(weight, update).tolist() == [4.0, 1.0, 1.0, 1.0]
    assert lamb_trust_ratio(weight, update, bounds=(1.5, 3.0)).tolist() == [3.0, 1.5, 1.5, 1.5]
