"""FullBatchCG: minimize as a torch.optim optimizer."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from conjugo.optim import FullBatchCG, minimize
from conjugo.optim.classical import METHODS
from conjugo.optim.classical.driver import Driver

INPUTS = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = torch.sin(INPUTS.sum(1, keepdim=True))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def loss_of(model):
    return ((model(INPUTS) - TARGETS) ** 2).mean()


def closure_of(model, optimizer, losses=None):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        if losses is not None:
            losses.append(loss.item())
        return loss

    return closure


def values(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_one_step_is_minimize(method):
    model = network()
    names = [name for name, _ in model.named_parameters()]

    def fun(leaves):
        return (
            (torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), (INPUTS,)) - TARGETS) ** 2
        ).mean()

    expected = minimize(fun, values(model), method=method, max_iter=15, gtol=0.0)
    optimizer = FullBatchCG(model.parameters(), method, max_iter=15, tolerance_grad=0.0, tolerance_change=0.0)
    losses = []
    first = optimizer.step(closure_of(model, optimizer, losses))
    assert first.item() == losses[0]
    for p, x in zip(model.parameters(), expected.x, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-9, atol=1e-9)
    assert optimizer.last["evaluations"] == len(losses) == expected.nfev
    assert optimizer.last["iterations"] == 15
    assert optimizer.last["status"] == "MAX_ITER"
    assert optimizer.last["loss"] == min(losses) == loss_of(model).item()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit_after_saving(method):
    model = network()
    optimizer = FullBatchCG(model.parameters(), method, max_iter=4, tolerance_grad=0.0, tolerance_change=0.0)
    for _ in range(3):
        optimizer.step(closure_of(model, optimizer))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(model)
    fresh = FullBatchCG(resumed.parameters(), method, max_iter=1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert optimizer.step(closure_of(model, optimizer)) == fresh.step(closure_of(resumed, fresh))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_deep_copy_is_independent_and_goes_on():
    model = network()
    optimizer = FullBatchCG(model.parameters(), max_iter=3)
    optimizer.step(closure_of(model, optimizer))
    both = copy.deepcopy((model, optimizer))
    before = values(model)
    both[1].step(closure_of(*both))
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    optimizer.step(closure_of(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(both[0]), strict=True))
    assert both[1].last == optimizer.last


def test_the_direction_is_kept_between_steps():
    """Steps of one iteration each come much further than as many first steps, which are steepest descent."""
    fresh, kept = network(), network()
    optimizer = FullBatchCG(kept.parameters(), max_iter=1)
    for _ in range(40):
        optimizer.step(closure_of(kept, optimizer))
        one = FullBatchCG(fresh.parameters(), max_iter=1)
        one.step(closure_of(fresh, one))
    assert loss_of(kept) < 0.7 * loss_of(fresh)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_never_rises_from_step_to_step(method):
    model = network()
    optimizer = FullBatchCG(model.parameters(), method, max_iter=2, max_eval=5)
    losses = [loss_of(model).item()]
    for _ in range(12):
        assert optimizer.step(closure_of(model, optimizer)).item() == losses[-1]
        assert optimizer.last["evaluations"] <= 5
        losses.append(loss_of(model).item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_groups_are_one_problem_and_may_join_later():
    whole, split = network(), network()
    one = FullBatchCG(whole.parameters(), max_iter=6)
    two = FullBatchCG([{"params": split[0].parameters()}, {"params": split[2].parameters()}], max_iter=6)
    one.step(closure_of(whole, one))
    two.step(closure_of(split, two))
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(split), strict=True))
    late = network()
    optimizer = FullBatchCG(late[2].parameters(), max_iter=3)
    optimizer.step(closure_of(late, optimizer))
    before = loss_of(late)
    optimizer.add_param_group({"params": list(late[0].parameters())})
    optimizer.step(closure_of(late, optimizer))
    assert loss_of(late) < before


def test_a_closure_that_fails_leaves_the_lowest_point():
    model = network()
    optimizer = FullBatchCG(model.parameters(), max_iter=50)
    for error in (RuntimeError, KeyboardInterrupt):
        losses = []
        good = closure_of(model, optimizer, losses)

        def closure(good=good, losses=losses, error=error):
            if len(losses) == 7:
                raise error
            return good()

        with pytest.raises(error):
            optimizer.step(closure)
        assert loss_of(model).item() == min(losses)
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.last["loss"] < min(losses)


def test_a_loss_that_is_not_finite_changes_nothing():
    model = network()
    optimizer = FullBatchCG(model.parameters())
    before = values(model)

    def closure():
        loss = loss_of(model) * math.nan
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last["status"] == "NOT_FINITE"
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_complex_and_frozen_parameters():
    z = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = FullBatchCG([z, frozen])

    def closure():
        optimizer.zero_grad()
        loss = ((z - (1 + 2j)).abs() ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(z.detach(), torch.full((3,), 1 + 2j), atol=1e-3, rtol=0)
    assert frozen.tolist() == [1.0, 1.0]


def test_state_is_complete_from_the_start_and_as_large_as_promised():
    for method, vectors in (("powell-beale", 4), ("hs+", 2), ("scg", 2)):
        model = network()
        optimizer = FullBatchCG(model.parameters(), method)
        before = [{name: t.data_ptr() for name, t in optimizer.state[p].items()} for p in model.parameters()]
        optimizer.step(closure_of(model, optimizer))
        assert before == [{name: t.data_ptr() for name, t in optimizer.state[p].items()} for p in model.parameters()]
        for p in model.parameters():
            assert sum(t.shape == p.shape for t in optimizer.state[p].values()) == vectors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "powel"}, "unknown FullBatchCG method 'powel'; did you mean 'powell-beale'"),
        ({"max_iter": -1}, "FullBatchCG: max_iter must be >= 0 or None, got -1"),
        ({"max_eval": 0}, "FullBatchCG: max_eval must be >= 1 or None, got 0"),
        ({"tolerance_grad": -1.0}, r"FullBatchCG: tolerance_grad must be in \[0, inf\), got -1.0"),
        ({"tolerance_change": math.nan}, r"FullBatchCG: tolerance_change must be in \[0, inf\), got nan"),
        ({"c2": 1.0}, r"FullBatchCG: c2 must be in \(c1, 1\)"),
    ],
)
def test_bad_options_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        FullBatchCG(network().parameters(), **wrong)


def test_bad_parameters_are_named():
    with pytest.raises(TypeError, match="FullBatchCG: parameters must be all float32 or all float64"):
        FullBatchCG([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(TypeError, match=r"FullBatchCG: parameters must be all float32 or .*bfloat16"):
        FullBatchCG([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    with pytest.raises(TypeError, match=r"FullBatchCG: parameters must be all float32 or .*int64"):
        FullBatchCG([nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)])
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="FullBatchCG: max_iter must be the same in all groups, 20, got 3"):
        FullBatchCG([{"params": [a]}, {"params": [b], "max_iter": 3}])
    optimizer = FullBatchCG([a])
    with pytest.raises(ValueError, match="FullBatchCG: closure must be a function that calls backward"):
        optimizer.step(lambda: a.sum())


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_a_step_after_an_interrupted_one_begins_where_the_parameters_are(turns, monkeypatch):
    """Ctrl-C between the turn to a new direction, which prepares the next trial, and its evaluation."""
    w = nn.Parameter(torch.tensor([3.0, -4.0, 2.0], dtype=torch.float64))
    optimizer = FullBatchCG([w], max_iter=5)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = (w**4 + w**2).sum()
        loss.backward()
        seen.append(w.detach().clone())
        return loss

    measure, turned = Driver._measure, []

    def interrupted(self, request):
        turned.extend([True] if self._trial_ready else [])
        if len(turned) == turns:
            raise KeyboardInterrupt
        return measure(self, request)

    monkeypatch.setattr(Driver, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    monkeypatch.setattr(Driver, "_measure", measure)
    there = w.detach().clone()
    seen.clear()
    optimizer.step(closure)
    assert torch.equal(seen[0], there)
