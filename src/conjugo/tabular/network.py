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

    The rows are taken block by block, so that what a block needs stays in the processor's cache. The blocks do not depend on S.

    network: with as many outputs as *loss*. inputs: [N, d]. alpha: >= 0; biases are not penalised. All in float64.
    """

    BLOCK = 2**15
    """Activations of a layer in a block, at most."""

    def __init__(self, network: Network, loss: Loss, inputs: FloatArray, alpha: float) -> None:
        self.network = network
        self._activation = ACTIVATIONS[network.activation]
        self._penalty = alpha * network.weights_mask()
        self._rows = min(len(inputs), max(256, self.BLOCK // max(network.sizes[1:])))
        blocks = [slice(start, start + self._rows) for start in range(0, len(inputs), self._rows)]
        self._blocks = [(_with_ones(inputs[rows]), loss.part(rows)) for rows in blocks]
        self._room = _Room.of(network, 0, self._rows)

    # A step that is too long may overflow: the search for a step length wants to see that as inf or NaN, not as a warning.
    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def __call__(self, parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Values [S] and gradients [S, n] at *parameters* [S, n]."""
        if len(parameters) > self._room.starts:
            self._room = _Room.of(self.network, len(parameters), self._rows)
        gradient = self._penalty * parameters
        values: FloatArray = 0.5 * (gradient * parameters).sum(-1)
        part = np.empty_like(parameters)
        layers, slots = self.network.layers(parameters), self.network.layers(part)
        for inputs, loss in self._blocks:
            values += self._pass(layers, slots, inputs, loss)
            gradient += part
        return values, gradient

    def _pass(self, layers: list[FloatArray], slots: list[FloatArray], inputs: FloatArray, loss: Loss) -> FloatArray:
        """Forward and backward through a block: its losses [S]; gradients go into *slots*, of the shapes of *layers*."""
        hidden, scores = self._room.part(len(layers[0]), inputs.shape[1])
        values = inputs
        for layer, (activations, slopes) in zip(layers, hidden):
            units = np.matmul(layer, values, out=activations[:, :-1])
            self._activation(units, slopes)
            values = activations
        losses = loss(np.matmul(layers[-1], values, out=scores))
        delta = scores
        # There is a buffer for each layer but the last: the pairs end with the second layer.
        for layer, slot, (activations, slopes) in zip(reversed(layers), reversed(slots), reversed(hidden)):
            np.matmul(delta, activations.transpose(0, 2, 1), out=slot)
            # With one unit above it is an outer product, for which matmul takes three times as long.
            carry = np.multiply if layer.shape[1] == 1 else np.matmul
            slopes *= carry(layer[:, :, :-1].transpose(0, 2, 1), delta, out=activations[:, :-1])
            delta = slopes
        np.matmul(delta, inputs.T, out=slots[0])
        return losses


@dataclass(frozen=True)
class _Room:
    """Memory for a block: of each hidden layer activations, with a row of ones behind them, and slopes; and scores."""

    hidden: list[tuple[FloatArray, FloatArray]]
    scores: FloatArray

    @classmethod
    def of(cls, network: Network, starts: int, rows: int) -> _Room:
        hidden = [
            (np.ones((starts, units + 1, rows)), np.empty((starts, units, rows))) for units in network.sizes[1:-1]
        ]
        return cls(hidden, np.empty((starts, network.sizes[-1], rows)))

    @property
    def starts(self) -> int:
        return len(self.scores)

    def part(self, starts: int, rows: int) -> tuple[list[tuple[FloatArray, FloatArray]], FloatArray]:
        """Memory for fewer starts and rows."""
        hidden = [(a[:starts, :, :rows], slopes[:starts, :, :rows]) for a, slopes in self.hidden]
        return hidden, self.scores[:starts, :, :rows]


def _with_ones(inputs: FloatArray) -> FloatArray:
    """The columns of *inputs* [N, d], and a row of ones for the biases [d + 1, N]."""
    return np.concatenate([inputs.T, np.ones((1, len(inputs)))])
