"""Many problems in lockstep: each ends as it would alone."""

import numpy as np
import pytest
import torch
from scipy.optimize import rosen, rosen_der

from conjugo.optim.classical import METHODS, minimize_batch


def rosenbrock(X):
    if isinstance(X, torch.Tensor):
        f, g = rosenbrock(X.numpy())
        return torch.from_numpy(f), torch.from_numpy(g)
    return np.array([rosen(x) for x in X]), np.array([rosen_der(x) for x in X])


STARTS = np.array([[-1.2, 1.0, -1.2, 1.0], [0.0, 0.0, 0.0, 0.0], [1.1, 0.9, 1.1, 0.9]])


@pytest.mark.parametrize("method", METHODS)
def test_each_problem_ends_as_it_would_alone(method):
    together = minimize_batch(rosenbrock, STARTS, method=method, max_eval=300)
    assert len(set(together.nfev)) >= 2
    for row, start in enumerate(STARTS):
        alone = minimize_batch(rosenbrock, start[None], method=method, max_eval=300)
        np.testing.assert_array_equal(together.x[row], alone.x[0])
        assert (together.nfev[row], together.nit[row]) == (alone.nfev[0], alone.nit[0])
        assert together.message[row] == alone.message[0]
    assert together.rounds == max(together.nfev)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dy"])
def test_minima_are_found(method):
    result = minimize_batch(rosenbrock, STARTS[:, :2].copy(), method=method, gtol=1e-8)
    assert result.success.all()
    np.testing.assert_allclose(result.x, 1.0, atol=1e-7)
    np.testing.assert_allclose(result.fun, 0.0, atol=1e-13)
    assert abs(result.jac).max() <= 1e-8


def test_tensors_do_as_arrays_do():
    a = minimize_batch(rosenbrock, STARTS)
    t = minimize_batch(rosenbrock, torch.from_numpy(STARTS))
    np.testing.assert_allclose(t.x.numpy(), a.x, atol=1e-5)
    assert isinstance(t.jac, torch.Tensor)
    assert t.success.all()


def test_the_callback_sees_every_iteration_and_may_stop_one_problem_or_all():
    seen = {0: [], 1: [], 2: []}

    def callback(result):
        for row, f, x, nit in zip(result.rows, result.fun, result.x, result.nit, strict=True):
            assert f == rosen(x)
            seen[row].append(f)
            assert nit == len(seen[row])
        return [row == 1 and nit == 3 for row, nit in zip(result.rows, result.nit, strict=True)]

    result = minimize_batch(rosenbrock, STARTS, callback=callback)
    assert [len(seen[row]) for row in range(3)] == result.nit.tolist()
    assert result.nit[1] == 3
    assert "asked to stop" in result.message[1]
    assert result.success.tolist() == [True, False, True]
    assert all(np.all(np.diff(fs) <= 1e-14) for fs in seen.values())
    assert [seen[row][-1] for row in range(3)] == result.fun.tolist()

    def stop(result):
        raise StopIteration

    assert minimize_batch(rosenbrock, STARTS, callback=stop).nit.max() == 1


def test_rows_say_which_problem_is_meant():
    centres = np.array([[1.0], [2.0], [30.0]])

    def fun(X, rows):
        return ((X - centres[rows]) ** 4).sum(1), 4 * (X - centres[rows]) ** 3

    result = minimize_batch(fun, np.zeros((3, 1)), pass_rows=True, gtol=1e-9)
    np.testing.assert_allclose(result.x, centres, atol=1e-2)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"minimize_batch: x0 must be of shape \[B, n\] .* got \(4,\)"):
        minimize_batch(rosenbrock, STARTS[0])
    with pytest.raises(TypeError, match="minimize_batch: x0 must be float32 or float64, got int64"):
        minimize_batch(rosenbrock, np.ones((1, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"minimize_batch: fun must be a function that returns the shapes"):
        minimize_batch(lambda X: (X, X), STARTS)
    with pytest.raises(ValueError, match="unknown minimize_batch method 'powell'; did you mean 'powell-beale'"):
        minimize_batch(rosenbrock, STARTS, method="powell")


LAYOUTS = {
    "columns first": np.asfortranarray,
    "backwards": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "read only": lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),
    "transposed tensor": lambda x: torch.from_numpy(np.ascontiguousarray(x.T)).T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_starts_does_not_matter(layout):
    expected = minimize_batch(rosenbrock, STARTS)
    found = minimize_batch(rosenbrock, LAYOUTS[layout](STARTS))
    np.testing.assert_array_equal(np.asarray(found.x), expected.x)
    np.testing.assert_array_equal(found.nfev, expected.nfev)


def test_gradients_of_another_precision_are_converted():
    def parabola(X):  # float64 gradients of float32 variables
        return 0.5 * (X.double() ** 2).sum(1), X.double()

    result = minimize_batch(parabola, torch.tensor([[3.0, -4.0], [1.0, 2.0]]))
    assert result.success.all()
    assert result.x.dtype == torch.float32
    assert result.x.abs().max() <= 1e-5
