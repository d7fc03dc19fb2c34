"""Batch norm on least squares: hand-computed steps, exact facts, symmetries, asymptotes, statuses, bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes

from conjugo.errors import UnknownName
from conjugo.scaling import bngd
from conjugo.scaling.bngd import OLS, asymptotes, convergence_map, equivalent_lr, run, transform

SMALL = OLS([1.0, 2.0, 4.0], u=[1.0, 1.0, 1.0])
W0 = [1.0, -0.5, 0.7]


def twin(H, g, w, a, lr, lr_a, steps, order="simultaneous"):
    """The iteration as written, one run; after each step (a, w), the excess and the effective learning rate."""
    u = np.linalg.solve(H, g)
    found = []
    for step in range(steps + 1):
        s, p = math.sqrt(w @ H @ w), w @ g
        e = u - p / s**2 * w
        found.append((a, w, (a - p / s) ** 2 / 2 + e @ H @ e / 2, lr * a * p / s**3))
        if step < steps:
            new = a + lr_a * (p / s - a)
            w = w + lr * ((new if order == "alternating" else a) / s) * (g - p / s**2 * (H @ w))
            a = new
    return found


def generic(d=8, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    H = (basis * np.geomspace(1, 20, d)) @ basis.T
    return (H + H.T) / 2, rng.standard_normal(d), rng.standard_normal(d)


def problem_100(kappa=80.0):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(100, generator=generator, dtype=torch.float64)
    lam = torch.logspace(0, math.log10(kappa), 100, dtype=torch.float64)
    return OLS(lam, u=u / u.norm())


# ---- the iteration ----


def test_three_steps_by_hand():
    found = run(OLS([1.0, 4.0], u=[1.0, 1.0]), 0.1, w0=[1.0, 0.0], a0=1.0, steps=3)
    excess = [2.0, 0.96974109544812, 0.20343774327998, 0.05398094320847]
    eff_lr = [0.1, 0.12379627466780, 0.22135443481543, 0.19666417600390]
    np.testing.assert_allclose(found.excess[0], excess, rtol=1e-12)
    np.testing.assert_allclose(found.eff_lr[0], eff_lr, rtol=1e-12)
    np.testing.assert_allclose(found.a[0], [1, 1, 2.03025890455188, 2.14629664064343], rtol=1e-12)
    np.testing.assert_allclose(found.w[0], [0.88775628808882, 0.63773517692714], rtol=1e-12)
    assert found.at.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("lr_a", [1.0, 0.3])
def test_follows_the_iteration_as_written(order, lr_a):
    H, g, w = generic()
    expected = twin(H, g, w, 0.7, 0.05, lr_a, 40, order)
    found = run(OLS(H, g=g), 0.05, lr_a, w, 0.7, 40, order=order)
    np.testing.assert_allclose(found.excess[0], [e[2] for e in expected], rtol=1e-10)
    np.testing.assert_allclose(found.eff_lr[0], [e[3] for e in expected], rtol=1e-10)
    np.testing.assert_allclose(found.a[0], [e[0] for e in expected], rtol=1e-11)
    np.testing.assert_allclose(found.norm_w[0], [np.linalg.norm(e[1]) for e in expected], rtol=1e-11)
    np.testing.assert_allclose(found.sigma[0], [math.sqrt(e[1] @ H @ e[1]) for e in expected], rtol=1e-11)
    np.testing.assert_allclose(found.w[0], expected[-1][1], rtol=1e-10)


def test_exact_facts_hold_at_every_step():
    H, g, w = generic()
    u = np.linalg.solve(H, g)
    S, c = u @ H @ u, u @ H @ u + 2.0
    for step, (a, v, excess, eff_lr) in enumerate(states := twin(H, g, w, 0.7, 0.3, 0.5, 60)):
        s, p = math.sqrt(v @ H @ v), v @ g
        e = u - p / s**2 * v
        loss = c / 2 - a * p / s + a**2 / 2
        assert excess == pytest.approx(loss - (c - S) / 2, rel=1e-12, abs=1e-12 * S)
        assert e @ H @ e == pytest.approx(S - p**2 / s**2, rel=1e-12, abs=1e-12 * S)
        if step + 1 < len(states):
            after = states[step + 1][1]
            grown = v @ v + 0.3**2 * (a / s) ** 2 * np.sum((H @ e) ** 2)
            assert after @ after == pytest.approx(grown, rel=1e-12)
            t = (after @ g) / (after @ H @ after)
            moved = e - eff_lr * (H @ e)
            assert (u - t * after) @ H @ (u - t * after) <= moved @ H @ moved * (1 + 1e-12) + 1e-24
    ours = run(OLS(H, g=g, c=c), 0.3, 0.5, w, 0.7, 60)
    assert bool((ours.norm_w[0].diff() >= -1e-12 * ours.norm_w[0, :-1]).all())
    assert OLS(H, g=g, c=c).min_loss == pytest.approx(1.0)


def test_many_runs_are_as_single_ones():
    problem = problem_100()
    lrs = torch.logspace(-4, 0, 9, dtype=torch.float64)
    starts = torch.randn(9, 100, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    a0 = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    together = run(problem, lrs, 0.5, starts, a0, 30)
    for i in range(9):
        alone = run(problem, lrs[i], 0.5, starts[i], a0[i], 30)
        for name in ("excess", "dir_excess", "a", "norm_w", "sigma", "eff_lr"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0], rtol=1e-12, atol=1e-13)
        assert together.status[i] == alone.status[0]


def test_recordings_agree():
    every = run(SMALL, [0.01, 0.3], w0=W0, steps=700)
    some = run(SMALL, [0.01, 0.3], w0=W0, steps=700, record="log")
    last = run(SMALL, [0.01, 0.3], w0=W0, steps=700, record=None)
    assert some.at[0] == 0
    assert some.at[-1] == 700
    assert 60 < len(some.at) < 110
    torch.testing.assert_close(every.excess[:, some.at], some.excess, rtol=0, atol=0)
    torch.testing.assert_close(every.excess[:, -1:], last.excess, rtol=0, atol=0)
    assert every.status == some.status == last.status
    torch.testing.assert_close(every.rate, last.rate, rtol=0, atol=0)
    torch.testing.assert_close(every.w, last.w, rtol=0, atol=0)
    assert run(SMALL, 0.1, w0=W0, steps=0).excess.shape == (1, 1)


def test_a_dense_matrix_is_as_its_eigenbasis():
    H, g, w = generic()
    lam, basis = np.linalg.eigh(H)
    dense = run(OLS(H, g=g), [0.01, 0.1], 0.7, w, 1.0, 50)
    diagonal = run(OLS(lam, g=basis.T @ g), [0.01, 0.1], 0.7, basis.T @ w, 1.0, 50)
    torch.testing.assert_close(dense.excess, diagonal.excess, rtol=1e-10, atol=0)
    np.testing.assert_allclose(dense.w, diagonal.w.numpy() @ basis.T, rtol=1e-10, atol=1e-12)
    problem = OLS(H, g=g)
    np.testing.assert_allclose(problem.H, H, atol=1e-13)
    np.testing.assert_allclose(problem.g, g, atol=1e-13)
    np.testing.assert_allclose(problem.H @ problem.u, g, atol=1e-12)


# ---- symmetries ----


def test_the_symmetry():
    H, g, w = generic()
    Q = np.linalg.qr(np.random.default_rng(5).standard_normal((8, 8)))[0]
    mu, gamma, r = 3.7, 0.4, 12.0
    problem = OLS(H, g=g, c=100.0)
    other = transform(problem, mu, gamma, Q)
    assert other.c == pytest.approx(16.0)
    assert pytest.approx(gamma**2) == other.S / problem.S
    here = run(problem, 0.02, 0.6, w, 0.9, 50)
    there = run(other, equivalent_lr(0.02, r, gamma), 0.6, r * Q.T @ w, gamma * 0.9, 50)
    torch.testing.assert_close(there.a, gamma * here.a, rtol=1e-12, atol=0)
    torch.testing.assert_close(there.excess, gamma**2 * here.excess, rtol=1e-11, atol=1e-24)
    torch.testing.assert_close(there.norm_w, r * here.norm_w, rtol=1e-12, atol=0)
    np.testing.assert_allclose(there.w[0], r * Q.T @ here.w[0].numpy(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transform(problem, mu, gamma).H, mu * problem.H)
    plain = transform(SMALL, 2.0, 3.0)
    torch.testing.assert_close(plain.H.diagonal(), 2 * SMALL.H.diagonal())
    torch.testing.assert_close(plain.g, 3 * math.sqrt(2) * SMALL.g)


def test_scaling_the_inputs_changes_nothing_but_gradient_descent():
    X, y = load_diabetes(return_X_y=True)
    X = X * np.array([1, 2, 1, 1, 1, 1, 1, 1, 3, 1])
    plain, scaled = OLS.from_data(X, y), OLS.from_data(10 * X, y)
    w = np.random.default_rng(0).standard_normal(10)
    here, there = (run(problem, 1e-3, w0=w, a0=1.0, steps=200) for problem in (plain, scaled))
    torch.testing.assert_close(here.a, there.a, rtol=1e-10, atol=0)
    torch.testing.assert_close(here.w, there.w, rtol=1e-9, atol=1e-9)
    assert plain.spectrum().gd_lr_max == pytest.approx(100 * scaled.spectrum().gd_lr_max)


def test_mirrored():
    here = run(SMALL, 0.1, 0.5, W0, 0.8, 60)
    there = run(SMALL, 0.1, 0.5, [-x for x in W0], -0.8, 60)
    torch.testing.assert_close(here.a, -there.a, rtol=0, atol=0)
    torch.testing.assert_close(here.w, -there.w, rtol=0, atol=0)


# ---- the spectrum ----


def test_the_effective_matrix():
    found = OLS([1.0, 4.0], u=[1.0, 1.0]).spectrum()
    assert found.lam_star.tolist() == pytest.approx([1.6])
    assert (found.kappa, found.kappa_star) == (4.0, 1.0)
    found = SMALL.spectrum()
    np.testing.assert_allclose(found.lam_star, [1.24407105398155, 2.75592894601845], rtol=1e-13)
    assert found.kappa_star == pytest.approx(2.21525043702, rel=1e-11)
    assert found.eff_lr_max == pytest.approx(2 / 2.75592894601845)
    assert found.eff_lr_opt == pytest.approx(2 / 4.0)
    assert found.bn_rate_opt == pytest.approx(found.bn_rate(found.eff_lr_opt))
    assert found.gd_rate_opt == pytest.approx(found.gd_rate(found.gd_lr_opt))
    assert (found.gd_lr_max, found.gd_lr_opt, found.gd_rate_opt) == pytest.approx((0.5, 0.4, 0.6))
    for seed in range(20):
        H, g, _ = generic(d=6, seed=seed)
        found = OLS(H, g=g).spectrum()
        u = np.linalg.solve(H, g)
        exact = np.linalg.eigvalsh(H - np.outer(g, g) / (u @ g))[1:]
        np.testing.assert_allclose(found.lam_star, exact, rtol=1e-10)
        assert bool((found.lam[:-1] <= found.lam_star).all())
        assert bool((found.lam_star <= found.lam[1:]).all())
        assert 1 <= found.kappa_star <= found.kappa


def test_the_hessian_at_a_minimum():
    H, g, _ = generic(d=5)
    problem = OLS(H, g=g)
    u = np.linalg.solve(H, g)
    r = 1.7

    def loss(z):
        s = torch.sqrt(z[1:] @ problem.H @ z[1:])
        return -z[0] * (z[1:] @ problem.g) / s + z[0] ** 2 / 2

    at = torch.cat([torch.tensor([math.sqrt(problem.S)], dtype=torch.float64), r * problem.u])
    hessian = torch.func.hessian(loss)(at)
    s = r * math.sqrt(problem.S)
    expected = torch.block_diag(
        torch.ones(1, 1, dtype=torch.float64),
        (problem.S / s**2) * torch.from_numpy(H - np.outer(g, g) / (u @ g)),
    )
    torch.testing.assert_close(hessian, expected, rtol=1e-8, atol=1e-8)


def test_the_asymptotic_rate_is_that_of_the_effective_matrix():
    found = run(SMALL, [0.02, 0.05], w0=W0, a0=1.0, steps=1500, tol=1e-20)
    spectrum = SMALL.spectrum()
    for i in range(2):
        assert found.rate[i] == pytest.approx(spectrum.bn_rate(float(found.eff_lr[i, -1])) ** 2, abs=1e-5)
    assert found.status == ["converged"] * 2
    assert bool((found.steps < 1500).all())


def test_degenerate_dimensions():
    one = OLS([3.0], u=[2.0])
    assert one.spectrum().kappa_star == 1.0
    assert one.spectrum().bn_rate_opt == 0.0
    found = run(one, 5.0, 0.25, [0.3], 0.0, 10)
    assert float(found.dir_excess.max()) < 1e-30
    torch.testing.assert_close(found.excess[0, 1:] / found.excess[0, :-1], torch.full((10,), 0.75**2).double())
    for seed in range(5):
        H, g, _ = generic(d=2, seed=seed)
        assert OLS(H, g=g).spectrum().kappa_star == 1.0
    round_ = OLS([3.0, 3.0, 3.0], u=[1.0, -2.0, 0.5])
    assert round_.spectrum().kappa_star == pytest.approx(1.0)
    assert float(run(round_, 1 / 3, w0=W0, method="gd", steps=1).excess[0, 1]) < 1e-30


# ---- special starts ----


def test_special_starts():
    frozen = run(SMALL, 0.3, w0=W0, a0=0.0, steps=2)
    assert frozen.norm_w[0, 1] == frozen.norm_w[0, 0]
    assert frozen.norm_w[0, 2] > frozen.norm_w[0, 1]
    along = run(SMALL, 0.3, 0.25, [2.0, 2.0, 2.0], 0.0, 20)
    assert float(along.dir_excess.max()) < 1e-30
    torch.testing.assert_close(along.excess[0, 1:] / along.excess[0, :-1], torch.full((20,), 0.75**2).double())
    saddle = run(SMALL, 0.3, w0=[2.0, -1.0, 0.0], a0=0.0, steps=50)
    assert saddle.status == ["saddle"]
    assert saddle.excess[0, -1] == pytest.approx(SMALL.S / 2)


def test_huge_and_tiny_weights():
    """Lengths of w do not matter as long as the learning rate goes with their square, nor do they overflow."""
    here = run(SMALL, 0.05, w0=W0, a0=1.0, steps=50)
    for r in (2.0**400, 2.0**-300):
        there = run(SMALL, 0.05 * r**2 if r < 1 else 0.05 * r * r, w0=[r * x for x in W0], a0=1.0, steps=50)
        torch.testing.assert_close(here.excess, there.excess, rtol=0, atol=0)
        torch.testing.assert_close(here.norm_w * r, there.norm_w, rtol=1e-15, atol=0)
    found = run(SMALL, [1e120, 1e190], w0=W0, a0=1.0, steps=50)
    end = asymptotes(SMALL, W0, 1.0)
    torch.testing.assert_close(
        found.eff_lr[:, -1] * found.lr, torch.full((2,), end.C2, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert found.status == ["stalled"] * 2
    assert bool(torch.isfinite(found.norm_w).all())


# ---- asymptotes ----


def test_small_learning_rates():
    found = run(SMALL, [4e-3, 2e-3, 1e-3], w0=W0, a0=1.0, steps=20_000, record=None)
    off = found.eff_lr[:, 0] / (asymptotes(SMALL, W0, 1.0).C1 * found.lr) - 1
    np.testing.assert_allclose(off, [-0.005386, -0.002707, -0.001357], atol=1e-6)


def test_large_learning_rates():
    found = run(SMALL, 1e8, w0=W0, a0=0.6, steps=300, record=None)
    end = asymptotes(SMALL, W0, 0.6)
    assert (end.case, end.power) == ("generic", 1)
    assert found.eff_lr[0, 0] * 1e8 == pytest.approx(end.C2, rel=1e-4)
    assert end.plateau[0] == pytest.approx(SMALL.spectrum().eff_lr_opt / end.C1)
    assert end.plateau[1] == pytest.approx(end.C2 / SMALL.spectrum().eff_lr_opt)
    assert end.width == pytest.approx(end.plateau[1] / end.plateau[0])


def test_large_learning_rates_in_the_long_run():
    """After steps in proportion to the learning rate, from any start; what is left falls with the learning rate."""
    for start in (W0, SMALL.g):
        found = run(SMALL, [100.0, 1000.0], w0=start, a0=0.8, steps=20_000, record=None, tol=1e-9)
        assert found.status == ["converged"] * 2
        off = (found.eff_lr[:, 0] * found.lr / asymptotes(SMALL, start, 0.8).C2_late - 1).abs()
        assert float(off[1]) < 0.4
        assert float(off[1]) < 0.5 * float(off[0])


def test_large_learning_rates_from_g():
    start = SMALL.g
    found = run(SMALL, [1e7, 1e8, 1e9], w0=start, steps=300, record=None)
    slopes = found.eff_lr[:, 0].log10().diff()
    np.testing.assert_allclose(slopes, [-3, -3], atol=0.01)
    end = asymptotes(SMALL, start)
    assert (end.case, end.power) == ("w0_parallel_g", 3)
    assert found.eff_lr[2, 0] * 1e27 == pytest.approx(end.C2, rel=1e-3)
    assert end.plateau[1] == pytest.approx((end.C2 / SMALL.spectrum().eff_lr_opt) ** (1 / 3))


def test_a_start_along_the_minimiser():
    end = asymptotes(SMALL, [2.0, 2.0, 2.0])
    assert (end.case, end.C1, end.C2) == ("w0_parallel_u", 0.25, math.inf)


def test_the_plateau_grows_with_dimension():
    """Medians over 15 starts; the ratio to d stays within a factor of 3 over two decades."""
    widths = {}
    for d in (25, 100, 400):
        generator = torch.Generator().manual_seed(d)
        lam = torch.logspace(0, math.log10(80), d, dtype=torch.float64)
        found = []
        for _ in range(15):
            u, w = torch.randn(2, d, generator=generator, dtype=torch.float64)
            found.append(asymptotes(OLS(lam, u=u / u.norm()), w / w.norm()).width)
        widths[d] = float(np.median(found))
    assert widths[25] < widths[100] < widths[400]
    ratios = [width / d for d, width in widths.items()]
    assert max(ratios) < 3 * min(ratios)


# ---- gradient descent ----


def test_gradient_descent():
    limit = SMALL.spectrum().gd_lr_max
    lrs, start = [1.01 * limit, 0.4, 0.01], [0.2, -0.5, 0.7]
    found = run(SMALL, lrs, w0=start, method="gd", steps=3000)
    H, u, w = SMALL.H.numpy(), SMALL.u.numpy(), np.array(start)
    for i, lr in enumerate(lrs):
        v = w.copy()
        for _ in range(10):
            v = v + lr * (SMALL.g.numpy() - H @ v)
        assert found.excess[i, 10] == pytest.approx((v - u) @ H @ (v - u) / 2, rel=1e-11)
        assert found.norm_w[i, 10] == pytest.approx(np.linalg.norm(v), rel=1e-11)
    assert found.status == ["diverged", "converged", "converged"]
    assert found.excess[0, 2000] / found.excess[0, 1999] == pytest.approx(1.02**2, rel=1e-9)
    assert found.rate[0] == pytest.approx(1.02**2, rel=1e-9)
    assert found.rate[1] == pytest.approx(SMALL.spectrum().gd_rate_opt ** 2, rel=1e-6)
    assert found.rate[2] == pytest.approx(SMALL.spectrum().gd_rate(0.01) ** 2, rel=1e-6)
    assert bool(torch.isnan(found.a).all())
    assert run(SMALL, 0.1, method="gd", steps=0).excess[0, 0] == pytest.approx(SMALL.S / 2)


def test_real_data():
    diabetes = OLS.from_data(*load_diabetes(return_X_y=True), standardize=True)
    assert diabetes.d == 10
    assert diabetes.spectrum().kappa == pytest.approx(470.1, abs=0.05)
    assert diabetes.spectrum().kappa_star == pytest.approx(105.8, abs=0.05)
    limit = diabetes.spectrum().gd_lr_max
    lrs = [0.99 * limit, limit / 2, limit / 10, 1.01 * limit]
    found = run(diabetes, lrs, method="gd", steps=20_000, tol=1e-6, record=None)
    assert found.steps[:3].tolist() == [972, 1926, 9637]
    assert found.status == ["converged"] * 3 + ["diverged"]
    cancer = OLS.from_data(*load_breast_cancer(return_X_y=True), standardize=True).spectrum()
    assert (cancer.kappa, cancer.kappa_star) == pytest.approx((99_828, 25_148), abs=1)


def test_data():
    X, y = np.random.default_rng(0).standard_normal((50, 3)) + 5, np.arange(50.0)
    problem = OLS.from_data(X, y)
    slope = np.linalg.lstsq(np.c_[X, np.ones(50)], y, rcond=None)
    np.testing.assert_allclose(problem.u, slope[0][:3], rtol=1e-10)
    assert problem.min_loss == pytest.approx(slope[1][0] / 100)
    ridged = OLS.from_data(X, y, ridge=0.5)
    np.testing.assert_allclose(ridged.H - problem.H, 0.5 * np.eye(3), atol=1e-12)
    torch.testing.assert_close(OLS.from_data(X, y, standardize=True).H.diagonal(), torch.ones(3).double())
    twice = np.c_[X, X[:, 0]]
    with pytest.raises(ValueError, match="full rank"):
        OLS.from_data(twice, y)
    assert OLS.from_data(twice, y, ridge=0.1).d == 4
    with pytest.raises(ValueError, match=r"constant columns \[1\]"):
        OLS.from_data(np.c_[X[:, 0], np.ones(50)], y, standardize=True)


# ---- maps ----


def test_a_map_shows_what_its_runs_show():
    problem = problem_100()
    lrs, lr_as = torch.logspace(-4, 12, 9), torch.tensor([1e-6, 0.01, 0.5, 1.0])
    found = convergence_map(problem, lrs, lr_as, steps=600)
    grid = torch.cartesian_prod(lrs, lr_as)
    runs = run(problem, grid[:, 0], grid[:, 1], steps=600, record=None)
    # Below about 1e-6 S rounding makes trajectories differ: there, only that both are so low.
    mine, theirs = found.relative.flatten(), runs.excess[:, 0] / problem.S
    high = theirs > 1e-8
    assert int(high.sum()) > 20
    torch.testing.assert_close(mine[high], theirs[high], rtol=1e-5, atol=0)
    assert bool((mine[~high] <= 1e-8).all())
    torch.testing.assert_close(found.eff_lr.flatten()[high], runs.eff_lr[high, 0], rtol=1e-5, atol=0)
    assert [status for row in found.status for status in row] == runs.status
    assert found.counts()["stalled"] > 5
    assert sum(found.counts().values()) == 36


def test_no_learning_rate_diverges_and_a_wide_band_is_good():
    problem = problem_100()
    found = run(problem, torch.logspace(-5, 16, 43), steps=3000, record=None)
    assert bool(torch.isfinite(found.excess).all())
    assert "diverged" not in found.status
    end = asymptotes(problem, torch.randn(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    assert end.width > 10
    start = torch.randn(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = run(problem, torch.logspace(-2, 1, 7), w0=start / start.norm(), steps=3000, record=None)
    assert bool((found.excess < 1e-12).all())
    ratios = found.eff_lr[:, 0] / problem.spectrum().eff_lr_max
    assert 0.98 < float(ratios.max()) < 1.01


def test_plot(tmp_path):
    found = convergence_map(SMALL, [0.01, 0.1, 1.0], [0.5, 1.0], steps=50)
    axes = found.plot()
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "learning rate of w")
    axes.figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 3000


def test_large_rates_of_a():
    with pytest.warns(UserWarning, match="lr_a > 1"):
        found = run(SMALL, 0.1, [1.0, 2.1], W0, 0.5, 2000)
    assert found.status == ["converged", "diverged"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(SMALL, 0.1, 1.0, W0, steps=1)


# ---- bad input ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OLS([[1.0, 0.1], [0.2, 1.0]], u=[1, 1]), "H must be symmetric"),
        (lambda: OLS([[1.0, 2.0], [2.0, 1.0]], u=[1, 1]), "smallest eigenvalue of H"),
        (lambda: OLS([1.0, 0.0], u=[1, 1]), "smallest eigenvalue of H"),
        (lambda: OLS([1.0, -1.0], u=[1, 1]), "smallest eigenvalue of H"),
        (lambda: OLS([1.0, math.nan], u=[1, 1]), "H must be finite"),
        (lambda: OLS(np.ones((2, 3)), u=[1, 1]), "shape of H"),
        (lambda: OLS([], u=[]), "shape of H"),
        (lambda: OLS(["a"], u=[1]), "H must be numbers"),
        (lambda: OLS([1.0, 2.0]), "one of the two, got 'neither'"),
        (lambda: OLS([1.0, 2.0], u=[1, 1], g=[1, 1]), "one of the two, got 'both'"),
        (lambda: OLS([1.0, 2.0], u=[1, 1, 1]), "shape of u"),
        (lambda: OLS([1.0, 2.0], g=[1]), "shape of g"),
        (lambda: OLS([1.0, 2.0], u=[0, 0]), "with a direction"),
        (lambda: OLS([1.0, 2.0], u=[1, 1], c=1.0), "c must be at least u'Hu = 3"),
        (lambda: OLS.from_data([1.0, 2.0], [1.0, 2.0]), "shape of X"),
        (lambda: OLS.from_data([[1.0], [2.0]], [1.0]), "shape of y"),
        (lambda: OLS.from_data([[1.0], [2.0]], [1.0, 2.0], ridge=-1), "ridge"),
        (lambda: run(SMALL, 0.0), "lr must be > 0"),
        (lambda: run(SMALL, math.nan), "lr must be finite"),
        (lambda: run(SMALL, 0.1, 0.0), "lr_a must be > 0"),
        (lambda: run(SMALL, 0.1, w0=[0, 0, 0]), "w0 must be another one"),
        (lambda: run(SMALL, 0.1, w0=[1, 0]), "shape of w0"),
        (lambda: run(SMALL, [0.1, 0.2], [0.1, 0.2, 0.3]), "the lengths"),
        (lambda: run(SMALL, [[0.1]]), "shape of lr"),
        (lambda: run(SMALL, 1e250), "at most 1e200"),
        (lambda: run(SMALL, 0.1, steps=-1), "steps must be >= 0"),
        (lambda: run(SMALL, 0.1, tol=0.0), "tol"),
        (lambda: run(SMALL, 0.1, method="gd", a0=1.0), "a0"),
        (lambda: convergence_map(SMALL, 0.1, [1.0]), "shape of lrs"),
        (lambda: convergence_map(SMALL, [0.1], [1.0], steps=0), "steps"),
        (lambda: convergence_map(SMALL, [0.1], [1.0], tol=-1), "tol"),
        (lambda: asymptotes(SMALL, [0, 0, 0]), "w0 must be another one"),
        (lambda: asymptotes(SMALL, W0, 0.0), "a0"),
        (lambda: asymptotes(SMALL, [1.0]), "shape of w0"),
        (lambda: transform(SMALL, mu=0.0), "mu must be positive"),
        (lambda: transform(SMALL, Q=np.ones((3, 3))), "Q must be orthogonal"),
        (lambda: transform(SMALL, Q=np.ones((2, 2))), "shape of Q"),
        (lambda: equivalent_lr(0.1, r=-1), "r must be positive"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["method", "order", "record"])
def test_unknown_names(name):
    with pytest.raises(UnknownName, match=f"unknown bngd {name} 'sgd'"):
        run(SMALL, 0.1, **{name: "sgd"})


def test_the_module_is_the_name():
    assert bngd.OLS is OLS
    assert "S=7" in repr(SMALL)
