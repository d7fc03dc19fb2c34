"""FRSGD: SGD whose momentum is the Fletcher-Reeves ratio of squared gradient norms (Wang & Ye 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim._base import Group, zeros_for
from conjugo.optim._momentum import Decision, MomentumOptimizer
from conjugo.optim._updates import BUFFER, Momentum
from conjugo.optim.betas import ratio

__all__ = ["FRSGD"]

JUMP = 2.0
"""A learning rate that grows by more than this factor from one step to the next starts the momentum anew."""


class FRSGD(MomentumOptimizer):
    r"""SGD with a momentum that is computed: the Fletcher-Reeves ratio of the squared norms of successive gradients.

    .. math::
        \beta = \min\Big(\frac{\|g\|^2}{\|g'\|^2},\ \beta_{max}\Big), \qquad
        m \leftarrow \beta m + g, \qquad w \leftarrow w - \gamma m

    where a prime marks the previous step, norms run over *all* parameters, and the first step has :math:`\beta = 0`. One
    hyperparameter less than SGD with momentum, the same memory. While gradients shrink slowly :math:`\beta` is close to 1;
    noise and steps that are too large make it smaller.

    It is :class:`~conjugo.optim.NLCG` with ``precond="none"`` in the clothes of ``torch.optim.SGD``: the same state, so that
    checkpoints of SGD load, and what the learning rate does to a momentum buffer is SGD's.

    Args:
        params: parameters or parameter groups, real or complex floating point, all on one device; also DTensors (FSDP2,
            HSDP, tensor parallelism). Groups may have their own *lr*, *weight_decay*, *decoupled*, *beta_min*, *beta_max*,
            *nesterov*, *lr_in_buffer* and *maximize*.
        lr: learning rate :math:`\gamma \geq 0`, a number or a 0-d tensor.
        beta_max: upper limit of :math:`\beta`, in [0, 1]. Needed: with gradients that do not shrink the buffer would grow
            without bound. 0.9 and 0.99 are gentler.
        beta_min: lower limit of :math:`\beta`, in [0, *beta_max*]. With ``beta_min == beta_max`` this is SGD with that
            momentum.
        scope: over what norms run: ``"global"``, ``"group"`` or ``"tensor"``, where every tensor has its own :math:`\beta`.
        weight_decay: :math:`\geq 0`. Coupled: added to the gradient. With *decoupled*: :math:`w \leftarrow (1 - \gamma
            \lambda) w` in each step.
        decoupled: decay the weights, not the loss.
        nesterov: :math:`w \leftarrow w - \gamma (g + \beta m)`, with the new :math:`\beta` and m.
        lr_in_buffer: :math:`m \leftarrow \beta m + \gamma g,\ w \leftarrow w - m`: after the learning rate drops, the old
            velocity lives on for about :math:`1 / (1 - \beta)` steps.
        restart_every: begin anew with :math:`\beta = 0` in every so many steps; None: never.
        restart_on_lr_increase: begin anew where the learning rate has more than doubled since the last step: norms are
            about to grow, and :math:`\beta` would meet its limit at the worst moment.
        process_group: where parameters are DTensors, the ranks that hold them; None: all. A step then needs one small
            all-reduce. Under DDP none is needed.
        foreach: update lists of tensors at once; by default on accelerators.
        fused: use the compiled CPU kernels; by default where they fit.
        maximize: ascend instead of descend.

    State, for every parameter from the start: ``momentum_buffer`` (float32 for bfloat16 and float16 parameters) and
    ``scalars``, float64. A parameter without gradient is left alone, as by SGD, and does not count in the norms.

    ``last`` has ``beta`` and ``grad_norm`` (of what the method sees, coupled weight decay included) of the last step.
    Clipping to a fixed norm would make :math:`\beta` constant: pass the norm from before it, ``step(grad_norm=...)``.

    Raises:
        ValueError: an argument is out of its range, or ranks have different parameters.
        TypeError: a parameter is of an integer type.
        RuntimeError: a gradient is sparse; parameters lie on several devices.

    Source: B. Wang, Q. Ye, "Stochastic Gradient Descent with Nonlinear Conjugate Gradient-Style Adaptive Momentum",
    arXiv:2012.02188. The limits of :math:`\beta` and the restarts are ours.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = FRSGD([w], lr=1.0)
    >>> for g in ((3.0, 4.0), (0.0, 1.0)):
    ...     w.grad = torch.tensor(g)
    ...     optimizer.step()
    >>> round(optimizer.last["beta"].item(), 4), w.data
    (0.04, tensor([-3.1200, -5.1600]))
    """

    _pickled: ClassVar[tuple[str, ...]] = (
        *MomentumOptimizer._pickled,
        "restart_every",
        "restart_on_lr_increase",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        beta_max: float = 0.999,
        beta_min: float = 0.0,
        scope: Literal["global", "group", "tensor"] = "global",
        weight_decay: float = 0.0,
        decoupled: bool = False,
        nesterov: bool = False,
        lr_in_buffer: bool = False,
        restart_every: int | None = None,
        restart_on_lr_increase: bool = True,
        process_group: Any = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        good = restart_every is None or (isinstance(restart_every, int) and restart_every >= 1)
        check(good, "FRSGD", "restart_every", restart_every, "an integer >= 1 or None")
        self.restart_every = restart_every
        self.restart_on_lr_increase = restart_on_lr_increase
        defaults = {
            "lr": lr,
            "beta_max": beta_max,
            "beta_min": beta_min,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "nesterov": nesterov,
            "lr_in_buffer": lr_in_buffer,
            "maximize": maximize,
            # Not used here: with these torch.optim.SGD goes on from a checkpoint of ours.
            "momentum": 0.9,
            "dampening": 0.0,
        }
        super().__init__(params, defaults, scope=scope, process_group=process_group, foreach=foreach, fused=fused)

    def restart(self) -> None:
        """Let the next step have :math:`\\beta = 0`; for when gradients before and after cannot be compared."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["scalars"][1] = 0.0  # norm_sq_prev

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        low, high = group["beta_min"], group["beta_max"]
        check(0 <= high <= 1, "FRSGD", "beta_max", high, "in [0, 1]")
        check(0 <= low <= high, "FRSGD", "beta_min", low, f"in [0, {high}] (beta_max)")

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        return {BUFFER: zeros_for(p), "scalars": self._fresh_scalars(p)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy *state_dict*, of an FRSGD or a ``torch.optim.SGD``, into this optimizer.

        The momentum buffers of SGD are kept, and the next step has :math:`\\beta = 0`. Options that are missing in the saved
        groups keep this optimizer's defaults. Raises ``ValueError``, before anything changes, when groups, names or
        shapes do not fit.
        """
        if not any("scalars" in values for values in state_dict["state"].values()):
            state_dict = self._from_sgd(state_dict)
        super().load_state_dict(state_dict)

    def _from_sgd(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """*state_dict* of an SGD, perhaps without momentum, perhaps from before its first step, as one of ours."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        ours = [(p, group) for group in self.param_groups for p in group["params"]]
        state = {}
        for key, (p, group) in zip(keys, ours):  # numbers that differ are found by whoever loads
            saved = state_dict["state"].get(key, {})
            known = {name: value for name, value in saved.items() if value is not None}
            state[key] = self._init_state(p, group) | known
        return {**state_dict, "state": state}

    @property
    def _method_start(self) -> Mapping[str, float]:
        return {"step": 0.0, "norm_sq_prev": 0.0, "lr_prev": 0.0}

    def _decide_move(self, columns: list[Array], squares: Array) -> Decision:
        step, before, lr_before = columns[:3]
        xp, lr = namespace(squares), self._per_parameter("lr")
        norm, norm_before = self._pool(squares), self._pool(before)
        limits = (self._per_parameter("beta_min"), self._per_parameter("beta_max"))
        beta = xp.minimum(xp.maximum(ratio(norm, norm_before), limits[0]), limits[1])
        anew = (step == 0) | (norm_before == 0)
        if self.restart_every is not None:
            anew = anew | (step % self.restart_every == 0)
        if self.restart_on_lr_increase:
            anew = anew | (lr > JUMP * lr_before)
        beta = xp.where(anew, 0.0, beta)
        shown = {"beta": beta, "grad_norm": xp.sqrt(norm)}
        return Decision(self._move(beta, lr), shown, (step + 1, squares, lr))

    def _move(self, beta: Array, lr: Array) -> Momentum:
        """m <- beta m + gain x, p <- keep p - tau m - look x in the form that each group wants."""
        groups = self._active_groups
        gain, length = None, lr
        if any(group["lr_in_buffer"] for group in groups):
            xp, inside = namespace(lr), self._spread([float(group["lr_in_buffer"]) for group in groups])
            gain, length = xp.where(inside > 0, lr, 1.0), xp.where(inside > 0, 1.0, lr)
        tau, look = length, None
        if any(group["nesterov"] for group in groups):
            xp, ahead = namespace(lr), self._spread([float(group["nesterov"]) for group in groups])
            tau, look = xp.where(ahead > 0, length * beta, length), xp.where(ahead > 0, lr, 0.0)
        return Momentum(beta=beta, gain=gain, tau=tau, look=look, keep=self._keep(lr))
