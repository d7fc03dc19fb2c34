"""The compiled vector work of a line: against the same in PyTorch operations."""

import math

import pytest
import torch

from conjugo._tensors import CHUNK
from conjugo.optim import minimize
from conjugo.optim._fused import SERIAL, kernels
from conjugo.optim.classical import METHODS, fused

pytestmark = pytest.mark.skipif(kernels is None, reason="the package was built without a C compiler")

SIZES = [1, 7, 513, CHUNK, CHUNK + 1, SERIAL + 5]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random(k, n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, generator=generator, dtype=torch.float64).to(dtype)


@TYPES
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_products(n, dtype, threads):
    table = random(6, n, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        *sums, size = fused.products(table[2], list(table))
    finally:
        torch.set_num_threads(before)
    exact = [math.fsum((row.double() * table[2].double()).tolist()) for row in table]
    scale = table.double().norm(dim=1).max().item() ** 2
    # Runs of 512 products are summed in the type itself; at most 1.0 eps was seen.
    assert sums == pytest.approx(exact, rel=0, abs=scale * 2 * torch.finfo(dtype).eps)
    assert size == table[2].abs().max().item()


@TYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 600, CHUNK + 3])
def test_what_is_not_finite_is_seen(dtype, bad, at):
    v = random(1, CHUNK + 10, dtype)[0]
    v[at] = bad
    assert math.isnan(fused.products(v, [])[-1])


def plain_turn(points, table, p_kept, y_kept, *, part, step, beta, gamma, next_step):
    """base, x, trial = points; g_base, g_last, g, p, p_new = table."""
    base, x, _ = points
    g_base, g_last, g, p, _ = table
    if part != 1:
        x = base - part * step * p
        g = g_base + part * (g_last - g_base)
    y = g - g_base
    direction = g + beta * p + (gamma * p_kept if gamma else 0)
    return x, g, direction, y, x - next_step * direction


@TYPES
@pytest.mark.parametrize("n", [7, 513, SERIAL + 5])
@pytest.mark.parametrize("part", [1.0, 0.7])
@pytest.mark.parametrize("gamma", [0.0, 0.4])
@pytest.mark.parametrize("keep", [False, True])
def test_turn(n, dtype, part, gamma, keep):
    points, table, kept = random(3, n, dtype, 1), random(5, n, dtype, 2), random(2, n, dtype, 3)
    numbers = {"part": part, "step": 0.3, "beta": 0.6, "gamma": gamma, "next_step": 0.2}
    expected = plain_turn(points.double(), table.double(), kept[0].double(), kept[1].double(), **numbers)
    old = kept[1].clone()
    base, x, trial = points
    g_base, g_last, g, p, p_new = table
    fused.turn(
        (base, x, g_base, g_last, g, p, p_new, kept[0] if gamma else None, kept[1] if keep else None, trial), **numbers
    )
    found = (x, g, p_new, kept[1], trial)
    for name, ours, wanted in zip(("x", "g", "direction", "y", "trial"), found, expected):
        if name == "y" and not keep:
            assert torch.equal(ours, old)
        else:
            torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_turn_in_place():
    """As the driver does it: the gradient at the base in the place of the last one, the direction in that of the old one."""
    points, table = random(3, 700, torch.float64, 1), random(3, 700, torch.float64, 2)
    numbers = {"part": 0.5, "step": 0.3, "beta": 0.6, "gamma": 0.0, "next_step": 0.2}
    rows = torch.stack([table[0], table[1], table[1], table[2], table[2]])
    x, g, direction, _, trial = plain_turn(points, rows, None, None, **numbers)
    base, last, p = table
    fused.turn((points[0], points[1], base, last, last, p, p, None, None, points[0]), **numbers)
    torch.testing.assert_close(torch.stack([points[1], last, p, points[0]]), torch.stack([x, g, direction, trial]))


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [10, CHUNK + 2])
def test_solvers_do_the_same_with_and_without(method, n, monkeypatch):
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(n // 2)
    first = minimize(rosenbrock, start, method=method, max_eval=12)
    monkeypatch.setattr(fused, "suits", lambda table: False)
    second = minimize(rosenbrock, start, method=method, max_eval=12)
    assert (first.nit, first.nfev) == (second.nit, second.nfev)
    # Other orders of summation differ in the last digit. The differences of gradients in scg divide that by a tiny step; the
    # other methods only enlarge it by the condition of the valley. Gradients are some 1,000 times as far apart as points.
    close = 1e-5 if method == "scg" else 1e-9
    torch.testing.assert_close(first.x, second.x, rtol=close, atol=close)
    torch.testing.assert_close(first.jac, second.jac, rtol=10 * close, atol=1000 * close)


def test_who_can_be_worked_on(monkeypatch):
    assert fused.suits(torch.zeros(3, 2))
    assert not fused.suits(torch.zeros(3, 2, dtype=torch.bfloat16))
    assert not fused.suits(torch.zeros(2, 3).T)
    assert not fused.suits(torch.zeros(3, 2, device="meta"))
    monkeypatch.setattr(fused, "kernels", None)
    assert not fused.suits(torch.zeros(3, 2))
