"""The preconditioner interface: a user's own one plugs into NLCG without a change there."""

import pytest
import torch

from conjugo.optim import NLCG
from conjugo.optim.preconditioners import DiagonalBFGS, Identity, Preconditioner


class RunningSquares(Preconditioner):
    """P = 1 / (sqrt(v) + eps), v the mean of g^2 so far: Adam-like, learns from gradients only."""

    def init_state(self, p):
        return {"squares": torch.zeros_like(p, dtype=torch.float64), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, block, secant):
        for g, v, n in zip(block.gradients, block.state("squares"), block.state("count")):
            n.add_(secant.finite)
            v.add_((g * g - v) / n.clamp(min=1) * secant.finite)

    def apply(self, block, vectors, fresh):
        return [x / (v.sqrt() + 1e-8) for x, v in zip(vectors, block.state("squares"))]


def test_own_preconditioner():
    w = torch.nn.Parameter(torch.tensor([1.0, -4.0], dtype=torch.float64))
    optimizer = NLCG([w], lr=0.1, precond=RunningSquares())
    assert set(optimizer.state[w]) == {"direction", "scalars", "squares", "count"}
    w.grad = torch.tensor([2.0, -0.01], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.9, -3.9], dtype=torch.float64), rtol=0, atol=1e-6)
    before = optimizer.state[w]["squares"].clone()
    w.grad = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    optimizer.step()
    assert torch.equal(optimizer.state[w]["squares"], before)


class OtherBFGS(DiagonalBFGS):
    """The same mathematics through the general interface: not the built-in type, so no compiled kernel takes it."""


@pytest.mark.parametrize("rule", ["fr", "pr"])
def test_a_preconditioner_that_learns_from_steps(rule):
    results = []
    for precond in (OtherBFGS(), "bfgs"):
        w = torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
        optimizer = NLCG([w], lr=0.05, rule=rule, precond=precond)
        a = torch.logspace(-1, 1, 9, dtype=torch.float64)
        for _ in range(30):
            w.grad = a * w.detach()
            optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-14)


def test_identity_is_no_preconditioner():
    results = []
    for precond in (Identity(), "none"):
        w = torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
        optimizer = NLCG([w], lr=0.05, precond=precond)
        for _ in range(10):
            w.grad = w.detach() ** 3
            optimizer.step()
        results.append(w.detach())
    assert torch.equal(*results)


def test_a_model_of_the_hessian_is_asked_for_only_where_it_is_needed():
    with pytest.raises(NotImplementedError, match="RunningSquares has no model"):
        RunningSquares().multiply(None, [])
