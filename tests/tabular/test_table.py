"""Rows in canonical order, held-out parts, standardised columns."""

import numpy as np
import pytest

from conjugo.tabular.table import Standardizer, check_finite, merged, split

RNG = np.random.default_rng(4)


def test_merged_rows_are_a_table_of_counts():
    inputs, targets = RNG.integers(0, 3, (200, 2)).astype(float), RNG.integers(0, 2, (200, 1)).astype(float)
    rows = merged(inputs, targets, np.ones(200))
    keys, counts = np.unique(np.hstack([inputs, targets]), axis=0, return_counts=True)
    assert np.array_equal(np.hstack([rows.inputs, rows.targets]), keys)
    assert rows.weights.tolist() == (counts / 200).tolist()


def test_the_order_of_rows_does_not_matter_to_the_last_bit():
    inputs, targets = RNG.integers(0, 3, (200, 2)).astype(float), np.zeros((200, 1))
    weights = RNG.uniform(size=200)
    order = RNG.permutation(200)
    a, b = merged(inputs, targets, weights), merged(inputs[order], targets[order], weights[order])
    assert a.weights.tobytes() == b.weights.tobytes()
    assert a.inputs.tobytes() == b.inputs.tobytes()


def test_rows_without_weight_are_left_out():
    rows = merged(np.array([[1.0], [2.0], [3.0]]), np.zeros((3, 1)), np.array([1.0, 0.0, 3.0]))
    assert rows.inputs.tolist() == [[1.0], [3.0]]
    assert rows.weights.tolist() == [0.25, 0.75]


def test_a_split_keeps_the_shares_of_the_strata():
    strata = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    kept, held_out = split(strata, 0.2, np.random.default_rng(0))
    assert np.bincount(strata[held_out], minlength=4).tolist() == [20, 2, 0, 0]
    assert sorted([*kept, *held_out]) == list(range(113))
    again = split(strata, 0.2, np.random.default_rng(0))
    assert np.array_equal(held_out, again[1])
    assert not np.array_equal(held_out, split(strata, 0.2, np.random.default_rng(1))[1])


def test_a_split_never_takes_all_of_a_stratum():
    kept, _ = split(np.array([0, 0, 1]), 0.99, np.random.default_rng(0))
    assert len(kept) == 2


def test_standardised_columns():
    values = np.column_stack([RNG.normal(5, 3, 1000), np.full(1000, 7.0), np.full(1000, 0.1) + 1e-18])
    weights = RNG.uniform(size=1000)
    weights /= weights.sum()
    standardizer = Standardizer.of(values, weights)
    result = standardizer(values)
    assert weights @ result[:, 0] == pytest.approx(0, abs=1e-13)
    assert weights @ result[:, 0] ** 2 == pytest.approx(1, rel=1e-13)
    assert standardizer.scale[1:].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(standardizer.undo(result), values, rtol=1e-13)


def test_what_is_not_finite_is_named():
    values = np.ones((3, 2))
    check_finite(values, "CGClassifier", "X")
    values[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"^CGClassifier: X, row 1, column 1 must be finite.*, got nan$"):
        check_finite(values, "CGClassifier", "X")
    with pytest.raises(ValueError, match="X, row 1, column 'income' must be finite"):
        check_finite(values, "CGClassifier", "X", np.array(["age", "income"], dtype=object))
    with pytest.raises(ValueError, match=r"y, row 0 must be finite.*, got inf"):
        check_finite(np.array([[np.inf]]), "CGClassifier", "y")
