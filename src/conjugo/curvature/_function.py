"""A model and a loss as a function of some parameters, on one batch at a time, which leaves the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from conjugo._graphs import graph
from conjugo.curvature._batches import Batch, tensors
from conjugo.curvature._linearized import Linearized
from conjugo.curvature._matrices import Matrix, Product, Vector
from conjugo.errors import check

__all__ = ["Function", "LossFn", "shapes"]

LossFn: TypeAlias = Callable[[Any, Any], Tensor]

AGREE = {torch.float32: 1e-3, torch.float64: 1e-9}
"""How far, relatively, a traced product may be from that by autograd."""


def shapes(batch: Batch) -> Any:
    """What must be the same in two batches for one traced function to serve both."""
    leaves, structure = tree_flatten(batch)
    kinds = tuple((tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
    return kinds, structure


class Function:
    """``loss_fn(model(inputs), targets)`` of the parameters *names*, computed in *dtype*.

    modes: training or evaluation, for each module. seed: of what the model draws at random, together with the number of the
    batch. Instead of targets there may be a list of several.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        names: tuple[str, ...],
        modes: Mapping[nn.Module, bool],
        *,
        dtype: torch.dtype,
        seed: int,
        owner: str,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._names = names
        self._modes = modes
        self._dtype = dtype
        self._seed = seed
        self._owner = owner

    def version(self) -> tuple[Any, ...]:
        """Another one when a parameter or buffer has changed."""
        return tuple((id(x), x.data_ptr(), x._version) for x in self._tensors().values())

    def parameters(self) -> Vector:
        """The parameters now, without gradients; on the memory of the model where the type is the same."""
        named = dict(self._model.named_parameters())
        return [named[name].detach().to(self._dtype) for name in self._names]

    def outputs(self, i: int, batch: Batch) -> Any:
        """The outputs of the model for batch *i*, without gradients."""
        with torch.no_grad(), self._as_asked(i):
            return self._run(self.parameters(), self._rest(), batch[0])

    def loss(self, i: int, batch: Batch, parameters: Vector) -> Tensor:
        """The loss of batch *i*. Raises ValueError unless that is one number, FloatingPointError unless it is finite."""
        with self._as_asked(i):
            found = self._loss_fn(self._run(parameters, self._rest(), batch[0]), batch[1])
        self._check(found, i)
        return found

    def constants(self, traced: Linearized, i: int, batch: Batch) -> list[Any]:
        """What *traced* needs of batch *i*."""
        with self._as_asked(i):
            return traced.constants(self._flat(batch))

    def by_autograd(self, matrix: Matrix, i: int, batch: Batch) -> Product:
        """Products with *matrix* on batch *i*; keeps the graph of the network.

        Raises what :meth:`loss` raises, and RuntimeError if the network cannot be differentiated twice.
        """
        leaves = [p.clone().requires_grad_() for p in self.parameters()]
        rest = self._rest()
        outputs: list[Any] = []

        def net(at: Vector) -> Any:
            outputs.append(self._run(at, rest, batch[0]))
            return outputs[-1]

        with self._as_asked(i), torch.enable_grad(), self._explained(outputs):
            product = matrix.by_autograd(net, self._loss_of(batch[1], i), leaves)

        def careful(vector: Vector) -> Vector:
            with self._explained(outputs):
                return [found.detach() for found in product(vector)]

        return careful

    def trace(self, matrix: Matrix, i: int, batch: Batch) -> tuple[Linearized | None, str]:
        """Products with *matrix* on batches like batch *i*, traced and compared; or None, and why not."""
        generator = torch.Generator().manual_seed(self._seed)
        vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in self.parameters()]
        reference = self.by_autograd(matrix, i, batch)(vector)
        _, structure = tree_flatten(batch)
        reason = ""
        for product in (matrix.forward, matrix.reverse):
            try:
                with self._as_asked(i):
                    traced = Linearized(self._flattened(product, structure), self._flat(batch), vector)
                if traced.random and matrix.draws_twice and product == matrix.forward:
                    continue
                found = traced(self.constants(traced, i, batch), vector)
            except Exception as error:  # what tracing raises is of any kind
                reason = f"{type(error).__name__}: {error}"
                continue
            off = torch.stack([(f - r).norm() for f, r in zip(found, reference, strict=True)]).norm()
            size = torch.stack([r.norm() for r in reference]).norm()
            if bool(off <= AGREE[self._dtype] * size):
                return traced, ""
            reason = f"the traced product differs by {float(off / size):.2g}"
        return None, reason

    # Inside ----------------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _rest(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers."""
        rest = {name: x.detach() for name, x in self._tensors().items() if name not in self._names}
        return {name: x.to(self._dtype) if x.is_floating_point() else x for name, x in rest.items()}

    def _run(self, parameters: Vector, rest: Mapping[str, Tensor], inputs: Any) -> Any:
        # Buffers are cloned, as batch norm writes to them.
        values = {**{name: x.clone() for name, x in rest.items()}, **dict(zip(self._names, parameters, strict=True))}
        return functional_call(self._model, values, (inputs,))

    def _loss_of(self, targets: Any, i: int | None = None) -> Callable[..., Tensor]:
        """The loss of outputs, and the number of the targets where there are several; checked as that of batch *i*."""

        def loss(outputs: Any, sample: int | None = None) -> Tensor:
            found = self._loss_fn(outputs, targets if sample is None else targets[sample])
            if i is not None:
                self._check(found, i)
            return found

        return loss

    def _check(self, loss: Tensor, i: int) -> None:
        check(loss.ndim == 0, self._owner, "the shape of the loss", tuple(loss.shape), "(), one number")
        # Inside transforms of torch.func numbers cannot be looked at.
        if not torch._C._functorch.is_functorch_wrapped_tensor(loss) and not torch.isfinite(loss):
            raise FloatingPointError(f"{self._owner}: the loss of batch {i} is {loss.item()}")

    def _flat(self, batch: Batch) -> Vector:
        """All that products depend on besides the vector, as a list."""
        return [*self.parameters(), *self._rest().values(), *tensors(list(batch))]

    def _flattened(self, product: Callable[..., Vector], structure: Any) -> Callable[[Vector, Vector], Vector]:
        """A product of `Matrix` as a function of :meth:`_flat` and a vector."""

        def function(constants: Vector, vector: Vector) -> Vector:
            leaves, rest, (inputs, targets) = self._nested(constants, structure)
            return product(lambda at: self._run(at, rest, inputs), self._loss_of(targets), leaves, vector)

        return function

    def _nested(self, flat: Vector, structure: Any) -> tuple[Vector, dict[str, Tensor], Batch]:
        rest = list(self._rest())
        first, second = len(self._names), len(self._names) + len(rest)
        return flat[:first], dict(zip(rest, flat[first:second], strict=True)), tree_unflatten(flat[second:], structure)

    @contextmanager
    def _as_asked(self, i: int) -> Iterator[None]:
        """Modules in the modes asked for, the random numbers of batch *i*, and operations that have second derivatives."""
        before = {module: module.training for module in self._modes}
        device = self._model.get_parameter(self._names[0]).device
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            for module, mode in self._modes.items():
                module.training = mode
            torch.backends.mha.set_fastpath_enabled(False)
            with (
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                torch.autocast(device.type, enabled=False),
                sdpa_kernel(SDPBackend.MATH),
            ):
                torch.manual_seed(self._seed + i)
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in before.items():
                module.training = mode

    @contextmanager
    def _explained(self, outputs: list[Any]) -> Iterator[None]:
        """An error that says that something cannot be differentiated names what."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if not any(sign in text for sign in ("differentia", "derivative", "double backward", "setup_context")):
                raise
            kinds = {type(node) for node in graph(tensors(outputs))}
            own = [kind.__name__ for kind in kinds if issubclass(kind, torch.autograd.function.BackwardCFunction)]
            custom = ", ".join(sorted(name.removesuffix("Backward") for name in own))
            hint = f" (operations with a backward of their own: {custom})" if custom else ""
            raise RuntimeError(f"{self._owner}: the network cannot be differentiated twice{hint}: {text}") from error
