"""CGClassifier beside scikit-learn's MLPClassifier(solver="lbfgs"): score, calibration, time; and solvers on one objective."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks._timing import interleave, ratio, show
from conjugo.errors import DataUnavailable
from conjugo.studies.reproduce import tabular_tables
from conjugo.studies.reproduce.tabular_problems import PROBLEMS
from conjugo.studies.reproduce.tabular_solvers import Problem, Settings, by_scipy, minimized
from conjugo.tabular import CGClassifier

ALPHA = 0.01
HIDDEN = (10,)
Model = Callable[[int, int], object]
"""Takes the number of rows and a seed."""


def ours(n_init: int, tol: float = 1e-5) -> Model:
    return lambda rows, seed: CGClassifier(hidden=HIDDEN, alpha=ALPHA, n_init=n_init, tol=tol, random_state=seed)


class BestOf(ClassifierMixin, BaseEstimator):
    """The same network and penalty, which MLPClassifier counts for the sum of the losses; of several the lowest loss."""

    def __init__(self, starts: int, alpha: float, seed: int) -> None:
        self.starts, self.alpha, self.seed = starts, alpha, seed

    def fit(self, inputs: np.ndarray, labels: np.ndarray) -> BestOf:
        options = {"activation": "tanh", "solver": "lbfgs", "alpha": self.alpha, "max_iter": 1000}
        models = [
            MLPClassifier(HIDDEN, random_state=self.seed + 100 * start, **options).fit(inputs, labels)
            for start in range(self.starts)
        ]
        self.best_ = min(models, key=lambda model: model.loss_)
        return self

    def predict_proba(self, inputs: np.ndarray) -> np.ndarray:
        return self.best_.predict_proba(inputs)


def peer(starts: int) -> Model:
    return lambda rows, seed: make_pipeline(StandardScaler(), BestOf(starts, ALPHA * rows, seed))


MODELS: dict[str, Model] = {
    "CGClassifier, n_init=1": ours(1),
    "CGClassifier, n_init=1, tol=1e-4": ours(1, tol=1e-4),
    "MLPClassifier": peer(1),  # its tolerance is 1e-4, for the same gradient
    "CGClassifier, n_init=5": ours(5),
    "CGClassifier, n_init=5, tol=1e-4": ours(5, tol=1e-4),
    "MLPClassifier, best of 5": peer(5),
}
PEERS = {
    "CGClassifier, n_init=1": "MLPClassifier",
    "CGClassifier, n_init=1, tol=1e-4": "MLPClassifier",
    "CGClassifier, n_init=5, tol=1e-4": "MLPClassifier, best of 5",
    "CGClassifier, n_init=5": "MLPClassifier, best of 5",
}


def main() -> None:
    """Print the tables."""
    for name, (inputs, classes) in tables().items():
        _scores(name, inputs, classes)
    _solvers()


def tables() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs and classes by name; without German credit where it is not there."""
    found = {
        "breast_cancer": load_breast_cancer(return_X_y=True),
        "wine": load_wine(return_X_y=True),
        "digits": load_digits(return_X_y=True),
    }
    for name in ("made", "german"):
        try:
            table = tabular_tables.load(name)
            found[name] = (table.inputs, table.bad)
        except DataUnavailable as error:
            print(f"{name} left out: {error}")
    return found


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of the top class: mean gap between confidence and accuracy over bins of equal width."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[which == b].sum() - confidence[which == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))


def _figures(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    single = probabilities.shape[1] == 2
    onehot = np.eye(probabilities.shape[1])[labels]
    return [
        100 * float((probabilities.argmax(1) == labels).mean()),
        100 * float(roc_auc_score(labels, probabilities[:, 1] if single else probabilities, multi_class="ovr")),
        float(log_loss(labels, probabilities)),
        float(((probabilities - onehot) ** 2).sum(1).mean()),
    ]


def _scores(title: str, inputs: np.ndarray, classes: np.ndarray, repeats: int = 3) -> None:
    """Cross-validation, repeated; in each fold the models take turns, and times are compared within it."""
    labels = np.unique(classes, return_inverse=True)[1]
    figures: dict[str, list[list[float]]] = {name: [] for name in MODELS}
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in MODELS}
    for repeat in range(repeats):
        for kept, out in StratifiedKFold(5, shuffle=True, random_state=repeat).split(inputs, labels):
            for name, make in MODELS.items():
                model = make(len(kept), repeat)
                begin = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model.fit(inputs[kept], labels[kept])
                seconds[name].append(time.process_time() - begin)
                probabilities = model.predict_proba(inputs[out])
                figures[name].append(_figures(probabilities, labels[out]))
                pooled[name].append((probabilities, labels[out]))
    rows = []
    for name in MODELS:
        accuracy, auc, loss, brier = np.mean(figures[name], axis=0)
        error = calibration_error(*(np.concatenate(parts) for parts in zip(*pooled[name])))
        middle = f"{ratio(seconds[name], seconds[PEERS[name]])[0]:.2f}" if name in PEERS else ""
        scores = [f"{accuracy:.2f}", f"{auc:.2f}", f"{loss:.4f}", f"{brier:.4f}", f"{error:.4f}"]
        rows.append([name, *scores, f"{statistics.median(seconds[name]):.3f}", middle])
    columns = ("model", "accuracy %", "AUC %", "log loss", "Brier", "ECE", "s", "ratio")
    caption = (
        f"means of {repeats} x 5 folds; s: of the processor, median of a fit; ratio: to MLPClassifier with as many starts, "
        "within folds"
    )
    show(f"{title}: {inputs.shape[0]} x {inputs.shape[1]}, alpha {ALPHA:g}, {HIDDEN} tanh", columns, rows, caption)


def _solvers(rounds: int = 7) -> None:
    """Processor seconds to the same gradient on the same objective from the same start."""
    rows, logs = [], {"L-BFGS-B": [], "CG": []}
    for name, (function, starts, tol) in _problems().items():
        settings = Settings(tol=tol, max_iter=5000)
        cases = {
            "ours": lambda f=function, s=starts, o=settings: minimized(f, s, method="powell-beale", settings=o),
            **{
                peer: lambda f=function, s=starts, o=settings, m=peer: by_scipy(f, s, method=m, settings=o)
                for peer in logs
            },
        }
        seconds = interleave(cases, rounds=rounds, warmup=1, clock=time.process_time)
        row = [name, f"{1e3 * statistics.median(seconds['ours']):.1f}"]
        for other in logs:
            middle, low, high = ratio(seconds["ours"], seconds[other])
            logs[other].append(math.log(middle))
            row.append(f"{middle:.2f} ({low:.2f} - {high:.2f})")
        rows.append(row)
    means = [f"{math.exp(statistics.fmean(values)):.2f}" for values in logs.values()]
    rows.append(["geometric mean", "", *means])
    columns = ("problem", "ms, Powell-Beale", "ratio to SciPy L-BFGS-B", "ratio to SciPy CG")
    show(
        "Solvers on one objective, to the same gradient",
        columns,
        rows,
        "of the processor; medians and quartiles; all starts together",
    )


def _problems() -> dict[str, tuple[Callable, np.ndarray, float]]:
    found = {counted.title: (*counted.make(), counted.tol) for counted in PROBLEMS.values()}
    table = tabular_tables.load("made")
    inputs = StandardScaler().fit_transform(table.inputs)
    problem = Problem(inputs, table.bad, 10, ALPHA)
    for starts in (1, 5):
        found[f"made, 20-10-1, {starts} start(s)"] = (problem.objective(), problem.starts(starts), 1e-5)
    return found


if __name__ == "__main__":
    main()
