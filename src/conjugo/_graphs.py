"""What autograd keeps of a computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["check_twice", "graph"]


def graph(results: Iterable[Tensor | None]) -> Iterator[Any]:
    """The nodes of the graph that autograd keeps for *results*."""
    seen: set[Any] = set()
    waiting: list[Any] = [x.grad_fn for x in results if x is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


def check_twice(gradient: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError if an operation forbids the derivative of its backward.

    Asked for the gradient of chosen inputs, torch takes that derivative for zero in silence (seen in 2.13).
    """
    if any(node.name() == "torch::autograd::Error" for node in graph(gradient)):
        raise RuntimeError("an operation is marked with once_differentiable: it has no second derivatives")
