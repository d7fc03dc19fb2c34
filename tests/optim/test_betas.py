"""The beta formulas: with an exact line search each of them is the linear conjugate gradient method."""

import numpy as np
import pytest
import torch

from conjugo.optim.betas import RULES, Products, constant, dai_kou, hager_zhang, ratio


def products(g, g_prev, d_prev, P):
    y = g - g_prev
    return Products(
        rho=g @ (P * g),
        rho_prev=g_prev @ (P * g_prev),
        cross=g @ (P * g_prev),
        yPy=y @ (P * y),
        dy=d_prev @ y,
        gd=g @ d_prev,
        dd=d_prev @ d_prev,
    )


def conjugate_gradients(rule, A, x, steps, P=None):
    """Minimise x'Ax/2 with exact steps; the betas and max |g| after each step."""
    P = torch.ones_like(x) if P is None else P
    g = A @ x
    d = -P * g
    betas, sizes = [], []
    for _ in range(steps):
        x = x - (g @ d) / (d @ A @ d) * d
        g_prev, g = g, A @ x
        beta = RULES[rule](products(g, g_prev, d, P))
        d = -P * g + beta * d
        betas.append(beta.item())
        sizes.append(g.abs().max().item())
    return betas, sizes


@pytest.mark.parametrize("rule", RULES)
def test_every_formula_ends_a_quadratic_in_n_steps(rule):
    A = torch.diag(torch.from_numpy(np.geomspace(1, 20, 10)))
    betas, sizes = conjugate_gradients(rule, A, torch.ones(10, dtype=torch.float64), 10)
    assert betas[:3] == pytest.approx([0.113830, 0.247756, 0.313203], abs=1e-6)
    assert sizes[-1] < 1e-8
    assert min(sizes[:9]) > 1e-6  # and not before


@pytest.mark.parametrize("rule", RULES)
def test_so_it_does_with_a_preconditioner_and_a_full_matrix(rule):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    A = root @ root.T + 2 * torch.eye(8, dtype=torch.float64)
    _, sizes = conjugate_gradients(rule, A, torch.ones(8, dtype=torch.float64), 8, P=1 / A.diagonal())
    assert sizes[-1] < 1e-8


@pytest.mark.parametrize("rule", RULES)
def test_no_previous_gradient_means_no_memory(rule):
    zero = torch.zeros((), dtype=torch.float64)
    first = Products(rho=zero + 1, rho_prev=zero, cross=zero, yPy=zero + 1, dy=zero, gd=zero, dd=zero)
    assert RULES[rule](first).item() == 0


def test_ratio_is_zero_where_it_is_not_defined():
    top, bottom = torch.tensor([1.0, 0.0, 1e300]).double(), torch.tensor([0.0, 0.0, 1e-300]).double()
    assert ratio(top, bottom).tolist() == [0, 0, 0]
    assert ratio(np.array([6.0, 1.0]), np.array([3.0, 0.0])).tolist() == [2, 0]


def test_lower_bounds_of_hager_zhang_and_dai_kou():
    g, g_prev, d = (torch.tensor(v, dtype=torch.float64) for v in ([0.1, 2.0], [1.0, 0.0], [-1.0, 0.5]))
    t = products(g, g_prev, d, torch.ones(2, dtype=torch.float64))
    y = g - g_prev
    dy = (d @ y).item()
    plain = ((y - 2 * d * (y @ y) / dy) @ g / dy).item()
    assert hager_zhang(t).item() == pytest.approx(max(plain, -1 / (d.norm().item() * 0.01)))
    value = (g @ y).item() / dy - (y @ y).item() * (g @ d).item() / dy**2
    assert dai_kou(t).item() == pytest.approx(max(value, 0.5 * (g @ d).item() / (d @ d).item()))


def test_the_constant_one_looks_at_nothing():
    for rho in (0.3, np.array([0.0, np.nan, 5.0]), torch.tensor([float("inf"), 0.0])):
        value = constant(Products(rho=rho, rho_prev=rho, cross=rho))
        assert np.array_equal(value, np.ones(np.shape(rho)))
