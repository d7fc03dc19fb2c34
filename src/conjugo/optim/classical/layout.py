"""Between the user's variables (a tensor, a tree of tensors, a NumPy array) and one flat real vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from conjugo.errors import check
from conjugo.optim._base import as_real

__all__ = ["Layout"]

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Layout:
    """Where each leaf of a tree lies in the flat vector.

    A complex leaf lies there as pairs of real numbers. tree: tensors of one precision on one device, alone or in lists,
    tuples and dicts; or a NumPy array, or what ``numpy.asarray`` makes one of (integers become float64).

    Raises ``TypeError`` for other types, ``ValueError`` for trees without a variable and for values that are not finite.
    """

    def __init__(self, owner: str, tree: Any) -> None:
        self.owner = owner
        leaves, self.spec = tree_flatten(tree)
        self.numpy = not (leaves and all(isinstance(leaf, Tensor) for leaf in leaves))
        if self.numpy:
            array = np.asarray(tree)
            if array.dtype.kind in "iub":
                array = array.astype(np.float64)
            if array.dtype.kind not in "fc" or array.itemsize < 4:
                raise TypeError(f"{owner}: x0 must hold tensors, or be a numeric array, got {type(tree).__name__}")
            leaves, self.spec = tree_flatten(torch.from_numpy(np.array(array)))
        self.leaves: list[Tensor] = [leaf.detach() for leaf in leaves]
        first = as_real(self.leaves[0]) if self.leaves[0].dtype in DTYPES else self.leaves[0]
        for leaf in self.leaves:
            if leaf.dtype not in DTYPES:
                raise TypeError(f"{owner}: x0 must be float32, float64, complex64 or complex128, got {leaf.dtype}")
            real = as_real(leaf)
            if (real.dtype, real.device) != (first.dtype, first.device):
                raise TypeError(
                    f"{owner}: all of x0 must have one precision and device, got {first.dtype} on {first.device} and "
                    f"{real.dtype} on {real.device}"
                )
        sizes = [as_real(leaf).numel() for leaf in self.leaves]
        check(sum(sizes) > 0, owner, "x0", [tuple(leaf.shape) for leaf in self.leaves], "of at least one variable")
        # A complex view needs an even offset, so an odd leaf is followed by a gap, whose gradient stays 0.
        ends = np.cumsum([size + size % 2 for size in sizes]).tolist()
        self.size = ends[-1] if len(sizes) > 1 else sizes[0]
        self.slices = [slice(end - size - size % 2, end - size % 2) for end, size in zip(ends, sizes, strict=True)]
        self.dtype, self.device = first.dtype, first.device

    def start(self) -> Tensor:
        """The flat vector of the values that the tree had."""
        flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for leaf, where in zip(self.leaves, self.slices, strict=True):
            flat[where].copy_(as_real(leaf).reshape(-1))
        check(bool(flat.isfinite().all()), self.owner, "x0", "values that are not", "finite")
        return flat

    def views(self, flat: Tensor) -> list[Tensor]:
        """The leaves, as views of *flat*."""
        found = []
        for leaf, where in zip(self.leaves, self.slices, strict=True):
            view = flat[where]
            found.append(
                torch.view_as_complex(view.view(*leaf.shape, 2)) if leaf.is_complex() else view.view(leaf.shape)
            )
        return found

    def tree(self, leaves: list[Tensor]) -> Any:
        """What the user sees: the tree with these leaves, or a NumPy array on the same memory."""
        if self.numpy:
            return leaves[0].numpy()
        return tree_unflatten(leaves, self.spec)

    def write(self, what: str, tree: Any, out: Tensor) -> None:
        """Copy a *tree* of the same structure and shapes into the flat vector *out*; *what* names it in errors."""
        if self.numpy:
            leaves, spec = [torch.as_tensor(tree)], self.spec
        else:
            leaves, spec = tree_flatten(tree)
        shapes, wanted = [tuple(getattr(leaf, "shape", ())) for leaf in leaves], [tuple(x.shape) for x in self.leaves]
        check(
            spec == self.spec and shapes == wanted,
            self.owner,
            what,
            shapes,
            f"of the structure and shapes of x0, {wanted}",
        )
        for leaf, own, where in zip(leaves, self.leaves, self.slices, strict=True):
            if leaf.is_complex() and not own.is_complex():
                raise TypeError(f"{self.owner}: {what} must be real where x0 is, got {leaf.dtype}")
            out[where].copy_(as_real(leaf.detach().to(own.dtype)).reshape(-1))
