"""Examples in batches that are the same in each pass over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from conjugo.errors import check

__all__ = ["Batch", "Batches", "Data", "tensors"]

Batch: TypeAlias = tuple[Any, Any]
"""Inputs and targets: tensors, or lists and dictionaries of tensors, whose first dimension counts the examples."""
Data: TypeAlias = tuple[Any, Any] | Iterable[tuple[Any, Any]]


def tensors(nested: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


class Batches:
    """What *data* holds, one batch after the other, on *device*, floating-point numbers as *dtype*.

    A loader that shuffles or augments with torch's random numbers, or with its own generator, draws the same ones in each pass;
    the numbers of the process stay as they are. A pass raises ValueError if a batch is not what it was the first time.
    """

    def __init__(self, data: Data, owner: str, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        whole = isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple)
        self._data: Any = [data] if whole else data
        self._owner = owner
        self._device = device
        self._dtype = dtype
        self._seed = seed
        generator = getattr(data, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._begin = None if self._generator is None else self._generator.get_state()
        again = not hasattr(self._data, "__next__")
        check(again, owner, "data", type(data).__name__, "a tuple, list or loader that can be read many times")
        self.sizes: list[int] = []
        """How many examples each batch has."""
        self._prints: list[Tensor] = []
        for batch in self._drawn():
            pair = isinstance(batch, tuple | list) and len(batch) == 2
            check(pair, owner, "a batch", type(batch).__name__, "a pair: inputs, targets")
            found = tensors(batch[0])
            check(len(found) > 0 and found[0].ndim > 0, owner, "inputs", batch[0], "tensors of examples")
            self.sizes.append(len(found[0]))
            self._prints.append(_print(batch))

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for batch in self._drawn():
            same = count < len(self) and torch.equal(_print(batch), self._prints[count])
            check(same, self._owner, "data", f"another batch {count}", "the same batches in each pass over it")
            count += 1
            yield self._moved(batch[0]), self._moved(batch[1])
        check(count == len(self), self._owner, "the number of batches", count, f"{len(self)}, as in the first pass")

    def _moved(self, nested: Any) -> Any:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)

        return tree_map_only(Tensor, move, nested)

    def _drawn(self) -> Iterator[Any]:
        random = torch.default_generator
        state = None
        outside = None if self._generator is None else self._generator.get_state()
        iterator: Any = None
        try:
            if self._generator is not None and self._begin is not None:
                self._generator.set_state(self._begin)
            while True:
                before = random.get_state()
                try:
                    if state is None:
                        random.manual_seed(self._seed)
                        iterator = iter(self._data)
                    else:
                        random.set_state(state)
                    batch = next(iterator, None)
                    state = random.get_state()
                finally:
                    random.set_state(before)
                if batch is None:
                    return
                yield batch
        finally:
            if self._generator is not None and outside is not None:
                self._generator.set_state(outside)


def _print(batch: Batch) -> Tensor:
    """A few numbers that are others for other examples, or for the same in another order: float64 on the CPU."""
    numbers = []
    for tensor in tensors(list(batch)):
        numbers.append(torch.tensor([*tensor.shape], dtype=torch.float64))
        if tensor.ndim and len(tensor):
            parts = torch.stack(
                [part.sum(dtype=torch.float64) for part in (tensor, tensor[0], tensor[-1], tensor[::2])]
            )
            numbers.append(parts.cpu().nan_to_num(nan=-1.0))
    return torch.cat(numbers)
