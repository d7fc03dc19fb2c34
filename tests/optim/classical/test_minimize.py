"""minimize: minima, the points it returns, what it takes, what it refuses."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.optimize import rosen, rosen_der
from sklearn.linear_model import LogisticRegression
from tests.optim.classical.problems import (
    BARRIER_MINIMUM,
    SPECTRUM,
    barrier,
    logistic,
    quadratic,
    rosenbrock,
    rosenbrock_start,
)

from conjugo.errors import UnknownName
from conjugo.optim import minimize
from conjugo.optim.classical import METHODS

SOUND = [method for method in METHODS if method != "dy"]
"""Dai-Yuan alone fails on Rosenbrock's function: known, and documented."""

# ---- minima ----


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_in_n_variables_takes_n_lines(method):
    result = minimize(quadratic, torch.ones(10, dtype=torch.float64), method=method, gtol=1e-6)
    assert result.success
    assert result.nit <= 11
    assert result.nfev <= (23 if method == "scg" else 14)  # less than the two per line of an exact line search
    assert abs(result.x).max() < 1e-6


@pytest.mark.parametrize("method", ["fr", "pr+", "hs+", "powell-beale", "scg"])
def test_rosenbrock_in_ten_variables(method):
    result = minimize(rosenbrock, rosenbrock_start(), method=method, gtol=1e-6, max_eval=400)
    assert result.success
    assert result.fun < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_logistic_regression_has_the_minimum_of_scikit_learn(method):
    fun, X, y = logistic()
    result = minimize(fun, np.zeros(31), method=method, jac=True, gtol=1e-9)
    model = LogisticRegression(C=1e3 / len(y), tol=1e-10, max_iter=10_000).fit(X, y)
    assert result.fun == pytest.approx(0.05982794, abs=1e-8)
    assert result.fun <= fun(np.append(model.coef_, model.intercept_))[0] + 1e-12
    np.testing.assert_allclose(result.x, np.append(model.coef_, model.intercept_), atol=1e-5)


@pytest.mark.parametrize("method", SOUND)
def test_minima_are_those_of_scipy(method):
    start = np.array([3.0, -1.0, 0.0, 2.0])
    ours = minimize(rosen, start, method=method, jac=rosen_der, gtol=1e-8)
    theirs = scipy.optimize.minimize(rosen, start, jac=rosen_der, method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-6)
    assert ours.success


def test_fewer_evaluations_than_scipy():
    ours = minimize(rosen, rosenbrock_start(100).numpy(), jac=rosen_der, gtol=1e-6)
    theirs = scipy.optimize.minimize(
        rosen, rosenbrock_start(100).numpy(), jac=rosen_der, method="CG", options={"gtol": 1e-6}
    )
    assert ours.success
    assert ours.nfev < 0.4 * theirs.nfev


@pytest.mark.parametrize("method", METHODS)
def test_a_function_that_is_not_finite_everywhere(method):
    start = torch.tensor([0.9, -0.9, 0.99], dtype=torch.float64)
    result = minimize(barrier, start, method=method, gtol=1e-8)
    assert result.success
    assert result.x.tolist() == pytest.approx([BARRIER_MINIMUM, 0, 0], abs=1e-8)


@pytest.mark.parametrize("method", SOUND)
def test_float32_gets_as_far_as_its_digits(method):
    result = minimize(rosenbrock, rosenbrock_start(4, torch.float32), method=method, gtol=1e-4)
    assert result.success
    assert result.x.dtype == torch.float32
    assert (result.x - 1).abs().max() < 1e-3


def test_a_gradient_far_below_the_rounding_of_the_value_is_reached():
    """1 + |x|^2 has no digits below |x| = 1e-8, gradients have."""
    result = minimize(lambda x: 1 + quadratic(x), torch.ones(10, dtype=torch.float64), gtol=1e-12)
    assert result.success
    assert abs(result.x).max() < 1e-12


def test_scg_with_exact_curvature_goes_on_where_differences_end():
    start = rosenbrock_start(4, torch.float32)
    exact = minimize(rosenbrock, start, method="scg", curvature="hvp", gtol=1e-4)
    assert exact.success
    double = minimize(rosenbrock, start.double(), method="scg", curvature="hvp", gtol=1e-8)
    difference = minimize(rosenbrock, start.double(), method="scg", gtol=1e-8)
    torch.testing.assert_close(double.x, difference.x, atol=1e-6, rtol=0)


def test_a_good_preconditioner_makes_it_a_round_bowl():
    start = torch.ones(10, dtype=torch.float64)
    result = minimize(quadratic, start, precond=lambda g: g / SPECTRUM, gtol=1e-10)
    assert result.nit == 1
    assert result.nfev <= 4


@pytest.mark.parametrize("method", [m for m in SOUND if m != "scg"])
def test_a_preconditioner_is_a_change_of_variables(method):
    """P = S S' and x = S u: the same values along the way, for rules without |d|."""
    scale = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    start = torch.tensor([-1.2, 1.0, -1.2, 1.0], dtype=torch.float64)
    plain, scaled = [], []
    minimize(lambda u: rosenbrock(scale * u), start / scale, method=method, callback=lambda r: plain.append(r.fun))
    minimize(rosenbrock, start, method=method, precond=lambda g: g * scale**2, callback=lambda r: scaled.append(r.fun))
    assert scaled[:8] == pytest.approx(plain[:8], rel=1e-6)


# ---- the point it returns ----


class Recorder:
    """A function that remembers its values."""

    def __init__(self, fun):
        self.fun, self.values = fun, []

    def __call__(self, x):
        value = self.fun(x)
        self.values.append(float(value.detach()))
        return value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_eval", [1, 2, 3, 5, 10, 17, 30])
def test_the_lowest_point_is_returned_when_evaluations_run_out(method, max_eval):
    fun = Recorder(rosenbrock)
    result = minimize(fun, rosenbrock_start(), method=method, max_eval=max_eval)
    assert result.status == 4
    assert len(fun.values) == result.nfev <= max_eval
    assert result.fun == min(fun.values) == rosenbrock(result.x).item()
    torch.testing.assert_close(result.jac, torch.func.grad(rosenbrock)(result.x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_sees_values_that_never_rise(method):
    seen = []
    result = minimize(rosenbrock, rosenbrock_start(), method=method, callback=seen.append, max_iter=25)
    assert [r.nit for r in seen] == list(range(1, 26))
    assert result.nit == 25
    assert result.status == 1
    values = [r.fun for r in seen]
    assert values == sorted(values, reverse=True)
    assert all(r.fun == rosenbrock(r.x).item() for r in seen)
    assert seen[-1].fun == result.fun


@pytest.mark.parametrize(("error", "status"), [(StopIteration, 99), (KeyboardInterrupt, 100)])
def test_a_callback_may_end_the_run(error, status):
    seen = []

    def callback(intermediate_result):
        seen.append(intermediate_result)
        if len(seen) == 4:
            raise error

    result = minimize(rosenbrock, rosenbrock_start(), callback=callback)
    assert (result.status, result.success, result.nit) == (status, False, 4)
    assert torch.equal(result.x, seen[-1].x)


def test_an_interrupted_function_gives_the_lowest_point_so_far():
    fun = Recorder(rosenbrock)

    def interrupted(x):
        if len(fun.values) == 20:
            raise KeyboardInterrupt
        return fun(x)

    result = minimize(interrupted, rosenbrock_start())
    assert result.status == 100
    assert result.fun == min(fun.values) == rosenbrock(result.x).item()


def test_a_wrong_gradient_ends_without_progress_at_the_start():
    result = minimize(lambda x: ((x * x).sum(), -2 * x), torch.ones(3), jac=True)
    assert result.status == 2
    assert not result.success
    assert result.x.tolist() == [1.0, 1.0, 1.0]
    assert "does not belong" in result.message


def test_a_start_without_a_value_is_reported():
    result = minimize(barrier, torch.full((2,), 2.0))
    assert result.status == 3
    assert math.isnan(result.fun)
    assert result.nfev == 1


def test_f_tol_ends_early():
    loose = minimize(rosenbrock, rosenbrock_start(), f_tol=1e-3, gtol=0.0)
    assert loose.success
    assert 1e-10 < loose.fun < 1.0


def test_a_maximum_is_no_minimum():
    """From 0 the first step lands on the maximum of -cos at pi, where the gradient is 0."""
    result = minimize(lambda x: -torch.cos(x).sum(), torch.tensor([0.1], dtype=torch.float64), gtol=1e-8)
    assert result.fun == pytest.approx(-1.0)
    assert abs(math.sin(result.x.item())) < 1e-7


def test_two_runs_are_equal():
    one, two = (minimize(rosenbrock, rosenbrock_start()) for _ in range(2))
    assert torch.equal(one.x, two.x)


# ---- what it takes ----


def test_numpy_and_torch_take_the_same_way():
    start = rosenbrock_start()
    ours, theirs = minimize(rosenbrock, start), minimize(rosen, start.numpy(), jac=rosen_der)
    assert isinstance(theirs.x, np.ndarray)
    assert isinstance(theirs.jac, np.ndarray)
    assert ours.nfev == pytest.approx(theirs.nfev, abs=5)  # their sums round differently
    np.testing.assert_allclose(ours.x.numpy(), theirs.x, atol=1e-5)


def test_lists_integers_and_numbers_as_in_scipy():
    assert minimize(lambda x: (((x - 3) ** 2).sum(), 2 * (x - 3)), [0, 0], jac=True).x == pytest.approx([3, 3])
    assert float(minimize(lambda x: ((x - 3) ** 2, 2 * (x - 3)), 0.0, jac=True).x) == pytest.approx(3)


def test_args_and_a_gradient_function():
    result = minimize(
        lambda x, a: ((x - a) ** 2).sum(), torch.zeros(2), args=(4.0,), jac=lambda x, a: 2 * (x - a), gtol=1e-6
    )
    assert result.x.tolist() == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("method", SOUND)
def test_trees_of_any_shape_take_the_way_of_one_vector(method):
    start = rosenbrock_start(6)

    def of_tree(tree):
        return rosenbrock(torch.cat([tree["a"].reshape(-1), tree["b"][0], tree["b"][1].reshape(1)]))

    tree = {"a": start[:4].reshape(2, 2), "b": (start[4:5], start[5])}
    flat, result = (minimize(f, x, method=method, max_iter=10) for f, x in ((rosenbrock, start), (of_tree, tree)))
    assert result.x["a"].shape == (2, 2)
    assert result.x["b"][1].shape == ()
    joined = torch.cat([result.x["a"].reshape(-1), result.x["b"][0], result.x["b"][1].reshape(1)])
    torch.testing.assert_close(joined, flat.x, rtol=1e-8, atol=1e-8)


def test_complex_variables_are_pairs_of_real_ones():
    matrix = torch.randn(6, 4, dtype=torch.complex128)
    target = torch.randn(6, dtype=torch.complex128)

    def residual(z):
        return (matrix @ z["z"] - target).abs().square().sum() + (z["shift"] - 1) ** 2

    start = {"shift": torch.zeros((), dtype=torch.float64), "z": torch.zeros(4, dtype=torch.complex128)}
    result = minimize(residual, start, gtol=1e-10)
    torch.testing.assert_close(result.x["z"], torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0])
    assert result.x["shift"].item() == pytest.approx(1.0)


def test_the_start_is_not_changed_and_the_result_is_its_own():
    start = rosenbrock_start().requires_grad_()
    before = start.detach().clone()
    result = minimize(rosenbrock, start)
    assert torch.equal(start.detach(), before)
    assert start.grad is None
    assert not result.x.requires_grad
    array = before.numpy().copy()
    minimize(rosen, array, jac=rosen_der)
    np.testing.assert_array_equal(array, before.numpy())


def test_variables_that_do_not_matter_stay():
    result = minimize(lambda p: (p[0] ** 2).sum(), [torch.ones(2), torch.ones(3)])
    assert result.x[1].tolist() == [1.0, 1.0, 1.0]
    assert result.success


def test_long_float32_vectors_keep_the_digits_of_their_sums():
    n = 200_000
    target = torch.linspace(-1, 1, n)
    scale = torch.linspace(1, 30, n)
    result = minimize(lambda x: 0.5 * (scale * (x - target) ** 2).sum(), torch.zeros(n), gtol=1e-4)
    assert result.success
    assert result.nit < 40
    torch.testing.assert_close(result.x, target, atol=1e-4, rtol=0)


def test_batched_tensors_are_independent_problems():
    starts = torch.stack([rosenbrock_start(4), torch.zeros(4, dtype=torch.float64)]).reshape(2, 2, 2)
    seen = []
    result = minimize(lambda x: rosenbrock(x.reshape(-1)), starts, batched=True, callback=seen.append, gtol=1e-8)
    assert result.x.shape == result.jac.shape == (2, 2, 2)
    assert result.success.all()
    assert sum(len(r.rows) for r in seen) == result.nit.sum()
    assert all(r.x.shape == (len(r.rows), 2, 2) for r in seen)
    for start, x, nfev in zip(starts, result.x, result.nfev, strict=True):
        alone = minimize(rosenbrock, start.reshape(-1), gtol=1e-8)
        torch.testing.assert_close(x.reshape(-1), alone.x, atol=1e-6, rtol=0)
        assert nfev == pytest.approx(alone.nfev, abs=10)  # vmap sums in another order


# ---- what it refuses ----

ONES = torch.ones(2)
WRONG = [
    ({"method": "powel"}, UnknownName, "unknown minimize method 'powel'; did you mean 'powell-beale'"),
    ({"curvature": "hvpp", "method": "scg"}, UnknownName, "unknown minimize curvature 'hvpp'; did you mean 'hvp'"),
    ({"curvature": "hvp"}, ValueError, "minimize: curvature must be 'difference' unless method is 'scg', got 'hvp'"),
    ({"gtol": -1.0}, ValueError, r"minimize: gtol must be in \[0, inf\), got -1.0"),
    ({"gtol": math.nan}, ValueError, "minimize: gtol must be"),
    ({"f_tol": -1.0}, ValueError, r"minimize: f_tol must be in \[0, inf\), got -1.0"),
    ({"max_iter": -1}, ValueError, "minimize: max_iter must be >= 0 or None, got -1"),
    ({"max_eval": 0}, ValueError, "minimize: max_eval must be >= 1 or None, got 0"),
    ({"c1": 0.5}, ValueError, r"minimize: c1 must be in \(0, 0.5\), got 0.5"),
    ({"c2": 1e-5}, ValueError, r"minimize: c2 must be in \(c1, 1\) = \(0.0001, 1\), got 1e-05"),
    ({"method": "scg", "precond": lambda g: g}, ValueError, "minimize: precond must be None with method 'scg'"),
    ({"x0": torch.ones(2, dtype=torch.int64)}, TypeError, "minimize: x0 must be float32, .* got torch.int64"),
    ({"x0": torch.ones(2, dtype=torch.bfloat16)}, TypeError, "minimize: x0 must be float32, .* got torch.bfloat16"),
    ({"x0": [ONES, ONES.double()]}, TypeError, "minimize: all of x0 must have one precision and device"),
    ({"x0": "start"}, TypeError, "minimize: x0 must hold tensors, or be a numeric array, got str"),
    ({"x0": torch.ones(0)}, ValueError, "minimize: x0 must be of at least one variable"),
    ({"x0": torch.tensor([1.0, math.nan])}, ValueError, "minimize: x0 must be finite"),
    ({"x0": np.ones(2)}, ValueError, "minimize: jac must be True or a function, with x0 a NumPy array, got None"),
    ({"fun": lambda x: x}, ValueError, "minimize: fun must be a function that returns a real scalar tensor"),
    ({"fun": lambda x: 3.0}, ValueError, "minimize: fun must be .* got 3.0"),
    ({"fun": lambda x: torch.tensor(3.0)}, ValueError, "minimize: fun must be .* that depends on x"),
    ({"fun": lambda x: (x.sum(), x[:1]), "jac": True}, ValueError, "minimize: the gradient must be of the structure"),
    ({"fun": lambda x: (x, x), "jac": True}, ValueError, "minimize: fun must be a function that returns a real scalar"),
    ({"fun": lambda x: (x.sum(), x * 1j), "jac": True}, TypeError, "minimize: the gradient must be real where x0 is"),
    ({"precond": lambda g: g[:1]}, ValueError, "minimize: what precond returns must be of the structure"),
    ({"jac": True, "method": "scg", "curvature": "hvp"}, ValueError, "minimize: curvature must be 'difference' unless"),
    ({"batched": True, "x0": torch.ones(())}, ValueError, r"minimize: x0 must be a tensor \[B, ...\] with batched"),
    ({"batched": True, "jac": True}, ValueError, "minimize: jac must be None with batched=True"),
    ({"batched": True, "precond": lambda g: g}, ValueError, "minimize: precond must be None with batched=True"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_bad_input_is_named(wrong, error, message):
    arguments = {"fun": lambda x: (x * x).sum(), "x0": ONES} | wrong
    with pytest.raises(error, match=message):
        minimize(**arguments)
