"""Several starts at once, and early stopping."""

from types import SimpleNamespace

import numpy as np
import pytest

from conjugo.tabular.training import EarlyStopping, train


def valleys(parameters):
    """(x^2 - 1)^2 + y^2 / 2: two minima, at (1, 0) and (-1, 0)."""
    x, y = parameters.T
    return (x * x - 1) ** 2 + y * y / 2, np.stack([4 * x * (x * x - 1), y], 1)


@pytest.mark.parametrize("method", ["powell-beale", "scg", "pr+"])
def test_starts_end_where_they_would_alone(method):
    starts = np.array([[1.4, 0.1], [-1.5, 0.2], [0.9, -1.0]])
    options = {"method": method, "max_iter": 200, "tol": 1e-8}
    together = train(valleys, starts, **options)
    assert [round(one.parameters[0], 6) for one in together] == [1.0, -1.0, 1.0]
    for i, one in enumerate(together):
        (alone,) = train(valleys, starts[i : i + 1], **options)
        assert alone.parameters.tobytes() == one.parameters.tobytes()
        assert (alone.loss, alone.evaluations, alone.iterations) == (one.loss, one.evaluations, one.iterations)
        assert one.converged
        assert one.gradient <= 1e-8
        assert one.validation is None
        assert not one.stopped_early


def test_what_is_cut_short_says_so():
    (one,) = train(valleys, np.array([[3.0, 1.0]]), method="fr", max_iter=1, tol=1e-8)
    assert not one.converged
    assert one.iterations == 1
    assert one.loss < valleys(np.array([[3.0, 1.0]]))[0][0]
    assert "maximum number of iterations" in one.message


def state(rows, points):
    return SimpleNamespace(rows=np.array(rows), x=np.array(points, dtype=float)[:, None])


def test_early_stopping_keeps_the_best_iterate_and_has_patience():
    stopping = EarlyStopping(lambda x: float(abs(x[0])), patience=2, starts=np.array([[5.0], [7.0]]))
    assert stopping(state([0, 1], [3, 6])) == [False, False]
    assert stopping(state([1], [8])) == [False]  # start 0 was still searching for its step
    assert stopping(state([0, 1], [-1, 9])) == [False, True]
    assert stopping(state([0], [2])) == [False]
    assert stopping(state([0], [1])) == [True]  # as good as the best is no improvement
    assert stopping.parameters.tolist() == [[-1.0], [6.0]]
    assert stopping.losses.tolist() == [1.0, 6.0]
    assert stopping.stopped == [True, True]


def test_early_stopping_gives_the_best_iterate_with_its_own_objective():
    def held_out(parameters):
        return float(((parameters - [1.2, 0.4]) ** 2).sum())

    starts = np.array([[3.0, 1.0], [1.2, 0.4]])
    first, second = train(
        valleys, starts, method="powell-beale", max_iter=100, tol=1e-10, validation=held_out, patience=3
    )
    assert second.parameters.tolist() == [1.2, 0.4]  # where it started; it never got better
    assert second.stopped_early
    assert not second.converged
    assert first.validation == held_out(first.parameters)
    assert first.loss == valleys(first.parameters[None])[0][0]


def test_steps_into_the_infinite_are_shortened_without_a_warning():
    def cliff(parameters):
        inside = np.abs(parameters).max(1) < 3
        gradients = np.where(inside[:, None], [100.0, 1.0] * parameters, [1e300, -1e300])
        return np.where(inside, (parameters**2 * [50.0, 0.5]).sum(1), np.inf), gradients

    (one,) = train(cliff, np.array([[2.0, -2.0]]), method="powell-beale", max_iter=100, tol=1e-8)
    assert one.converged


def test_an_interrupted_training_gives_no_model():
    calls = iter(range(3))

    def interrupted(parameters):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return valleys(parameters)

    with pytest.raises(KeyboardInterrupt):
        train(interrupted, np.array([[3.0, 1.0]]), method="fr", max_iter=100, tol=1e-12)
