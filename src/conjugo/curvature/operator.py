"""Symmetric matrices that are known by their products with vectors only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conjugo.errors import check

__all__ = ["MatrixFree", "Operator", "from_dense", "from_matvec"]


class Operator(ABC):
    """A real symmetric matrix A of shape (P, P), as the map v -> A v.

    ``A @ v`` takes a vector [P], or a matrix [P, k] as in NumPy. :meth:`matmat` takes a block of vectors as rows, [k, P], the
    layout in which Lanczos vectors are kept. Vectors have the operator's ``dtype`` and ``device``; results have no gradient.

    group: the process group whose ranks call the products together and all get the same result; None: this process alone.
    """

    group: Any = None

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device
        self.n_matvec = 0
        """Products so far; a block of k vectors counts k."""

    @property
    def size(self) -> int:
        """P."""
        return self.shape[0]

    @abstractmethod
    def _products(self, vectors: Tensor) -> Tensor:
        """A v for each row of *vectors* [k, P], k >= 1."""

    def matvec(self, vector: Tensor) -> Tensor:
        """A v, [P], of a vector [P]. Raises ValueError for another shape, type or device."""
        self._check(vector, (self.size,), f"({self.size},)")
        self.n_matvec += 1
        return self._products(vector.detach().unsqueeze(0)).squeeze(0)

    def matmat(self, vectors: Tensor) -> Tensor:
        """A v for each row of *vectors*, [k, P]. Raises ValueError for another shape, type or device."""
        rows = vectors.shape[0] if vectors.ndim == 2 else 1
        self._check(vectors, (rows, self.size), f"(k, {self.size})")
        self.n_matvec += rows
        return self._products(vectors.detach()) if rows else vectors.detach().clone()

    def __matmul__(self, other: Tensor) -> Tensor:
        """A v, [P], or A V, [P, k]."""
        return self.matvec(other) if other.ndim == 1 else self.matmat(other.T.contiguous()).T

    def to_dense(self, *, rows_at_once: int = 16) -> Tensor:
        """The matrix itself, [P, P], by P products; symmetric to the last bit."""
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for start in range(0, self.size, rows_at_once):
            count = min(rows_at_once, self.size - start)
            units = torch.zeros(count, self.size, dtype=self.dtype, device=self.device)
            units[torch.arange(count), torch.arange(start, start + count)] = 1
            dense[start : start + count] = self.matmat(units)
        return (dense + dense.T) / 2

    def to_scipy(self) -> Any:
        """A :class:`scipy.sparse.linalg.LinearOperator` on host memory, float64 or float32 like the operator."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        dtype = np.float64 if self.dtype == torch.float64 else np.float32

        def rows(array: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=self.device, dtype=self.dtype)

        def back(result: Tensor) -> Any:
            return result.to(device="cpu", dtype=torch.from_numpy(np.empty(0, dtype)).dtype).numpy()

        def matvec(vector: Any) -> Any:
            return back(self.matvec(rows(vector.reshape(-1))))

        def matmat(matrix: Any) -> Any:
            return back(self.matmat(rows(matrix.T))).T

        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=dtype)

    def _check(self, given: Tensor, shape: tuple[int, ...], accepted: str) -> None:
        owner = type(self).__name__
        check(tuple(given.shape) == shape, owner, "the shape of the vector", tuple(given.shape), accepted)
        check(given.dtype == self.dtype, owner, "the dtype of the vector", given.dtype, str(self.dtype))
        check(given.device == self.device, owner, "the device of the vector", str(given.device), str(self.device))


class MatrixFree(Operator):
    """The operator of a function; see :func:`from_matvec`."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rows: bool,
    ) -> None:
        super().__init__(size, dtype, device)
        self._function = function
        self._rows = rows

    def _products(self, vectors: Tensor) -> Tensor:
        found = self._function(vectors) if self._rows else torch.stack([self._function(v) for v in vectors])
        check(found.shape == vectors.shape, "from_matvec", "the shape of the product", tuple(found.shape), "that of v")
        return found.detach().to(self.dtype)


def from_matvec(
    function: Callable[[Tensor], Tensor],
    n: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rows: bool = False,
) -> MatrixFree:
    """The operator whose product with v [n] is ``function(v)``; *function* must be linear and symmetric, which is not checked.

    rows: *function* takes blocks of vectors, [k, n], and gives their products, [k, n].
    Raises ValueError unless n >= 1, and, in a product, if *function* gives another shape.

    >>> A = from_matvec(lambda v: 2 * v, 3)
    >>> A @ torch.ones(3)
    tensor([2., 2., 2.])
    """
    check(n >= 1, "from_matvec", "n", n, ">= 1")
    return MatrixFree(function, n, dtype, torch.device(device), rows=rows)


def from_dense(matrix: Tensor) -> MatrixFree:
    """The operator of a symmetric matrix [n, n], such as one to test a method with.

    Raises ValueError if *matrix* is not square, not floating-point or not symmetric (to 1e-5 of its largest entry).

    >>> from_dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])) @ torch.tensor([1.0, 0.0])
    tensor([2., 1.])
    """
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] >= 1
    check(square, "from_dense", "the shape of the matrix", tuple(matrix.shape), "(n, n)")
    check(matrix.is_floating_point(), "from_dense", "the dtype of the matrix", matrix.dtype, "a floating-point type")
    matrix = matrix.detach()
    asymmetry = float((matrix - matrix.T).abs().max())
    check(
        asymmetry <= 1e-5 * float(matrix.abs().max()), "from_dense", "max |A - A'|", asymmetry, "that of a symmetric A"
    )
    return from_matvec(lambda v: v @ matrix, matrix.shape[0], dtype=matrix.dtype, device=matrix.device, rows=True)
