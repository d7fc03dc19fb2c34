"""``minimize``: one function of tensors or of a NumPy array."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conjugo.errors import check
from conjugo.optim.classical.batch import minimize_batch
from conjugo.optim.classical.driver import Driver
from conjugo.optim.classical.layout import Layout
from conjugo.optim.classical.methods import Options
from conjugo.optim.classical.protocol import MESSAGES, Memory, Status

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

__all__ = ["minimize"]


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...] = (),
    method: str = "powell-beale",
    jac: bool | Callable[..., Any] | None = None,
    *,
    gtol: float = 1e-5,
    f_tol: float = 0.0,
    max_iter: int | None = None,
    max_eval: int | None = None,
    c1: float = 1e-4,
    c2: float = 0.1,
    precond: Callable[[Any], Any] | None = None,
    curvature: str = "difference",
    callback: Callable[[OptimizeResult], Any] | None = None,
    batched: bool = False,
) -> OptimizeResult:
    """Minimise a smooth function by conjugate gradients: exact gradients, a line search, no learning rate.

    Args:
        fun: ``fun(x, *args)`` returns the value: a scalar tensor from which the gradient is had by autograd; or, with
            *jac*, a scalar tensor or number. The x it gets is only valid during the call.
        x0: starting point: a tensor of any shape, or tensors in lists, tuples and dicts, all float32 or all float64 or
            complex of the same precision, on one device; or a NumPy array (needs *jac*). Not changed.
        args: further arguments of *fun* (and of *jac*, if that is a function).
        method: ``"fr"`` Fletcher-Reeves, ``"pr+"`` Polak-Ribiere, ``"hs+"`` Hestenes-Stiefel, ``"dy"`` Dai-Yuan (fails on
            hard problems: for study), ``"hs-dy"``, ``"fr-pr"``, ``"hz"`` Hager-Zhang, ``"dai-kou"``, ``"powell-beale"``
            Powell's restarts of Beale's three-term method (two vectors more, fewest evaluations), ``"scg"`` Møller's
            scaled conjugate gradients (no line search). The formulas are in :mod:`conjugo.optim.betas`.
        jac: True: *fun* returns (value, gradient); or a function that returns the gradient, as a tree like *x0*. For complex
            variables the gradient is PyTorch's: df/d(re x) + i df/d(im x).
        gtol: stop when the largest absolute component of the gradient is at most this; >= 0.
        f_tol: stop when an iteration lowers the value by at most f_tol * max(1, abs(value)); >= 0.
        max_iter: iterations at most; by default 200 times the number of variables.
        max_eval: evaluations at most (a value and a gradient are one); by default 1000 times the number of variables.
        c1, c2: constants of the strong Wolfe conditions, 0 < c1 < c2 < 1 and c1 < 0.5: an accepted step lowers the value by
            c1 times the first-order change, and leaves at most c2 times the slope.
        precond: takes a gradient, returns P times it, with a fixed symmetric positive definite P, for example the inverse
            of the Hessian's diagonal. Called for each evaluation and each new direction. Not with ``"scg"``.
        curvature: for ``"scg"``: ``"difference"`` of two gradients, or ``"hvp"``, exact by automatic differentiation of
            the gradient, and better in float32. Either counts as an evaluation.
        callback: called with ``intermediate_result``, an ``OptimizeResult``, after each iteration. ``StopIteration`` ends
            the run, and so does ``KeyboardInterrupt``, here or in *fun*.
        batched: *x0* is a tensor [B, ...] of starting points, and *fun* takes one of them; all are minimised at once,
            each with its own step lengths and end, by ``torch.func.vmap``. The result then holds B values, as that of
            :func:`conjugo.optim.classical.minimize_batch`.

    Returns:
        SciPy's ``OptimizeResult``: ``x`` and ``jac`` (in the form of *x0*) and ``fun`` (float) of the lowest point seen,
        ``nit`` iterations, ``nfev`` = ``njev`` evaluations, ``success``, ``message``, and ``status``: 0 converged, 1 max_iter
        reached, 2 no lower point found, 3 not finite at the start, 4 max_eval reached, 99 stopped by the callback, 100
        interrupted.

    Where the function is not finite at a trial point, the step is halved towards the last finite one. Where its value has no
    more digits, slopes decide (Hager & Zhang 2005), so that gradients far below the rounding of the value can be reached.

    Raises:
        ValueError: an option is out of range, *x0* has no variables or is not finite, or *fun*, *jac* or *precond* return what
            they should not.
        TypeError: *x0* is of another type.

    Sources: Nocedal & Wright 2006, chapters 3 and 5; Powell 1977; Møller 1993; Hager & Zhang 2005.

    >>> def rosenbrock(x):
    ...     return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    >>> result = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> result.x
    tensor([1.0000, 1.0000], dtype=torch.float64)
    >>> result.success, result.nfev < 100
    (True, True)
    """
    options = Options(
        owner="minimize",
        method=method,
        gtol=gtol,
        f_tol=f_tol,
        max_iter=max_iter,
        max_eval=max_eval,
        c1=c1,
        c2=c2,
        curvature=curvature,
    )
    if batched:
        return _minimize_batched(fun, x0, args, jac, options, precond, callback)
    return _Problem(fun, args, jac, Layout("minimize", x0), options, precond).solve(callback)


class _Problem:
    """The user's function, on flat vectors."""

    def __init__(
        self,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        jac: bool | Callable[..., Any] | None,
        layout: Layout,
        options: Options,
        precond: Callable[[Any], Any] | None,
    ) -> None:
        self.fun, self.args, self.jac, self.layout, self.options, self.precond = (
            fun,
            args,
            jac,
            layout,
            options,
            precond,
        )
        automatic = jac is None or jac is False
        check(not (automatic and layout.numpy), "minimize", "jac", jac, "True or a function, with x0 a NumPy array")
        exact = options.curvature == "hvp"
        check(automatic or not exact, "minimize", "curvature", "hvp", "'difference' unless gradients are automatic")
        check(precond is None or options.method != "scg", "minimize", "precond", precond, "None with method 'scg'")
        self.evaluate = self._automatic if automatic else self._given
        points = layout.start().repeat(3, 1)
        self.driver = Driver(
            options,
            points,
            self.evaluate,
            precondition=None if precond is None else self._precondition,
            curvature=self._curvature if exact else None,
        )
        self.memory = Memory()

    def solve(self, callback: Callable[[OptimizeResult], Any] | None) -> OptimizeResult:
        def after_iteration() -> None:
            if callback is not None:
                callback(self._result())

        status = self.driver.run(self.memory, after_iteration)
        return self._result(status=int(status), success=status == Status.CONVERGED, message=MESSAGES[status])

    def _result(self, **more: Any) -> OptimizeResult:
        from scipy.optimize import OptimizeResult

        driver, memory = self.driver, self.memory
        return OptimizeResult(
            x=self._tree(driver.x),
            fun=driver.f,
            jac=self._tree(driver.gradient),
            nit=memory.iterations,
            nfev=memory.evaluations,
            njev=memory.evaluations,
            **more,
        )

    def _tree(self, flat: Tensor) -> Any:
        """A copy for the user to keep."""
        return self.layout.tree([view.clone() for view in self.layout.views(flat)])

    def _value(self, x: Any) -> Tensor:
        value: Tensor = self.fun(x, *self.args)
        scalar = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() and value.requires_grad
        check(scalar, "minimize", "fun", value, "a function that returns a real scalar tensor that depends on x")
        return value

    def _automatic(self, x: Tensor, gradient: Tensor) -> Tensor:
        leaves = [view.detach().requires_grad_() for view in self.layout.views(x)]
        with torch.enable_grad():
            value = self._value(self.layout.tree(leaves))
            grads = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
        for grad, view in zip(grads, self.layout.views(gradient), strict=True):
            view.copy_(grad)
        return value.detach()

    def _given(self, x: Tensor, gradient: Tensor) -> Tensor | float:
        tree = self.layout.tree(self.layout.views(x))
        with torch.no_grad():
            if callable(self.jac):
                value, grad = self.fun(tree, *self.args), self.jac(tree, *self.args)
            else:
                value, grad = self.fun(tree, *self.args)
        self.layout.write("the gradient", grad, gradient)
        if isinstance(value, Tensor) and not self.layout.numpy:
            check(value.numel() == 1, "minimize", "fun", value, "a function that returns a real scalar")
            return value
        return float(value)

    def _curvature(self, x: Tensor, p: Tensor) -> Tensor:
        """H p at x, by differentiating <grad f, p>."""
        leaves = [view.detach().requires_grad_() for view in self.layout.views(x)]
        with torch.enable_grad():
            grads = torch.autograd.grad(self._value(self.layout.tree(leaves)), leaves, create_graph=True)
            products = torch.autograd.grad(
                grads, leaves, self.layout.views(p), materialize_grads=True, allow_unused=True
            )
        found = torch.zeros_like(p)
        for product, view in zip(products, self.layout.views(found), strict=True):
            view.copy_(product)
        return found

    def _precondition(self, gradient: Tensor) -> Tensor:
        assert self.precond is not None
        found = torch.zeros_like(gradient)
        self.layout.write("what precond returns", self.precond(self._tree(gradient)), found)
        return found


def _minimize_batched(
    fun: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...],
    jac: Any,
    options: Options,
    precond: Any,
    callback: Callable[[OptimizeResult], Any] | None,
) -> OptimizeResult:
    """Autograd and vmap around :func:`minimize_batch`."""
    check(not jac, "minimize", "jac", jac, "None with batched=True (minimize_batch takes gradients)")
    check(precond is None, "minimize", "precond", precond, "None with batched=True")
    check(
        options.curvature == "difference", "minimize", "curvature", options.curvature, "'difference' with batched=True"
    )
    tensor = isinstance(x0, Tensor) and x0.ndim >= 1
    check(tensor, "minimize", "x0", type(x0).__name__, "a tensor [B, ...] with batched=True")
    shape = x0.shape[1:]
    gradients = torch.func.vmap(torch.func.grad_and_value(lambda x: fun(x, *args)))

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        g, f = gradients(x.view(-1, *shape))
        return f, g.reshape(len(x), -1)

    def shaped(result: OptimizeResult) -> OptimizeResult:
        result.x, result.jac = (t.view(-1, *shape) for t in (result.x, result.jac))
        return result

    return shaped(
        minimize_batch(
            evaluate,
            x0.detach().reshape(len(x0), -1),
            method=options.method,
            gtol=options.gtol,
            f_tol=options.f_tol,
            max_iter=options.max_iter,
            max_eval=options.max_eval,
            c1=options.c1,
            c2=options.c2,
            callback=None if callback is None else lambda found: callback(shaped(found)),
        )
    )
