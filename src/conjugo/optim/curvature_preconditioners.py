"""Preconditioners from the diagonal of the Hessian or of the Gauss-Newton matrix, measured every few steps.

Both estimates are unbiased and cost a few passes over a batch:

* Hutchinson: E[v * H v] is the diagonal of H for a vector v of random signs (``*`` elementwise). H v differentiates twice.
* Gauss-Newton: with the derivative J_n of the outputs and the Hessian B_n of the loss in them, for example n, and random
  vectors u_n with covariance B_n, the squares of sum_n J_n^T u_n have the diagonal of sum_n J_n^T B_n J_n as their mean. One
  ordinary backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conjugo._space import is_dtensor, to_local
from conjugo._tensors import wide_dtype
from conjugo.errors import check, unknown
from conjugo.optim._base import zeros_for
from conjugo.optim._products import signs
from conjugo.optim.preconditioners import Block, Preconditioner

__all__ = ["CurvatureDiagonal", "GaussNewtonDiagonal", "Hutchinson", "output_factor"]

Positive = Literal["rms", "abs", "clamp"]
Average = Literal["none", "kernel", "row", "tensor"]
Draw = Literal["signs", "labels"]
Loss = Callable[[Tensor, Any], Tensor]

_KEPT_DIMENSIONS: dict[Average, int] = {"kernel": 2, "row": 1, "tensor": 0}


@dataclass(frozen=True, kw_only=True)
class CurvatureDiagonal(Preconditioner):
    r"""P = 1 / (max(h / m, floor) + damping), where h is a running average of estimates, and m the mean of h.

    So P has the shape of the curvature and a size near 1, and learning rates are those of gradient descent. With *newton* it
    is divided by m too, and a learning rate of 1 is Newton's step on a diagonal H; where H is not diagonal that is too long,
    the more so the more parameters there are. The mean is taken over the scope of the optimizer. Before the first estimate,
    and where all are 0, P = 1. The curvature is that of the loss times the scales of the gradient, without weight decay. A
    subclass implements :meth:`estimate`.

    every: steps from one measurement to the next, >= 1. probes: random vectors for each, >= 1; the error falls as their root.
    decay: part of the old average in a new one, in [0, 1), with Adam's correction of the start. damping: >= 0; the larger,
    the nearer is P to a multiple of 1. floor: in (0, 1]. newton: see above. positive: what makes a positive h of the
    estimates e: ``"rms"``, the root of the average of e^2 (as in AdaHessian); ``"abs"``, the size of the average of e;
    ``"clamp"``, the average, or 0 where that is negative (as in Sophia). average: estimates are first averaged over the
    ``"kernel"`` of a convolution (all dimensions behind the first two; AdaHessian), over each ``"row"`` (all behind the
    first), the whole ``"tensor"``, or not at all, ``"none"``. seed: of the random vectors, which depend on it and on the
    number of the step only.

    State: ``curvature``, one vector; 0-d in float64 ``estimates``, how many were taken, ``bad_estimates``, how many were left
    out because they were not finite, and ``mean_curvature``, m.
    """

    every: int = 10
    probes: int = 1
    decay: float = 0.9
    damping: float = 1.0
    floor: float = 1e-3
    newton: bool = False
    positive: Positive = "abs"
    average: Average = "none"
    seed: int = 0

    uses_graph: ClassVar[bool] = False
    """Whether products of the Hessian with :meth:`probe`, made by the optimizer, can take the place of :meth:`estimate`."""

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        name = type(self).__name__
        for option in ("every", "probes"):
            value = getattr(self, option)
            check(_is_count(value) and value >= 1, name, option, value, "an integer >= 1")
        check(_is_count(self.seed) and self.seed >= 0, name, "seed", self.seed, "an integer >= 0")
        check(0 <= self.decay < 1, name, "decay", self.decay, "in [0, 1)")
        check(0 <= self.damping < float("inf"), name, "damping", self.damping, "in [0, inf)")
        check(0 < self.floor <= 1, name, "floor", self.floor, "in (0, 1]")
        for option, choices in (("positive", get_args(Positive)), ("average", get_args(Average))):
            if getattr(self, option) not in choices:
                unknown(f"{name} {option}", getattr(self, option), choices)

    # What is measured ------------------------------------------------------------------------------------------------

    @abstractmethod
    def estimate(
        self,
        model: nn.Module,
        loss_fn: Loss,
        inputs: Any,
        targets: Any,
        *,
        params: Sequence[Tensor],
        step: int,
        weight: float,
        group: Any,
    ) -> list[Tensor]:
        """An unbiased estimate of the diagonal for each of *params*, the same on all ranks. Collective.

        It is that of the mean over the ranks of ``loss_fn(model(inputs), targets)``, each counting *weight*. Laid out like the
        parameters; complex for complex ones, whose parts have the curvature along each.
        """

    def probe(self, params: Sequence[Tensor], step: int, number: int) -> list[Tensor]:
        """Vector v number *number* of step number *step*, laid out like *params*; only where ``uses_graph``."""
        raise NotImplementedError(f"{type(self).__name__} needs no products with the Hessian")

    def mean_over_probes(self, pair: Callable[[int], tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[Tensor]:
        """The mean of v * u, elementwise, over (v, u) = ``pair(number)`` of all probes, of which one at a time is in memory."""
        mean: list[Tensor] = []
        for number in range(self.probes):
            mean = _added(mean, _elementwise(*pair(number)), self.probes)
        return mean

    # How it is used --------------------------------------------------------------------------------------------------

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """``curvature`` and the numbers, zeros."""
        wide = wide_dtype(p.device)
        numbers = ("estimates", "bad_estimates", "mean_curvature")
        return {"curvature": zeros_for(p)} | {n: torch.zeros((), dtype=wide, device=p.device) for n in numbers}

    def averaged(self, estimate: Tensor) -> Tensor:
        """*estimate* [...] as the option *average* says. Collective where it is a DTensor that is cut in those dimensions."""
        dims = range(_KEPT_DIMENSIONS.get(self.average, estimate.ndim), estimate.ndim)
        if not dims or not estimate.numel():
            return estimate
        means = torch.zeros_like(estimate) + estimate.mean(tuple(dims), keepdim=True)
        if is_dtensor(means) and is_dtensor(estimate):
            means = means.redistribute(placements=estimate.placements)
        return means

    def sizes(self, values: Tensor) -> Tensor:
        """h of what the state ``curvature`` holds; elementwise, a new tensor or *values*."""
        return {"rms": values, "abs": values.abs(), "clamp": values.clamp(min=0.0)}[self.positive]

    def mixed(self, block: Block) -> list[Tensor]:
        """The running averages with ``block.curvature``; new tensors."""
        new = []
        for old, estimate, count in zip(
            block.state("curvature"), block.curvature, block.state("estimates"), strict=True
        ):
            rate = ((1 - self.decay) / (1 - self.decay ** (count + 1))).to(old.dtype)
            if self.positive == "rms":
                new.append(torch.hypot(old * (1 - rate).sqrt(), estimate * rate.sqrt()))
            else:
                new.append(torch.lerp(old, estimate, rate))
        return new

    def learn(self, block: Block, new: list[Tensor], scales: Tensor, *, good: Tensor, finite: Tensor) -> None:
        """Keep the averages *new* of :meth:`mixed`, whose mean sizes over the scope are *scales* [n], in place.

        good: 0-d bool, they are finite. finite: 0-d bool, the step is taken; otherwise nothing may change.
        """
        taken = finite & good
        for old, value, state, scale in zip(block.state("curvature"), new, block.states, scales.unbind(), strict=True):
            old.copy_(torch.where(taken, value, old))
            state["estimates"] += taken
            state["bad_estimates"] += finite & ~good
            state["mean_curvature"].copy_(torch.where(taken, scale, state["mean_curvature"]))

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """v / (max(h / m, floor) + damping), by m too with *newton*."""
        return [v / self._relative(state) for v, state in zip(vectors, block.states, strict=True)]

    def diagonal(self, state: Mapping[str, Tensor]) -> Tensor:
        """What :meth:`apply` multiplies with."""
        return 1 / self._relative(state)

    def _relative(self, state: Mapping[str, Tensor]) -> Tensor:
        values, mean = state["curvature"], state["mean_curvature"]
        known = mean > 0
        scale = torch.where(known, mean, 1.0).to(values.dtype)
        relative = (self.sizes(values) / scale).clamp_(min=self.floor).add_(self.damping)
        if self.newton:
            relative.mul_(scale)
        return torch.where(known, relative, 1.0)


@dataclass(frozen=True, kw_only=True)
class Hutchinson(CurvatureDiagonal):
    r"""The diagonal of the Hessian H by Hutchinson's estimator, :math:`\mathrm{E}[v \odot H v]` for random signs v.

    A measurement with *k* probes costs about 3 k to 4 k gradients of the batch that it is made on: each is a forward and a
    backward pass, and a backward pass through both. Its error in coordinate i is the norm of the rest of row i of H over the
    root of *k*; on neural networks that is larger than the diagonal itself.

    Options as for :class:`CurvatureDiagonal`.

    Sources: C. Bekas, E. Kokiopoulou, Y. Saad, "An estimator for the diagonal of a matrix", 2007; Z. Yao et al.,
    "ADAHESSIAN", arXiv:2006.00719; H. Liu et al., "Sophia", arXiv:2305.14342.

    >>> from conjugo.optim import NLCG
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = NLCG([w], lr=1.0, precond=Hutchinson(newton=True, damping=0.0))
    >>> loss = (torch.tensor([0.5, 4.0]) * w * w).sum() / 2
    >>> (w.grad,) = torch.autograd.grad(loss, w, create_graph=True)
    >>> optimizer.step()  # Newton's
    >>> w.detach().abs().max().item()
    0.0
    """

    uses_graph: ClassVar[bool] = True

    def probe(self, params: Sequence[Tensor], step: int, number: int) -> list[Tensor]:
        """Random signs."""
        count = (self.seed * 7919 + step) * self.probes + number
        return [signs(p, count, i) for i, p in enumerate(params)]

    def estimate(
        self,
        model: nn.Module,
        loss_fn: Loss,
        inputs: Any,
        targets: Any,
        *,
        params: Sequence[Tensor],
        step: int,
        weight: float,
        group: Any,
    ) -> list[Tensor]:
        """By :func:`conjugo.distributed.hvp`; see the base class."""
        from conjugo.distributed import hvp

        def loss(model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
            return loss_fn(model(batch[0]), batch[1])

        def pair(number: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            v = self.probe(params, step, number)
            whole = _for_model(model, params, v)
            product = hvp(model, loss, (inputs, targets), whole, weight=weight, process_group=group)
            return v, _of_model(model, params, product)

        return self.mean_over_probes(pair)


@dataclass(frozen=True, kw_only=True)
class GaussNewtonDiagonal(CurvatureDiagonal):
    r"""The diagonal of the Gauss-Newton matrix, the part of the Hessian that is never negative.

    For the cross-entropy it is also the Fisher matrix. A measurement costs about one gradient for each probe.
    The estimate is a square of something nearly normal: its error with one probe is 1.4 times the diagonal.

    draw: the random vector u_n of each example. ``"labels"`` is Sophia's Gauss-Newton-Bartlett estimator: the gradient of the
    cross-entropy for a label that is drawn from the model (for other losses normal numbers). ``"signs"`` makes it of random
    signs, which says more where the model is sure of its labels, so that hardly any other one is ever drawn.

    Losses: see :func:`output_factor`. The other options as for :class:`CurvatureDiagonal`.

    Sources: H. Liu et al., "Sophia", arXiv:2305.14342; the random signs are ours.
    """

    draw: Draw = "signs"

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        if self.draw not in get_args(Draw):
            unknown("GaussNewtonDiagonal draw", self.draw, get_args(Draw))

    def estimate(
        self,
        model: nn.Module,
        loss_fn: Loss,
        inputs: Any,
        targets: Any,
        *,
        params: Sequence[Tensor],
        step: int,
        weight: float,
        group: Any,
    ) -> list[Tensor]:
        """By :func:`conjugo.distributed.vjp`; see the base class."""
        from conjugo.distributed import vjp

        rank, share = _rank_and_share(weight, to_local(params[0]).device, group)

        def pair(number: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            seed = (((self.seed * 7919 + step) * self.probes + number) * 1_000_003 + rank) % 2**32

            def vector(outputs: Tensor) -> Tensor:
                generator = torch.Generator(outputs.device).manual_seed(seed)
                drawn = output_factor(outputs, loss_fn, targets, generator=generator, draw=self.draw)
                return drawn.mul_(share**0.5).to(outputs.dtype)

            pulled = _of_model(model, params, vjp(model, inputs, vector, process_group=group))
            return pulled, pulled

        return self.mean_over_probes(pair)


def output_factor(
    outputs: Tensor, loss_fn: Loss, targets: Any, *, generator: torch.Generator | None = None, draw: Draw = "signs"
) -> Tensor:
    r"""A random vector like *outputs* whose covariance is the Hessian of ``loss_fn(outputs, targets)`` in the outputs.

    Where *targets* are integers, the loss is taken for a cross-entropy of the softmax over dimension 1 (or the last one)
    with whatever weight on each example: the mean or the sum, weights of classes, an index that is ignored, label smoothing.
    Otherwise it must be a sum over the outputs: squared errors, binary cross-entropies; where its second derivative is
    negative, 0 is taken.

    outputs: [N, C, ...]. draw: see :class:`GaussNewtonDiagonal`.

    Raises:
        ValueError: the Hessian of the loss is another one.

    >>> outputs = torch.zeros(1, 3)
    >>> output_factor(outputs, torch.nn.functional.mse_loss, torch.ones(1, 3)).square()  # of (2 / 3) times the identity
    tensor([[0.6667, 0.6667, 0.6667]])
    """
    with torch.enable_grad():
        z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32)).requires_grad_()
        (slope,) = torch.autograd.grad(loss_fn(z, targets), z, create_graph=True)
        probe = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        if not slope.requires_grad:
            return torch.zeros_like(z)
        (product,) = torch.autograd.grad(slope, z, probe, retain_graph=True)
        if not (isinstance(targets, Tensor) and targets.is_floating_point()):
            return _of_softmax(z.detach(), probe, product, generator, draw)
        (diagonal,) = torch.autograd.grad(slope, z, torch.ones_like(z))
    _check_hessian(product, diagonal * probe, "a sum over outputs, or targets that are integers")
    normal = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    drawn: Tensor = diagonal.clamp(min=0.0).sqrt() * (normal if draw == "labels" else _coins(z, generator))
    return drawn


def _of_softmax(z: Tensor, probe: Tensor, product: Tensor, generator: torch.Generator | None, draw: Draw) -> Tensor:
    """:func:`output_factor` for B = w (diag(p) - p p^T) with p the softmax of *z* and a weight w for each example."""
    for dim in dict.fromkeys((min(1, z.ndim - 1), z.ndim - 1)):
        p = z.softmax(dim)
        pattern = p * (probe - (p * probe).sum(dim, keepdim=True))
        largest = pattern.abs().amax(dim, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        unit = pattern / largest
        length = (unit * product).sum(dim, keepdim=True) / (unit * unit).sum(dim, keepdim=True).clamp(min=1e-12)
        clear = largest > 1e-3  # of others, which the model is sure of, rounding errors are seen
        found, wanted = (torch.where(clear, x, 0.0) for x in (product, length * unit))
        if _alike(found, wanted) or dim == z.ndim - 1:
            break
    accepted = "the cross-entropy of a softmax over dimension 1 or the last one, for targets of integers"
    _check_hessian(found, wanted, accepted)
    weight = (length / largest).clamp(min=0.0)
    if draw == "labels":
        rows = p.movedim(dim, -1)
        waits = torch.empty_like(rows).exponential_(generator=generator)
        labels = (rows / waits).argmax(-1, keepdim=True)  # unlike multinomial, it bears NaN
        return weight.sqrt() * (rows.scatter_add(-1, labels, -torch.ones_like(labels, dtype=p.dtype))).movedim(-1, dim)
    spread = p.sqrt() * _coins(p, generator)
    return weight.sqrt() * (spread - p * spread.sum(dim, keepdim=True))


def _coins(like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return (2 * bits - 1).to(like.dtype)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether two products are equal up to rounding; not finite ones are left to whoever uses them."""
    error, size = float((found - wanted).norm()), float(found.norm())
    return not error > 0.01 * size


def _check_hessian(found: Tensor, wanted: Tensor, accepted: str) -> None:
    check(_alike(found, wanted), "GaussNewtonDiagonal", "loss_fn", "another Hessian in the outputs", accepted)


def _for_model(model: nn.Module, params: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """*values* of *params*, in the order of the parameters of *model*; 0 for those that are not among them."""
    known = dict(zip(params, values, strict=True))
    return [known[p] if p in known else torch.zeros_like(p) for p in model.parameters()]


def _of_model(model: nn.Module, params: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """*values* of the parameters of *model*, in the order of *params*."""
    known: dict[Tensor, Tensor] = dict(zip(model.parameters(), values, strict=True))
    return [known[p] for p in params]


def _elementwise(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """x * y, of complex ones part by part."""
    return [
        torch.complex(x.real * y.real, x.imag * y.imag) if x.is_complex() else x * y
        for x, y in zip(xs, ys, strict=True)
    ]


def _added(sums: list[Tensor], values: list[Tensor], count: int) -> list[Tensor]:
    """sums + values / count, in place; no sums yet: values / count."""
    return [s + v / count for s, v in zip(sums, values, strict=True)] if sums else [v / count for v in values]


def _rank_and_share(weight: float, device: torch.device, group: Any) -> tuple[int, float]:
    """This rank's number and its part in the sum of all weights. Collective if there are several ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return 0, 1.0
    total = torch.tensor(float(weight), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return dist.get_rank(group), weight / total.item()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
