"""What the estimators share: arguments, checks of the data, training, the trained network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from conjugo.errors import check, unknown
from conjugo.tabular.activations import ACTIVATIONS, FloatArray
from conjugo.tabular.losses import Loss
from conjugo.tabular.network import Network, Objective
from conjugo.tabular.table import Rows, Standardizer, check_finite, split
from conjugo.tabular.training import METHODS, Trained, train

__all__ = ["TabularCG"]


class TabularCG(BaseEstimator):  # type: ignore[misc]
    """Base of :class:`CGClassifier` and :class:`CGRegressor`."""

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (10,),
        activation: str = "tanh",
        alpha: float = 1e-3,
        method: str = "powell-beale",
        max_iter: int = 1000,
        tol: float = 1e-5,
        validation_fraction: float = 0.0,
        patience: int = 20,
        n_init: int = 5,
        standardize: bool = True,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.alpha = alpha
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.n_init = n_init
        self.standardize = standardize
        self.random_state = random_state

    # Checks ------------------------------------------------------------------------------------------------------------

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _check_arguments(self) -> None:
        owner = self._owner
        hidden = self.hidden
        sizes = isinstance(hidden, tuple | list | np.ndarray) and all(
            isinstance(h, Integral) and int(h) >= 1 for h in hidden
        )
        check(sizes, owner, "hidden", hidden, "a tuple of integers >= 1, one for each hidden layer")
        for kind, known in (("activation", tuple(ACTIVATIONS)), ("method", METHODS)):
            if getattr(self, kind) not in known:
                unknown(f"{owner} {kind}", getattr(self, kind), known)
        for name in ("alpha", "tol"):
            value: Any = getattr(self, name)
            check(isinstance(value, Real) and 0 <= float(value) < math.inf, owner, name, value, "a finite number >= 0")
        for name in ("max_iter", "patience", "n_init"):
            value = getattr(self, name)
            check(isinstance(value, Integral) and int(value) >= 1, owner, name, value, "an integer >= 1")
        fraction: Any = self.validation_fraction
        check(
            isinstance(fraction, Real) and 0 <= float(fraction) < 1, owner, "validation_fraction", fraction, "in [0, 1)"
        )

    def _checked_inputs(self, X: Any, y: Any = "no_validation", *, reset: bool) -> FloatArray:
        """*X* as finite float64 [N, d]; in training (reset) it sets n_features_in_ and feature_names_in_."""
        table: FloatArray = validate_data(
            self,
            X,
            y=None if y is None else "no_validation",  # None is refused; other targets have checks of their own
            reset=reset,
            dtype=np.float64,
            order="C",
            ensure_all_finite=False,
        )
        check_finite(table, self._owner, "X", getattr(self, "feature_names_in_", None))
        return table

    def _checked_weights(self, sample_weight: Any, inputs: FloatArray) -> FloatArray:
        """Weights [N], 1 without *sample_weight*."""
        if sample_weight is None:
            return np.ones(len(inputs))
        weights = np.array(sample_weight, dtype=np.float64)
        shape = (len(inputs),)
        check(weights.shape == shape, self._owner, "the shape of sample_weight", weights.shape, f"{shape}")
        check_finite(weights[:, None], self._owner, "sample_weight")
        lowest = float(weights.min())
        check(lowest >= 0, self._owner, "sample_weight", lowest, ">= 0 in every row")
        check(bool(weights.any()), self._owner, "sample_weight", "zero in all rows", "positive in at least one")
        return weights

    # Training ----------------------------------------------------------------------------------------------------------

    def _loss(self, rows: Rows) -> Loss:
        """The loss on *rows*."""
        raise NotImplementedError

    def _seeds(self) -> list[np.random.SeedSequence]:
        """For what is held out, and for each start."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        # The children of a seed do not depend on their number: the first start is the same with one and with five.
        return np.random.SeedSequence(seed).spawn(1 + self.n_init)

    def _parts(
        self, rows: Rows, strata: npt.NDArray[np.generic], seed: np.random.SeedSequence
    ) -> tuple[Rows, Rows | None]:
        """*rows* to train on, and those to hold out if there is to be early stopping."""
        if not self.validation_fraction:
            return rows, None
        kept, held_out = split(strata, self.validation_fraction, np.random.default_rng(seed))
        check(
            len(held_out) > 0,
            self._owner,
            "validation_fraction",
            self.validation_fraction,
            f"0, or so large that at least one of {len(rows)} different rows is held out",
        )
        return rows[kept], rows[held_out]

    def _train(self, rows: Rows, held_out: Rows | None, seeds: Sequence[np.random.SeedSequence]) -> None:
        """Train on *rows*, with a start for each of *seeds*, and set the fitted attributes."""
        columns = rows.inputs.shape[1]
        standardizer = Standardizer.of(rows.inputs, rows.weights) if self.standardize else Standardizer.neutral(columns)
        self._check_scale(standardizer)
        loss = self._loss(rows)
        hidden = tuple(map(int, self.hidden))
        network = Network((columns, *hidden, loss.outputs), self.activation)
        # Without a hidden layer the objective is convex: every start leads to the same end.
        starts = (
            np.stack([network.initial(np.random.default_rng(seed)) for seed in seeds])
            if hidden
            else np.zeros((1, network.size))
        )
        trained = train(
            Objective(network, loss, standardizer(rows.inputs), self.alpha),
            starts,
            method=self.method,
            max_iter=self.max_iter,
            tol=self.tol,
            validation=None if held_out is None else self._validation(network, standardizer(held_out.inputs), held_out),
            patience=self.patience,
        )
        best = min(trained, key=lambda one: one.loss if one.validation is None else one.validation)
        self._network, self._standardizer, self._parameters = network, standardizer, best.parameters
        self.mean_, self.scale_ = standardizer.mean, standardizer.scale
        layers = [layer[0] for layer in network.layers(best.parameters[None])]
        self.coefs_ = [layer[:, :-1].T.copy() for layer in layers]
        self.intercepts_ = [layer[:, -1].copy() for layer in layers]
        self.loss_, self.losses_ = best.loss, np.array([one.loss for one in trained])
        self.gradient_, self.converged_ = best.gradient, best.converged
        self.n_iter_, self.n_eval_ = best.iterations, sum(one.evaluations for one in trained)
        self.validation_loss_ = best.validation
        if not best.converged and not best.stopped_early:
            warnings.warn(self._advice(best), ConvergenceWarning, stacklevel=3)

    def _validation(self, network: Network, inputs: FloatArray, rows: Rows) -> Callable[[FloatArray], float]:
        loss = self._loss(rows)
        return lambda parameters: float(loss(network.scores(parameters, inputs).T[None])[0])

    def _check_scale(self, standardizer: Standardizer) -> None:
        names = getattr(self, "feature_names_in_", np.arange(self.n_features_in_)).tolist()
        for name, scale in zip(names, standardizer.scale.tolist()):
            check(math.isfinite(scale), self._owner, f"X, column {name!r}", scale, "of a finite variance")

    def _advice(self, trained: Trained) -> str:
        remedy = (
            "increase max_iter, or alpha, or accept a larger tol"
            if trained.iterations >= self.max_iter
            else "with relu, which has kinks, take tanh, gelu or softplus; otherwise standardise, or accept a larger tol"
        )
        return (
            f"{self._owner}: not converged after {trained.iterations} iterations: max |g| = {trained.gradient:.2g} > tol = "
            f"{self.tol:g} ({trained.message}); {remedy}"
        )

    # The trained network -----------------------------------------------------------------------------------------------

    def _scores(self, X: Any) -> FloatArray:
        """Outputs of the network [N, K]."""
        check_is_fitted(self)
        return self._network.scores(self._parameters, self._standardizer(self._checked_inputs(X, reset=False)))
