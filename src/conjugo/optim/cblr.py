"""CBLR and MCLR: learning rates by layer from its curvature (Gao & Zhong 2020, arXiv:2012.08795)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._space import to_local
from conjugo._tensors import CHUNK, Array, namespace
from conjugo.errors import check
from conjugo.optim._base import Group, as_real, check_lr, evaluate, state_dtype, zeros_for
from conjugo.optim._products import drop_graphs, hessian_products, signs
from conjugo.optim._scoped import ScopedOptimizer
from conjugo.optim._updates import BUFFER, FusedUpdates, Momentum, TensorUpdates
from conjugo.optim.curvature_statistics import (
    DELTA,
    SAMPLE,
    Quotient,
    Statistic,
    Summary,
    check_rule,
    check_sample,
    curvature_rates,
    is_vector,
    samples,
)
from conjugo.optim.preconditioners import Block

__all__ = ["CBLR", "MCLR", "Estimator"]

Estimator: TypeAlias = Literal["ratio", "secant", "hutchinson", "fisher"]

_VECTORS: Mapping[Estimator, tuple[str, ...]] = {
    "ratio": (),
    "secant": ("grad_prev", "weight_prev"),
    "hutchinson": (),
    "fisher": ("exp_avg_sq",),
}
"""State of each parameter's own shape that an estimator needs."""


class Scalars(NamedTuple):
    """What is kept of each layer, float64 [n]."""

    step: Array
    curvature: Array
    """0: none was measured yet."""


class CBLR(ScopedOptimizer):
    r"""Momentum SGD whose learning rate is, layer by layer, inverse to the curvature.

    .. math::
        \lambda = \frac{\eta}{\kappa + \beta}, \qquad
        m \leftarrow \mu m + \lambda (g + \beta w), \qquad w \leftarrow w - \gamma m

    with the curvature :math:`\kappa` of the layer; with ``nesterov``, :math:`w \leftarrow w - \gamma (\mu m + \lambda (g +
    \beta w))`. By default :math:`\kappa = \|g\| / \|w\|`, which makes :math:`\lambda` the trust ratio of
    :class:`~conjugo.optim.LARS`. Where a layer has no curvature, because all its gradients or weights are 0,
    :math:`\lambda` is ``trust * fallback``.

    Args:
        params: parameters or parameter groups; real or complex floating point; also DTensors (FSDP2, HSDP, tensor
            parallelism).
        lr: :math:`\gamma \geq 0`, a number or a 0-d tensor. It is outside the momentum.
        momentum: :math:`\mu`, in [0, 1).
        weight_decay: :math:`\beta \geq 0`, coupled: a quadratic that adds exactly this to every curvature.
        trust: :math:`\eta > 0`. With a quadratic loss and curvature that is exact, 1 leads to the minimum in one step.
        estimator: how curvature is measured: coordinate by coordinate as the size of a quotient.

            - ``"ratio"``: of gradient and weight.
            - ``"secant"``: of their changes over the last step; the first step takes the ratio. Averaged over the steps. For
              full or very large batches: with small ones the change of the gradient is mostly noise.
            - ``"hutchinson"``: of H v and v, H the Hessian and v random signs, every so many steps. Costs about two
              gradients then; those steps need gradients with a graph (:attr:`needs_graph`).
            - ``"fisher"``: the running average of the squared gradient, up to a factor the diagonal of the empirical Fisher
              matrix. It has the unit of a squared gradient, so that ``trust`` has another meaning.
        statistic: what makes one number of a layer's coordinates; see :func:`~conjugo.optim.layer_curvature`. ``"norm"`` is
            the quotient of the norms.
        quantile: in (0, 1), with ``statistic="quantile"``.
        sample: coordinates of a layer among which a median or quantile is taken, >= 8; None: all.
        ema: part of the old average in a new one, in [0, 1), with ``"secant"`` and ``"fisher"``.
        every: steps from one measurement to the next with ``"hutchinson"``, >= 1.
        rate_bounds: smallest and largest :math:`\lambda`.
        fallback: see above, >= 0.
        exempt: ``exempt(name, p)`` says whether parameter *p* is not to adapt; *name* is None unless parameters were given
            with names. By default those with fewer than two dimensions (biases, normalisation).
        exempt_scale: :math:`\lambda` of those, >= 0; None: ``trust``.
        nesterov: look ahead along the momentum; needs ``momentum > 0``.
        maximize: ascend instead of descend.
        foreach: update lists of tensors at once; by default on accelerators.
        fused: use the compiled CPU kernels; by default where they fit (dense float32 or float64 parameters on a CPU).
        process_group: where parameters are DTensors, the ranks that hold them; None: all. A step then needs one
            all-reduce. Norms are exact; of medians and quantiles see :func:`~conjugo.optim.layer_curvature`.

    State: ``momentum_buffer``, with ``"secant"`` also ``grad_prev`` and ``weight_prev``, with ``"fisher"`` ``exp_avg_sq``,
    vectors in float32 for bfloat16 and float16 parameters; ``scalars`` (curvature, steps, skipped steps), float64.

    Raises:
        ValueError: an argument is out of its range or unknown.
        TypeError: a parameter is of an integer type.
        RuntimeError: ``fused=True`` where the kernels do not fit.

    Source: reconstruction after Gao & Zhong 2020 (arXiv:2012.08795), of which only the abstract was to be had.

    >>> w, v = (torch.nn.Parameter(torch.full((2, 2), 3.0)) for _ in range(2))
    >>> (0.5 * w.square().sum() + 50 * v.square().sum()).backward()  # curvature 1 and 100
    >>> optimizer = CBLR([w, v], trust=1.0)
    >>> optimizer.step()
    >>> w.abs().max().item(), v.abs().max().item()
    (0.0, 0.0)
    >>> optimizer.last["curvature"]
    tensor([  1., 100.], dtype=torch.float64)
    """

    _pickled: ClassVar[tuple[str, ...]] = (
        *ScopedOptimizer._pickled,
        "estimator",
        "summary",
        "sample",
        "ema",
        "every",
        "exempt",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.03,
        estimator: Estimator = "ratio",
        statistic: Statistic = "norm",
        quantile: float | None = None,
        sample: int | None = SAMPLE,
        ema: float = 0.9,
        every: int = 10,
        rate_bounds: tuple[float, float] = (0.0, math.inf),
        fallback: float = 1.0,
        exempt: Callable[[str | None, Tensor], bool] = is_vector,
        exempt_scale: float | None = None,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        self._check_name("estimator", estimator, get_args(Estimator))
        self.estimator = estimator
        self.summary = Summary(statistic, quantile)
        self.summary.check(self._name)
        check_sample(self._name, sample)
        check(0 <= ema < 1, self._name, "ema", ema, "in [0, 1)")
        check(isinstance(every, int) and every >= 1, self._name, "every", every, "an integer >= 1")
        self.sample = sample
        self.ema = ema
        self.every = every
        self.exempt = exempt
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "rate_bounds": rate_bounds,
            "fallback": fallback,
            "exempt_scale": exempt_scale,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, scope="tensor", process_group=process_group, foreach=foreach, fused=fused)

    @property
    def _method_start(self) -> Mapping[str, float]:
        return {"step": 0.0, "curvature": 0.0}

    def _check_group(self, group: Group) -> None:
        name, momentum, decay = self._name, group["momentum"], group["weight_decay"]
        check_lr(name, group["lr"])
        check(0 <= momentum < 1, name, "momentum", momentum, "in [0, 1)")
        check(momentum > 0 or not group["nesterov"], name, "momentum", momentum, "positive with nesterov=True")
        check(0 <= decay < math.inf, name, "weight_decay", decay, "in [0, inf)")
        check_rule(
            name,
            trust=group["trust"],
            bounds=group["rate_bounds"],
            fallback=group["fallback"],
            exempt_scale=group["exempt_scale"],
        )

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        vectors = {name: zeros_for(p) for name in (BUFFER, *_VECTORS[self.estimator])}
        return vectors | {"scalars": self._fresh_scalars(p)}

    def _state_replaced(self) -> None:
        super()._state_replaced()
        self._last: dict[str, Tensor] = {}

    # For the user ----------------------------------------------------------------------------------------------------

    @property
    def last(self) -> dict[str, Tensor]:
        """Of the last step, on the device, one for each parameter that had a gradient, in their order, float64 [n]:

        ``rates``: :math:`\\lambda`, 0 if the step was skipped; ``curvature``: :math:`\\kappa`, NaN where there is none,
        and for exempt parameters. Empty before the first step, and after loading.
        """
        return dict(self._last)

    @property
    def needs_graph(self) -> bool:
        """Whether the next step measures curvature with Hessian-vector products.

        Its gradients must then have a graph: ``backward(create_graph=True)``. Waits for the device. False with all other
        estimators.
        """
        if self.estimator != "hutchinson":
            return False
        # Parameters that take no part take no steps: as far as it is known which these are, they do not count.
        return self._due(self._columns()[0] if self._active else self._table[:, 0])

    def _due(self, steps: Array) -> bool:
        """Whether one of the layers, which have taken so many *steps*, is to be measured in the next one."""
        return bool((steps % self.every == 0).any())

    # The step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient; returns the value of *closure* if one is given.

        If any gradient holds NaN or infinity (or is too large for its square to be represented), no parameter and no state
        changes; the step is counted in :attr:`skipped_steps`. Raises ``RuntimeError`` for sparse gradients, and for
        ``estimator="hutchinson"`` where gradients need a graph and have none. Collective where parameters are DTensors:
        all ranks decide alike.
        """
        loss = evaluate(closure)
        if self._prepare():
            self._step()
        return loss

    def _step(self) -> None:
        self._updates.begin()
        old = Scalars(*self._columns()[:2])
        products = self._products(old.step) if self.estimator == "hutchinson" else None
        squares, measured = self._measured(products)
        xp = namespace(squares)
        finite = xp.isfinite(squares.sum())
        if self._on_host and not finite:
            self._count_skipped()
            self._last = self._shown({"rates": 0 * old.step, "curvature": _or_nan(old.curvature)})
            return
        curvature = self._remembered(old, measured)
        rates = self._rates(curvature)
        self._learn(finite)
        self._move(rates, finite)
        self._keep_scalars(Scalars(old.step + 1, curvature), (), finite)
        kept, taken = xp.where(finite, curvature, old.curvature), xp.where(finite, rates, 0.0)
        self._last = self._shown({"rates": taken, "curvature": _or_nan(kept)})

    def _measured(self, products: list[Tensor] | None) -> tuple[Array, Array | None]:
        """<g, g> of every parameter, and its curvature (None: not measured in this step); [n], over all ranks."""
        if self.estimator == "ratio" and self.summary.statistic == "norm" and self._layers:
            squares, weights = map(torch.as_tensor, self._updates.both_squares())
            parts: Tensor | None = torch.stack([squares, weights])
        else:
            squares = torch.as_tensor(self._updates.squares([(1.0, 0.0)] * len(self._active)))
            parts = self._parts(squares, products)
        sums = self._space.reduce(squares[None] if parts is None else torch.cat([squares[None], parts]))
        curvature = None if parts is None else self.summary.value(sums[1:], [p.numel() for p in self._active])
        if self._on_host:
            return sums[0].numpy(), None if curvature is None else curvature.numpy()
        return sums[0], curvature

    def _parts(self, squares: Tensor, products: list[Tensor] | None) -> Tensor | None:
        """This rank's part of the statistic, [rows, n]; of exempt parameters anything."""
        if not self._layers or (self.estimator == "hutchinson" and products is None):
            return None
        layers = [self._quotients(i, products) for i in self._layers]
        found = self.summary.parts(layers, self._space, lists=self._as_lists)
        if len(self._layers) == len(squares):
            return found
        rows = squares.new_zeros(len(found), len(squares))
        return rows.index_copy_(1, self._layer_index, found.to(rows.dtype))

    def _quotients(self, i: int, products: list[Tensor] | None) -> Iterator[Quotient]:
        """What the estimator measures of parameter *i*; on a CPU in pieces that fit its cache, unless they are to be sorted.

        products: H v of each parameter, with Hutchinson's.
        """
        w, g, state = self._piece(i)
        quotient: Callable[..., Quotient]
        if self.estimator == "ratio":
            vectors, quotient = [g, w], lambda g, w: Quotient(g, w, DELTA)
        elif self.estimator == "secant":
            vectors = [g, state["grad_prev"], w, state["weight_prev"]]
            quotient = lambda g, g_prev, w, w_prev: Quotient(g - g_prev, w - w_prev)  # noqa: E731
        elif self.estimator == "fisher":
            vectors = [g, state["exp_avg_sq"]]
            quotient = lambda g, mean: Quotient(mean.lerp(g.square(), 1 - self.ema), None)  # noqa: E731
        else:
            assert products is not None
            vectors, quotient = [products[i]], lambda product: Quotient(product, None)
        sorts = self.summary.position is not None
        taken, weight = samples(vectors, self.sample if sorts else None, state_dtype(w))
        whole = sorts or w.device.type != "cpu"
        for pieces in [taken] if whole else zip(*(torch.split(t, CHUNK) for t in taken), strict=True):
            yield quotient(*pieces)._replace(weight=weight)

    def _piece(self, i: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What this rank has of the parameter and its gradient, real, and its state."""
        p = self._active[i]
        assert p.grad is not None
        return as_real(to_local(p)), as_real(to_local(p.grad)), self._states[i]

    def _remembered(self, old: Scalars, measured: Array | None) -> Array:
        """The curvature of each layer after this step, from what was *measured* in it; 0: there was none yet."""
        if measured is None:
            return old.curvature
        xp = namespace(measured)
        known = xp.isfinite(measured) & (measured > 0) & self._adapts
        if self.estimator == "fisher":
            # All statistics are proportional to their vector: the average may be corrected for its start here.
            measured = measured / (1 - self.ema ** (old.step + 1))
        if self.estimator in ("ratio", "fisher"):
            return xp.where(known, measured, 0.0)
        if self.estimator == "secant":
            # In the first step the previous gradient and weights are 0, and the quotient is the ratio: no part of the average.
            measured = xp.where(old.step <= 1, measured, self.ema * old.curvature + (1 - self.ema) * measured)
        return xp.where(known, measured, old.curvature)

    def _rates(self, curvature: Array) -> Array:
        groups = self._active_groups
        bounds = [self._spread([group["rate_bounds"][side] for group in groups]) for side in (0, 1)]
        trust = self._per_parameter("trust")
        rates = curvature_rates(
            curvature,
            trust=trust,
            weight_decay=self._per_parameter("weight_decay"),
            fallback=self._per_parameter("fallback"),
            bounds=(bounds[0], bounds[1]),
        )
        if len(self._layers) == len(rates):
            return rates
        fixed = [g["trust"] if g["exempt_scale"] is None else g["exempt_scale"] for g in groups]
        return namespace(rates).where(self._adapts, rates, self._spread(fixed))

    def _learn(self, finite: Array) -> None:
        """Update the vectors from which the estimator measures, if the step is *finite*."""
        if not _VECTORS[self.estimator]:
            return
        for i in range(len(self._active)):
            w, g, state = self._piece(i)
            if self.estimator == "secant":
                new = {"grad_prev": g, "weight_prev": w}
            else:
                average = state["exp_avg_sq"]
                new = {"exp_avg_sq": average.lerp(g.to(average.dtype).square(), 1 - self.ema)}
            for name, value in new.items():
                state[name].copy_(
                    value if self._on_host else torch.where(finite, value.to(state[name].dtype), state[name])
                )

    def _move(self, rates: Array, finite: Array) -> None:
        lr, momentum = self._per_parameter("lr"), self._per_parameter("momentum")
        ahead = [group["nesterov"] for group in self._active_groups]
        tau, look = lr, None
        if any(ahead):
            nesterov = self._spread([float(a) for a in ahead])
            tau, look = lr * (1 - nesterov * (1 - momentum)), lr * nesterov * rates
        scales = [
            (-1.0 if group["maximize"] else 1.0, float(group["weight_decay"]))
            for group, span in zip(self._active_groups, self._spans, strict=True)
            for _ in range(span.start, span.stop)
        ]
        self._updates.move(scales, Momentum(beta=momentum, gain=rates, tau=tau, look=look), finite)

    # Hessian-vector products -------------------------------------------------------------------------------------------

    def _products(self, steps: Array) -> list[Tensor] | None:
        """This rank's pieces of H v, where a layer is due; None otherwise. Lets go of the graph of all gradients."""
        grads = [p.grad for p in self._active if p.grad is not None]
        products = None
        if self._due(steps):
            if not any(g.requires_grad for g in grads):
                raise RuntimeError(
                    f"{self._name}: estimator='hutchinson' needs gradients with a graph in this step: use "
                    "backward(create_graph=True), in the closure of step(closure) or before step(); see needs_graph"
                )
            vectors = [signs(p, int(steps.max()), i) for i, p in enumerate(self._active)]
            products = [as_real(to_local(hv)) for hv in hessian_products(self._active, grads, vectors)]
        drop_graphs(self._active)
        return products

    # Layout ----------------------------------------------------------------------------------------------------------

    def _lay_out(self, blocks: list[Block]) -> bool:
        self._states = [state for block in blocks for state in block.states]
        adapts = [
            not self.exempt(name, p)
            for group, indices, span in zip(self._active_groups, self._indices, self._spans, strict=True)
            for name, p in zip(_names(group, indices), self._active[span], strict=True)
        ]
        self._layers = [i for i, adapted in enumerate(adapts) if adapted]
        device = self._table.device
        self._layer_index = torch.tensor(self._layers, dtype=torch.int64).to(device)
        self._as_lists = any(block.foreach for block in blocks) or device.type != "cpu"
        on_host = self._use_kernels(blocks)
        mask = torch.tensor(adapts)
        self._adapts: Array = mask.numpy() if on_host else mask.to(device)
        self._updates: FusedUpdates | TensorUpdates = (
            FusedUpdates(blocks, owner=self._name) if on_host else TensorUpdates(blocks, shared=False)
        )
        return on_host


class MCLR(CBLR):
    r"""Momentum SGD whose learning rate is, layer by layer, inverse to the median of the curvature.

    :class:`~conjugo.optim.CBLR` with :math:`\kappa` the median of :math:`|g_i| / |w_i|` over the coordinates of a layer. A
    few extreme coordinates do not matter to it, as they do to the norms in LARS, nor do coordinates without gradient. Costs
    one vector of memory, like SGD with momentum, and a selection among at most *sample* coordinates of each layer.

    Args:
        trust: :math:`\eta > 0`. Medians are smaller than the quotient of norms: a tenth of what LARS takes is about right.

    The other arguments, the state and the errors are those of :class:`~conjugo.optim.CBLR`.

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [32.0, 64.0, 128.0, 256.0, 512.0]]))
    >>> w.grad = torch.ones(2, 5)
    >>> w.grad[1, 4] = 0
    >>> optimizer = MCLR([w], trust=0.5)
    >>> optimizer.step()
    >>> optimizer.last["rates"]  # 0.5 / 0.0625
    tensor([8.], dtype=torch.float64)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.003,
        sample: int | None = SAMPLE,
        rate_bounds: tuple[float, float] = (0.0, math.inf),
        fallback: float = 1.0,
        exempt: Callable[[str | None, Tensor], bool] = is_vector,
        exempt_scale: float | None = None,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust=trust,
            statistic="median",
            sample=sample,
            rate_bounds=rate_bounds,
            fallback=fallback,
            exempt=exempt,
            exempt_scale=exempt_scale,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            process_group=process_group,
        )


def _or_nan(curvature: Array) -> Array:
    return namespace(curvature).where(curvature > 0, curvature, math.nan)


def _names(group: Group, indices: Sequence[int]) -> list[str | None]:
    """Of the parameters of *group* at *indices*; None where they were given without."""
    names = group.get("param_names")
    return [None if names is None else names[i] for i in indices]
