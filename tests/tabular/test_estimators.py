"""CGClassifier and CGRegressor against scikit-learn's solvers, known minima, and each other."""

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_iris, load_wine, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from conjugo.errors import UnknownName
from conjugo.tabular import CGClassifier, CGRegressor
from conjugo.tabular.training import METHODS

X, Y = load_breast_cancer(return_X_y=True)
WINE = load_wine(return_X_y=True)
IRIS = load_iris(return_X_y=True)
RNG = np.random.default_rng(6)


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip([*a.coefs_, *a.intercepts_], [*b.coefs_, *b.intercepts_]))


@parametrize_with_checks([CGClassifier(), CGRegressor()])
@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning", "ignore::sklearn.exceptions.SkipTestWarning"
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


# ---- convex problems, whose answer is known ----


@pytest.mark.parametrize("method", METHODS)
def test_without_a_hidden_layer_every_method_finds_the_minimum_of_logistic_regression(method, convex):
    model = CGClassifier(hidden=(), alpha=1e-3, method=method, tol=1e-8, max_iter=5000).fit(X, Y)
    assert model.converged_
    assert model.loss_ == pytest.approx(0.05982794, abs=5e-9)
    assert model.loss_ == pytest.approx(convex.loss_, abs=1e-9)
    peer = LogisticRegression(C=1 / (len(Y) * 1e-3), tol=1e-10, max_iter=10000).fit(
        StandardScaler().fit_transform(X), Y
    )
    np.testing.assert_allclose(model.coefs_[0][:, 0], peer.coef_[0], atol=1e-5)
    np.testing.assert_allclose(model.intercepts_[0], peer.intercept_, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X), peer.predict_proba(StandardScaler().fit_transform(X)), atol=1e-5)


@pytest.fixture(scope="module")
def convex():
    return CGClassifier(hidden=(), alpha=1e-3, tol=1e-8, max_iter=5000).fit(X, Y)


def test_several_classes_are_softmax_regression():
    inputs, classes = WINE
    model = CGClassifier(hidden=(), alpha=0.01, tol=1e-9).fit(inputs, classes)
    standard = StandardScaler().fit_transform(inputs)
    peer = LogisticRegression(C=1 / (len(classes) * 0.01), tol=1e-11, max_iter=10000).fit(standard, classes)
    np.testing.assert_allclose(model.coefs_[0].T, peer.coef_, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(inputs), peer.predict_proba(standard), atol=1e-6)


def test_regression_without_a_hidden_layer_is_ridge():
    inputs, targets = make_regression(100, 7, n_targets=2, noise=20.0, random_state=0)
    weights = RNG.uniform(0.5, 2, 100)
    model = CGRegressor(hidden=(), alpha=0.02, tol=1e-11).fit(inputs, 1e4 + targets, weights)
    mean, scale = model.mean_, model.scale_
    share = weights / weights.sum()
    # Ridge on targets of standard deviation 1, so that the penalty has the same meaning.
    center, size = share @ targets, np.sqrt(share @ (targets - share @ targets) ** 2)
    peer = Ridge(alpha=0.02, tol=1e-12).fit((inputs - mean) / scale, (targets - center) / size, sample_weight=share)
    np.testing.assert_allclose(model.coefs_[0].T, peer.coef_, atol=1e-9)
    expected = 1e4 + center + size * peer.predict((inputs - mean) / scale)
    np.testing.assert_allclose(model.predict(inputs), expected, rtol=1e-9)
    assert model.score(inputs, 1e4 + targets) > 0.9


def test_the_units_of_inputs_and_targets_do_not_matter():
    inputs, targets = make_regression(60, 3, noise=1.0, random_state=1)
    a = CGRegressor(hidden=(), tol=1e-10).fit(inputs, targets)
    b = CGRegressor(hidden=(), tol=1e-10).fit(8 * inputs - 4, 1024 * targets + 512)
    np.testing.assert_allclose(b.predict(8 * inputs - 4), 1024 * a.predict(inputs) + 512, rtol=1e-6)


def test_the_order_of_columns_does_not_matter_for_a_convex_objective(convex):
    order = RNG.permutation(X.shape[1])
    model = CGClassifier(hidden=(), tol=1e-9, max_iter=5000).fit(X[:, order], Y)
    assert model.loss_ == pytest.approx(convex.loss_, abs=1e-10)
    np.testing.assert_allclose(model.coefs_[0], convex.coefs_[0][order], atol=1e-5)


# ---- rows, weights, seeds: bit for bit ----


@pytest.mark.parametrize(
    "model", [CGClassifier(random_state=3), CGRegressor(alpha=0.01, random_state=3)], ids=["class", "regr"]
)
def test_weights_are_repetitions_and_rows_have_no_order(model):
    inputs, targets = WINE
    plain = clone(model).fit(inputs, targets)
    doubled = clone(model).fit(
        np.vstack([inputs, inputs]), np.hstack([targets, targets]), np.full(2 * len(targets), 0.5)
    )
    order = RNG.permutation(len(targets))
    assert same(plain, doubled)
    assert same(plain, clone(model).fit(inputs[order], targets[order]))
    weights = RNG.integers(0, 3, len(targets))
    repeated = clone(model).fit(np.repeat(inputs, weights, axis=0), np.repeat(targets, weights))
    assert same(repeated, clone(model).fit(inputs, targets, weights))
    assert not same(plain, repeated)


def test_a_seed_gives_a_model_and_the_first_start_is_one_of_five():
    five = CGClassifier(random_state=1).fit(*WINE)
    assert same(five, CGClassifier(random_state=1).fit(*WINE))
    assert not same(five, CGClassifier(random_state=2).fit(*WINE))
    one = CGClassifier(n_init=1, random_state=1).fit(*WINE)
    assert one.loss_ == five.losses_[0]
    assert five.loss_ == five.losses_.min()
    assert len(set(five.losses_)) == 5
    assert one.n_eval_ < five.n_eval_


def test_a_model_survives_pickle_and_clone():
    model = CGClassifier(random_state=0).fit(*WINE)
    assert pickle.loads(pickle.dumps(model)).predict_proba(WINE[0]).tobytes() == model.predict_proba(WINE[0]).tobytes()
    assert same(clone(model).fit(*WINE), model)


# ---- what it learns ----


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "softplus", "logistic", "identity"])
def test_every_activation_learns(activation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if activation == "relu" else "error", ConvergenceWarning)  # kinks
        model = CGClassifier(activation=activation, alpha=0.01, random_state=0).fit(X[::2], Y[::2])
    assert model.score(X[1::2], Y[1::2]) > 0.95


def test_what_no_linear_model_learns():
    inputs = RNG.uniform(-1, 1, (200, 2))
    classes = np.where(inputs.prod(1) > 0, "same", "differ")
    assert CGClassifier(hidden=(), random_state=0).fit(inputs, classes).score(inputs, classes) < 0.75
    model = CGClassifier(alpha=1e-4, hidden=(8,), random_state=0).fit(inputs, classes)
    assert model.score(inputs, classes) > 0.97
    assert model.classes_.tolist() == ["differ", "same"]
    assert (model.predict(inputs) == "same").tolist() == (model.decision_function(inputs) > 0).tolist()


def test_scores_probabilities_and_classes_agree():
    for data in (IRIS, (X, Y)):
        model = CGClassifier(random_state=0, alpha=0.01).fit(*data)
        probabilities, scores = model.predict_proba(data[0]), model.decision_function(data[0])
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-14)
        assert np.array_equal(model.classes_[probabilities.argmax(1)], model.predict(data[0]))
        log_odds = np.log(probabilities[:, -1] / probabilities[:, 0])
        np.testing.assert_allclose(scores if scores.ndim == 1 else scores[:, -1] - scores[:, 0], log_odds, rtol=1e-9)


def test_loss_is_the_objective_at_the_weights():
    model = CGClassifier(random_state=0, alpha=0.01).fit(*IRIS)
    probabilities = model.predict_proba(IRIS[0])[np.arange(150), IRIS[1]]
    penalty = sum((weights**2).sum() for weights in model.coefs_)
    assert model.loss_ == pytest.approx(-np.log(probabilities).mean() + 0.005 * penalty, rel=1e-12)


def test_mean_probabilities_are_the_shares_of_the_classes():
    """The bias is not penalised: at the minimum the model is calibrated in the large."""
    model = CGClassifier(random_state=0, tol=1e-7, n_init=1, alpha=0.01).fit(X, Y)
    assert model.predict_proba(X)[:, 1].mean() == pytest.approx(Y.mean(), abs=1e-6)
    balanced = CGClassifier(random_state=0, tol=1e-7, n_init=1, alpha=0.01, class_weight="balanced").fit(X, Y)
    weights = np.where(Y == 1, 0.5 / Y.mean(), 0.5 / (1 - Y.mean()))
    assert (weights * balanced.predict_proba(X)[:, 1]).mean() == pytest.approx(0.5, abs=1e-6)


def test_class_weights_are_weights_of_rows():
    by_class = CGClassifier(class_weight={0: 3.0}, random_state=0).fit(X, Y)
    assert same(by_class, CGClassifier(random_state=0).fit(X, Y, np.where(Y == 0, 3.0, 1.0)))
    weights = RNG.integers(1, 4, len(Y)).astype(float)
    shares = np.bincount(Y, weights)
    expected = CGClassifier(hidden=()).fit(X, Y, weights / shares[Y])
    assert CGClassifier(hidden=(), class_weight="balanced").fit(X, Y, weights).loss_ == pytest.approx(
        expected.loss_, abs=1e-8
    )


# ---- early stopping ----

NOISY = (RNG.normal(size=(120, 8)), RNG.integers(0, 2, 120))


def test_early_stopping_keeps_the_iterate_with_the_best_held_out_loss():
    options = {"alpha": 0.0, "random_state": 0, "validation_fraction": 0.3, "n_init": 2}
    stopped = CGClassifier(patience=5, **options).fit(*NOISY)
    assert not stopped.converged_
    assert np.isfinite(stopped.validation_loss_)
    cut = [CGClassifier(max_iter=k, patience=1000, **options) for k in range(1, 12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        losses = [model.fit(*NOISY).validation_loss_ for model in cut]
    assert losses == sorted(losses, reverse=True)  # each is the best of the iterates so far
    assert stopped.validation_loss_ <= losses[-1]


def test_early_stopping_is_deterministic_and_trains_on_less():
    options = {"random_state": 0, "validation_fraction": 0.3}
    a, b = (CGClassifier(**options).fit(*NOISY) for _ in range(2))
    assert same(a, b)
    assert CGClassifier(random_state=0).fit(*NOISY).validation_loss_ is None
    regressor = CGRegressor(**options).fit(NOISY[0], NOISY[0][:, :2] ** 2)
    assert regressor.validation_loss_ > 0


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (3, 0)}, "hidden must be a tuple of integers >= 1"),
        ({"hidden": 3}, "hidden must be a tuple"),
        ({"hidden": "3"}, "hidden must be a tuple"),
        ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
        ({"alpha": np.nan}, "alpha must be"),
        ({"tol": "small"}, "tol must be"),
        ({"max_iter": 0}, "max_iter must be an integer >= 1, got 0"),
        ({"patience": 1.5}, "patience must be"),
        ({"n_init": 0}, "n_init must be"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        ({"validation_fraction": 1e-9}, "at least one of 569 different rows is held out"),
        ({"activation": "tan"}, "unknown CGClassifier activation 'tan'; did you mean 'tanh'"),
        (
            {"method": "powell-beal"},
            "unknown CGClassifier method 'powell-beal'; did you mean 'powell-beale'.*Known: .*scg",
        ),
        ({"class_weight": "balance"}, "did you mean 'balanced'"),
        ({"class_weight": {2: 1.0}}, "unknown CGClassifier class in class_weight 2.*Known: 0, 1"),
        ({"class_weight": {1: -1.0}}, "class_weight of 1 must be in"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    model = CGClassifier(**options)
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y)
    assert not hasattr(model, "loss_")


def test_unknown_names_are_of_the_librarys_type():
    with pytest.raises(UnknownName):
        CGRegressor(method="newton").fit(X, Y)


@pytest.mark.parametrize("model", [CGClassifier(), CGRegressor()], ids=["class", "regr"])
def test_bad_data_is_named(model):
    name = type(model).__name__
    bad = X.copy()
    bad[5, 3] = np.nan
    with pytest.raises(ValueError, match=f"{name}: X, row 5, column 3 must be finite.*, got nan"):
        model.fit(bad, Y)
    targets = Y.astype(float)
    targets[7] = np.inf
    with pytest.raises(ValueError, match=f"{name}: y, row 7 must be finite.*, got inf"):
        model.fit(X, targets)
    huge = X.copy()
    huge[:, 4] *= 1e300
    with pytest.raises(ValueError, match="X, column 4 must be of a finite variance"):
        model.fit(huge, Y)
    for weights, message in [
        (np.ones(3), "shape of sample_weight must be"),
        (-np.ones(len(Y)), "sample_weight must be >= 0 in every row, got -1.0"),
        (np.full(len(Y), np.nan), "sample_weight, row 0 must be finite"),
        (np.zeros(len(Y)), "positive in at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.fit(X, Y, weights)
    fitted = clone(model).set_params(max_iter=1000, random_state=0, n_init=1, alpha=0.01).fit(*IRIS)
    with pytest.raises(ValueError, match="X, row 0, column 1 must be finite"):
        fitted.predict([[0.0, np.inf, 0.0, 0.0]])


def test_columns_are_named_where_they_have_names():
    table = pytest.importorskip("pyarrow", reason="column names come with data frames").table
    good = table({"age": [1.0, 2.0, 3.0, 4.0], "income": [2.0, 2.0, 4.0, 1.0]})
    bad = table({"age": [1.0, 2.0, 3.0, 4.0], "income": [2.0, np.nan, 4.0, 1.0]})
    with pytest.raises(ValueError, match="CGClassifier: X, row 1, column 'income' must be finite"):
        CGClassifier().fit(bad, [0, 1, 0, 1])
    model = CGClassifier(random_state=0).fit(good, [0, 1, 0, 1])
    assert model.feature_names_in_.tolist() == ["age", "income"]
    with pytest.raises(ValueError, match="column 'income'"):
        model.predict(bad)


def test_labels():
    with pytest.raises(ValueError, match="y must be of two classes or more, got 'one class, "):
        CGClassifier().fit(X, np.zeros(len(X), dtype=int))
    with pytest.raises(ValueError, match="y, row 1 must be a label, got None"):
        CGClassifier().fit(X[:3], np.array(["a", None, "b"], dtype=object))
    with pytest.raises(ValueError, match="Unknown label type"):
        CGClassifier().fit(X, RNG.normal(size=len(X)))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        CGClassifier().fit(X, Y[:-1])


def test_a_training_that_does_not_converge_says_so_and_what_to_do():
    with pytest.warns(
        ConvergenceWarning, match=r"not converged after 3 iterations: max \|g\| = .* > tol = 1e-05.*max_iter"
    ):
        model = CGClassifier(max_iter=3, random_state=0).fit(X, Y)
    assert not model.converged_
    assert model.n_iter_ == 3
    assert model.gradient_ > 1e-5
    assert model.score(X, Y) > 0.9


def test_works_inside_a_search_over_settings():
    search = GridSearchCV(CGClassifier(n_init=1, random_state=0), {"alpha": [0.01, 0.1], "hidden": [(), (3,)]}, cv=2)
    assert search.fit(*IRIS).best_score_ > 0.9
