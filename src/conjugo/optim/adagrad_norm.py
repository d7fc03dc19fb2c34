"""AdaGrad-Norm: one step size, the learning rate over the root of all squared gradient norms (Ward, Wu & Bottou 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._space import is_dtensor, to_local
from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim._base import Group, as_real, zeros_for
from conjugo.optim._momentum import Decision, MomentumOptimizer
from conjugo.optim._scoped import SCOPES
from conjugo.optim._updates import BUFFER, INITIAL, Momentum, TensorUpdates
from conjugo.optim._vectors import Scale, effective_gradients
from conjugo.optim.betas import ratio
from conjugo.optim.preconditioners import Block
from conjugo.optim.step_sizes import Distance, NormGrowth, StepSize, bounded

__all__ = ["AdaGradNorm"]

FIRST_STEP = 0.1
"""Length of the first step relative to the norm of the parameters, if nothing else is asked for."""


class AdaGradNorm(MomentumOptimizer):
    r"""Gradient descent with a step size that the norms of the gradients decide, for all parameters together.

    .. math::
        b \leftarrow \sqrt{b^2 + \|g\|^2}, \qquad v \leftarrow \mu v + (1 - \mu) g, \qquad w \leftarrow w - \frac{\eta}{b} v

    (Algorithms 1 and 3 of the paper.) If the step size is too large, gradients explode and b grows until it is not; noise
    makes it fall like :math:`1 / \sqrt t`. No memory beside the momentum, invariant to rotations. It never diverges, but
    one bad batch early on makes all later steps short.

    Exactly one of *b0*, *first_step* and *distance* says how it starts; without any it is ``first_step=0.1``.

    Args:
        params: parameters or parameter groups, real or complex floating point, all on one device; also DTensors (FSDP2,
            HSDP, tensor parallelism). Groups may have their own *lr*, *momentum*, *weight_decay*, *decoupled* and
            *maximize*.
        lr: :math:`\eta \geq 0`, a number or a 0-d tensor; it has the unit of a distance. The paper's choice is the loss that
            there is to be gained, or 1.
        b0: :math:`b_0 \geq 0`; the paper wants it small, and :math:`\eta` is then the length of the first step.
        first_step: length of the first step relative to the norm of the parameters (its own length if that is 0), above 0.
            The learning rate then sets when step sizes begin to fall.
        distance: in the place of *lr* take *lr* times the greatest distance so far from the start (DoG, Ivgi, Hinder & Carmon
            2023; with scope "tensor" it is LDoG). Use a running average of the weights with it.
        initial_distance: with *distance*, the first one, relative to 1 plus the norm of the parameters, above 0. Batch norm
            wants 1e-4.
        momentum: :math:`\mu`, in [0, 1).
        scope: what has a b of its own: everything (``"global"``), a ``"group"``, a ``"tensor"``, or, as in the paper's runs
            on networks, a ``"row"``: an output neuron or channel, which is an index of the first dimension. There a vector
            takes part in the sums of the rows of the tensor before it in its group, if it has as many entries (*own_bias*:
            it does not). Rows need *b0*.
        own_bias: see *scope*.
        bounds: smallest and largest step size; the largest is a safeguard for *distance*.
        weight_decay: :math:`\lambda \geq 0`. Decoupled: :math:`w \leftarrow (1 - \alpha \lambda) w`, with :math:`\alpha` the
            step size. Otherwise added to the gradient, where it makes b grow.
        decoupled: see *weight_decay*.
        process_group: where parameters are DTensors, the ranks that hold them; None: all. A step then needs one small
            all-reduce. Under DDP none is needed.
        foreach: update lists of tensors at once; by default on accelerators.
        fused: use the compiled CPU kernels; by default where they fit.
        maximize: ascend instead of descend.

    State, for every parameter from the start: ``scalars``, float64; ``momentum_buffer`` with momentum, ``initial`` (the
    parameters at the start) with *distance*, ``row_squares`` with scope "row".

    ``last`` has ``step_size``, ``b`` and ``grad_norm`` of the last step (with scope "row" ``grad_norm`` only). The norm
    depends on the scale of the loss: under mixed precision unscale gradients before the step.

    Raises:
        ValueError: an argument is out of its range, or ranks have different parameters.
        TypeError: a parameter is of an integer type.
        RuntimeError: a gradient is sparse; parameters lie on several devices; rows are split over ranks.

    Source: R. Ward, X. Wu, L. Bottou, "AdaGrad Stepsizes: Sharp Convergence over Nonconvex Landscapes", ICML 2019, JMLR 21
    (2020). *first_step*, *bounds* and decoupled decay are ours.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdaGradNorm([w], lr=2.0, b0=0.0)
    >>> for _ in range(3):  # gradient descent on w^2 / 2
    ...     w.grad = w.detach().clone()
    ...     optimizer.step()
    ...     print(f"{w.item():.4f}, step size {optimizer.last['step_size'].item():.4f}")
    -1.0000, step size 2.0000
    0.4142, step size 1.4142
    -0.1480, step size 1.3572
    """

    _pickled: ClassVar[tuple[str, ...]] = (*MomentumOptimizer._pickled, "rule", "own_bias")
    _scopes: ClassVar[tuple[str, ...]] = (*SCOPES, "row")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        b0: float | None = None,
        first_step: float | None = None,
        distance: bool = False,
        initial_distance: float = 1e-6,
        momentum: float = 0.0,
        scope: Literal["global", "group", "tensor", "row"] = "global",
        own_bias: bool = False,
        bounds: tuple[float, float] = (0.0, math.inf),
        weight_decay: float = 0.0,
        decoupled: bool = True,
        process_group: Any = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        given = [name for name, yes in (("b0", b0 is not None), ("first_step", first_step is not None)) if yes]
        given += ["distance"] * distance
        check(len(given) <= 1, "AdaGradNorm", "the start", " and ".join(given), "one of b0, first_step and distance")
        check(scope != "row" or given == ["b0"], "AdaGradNorm", "b0", b0, "given with scope='row', and nothing else")
        if not given:
            first_step = FIRST_STEP
        if distance:
            self.rule: Distance | NormGrowth = Distance(
                initial_distance=initial_distance, bounds=bounds, owner="AdaGradNorm"
            )
        else:
            self.rule = NormGrowth(b0=b0, first_step=first_step, bounds=bounds, owner="AdaGradNorm")
        self.own_bias = own_bias
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
        }
        super().__init__(params, defaults, scope=scope, process_group=process_group, foreach=foreach, fused=fused)

    # Hooks of the base class -----------------------------------------------------------------------------------------

    @property
    def _rule(self) -> StepSize:
        return self.rule

    @property
    def _method_start(self) -> Mapping[str, float]:
        return {"step": 0.0}

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        momentum = group["momentum"]
        check(0 <= momentum < 1, "AdaGradNorm", "momentum", momentum, "in [0, 1)")

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        state = {"scalars": self._fresh_scalars(p)}
        if group["momentum"] > 0:
            state[BUFFER] = zeros_for(p)
        if self.rule.needs_distance:
            state[INITIAL] = zeros_for(p)
            to_local(state[INITIAL]).copy_(as_real(to_local(p.detach())))
        if self.scope == "row":
            state["row_squares"] = self._fresh_rows(p)
        return state

    def _fresh_rows(self, p: Tensor) -> Tensor:
        """b0 squared for each row, laid out over ranks as the rows are."""
        rows = to_local(p.detach())
        shape = rows.shape[:1] if p.ndim else (1,)
        assert isinstance(self.rule, NormGrowth)
        assert self.rule.b0 is not None
        start = torch.full(shape, self.rule.b0**2, dtype=torch.float64, device=p.device)
        if not is_dtensor(p):
            return start
        from torch.distributed.tensor import DTensor

        if any(place.is_shard() and place.dim != 0 for place in p.placements):
            raise RuntimeError(f"AdaGradNorm: scope='row' takes parameters sharded by rows, got {p.placements}")
        whole = p.shape[:1] if p.ndim else (1,)
        return DTensor.from_local(
            start, p.device_mesh, p.placements, run_check=False, shape=torch.Size(whole), stride=(1,)
        )

    def _plan(self, work: list[tuple[Group, list[Tensor]]], active: list[Tensor]) -> None:
        super()._plan(work, active)
        if self.rule.needs_distance:
            for p, step in zip(active, torch.as_tensor(self._columns()[0])):
                start, now = to_local(self.state[p][INITIAL]), as_real(to_local(p.detach()))
                # Since the optimizer was made the weights may have been loaded or initialised anew.
                start.copy_(torch.where(step == 0, now.to(start.dtype), start))

    def _lay_out(self, blocks: list[Block]) -> bool:
        if self.scope != "row":
            return super()._lay_out(blocks)
        if self.fused:
            raise RuntimeError("AdaGradNorm: fused=True needs another scope than 'row'")
        self._updates = _RowUpdates(blocks, own_bias=self.own_bias, bounds=self.rule.bounds)
        return False

    # The step --------------------------------------------------------------------------------------------------------

    def _decide_move(self, columns: list[Array], squares: Array) -> Decision:
        xp, lr = namespace(squares), self._per_parameter("lr")
        norm = {"grad_norm": xp.sqrt(self._pool(squares))}
        if self.scope == "row":
            return Decision(Momentum(tau=lr), norm, (columns[0] + 1,), self._rule_state(columns))
        distance = None
        if self.rule.needs_distance:
            distance = self._space.reduce(self._updates.squared_distances())
        verdict = self._decide(columns, lr=lr, square=squares, distance=distance)
        shown = {"step_size": verdict.length, "b": xp.sqrt(verdict.state[0]), **norm}
        return Decision(self._move(verdict.length, self._keep(verdict.length)), shown, (columns[0] + 1,), verdict.state)

    def _move(self, length: Array, keep: Array | None) -> Momentum:
        groups = self._active_groups
        buffered = [BUFFER in self.state[group["params"][0]] for group in groups]
        if not any(buffered):
            return Momentum(look=length, keep=keep)
        beta = self._spread([group["momentum"] for group in groups])
        look = None if all(buffered) else length * self._spread([float(not has) for has in buffered])
        return Momentum(beta=beta, gain=1 - beta, tau=length, look=look, keep=keep)


class _RowUpdates(TensorUpdates):
    """The work of a step in which each row of a parameter has its own b, one tensor after the other."""

    def __init__(self, blocks: Sequence[Block], *, own_bias: bool, bounds: tuple[float, float]) -> None:
        super().__init__(blocks, shared=False)
        self._own_bias, self._bounds = own_bias, bounds

    def move(self, scales: Sequence[Scale], move: Momentum, finite: Tensor) -> None:
        """*move*: ``tau`` holds the learning rates, to be divided by the b of each row; all else is in the groups."""
        for block, span in self._blocks:
            xs = [x.masked_fill(torch.logical_not(finite), 0.0) for x in effective_gradients(block, scales[span])]
            assert move.tau is not None
            lrs = move.tau[span]
            before: Tensor | None = None  # the rows' squares of the last matrix
            for p, piece, x, state, lr in zip(block.params, block.pieces(), xs, block.states, lrs, strict=True):
                sums = state["row_squares"]
                own = x.to(sums.dtype).square()
                own = own.flatten(1).sum(1) if x.ndim > 1 else own.reshape(-1)
                shared = before is not None and p.ndim == 1 and not self._own_bias and len(before) == len(sums)
                sums += own + before if shared else own  # type: ignore[operator]
                before = own if p.ndim > 1 else before
                length = bounded(ratio(lr, sums.sqrt()), self._bounds) * finite
                length = length.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if x.ndim else length[0].to(x.dtype)
                w, group = as_real(piece), block.group
                if group["decoupled"] and group["weight_decay"]:
                    w.mul_(1 - length * group["weight_decay"])
                if BUFFER in state:
                    mu = torch.where(finite, group["momentum"], 1.0).to(x.dtype)
                    x = state[BUFFER].mul_(mu).add_(x * (1 - mu))
                w.sub_(x * length)
