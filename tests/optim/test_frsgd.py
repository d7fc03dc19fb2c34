"""FRSGD: exact values, what it becomes SGD or NLCG for, invariances, checkpoints of SGD, sharded parameters."""

import copy
import math

import pytest
import torch
from tests.contract.problems import assert_same, gradient, parameters, train
from tests.contract.rows import ROWS
from torch import nn

from conjugo.optim import FRSGD, NLCG
from conjugo.optim._fused import kernels

PATHS = [pytest.param({"fused": False, "foreach": False}, id="plain")]
PATHS += [pytest.param({"fused": False, "foreach": True}, id="foreach")]
PATHS += [pytest.param({"fused": True}, id="fused")] if kernels else []
paths = pytest.mark.parametrize("path", PATHS)


def follow(optimizer, p, gradients):
    """Parameters, buffers and betas after each of *gradients*."""
    rows = []
    for g in gradients:
        p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
        buffer = optimizer.state[p]["momentum_buffer"]
        rows.append((p.tolist(), buffer.tolist(), optimizer.last["beta"].item()))
    return rows


def double(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


STREAM = ((3.0, 4.0), (0.0, 1.0), (0.0, 1.0), (0.0, 2.0))


@paths
def test_four_steps_by_hand(path):
    p = double(0.0, 0.0)
    rows = follow(FRSGD([p], lr=1.0, **path), p, STREAM)
    buffers = [(3.0, 4.0), (0.12, 1.16), (0.11988, 2.15884), (0.11976012, 4.15668116)]
    position = torch.zeros(2, dtype=torch.float64)
    for (where, buffer, beta), expected, expected_beta in zip(rows, buffers, (0.0, 0.04, 0.999, 0.999)):
        position -= torch.tensor(expected, dtype=torch.float64)
        assert beta == pytest.approx(expected_beta, rel=1e-12)
        assert buffer == pytest.approx(expected, rel=1e-9)
        assert where == pytest.approx(position.tolist(), rel=1e-9)


@paths
def test_three_modes(path):
    """f = sum a_i x_i^2 / 2 with a = 1, 10, 100: the first step annihilates the last mode."""
    a, p = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), double(1.0, 1.0, 1.0)
    optimizer = FRSGD([p], lr=0.01, **path)
    for expected in (0.0, 81.9801 / 10101):
        p.grad = a * p.detach()
        optimizer.step()
        assert optimizer.last["beta"].item() == pytest.approx(expected, rel=1e-12)


@paths
def test_variants_by_hand(path):
    p = double(0.0, 0.0)
    optimizer = FRSGD([p], lr=0.5, nesterov=True, **path)
    rows = follow(optimizer, p, STREAM[:2])
    # First step: beta 0, so p = -0.5 g. Second: beta .04, m = (.12, 1.16), p -= .5 (g + .04 m).
    assert rows[0][0] == pytest.approx([-1.5, -2.0])
    assert rows[1][0] == pytest.approx([-1.5 - 0.5 * 0.04 * 0.12, -2.0 - 0.5 * (1 + 0.04 * 1.16)])
    p = double(0.0, 0.0)
    optimizer = FRSGD([p], lr=1.0, lr_in_buffer=True, **path)
    follow(optimizer, p, STREAM[:1])
    optimizer.param_groups[0]["lr"] = 0.1
    ((where, buffer, _),) = follow(optimizer, p, STREAM[1:2])
    assert buffer == pytest.approx([0.04 * 3, 0.04 * 4 + 0.1])  # the old velocity keeps its length
    assert where == pytest.approx([-3 - 0.12, -4 - 0.26])


@paths
def test_decoupled_decay_alone_shrinks_weights(path):
    p = double(1.0, -2.0)
    optimizer = FRSGD([p], lr=0.1, weight_decay=0.5, decoupled=True, **path)
    follow(optimizer, p, [(0.0, 0.0)] * 2)
    assert p.tolist() == pytest.approx([0.95**2, -2 * 0.95**2], rel=1e-15)
    assert optimizer.state[p]["momentum_buffer"].tolist() == [0.0, 0.0]


@paths
def test_with_one_possible_momentum_it_is_sgd(path):
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    a = FRSGD(ours, lr=0.05, beta_min=0.9, beta_max=0.9, weight_decay=0.01, **path)
    b = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, weight_decay=0.01)
    for t in range(6):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad, q.grad = gradient(p, i, t), gradient(q, i, t)
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


@paths
def test_restarting_in_every_step_it_is_plain_sgd(path):
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    a, b = FRSGD(ours, lr=0.05, restart_every=1, **path), torch.optim.SGD(theirs, lr=0.05)
    for t in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad, q.grad = gradient(p, i, t), gradient(q, i, t)
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


@paths
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_it_is_nlcg_without_preconditioner_bit_for_bit(path, decay):
    ours, theirs = parameters(), parameters()
    a = FRSGD(ours, lr=0.05, weight_decay=decay, **path)
    b = NLCG(theirs, lr=0.05, precond="none", beta_max=0.999, weight_decay=decay, **path)
    for t in range(8):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad, q.grad = gradient(p, i, t), gradient(q, i, t)
        a.step()
        b.step()
        assert_same([p.detach() for p in ours], [q.detach() for q in theirs])
        assert_same(a.last["beta"], b.last["beta"])


def test_invariant_to_the_scale_of_the_loss():
    one, other = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    a, b = FRSGD(one, lr=0.05), FRSGD(other, lr=0.05 / 8)
    for t in range(6):
        for i, (p, q) in enumerate(zip(one, other)):
            p.grad, q.grad = gradient(p, i, t), 8 * gradient(q, i, t)
        a.step()
        b.step()
    for p, q in zip(one, other):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


def test_invariant_to_how_parameters_are_cut():
    (whole,) = parameters((6,), dtype=torch.float64)
    parts = [nn.Parameter(x.clone()) for x in whole.detach().split([1, 3, 2])]
    a, b = FRSGD([whole], lr=0.05), FRSGD([{"params": parts[:2]}, {"params": parts[2:]}], lr=0.05)
    for t in range(6):
        whole.grad = gradient(whole, 0, t)
        for part, g in zip(parts, whole.grad.split([1, 3, 2])):
            part.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), rtol=1e-14, atol=1e-14)


def test_exact_steps_on_a_quadratic_end_after_as_many_as_dimensions():
    a = torch.linspace(1, 20, 6, dtype=torch.float64)
    p = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = FRSGD([p], lr=torch.tensor(0.0, dtype=torch.float64), beta_max=1.0, restart_on_lr_increase=False)
    norm, direction = 0.0, torch.zeros(6, dtype=torch.float64)
    for _ in range(6):
        p.grad = a * p.detach()
        beta = min(1.0, (p.grad @ p.grad).item() / norm) if norm else 0.0
        norm = (p.grad @ p.grad).item()
        direction = beta * direction + p.grad
        # The exact step along the direction that it is about to take.
        optimizer.param_groups[0]["lr"] = (p.grad @ direction / (direction @ (a * direction))).clone()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], direction)
    assert p.detach().abs().max() < 1e-12


def test_no_learning_rate_no_move_but_the_buffer_goes_on():
    p = double(1.0, 1.0)
    optimizer = FRSGD([p], lr=0.0)
    follow(optimizer, p, STREAM)
    assert p.tolist() == [1.0, 1.0]
    assert optimizer.state[p]["momentum_buffer"].tolist() == pytest.approx([0.11976012, 4.15668116])


def test_a_learning_rate_that_jumps_up_starts_anew():
    betas = {}
    for restarting in (True, False):
        p = double(0.0, 0.0)
        optimizer = FRSGD([p], lr=0.1, restart_on_lr_increase=restarting)
        follow(optimizer, p, STREAM[:3])
        optimizer.param_groups[0]["lr"] = 0.21
        ((_, _, betas[restarting]),) = follow(optimizer, p, STREAM[3:])
    assert betas == {True: 0.0, False: pytest.approx(0.999)}


def test_restart_forgets_the_last_norm_and_keeps_the_buffer():
    p = double(0.0, 0.0)
    optimizer = FRSGD([p], lr=0.1)
    follow(optimizer, p, STREAM[:2])
    before = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.restart()
    assert_same(before, optimizer.state[p]["momentum_buffer"])
    rows = follow(optimizer, p, STREAM[2:])
    assert [beta for _, _, beta in rows] == [0.0, pytest.approx(0.999)]


def test_every_tensor_may_have_its_own_momentum():
    p, q = double(0.0), double(0.0)
    optimizer = FRSGD([p, q], lr=1.0, scope="tensor")
    for a, b in ((2.0, 1.0), (1.0, 3.0)):
        p.grad, q.grad = torch.tensor([a]).double(), torch.tensor([b]).double()
        optimizer.step()
    assert optimizer.last["beta"].tolist() == pytest.approx([0.25, 0.999])


def test_the_norm_may_come_from_clipping():
    """Clipping to a fixed norm makes all norms equal; the one from before it has the information."""
    a, b = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    one, other = FRSGD(a, lr=0.05), FRSGD(b, lr=0.05)
    for t in range(5):
        for i, (p, q) in enumerate(zip(a, b)):
            p.grad, q.grad = gradient(p, i, t), gradient(q, i, t)
        one.step()
        norm = nn.utils.clip_grad_norm_(b, math.inf)  # clips nothing
        other.step(grad_norm=norm)
        assert one.last["beta"].item() == pytest.approx(other.last["beta"].item(), rel=1e-12)
    with pytest.raises(ValueError, match="FRSGD: grad_norm must be None with scope='tensor'"):
        FRSGD(a, scope="tensor").step(grad_norm=1.0)


def test_a_given_norm_that_is_not_finite_skips():
    p = double(1.0, 1.0)
    optimizer = FRSGD([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step(grad_norm=math.inf)
    assert p.tolist() == [1.0, 1.0]
    assert optimizer.skipped_steps.item() == 1


@paths
def test_a_skipped_step_leaves_the_last_norm(path):
    p = double(0.0, 0.0)
    optimizer = FRSGD([p], lr=1.0, **path)
    follow(optimizer, p, STREAM[:2])
    p.grad = torch.tensor([math.nan, 1.0], dtype=p.dtype)
    optimizer.step()
    assert bool(optimizer.last["skipped"])
    rows = follow(optimizer, p, STREAM[2:])
    assert rows[0][1] == pytest.approx((0.11988, 2.15884), rel=1e-9)


# ---- checkpoints of torch.optim.SGD ----


def sgd(params, **options):
    optimizer = torch.optim.SGD(params, lr=0.05, **options)
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = gradient(p, i, t)
        optimizer.step()
    return optimizer


def test_goes_on_from_a_checkpoint_of_sgd_and_back():
    params = parameters()
    theirs = sgd(params, momentum=0.8, weight_decay=0.01)
    ours = FRSGD(params, lr=9.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for p in params:
        assert_same(ours.state[p]["momentum_buffer"], theirs.state[p]["momentum_buffer"])
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["beta_max"]) == (0.05, 0.01, 0.999)
    for i, p in enumerate(params):
        p.grad = gradient(p, i, 3)
    ours.step()
    assert ours.last["beta"].item() == 0.0  # there is no norm to compare with

    back = torch.optim.SGD(params, lr=1.0)
    back.load_state_dict(ours.state_dict())
    assert back.param_groups[0]["momentum"] == 0.8
    back.step()


def test_sgd_goes_on_from_a_checkpoint_that_was_never_its_own():
    params = parameters()
    ours = FRSGD(params, lr=0.05)
    train(ROWS[0], ours, params, steps=2)
    theirs = torch.optim.SGD(params, lr=1.0)
    theirs.load_state_dict(ours.state_dict())
    theirs.step()
    assert theirs.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 0.9}])
def test_checkpoints_of_sgd_without_buffers_load(options):
    params = parameters()
    plain = sgd(params) if not options["momentum"] else torch.optim.SGD(params, lr=0.05, **options)
    ours = FRSGD(params, lr=0.1)
    ours.load_state_dict(plain.state_dict())
    assert all(not ours.state[p]["momentum_buffer"].any() for p in params)
    train(ROWS[0], ours, params, steps=1)


def test_checkpoints_of_other_optimizers_are_refused():
    params = parameters()
    other = torch.optim.AdamW(params)
    train(ROWS[0], other, params, steps=1)
    ours = FRSGD(params, lr=0.1)
    with pytest.raises(ValueError, match=r"must have .*momentum_buffer.* got .*exp_avg"):
        ours.load_state_dict(other.state_dict())
