"""Curvature matrices of a network's loss over a data set, as operators.

A product adds up those of the batches, exactly, and on several ranks those of the ranks; the model is never changed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from conjugo._space import is_dtensor
from conjugo.curvature._batches import Batch, Batches, Data, tensors
from conjugo.curvature._function import Function, LossFn, shapes
from conjugo.curvature._linearized import Linearized, available_memory, keep_freed_memory
from conjugo.curvature._matrices import (
    EmpiricalFisher,
    GaussNewton,
    Gradients,
    Hessian,
    Matrix,
    MonteCarloFisher,
    Product,
    Vector,
)
from conjugo.curvature.operator import Operator
from conjugo.errors import check

__all__ = [
    "BatchNormMode",
    "Cache",
    "FisherKind",
    "Likelihood",
    "Method",
    "NetworkOperator",
    "Options",
    "Reduction",
    "fisher",
    "ggn",
    "gradient_covariance",
    "hessian",
]

BatchNormMode: TypeAlias = Literal["as_is", "train", "eval"]
Cache: TypeAlias = Literal["auto", True, False]
FisherKind: TypeAlias = Literal["mc", "empirical"]
Likelihood: TypeAlias = Literal["auto", "categorical", "bernoulli", "normal"]
Method: TypeAlias = Literal["auto", "linearized", "autograd"]
Reduction: TypeAlias = Literal["mean", "sum"]


class Options(TypedDict, total=False):
    """Keyword arguments of :func:`hessian`, which its relatives take as well."""

    weight_decay: float
    reduction: Reduction
    bn_mode: BatchNormMode
    method: Method
    cache: Cache
    dtype: torch.dtype | None
    seed: int
    process_group: Any


SHARE = 0.25
"""Of the memory that is available when an operator is made, how much ``cache="auto"`` takes at most."""

ROWS = 8
"""Vectors for which a batch is prepared at once, where it is not kept prepared."""


class NetworkOperator(Operator):
    """A curvature matrix of a model, a loss and data; made by :func:`hessian`, :func:`ggn`, :func:`fisher` and
    :func:`gradient_covariance`.

    Its products are those at the values that parameters and buffers have when they are asked for, with all modules in the modes
    (training or evaluation) that they had when the operator was made.
    """

    def __init__(
        self,
        matrix: Matrix,
        model: nn.Module,
        loss_fn: LossFn,
        data: Data,
        params: str | None,
        *,
        weight_decay: float,
        reduction: Reduction,
        bn_mode: BatchNormMode,
        method: Method,
        cache: Cache,
        dtype: torch.dtype | None,
        seed: int,
        process_group: Any,
        targets: Callable[[Any, torch.Generator], Any] | None = None,
        batches: Batches | None = None,
    ) -> None:
        made_of = {name: value for name, value in locals().items() if name not in ("self", "__class__", "batches")}
        self._made_of = made_of
        owner = self.kind = matrix.name
        """hessian, ggn, fisher or gradient_covariance."""
        model = getattr(model, "_orig_mod", model)  # what torch.compile makes has first derivatives only
        if isinstance(model, nn.parallel.DistributedDataParallel):
            process_group = model.process_group if process_group is None else process_group
            model = model.module
        named = dict(model.named_parameters())
        sharded = any(is_dtensor(p) for p in named.values())
        check(
            not sharded, owner, "the parameters", "sharded ones", "whole: load their full_tensor() into a plain model"
        )
        trainable = [name for name, p in named.items() if p.requires_grad]
        check(len(trainable) > 0, owner, "the number of trainable parameters", 0, "at least 1")
        chosen = [name for name in trainable if params is None or re.search(params, name)]
        check(len(chosen) > 0, owner, "params", params, f"a pattern that one of {trainable} contains")
        for argument, value, accepted in (
            ("bn_mode", bn_mode, get_args(BatchNormMode)),
            ("method", method, get_args(Method)),
            ("reduction", reduction, get_args(Reduction)),
            ("cache", cache, get_args(Cache)),
        ):
            choices = [str(choice) for choice in accepted]
            check(value in accepted, owner, argument, value, f"{', '.join(choices[:-1])} or {choices[-1]}")
        check(weight_decay >= 0, owner, "weight_decay", weight_decay, ">= 0")
        devices = {str(named[name].device) for name in chosen}
        check(len(devices) == 1, owner, "the devices of the parameters", devices, "one")
        types = {named[name].dtype for name in chosen} if dtype is None else {dtype}
        check(len(types) == 1, owner, "the types of the parameters", types, "one, or dtype given")
        (kind,) = types
        check(kind in (torch.float32, torch.float64), owner, "dtype", kind, "float32 or float64")
        super().__init__(sum(named[name].numel() for name in chosen), kind, named[chosen[0]].device)
        self.names = tuple(chosen)
        """The parameters, in the order of their places in a vector."""
        self._shapes = [named[name].shape for name in chosen]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.bn_mode = bn_mode
        self.fallback = ""
        """Why products are not traced, if they should be and are not."""
        modes = {module: module.training for module in model.modules()}
        if bn_mode != "as_is":
            modes |= {module: bn_mode == "train" for module in modes if isinstance(module, _BatchNorm)}
        self._function = Function(model, loss_fn, self.names, modes, dtype=kind, seed=seed, owner=owner)
        self._matrix = matrix
        self._mean = reduction == "mean"
        self._weight_decay = weight_decay
        self._method = method
        self._seed = seed
        self._targets = targets
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1
        self.group = (process_group or dist.group.WORLD) if several else None
        if batches is None:
            batches = Batches(data, owner, device=self.device, dtype=self.dtype, seed=seed)
        self._batches = batches
        totals = torch.tensor([sum(batches.sizes), len(batches)], dtype=torch.float64, device=self.device)
        self.n_examples, self.n_batches = (int(total) for total in self._summed(totals).tolist())
        """Examples, and batches, of all ranks."""
        check(self.n_examples > 0, owner, "the number of examples", self.n_examples, "at least 1")
        self._budget = available_memory(self.device) * SHARE if cache == "auto" else math.inf if cache else 0.0
        self._drawn: dict[int, Any] = {}
        self._traced: dict[Any, Linearized | None] = {}
        self._prepared: dict[int, Product] = {}
        self._bytes = 0
        self._version: Any = None

    # What is asked of it ---------------------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """How products came about so far: ``"linearized"`` or ``"autograd"``."""
        return "autograd" if self._method == "autograd" or None in self._traced.values() else "linearized"

    @property
    def cached(self) -> bool:
        """Whether all batches are kept prepared: a product neither reads data nor runs the network forward then."""
        return 0 < len(self._prepared) == len(self._batches)

    @property
    def rows_at_once(self) -> int:
        """How many vectors to ask for the products of at once."""
        return 1 if self.cached else ROWS

    def block(self, params: str) -> NetworkOperator:
        """The block of those of its parameters whose names contain the regular expression *params*."""
        inside = [name for name in self.names if re.search(params, name)]
        check(len(inside) > 0, self.kind, "params", params, f"a pattern that one of {list(self.names)} contains")
        pattern = "|".join(f"^{re.escape(name)}$" for name in inside)
        return NetworkOperator(**{**self._made_of, "params": pattern}, batches=self._batches)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector [P], by the names of the parameters and in their shapes; views of it."""
        self._check(vector, (self.size,), f"({self.size},)")
        return dict(zip(self.names, self._pieces(vector), strict=True))

    def loss(self) -> float:
        """The loss over all data, without weight decay. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        parameters = self._function.parameters()
        with torch.no_grad():
            for i, batch in enumerate(self._batches):
                total += self._function.loss(i, batch, parameters).double() * self._weight(i)
        return float(self._summed(total))

    def gradient(self) -> Tensor:
        """The gradient [P] of the loss, with weight decay. Collective."""
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        pieces = self._pieces(total)
        for i, batch in enumerate(self._batches):
            leaves = [p.clone().requires_grad_() for p in self._function.parameters()]
            with torch.enable_grad():
                loss = self._function.loss(i, batch, leaves)
                found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(pieces, list(found), alpha=self._weight(i))
        self._summed(total)
        if self._weight_decay:
            torch._foreach_add_(pieces, self._function.parameters(), alpha=self._weight_decay)
        return total

    # Products --------------------------------------------------------------------------------------------------------------

    def _products(self, vectors: Tensor) -> Tensor:
        version = self._function.version()
        if version != self._version:
            self._prepared.clear()
            self._drawn.clear()
            self._bytes, self._version = 0, version
        total = torch.zeros_like(vectors)
        pairs = [(self._pieces(row), self._pieces(vector)) for row, vector in zip(total, vectors, strict=True)]
        for i, product in self._maps():
            for row, vector in pairs:
                torch._foreach_add_(row, product(vector), alpha=self._share(i))
        self._summed(total)
        if not bool(torch.isfinite(total.sum())):
            self._blame()
        return total.add_(vectors, alpha=self._weight_decay) if self._weight_decay else total

    def _blame(self) -> None:
        """Raise FloatingPointError, with the batch whose loss is not finite if there is one. Collective."""
        error = FloatingPointError(f"{self.kind}: a product is not finite, though the loss is")
        parameters = self._function.parameters()
        mine = False
        try:
            with torch.no_grad():
                for i, batch in enumerate(self._batches):
                    self._function.loss(i, batch, parameters)
        except FloatingPointError as found:
            error, mine = found, True
        if float(self._summed(torch.tensor(float(mine), device=self.device))) and not mine:
            error = FloatingPointError(f"{self.kind}: a loss on another rank is not finite")
        raise error

    def _maps(self) -> Iterator[tuple[int, Product]]:
        """Of each batch, how its part of a product is made."""
        if self.cached:
            yield from self._prepared.items()
            return
        for i, batch in enumerate(self._batches):
            ready = self._prepared.get(i)
            yield i, self._prepare(i, batch) if ready is None else ready

    def _prepare(self, i: int, batch: Batch) -> Product:
        if self._targets is not None:
            if i not in self._drawn:
                generator = torch.Generator(self.device).manual_seed(self._seed + i)
                self._drawn[i] = self._targets(self._function.outputs(i, batch), generator)
            batch = batch[0], self._drawn[i]
        key = shapes(batch)
        if key not in self._traced:
            self._traced[key] = None if self._method == "autograd" else self._trace(i, batch)
        traced = self._traced[key]
        if traced is None:
            return self._function.by_autograd(self._matrix, i, batch)
        constants = self._function.constants(traced, i, batch)

        def product(vector: Vector) -> Vector:
            return traced(constants, vector)

        size = self._size(constants)
        if self._bytes + size <= self._budget:
            self._prepared[i] = product
            self._bytes += size
        return product

    def _trace(self, i: int, batch: Batch) -> Linearized | None:
        keep_freed_memory(self.device)
        traced, self.fallback = self._function.trace(self._matrix, i, batch)
        if traced is None and self._method == "linearized":
            raise RuntimeError(f"{self.kind}: the products cannot be traced, choose method 'auto': {self.fallback}")
        return traced

    def _size(self, constants: list[Any]) -> int:
        """Bytes that *constants* take besides the model."""
        memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(constants)}
        for x in self._function.parameters():
            memory.pop(x.untyped_storage().data_ptr(), None)
        return sum(memory.values())

    def _weight(self, i: int) -> float:
        """The weight of batch *i* in the loss."""
        return self._batches.sizes[i] / self.n_examples if self._mean else 1.0

    def _share(self, i: int) -> float:
        """The weight of batch *i* in the matrix."""
        return 1 / self.n_batches if isinstance(self._matrix, Gradients) else self._weight(i)

    def _pieces(self, vector: Tensor) -> Vector:
        """The parts of a vector [P], in the shapes of the parameters; views of it."""
        parts = torch.split(vector, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _summed(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


def hessian(
    model: nn.Module,
    loss_fn: LossFn,
    data: Data,
    params: str | None = None,
    *,
    weight_decay: float = 0.0,
    reduction: Reduction = "mean",
    bn_mode: BatchNormMode = "as_is",
    method: Method = "auto",
    cache: Cache = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    process_group: Any = None,
) -> NetworkOperator:
    """H = sum_b (n_b / N) H_b (+ weight_decay I): the Hessian of the mean loss over all N examples, n_b of them in batch b.

    Args:
        model: plain or DDP, with whole parameters. Neither its parameters, gradients, buffers and modes nor the random numbers
            of the process change.
        loss_fn: ``loss_fn(model(inputs), targets)``, the loss of a batch, 0-d.
        data: ``(inputs, targets)``, or batches of these that can be read many times, such as a list or a DataLoader; tensors,
            or lists and dictionaries of tensors, with the examples first. A loader that shuffles or augments gives the same
            in each pass. Of several ranks, each its own.
        params: a regular expression; the block of those trainable parameters whose names contain it. None: all.
        weight_decay: >= 0; what it adds to the loss is weight_decay |w|^2 / 2.
        reduction: what *loss_fn* does over a batch. ``"sum"``: the losses of batches are added up, H is N times as large.
        bn_mode: batch norm with the statistics of the batch (``"train"``, through which derivatives are taken), with running
            ones (``"eval"``), or as each module is set now. These are two functions, with two Hessians; in ``"train"`` the
            Hessian depends on how the data is cut into batches.
        method: ``"linearized"``: the derivative of the gradient along a vector is traced once for each shape of batch, cut into
            what depends on the vector and what does not, simplified, and compared once with what autograd gives.
            ``"autograd"``: a new graph for each batch, and a second backward pass. ``"auto"``: the first, where a network can
            be traced (control flow that depends on numbers cannot), else the second, and ``fallback`` of the operator says why.
        cache: keep for each batch what does not depend on the vector, mostly activations: as many batches as fit into a quarter
            of the memory that is available now (``"auto"``), all (True) or none (False).
        dtype: float32 or float64, in which parameters, buffers and floating-point data are taken. None: that of the parameters.
        seed: of the random numbers that layers such as dropout and loaders draw: the same in each product, so that H is one
            matrix.
        process_group: the ranks that see different data; None: those of DDP, else all, if torch.distributed is initialised.

    Raises:
        ValueError: no trainable parameter, none that *params* names, no data, data that can be read only once or that is
            another in a second pass, a loss that is not one number.
        FloatingPointError: in a product, the loss of a batch is not finite.
        RuntimeError: in a product, the network cannot be differentiated twice, or with ``method="linearized"`` not be traced.

    Source: B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> H = hessian(model, torch.nn.functional.mse_loss, (torch.eye(2), torch.zeros(2, 1)))
    >>> H @ torch.tensor([1.0, 3.0])
    tensor([1., 3.])
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "loss_fn", "data", "params")}
    return NetworkOperator(Hessian(), model, loss_fn, data, params, **given)


def ggn(
    model: nn.Module, loss_fn: LossFn, data: Data, params: str | None = None, **options: Unpack[Options]
) -> NetworkOperator:
    """The generalized Gauss-Newton matrix sum_b (n_b / N) J_b' B_b J_b (+ weight_decay I), with J the derivatives of the
    outputs of the model, one tensor, and B the Hessian of the loss in the outputs.

    It is positive semi-definite where the loss is convex in the outputs, and the Fisher matrix for cross entropy. Products take
    two thirds of the time of those with the Hessian, which equals it where the model is linear. Arguments and exceptions are
    those of :func:`hessian`.

    Source: N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> G = ggn(model, torch.nn.functional.mse_loss, (torch.eye(2), torch.zeros(2, 1)))
    >>> G @ torch.tensor([1.0, 3.0])
    tensor([1., 3.])
    """
    return NetworkOperator(GaussNewton(), model, loss_fn, data, params, **_options(options, "ggn"))


def fisher(
    model: nn.Module,
    loss_fn: LossFn,
    data: Data,
    params: str | None = None,
    *,
    kind: FisherKind = "mc",
    likelihood: Likelihood = "auto",
    mc_samples: int = 1,
    **options: Unpack[Options],
) -> NetworkOperator:
    """The Fisher matrix, the mean over examples of E[g g'] with g the gradient of the log-likelihood of an example.

    kind: ``"mc"``: targets are drawn from the model, *mc_samples* >= 1 for each example, the same ones in each product.
    ``"empirical"``: g is the gradient of the loss of an example with its given target; another matrix, whatever its name.
    likelihood: of which *loss_fn* is the negative logarithm: ``"categorical"`` (cross entropy), ``"bernoulli"`` (binary cross
    entropy with logits) or ``"normal"`` (squared error; its variance is 1/2, so that all three agree with :func:`ggn` on
    average); ``"auto"``: as torch's losses of these names say. For kind ``"mc"`` only.

    The outputs of the model are one tensor, and the loss adds up, or averages, over the examples, its first dimension. All
    other arguments and the exceptions are those of :func:`hessian`, but there is no weight decay.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> F = fisher(model, torch.nn.functional.mse_loss, (torch.eye(2), torch.ones(2, 1)), kind="empirical")
    >>> F @ torch.tensor([1.0, 3.0])
    tensor([2., 6.])
    """
    owner = "fisher"
    check(kind in get_args(FisherKind), owner, "kind", kind, "mc or empirical")
    check(likelihood in get_args(Likelihood), owner, "likelihood", likelihood, "auto, categorical, bernoulli or normal")
    check(mc_samples >= 1, owner, "mc_samples", mc_samples, ">= 1")
    check("weight_decay" not in options, owner, "weight_decay", options.get("weight_decay"), "left out")
    given = _options(options, owner)
    mean = given["reduction"] == "mean"
    if kind == "empirical":
        return NetworkOperator(EmpiricalFisher(mean=mean), model, loss_fn, data, params, **given)
    law = _likelihood(loss_fn) if likelihood == "auto" else likelihood
    check(
        law is not None,
        owner,
        "likelihood",
        likelihood,
        "categorical, bernoulli or normal for a loss that is not torch's",
    )

    def targets(outputs: Any, generator: torch.Generator) -> list[Tensor]:
        check(isinstance(outputs, Tensor), owner, "the outputs of the model", type(outputs).__name__, "one tensor")
        return [_draw(law, outputs, generator) for _ in range(mc_samples)]

    terms = (lambda outputs: outputs.numel() // outputs.shape[1]) if law == "categorical" else Tensor.numel
    matrix = MonteCarloFisher(mean=mean, terms=terms, samples=mc_samples)
    return NetworkOperator(matrix, model, loss_fn, data, params, targets=targets, **given)


def gradient_covariance(
    model: nn.Module, loss_fn: LossFn, data: Data, params: str | None = None, **options: Unpack[Options]
) -> NetworkOperator:
    """(1 / B) sum_b g_b g_b' of the gradients g_b of the B batches: their covariance, but for the mean gradient.

    Its rank is at most B. Arguments and exceptions are those of :func:`hessian`, but there is no weight decay; with
    ``cache``, the gradients are kept.

    Source: the matrix that Ghorbani, Krishnan & Xiao 2019 (arXiv:1901.10159) compare with the Hessian.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> batches = [(torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)), (torch.tensor([[0.0, 1.0]]), torch.ones(1, 1))]
    >>> gradient_covariance(model, torch.nn.functional.mse_loss, batches) @ torch.tensor([1.0, 3.0])
    tensor([2., 6.])
    """
    owner = "gradient_covariance"
    check("weight_decay" not in options, owner, "weight_decay", options.get("weight_decay"), "left out")
    return NetworkOperator(Gradients(), model, loss_fn, data, params, **_options(options, owner))


def _options(given: Options, owner: str) -> dict[str, Any]:
    """The options of :func:`hessian`, with *given* ones instead of its own."""
    defaults = dict(hessian.__kwdefaults__ or {})
    for name in given:
        if name not in defaults:
            raise TypeError(f"{owner}() got an unexpected argument {name!r}; accepted: {', '.join(defaults)}")
    return {**defaults, **given}


def _likelihood(loss_fn: Any) -> Likelihood | None:
    """Of which distribution a loss of torch is the negative log-likelihood."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    known: dict[Likelihood, tuple[Any, type[nn.Module]]] = {
        "categorical": (F.cross_entropy, nn.CrossEntropyLoss),
        "bernoulli": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
        "normal": (F.mse_loss, nn.MSELoss),
    }
    for law, (function, module) in known.items():
        if loss_fn is function or isinstance(loss_fn, module):
            return law
    return None


def _draw(law: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Targets drawn from the distribution that *outputs* parametrise."""
    if law == "normal":
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return outputs + noise * math.sqrt(0.5)
    if law == "bernoulli":
        return torch.bernoulli(outputs.sigmoid(), generator=generator)
    probabilities = outputs.movedim(1, -1).softmax(-1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return drawn.view(probabilities.shape[:-1])
