"""A function that is linear in some of its tensors, traced once and cut into what depends on these and what does not.

The product of a network's Hessian with a vector is such a function. What does not depend on the vector, most of a forward and a
backward pass, is computed once for each batch and kept; what does is a straight list of tensor operations, which runs without
autograd and is simplified first.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["Linearized", "available_memory", "keep_freed_memory"]

aten: Any = torch.ops.aten

Constants = list[Any]
"""What a batch contributes that does not depend on the vectors: mostly tensors."""

_NO_CHANGE = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
_SAME_SHAPE = {aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_LINEAR = {
    *(aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.sum.dim_IntList, aten.sum.default, aten.gather.default),
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.clone.default),
    *(aten.t.default, aten.transpose.int, aten.permute.default, aten._to_copy.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int),
    *(aten.slice_backward.default, aten.select_backward.default),
}
"""Operations that make zeros of zeros in their first argument."""
_PRODUCTS = {aten.mul.Tensor, aten.mm.default, aten.bmm.default}
"""Operations that make zeros of zeros in either of two arguments."""
_DECOMPOSED: Any = {aten._efficientzerotensor.default: torch.zeros}
"""Arithmetic with tensors that have no memory, which forward mode makes of absent derivatives, ends traces in a segmentation
fault (torch 2.13: mul.Scalar)."""
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.neg.default: aten.neg_.default,
    aten.div.Tensor: aten.div_.Tensor,
}


class Linearized:
    """``function(constants, vectors)``, two lists of tensors, as traced for the shapes and strides of the given ones.

    *function* gives a list of tensors, is linear in *vectors* and otherwise arbitrary, and must not depend on values of tensors
    in Python. Raises what the tracing raises.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
        constants: Sequence[Tensor],
        vectors: Sequence[Tensor],
    ) -> None:
        traced = make_fx(functionalize(function), _DECOMPOSED)(list(constants), list(vectors))
        graph = traced.graph
        self.random = any(_is_random(node) for node in graph.nodes)
        """Whether the function draws random numbers."""
        _simplify(graph)
        self._first, self._second = _split(traced, len(constants))

    def constants(self, given: Sequence[Tensor]) -> Constants:
        """What need not be computed for each vector."""
        with torch.no_grad():
            found: Constants = self._first(*given)
        return found

    def __call__(self, constants: Constants, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The function at *vectors*, with what :meth:`constants` gave."""
        with torch.no_grad():
            found: list[Tensor] = self._second(*constants, *vectors)
        return found


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _meta(node: Any) -> tuple[Any, ...] | None:
    """Shape, strides, type and device of what a node makes, where that is one tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _like(node: fx.Node, other: Any) -> bool:
    """Whether both make tensors of one type and device."""
    mine, others = _meta(node), _meta(other)
    return mine is not None and others is not None and mine[2:] == others[2:]


def _simplify(graph: fx.Graph) -> None:
    """Drop what changes nothing, what is computed twice and sums with zeros."""
    zeros: set[fx.Node] = set()
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        target, source = node.target, node.args[0] if node.args else None
        same: Any = None
        if target in _NO_CHANGE or (target in _SAME_SHAPE and _meta(node) == _meta(source) is not None):
            same = source
        elif target is aten._to_copy.default and _meta(node) == _meta(source) is not None:
            same = None if node.kwargs.get("memory_format") not in (None, torch.preserve_format) else source
        elif target in _SUMS and not node.kwargs:
            left, right = node.args[:2]
            if right in zeros and _meta(node) == _meta(left):
                same = left
            elif left in zeros and target is aten.add.Tensor and _meta(node) == _meta(right):
                same = right
            elif target is aten.add.Tensor and (left in zeros or right in zeros):
                other = right if left in zeros else left
                if _like(node, other):
                    with graph.inserting_before(node):
                        same = graph.call_function(aten.expand.default, (other, list(node.meta["val"].shape)))
                    same.meta = dict(node.meta)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            continue
        first = [target in _ZEROS, target in _LINEAR and source in zeros]
        either = target in _PRODUCTS and any(argument in zeros for argument in node.args)
        both = target in _SUMS and all(argument in zeros for argument in node.args[:2])
        if any(first) or either or both:
            zeros.add(node)
        if _is_random(node) or not isinstance(target, torch._ops.OpOverload | type(operator.getitem)):
            continue
        key = _key(node)
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            zeros.discard(node)
        elif key is not None:
            seen[key] = node
    graph.eliminate_dead_code()


def _key(node: fx.Node) -> Any:
    def frozen(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(frozen(item) for item in value)
        if isinstance(value, dict):
            return tuple((name, frozen(item)) for name, item in sorted(value.items()))
        return (type(value), value)

    key = (node.target, frozen(node.args), frozen(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _split(traced: fx.GraphModule, n: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph cut in two: what depends on the first *n* inputs only, and the rest."""
    nodes = list(traced.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    (output,) = (node for node in nodes if node.op == "output")
    moving = set(inputs[n:])
    for node in nodes:
        if any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    # An operation of the first part with several results crosses as the results that are needed.
    crossing = [
        node
        for node in nodes
        if node not in moving and node.op != "get_attr" and any(user in moving or user is output for user in node.users)
    ]
    first, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        if node in inputs[:n] or (node not in moving and node.op not in ("placeholder", "output")):
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output([copies[node] for node in crossing])
    first.eliminate_dead_code()
    second, moved = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, node in enumerate(crossing):
        moved[node] = second.placeholder(f"constant_{i}")
        moved[node].meta = dict(node.meta)
    for node in nodes:
        if node in inputs[n:] or node.op == "get_attr" or (node in moving and node.op not in ("placeholder", "output")):
            moved[node] = second.node_copy(node, moved.__getitem__)
    second.output(fx.map_arg(output.args[0], moved.__getitem__))
    second.eliminate_dead_code()
    _accumulate(second)
    return fx.GraphModule(traced, first), fx.GraphModule(traced, second)


def _accumulate(graph: fx.Graph) -> None:
    """Write results over operands that nothing else needs."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
            for total, product in (node.args, node.args[::-1]):
                matrices = getattr(product, "target", None) is aten.mm.default and len(product.users) == 1
                if matrices and total is not product and _like(product, total) and _meta(product) == _meta(node):
                    over = _own(total) and _meta(total) == _meta(node)
                    with graph.inserting_before(node):
                        into = aten.addmm_.default if over else aten.addmm.default
                        fused = graph.call_function(into, (total, *product.args))
                    fused.meta = dict(node.meta)
                    node.replace_all_uses_with(fused)
                    graph.erase_node(node)
                    graph.erase_node(product)
                    break
            else:
                if not _own(node.args[0]) and _own(node.args[1]):
                    node.args = node.args[::-1]
        if node.target in _IN_PLACE and _own(node.args[0]) and _meta(node.args[0]) == _meta(node) is not None:
            rest = node.args[1:]
            if node.args[0] not in rest:
                node.target = _IN_PLACE[node.target]


def _own(node: Any) -> bool:
    """Whether a node makes memory of its own, which one other node reads."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.users) != 1:
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target is aten._unsafe_view.default:
        return False
    if target in _IN_PLACE.values() or target is aten.addmm_.default:
        return True
    return all(value.alias_info is None for value in target._schema.returns) and target is not aten._to_copy.default


def available_memory(device: torch.device) -> int:
    """Bytes on *device* that could be had now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**32
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            group = Path("/sys/fs/cgroup")
            free = min(free, int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 0)


@functools.cache
def keep_freed_memory(device: torch.device) -> None:
    """Have large temporary tensors on the CPU reuse memory, where the C library would give it back to the system each time.

    glibc takes a block from the system when it is larger than any that was freed before, up to 32 MiB; after that from its
    own. Taking such blocks anew costs a page fault for 4 KiB, as much as the arithmetic on them.
    """
    if device.type == "cpu":
        for _ in range(2):
            torch.empty(2**25 - 2**14, dtype=torch.uint8).fill_(0)
