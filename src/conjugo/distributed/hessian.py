"""Hessian-vector products of a mean loss over all workers, also through DDP and FSDP2, which break ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conjugo._graphs import check_twice
from conjugo._space import ParamSpace, is_dtensor, to_local
from conjugo._tensors import dot
from conjugo.distributed.virtual_batch import Loss, group_of, parameters_of, sharded_modules
from conjugo.errors import check

__all__ = ["curvature_along", "hvp", "vjp"]

Mode = Literal["auto", "autograd", "functional", "fd"]

LARGE = 10**8
"""Parameters of a sharded model above which they are not gathered unasked: whole weights, vector, gradient and product take
1.6 GB of float32."""


def hvp(
    model: nn.Module,
    loss_fn: Loss,
    batch: Any,
    vec: Sequence[Tensor],
    mode: Mode = "auto",
    *,
    weight: float = 1.0,
    eps: float | None = None,
    process_group: Any = None,
) -> list[Tensor]:
    """H v: the Hessian of the mean loss over all ranks times a vector, laid out like the parameters. Collective.

    Args:
        model: plain, DDP, or with ``fully_shard``. Its parameters, gradients and buffers and the random numbers of the process
            are afterwards what they were before.
        loss_fn: ``loss_fn(model, batch)``, this rank's mean loss, 0-d. The model that it gets may be a stand-in.
        batch: this rank's data. Products are linear in the loss: for several micro-batches, take the mean of theirs.
        vec: one tensor for each of ``model.parameters()``, of its shape and layout. The products of frozen and unused
            parameters are 0, and what *vec* holds for them does not matter.
        mode: ``"autograd"`` differentiates twice, exactly; for whole parameters. ``"functional"`` does so for sharded ones
            (FSDP2, HSDP), with the whole parameters in memory for the time of the call. ``"fd"``: the central difference of two
            gradients, in float32 with a relative error of about 1e-4; needs one more gradient and copy of the parameters.
            ``"auto"``: the exact one for the layout, but ``"fd"`` for sharded models of more than 10^8 parameters, and with
            :class:`torch.nn.SyncBatchNorm` on several ranks, which has first derivatives only.
        weight: how much this rank's loss counts, >= 0, such as its number of examples.
        eps: length of the step of ``"fd"``, > 0; None: 1e-3 (1e-5 for float64 parameters) times max(1, |w|).
        process_group: the ranks that see different data; None: those of DDP, else all, if torch.distributed is initialised.

    Raises:
        ValueError: *vec* does not fit the parameters; *mode* is unknown or does not fit their layout.

    Source: B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> hvp(model, lambda model, x: model(x).square().mean(), torch.eye(2), [torch.tensor([[1.0, 3.0]])])
    [tensor([[1., 3.]])]
    """
    params, mode, process_group = _resolved(model, vec, mode, process_group)
    with _unchanged(model, params) as rewind:
        share = _share(weight, params, process_group)
        if mode == "fd":
            return _difference(model, loss_fn, batch, vec, share, eps, process_group, rewind)
        if any(is_dtensor(p) for p in params):
            return _of_shards(model, loss_fn, batch, vec, share)
        products = _of_own_loss(model, loss_fn, batch, vec, share)
    return _summed(products, process_group)


def curvature_along(
    model: nn.Module,
    loss_fn: Loss,
    batch: Any,
    vec: Sequence[Tensor],
    mode: Mode = "auto",
    *,
    weight: float = 1.0,
    eps: float | None = None,
    process_group: Any = None,
) -> Tensor:
    """<v, H v> over all parameters and ranks, 0-d in float64, the same on all. Collective. Arguments as for :func:`hvp`.

    For whole parameters (DDP) one number travels instead of a vector, because *vec* is the same on all ranks.
    """
    params, mode, process_group = _resolved(model, vec, mode, process_group)
    if mode == "fd" or any(is_dtensor(p) for p in params):
        products = hvp(model, loss_fn, batch, vec, mode, weight=weight, eps=eps, process_group=process_group)
        return ParamSpace(params, group=process_group, owner="curvature_along").dots([(vec, products)])[0]
    with _unchanged(model, params):
        share = _share(weight, params, process_group)
        products = _of_own_loss(model, loss_fn, batch, vec, share)
    pairs = zip(vec, products, strict=True)
    (total,) = _summed([torch.stack([dot(v.detach(), product) for v, product in pairs]).sum()], process_group)
    return total


def vjp(
    model: nn.Module, inputs: Any, vector: Callable[[Tensor], Tensor], *, process_group: Any = None
) -> list[Tensor]:
    """J^T u added up over all ranks, laid out like the parameters: one forward and one backward pass. Collective.

    J is the derivative of this rank's ``model(inputs)``, a tensor, and u = ``vector(outputs)`` of its shape. *model*, what it
    keeps and *process_group* as for :func:`hvp`. Raises ValueError for a model whose parameters other means have sharded.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> vjp(model, torch.eye(2), lambda outputs: torch.tensor([[1.0], [3.0]]))
    [tensor([[1., 3.]])]
    """
    params, group = parameters_of(model), group_of(model, process_group)
    known = not any(is_dtensor(p) for p in params) or sharded_modules(model)
    # With tensor parallelism ranks share examples, and would have to share random vectors.
    check(bool(known), "vjp", "model", "one with DTensors but without fully_shard", "plain, DDP, or with fully_shard")
    with _unchanged(model, params), torch.enable_grad():
        if not any(is_dtensor(p) for p in params):
            model = getattr(model, "_orig_mod", model)
            if isinstance(model, nn.parallel.DistributedDataParallel):
                model = model.module
            outputs, free = model(inputs), [p for p in params if p.requires_grad]
            grads: Sequence[Tensor | None] = torch.autograd.grad(outputs, free, vector(outputs), allow_unused=True)
            found = dict(zip(free, grads, strict=True))
        else:
            for p in params:
                p.grad = None
            outputs = model(inputs)
            factor = dist.get_world_size(group) if _several(group) else 1  # FSDP2 takes means
            outputs.backward(vector(outputs) * factor)
            found = {p: p.grad for p in params}
        results = [torch.zeros_like(p) if (grad := found.get(p)) is None else grad.detach() for p in params]
    return results if any(is_dtensor(p) for p in params) else _summed(results, group)


def _resolved(model: nn.Module, vec: Sequence[Tensor], mode: Mode, group: Any) -> tuple[list[nn.Parameter], Mode, Any]:
    """The parameters of *model*, the mode and the ranks. Raises ValueError for arguments that do not fit the parameters."""
    params = parameters_of(model)
    sharded = any(is_dtensor(p) for p in params)
    check(mode in ("auto", "autograd", "functional", "fd"), "hvp", "mode", mode, "auto, autograd, functional or fd")
    check(not (sharded and mode == "autograd"), "hvp", "mode", mode, "functional or fd for sharded parameters")
    wanted, found = [tuple(p.shape) for p in params], [tuple(v.shape) for v in vec]
    check(found == wanted, "hvp", "the shapes of vec", found, f"those of the parameters, {wanted}")
    alike = all(is_dtensor(v) == is_dtensor(p) for v, p in zip(vec, params, strict=True))
    check(alike, "hvp", "the types of vec", [type(v).__name__ for v in vec], "DTensors where the parameters are")
    group = group_of(model, group)
    once = _several(group) and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if mode == "auto":
        large = sharded and sum(p.numel() for p in params) > LARGE
        mode = "fd" if large or once else "functional" if sharded else "autograd"
    check(not once or mode == "fd", "hvp", "mode", mode, "fd or auto with torch.nn.SyncBatchNorm on several ranks")
    return params, mode, group


# Exact -------------------------------------------------------------------------------------------------------------------


def _of_own_loss(model: nn.Module, loss_fn: Loss, batch: Any, vec: Sequence[Tensor], share: float) -> list[Tensor]:
    """The product with the Hessian of this rank's part of the loss."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile makes has first derivatives only
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # DDP's hooks know first derivatives only
    params = list(model.parameters())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fast attention, too
        return _twice(loss_fn(model, batch) * share, params, vec)


def _of_shards(model: nn.Module, loss_fn: Loss, batch: Any, vec: Sequence[Tensor], share: float) -> list[Tensor]:
    """The product with the Hessian of the loss of all ranks, for DTensors: on a stand-in with whole parameters.

    The whole ones are gathered from the shards in a differentiable way, whose derivative adds up over the ranks.
    """
    from torch.distributed.tensor import Partial

    params = list(model.parameters())
    leaves = [p.detach().requires_grad_(p.requires_grad) for p in params]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        whole = [
            leaf.full_tensor(grad_placements=[Partial()] * leaf.device_mesh.ndim) if is_dtensor(leaf) else leaf
            for leaf in leaves
        ]
        stand_in = _stand_in(model, dict(zip(params, whole, strict=True)), {})
        return _twice(loss_fn(stand_in, batch) * share, leaves, vec)


def _twice(loss: Tensor, params: Sequence[Tensor], vec: Sequence[Tensor]) -> list[Tensor]:
    """The derivative of <gradient, vec>."""
    free = [(p, v.detach()) for p, v in zip(params, vec, strict=True) if p.requires_grad]
    products: dict[Tensor, Tensor | None] = {}
    grads = torch.autograd.grad(loss, [p for p, _ in free], create_graph=True, allow_unused=True)
    check_twice(grads)
    curved = [(g, v) for g, (_, v) in zip(grads, free, strict=True) if g is not None and g.requires_grad]
    if curved:
        found = torch.autograd.grad(
            [g for g, _ in curved], [p for p, _ in free], [v for _, v in curved], allow_unused=True
        )
        products = {p: product for (p, _), product in zip(free, found, strict=True)}
    return [torch.zeros_like(p) if (product := products.get(p)) is None else product.detach() for p in params]


def _stand_in(module: nn.Module, values: dict[nn.Parameter, Tensor], done: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of *module* that shares all but its parameters, without the hooks of ``fully_shard``."""
    if module in done:
        return done[module]
    sharded = hasattr(type(module), "set_requires_gradient_sync")
    kind = type(module).__bases__[1] if sharded else type(module)  # fully_shard puts its own class in front
    copied: nn.Module = object.__new__(kind)
    done[module] = copied
    copied.__dict__ = dict(module.__dict__)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = module.__dict__[name]
        copied.__dict__[name] = type(hooks)((n, hook) for n, hook in hooks.items() if not _shards(hook))
    copied.__dict__["_buffers"] = dict(module._buffers)
    copied.__dict__["_parameters"] = {n: p if p is None else values[p] for n, p in module._parameters.items()}
    copied.__dict__["_modules"] = {
        n: child if child is None else _stand_in(child, values, done) for n, child in module._modules.items()
    }
    return copied


def _shards(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")


# Finite differences ------------------------------------------------------------------------------------------------------


def _difference(
    model: nn.Module,
    loss_fn: Loss,
    batch: Any,
    vec: Sequence[Tensor],
    share: float,
    eps: float | None,
    group: Any,
    rewind: Any,
) -> list[Tensor]:
    """(g(w + h v) - g(w - h v)) / 2 h."""
    params = list(model.parameters())
    sharded = any(is_dtensor(p) for p in params)
    space = ParamSpace(params, group=group if sharded else None, owner="hvp")
    if eps is None:
        eps = (1e-5 if params[0].dtype == torch.float64 else 1e-3) * max(1.0, float(space.norm(params)))
    check(eps > 0, "hvp", "eps", eps, "> 0")
    free = [p.requires_grad for p in params]
    length = float(space.norm([v if f else torch.zeros_like(v) for v, f in zip(vec, free, strict=True)]))
    if length == 0:
        return [torch.zeros_like(p) for p in params]
    step = eps / length
    own = [to_local(p).clone() for p in params]
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # the difference is added up over the ranks instead of each gradient
    factor = share * (dist.get_world_size(group) if sharded and _several(group) else 1)  # FSDP2 takes means
    sides = []
    try:
        for sign in (1, -1):
            rewind()
            with torch.no_grad():
                for p, w, v, f in zip(params, own, vec, free, strict=True):
                    if f:
                        to_local(p).copy_(w + to_local(v.detach()) * (sign * step))
            for p in params:
                p.grad = None
            with torch.enable_grad():
                (loss_fn(model, batch) * factor).backward()  # type: ignore[no-untyped-call]
            sides.append([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    finally:
        with torch.no_grad():
            for p, w in zip(params, own, strict=True):
                to_local(p).copy_(w)
        for module in sharded_modules(model):
            module.reshard()  # after an exception, whole parameters may be there still
    products = [(ahead - behind).detach() / (2 * step) for ahead, behind in zip(*sides, strict=True)]
    return products if sharded else _summed(products, group)


# Ranks and state ---------------------------------------------------------------------------------------------------------


def _several(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _share(weight: float, params: Sequence[Tensor], group: Any) -> float:
    """This rank's part in the sum of all weights. Collective if there are several ranks."""
    check(weight >= 0, "hvp", "weight", weight, ">= 0")
    if not _several(group):
        return 1.0
    (total,) = _summed([torch.tensor(float(weight), dtype=torch.float64, device=to_local(params[0]).device)], group)
    return weight / total.item()


def _summed(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Collective if there are several ranks: the sums over the ranks, by one all-reduce for each type."""
    if not _several(group):
        return list(tensors)
    sums: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        packed = torch.cat([tensors[i].reshape(-1) for i in same])
        dist.all_reduce(packed, group=group)
        pieces = torch.split(packed, [tensors[i].numel() for i in same])
        sums |= {i: piece.view_as(tensors[i]) for i, piece in zip(same, pieces, strict=True)}
    return [sums[i] for i in range(len(tensors))]


@contextmanager
def _unchanged(model: nn.Module, params: Sequence[Tensor]) -> Iterator[Any]:
    """Afterwards gradients, buffers and random numbers are what they were; yields what makes them so in between."""
    grads, buffers = [p.grad for p in params], list(model.buffers())
    kept = [b.clone() for b in buffers]
    on_gpu = to_local(params[0]).device.type == "cuda"
    random = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None

    def rewind() -> None:
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1])
        with torch.no_grad():
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)

    try:
        yield rewind
    finally:
        rewind()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
