"""The batch of a step once more: its loss, or products with its Gauss-Newton matrix, where the parameters are.

Nothing is left behind: buffers and random numbers are afterwards what they were, and gradients are not touched. Layers draw the
same random numbers as in the forward pass that follows each :meth:`ObservedBatch.add`; where several follow each other without
a forward pass between, as in the forward passes after the last of them, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from conjugo._tensors import dot
from conjugo.errors import check
from conjugo.optim.probed_steps import ALONG, FORWARD

__all__ = ["Loss", "ObservedBatch"]

Loss = Callable[[Tensor, Any], Tensor]


class _Part(NamedTuple):
    model: nn.Module
    loss_fn: Loss
    make: Callable[[], tuple[Any, Any]]
    weight: float
    random: list[Tensor] | None
    """The random state to begin with; None: go on after the part before."""


class ObservedBatch:
    """This rank's micro-batches of a step, each with what the model and the loss are; methods are collective.

    device: of the parameters. group: the ranks that see different data; None: one.
    """

    def __init__(self, device: torch.device, group: Any) -> None:
        self._device = device
        self._group = group
        self._parts: list[_Part] = []
        self._random: list[Tensor] = []  # when the last part was added
        kind = device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.eps = 0.0
        """Relative rounding error of the losses seen so far."""
        self.passes = 0.0
        """What was computed so far, in forward and backward passes over the batch."""

    def add(self, model: nn.Module, loss_fn: Loss, make: Callable[[], tuple[Any, Any]], weight: float) -> None:
        """One more micro-batch, which *make* gives."""
        random = _random_state(self._device)
        # Nothing was drawn since the part before: the forward passes are still to come, in one sequence.
        same = bool(self._parts) and all(torch.equal(a, b) for a, b in zip(random, self._random, strict=True))
        self._random = random
        self._parts.append(_Part(model, loss_fn, make, weight, None if same else random))

    def loss(self) -> float:
        """The mean loss over all micro-batches and ranks, each counting its weight; NaN or infinite if one of them is."""
        total = 0.0
        self.passes += FORWARD
        with self._undisturbed(), torch.no_grad():
            for model, loss_fn, make, weight, random in self._parts:
                _set_random_state(random)
                inputs, targets = make()
                with _autocast(self._device, self._autocast):
                    loss = loss_fn(_plain(model, keep_compiled=True)(inputs), targets)
                check(loss.numel() == 1, "NLCG", "the loss of the batch", tuple(loss.shape), "a number: its mean")
                self.eps = max(self.eps, torch.finfo(loss.dtype).eps)
                total += weight * float(loss) if weight else 0.0
        value, weight = self._summed([total, sum(part.weight for part in self._parts)])
        return value / weight if weight else math.nan

    def check_loss(self, given: float) -> None:
        """Raise ValueError if the loss of the batch, computed here once more, is not the *given* one. Collective."""
        found = self.loss()
        # One that is not finite is left to the trials, which then fail alike.
        most = (_DIFFERENT + _ROUNDING * self.eps) * max(abs(found), abs(given))
        check(
            not math.isfinite(found) or abs(found - given) <= most,
            "NLCG",
            "loss",
            given,
            f"the mean loss of the observed batch by the weights of its parts, {found}: pass observe_batch(..., weight=), "
            "with which loss and gradient are averaged",
        )

    def products(self, vectors: Sequence[Mapping[Tensor, Tensor]], fraction: float) -> list[list[float]]:
        """<v_i, G v_j> of *vectors* (of each parameter; 0 for others), where G is the mean over *fraction* of the examples.

        In the types of the parameters, without autocast. Raises RuntimeError for operations without forward derivative.
        """
        k = len(vectors)
        sums = torch.zeros(k, k, dtype=torch.float64)
        parts = self._some(fraction)
        with self._undisturbed():
            for model, loss_fn, make, weight, random in parts:
                _set_random_state(random)
                outputs, targets, tangents = self._pushed(_plain(model), make, vectors)
                if weight:
                    sums += weight * _curvature(loss_fn, outputs, targets, tangents)
        weights = [sum(part.weight for part in some) for some in (parts, self._parts)]
        *found, weight, whole = self._summed([*sums.flatten().tolist(), *weights])
        self.passes += k * ALONG * (weight / whole if whole else 1.0)
        return [[found[i * k + j] / weight if weight else math.nan for j in range(k)] for i in range(k)]

    # Inside ----------------------------------------------------------------------------------------------------------

    def _pushed(
        self, model: nn.Module, make: Callable[[], tuple[Any, Any]], vectors: Sequence[Mapping[Tensor, Tensor]]
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Outputs, targets, and the derivatives of the outputs along *vectors*, with the same random numbers for each."""
        inputs, targets = make()
        named = dict(model.named_parameters())
        random = _random_state(self._device)
        tangents: list[Tensor] = []
        for vector in vectors:
            _set_random_state(random)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                duals = {name: _dual(p.detach(), vector[p]) if p in vector else p.detach() for name, p in named.items()}
                try:
                    outputs = functional_call(model, {**duals, **buffers}, (inputs,))
                except (RuntimeError, NotImplementedError) as error:
                    if "forward" not in str(error) and "jvp" not in str(error):
                        raise
                    raise RuntimeError(
                        f"NLCG: line_search=Subspace needs forward derivatives of all layers: {error}"
                    ) from error
                if not isinstance(outputs, Tensor):
                    check(
                        False,
                        "NLCG",
                        "what the model gives",
                        type(outputs).__name__,
                        "a tensor with line_search=Subspace",
                    )
                primal, tangent = _parts(outputs)
                tangents.append(torch.zeros_like(primal) if tangent is None else tangent.detach())
                plain = primal.detach()
        return plain, targets, tangents

    def _some(self, fraction: float) -> list[_Part]:
        """As many whole micro-batches as fit into *fraction* of them all, and of the next one the first examples."""
        left = fraction * sum(part.weight for part in self._parts)
        chosen: list[_Part] = []
        for part in self._parts:
            share = 1.0 if part.weight <= left else left / part.weight
            left = max(0.0, left - share * part.weight)
            if share == 1.0:
                chosen.append(part)
            elif share > 1e-9:
                chosen.append(part._replace(make=_first_rows(part.make, share), weight=share * part.weight))
        return chosen

    def _summed(self, values: list[float]) -> list[float]:
        """*values* added up over the ranks."""
        if self._group is None or dist.get_world_size(self._group) == 1:
            return values
        packed = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(packed, group=self._group)
        return packed.tolist()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Afterwards random numbers and all buffers are what they were; sharded parameters are gathered anew inside."""
        from conjugo.distributed.virtual_batch import sharded_modules

        models = list(dict.fromkeys(part.model for part in self._parts))
        modules = list(dict.fromkeys(module for model in models for module in model.modules()))
        buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
        sharded = [module for model in models for module in sharded_modules(model)]
        random = _random_state(self._device)
        try:
            for module in sharded:  # whole parameters may be there still, which know nothing of a move
                module.reshard()
            yield
        finally:
            for module in sharded:
                module.reshard()
            _set_random_state(random)
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer


def _curvature(loss_fn: Loss, outputs: Tensor, targets: Any, tangents: Sequence[Tensor]) -> Tensor:
    """<t_i, H t_j> for the Hessian H of the loss in the outputs: [k, k]."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    with torch.enable_grad():
        z = outputs.detach().to(wide).requires_grad_()
        (slope,) = torch.autograd.grad(loss_fn(z, targets), z, create_graph=True)
        ts = [t.to(wide) for t in tangents]
        if not slope.requires_grad:
            return torch.zeros(len(ts), len(ts), dtype=torch.float64)
        products = [torch.autograd.grad(slope, z, t, retain_graph=True)[0] for t in ts]
    return torch.stack([torch.stack([dot(t, hv) for hv in products]) for t in ts]).cpu().double()


_DIFFERENT = 0.01
_ROUNDING = 8.0

_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_parts: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual


def _plain(model: nn.Module, *, keep_compiled: bool = False) -> nn.Module:
    """*model* without DDP around it, which would synchronise buffers; compiled only if asked for, and not inside DDP."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        module: nn.Module = inner.module
        return module
    return model if keep_compiled else inner


def _first_rows(make: Callable[[], tuple[Any, Any]], share: float) -> Callable[[], tuple[Any, Any]]:
    """What *make* gives, cut to *share* of its examples: as many as the first tensor with dimensions in the inputs has rows."""

    def made() -> tuple[Any, Any]:
        inputs, targets = make()
        examples = next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim), 0)

        def cut(x: Tensor) -> Tensor:
            return x[: max(1, round(share * examples))] if x.ndim and len(x) == examples else x

        inputs, targets = tree_map_only(Tensor, cut, (inputs, targets))
        return inputs, targets

    return made


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: Sequence[Tensor] | None) -> None:
    if state is None:
        return
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
