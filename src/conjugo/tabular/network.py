"""Feed-forward networks whose parameters are one vector, and their regularised loss, for several vectors at once.

Arrays are feature-major, [start, unit, example]: numpy's vector loops run over the examples. A layer is one matrix
[units, inputs + 1] whose last column is the bias, and activations carry a row of ones for it: forward and backward passes need
no other operation for biases.

Starts never mix: each has its own matrix products and sums, in an order that does not depend on how many others there are. So
a start gives the same bits alone and among others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import numpy as np

from conjugo.tabular.activations import ACTIVATIONS, FloatArray
from conjugo.tabular.losses import Loss

__all__ = ["Network", "Objective"]


@dataclass(frozen=True)
class Network:
    """A feed-forward network with linear outputs. sizes: inputs, units of each hidden layer, outputs; activation: a name."""

    sizes: tuple[int, ...]
    activation: str

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the layers' matrices: (units, inputs + 1)."""
        return [(units, inputs + 1) for inputs, units in pairwise(self.sizes)]

    @property
    def size(self) -> int:
        """Number of parameters, n."""
        return sum(units * inputs for units, inputs in self.shapes)

    def layers(self, parameters: FloatArray) -> list[FloatArray]:
        """The matrices [S, units, inputs + 1] in *parameters* [S, n]: views, the last column is the bias."""
        found, start = [], 0
        for units, inputs in self.shapes:
            stop = start + units * inputs
            found.append(parameters[:, start:stop].reshape(-1, units, inputs))
            start = stop
        return found

    def weights_mask(self) -> FloatArray:
        """1 for weights, 0 for biases [n]."""
        mask = np.ones((1, self.size))
        for layer in self.layers(mask):
            layer[..., -1] = 0.0
        flat: FloatArray = mask[0]
        return flat

    def initial(self, rng: np.random.Generator) -> FloatArray:
        """Random parameters [n]: weights uniform in +-sqrt(6 / (inputs + units)), biases 0 (Glorot & Bengio 2010)."""
        parameters = np.zeros((1, self.size))
        for layer in self.layers(parameters):
            _, units, columns = layer.shape
            bound = sqrt(6 / (columns - 1 + units))
            layer[0, :, :-1] = rng.uniform(-bound, bound, (units, columns - 1))
        flat: FloatArray = parameters[0]
        return flat

    def scores(self, parameters: FloatArray, inputs: FloatArray) -> FloatArray:
        """Outputs [N, K] for *inputs* [N, d] with the *parameters* [n]."""
        values = inputs.T
        *hidden, last = (layer[0] for layer in self.layers(parameters[None]))
        for layer in hidden:
            values = layer[:, :-1] @ values + layer[:, -1:]
            ACTIVATIONS[self.activation](values, None)
        result: FloatArray = (last[:, :-1] @ values + last[:, -1:]).T
        return result


class Objective:
    """f(w) = loss + alpha/2 |weights|^2, with its gradient, for S parameter vectors at once.

    network: with as many outputs as *loss*. inputs: [N, d]. alpha: >= 0; biases are not penalised. All in float64.
    """

    def __init__(self, network: Network, loss: Loss, inputs: FloatArray, alpha: float) -> None:
        self.network, self.loss = network, loss
        self._activation = ACTIVATIONS[network.activation]
        self._inputs = np.concatenate([inputs.T, np.ones((1, len(inputs)))])
        self._penalty = alpha * network.weights_mask()
        self._buffers: list[tuple[FloatArray, FloatArray]] = []
        self._scores = np.empty((0, loss.outputs, len(inputs)))

    # A step that is too long may overflow: the search for a step length wants to see that as inf or NaN, not as a warning.
    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def __call__(self, parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Values [S] and gradients [S, n] at *parameters* [S, n]."""
        gradient = np.empty_like(parameters)
        layers, slots = self.network.layers(parameters), self.network.layers(gradient)
        buffers, scores = self._room(len(parameters))
        values = self._inputs
        for layer, (activations, slopes) in zip(layers, buffers):
            units = activations[:, :-1]
            np.matmul(layer, values, out=units)
            self._activation(units, slopes)
            values = activations
        np.matmul(layers[-1], values, out=scores)
        losses = self.loss(scores)
        delta = scores
        # There is a buffer for each layer but the last: the pairs end with the second layer.
        for layer, slot, (activations, slopes) in zip(reversed(layers), reversed(slots), reversed(buffers)):
            np.matmul(delta, activations.transpose(0, 2, 1), out=slot)
            # With one unit above it is an outer product, for which matmul takes three times as long.
            carry = np.multiply if layer.shape[1] == 1 else np.matmul
            slopes *= carry(layer[:, :, :-1].transpose(0, 2, 1), delta, out=activations[:, :-1])
            delta = slopes
        np.matmul(delta, self._inputs.T, out=slots[0])
        pull = self._penalty * parameters
        gradient += pull
        pull *= parameters
        losses += 0.5 * pull.sum(-1)
        return losses, gradient

    def _room(self, starts: int) -> tuple[list[tuple[FloatArray, FloatArray]], FloatArray]:
        """Memory for *starts* parameter vectors: activations and slopes of the hidden layers, and scores."""
        if starts > len(self._scores):
            examples = self._inputs.shape[1]
            # The row of ones behind the activations stays as it is.
            self._buffers = [
                (np.ones((starts, units + 1, examples)), np.empty((starts, units, examples)))
                for units in self.network.sizes[1:-1]
            ]
            self._scores = np.empty((starts, self.network.sizes[-1], examples))
        return [(a[:starts], s[:starts]) for a, s in self._buffers], self._scores[:starts]
