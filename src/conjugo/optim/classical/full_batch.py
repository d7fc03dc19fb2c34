"""``FullBatchCG``: the same methods as a ``torch.optim`` optimizer that calls a closure, like ``torch.optim.LBFGS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._space import is_dtensor
from conjugo._tensors import wide_dtype
from conjugo.errors import check
from conjugo.optim._base import Group, Optimizer, as_real, zeros_for
from conjugo.optim.classical.driver import Driver
from conjugo.optim.classical.methods import Options
from conjugo.optim.classical.protocol import MESSAGES, Memory, Status

__all__ = ["FullBatchCG"]

NAMES = ("direction", "direction_kept", "grad_change_kept")
"""State in the order of the driver's rows; beside these there is the gradient where the last line started."""


class FullBatchCG(Optimizer):
    """Conjugate gradients with a line search, for a loss that is the same whenever it is evaluated.

    Used like ``torch.optim.LBFGS``: ``step(closure)`` runs several iterations; the next call goes on with the conjugate
    direction, also after saving and loading. It begins by evaluating the closure where the parameters are.

    Args:
        params: parameters or parameter groups (which only name them: options are the same for all); all float32, or all
            float64, or complex of the same precision, on one device.
        method: as in :func:`conjugo.optim.minimize`; ``"scg"`` measures curvature by differences.
        max_iter: iterations per step; >= 0.
        max_eval: calls of the closure per step at most; None: no limit but those of the line searches.
        tolerance_grad: end the step when the largest absolute component of the gradient is at most this.
        tolerance_change: end the step when an iteration lowers the loss by at most this times max(1, abs(loss)).
        c1, c2: constants of the strong Wolfe conditions, 0 < c1 < c2 < 1 and c1 < 0.5.

    State: 2 vectors (``"powell-beale"``: 4) and some numbers per parameter; 3 vectors more are working memory.

    ``last`` tells of the last step: ``status`` and ``message`` why it ended, ``iterations``, ``evaluations``, ``loss`` and
    ``grad_max`` at its end.

    Raises:
        ValueError: an option is out of range, or differs between groups.
        TypeError: parameters of another type, of mixed types or devices, or sharded ones.

    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = FullBatchCG([w])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (w**4 + w**2).sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure)
    tensor(362., grad_fn=<SumBackward0>)
    >>> bool((abs(w) < 1e-4).all()), optimizer.last["status"]
    (True, 'CONVERGED')
    """

    _pickled: ClassVar[tuple[str, ...]] = ("last",)

    def __init__(
        self,
        params: ParamsT,
        method: str = "powell-beale",
        *,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        c1: float = 1e-4,
        c2: float = 0.1,
    ) -> None:
        self.last: dict[str, Any] = {}
        defaults = {
            "method": method,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "c1": c1,
            "c2": c2,
        }
        super().__init__(params, defaults)

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        for name in ("tolerance_grad", "tolerance_change"):
            check(0 <= group[name] < math.inf, self._name, name, group[name], "in [0, inf)")
        self._options(group)
        first = self.param_groups[0]
        for name in self.defaults:
            check(group[name] == first[name], self._name, name, group[name], f"the same in all groups, {first[name]!r}")
        for p in group["params"]:
            if is_dtensor(p):
                raise TypeError("FullBatchCG: parameters must be whole, got a DTensor; NLCG takes sharded parameters")
            one = first["params"][0]
            same = as_real(p).dtype == as_real(one).dtype and p.device == one.device
            precise = as_real(p).dtype in (torch.float32, torch.float64)
            if not (same and precise):
                raise TypeError(
                    f"FullBatchCG: parameters must be all float32 or all float64 (or complex of these), on one device, "
                    f"got {p.dtype} on {p.device} and {one.dtype} on {one.device}"
                )

    def _options(self, group: Group) -> Options:
        return Options(
            owner=self._name,
            method=group["method"],
            gtol=group["tolerance_grad"],
            f_tol=group["tolerance_change"],
            max_iter=group["max_iter"],
            max_eval=group["max_eval"],
            c1=group["c1"],
            c2=group["c2"],
        )

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        names = ["grad_prev", *NAMES][: self._options(group).vectors - 2]
        memory = torch.tensor(Memory().numbers(), dtype=wide_dtype(p.device), device=p.device)
        return {name: zeros_for(p) for name in names} | {"memory": memory}

    def _state_replaced(self) -> None:
        """Put the vectors of all parameters into one table, of which the state holds views."""
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._real = [as_real(p.detach()) for p in self._params]
        self._sizes = [real.numel() for real in self._real]
        points = self._real[0].new_empty(3, sum(self._sizes))
        self._driver = Driver(self._options(self.param_groups[0]), points, self._evaluate)
        rows = {"grad_prev": self._driver.base} | dict(zip(NAMES, self._driver.rows, strict=True))
        for name, row in rows.items():
            if row < len(self._driver.table):
                views = self._views(self._driver.table[row])
                torch._foreach_copy_(views, [self.state[p][name] for p in self._params])
                for p, view in zip(self._params, views, strict=True):
                    self.state[p][name] = view
        memories = [self.state[p]["memory"] for p in self._params]
        if any(not torch.equal(memory, memories[0]) for memory in memories):
            torch._foreach_zero_(memories)  # a parameter has joined, and has no direction: all begin anew

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat vector, in the shapes of the parameters."""
        return [part.view(real.shape) for part, real in zip(torch.split(flat, self._sizes), self._real, strict=True)]

    # Steps -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Run up to ``max_iter`` iterations; returns what the first call of *closure* returned.

        closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss. Afterwards the parameters
        are at the lowest point seen, also when *closure* raised or Ctrl-C interrupted it; their ``.grad`` is that of the
        evaluation that came last.
        """
        driver, memories = self._driver, [self.state[p]["memory"] for p in self._params]
        driver.options = self._options(self.param_groups[0])
        torch._foreach_copy_(self._views(driver.points[driver.base]), self._real)
        memory = Memory.of(memories[0].tolist())
        before = replace(memory)
        self._closure = closure
        self._losses: list[Any] = []
        try:
            status = driver.run(memory)
            grad_max = driver.gradient.abs().max().item()
        except BaseException:
            memory.rho = 0.0  # the next step begins anew
            raise
        finally:
            del self._closure
            driver.settle()
            torch._foreach_copy_(self._real, self._views(driver.x))
            torch._foreach_copy_(memories, [memories[0].new_tensor(memory.numbers())] * len(memories))
        self.last = {
            "status": status.name,
            "message": MESSAGES[status],
            "iterations": memory.iterations - before.iterations,
            "evaluations": memory.evaluations - before.evaluations,
            "loss": driver.f,
            "grad_max": grad_max,
        }
        if status == Status.INTERRUPTED:
            raise KeyboardInterrupt
        return self._losses.pop()

    def _evaluate(self, x: Tensor, gradient: Tensor) -> Tensor | float:
        torch._foreach_copy_(self._real, self._views(x))
        with torch.enable_grad():
            loss = self._closure()
        if not self._losses:
            self._losses.append(loss)
        found = self._with_gradient()
        check(bool(found), self._name, "closure", self._closure, "a function that calls backward()")
        for p, view in zip(self._params, self._views(gradient), strict=True):
            view.zero_() if p.grad is None else view.copy_(as_real(p.grad))
        return loss.detach() if isinstance(loss, Tensor) else float(loss)
