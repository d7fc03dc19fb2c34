"""Steps: a convex problem, missing, zero and non-finite gradients, closures, learning rates, implementations."""

import copy
import math

import pytest
import torch
from tests.contract.problems import (
    Regression,
    assert_same,
    gradient,
    parameters,
    same,
    snapshot,
    train,
    without_counters,
)
from tests.contract.rows import ROWS, cases, implementations, rows

# ---- what an optimizer is for ----


@implementations()
def test_solves_a_convex_problem(row):
    problem, steps = Regression(), 150
    optimizer = row.make(problem.params)
    first = problem.loss().item()
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = row.lr * (1 - t / steps)
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        row.step(optimizer, loss.detach(), problem.batch())
    assert problem.loss().item() < 1e-3 * first


@pytest.mark.parametrize("row", [r for r in ROWS if len(r.implementations) > 1], ids=lambda row: row.name)
def test_all_implementations_take_the_same_steps(row):
    results = []
    for chosen in row.implementations:
        params = parameters(dtype=torch.float64)
        results.append(train(row, row.make(params, **chosen), params, steps=12))
    for result in results[1:]:
        for a, b in zip(results[0], result):
            # Sums in another order; over the steps the difference grows with the condition of the problem.
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@implementations()
def test_two_runs_are_equal_bit_for_bit(row):
    runs = []
    for _ in range(2):
        params = parameters()
        optimizer = row.make(params)
        train(row, optimizer, params, steps=5)
        runs.append(snapshot(optimizer))
    assert_same(*runs)


@implementations()
def test_maximize_is_minimizing_the_negative(row):
    ascending, descending = parameters(), parameters()
    up, down = row.make(ascending, maximize=True), row.make(descending)
    for t in range(4):
        for i, (p, q) in enumerate(zip(ascending, descending)):
            q.grad = gradient(q, i, t)
            p.grad = -q.grad
        row.step(up)
        row.step(down)
    assert_same(ascending, descending)


@implementations()
def test_gradients_are_read_only(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    before = [p.grad.clone() for p in params]
    row.step(optimizer)
    assert_same(before, [p.grad for p in params])


@implementations()
def test_the_memory_of_gradients_may_be_used_again(row):
    """``zero_grad(set_to_none=False)`` writes into what the last step saw."""
    fresh, reused = parameters(), parameters()
    a, b = row.make(fresh), row.make(reused)
    for q in reused:
        q.grad = torch.zeros_like(q)
    for t in range(4):
        for i, (p, q) in enumerate(zip(fresh, reused)):
            p.grad = gradient(p, i, t)
            q.grad.copy_(p.grad)
        row.step(a)
        row.step(b)
        a.zero_grad(set_to_none=True)
        b.zero_grad(set_to_none=False)
    assert_same(fresh, reused)


@rows()
def test_the_version_of_parameters_is_counted_up(row):
    """Autograd notices when a parameter that it still needs was changed."""
    params = parameters()
    optimizer = row.make(params)
    outputs = [p.square().sum() for p in params]
    train(row, optimizer, params, steps=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].backward()


# ---- gradients that are zero, missing, not finite, or of the wrong kind ----


@implementations()
def test_zero_gradients_move_nothing(row):
    params = parameters()
    optimizer = row.make(params, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        row.step(optimizer)
    assert_same(before, [p.detach() for p in params])
    train(row, optimizer, params, steps=2)
    assert all(p.isfinite().all() for p in params)


@implementations("no gradient, no step")
def test_without_any_gradient_a_step_is_none(row):
    params = parameters()
    optimizer = row.make(params)
    row.step(optimizer)
    before = snapshot(optimizer)
    row.step(optimizer)
    assert_same(before, snapshot(optimizer))
    train(row, optimizer, params, steps=2)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    row.step(optimizer)
    assert_same(before, snapshot(optimizer))


@implementations()
def test_parameters_that_never_have_a_gradient_are_left_alone(row):
    (used, unused, frozen), (alone,) = parameters((3, 4), (3,), (2, 2)), parameters((3, 4))
    frozen.requires_grad_(False)
    optimizer, other = row.make([unused, frozen, used]), row.make([alone])
    before = unused.detach().clone(), frozen.detach().clone()
    train(row, optimizer, [used], steps=3)
    train(row, other, [alone], steps=3)
    assert_same(before, (unused.detach(), frozen.detach()))
    assert_same(used, alone)


@implementations("stays without gradient")
def test_a_parameter_is_left_alone_while_its_gradient_is_missing(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    params[1].grad = None
    before = snapshot(optimizer)
    row.step(optimizer)
    after = snapshot(optimizer)
    assert_same(before[0][1], after[0][1])
    assert_same(before[1]["state"][1], after[1]["state"][1])
    assert not same(before[0][0], after[0][0])
    train(row, optimizer, params, steps=1)
    assert not same(before[0][1], params[1].detach())


POISONS = {
    "NaN gradient": (math.nan, 1.0),
    "infinite gradient": (-math.inf, 1.0),
    "NaN loss": (None, math.nan),
}


@cases("poison", "skips what is not finite", lambda row: list(POISONS)[: 3 if row.needs_loss else 2])
@pytest.mark.parametrize("steps", [0, 3], ids=["first step", "fourth step"])
def test_what_is_not_finite_changes_nothing_and_is_counted(row, poison, steps):
    value, loss = POISONS[poison]
    params, twins = parameters(), parameters()
    optimizer, undisturbed = row.make(params), row.make(twins)
    train(row, optimizer, params, steps=steps)
    train(row, undisturbed, twins, steps=steps)
    before = snapshot(optimizer)
    for i, p in enumerate(params):
        p.grad = gradient(p, i, steps)
    if value is not None:
        params[1].grad[0] = value
    row.step(optimizer, loss)
    after = snapshot(optimizer)
    assert_same(before[0], after[0])
    assert_same(without_counters(before[1]), without_counters(after[1]))
    assert before[1]["param_groups"] == after[1]["param_groups"]
    assert optimizer.skipped_steps.item() == 1
    # ... and training goes on as if nothing had been.
    train(row, optimizer, params, steps=2, start=steps)
    train(row, undisturbed, twins, steps=2, start=steps)
    assert_same(params, twins)
    assert optimizer.skipped_steps.item() == 1


@implementations("skips what is not finite")
def test_skipped_steps_are_counted_beside_a_frozen_first_parameter(row):
    frozen, used = parameters((2, 2), (3, 4))
    frozen.requires_grad_(False)
    optimizer = row.make([frozen, used])
    for _ in range(2):
        used.grad = torch.full_like(used, math.nan)
        row.step(optimizer)
    assert optimizer.skipped_steps.item() == 2
    assert optimizer.skipped_steps.dtype == torch.int64


@rows("dense only")
def test_sparse_gradients_are_refused(row):
    params = parameters((4, 2), (3,))
    optimizer = row.make(params)
    train(row, optimizer, params, steps=1)
    before = snapshot(optimizer)
    params[0].grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (4, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        row.step(optimizer)
    assert_same(before[0], snapshot(optimizer)[0])


# ---- closures ----


@rows("gradients will do")
def test_a_closure_is_called_once_with_gradients_and_its_value_returned(row):
    problem, calls = Regression(), []
    optimizer = row.make(problem.params)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        calls.append(loss)
        return loss

    before = problem.weight.detach().clone()
    with torch.no_grad():
        result = optimizer.step(closure)
    assert len(calls) == 1
    assert result is calls[0]
    if "moves at once" in row.exempt:
        optimizer.step(closure)
    assert not same(before, problem.weight.detach())


@rows()
def test_without_a_closure_nothing_is_returned(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=1)
    row.show(optimizer)
    assert optimizer.step(**({"loss": 1.0} if row.needs_loss else {})) is None


@pytest.mark.parametrize("row", [r for r in ROWS if r.needs_loss], ids=lambda row: row.name)
def test_a_closure_and_a_given_loss_are_one(row):
    a, b, c = parameters(), parameters(), parameters()
    by_closure, by_number, by_tensor = row.make(a), row.make(b), row.make(c)
    for t in range(5):
        loss = 1 + 0.25 * t
        for params in (a, b, c):
            for i, p in enumerate(params):
                p.grad = gradient(p, i, t)
        for optimizer in (by_closure, by_number, by_tensor):
            row.show(optimizer, loss)
        by_closure.step(lambda loss=loss: torch.tensor(loss))
        by_number.step(loss=loss)
        by_tensor.step(loss=torch.tensor(loss))
    assert_same(a, b)
    assert_same(a, c)


@pytest.mark.parametrize("row", [r for r in ROWS if r.needs_loss], ids=lambda row: row.name)
def test_a_missing_loss_is_refused_before_anything_changes(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"step\(closure\).*step\(loss=loss\)"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


# ---- learning rates ----


@implementations()
def test_learning_rate_zero_in_the_first_step_moves_nothing(row):
    params = parameters()
    optimizer = row.make(params, lr=0.0)
    before = [p.detach().clone() for p in params]
    train(row, optimizer, params, steps=1)
    assert_same(before, [p.detach() for p in params])
    optimizer.param_groups[0]["lr"] = row.lr
    train(row, optimizer, params, steps=2, start=1)
    assert all(p.isfinite().all() for p in params)


@rows()
def test_a_learning_rate_in_a_tensor_is_that_number_and_may_change_in_place(row):
    a, b = parameters(), parameters()
    lr = torch.tensor(0.125)  # exact in every type
    number, tensor = row.make(a, lr=0.125), row.make(b, lr=lr)
    for t, value in enumerate((0.125, 0.25, 0.0625)):
        number.param_groups[0]["lr"] = value
        lr.fill_(value)
        train(row, number, a, steps=2, start=2 * t)
        train(row, tensor, b, steps=2, start=2 * t)
    # torch's own take another path for tensors
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert lr.item() == 0.0625


@rows()
def test_each_group_has_its_own_learning_rate(row):
    slow, fast = parameters((3, 4), (3, 4))
    optimizer = row.make([{"params": [slow], "lr": 0.0}, {"params": [fast]}])
    before = slow.detach().clone(), fast.detach().clone()
    train(row, optimizer, [slow, fast], steps=3)
    assert_same(before[0], slow.detach())
    assert not same(before[1], fast.detach())


@pytest.mark.parametrize(
    "row", [r for r in ROWS if not r.exempt.keys() & {"size counts at once", "groups apart"}], ids=lambda row: row.name
)
def test_each_group_has_its_own_weight_decay(row):
    steps = []
    for decay in (0.0, 0.5):
        a, b = parameters((3, 4), (3, 4))
        optimizer = row.make([{"params": [a], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}])
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        row.step(optimizer)
        steps.append((a, b))
    assert not same(steps[0][0], steps[1][0])
    assert_same(steps[0][1], steps[1][1])


@rows()
def test_options_of_a_group_are_read_in_every_step(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    twins = copy.deepcopy(params)
    twin = row.make(twins)
    twin.load_state_dict(optimizer.state_dict())
    twin.param_groups[0]["weight_decay"] = 0.5
    train(row, optimizer, params, steps=1, start=2)
    train(row, twin, twins, steps=1, start=2)
    assert not same(params, twins)


# ---- no waiting for the device ----


class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host would wait for a device: values read, sizes that depend on values, blocking copies."""

    READS = frozenset(("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READS, f"{func} reads values on the host"
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if func.overloadpacket.__name__ == "copy_" else (args[0], result)
            blocking = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            assert source.device == target.device or not blocking, f"{func} waits for a copy"
        return result


@rows("no host")
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_a_step_does_not_wait_for_the_device(row, lr):
    """Meta tensors have no values: whoever asks for one fails, as a capture in a CUDA graph would."""
    params = parameters(device="meta")
    optimizer = row.make(params, lr=0.1 if lr == "number" else torch.tensor(0.1))
    loss = torch.zeros((), device="meta")
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = gradient(p, i, t)
        if t == 0:  # may set up tables
            row.step(optimizer, loss)
        else:
            with NoWaiting():
                row.step(optimizer, loss)


def test_the_watch_for_waiting_works():
    x = torch.ones(2)
    for read in (lambda: x[0].item(), lambda: bool(x.sum() > 0), lambda: x.nonzero(), lambda: x.to("meta")):
        with NoWaiting(), pytest.raises(AssertionError):
            read()
