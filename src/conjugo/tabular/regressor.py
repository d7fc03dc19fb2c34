"""Regression on table rows by small networks."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_array, check_consistent_length

from conjugo.errors import check
from conjugo.tabular._base import TabularCG
from conjugo.tabular.activations import FloatArray
from conjugo.tabular.losses import Loss, Squared
from conjugo.tabular.table import Rows, Standardizer, check_finite, merged

__all__ = ["CGRegressor"]


class CGRegressor(MultiOutputMixin, RegressorMixin, TabularCG):  # type: ignore[misc]
    r"""A small feed-forward network for regression, trained by full-batch conjugate gradients.

    Minimises, in float64,

    .. math:: f(w) = \tfrac12 \sum_i \omega_i \|z(x_i) - y_i\|^2 + \tfrac{\alpha}{2} \|\text{weights}\|^2

    with the weights :math:`\omega` of the examples scaled to the sum 1, and targets brought to mean 0 and standard
    deviation 1 (each output by itself), so that *alpha* and *tol* mean the same for all units of y. Biases are not
    penalised. Training is deterministic, like :class:`CGClassifier`'s.

    Args:
        hidden, activation, max_iter, tol, patience, n_init, standardize, random_state: as in :class:`CGClassifier`;
            ``hidden=()`` is linear (ridge) regression.
        alpha: penalty :math:`\geq 0` on the squared weights, for the mean loss of standardised targets; scikit-learn's
            ``Ridge`` calls N times this its *alpha*.
        method: as in :class:`CGClassifier`.
        validation_fraction: in [0, 1). If above 0, this part of the rows is held out, chosen by *random_state*; of each
            start the iterate with the lowest held-out loss is kept, and the start whose one is lowest.

    Attributes:
        ``n_features_in_``, ``feature_names_in_``, ``coefs_``, ``intercepts_``, ``mean_``, ``scale_``, ``loss_``, ``losses_``,
            ``gradient_``, ``converged_``, ``n_iter_``, ``n_eval_``, ``validation_loss_``: as in :class:`CGClassifier`; losses
            are those of standardised targets.
        ``target_mean_``, ``target_scale_``: what standardised the targets [outputs].

    Raises:
        ValueError: in ``fit``, an argument is out of its range, a name is not known, or X or y holds something that is
            not finite (the message names the column).

    Warns:
        sklearn.exceptions.ConvergenceWarning: the start that was kept did not come to *tol*.

    >>> x = np.linspace(-3, 3, 50)[:, None]
    >>> model = CGRegressor(hidden=(8,), alpha=1e-6, random_state=0).fit(x, np.sin(x[:, 0]))
    >>> round(model.predict([[1.0]]).item(), 2)  # sin(1) = 0.8415
    0.84
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> CGRegressor:
        """Train on *X* [N, d] with the targets *y* [N] or [N, outputs].

        sample_weight: [N], >= 0; None: all equal. Rows of weight 0 count for nothing.
        """
        self._check_arguments()
        inputs = self._checked_inputs(X, y, reset=True)
        weights = self._checked_weights(sample_weight, inputs)
        targets = check_array(y, dtype=np.float64, ensure_2d=False, ensure_all_finite=False, input_name="y")
        check_consistent_length(targets, inputs)
        self._single = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        check_finite(targets, self._owner, "y")
        rows = merged(inputs, targets, weights)
        first, *seeds = self._seeds()
        rows, held_out = self._parts(rows, np.zeros(len(rows)), first)
        self._targets = Standardizer.of(rows.targets, rows.weights)
        check(bool(np.isfinite(self._targets.scale).all()), self._owner, "y", np.inf, "of a finite variance")
        self.target_mean_, self.target_scale_ = self._targets.mean, self._targets.scale
        self._train(rows, held_out, seeds)
        return self

    def _loss(self, rows: Rows) -> Loss:
        return Squared(self._targets(rows.targets), rows.weights)

    def predict(self, X: Any) -> FloatArray:
        """Targets of *X* [N, d]: [N] or [N, outputs], as in training."""
        scores = self._scores(X)
        predicted = self._targets.undo(scores)
        return predicted[:, 0] if self._single else predicted
