"""Classification of table rows by small networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d

from conjugo.errors import check, unknown
from conjugo.tabular._base import TabularCG
from conjugo.tabular.activations import FloatArray
from conjugo.tabular.losses import Logistic, Loss, Softmax
from conjugo.tabular.table import Rows, check_finite, merged

__all__ = ["CGClassifier"]


class CGClassifier(ClassifierMixin, TabularCG):  # type: ignore[misc]
    r"""A small feed-forward network for classification, trained by full-batch conjugate gradients.

    Minimises, in float64,

    .. math:: f(w) = \sum_i \omega_i \, \ell(y_i, z(x_i)) + \tfrac{\alpha}{2} \|\text{weights}\|^2

    where :math:`\ell` is the negative log likelihood of a logistic output (two classes) or of a softmax (more),
    :math:`\omega` are the weights of the examples, scaled to the sum 1, and biases are not penalised. So the outputs are
    probabilities, fitted by a proper score; weights of classes shift them (see *class_weight*).

    Training is deterministic. The order of the rows does not matter, and weights mean repetitions, bit for bit: rows are
    sorted, and equal ones made one, before anything else happens.

    Args:
        hidden: units of each hidden layer; ``()`` is logistic regression.
        activation: of the hidden units: ``"tanh"``, ``"gelu"``, ``"softplus"``, ``"logistic"``, ``"relu"`` or
            ``"identity"``. The kinks of relu can end the search for a step length early.
        alpha: penalty :math:`\geq 0` on the squared weights, for the *mean* loss: scikit-learn's ``MLPClassifier`` calls
            N times this its *alpha*, ``LogisticRegression`` its *C* is 1 / (N alpha).
        method: rule for the directions, a name that :func:`conjugo.optim.minimize` knows: ``"powell-beale"``, ``"fr"``,
            ``"pr+"``, ``"hs+"``, ``"hs-dy"``, ``"scg"``, ...
        max_iter: most iterations of a start, at least 1.
        tol: a start is done when no component of the gradient is larger in size.
        class_weight: None; a dict from class to its weight (1 where it is missing); or ``"balanced"``, the same total
            weight for each class. It multiplies the weights of the rows, so the probabilities are those of a population
            with such shares of the classes. Where they are to be calibrated, leave it and move the threshold instead.
        validation_fraction: in [0, 1). If above 0, this part of each class is held out, chosen by *random_state*; of each
            start the iterate with the lowest held-out loss is kept, and the start whose one is lowest.
        patience: iterations without a lower held-out loss after which a start ends.
        n_init: starts from different random weights, trained together; the one with the lowest objective is kept.
            Without a hidden layer one is enough, and done.
        standardize: bring the columns to mean 0 and standard deviation 1 first (weighted, over the rows trained on).
            *alpha* acts on the weights of these columns.
        random_state: seed of the starts and of the held-out part.

    Attributes:
        ``classes_``: the classes, sorted [K].
        ``n_features_in_``, ``feature_names_in_``: columns in training; their names, if they all had one.
        ``coefs_``, ``intercepts_``: weights [inputs, units] and biases [units] of each layer, for standardised columns.
        ``mean_``, ``scale_``: what standardised the columns [d].
        ``loss_``, ``losses_``: the objective of the start that was kept, and of all of them [n_init].
        ``gradient_``: largest component of the gradient in size, at the end. ``converged_``: whether it is at most *tol*.
        ``n_iter_``: iterations of the start that was kept. ``n_eval_``: evaluations of objective and gradient over all starts.
        ``validation_loss_``: mean loss of the held-out part, None without one.

    Raises:
        ValueError: in ``fit``, an argument is out of its range, a name is not known, X or y holds something that is not
            finite (the message names the column), or y has one class only.

    Warns:
        sklearn.exceptions.ConvergenceWarning: the start that was kept did not come to *tol*.

    Source: the training rules of MATLAB's toolbox that al-Brahimi & Al-Fakhry (2022) use for loans; Powell (1977).

    >>> from sklearn.datasets import load_breast_cancer
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> model = CGClassifier(alpha=0.01, random_state=0).fit(X[::2], y[::2])
    >>> round(model.score(X[1::2], y[1::2]), 2)
    0.96
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (10,),
        activation: str = "tanh",
        alpha: float = 1e-3,
        method: str = "powell-beale",
        max_iter: int = 1000,
        tol: float = 1e-5,
        class_weight: Mapping[Any, float] | str | None = None,
        validation_fraction: float = 0.0,
        patience: int = 20,
        n_init: int = 5,
        standardize: bool = True,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            hidden=hidden,
            activation=activation,
            alpha=alpha,
            method=method,
            max_iter=max_iter,
            tol=tol,
            validation_fraction=validation_fraction,
            patience=patience,
            n_init=n_init,
            standardize=standardize,
            random_state=random_state,
        )
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> CGClassifier:
        """Train on *X* [N, d] with the classes *y* [N].

        sample_weight: [N], >= 0; None: all equal. Rows of weight 0 count for nothing.
        """
        self._check_arguments()
        inputs = self._checked_inputs(X, y, reset=True)
        weights = self._checked_weights(sample_weight, inputs)
        labels = self._encoded(y, weights)
        rows = merged(
            inputs, labels[:, None].astype(np.float64), weights * self._class_weights(labels, weights)[labels]
        )
        first, *seeds = self._seeds()
        self._train(*self._parts(rows, rows.targets[:, 0], first), seeds)
        return self

    def _encoded(self, y: Any, weights: FloatArray) -> npt.NDArray[np.intp]:
        """The index of each label in ``classes_``, which this sets: the classes of the rows of positive weight."""
        y = column_or_1d(y, warn=True)
        check_consistent_length(y, weights)
        if y.dtype.kind == "f":
            check_finite(y[:, None], self._owner, "y")
        elif y.dtype.kind == "O":
            row = next((i for i, label in enumerate(y) if label is None or label != label), None)
            check(row is None, self._owner, f"y, row {row}", None if row is None else y[row], "a label")
        check_classification_targets(y)
        classes = np.unique(y[weights > 0])
        found = f"one class, {classes[0]!r}" if len(classes) == 1 else len(classes)
        check(len(classes) > 1, self._owner, "y", found, "of two classes or more")
        self.classes_ = classes
        # Labels of rows without weight, which may be of no class, are arbitrary.
        labels: npt.NDArray[np.intp] = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
        return labels

    def _class_weights(self, labels: npt.NDArray[np.intp], weights: FloatArray) -> FloatArray:
        """Factors of the classes [K]."""
        factors = np.ones(len(self.classes_))
        if self.class_weight is None:
            return factors
        if isinstance(self.class_weight, Mapping):
            positions = {label: i for i, label in enumerate(self.classes_.tolist())}
            for label, factor in self.class_weight.items():
                if label not in positions:
                    unknown(f"{self._owner} class in class_weight", label, map(str, positions))
                check(
                    factor > 0 and np.isfinite(factor), self._owner, f"class_weight of {label!r}", factor, "in (0, inf)"
                )
                factors[positions[label]] = factor
            return factors
        if self.class_weight != "balanced":
            unknown(f"{self._owner} class_weight", self.class_weight, ("balanced",))
        balanced: FloatArray = weights.sum() / (len(factors) * np.bincount(labels, weights, minlength=len(factors)))
        return balanced

    def _loss(self, rows: Rows) -> Loss:
        labels = rows.targets[:, 0].astype(np.intp)
        classes = len(self.classes_)
        return Logistic(labels, rows.weights) if classes == 2 else Softmax(labels, rows.weights, classes)

    def decision_function(self, X: Any) -> FloatArray:
        """Scores of *X* [N, d]: the logit of ``classes_[1]`` [N], or with more than two classes one score for each [N, K]."""
        scores = self._scores(X)
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> FloatArray:
        """Probabilities of the classes, in the order of ``classes_`` [N, K]."""
        scores = self._scores(X)
        result: FloatArray = (
            expit(np.concatenate([-scores, scores], axis=1)) if len(self.classes_) == 2 else softmax(scores, axis=1)
        )
        return result

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The most probable class of each row of *X* [N]."""
        scores = self._scores(X)
        best = (scores[:, 0] > 0).astype(np.intp) if len(self.classes_) == 2 else scores.argmax(1)
        predicted: npt.NDArray[Any] = self.classes_[best]
        return predicted
