"""Classical conjugate gradients: evaluations to a tolerance beside other Python solvers, and time beside the function's own.

Peers are used where they are installed: `pip install pytorch-minimize ncg-optimizer torchzero optimistix`.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.optimize
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor

from benchmarks._timing import interleave, ratio, show
from conjugo.optim import minimize
from conjugo.optim.classical import METHODS

LIMIT = 5_000
"""Evaluations after which a solver has failed."""


@dataclass
class Problem:
    """A function of a float64 tensor; counts evaluations, and remembers max |g| at each and when it came to gtol."""

    name: str
    fun: Callable[[Tensor], Tensor]
    start: Tensor
    gtol: float
    count: int = 0
    reached: int | None = field(default=None)
    sizes: list[float] = field(default_factory=list)

    def fresh(self) -> Problem:
        return Problem(self.name, self.fun, self.start, self.gtol)

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.fun(x)
            (gradient,) = torch.autograd.grad(value, x)
        self.note(gradient)
        return value.item(), gradient

    def note(self, gradient: Tensor) -> None:
        self.count += 1
        self.sizes.append(gradient.abs().max().item())
        if self.reached is None and self.sizes[-1] <= self.gtol:
            self.reached = self.count
        if self.count >= LIMIT:
            raise Spent


class Spent(Exception):
    """All evaluations are used up."""


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def problems() -> list[Problem]:
    """The five of the comparison; the network from two starts."""
    spectrum = torch.from_numpy(np.geomspace(1, 1e4, 200))
    found = [
        Problem(
            "quadratic, n = 200, condition 1e4",
            lambda x: 0.5 * (spectrum * x * x).sum(),
            torch.ones(200, dtype=torch.float64),
            1e-6,
        )
    ]
    for n in (10, 100):
        start = torch.tensor([-1.2, 1.0] * (n // 2), dtype=torch.float64)
        found.append(Problem(f"Rosenbrock, n = {n}", rosenbrock, start, 1e-6))
    found.append(Problem("logistic, breast_cancer", logistic(), torch.zeros(31, dtype=torch.float64), 1e-6))
    for seed in range(2):
        fun, start = perceptron(seed)
        found.append(Problem(f"digits MLP, start {seed}", fun, start, 1e-4))
    return found


def logistic(decay: float = 1e-3) -> Callable[[Tensor], Tensor]:
    inputs, labels = load_breast_cancer(return_X_y=True)
    x = torch.from_numpy((inputs - inputs.mean(0)) / inputs.std(0))
    signs = torch.from_numpy(2.0 * labels - 1)

    def fun(w: Tensor) -> Tensor:
        margins = signs * (x @ w[:-1] + w[-1])
        return torch.nn.functional.softplus(-margins).mean() + 0.5 * decay * (w[:-1] ** 2).sum()

    return fun


def perceptron(seed: int, decay: float = 1e-4) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """64-16-10 with tanh on all 1,797 digits, and its start."""
    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(inputs / 16), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(64, 16, generator=generator, dtype=torch.float64) / 8
    second = torch.randn(16, 10, generator=generator, dtype=torch.float64) / 4

    def fun(w: Tensor) -> Tensor:
        w1, b1, w2, b2 = w.split([1024, 16, 160, 10])
        w1, w2 = w1.view(64, 16), w2.view(16, 10)
        logits = torch.tanh(x @ w1 + b1) @ w2 + b2
        return torch.nn.functional.cross_entropy(logits, y) + 0.5 * decay * ((w1**2).sum() + (w2**2).sum())

    zeros = torch.zeros(16, dtype=torch.float64)
    return fun, torch.cat([first.view(-1), zeros, second.view(-1), zeros[:10]])


# ---- solvers: each runs a problem until it says that it is done ----


def ours(method: str) -> Callable[[Problem], Any]:
    return lambda p: minimize(p, p.start, method=method, jac=True, gtol=p.gtol)


def of_scipy(method: str, **options: Any) -> Callable[[Problem], Any]:
    def solve(p: Problem) -> Any:
        def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = p(torch.from_numpy(x))
            return value, gradient.numpy()

        settings = {"gtol": p.gtol, "maxiter": LIMIT, **options}
        return scipy.optimize.minimize(fun, p.start.numpy(), jac=True, method=method, options=settings)

    return solve


def by_closure(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Problem], Any]:
    """A torch.optim optimizer that evaluates a closure itself."""

    def solve(p: Problem) -> Any:
        w = torch.nn.Parameter(p.start.clone())
        optimizer = make(w)

        def closure(backward: bool = True) -> Tensor:
            loss: Tensor = Counted.apply(w, p)
            if backward:
                optimizer.zero_grad()
                loss.backward()
            return loss

        while p.reached is None:
            optimizer.step(closure)

    return solve


class Counted(torch.autograd.Function):
    """A problem as a tensor function, for solvers that differentiate by themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, problem: Problem) -> Tensor:
        value, ctx.gradient = problem(x)
        return torch.tensor(value, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor, None]:
        return scale[0] * ctx.gradient, None


def torchmin(p: Problem) -> Any:
    library = importlib.import_module("torchmin")
    options = {"gtol": p.gtol, "max_iter": LIMIT}
    return library.minimize(lambda x: Counted.apply(x, p), p.start, method="cg", options=options)


def ncg_optimizer(method: str) -> Callable[[Problem], Any]:
    def make(w: Any) -> torch.optim.Optimizer:
        library = importlib.import_module("ncg_optimizer")
        optimizer: torch.optim.Optimizer = library.BASIC([w], method=method, line_search="Strong_Wolfe", c2=0.1)
        return optimizer

    return by_closure(make)


def torchzero(rule: str) -> Callable[[Problem], Any]:
    """With the line search that its documentation recommends for conjugate gradients."""

    def make(w: Any) -> Any:
        library = importlib.import_module("torchzero")
        return library.Optimizer([w], getattr(library.m, rule)(), library.m.StrongWolfe(c2=0.1, a_init="first-order"))

    return by_closure(make)


def optimistix(rule: str) -> Callable[[Problem], Any]:
    def solve(p: Problem) -> Any:
        library, jax = importlib.import_module("optimistix"), importlib.import_module("jax")
        jax.config.update("jax_enable_x64", True)
        shapes = jax.ShapeDtypeStruct((), np.float64), jax.ShapeDtypeStruct(tuple(p.start.shape), np.float64)

        def on_host(x: Any) -> tuple[np.ndarray, np.ndarray]:
            if p.count >= LIMIT - 1:  # an exception would not come through
                return np.array(0.0), np.zeros_like(p.start)
            value, gradient = p(torch.from_numpy(np.array(x)))
            return np.array(value), gradient.numpy()

        @jax.custom_vjp
        def fun(x: Any) -> Any:
            return jax.pure_callback(on_host, shapes, x)[0]

        fun.defvjp(lambda x: jax.pure_callback(on_host, shapes, x), lambda gradient, scale: (scale * gradient,))
        solver = library.NonlinearCG(rtol=1e-15, atol=1e-15, method=getattr(library, rule))
        start = jax.numpy.asarray(p.start.numpy())
        return library.minimise(lambda x, _: fun(x), solver, start, max_steps=LIMIT, throw=False)

    return solve


SOLVERS: dict[str, Callable[[Problem], Any]] = {
    **{f"conjugo {method}": ours(method) for method in METHODS},
    "SciPy CG": of_scipy("CG"),
    "SciPy L-BFGS-B, m = 10": of_scipy("L-BFGS-B", maxcor=10, ftol=0.0, maxfun=LIMIT),
    "pytorch-minimize cg": torchmin,
    **{f"ncg-optimizer {m}": ncg_optimizer(m) for m in ("PRP", "HS")},
    **{f"torchzero {m}": torchzero(m) for m in ("PolakRibiere", "HestenesStiefel")},
    **{f"optimistix {m}": optimistix(m) for m in ("polak_ribiere", "fletcher_reeves")},
}


def evaluations(solver: Callable[[Problem], Any], problem: Problem) -> int | None:
    """How many it took until max |g| <= gtol; None if it failed. Raises ImportError where the solver is not installed."""
    problem = problem.fresh()
    try:
        solver(problem)
    except ImportError:
        raise
    except Exception as error:  # peers fail in many ways
        if not isinstance(error, Spent):
            print(f"  {problem.name}: {type(error).__name__}: {str(error)[:100]}")
    return problem.reached


def _evaluations() -> None:
    found = problems()
    rows, reference = [], [evaluations(SOLVERS["SciPy CG"], p) for p in found]
    for name, solver in SOLVERS.items():
        try:
            counts = [evaluations(solver, p) for p in found]
        except ImportError:
            print(f"{name}: not installed, left out")
            continue
        networks = [c for c in counts[4:] if c]
        shown = [*counts[:4], round(_mean(networks)) if len(networks) == 2 else None]
        rows.append([name, *("fails" if c is None else str(c) for c in shown), _score(counts, reference)])
    columns = ("solver", "quadratic", "Rosenbrock 10", "Rosenbrock 100", "logistic", "digits MLP", "of SciPy CG")
    caption = "until max |g| <= 1e-6 (MLP: 1e-4); MLP: geometric mean of two starts; last: geometric mean over the five"
    show("Evaluations of function and gradient", columns, rows, caption)


def picture(path: str) -> None:
    """The smallest max |g| so far against evaluations, on Rosenbrock's function and the logistic regression, as PNG."""
    from conjugo.studies import drawing
    from conjugo.studies.reproduce.grid_figures import panels

    names = {
        "powell-beale": ours("powell-beale"),
        "hs+": ours("hs+"),
        "fr": ours("fr"),
        "scg": ours("scg"),
        "SciPy CG": of_scipy("CG"),
        "SciPy L-BFGS-B": SOLVERS["SciPy L-BFGS-B, m = 10"],
    }
    chosen = [p for p in problems() if p.name in ("Rosenbrock, n = 100", "logistic, breast_cancer")]
    with panels(len(chosen), shared=False) as (figure, axeses):
        for axes, problem in zip(axeses, chosen):
            for name, style in drawing.styles(tuple(names)).items():
                run = problem.fresh()
                names[name](run)
                sizes = np.minimum.accumulate(run.sizes[: run.reached])
                axes.plot(range(1, len(sizes) + 1), sizes, color=style.color, label=name)
                axes.plot(len(sizes), sizes[-1], color=style.color, marker=style.marker, linestyle="none")
            axes.set_yscale("log")
            axes.set_title(problem.name, fontsize=10)
            axes.set_xlabel("evaluations")
        axeses[0].set_ylabel("smallest max |g| so far")
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        with open(path, "wb") as file:
            file.write(drawing.png(figure))


def _mean(counts: list[float]) -> float:
    return statistics.geometric_mean(counts)


def _score(counts: list[int | None], reference: list[int | None]) -> str:
    if None in counts or None in reference:
        return "-"
    ratios = [a / b for a, b in zip(counts, reference, strict=True) if a and b]
    return f"{_mean([*ratios[:4], _mean(ratios[4:])]):.2f}"


# ---- time ----


def chain(x: Tensor) -> Tensor:
    """A chain of springs whose ends are held: a quadratic."""
    return 0.5 * ((x[1:] - x[:-1]) ** 2).sum() + 0.5 * x[0] ** 2 + 0.5 * (x[-1] - 1) ** 2


def _time() -> None:
    """A run of 50 iterations, beside its evaluations alone."""
    rows = []
    for label, fun in (("Rosenbrock", rosenbrock), ("chain of springs", chain)):
        for n, dtype in ((100_000, torch.float64), (1_000_000, torch.float64), (1_000_000, torch.float32)):
            start = torch.tensor([-1.2, 1.0], dtype=dtype).repeat(n // 2)
            for method in ("powell-beale", "hs+"):
                rows.append(_overhead(label, fun, start, method))
    columns = ("function", "n", "type", "method", "ms an evaluation", "of them the function", "ratio", "quartiles")
    show("Time of an evaluation with all that the solver does", columns, rows)


def _overhead(label: str, fun: Callable[[Tensor], Tensor], start: Tensor, method: str, rounds: int = 7) -> list[str]:
    count = minimize(fun, start, method=method, gtol=0.0, max_iter=50).nfev
    x = start.clone().requires_grad_()

    def alone() -> None:
        for _ in range(count):
            torch.autograd.grad(fun(x), x)[0].sum().item()

    def run() -> None:
        minimize(fun, start, method=method, gtol=0.0, max_iter=50)

    seconds = interleave({"run": run, "alone": alone}, rounds=rounds, warmup=1)
    middle, low, high = ratio(seconds["run"], seconds["alone"])
    times = (1e3 * statistics.median(seconds[name]) / count for name in ("run", "alone"))
    return [
        label,
        f"{len(start):,}",
        str(start.dtype).removeprefix("torch."),
        method,
        *(f"{t:.2f}" for t in times),
        f"{middle:.2f}",
        f"{low:.2f} - {high:.2f}",
    ]


def main() -> None:
    """Print the tables."""
    _evaluations()
    _time()


if __name__ == "__main__":
    main()
