"""NLCG: the stochastic preconditioned nonlinear conjugate gradient method of Adya, Palakkode & Tuzel (2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from conjugo._space import Slices, is_dtensor
from conjugo._tensors import Array, dot, namespace, wide_dtype
from conjugo.errors import check
from conjugo.optim._base import Group, as_real, check_lr, evaluate, state_dtype, zeros_for
from conjugo.optim._fused import FusedPasses
from conjugo.optim._observed_batch import ObservedBatch
from conjugo.optim._passes import Move, TensorPasses
from conjugo.optim._probed_passes import Objective, ProbedPasses
from conjugo.optim._products import drop_graphs, hessian_products
from conjugo.optim._scoped import ScopedOptimizer
from conjugo.optim._vectors import Scale
from conjugo.optim.adaptive_preconditioner import AdamDiagonal
from conjugo.optim.betas import RULES, Products, constant, ratio
from conjugo.optim.curvature_preconditioners import CurvatureDiagonal, GaussNewtonDiagonal, Hutchinson
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.line_search import LineSearch
from conjugo.optim.orthogonal import Orthogonal
from conjugo.optim.parameter_roles import parameter_groups
from conjugo.optim.preconditioners import Block, DiagonalBFGS, Identity, Preconditioner, Secant
from conjugo.optim.probed_steps import NAMES, Parabola, ProbedStep, Subspace
from conjugo.optim.step_sizes import Constant, StepSize, Verdict

__all__ = ["NLCG", "lars_scale"]

EPS = 1e-8
"""The authors' epsilon: in mode "reference" it is added in denominators and is the shortest step that is taken back."""


_H_BOUNDS = (1e-6, 1e6)

_RULES = {"fr": RULES["fr"], "pr": RULES["pr"], "constant": constant}


class Scalars(NamedTuple):
    """The scalar state, one value per parameter: columns of the table behind ``state[p]["scalars"]``.

    Inner products are the parameter's own part; what the method uses is their sum over the scope.
    """

    step: Array  # steps taken
    rho: Array  # <g', P g'>
    tau: Array  # length of the last step along d'
    pure: Array  # 1 if the last step was tau d', 0 if the line search took a part of an earlier one back
    gg: Array  # <g', g'>
    gd: Array  # <g', d'>
    dhd: Array  # <d', H d'>


class Sums(NamedTuple):
    """Inner products over the scope, at each parameter; a prime (rho, gg) marks the previous step."""

    tau: Array  # length of the last step, s = tau d'
    ys: Array  # <y, s>
    shs: Array  # <s, H s>
    ss: Array  # <s, s>
    xx: Array  # <g, g>
    gg: Array  # <g', g'>
    xd: Array  # <g, d'>
    cross: Array  # <g, P g'>
    rho: Array  # <g', P g'>


class NLCG(ScopedOptimizer):
    r"""Stochastic preconditioned nonlinear conjugate gradients, for large mini-batches.

    One gradient per step. With :math:`g` the gradient, :math:`P` the preconditioner, :math:`d` the direction and
    :math:`\tau` the learning rate times the factor of the line search:

    .. math::
        \beta = \operatorname{clip}\Big(\frac{\langle g, P g\rangle \, [\, - \langle g, P' g' \rangle \,]}
        {\langle g', P' g'\rangle},\ 0,\ \beta_{max}\Big), \qquad
        d \leftarrow -P g + \beta d, \qquad w \leftarrow w + \tau d

    where a prime marks the previous step, inner products run over *all* parameters, and the term in brackets belongs to
    the Polak-Ribiere rule. Without further arguments P orthogonalises the gradients of matrices and scales all others as
    Adam does; how that does beside other choices and optimizers is measured by ``conjugo reproduce frontier``. The published
    method has ``precond="bfgs"``: :math:`P = 1/h` with a diagonal BFGS model h of the Hessian, updated from the last step
    :math:`s = \tau' d'` and the change :math:`y = g - g'` of the gradient:

    .. math:: h \leftarrow h - \frac{h^2 s^2}{\langle s, h s \rangle} + \frac{y^2}{\langle y, s \rangle}

    Args:
        params: parameters or parameter groups, real or complex floating point, all on one device; of a model on many
            ranks those of this rank: whole (DDP) or DTensors (FSDP2, HSDP, tensor parallelism). Groups may have their own
            *lr*, *weight_decay*, *decoupled*, *lars*, *grad_scale*, *beta_max* and *maximize*, and their own *precond*;
            :func:`~conjugo.optim.parameter_groups` makes some of a model. Or the model itself: its parameters that need a
            gradient, without a *precond* in these groups, which leave embeddings and heads out of what is orthogonalised.
        lr: learning rate :math:`\geq 0`, a number or a 0-d tensor. None: 0.01 with Adam's scaling and the preconditioners for
            matrices, else 0.1; there, one that is good for SGD with momentum is a good start. 1 where the step size
            looks at the batch again.
        rule: ``"fr"`` (Fletcher-Reeves: a momentum that adapts) or ``"pr"`` (Polak-Ribiere: without an exact line
            search :math:`\beta` is 0 in most steps, so it is close to gradient descent); or ``"constant"``:
            :math:`\beta` is *beta_max* in every step after the first, the control that says what a computed one is worth.
        precond: ``"bfgs"``, the published one; ``"none"``; ``"hutchinson"`` or ``"gauss-newton"``, the diagonal of the Hessian
            or of the Gauss-Newton matrix, which must be measured every few steps (:attr:`needs_curvature`, :meth:`measure`);
            ``"adam"``, the scaling of Adam; ``"orthogonal"``, which orthogonalises the gradients of matrices; ``"kron"``,
            Adam's scaling in an eigenbasis; or a :class:`~conjugo.optim.preconditioners.Preconditioner`. None:
            ``"orthogonal"``, in *mode* "reference" ``"bfgs"``. One choice for all parameters, or one for each group:
            :math:`\beta` then comes from sums over all of them, so mix only what has the same units (Adam's scaling and those
            for matrices have). Diagonal BFGS uses sums over its own parameters.
        line_search: ``"none"``; ``"online"`` or ``"step"``: when the loss grows against its running average (in every
            step; every *period* steps), the learning rate is reduced and a part of the last move is taken back. Needs the
            loss of each step: ``step(closure)`` or ``step(loss=loss)``. Or a
            :class:`~conjugo.optim.step_sizes.StepSize` that makes a step size of the learning rate; among them
            ``"parabola"`` and ``"subspace"``, which look at the batch again (:mod:`~conjugo.optim.probed_steps`): hand it over
            by :meth:`observe_batch` before each step, take a learning rate of 1, and scope ``"global"``.
        period: steps between two looks of the line search ``"step"``, at least 1.
        threshold: scales the growth of the loss (1 % to 15 %) at which the line search reacts, above 0.
        removal: what the line search takes back: ``"previous"``, a part of the last move (the evident intention), or
            ``"current"``, a part of the new one (the order of the authors' code). Default: by *mode*.
        weight_decay: :math:`\geq 0`. Coupled: added to the gradient. With *decoupled*: :math:`w \leftarrow (1 - lr\,
            \lambda) w` in each step.
        decoupled: decay the weights, not the loss (Loshchilov & Hutter 2019).
        lars: trust coefficient (0.001 is common) of a layer-wise scaling of the gradient before everything else, or None;
            see :func:`lars_scale`.
        grad_scale: a fixed factor on the gradient, or one factor for each parameter of the group;
            :func:`~conjugo.optim.gradient_scales.batch_norm_scales` and
            :func:`~conjugo.optim.gradient_scales.depth_scales` make the authors' two.
        mode: ``"exact"``; ``"reference"`` follows the authors' program with its quirks (an absolute 1e-8 in numerators
            and denominators, curvature pairs with today's learning rate), for comparison.
        scope: over what inner products run: ``"global"`` (the method), ``"group"`` or ``"tensor"``.
        beta_max: upper limit of :math:`\beta`, in [0, 1]. None: 0.9 with Adam's scaling and the preconditioners for matrices,
            with which :math:`\beta` would be near 1 all the time, else 1.
        h0: first value of :math:`h`, above 0. Multiply it with whatever the loss is multiplied with.
        h_bounds: interval of :math:`h` in multiples of *h0*.
        nesterov: move by :math:`\tau (-P g + \beta d)` with the new d, as with Nesterov's momentum, instead of
            :math:`\tau d`. Not with preconditioners that learn from steps, nor with line searches.
        restart_on_ascent: restart with :math:`d = -P g` where the new direction would lead uphill.
        allow_missing: whether a parameter may be without gradient in one step and have one in the next; it then counts as
            zero. Parameters that never have a gradient are left alone in any case.
        process_group: the ranks that train this model together; None: all, if torch.distributed is initialised.
            Independent models on the ranks of one job need a group of one rank each. Sums run over all parameters
            wherever they lie, and the loss of the line search is averaged. Constructor, ``add_param_group`` and ``step``
            are collective then.
        sync_scalars: take the sums of rank 0 on all ranks also where each could work them out (DDP), for ranks whose
            hardware rounds differently; one more tiny collective in each step. Sharded parameters always share sums.
        shard_state: under DDP, keep state for a part of the rows of each parameter only, 1/W of it on each of W ranks
            (ZeRO-1). A rank updates its rows and gets the others from the other ranks. The state is laid out as FSDP2
            lays out parameters, and checkpoints fit both.
        foreach: update lists of tensors at once; by default on accelerators.
        fused: use the compiled CPU kernels; by default where they fit (dense float32 or float64 parameters on a CPU).
        maximize: ascend instead of descend.

    State, for every parameter from the start: ``direction``; ``grad_prev`` with ``"bfgs"`` or ``"pr"``; ``h`` with
    ``"bfgs"``, ``curvature`` with ``"hutchinson"`` and ``"gauss-newton"``, what their classes say with the others (float32,
    or float64 for float64 parameters); ``scalars``, float64.

    Gradient clipping to a fixed norm makes the Fletcher-Reeves :math:`\beta` 1 in every step: set *beta_max* then.

    Raises:
        ValueError: an argument is out of its range, the line search gets no loss, or ranks have different parameters.
        TypeError: a parameter is of an integer type.
        RuntimeError: a gradient is sparse; parameters lie on several devices; the set of parameters with a gradient changed
            and *allow_missing* is not set; the curvature is due and was not measured.

    Source: S. Adya, V. Palakkode, O. Tuzel, "Nonlinear Conjugate Gradients For Scaling Synchronous Distributed DNN
    Training", arXiv:1812.02886.

    >>> w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    >>> optimizer = NLCG([w], lr=0.5, precond="bfgs")
    >>> for _ in range(10):
    ...     loss = (w * torch.tensor([1.0, 3.0]) * w).sum() / 2
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> bool(loss < 1e-3)
    True
    """

    _pickled: ClassVar[tuple[str, ...]] = (
        *ScopedOptimizer._pickled,
        "rule",
        "precond",
        "preconds",
        "_known",
        "_usual",
        "line_search",
        "removal",
        "mode",
        "nesterov",
        "restart_on_ascent",
        "allow_missing",
        "sync_scalars",
        "shard_state",
    )
    _slices: Slices | None = None  # made when first needed, also after unpickling
    _estimates: Mapping[Tensor, Tensor]  # of the curvature, for the next step
    _observed: ObservedBatch | None  # the batch of the next step
    _evaluating: bool = False  # inside a closure
    _wait: int  # steps for which no curvature is due, so that the host need not look

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor | None = None,
        *,
        rule: Literal["fr", "pr", "constant"] = "fr",
        precond: Literal["bfgs", "none", "hutchinson", "gauss-newton", "adam", "orthogonal", "kron"]
        | Preconditioner
        | None = None,
        line_search: Literal["none", "online", "step", "parabola", "subspace"] | StepSize = "none",
        period: int = 5,
        threshold: float = 1.0,
        removal: Literal["previous", "current"] | None = None,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        lars: float | None = None,
        grad_scale: float | Sequence[float] = 1.0,
        mode: Literal["exact", "reference"] = "exact",
        scope: Literal["global", "group", "tensor"] = "global",
        beta_max: float | None = None,
        h0: float = 1.0,
        h_bounds: tuple[float, float] = _H_BOUNDS,
        nesterov: bool = False,
        restart_on_ascent: bool = False,
        allow_missing: bool = False,
        process_group: Any = None,
        sync_scalars: bool = False,
        shard_state: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        self._check_name("rule", rule, tuple(_RULES))
        self._check_name("removal", removal, ("previous", "current", None))
        self._check_name("mode", mode, ("exact", "reference"))
        self.rule = rule
        self.mode = mode
        self._known = self._named(h0, h_bounds)
        if isinstance(params, nn.Module):
            by_role = precond is None and mode == "exact"
            params = parameter_groups(params) if by_role else [p for p in params.parameters() if p.requires_grad]
        if precond is None:
            precond = "orthogonal" if mode == "exact" else "bfgs"
        self.precond = self._preconditioner(precond)
        self.preconds: list[Preconditioner] = []
        """That of each group."""
        self.line_search = self._step_size(line_search, period, threshold)
        if isinstance(self.line_search, ProbedStep):
            kind = type(self.line_search).__name__
            check(scope == "global", "NLCG", "scope", scope, f"'global' with line_search={kind}")
            check(not fused, "NLCG", "fused", fused, f"False or None with line_search={kind}")
        searches = isinstance(self.line_search, LineSearch | ProbedStep)
        check(not (nesterov and searches), "NLCG", "nesterov", nesterov, f"False with line_search={line_search!r}")
        self.nesterov = nesterov
        self.removal = removal or ("previous" if mode == "exact" else "current")
        # A parabola along a direction that leads uphill has its minimum behind.
        self.restart_on_ascent = restart_on_ascent or isinstance(self.line_search, Parabola)
        self.allow_missing = allow_missing
        self.sync_scalars = sync_scalars
        self.shard_state = shard_state
        alone = not (shard_state and isinstance(self.line_search, Subspace))
        check(alone, "NLCG", "shard_state", shard_state, "False with line_search=Subspace")
        self._last: dict[str, Array] = {}
        self._usual = {name: value is None for name, value in (("lr", lr), ("beta_max", beta_max))}
        usual = _usual(self.precond, self.line_search)
        defaults = {
            "lr": usual["lr"] if lr is None else lr,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "lars": lars,
            "grad_scale": grad_scale,
            "beta_max": usual["beta_max"] if beta_max is None else beta_max,
            "maximize": maximize,
        }
        super().__init__(params, defaults, scope=scope, process_group=process_group, foreach=foreach, fused=fused)
        used = (h0, h_bounds) == (1.0, _H_BOUNDS) or any(own is self._known["bfgs"] for own in self.preconds)
        check(used, "NLCG", "h0, h_bounds", (h0, h_bounds), "left out where no group has precond='bfgs'")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with its own options and, by ``"precond"``, its own preconditioner; at any time."""
        precond = self.precond
        if isinstance(param_group, dict) and "precond" in param_group:
            param_group = dict(param_group)  # which is saved: files hold numbers, not objects
            precond = self._preconditioner(param_group.pop("precond"))
            for name, value in _usual(precond, self.line_search).items():
                if self._usual[name]:
                    param_group.setdefault(name, value)
        if isinstance(precond, CurvatureDiagonal):
            measuring = self._measuring or precond
            same = f"the same as in other groups where curvature is measured, {measuring}"
            check(precond == measuring, "NLCG", "precond", precond, same)
        learns = f"False with {type(precond).__name__}, which learns from steps along d"
        check(not (self.nesterov and precond.learns_from_steps), "NLCG", "nesterov", True, learns)
        self.preconds.append(precond)
        try:
            super().add_param_group(param_group)
        except BaseException:
            self.preconds.pop()
            raise

    # Hooks of the base class -----------------------------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        check_lr("NLCG", group["lr"])
        if isinstance(self.line_search, Subspace):
            whole = not any(is_dtensor(p) for p in group["params"])
            check(
                whole, "NLCG", "line_search", "Subspace", "'parabola' or another one for sharded parameters (DTensors)"
            )
        decay, lars, beta_max, scale = (group[name] for name in ("weight_decay", "lars", "beta_max", "grad_scale"))
        check(0 <= decay < math.inf, "NLCG", "weight_decay", decay, "in [0, inf)")
        check(lars is None or 0 < lars < math.inf, "NLCG", "lars", lars, "None or in (0, inf)")
        check(0 <= beta_max <= 1, "NLCG", "beta_max", beta_max, "in [0, 1]")
        if isinstance(scale, int | float):
            check(math.isfinite(scale), "NLCG", "grad_scale", scale, "finite")
        else:
            accepted = f"a number, or {len(group['params'])} numbers, one for each parameter of the group"
            good = len(scale) == len(group["params"]) and all(math.isfinite(s) for s in scale)
            check(good, "NLCG", "grad_scale", scale, accepted)

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        home, precond = self._home(p), self._precond_of(group)
        state = {"direction": zeros_for(home)}
        if precond.learns_from_steps or self.rule == "pr":
            state["grad_prev"] = zeros_for(home)
        return state | precond.state_of(p, home) | {"scalars": self._fresh_scalars(p)}

    def _home(self, p: Tensor) -> Tensor:
        """*p* laid out as its state is to be."""
        slices = None if is_dtensor(p) else self._cut(p.device)
        return p if slices is None else slices.home(p)

    def _cut(self, device: torch.device) -> Slices | None:
        """How whole parameters are shared out over the ranks, if they are."""
        if self.shard_state and self._slices is None:
            self._slices = Slices.over(self.process_group, device.type)
        return self._slices

    @property
    def _sync(self) -> bool:
        return self.sync_scalars

    @property
    def _apart(self) -> bool:
        return self.scope == "tensor"

    @property
    def _method_start(self) -> dict[str, float]:
        return {name: float(name == "pure") for name in Scalars._fields}

    @property
    def _rule(self) -> StepSize:
        return Constant() if self.line_search is None else self.line_search

    def _state_replaced(self) -> None:
        self._last = {}
        self._estimates = {}
        self._observed = None
        self._wait = 0
        super()._state_replaced()

    # What the caller may look at ---------------------------------------------------------------------------------------

    @property
    def last(self) -> dict[str, Tensor]:
        """Numbers of the last step, for logging; tensors on the device, so reading one waits for the step.

        ``beta``; ``step_size``; ``base_lr``, its ratio to the learning rate; ``rho`` = <g, P g>; ``cosine`` of the angle
        between the direction and -g; ``skipped`` (bool); with ``"bfgs"`` also ``ys`` = <y, s> and ``shs`` = <s, H s>. 0-d
        with scope ``"global"``, else one value for each parameter. Empty before the first step.
        """
        if "rho" not in self._last:
            return {}
        rho, gg, gd, dd = (self._pool(self._last[name]) for name in ("rho", "gg", "gd", "dd"))
        names = ["beta", "step_size", "base_lr", "skipped"] + ["ys", "shs"] * self._learns
        shown = {name: self._last[name] for name in names}
        root = namespace(gg).sqrt
        shown |= {"rho": rho, "cosine": ratio(-gd, root(gg) * root(dd))}
        return self._shown(shown)

    def metric(self) -> dict[Tensor, Tensor]:
        """P of each parameter, of its shape (shards: of this rank's piece), where the preconditioner is diagonal, as it is now.

        Empty where P is 1. Complex parameters have P for real and imaginary part, [..., 2].
        """
        diagonals = {
            p: precond.diagonal(self.state[p])
            for group, precond in zip(self.param_groups, self.preconds, strict=True)
            for p in group["params"]
        }
        return {p: diagonal for p, diagonal in diagonals.items() if diagonal is not None}

    @property
    def passes(self) -> float:
        """Forward and backward passes over the batch so far, skipped steps among them; a part of one counts as such.

        1 for a step; with ``line_search="parabola"`` and ``"subspace"`` what these computed besides, a forward pass for 1/3.
        Measurements of the curvature are not counted. Waits for the device.
        """
        first = len(self._method_start)
        rows = torch.stack([self.state[p]["scalars"] for group in self.param_groups for p in group["params"]])
        extra = rows[:, first + 1].max() if isinstance(self.line_search, ProbedStep) else 0.0
        return float(rows[:, 0].max() + rows[:, -1].max() + extra)

    # The batch once more -----------------------------------------------------------------------------------------------

    @property
    def needs_batch(self) -> bool:
        """Whether steps need their batch: call :meth:`observe_batch` before the forward pass of each."""
        return self._rule.needs_batch

    def observe_batch(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Any], Tensor],
        inputs: Any,
        targets: Any = None,
        *,
        weight: float | None = None,
    ) -> None:
        """Take the batch of the next step; before its forward pass, so that layers draw the same random numbers again.

        After ``zero_grad()``, which forgets what was observed (a closure's does not). Once for each micro-batch, in their
        order. Loss and gradient must be averaged with the same weights: where micro-batches of different sizes all count the
        same, pass *weight* = 1, and the first step of ``"parabola"`` makes sure that the loss is the one given. ``"subspace"``
        cuts the tensors with as many rows as the first one of the inputs, and no others.

        The step computes ``loss_fn(model(inputs), targets)``, in the autocast that is active now (Subspace: without
        autocast); model, loss_fn and weight as for :meth:`measure`. inputs: may be a function without arguments that makes
        inputs and targets when they are wanted; then *weight* is 1 unless it is given. Parameters, gradients and buffers of
        the model and the random numbers of the process stay what they are.

        Raises ValueError where steps need no batch, *model* lacks a parameter, or *weight* is negative. The first step with
        ``"parabola"`` does where the mean loss of the batch differs from the given one by more than 1 % and rounding.
        """
        from conjugo.distributed.virtual_batch import group_of

        kind = type(self._rule).__name__
        check(self.needs_batch, "NLCG", "line_search", kind, "'parabola' or 'subspace' to observe batches")
        weight = self._check_batch(model, inputs, weight)
        if self._observed is None:
            self._observed = ObservedBatch(self._table.device, group_of(model, self.process_group))
        make = inputs if callable(inputs) else lambda: (inputs, targets)
        self._observed.add(model, loss_fn, make, weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the batch of a step that was given up."""
        super().zero_grad(set_to_none)
        if not self._evaluating:
            self._observed = None

    def _check_batch(self, model: nn.Module, inputs: Any, weight: float | None) -> float:
        """How much a batch counts. Raises ValueError where *model* lacks a parameter, or *weight* is negative."""
        from conjugo.distributed.virtual_batch import parameters_of

        known = set(parameters_of(model))
        params = [p for group in self.param_groups for p in group["params"]]
        lacking = [i for i, p in enumerate(params) if p not in known]
        check(not lacking, "NLCG", "model", f"one without parameters {lacking}", "a model with all parameters")
        if weight is None:
            weight = float(len(inputs)) if isinstance(inputs, Tensor) else 1.0
        check(0 <= weight < math.inf, "NLCG", "weight", weight, "in [0, inf)")
        return weight

    # Curvature ---------------------------------------------------------------------------------------------------------

    @property
    def needs_curvature(self) -> bool:
        """Whether the next step needs a measurement of the curvature: :meth:`measure`, :meth:`observe`, or, with
        ``precond="hutchinson"`` and a model that is no DDP or FSDP2, gradients with a graph.

        The same on all ranks. Waits for the device in about one of *every* steps. False with all other preconditioners.
        """
        precond = self._measuring
        if precond is None or self._estimates or self._wait:
            return False
        params = self._measured(self._active or [p for group in self.param_groups for p in group["params"]])
        if not params:
            return False
        counts = torch.stack([self.state[p]["estimates"] for p in params])
        steps = torch.stack([self.state[p]["scalars"][0] for p in params])
        unknown = (counts == 0).to(steps)  # the first estimate was not finite, or the parameter has joined later
        oldest, some, late = torch.stack([steps.max(), unknown.max(), (unknown * steps).max()]).tolist()
        wait = 0 if late else int(-oldest % precond.every)
        self._wait = wait if self._active and not some else 0
        return wait == 0

    def measure(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Any], Tensor],
        inputs: Any,
        targets: Any,
        *,
        weight: float | None = None,
    ) -> None:
        """Measure the curvature of ``loss_fn(model(inputs), targets)`` where the parameters are, for the next step. Collective.

        model: with all parameters of this optimizer; plain, compiled, DDP, or with ``fully_shard``. Its parameters, gradients
        and buffers and the random numbers of the process stay what they are. loss_fn: gives this rank's mean loss, 0-d.
        inputs, targets: this rank's batch, or a part of it; what serves for the gradient will do. weight: how much this rank's
        loss counts, >= 0; None: ``len(inputs)`` of a tensor, 1 for anything else.

        Raises ValueError where the preconditioner measures no curvature, *model* lacks a parameter, or *weight* is negative.
        """
        from conjugo.distributed.virtual_batch import group_of

        precond = self._curvature()
        weight = self._check_batch(model, inputs, weight)
        params = [p for group in self.param_groups for p in group["params"]]
        step = int(torch.stack([self.state[p]["scalars"][0] for p in params]).max())
        estimates = precond.estimate(
            model,
            loss_fn,
            inputs,
            targets,
            params=params,
            step=step,
            weight=weight,
            group=group_of(model, self.process_group),
        )
        self.observe(estimates)

    def observe(self, estimates: Sequence[Tensor]) -> None:
        """Take *estimates* of the diagonal of the Hessian for the next step, from wherever they are.

        One for each parameter of the optimizer, of its shape and layout, the same on all ranks; for complex parameters the
        curvature along both parts, as complex numbers. If there is NaN or infinity in one of them, they are left out, and
        counted in :attr:`skipped_estimates`. Raises ValueError for estimates that do not fit.
        """
        self._curvature()
        params = [p for group in self.param_groups for p in group["params"]]
        found, wanted = [tuple(e.shape) for e in estimates], [tuple(p.shape) for p in params]
        check(found == wanted, "NLCG", "shapes of estimates", found, f"those of the parameters, {wanted}")
        self._estimates = {p: e.detach() for p, e in zip(params, estimates, strict=True)}

    @property
    def skipped_estimates(self) -> Tensor:
        """Measurements of the curvature that were left out because they were not finite: 0-d int64, on the device."""
        self._curvature()
        params = self._measured(p for group in self.param_groups for p in group["params"])
        counts = [self.state[p]["bad_estimates"] for p in params]
        return torch.stack(counts).max().to(torch.int64)

    def _curvature(self) -> CurvatureDiagonal:
        found = self._measuring
        names = ", ".join(dict.fromkeys(type(precond).__name__ for precond in self.preconds))
        accepted = "'hutchinson', 'gauss-newton' or another CurvatureDiagonal to measure curvature"
        check(found is not None, "NLCG", "precond", names, accepted)
        assert found is not None
        return found

    @property
    def _measuring(self) -> CurvatureDiagonal | None:
        """The preconditioner that learns from measurements, if a group has one."""
        return next((precond for precond in self.preconds if isinstance(precond, CurvatureDiagonal)), None)

    def _measured(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of *params* whose curvature is measured."""
        return [p for p in params if "estimates" in self.state[p]]

    def _find_curvature(self) -> None:
        """Where a measurement is due and was not made, make it of gradients with a graph, or raise RuntimeError."""
        precond = self._measuring
        if precond is not None:
            if self.needs_curvature:
                graph = precond.uses_graph and any(p.grad.requires_grad for p in self._active if p.grad is not None)
                if not graph:
                    other = ", or backward(create_graph=True) before step()" if precond.uses_graph else ""
                    raise RuntimeError(
                        f"NLCG: precond={type(precond).__name__} needs the curvature in this step: call measure(model, "
                        f"loss_fn, inputs, targets) before step() where needs_curvature is true{other}"
                    )
                self._estimates = self._of_graph(precond)
            self._wait = max(0, self._wait - 1)
            drop_graphs(self._active)

    def _of_graph(self, precond: CurvatureDiagonal) -> Mapping[Tensor, Tensor]:
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in self._active if p.grad is not None]
        step = int(self._table[:, 0].max())
        with torch.enable_grad():

            def pair(number: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
                probe = dict(zip(params, precond.probe(params, step, number), strict=True))
                v = [probe[p] for p in self._active]
                return v, hessian_products(self._active, grads, v, retain=number + 1 < precond.probes)

            found = precond.mean_over_probes(pair)
        return dict(zip(self._active, found, strict=True))

    def _learn(self, scales: Sequence[Scale], finite: Array) -> None:
        """Let the preconditioner learn from the estimates. Collective if sharded."""
        precond, space = self._curvature(), self._space
        news: list[list[Tensor]] = []
        sums: list[Tensor] = []
        sizes: list[float] = []
        start = 0
        wide = wide_dtype(self._table.device)
        for block in self._measured_blocks:
            factors = scales[start : start + len(block.params)]
            start += len(block.params)
            if block.precond != precond:
                news.append([])
                sums += [torch.zeros((), dtype=wide, device=self._table.device)] * len(block.params)
                sizes += [0.0] * len(block.params)
                continue
            dtype = block.state("curvature")[0].dtype
            pieces = [as_real(block.local(precond.averaged(self._estimates[p]))).to(dtype) for p in block.params]
            block.curvature = [(e * a).to(dtype) for e, (a, _) in zip(pieces, factors, strict=True)]
            news.append(precond.mixed(block))
            block.curvature = []
            sums += [precond.sizes(x).sum(dtype=wide) for x in news[-1]]
            sizes += [float(p.numel() * (2 if p.is_complex() else 1)) for p in block.params]
        totals = space.reduce(torch.stack(sums)[None])[0]
        good = torch.isfinite(totals.sum())
        numbers = torch.tensor(sizes, dtype=totals.dtype).to(totals.device, non_blocking=True)
        means = self._pool(totals) / self._pool(numbers).clamp(min=1.0)
        start = 0
        for block, new in zip(self._measured_blocks, news, strict=True):
            if new:
                precond.learn(block, new, means[start : start + len(new)], good=good, finite=finite)
            start += len(block.params)
        self._estimates = {}

    # The step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Update all parameters that have a gradient.

        closure: computes the gradients and returns the loss (mean over the batch). loss: the loss, if the gradients are
        there already. The line search needs one of the two. Returns the value of *closure*, or None.

        If a gradient or the loss holds NaN or infinity, or a gradient is so large that its squared norm is not finite,
        nothing changes but the count in :attr:`skipped_steps`.
        """
        try:
            return self._evaluated_step(closure, loss)
        finally:
            self._observed = None

    def _evaluated_step(self, closure: Callable[[], Any] | None, loss: Tensor | float | None) -> Any:
        if self._rule.needs_loss and closure is None and loss is None:
            name = self.line_search.kind if isinstance(self.line_search, LineSearch) else self.line_search
            raise ValueError(
                f"NLCG: line_search={name!r} needs the loss of each step: call step(closure) with a "
                "closure that returns it, or step(loss=loss)"
            )
        self._evaluating = True
        try:
            value = evaluate(closure)
        finally:
            self._evaluating = False
        if self._prepare():
            self._find_curvature()
            if self.needs_batch and self._observed is None:
                kind = type(self._rule).__name__
                raise RuntimeError(
                    f"NLCG: line_search={kind} needs the batch of each step: call observe_batch(model, loss_fn, inputs, "
                    "targets) before its forward pass"
                )
            self._step(value if loss is None else loss)
        return value

    def _step(self, loss: Tensor | float | None) -> None:
        passes, space = self._passes, self._space
        columns = self._columns()
        xp = namespace(columns[0])
        old = Scalars(*columns[: len(Scalars._fields)])
        first = old.step == 0
        lr = self._per_parameter("lr")

        # First sum over ranks.
        scales = self._scales()
        parts = passes.gradient(
            scales,
            direction=self._learns or self.restart_on_ascent or space.sharded,
            cross=self.rule == "pr",
            fresh=old.step <= 1,
        )
        (xx, xd, cross, old_dd, change), value = self._shared(parts, loss)
        finite = xp.isfinite(xx.sum() + value)
        if (passes.on_host or self.needs_batch) and not finite:
            self._count_skipped()
            self._last = self._last | {"skipped": ~finite}
            return
        if isinstance(self.line_search, Parabola):
            self._check_first_loss(columns, float(value))

        # The authors measure the last step with today's learning rate.
        tau = lr * self._base(columns) if self.mode == "reference" else old.tau
        sums = self._pooled(old, tau, xx, xd, cross, old_dd)
        secant = self._secant(old, sums, finite, change)
        if self._estimates:
            self._learn(scales, finite)
        # Second sum over ranks, which needs the results of the first one: the preconditioner has changed.
        products = passes.precondition(secant, fresh=first).T
        if all(isinstance(precond, Identity) for precond in self.preconds):
            rho, old_dhd, zz, zd = xx, 0 * xx, xx, xd
        else:
            rho, old_dhd, zz, zd = space.reduce(products)
        beta = self._beta(old, sums, rho)
        if isinstance(passes, ProbedPasses):
            beta, verdict, gd, dd = self._probed(passes, columns, beta, tau, lr, value)
        else:
            verdict = self._decide(columns, lr=lr, square=rho, loss=value)
            along, undo = self._lengths(verdict, tau)
            if self.nesterov:  # -z + beta d = (1 + beta) d - beta d'
                along, undo = (1 + beta) * along, -beta * along
            move = Move(beta, along, undo, self._keep(lr))
            gd, dd = passes.move(move if passes.on_host else _nothing_unless(finite, move)).T
        self._share_out()
        # Inner products of the new direction d = -z + beta d', z = P x, without a third sum over ranks. H z = x - eps z.
        if space.sharded:
            gd, dd = beta * xd - rho, zz - 2 * beta * zd + beta * beta * old_dd
        eps = self._eps(first)
        dhd = (rho - eps * zz) - 2 * beta * (xd - eps * zd) + beta * beta * old_dhd
        pure = 1.0 + 0 * lr if verdict.remove is None else xp.where(verdict.remove == 0, 1.0, 0.0)
        new = Scalars(old.step + 1, rho, verdict.length, pure, xx, gd, dhd)
        self._keep_scalars(new, verdict.state, finite)
        self._last = {
            "beta": beta,
            "step_size": verdict.length,
            "base_lr": ratio(verdict.length, lr),
            "rho": rho,
            "ys": sums.ys,
            "shs": sums.shs,
            "gg": xx,
            "gd": gd,
            "dd": dd,
            "skipped": ~finite,
        }

    def _probed(
        self, passes: ProbedPasses, columns: Sequence[Array], beta: Array, tau: Array, lr: Array, loss: Array
    ) -> tuple[Array, Verdict, Array, Array]:
        """The move where the step size needs the batch: beta, the step size, <x, d>, <d, d>. Collective."""
        batch, rule, objective = self._observed, self.line_search, self._objective()
        assert batch is not None
        alpha, extra = (self._of_eldest(column, columns[0]) for column in self._rule_state(columns))
        last = float(alpha[0])
        if isinstance(rule, Subspace):
            found, mu = passes.subspace(rule, last, batch, objective, self._space, loss=float(loss), tau=tau)
            beta, along = mu * tau / found, found
            gd, dd = passes.turn(beta).T
        else:
            assert isinstance(rule, Parabola)
            gd, dd = passes.turn(beta).T
            search = passes.parabola(
                rule, last, batch, objective, self._space, loss=float(loss), spread=self._share_out
            )
            found, along = search.alpha, search.alpha if search.move else 0.0
        length = lr * along
        passes.go(length, self._keep(length))
        return beta, Verdict(length, (0 * lr + found, extra + batch.passes)), gd, dd

    def _check_first_loss(self, columns: Sequence[Array], loss: float) -> None:
        """Raise ValueError where no step size is known yet and *loss* is not that of the batch. Collective."""
        assert self._observed is not None
        if not float(self._of_eldest(self._rule_state(columns)[0], columns[0])[0]):
            self._observed.check_loss(loss)

    def _objective(self) -> Objective:
        """What the steps minimise. Raises ValueError where some groups ascend and others descend."""
        ascend = {bool(group["maximize"]) for group in self._active_groups}
        kind = type(self.line_search).__name__
        check(len(ascend) == 1, "NLCG", "maximize", "True and False", f"the same in all groups with line_search={kind}")
        decays = [0.0 if group["decoupled"] else float(group["weight_decay"]) for group in self._active_groups]
        of_each = [d for d, span in zip(decays, self._spans, strict=True) for _ in range(span.stop - span.start)]
        return Objective(-1.0 if ascend == {True} else 1.0, of_each)

    def _share_out(self) -> None:
        """Collective if the state of whole parameters is sharded: give all ranks what each has moved."""
        if self._slices is not None:
            self._slices.gather(p for p in self._active if not is_dtensor(p))

    def _shared(self, parts: Array, loss: Tensor | float | None) -> tuple[list[Array], Array]:
        """Sums over all ranks of the first pass's *parts*, by column, and <y, y> or None; and the mean loss."""
        space, value = self._space, self._loss_value(loss)
        rows = parts.T
        early = self._learns and not self._passes.on_host
        if early:  # what the host may look at first, if it is needed at all, would make a device wait
            rows = torch.cat([rows, self._passes.difference()[None]])
        if space.sharded:
            rows, value = space.reduce_with_mean(rows, value)
        elif space.group is not None:
            # Each rank has its own loss, and a decision may rest only on what all have.
            value = space.mean(value) if self._rule.needs_loss else 0 * value
        return (list(rows) if early else [*rows, None]), value

    def _pooled(self, old: Scalars, tau: Array, xx: Array, xd: Array, cross: Array, dd: Array) -> Sums:
        """All sums over the scope that are known before the preconditioner is updated, in one go."""
        # <y, s> = tau (<g, d'> - <g', d'>) takes no pass over memory.
        curvature = [tau * (xd - old.gd), tau * tau * old.dhd, tau * tau * dd]
        if self._learners is not None:  # all others have no part in the model of the Hessian
            curvature = [torch.where(self._learners, part, 0.0) for part in curvature]
        parts = (*curvature, xx, old.gg, xd, cross, old.rho)
        return Sums(tau, *self._pool(namespace(xx).stack(parts)))

    def _secant(self, old: Scalars, sums: Sums, finite: Array, change: Array) -> Secant:
        """What the last step taught; *change*: <y, y> of each parameter, or None where it was not worked out."""
        seen = old.step > 0
        usable = seen if self.mode == "reference" else seen & (old.pure == 1)
        if not self._learns:
            yy = sums.xx
        elif change is None:
            yy = self._bounded_change(old, sums)
        else:
            yy = self._pool(namespace(change).where(seen, change, 0.0))
        return Secant(sums.tau, sums.ys, sums.shs, yy, sums.ss, usable, finite)

    def _bounded_change(self, old: Scalars, sums: Sums) -> Array:
        """A bound on <y, y> over the scope that serves as well, if there is one: <y, y> costs another pass over memory."""
        bound = (np.sqrt(sums.xx) + np.sqrt(sums.gg)) ** 2  # |y| <= |g| + |g'|
        clear = (sums.ys <= 0) | (sums.ys > DiagonalBFGS.CURVATURE * np.sqrt(bound * sums.ss))
        if clear.all():
            return bound
        return self._pool(np.where(old.step > 0, self._space.reduce(self._passes.difference()), 0.0))

    def _beta(self, old: Scalars, sums: Sums, rho: Array) -> Array:
        xp = namespace(rho)
        seen = old.step > 0
        products = Products(
            rho=self._pool(xp.where(seen, rho, 0.0)),  # over the parameters that have a previous gradient
            rho_prev=sums.rho + EPS if self.mode == "reference" else sums.rho,
            cross=sums.cross,
        )
        beta = _RULES[self.rule](products)
        beta = xp.minimum(beta.clip(min=0.0), self._per_parameter("beta_max"))
        if self.restart_on_ascent:
            uphill = beta * sums.xd > self._pool(rho)  # <g, d> = -<g, P g> + beta <g, d'> > 0
            beta = xp.where(uphill, 0.0, beta)
        return xp.where(seen, beta, 0.0)

    def _base(self, columns: Sequence[Array]) -> Array:
        """The factor of the paper's line search on the learning rate in the last step; 1 without."""
        return self._rule_state(columns)[0] if isinstance(self.line_search, LineSearch) else 1.0

    def _lengths(self, verdict: Verdict, previous: Array) -> tuple[Array, Array | None]:
        """Multiples of the new and of the previous direction in the move."""
        length = verdict.length
        if verdict.remove is None:
            return length, None
        remove = namespace(length).where(length > EPS, verdict.remove, 0.0)
        if self.removal == "current":
            return (1 - remove) * length - remove * previous, None
        return (1 - remove) * length, -remove * previous

    def _scales(self) -> list[Scale]:
        """For each parameter the factors of the gradient and of the parameter in what the method sees."""
        scales: list[Scale] = []
        layerwise = self._lars_scales() if any(group["lars"] is not None for group in self._active_groups) else None
        for group, span, indices in zip(self._active_groups, self._spans, self._indices, strict=True):
            factor, sign = group["grad_scale"], -1.0 if group["maximize"] else 1.0
            decay = 0.0 if group["decoupled"] else group["weight_decay"]
            for at, i in enumerate(indices, start=span.start):
                c = float(factor) if isinstance(factor, int | float) else float(factor[i])
                scale = c if layerwise is None or group["lars"] is None else c * layerwise[at]
                scales.append((sign * scale, decay * scale))
        return scales

    def _lars_scales(self) -> Tensor:
        """The scale of each parameter, [n]; what it is for groups without *lars* does not matter. Collective if sharded."""
        squares, coefficients = [], []
        for group, span in zip(self._active_groups, self._spans, strict=True):
            sign = -1.0 if group["maximize"] else 1.0
            decay = 0.0 if group["decoupled"] else group["weight_decay"]
            for p in self._active[span]:
                assert p.grad is not None
                w = as_real(self._space.local(p)).to(state_dtype(p))
                g = as_real(self._space.local(p.grad)).to(w.dtype) * sign + decay * w
                squares.append(torch.stack([dot(w, w), dot(g, g)]))
                coefficients.append(1.0 if group["lars"] is None else group["lars"])
        weights, gradients = self._space.reduce(torch.stack(squares, 1))
        fixed = torch.tensor(coefficients, dtype=weights.dtype).to(weights.device, non_blocking=True)
        scale = lars_scale(weights.sqrt(), gradients.sqrt(), fixed)
        if self.mode == "reference":
            return scale
        vector = torch.tensor([p.ndim < 2 for p in self._active]).to(weights.device, non_blocking=True)
        return torch.where(vector | (weights == 0), fixed, scale)

    def _loss_value(self, loss: Tensor | float | None) -> Array:
        """This rank's loss beside the scalars, without dimension; 0 if there is none."""
        if loss is None or not (self._rule.needs_loss or isinstance(loss, Tensor | float | int)):
            return 0.0 if self._passes.on_host else torch.zeros_like(self._table[0, 0])
        like = self._table
        if isinstance(loss, Tensor):
            check(loss.numel() == 1, "NLCG", "loss", tuple(loss.shape), "a number or a tensor with one element")
            value = loss.detach().to(like, non_blocking=True).reshape(())
        else:
            value = torch.full((), float(loss), dtype=like.dtype, device=like.device)
        return value.item() if self._passes.on_host else value

    # Which parameters take part ----------------------------------------------------------------------------------------

    def _prepare(self) -> bool:
        if self.allow_missing:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None and p.requires_grad:
                        p.grad = torch.zeros_like(p)
        return super()._prepare()

    def _set_changed(self, before: int, now: int) -> None:
        raise RuntimeError(
            f"NLCG: {now} parameters have a gradient, in the last step {before} (others) had: beta "
            "compares gradients of the same parameters; pass allow_missing=True to count a missing gradient as zero"
        )

    def _lay_out(self, blocks: list[Block]) -> bool:
        self._passes: TensorPasses | FusedPasses
        self._wait = 0
        self._measured_blocks = blocks
        for block in blocks:
            block.precond = self._precond_of(block.group)
        if self.needs_batch:
            self._objective()  # or an error, before anything changes
            self._passes = ProbedPasses(blocks, sharded=self._space.sharded)
        elif self._use_kernels(blocks):
            self._passes = FusedPasses(blocks)
        else:
            self._passes = TensorPasses(blocks, sharded=self._space.sharded)
        learns = [block.precond.learns_from_steps for block in blocks for _ in block.params]
        self._learners = None
        if len(set(learns)) > 1:
            self._learners = torch.tensor(learns).to(self._table.device)
        return self._passes.on_host

    @property
    def _learns(self) -> bool:
        """Whether a preconditioner learns from steps."""
        return any(precond.learns_from_steps for precond in self.preconds)

    def _precond_of(self, group: Group) -> Preconditioner:
        return next(precond for own, precond in zip(self.param_groups, self.preconds, strict=True) if own is group)

    def _eps(self, first: Array) -> Array:
        """What is added to h in P, [n]; 0 where there is no h."""
        if not any(isinstance(precond, DiagonalBFGS) and precond.reference for precond in self.preconds):
            return 0.0
        eps = 0.0 * self._per_parameter("lr")
        for group, span in zip(self._active_groups, self._spans, strict=True):
            precond = self._precond_of(group)
            if isinstance(precond, DiagonalBFGS):
                eps[span] = precond.eps(first[span])
        return eps

    # Options ---------------------------------------------------------------------------------------------------------

    def _named(self, h0: float, bounds: tuple[float, float]) -> dict[str, Preconditioner]:
        return {
            "bfgs": DiagonalBFGS(h0=h0, bounds=bounds, reference=self.mode == "reference"),
            "none": Identity(),
            "hutchinson": Hutchinson(),
            "gauss-newton": GaussNewtonDiagonal(),
            "adam": AdamDiagonal(),
            "orthogonal": Orthogonal(),
            "kron": Kronecker(),
        }

    def _preconditioner(self, precond: object) -> Preconditioner:
        if isinstance(precond, Preconditioner):
            return precond
        self._check_name("precond", precond, tuple(self._known))
        return self._known[str(precond)]

    def _step_size(self, line_search: str | StepSize, period: int, threshold: float) -> StepSize | None:
        if isinstance(line_search, StepSize):
            given = type(line_search).__name__
            check(not line_search.needs_distance, "NLCG", "line_search", given, "a step size that needs no distance")
            check(self.mode == "exact", "NLCG", "mode", self.mode, f"'exact' with line_search={given}")
            return line_search
        self._check_name("line_search", line_search, ("none", "online", "step", *NAMES))
        if line_search in NAMES:
            return self._step_size(NAMES[line_search](), period, threshold)
        search = LineSearch(kind=line_search, period=period, threshold=threshold)
        return None if line_search == "none" else search


def _usual(precond: Preconditioner, line_search: StepSize | None) -> dict[str, float]:
    """Learning rate and limit of beta where none are given: <g, P g> hardly falls along a run with Adam's scaling."""
    usual = {"lr": 0.01, "beta_max": 0.9} if isinstance(precond, AdamDiagonal) else {"lr": 0.1, "beta_max": 1.0}
    return usual | {"lr": 1.0} if isinstance(line_search, ProbedStep) else usual


def lars_scale(weight_norm: Tensor, grad_norm: Tensor, coefficient: float | Tensor) -> Tensor:
    """coefficient |w| / (|g| + 1e-8 + 0.1 coefficient |w|), the layer-wise scale of the authors' code; 0-d or any shape.

    :class:`NLCG` takes *coefficient* itself for vectors and for weights that are all zero, which would never move
    otherwise (``mode="reference"`` leaves them).

    >>> round(lars_scale(torch.tensor(2.0), torch.tensor(0.5), 0.001).item(), 9)
    0.003998401
    """
    return coefficient * weight_norm / (grad_norm + EPS + 0.1 * coefficient * weight_norm)


def _nothing_unless(finite: Tensor, move: Move) -> Move:
    """*move* where *finite*; else, with a gradient of zeros, one that leaves directions and parameters as they are."""
    neutral = Move(1.0, 0.0, 0.0, 1.0)
    return Move(*(None if c is None else torch.where(finite, c, other) for c, other in zip(move, neutral, strict=True)))
