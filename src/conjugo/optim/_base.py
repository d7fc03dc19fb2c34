"""What the optimizers of this package share: complete state from the start, and state that survives every round trip.

PyTorch's own base class allocates state in the first step and casts it to the parameter's type when it is loaded.
Then a fresh optimizer has nothing into which ``torch.distributed.checkpoint`` could load, and float32 state of bfloat16
parameters is rounded on resume. The base class here allocates at construction and copies loaded values into what it
allocated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from conjugo._space import from_local, is_dtensor, to_local
from conjugo.errors import check

__all__ = ["Optimizer", "as_real", "check_lr", "copy", "evaluate", "state_dtype", "zeros_for"]

Group = dict[str, Any]


class Optimizer(torch.optim.Optimizer):
    """Base class: an optimizer whose state exists, for every parameter, before the first step.

    A subclass implements ``step`` and the hooks

    * ``_check_group(group)``: raise ``ValueError`` for an option out of range (*group* has all defaults filled in);
    * ``_init_state(p, group)``: the freshly allocated state of one parameter, a dict of tensors; all of it is in
      ``state_dict`` under these names;
    * ``_state_replaced()``: rebuild whatever refers to the tensors in ``self.state`` or to ``self.param_groups``
      (views, tables). Called after each group that is added, after unpickling and after loading.

    The hooks also run inside ``__init__``: attributes they read must be set before ``super().__init__``. Attributes
    named in ``_pickled`` travel with pickle and deepcopy, as ``defaults``, ``state`` and ``param_groups`` do.

    Raises ``ValueError`` for options out of range and for state that does not fit the parameters, ``TypeError`` for
    parameters that are neither floating point nor complex, ``RuntimeError`` for sparse gradients.
    """

    _pickled: ClassVar[tuple[str, ...]] = ()

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        raise NotImplementedError

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        raise NotImplementedError

    def _state_replaced(self) -> None:
        pass

    # Parameters ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with its own options, and allocate its state; also in the middle of training."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for p in group["params"]:
                if not (p.is_floating_point() or p.is_complex()):
                    raise TypeError(f"{self._name}: parameters must be floating point or complex, got {p.dtype}")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for p in group["params"]:
            self.state[p] = self._init_state(p, group)
        self._state_replaced()

    def _with_gradient(self) -> list[tuple[Group, list[Tensor]]]:
        """The groups, each with those of its parameters that have a gradient; groups without any are left out."""
        found = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.layout != torch.strided for p in params):
                raise RuntimeError(f"{self._name}: sparse gradients are not supported; use dense ones (sparse=False)")
            if params:
                found.append((group, params))
        return found

    @property
    def _name(self) -> str:
        return type(self).__name__

    # Round trips -----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy *state_dict* into this optimizer; state keeps its own type and stands on its parameter's device.

        Options that are missing in the saved groups keep this optimizer's defaults. Raises ``ValueError``, before
        anything changes, when groups, names or shapes do not fit.
        """
        state, groups = self.state, self.param_groups

        def adopt(_: torch.optim.Optimizer) -> None:
            saved, self.state = self.state, state
            self._copy_state(saved)

        # The user's own hooks see plain tensors: ours comes last before and first after.
        hooks = (
            self.register_load_state_dict_pre_hook(_shield),
            self.register_load_state_dict_post_hook(adopt, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = state, groups
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _copy_state(self, saved: defaultdict[Any, Any]) -> None:
        """Check the loaded groups and the *saved* state (parameter to :class:`_Shielded`), then copy the values."""
        pairs: list[tuple[Tensor, Group, dict[str, Any]]] = []
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            self._check_group(group)
            for p in group["params"]:
                values = saved[p].values if p in saved else {}
                if not values and not p.requires_grad:  # torch.distributed.checkpoint drops what belongs to frozen ones
                    values = self._init_state(p, group)
                self._check_fits(p, values)
                pairs.append((p, group, values))
        with torch.no_grad():
            for p, group, values in pairs:
                if any(t.device != p.device for t in self.state[p].values()):
                    self.state[p] = self._init_state(p, group)
                for name, own in self.state[p].items():
                    copy(own, values[name])
        self._state_replaced()

    def _check_fits(self, p: Tensor, values: dict[str, Any]) -> None:
        own = self.state[p]
        if own.keys() != values.keys():
            raise ValueError(
                f"{self._name}: the saved state of a parameter of shape {tuple(p.shape)} must have "
                f"{sorted(own)}, got {sorted(map(str, values))}"
            )
        for name, tensor in own.items():
            shape = tuple(getattr(values[name], "shape", ("no tensor",)))
            check(shape == tuple(tensor.shape), self._name, f"saved {name}", shape, f"of shape {tuple(tensor.shape)}")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self._pickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpickling = "state" not in self.__dict__  # torch's load_state_dict comes here too
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch has just added; no optimizer here knows it
        if unpickling:
            self._warned_capturable_if_run_uncaptured = True
            self._state_replaced()


def copy(own: Tensor, value: Tensor) -> None:
    """own <- value, where either may be spread over ranks and the other whole; collective if *value* is spread otherwise."""
    if is_dtensor(value) and not (is_dtensor(own) and value.placements == own.placements):
        value = value.full_tensor()
    if is_dtensor(own) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole: each takes its piece.
        value = distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    to_local(own).copy_(to_local(value))


class _Shielded:
    """Carries one parameter's saved state through torch's loading, which would cast bare tensors to its type."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


def _shield(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return state_dict | {"state": {key: _Shielded(values) for key, values in state_dict["state"].items()}}


def check_lr(owner: str, lr: float | Tensor) -> None:
    """Raise ``ValueError`` unless *lr* is a finite number >= 0, or a 0-d tensor that holds one."""
    scalar = not isinstance(lr, Tensor) or lr.ndim == 0
    check(
        scalar and math.isfinite(lr) and float(lr) >= 0, owner, "lr", lr, "a finite number >= 0 (float or 0-d tensor)"
    )


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The value of *closure*, called with gradients enabled; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def state_dtype(p: Tensor) -> torch.dtype:
    """The real type in which state of *p* is kept: float64 for float64 and complex128, else float32."""
    return torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """*tensor*, or for a complex one its real view of shape [..., 2] on the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def zeros_for(p: Tensor) -> Tensor:
    """Zeros with the shape and layout of ``as_real(p)``, in ``state_dtype(p)``; a DTensor like *p* if that is one."""
    local = as_real(to_local(p.detach()))
    return from_local(torch.zeros_like(local, dtype=state_dtype(p), memory_format=torch.preserve_format), p)
