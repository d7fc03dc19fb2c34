"""Parameters, gradients and comparisons for the contract tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.contract.rows import Row
from torch import Tensor, nn
from torch.optim import Optimizer

SHAPES = ((3, 4), (3,), (2, 3, 2))


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    """Parameters with values near 1 (always the same); *shapes* default to a matrix, a vector and a tensor."""
    generator = torch.Generator().manual_seed(1)
    values = [1 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes or SHAPES]
    if dtype.is_complex:
        values = [v * (1 + 0.5j) for v in values]
    return [nn.Parameter(v.to(dtype).to(device)) for v in values]


def gradient(p: Tensor, i: int, t: int) -> Tensor:
    """A gradient for parameter *i* in step *t*: of a quadratic, with a disturbance; in the layout of *p*."""
    wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) + t + i).reshape(p.shape)
    values = (i + 1) * p.detach().to(torch.complex128 if p.is_complex() else torch.float64) + 0.3 * wave.to(p.device)
    return torch.empty_like(p).copy_(values)


def train(row: Row, optimizer: Optimizer, params: list[nn.Parameter], steps: int, start: int = 0) -> list[nn.Parameter]:
    """*steps* steps on :func:`gradient`, from step *start* on."""
    for t in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = gradient(p, i, t)
        row.step(optimizer, loss=1 + 0.1 * (t % 3))
    return params


def snapshot(optimizer: Optimizer) -> tuple[list[Tensor], dict[str, Any]]:
    """Copies of the parameters and of the whole state."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit, types included."""
    return not difference(a, b)


def assert_same(a: Any, b: Any) -> None:
    """Fail, with the place of the first difference, unless :func:`same`."""
    __tracebackhide__ = True
    if found := difference(a, b):
        pytest.fail(f"differs at {found}")


def difference(a: Any, b: Any, place: str = "top") -> str:
    """Where *a* and *b* differ first; an empty string if nowhere."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        equal = a.dtype == b.dtype and torch.equal(a.detach(), b.detach())
        return "" if equal else f"{place}: {a.detach()} and {b.detach()}"
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{place}: keys {sorted(map(str, a))} and {sorted(map(str, b))}"
        return next(filter(None, (difference(a[key], b[key], f"{place}.{key}") for key in a)), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{place}: {len(a)} and {len(b)} items"
        return next(filter(None, (difference(x, y, f"{place}[{i}]") for i, (x, y) in enumerate(zip(a, b)))), "")
    return "" if a == b else f"{place}: {a!r} and {b!r}"


def without_counters(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict less the counts of skipped steps (for NLCG the last of its scalars)."""
    return {
        key: {
            name: value[:-1] if name == "scalars" else value
            for name, value in values.items()
            if name != "skipped_steps"
        }
        for key, values in state["state"].items()
    }


class Regression:
    """Least squares with a matrix and a bias: convex, condition number about 10, minimum 0."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(2)
        self.inputs = torch.randn(64, 4, generator=generator, dtype=torch.float64).to(dtype)
        truth = torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = self.inputs @ truth.T + 0.5
        self.weight = nn.Parameter(torch.full((3, 4), 0.1, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.params = [self.weight, self.bias]

    def batch(self) -> tuple[nn.Module, Any, Tensor, Tensor]:
        """Model, loss, inputs and targets, for optimizers that want them."""
        model = nn.Linear(4, 3)
        model.weight, model.bias = self.weight, self.bias
        return model, nn.functional.mse_loss, self.inputs, self.targets

    def loss(self) -> Tensor:
        return (self.inputs @ self.weight.T + self.bias - self.targets).square().mean()
