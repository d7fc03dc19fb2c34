"""AdaGradNorm: exact values, the theorems' bounds, invariances, what it becomes other methods for, rows, distances."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.contract.problems import assert_same, gradient, parameters
from torch import nn

from conjugo.optim import AdaGradNorm
from conjugo.optim._fused import kernels

PATHS = [pytest.param({"fused": False, "foreach": False}, id="plain")]
PATHS += [pytest.param({"fused": False, "foreach": True}, id="foreach")]
PATHS += [pytest.param({"fused": True}, id="fused")] if kernels else []
paths = pytest.mark.parametrize("path", PATHS)


def double(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def descend(p, slope, steps, **options):
    """Gradient descent on a function with gradient *slope*: positions, step sizes, b, and gradient norms."""
    optimizer = AdaGradNorm([p], **options)
    rows = []
    for _ in range(steps):
        p.grad = slope(p.detach())
        optimizer.step()
        last = optimizer.last
        rows.append((p.detach().clone(), *(last[name].item() for name in ("step_size", "b", "grad_norm"))))
    return [list(column) for column in zip(*rows)]


# ---- exact values ----


@paths
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": 1.0, "b0": 0.0}, [0.0, 0.0]),
        (
            {"lr": 2.0, "b0": 0.0},
            [-1, 0.4142135624, -0.1479557131, 0.0518447555, -0.0181239218, 0.0063339428],
        ),
        ({"lr": 1.0, "b0": 1.0}, [0.2928932188, 0.0900902085, 0.0278316092]),
        ({"lr": 10.0, "b0": 1.0}, [-6.0710678119, 3.6681845592, -1.4034100225, 0.501404287]),
        ({"lr": 1.0, "b0": 1.0, "momentum": 0.9}, [0.9292893219, 0.8211887872, 0.6900016609, 0.5447164712]),
    ],
)
def test_on_a_parabola(path, options, expected):
    positions, *_ = descend(double(1.0), lambda x: x, len(expected), **options, **path)
    assert [x.item() for x in positions] == pytest.approx(expected, abs=1e-10)


@paths
def test_b_on_a_parabola(path):
    _, _, b, _ = descend(double(1.0), lambda x: x, 6, lr=2.0, b0=0.0, **path)
    expected = [1, 1.4142135624, 1.4736257582, 1.4810346952, 1.4819418501, 1.4820526723]
    assert b == pytest.approx(expected, abs=1e-10)


@paths
def test_on_an_ellipse(path):
    a = torch.tensor([1.0, 10.0], dtype=torch.float64)
    positions, _, b, _ = descend(double(3.0, 4.0), lambda x: a * x, 4, lr=2.0, b0=0.0, **path)
    assert positions[0].tolist() == pytest.approx([2.8504201035, 2.0056013802], abs=1e-10)
    assert positions[3].tolist() == pytest.approx([2.4949134787, 0.362930512], abs=1e-9)
    assert (b[0], b[3]) == pytest.approx((40.11234224, 46.87769796), abs=1e-8)


@paths
@pytest.mark.parametrize("at", [(0.3, 0.4), (0.0, 0.0)])
def test_the_first_step_has_the_wanted_length(path, at):
    p = double(*at)
    descend(p, lambda x: torch.tensor([30.0, 40.0], dtype=x.dtype), 1, lr=7.0, first_step=0.1, **path)
    length = 0.1 * (math.hypot(*at) or 1.0)
    assert p.tolist() == pytest.approx([at[0] - 0.6 * length, at[1] - 0.8 * length], rel=1e-12)


def test_weights_that_came_after_the_optimizer_was_made_count():
    p = double(0.0, 0.0)
    optimizer = AdaGradNorm([p], first_step=0.1)
    with torch.no_grad():
        p.copy_(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([1.0, 0.0], dtype=p.dtype)
    optimizer.step()
    assert p.tolist() == pytest.approx([2.5, 4.0])


# ---- what it becomes ----


@paths
def test_of_a_single_number_it_is_adagrad(path):
    ours, theirs = double(1.5), double(1.5)
    a = AdaGradNorm([ours], lr=0.3, b0=0.1, **path)
    b = torch.optim.Adagrad([theirs], lr=0.3, initial_accumulator_value=0.01, eps=0.0)
    for t in range(8):
        ours.grad = gradient(ours, 0, t)
        theirs.grad = gradient(theirs, 0, t)
        a.step()
        b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@paths
def test_with_a_large_b_it_is_sgd(path):
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    a, b = AdaGradNorm(ours, lr=1e8, b0=1e9, **path), torch.optim.SGD(theirs, lr=0.1)
    for t in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad, q.grad = gradient(p, i, t), gradient(q, i, t)
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@paths
def test_decay_of_the_weights(path):
    decayed, plain = double(1.0, 2.0), double(1.0, 2.0)
    a = AdaGradNorm([decayed], b0=3.0, weight_decay=0.1, **path)
    b = AdaGradNorm([plain], b0=3.0, **path)
    for p, optimizer in ((decayed, a), (plain, b)):
        p.grad = torch.tensor([4.0, 0.0], dtype=p.dtype)
        optimizer.step()
    size = 1 / 5
    assert a.last["step_size"].item() == pytest.approx(size)
    assert decayed.tolist() == pytest.approx([(1 - 0.1 * size) - 4 * size, 2 * (1 - 0.1 * size)])
    assert plain.tolist() == pytest.approx([1 - 4 * size, 2.0])


@paths
def test_groups_with_and_without_momentum(path):
    with_it, without = double(1.0, 2.0), double(3.0)
    optimizer = AdaGradNorm([{"params": [with_it], "momentum": 0.5}, {"params": [without]}], b0=0.0, **path)
    assert "momentum_buffer" not in optimizer.state[without]
    with_it.grad, without.grad = torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()
    optimizer.step()
    assert with_it.tolist() == pytest.approx([1 - 0.5 * 3 / 5, 2.0])
    assert without.tolist() == pytest.approx([3 - 4 / 5])


def test_step_sizes_stay_within_bounds():
    _, sizes, _, _ = descend(double(1.0), lambda x: x, 5, lr=10.0, b0=4.0, bounds=(1.9, 2.4))
    assert sizes[0] == 2.4
    assert 1.9 < sizes[2] < 2.4
    assert sizes[4] == 1.9


# ---- the theorems ----


def problems(rng):
    """Random smooth functions of 5 variables: gradient, smoothness L, and the value to be gained from a start."""
    scale = 10.0 ** rng.uniform(-3, 3)
    curvature = scale * 10.0 ** rng.uniform(-2, 0, 5)
    curvature[0] = scale
    a = torch.from_numpy(curvature)
    start = torch.from_numpy(rng.standard_normal(5) * 10.0 ** rng.uniform(-1, 1))
    yield lambda x: a * x, scale, (a * start * start).sum().item() / 2, start
    yield lambda x: a * torch.sin(x), scale, (a * (1 - torch.cos(start))).sum().item(), start
    log_cosh = (a * (start.abs() + torch.log1p(torch.exp(-2 * start.abs())) - math.log(2))).sum().item()
    yield lambda x: a * torch.tanh(x), scale, log_cosh, start


@pytest.mark.parametrize("seed", range(20))
def test_bounds_of_the_deterministic_theorem(seed):
    """Theorem 2.2, with constants that hold after every number of steps."""
    rng = np.random.default_rng(seed)
    for slope, smooth, gap, start in problems(rng):
        lr, b0, n = 10.0 ** rng.uniform(-2, 3), 10.0 ** rng.uniform(-4, 3), 60
        _, sizes, b, norms = descend(nn.Parameter(start.clone()), slope, n, lr=lr, b0=b0)
        if b0 >= lr * smooth:
            largest = b0 + 2 * gap / lr
            bound = (4 * (gap / lr) ** 2 + 2 * b0 * gap / lr) / n
        else:
            kappa = 1 + 2 * math.log(lr * smooth / b0)
            largest = 2 * gap / lr + lr * smooth * kappa
            bound = (largest**2 - b0**2) / n
        assert b[-1] <= largest * (1 + 1e-9)
        assert min(norms) ** 2 <= bound * (1 + 1e-9)
        assert all(later <= earlier for earlier, later in pairwise(sizes))
        # The sums that the proof rests on.
        total = sum(g * g / each for g, each in zip(norms, b))
        rounding = 1e-12 * b[-1]
        assert b[-1] - b0 <= total + rounding
        assert total <= 2 * (b[-1] - b0) + rounding
        moved = sum((size * g) ** 2 for size, g in zip(sizes, norms))
        assert moved <= 2 * lr * lr * math.log(b[-1] / b0) * (1 + 1e-6)
        assert sizes[0] * norms[0] < lr


# ---- invariances ----


def test_scaling_the_loss_and_b_changes_nothing():
    a = torch.tensor([1.0, 10.0], dtype=torch.float64)
    one, *_ = descend(double(3.0, 4.0), lambda x: a * x, 6, lr=2.0, b0=0.5)
    other, *_ = descend(double(3.0, 4.0), lambda x: 8 * a * x, 6, lr=2.0, b0=4.0)
    torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=1e-13, atol=1e-13)


def test_rotations_rotate_the_steps():
    a = torch.diag(torch.tensor([1.0, 10.0, 3.0], dtype=torch.float64))
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    start = torch.tensor([3.0, 4.0, -1.0], dtype=torch.float64)
    one, *_ = descend(nn.Parameter(start.clone()), lambda x: a @ x, 6, lr=2.0, b0=0.5)
    other, *_ = descend(nn.Parameter(q @ start), lambda x: q @ a @ q.T @ x, 6, lr=2.0, b0=0.5)
    torch.testing.assert_close(torch.stack(one) @ q.T, torch.stack(other), rtol=1e-12, atol=1e-12)


def test_scope_says_what_is_added_up():
    def sizes(scope):
        a, b, c = double(1.0), double(2.0), double(3.0)
        optimizer = AdaGradNorm([{"params": [a, b]}, {"params": [c]}], b0=0.0, scope=scope)
        for p, g in zip((a, b, c), (3.0, 4.0, 12.0)):
            p.grad = torch.tensor([g], dtype=p.dtype)
        optimizer.step()
        return optimizer.last["b"].tolist()

    assert sizes("global") == pytest.approx(13.0)
    assert sizes("group") == pytest.approx([5.0, 5.0, 12.0])
    assert sizes("tensor") == pytest.approx([3.0, 4.0, 12.0])


def test_a_parameter_that_joins_later_shares_what_the_others_know():
    old, new = double(1.0), double(2.0)
    optimizer = AdaGradNorm([old], b0=0.0)
    old.grad = torch.tensor([3.0], dtype=old.dtype)
    optimizer.step()
    optimizer.add_param_group({"params": [new]})
    old.grad, new.grad = torch.zeros_like(old), torch.tensor([4.0], dtype=new.dtype)
    optimizer.step()
    assert optimizer.last["b"].item() == pytest.approx(5.0)
    assert new.item() == pytest.approx(2 - 4 / 5)


@paths
def test_no_gradient_at_all_in_the_first_step(path):
    p = double(1.0, 2.0)
    descend(p, torch.zeros_like, 2, b0=0.0, **path)
    assert p.tolist() == [1.0, 2.0]


# ---- distance over gradients ----


def dog(start, gradients, lr, initial, groups):
    """A literal twin: Algorithm DoG for each of *groups* (slices)."""
    x, squared, farthest = start.copy(), {}, {}
    for g in gradients:
        for span in groups:
            moved = np.linalg.norm(x[span] - start[span])
            if span.start not in squared:
                squared[span.start], farthest[span.start] = 1e-8, initial * (1 + np.linalg.norm(start[span]))
            squared[span.start] += (g[span] ** 2).sum()
            farthest[span.start] = max(farthest[span.start], moved)
        steps = {span.start: lr * farthest[span.start] / math.sqrt(squared[span.start]) for span in groups}
        for span in groups:
            x[span] -= steps[span.start] * g[span]
    return x


@paths
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_distance_over_gradients(path, scope):
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(7), rng.standard_normal((40, 7))
    a, b = (nn.Parameter(torch.from_numpy(part.copy())) for part in (start[:3], start[3:]))
    optimizer = AdaGradNorm([a, b], lr=2.0, distance=True, initial_distance=1e-2, scope=scope, **path)
    for g in gradients:
        a.grad, b.grad = torch.from_numpy(g[:3].copy()), torch.from_numpy(g[3:].copy())
        optimizer.step()
    groups = [slice(0, 7)] if scope == "global" else [slice(0, 3), slice(3, 7)]
    expected = dog(start, gradients, 2.0, 1e-2, groups)
    found = torch.cat([a.detach(), b.detach()]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.linalg.norm(found - start) > 1  # it has gone somewhere


# ---- rows ----


def reference_rows(weights, biases, gradients, lr, b_squared):
    """The published rule for networks: rows of a weight, and the bias shares what its neuron's row adds."""
    rows, entries = np.full(len(weights), b_squared), np.full(len(biases), b_squared)
    for gw, gb in gradients:
        added = (gw**2).reshape(len(gw), -1).sum(1)
        rows, entries = rows + added, entries + added + gb**2
        weights = weights - lr / np.sqrt(rows).reshape(-1, *[1] * (gw.ndim - 1)) * gw
        biases = biases - lr / np.sqrt(entries) * gb
    return weights, biases


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 2)], ids=["linear", "convolution"])
def test_rows(shape):
    rng = np.random.default_rng(1)
    weights, biases = rng.standard_normal(shape), rng.standard_normal(3)
    gradients = [(rng.standard_normal(shape), rng.standard_normal(3)) for _ in range(10)]
    w, b = nn.Parameter(torch.from_numpy(weights.copy())), nn.Parameter(torch.from_numpy(biases.copy()))
    optimizer = AdaGradNorm([w, b], lr=0.5, b0=0.1, scope="row")
    for gw, gb in gradients:
        w.grad, b.grad = torch.from_numpy(gw), torch.from_numpy(gb)
        optimizer.step()
    expected = reference_rows(weights, biases, gradients, 0.5, 0.01)
    for found, wanted in zip((w, b), expected):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-12)


def test_rows_of_one_number_are_adagrad():
    ours, theirs = (nn.Parameter(torch.ones(4, 1, dtype=torch.float64)) for _ in range(2))
    vector, other = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    a = AdaGradNorm([ours, vector], lr=0.3, b0=0.1, scope="row")  # 4 rows and 3 entries: nothing to share
    b = torch.optim.Adagrad([theirs, other], lr=0.3, initial_accumulator_value=0.01, eps=0.0)
    for t in range(5):
        for i, (p, q) in enumerate(((ours, theirs), (vector, other))):
            p.grad, q.grad = gradient(p, i, t), gradient(q, i, t)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(vector, other, rtol=1e-13, atol=1e-13)


def test_a_bias_may_have_its_own_rows():
    w, b = double([1.0], [2.0]), double(1.0, 2.0)
    optimizer = AdaGradNorm([w, b], b0=0.0, scope="row", own_bias=True)
    w.grad, b.grad = torch.tensor([[3.0], [4.0]]).double(), torch.tensor([2.0, 5.0]).double()
    optimizer.step()
    assert optimizer.state[b]["row_squares"].tolist() == [4.0, 25.0]


def test_rows_skip_what_is_not_finite():
    w = double([1.0, 2.0], [3.0, 4.0])
    optimizer = AdaGradNorm([w], b0=0.1, scope="row", momentum=0.5)
    w.grad = torch.ones_like(w)
    optimizer.step()
    before = [w.detach().clone(), *(t.clone() for t in optimizer.state[w].values())]
    w.grad = torch.full_like(w, math.nan)
    optimizer.step()
    after = [w.detach(), *optimizer.state[w].values()]
    assert optimizer.skipped_steps.item() == 1
    for name, a, b in zip(("w", *optimizer.state[w]), before, after):
        assert_same(a[..., :-1], b[..., :-1]) if name == "scalars" else assert_same(a, b)
