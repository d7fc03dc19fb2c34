"""Symmetric matrices of a network and a loss: how their products with vectors come about, on one batch.

Vectors are lists of tensors like the parameters. Each product is there three times, for the same numbers: with derivatives
along vectors (forward mode), which costs least; with reverse mode only, for networks that have no other; and by torch.autograd,
which everything supports and which cannot be traced. Each runs the network once, but for ``draws_twice``.

Source: B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994; N. Schraudolph, "Fast curvature matrix-vector products
for second-order gradient descent", 2002.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from conjugo._graphs import check_twice

__all__ = ["EmpiricalFisher", "GaussNewton", "Gradients", "Hessian", "Matrix", "MonteCarloFisher"]

Vector: TypeAlias = list[Tensor]
Net: TypeAlias = Callable[[Vector], Any]
"""Outputs for given parameters."""
Loss: TypeAlias = Callable[[Any], Tensor]
"""The loss of given outputs, 0-d."""
Product: TypeAlias = Callable[[Vector], Vector]


class Matrix(ABC):
    """A symmetric matrix A, as products A v."""

    name: str
    draws_twice = False
    """``forward`` runs the network twice, so that random layers differ."""

    @abstractmethod
    def forward(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector: ...

    @abstractmethod
    def reverse(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector: ...

    @abstractmethod
    def by_autograd(self, net: Net, loss: Loss, leaves: Vector) -> Product:
        """*leaves* require gradients."""


class Hessian(Matrix):
    """The second derivatives of the loss."""

    name = "hessian"

    def forward(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector:
        return list(jvp(grad(_composed(net, loss)), (leaves,), (vector,))[1])

    def reverse(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector:
        return list(_vjp(grad(_composed(net, loss)), leaves)[1](vector)[0])

    def by_autograd(self, net: Net, loss: Loss, leaves: Vector) -> Product:
        gradient = torch.autograd.grad(loss(net(leaves)), leaves, create_graph=True, allow_unused=True)
        check_twice(gradient)

        def product(vector: Vector) -> Vector:
            curved = [(g, v) for g, v in zip(gradient, vector, strict=True) if g is not None and g.requires_grad]
            if not curved:
                return [torch.zeros_like(v) for v in vector]
            return _grad([g for g, _ in curved], leaves, [v for _, v in curved])

        return product


class _ThroughOutputs(Matrix):
    """J' B J, with J the derivatives of the outputs, one tensor, and B a matrix in the outputs."""

    draws_twice = True

    @abstractmethod
    def outer(self, loss: Loss, outputs: Tensor, along: Tensor) -> Tensor:
        """B *along*."""

    def forward(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector:
        outputs, back = _vjp(net, leaves)
        along = jvp(net, (leaves,), (vector,))[1]
        return list(back(self.outer(loss, outputs, along))[0])

    def reverse(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector:
        outputs, back = _vjp(net, leaves)
        along = _vjp(lambda weights: back(weights)[0], torch.zeros_like(outputs))[1](vector)[0]
        return list(back(self.outer(loss, outputs, along))[0])

    def by_autograd(self, net: Net, loss: Loss, leaves: Vector) -> Product:
        outputs = net(leaves)
        weights = torch.zeros_like(outputs, requires_grad=True)
        back = _grad([outputs], leaves, [weights], create_graph=True)
        check_twice(back)
        fixed = outputs.detach()

        def product(vector: Vector) -> Vector:
            curved = [(b, v) for b, v in zip(back, vector, strict=True) if b.requires_grad]
            (along,) = _grad([b for b, _ in curved], [weights], [v for _, v in curved])
            return _grad([outputs], leaves, [self.outer(loss, fixed, along)])

        return product


class GaussNewton(_ThroughOutputs):
    """The generalized Gauss-Newton matrix: B is the Hessian of the loss in the outputs."""

    name = "ggn"

    def outer(self, loss: Loss, outputs: Tensor, along: Tensor) -> Tensor:
        found: Tensor = _vjp(grad(loss), outputs)[1](along)[0]
        return found


class EmpiricalFisher(_ThroughOutputs):
    """The mean over examples of l l', with l the gradient of the loss of an example."""

    name = "fisher"

    def __init__(self, *, mean: bool) -> None:
        self._mean = mean

    def outer(self, loss: Loss, outputs: Tensor, along: Tensor) -> Tensor:
        slope = grad(loss)(outputs)
        return _squares(slope, along) * (len(outputs) if self._mean else 1)


class MonteCarloFisher(_ThroughOutputs):
    """The Fisher matrix, its expectation over targets by some that are drawn from the model.

    *loss* is one for each set of targets.
    """

    name = "fisher"

    def __init__(self, *, mean: bool, terms: Callable[[Tensor], int], samples: int) -> None:
        self._mean = mean
        self._terms = terms
        self._samples = samples

    def outer(self, loss: Any, outputs: Tensor, along: Tensor) -> Tensor:
        # A mean over independent terms has the variance of one, divided by their number: its Hessian is that of the mean.
        factor = (self._terms(outputs) if self._mean else 1) / self._samples
        slopes = [grad(lambda at, i=i: loss(at, i))(outputs) for i in range(self._samples)]
        return torch.stack([_squares(slope, along) for slope in slopes]).sum(0) * factor


class Gradients(Matrix):
    """g g', with g the gradient of the loss of a batch."""

    name = "gradient_covariance"

    def forward(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector:
        return self.reverse(net, loss, leaves, vector)

    def reverse(self, net: Net, loss: Loss, leaves: Vector, vector: Vector) -> Vector:
        return self._product(list(grad(_composed(net, loss))(leaves)), vector)

    def by_autograd(self, net: Net, loss: Loss, leaves: Vector) -> Product:
        gradient = _grad([loss(net(leaves))], leaves, None)
        return lambda vector: self._product(gradient, vector)

    @staticmethod
    def _product(gradient: Vector, vector: Vector) -> Vector:
        along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
        return [g * along for g in gradient]


def _composed(net: Net, loss: Loss) -> Callable[[Vector], Tensor]:
    return lambda at: loss(net(at))


def _vjp(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The function there, and the map that takes weights of its results back to its argument, in a tuple."""
    value, back = vjp(function, at)[:2]
    return value, back


def _squares(slope: Tensor, along: Tensor) -> Tensor:
    """s (s' a) for each example, the first dimension."""
    return slope * (slope * along).flatten(1).sum(1).view(-1, *[1] * (slope.ndim - 1))


def _grad(outputs: Vector, inputs: Vector, vector: Vector | None, *, create_graph: bool = False) -> Vector:
    found = torch.autograd.grad(
        outputs, inputs, vector, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return list(found)
