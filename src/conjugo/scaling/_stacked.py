"""Many small perceptrons trained at the same time, as batches of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjugo.errors import check
from conjugo.scaling._width_networks import NTKLinear, mlp

__all__ = ["StackedMLP"]


class StackedMLP:
    """R perceptrons of one shape, each with weights, batches and learning rate of its own, trained by SGD at the same time.

    A step is a few batched matrix products for all of them, with gradients written out by hand: on small networks, where
    a step of one costs little but its launch, R runs take hardly longer than one. Run r is the network
    ``mlp(sizes, "ntk", weight_var=weight_var, seed=seeds[r])`` under ``torch.optim.SGD`` with the mean of cross-entropy, to
    rounding. A run that diverges fills with NaN and does not touch the others.

    sizes: number of inputs F, widths of the hidden layers, number of classes C. seeds: one for each run. weight_var: variance
    of the weights when drawn, > 0. momentum: heavy-ball, in [0, 1). Raises ValueError.

    >>> stack = StackedMLP((4, 8, 3), seeds=range(5))
    >>> losses = stack.step(torch.randn(5, 16, 4), torch.randint(3, (5, 16)), lr=0.5)
    >>> losses.shape, stack.logits(torch.randn(10, 4)).shape
    (torch.Size([5]), torch.Size([5, 10, 3]))
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seeds: Sequence[int],
        *,
        weight_var: float = 1.0,
        momentum: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check(len(seeds) >= 1, "StackedMLP", "seeds", tuple(seeds), "one seed for each run, at least one")
        check(0 <= momentum < 1, "StackedMLP", "momentum", momentum, "in [0, 1)")
        self.sizes, self.momentum, self.weight_var = tuple(sizes), momentum, weight_var
        models = [_layers(mlp(sizes, "ntk", weight_var=weight_var, seed=seed, dtype=dtype)) for seed in seeds]
        stacked = [torch.stack([layer.weight.detach() for layer in layers]) for layers in zip(*models)]
        self.weights = [weight.to(device) for weight in stacked]
        """Of each layer: [R, n_out, n_in]."""
        self.biases = [weight.new_zeros(len(seeds), 1, weight.shape[1]) for weight in self.weights]
        """Of each layer: [R, 1, n_out]."""
        self._scales = [weight.shape[2] ** -0.5 for weight in self.weights]
        moving = [*self.weights, *self.biases] if momentum else []
        self._velocity = [torch.zeros_like(parameter) for parameter in moving]

    @property
    def runs(self) -> int:
        """R."""
        return len(self.weights[0])

    def logits(self, inputs: Tensor) -> Tensor:
        """[R, B, C], for *inputs* [R, B, F] of each run, or [B, F] that all share."""
        return self._forward(inputs)[-1]

    def step(self, inputs: Tensor, targets: Tensor, lr: float | Tensor, counts: Tensor | None = None) -> Tensor:
        """One step of SGD for every run; the mean losses before it, [R].

        inputs: [R, B, F]. targets: [R, B], int64 classes. lr: the NTK learning rate, a number for all or a tensor [R]. counts:
        [R], from 1 to B: how many examples, from the first on, make the batch of each run; None: all B. Runs with different
        batch sizes can share a step that way, at the cost of the largest. Raises ValueError for other shapes.
        """
        runs, owner = self.runs, "StackedMLP.step"
        fits = inputs.ndim == 3 and len(inputs) == runs and inputs.shape[1] >= 1 and inputs.shape[2] == self.sizes[0]
        check(fits, owner, "inputs", tuple(inputs.shape), f"of shape [{runs}, B, {self.sizes[0]}]")
        check(
            targets.shape == inputs.shape[:2],
            owner,
            "targets",
            tuple(targets.shape),
            f"of shape {list(inputs.shape[:2])}",
        )
        for name, value in (("lr", lr), ("counts", counts)):
            if isinstance(value, Tensor):
                check(value.shape == (runs,), owner, name, tuple(value.shape), f"of shape [{runs}]")
        activations = self._forward(inputs)
        log_p = F.log_softmax(activations[-1], 2)
        weights = _example_weights(inputs, counts)
        losses = -(log_p.gather(2, targets[..., None])[..., 0] * weights).sum(1)
        delta = log_p.exp_()
        # No tensor is made of a number on the host here: on an accelerator every step would wait for it.
        delta.scatter_add_(2, targets[..., None], delta.new_full((1, 1, 1), -1.0).expand(*targets.shape, 1))
        rates = lr.to(delta)[:, None] if isinstance(lr, Tensor) else lr
        # Without momentum the learning rate goes into delta, and the update into the matrix product of the gradient.
        delta *= (weights if self.momentum else weights * rates)[..., None]
        for layer in reversed(range(len(self.weights))):
            weight, scale, before = self.weights[layer], self._scales[layer], activations[layer]
            below = torch.bmm(delta, weight).mul_(scale).mul_(before > 0) if layer else delta
            if self.momentum:
                self._move(layer, delta, before, rates)
            else:
                weight.baddbmm_(delta.mT, before, alpha=-scale)
                self.biases[layer] -= delta.sum(1, keepdim=True)
            delta = below
        return losses

    def finite(self) -> Tensor:
        """[R], bool: whether all weights of a run are finite."""
        parts = [parameter.isfinite().flatten(1).all(1) for parameter in (*self.weights, *self.biases)]
        return torch.stack(parts).all(0)

    def model(self, run: int) -> nn.Sequential:
        """A copy of one of the networks. run: in [0, R). Raises ValueError."""
        check(0 <= run < self.runs, "StackedMLP.model", "run", run, f"in [0, {self.runs})")
        model = mlp(self.sizes, "ntk", weight_var=self.weight_var, dtype=self.weights[0].dtype)
        model.to(self.weights[0].device)
        with torch.no_grad():
            for layer, weight, bias in zip(_layers(model), self.weights, self.biases, strict=True):
                layer.weight.copy_(weight[run])
                layer.bias.copy_(bias[run, 0])
        return model

    def _forward(self, inputs: Tensor) -> list[Tensor]:
        """What each layer gets, and the logits."""
        activations = [inputs.expand(self.runs, *inputs.shape[-2:])]
        last = len(self.weights) - 1
        for layer, (weight, bias, scale) in enumerate(zip(self.weights, self.biases, self._scales, strict=True)):
            out = torch.baddbmm(bias, activations[-1], weight.mT, alpha=scale)
            activations.append(out if layer == last else out.relu_())
        return activations

    def _move(self, layer: int, delta: Tensor, before: Tensor, rates: float | Tensor) -> None:
        velocities = self._velocity[layer], self._velocity[len(self.weights) + layer]
        velocities[0].baddbmm_(delta.mT, before, beta=self.momentum, alpha=self._scales[layer])
        velocities[1].mul_(self.momentum).add_(delta.sum(1, keepdim=True))
        for parameter, velocity in zip((self.weights[layer], self.biases[layer]), velocities, strict=True):
            parameter -= velocity * (rates[..., None] if isinstance(rates, Tensor) else rates)


def _example_weights(inputs: Tensor, counts: Tensor | None) -> Tensor:
    """[R, B] or [1, B]: 1 / (size of the batch), 0 for what is beyond it."""
    size = inputs.shape[-2]
    if counts is None:
        return inputs.new_full((1, size), 1 / size)
    there = torch.arange(size, device=inputs.device) < counts[:, None]
    return there / counts[:, None].to(inputs.dtype)


def _layers(model: nn.Sequential) -> list[NTKLinear]:
    return [module for module in model if isinstance(module, NTKLinear)]
