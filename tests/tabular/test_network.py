"""The hand-written gradient against autograd and finite differences; starts that do not touch each other."""

import numpy as np
import pytest
import torch

from conjugo.tabular.activations import ACTIVATIONS
from conjugo.tabular.losses import Logistic, Softmax, Squared
from conjugo.tabular.network import Network, Objective

RNG = np.random.default_rng(3)
N, D = 57, 6
INPUTS = RNG.normal(size=(N, D))
WEIGHTS = RNG.uniform(0.1, 1.0, N)
LABELS = RNG.integers(0, 3, N)
TARGETS = RNG.normal(size=(N, 3))

LOSSES = {
    "logistic": Logistic(LABELS % 2, WEIGHTS),
    "softmax": Softmax(LABELS, WEIGHTS, 3),
    "squared": Squared(TARGETS, WEIGHTS),
}
TORCH = {
    "gelu": torch.nn.functional.gelu,
    "identity": lambda z: z,
    "logistic": torch.sigmoid,
    "relu": torch.relu,
    "softplus": torch.nn.functional.softplus,
    "tanh": torch.tanh,
}


def twin(network, name, alpha, parameters):
    """The objective in plain PyTorch: (value, gradient) of one parameter vector, the layers as [units, inputs + 1]."""
    w = torch.tensor(parameters, requires_grad=True)
    values, weights, start, penalty = torch.tensor(INPUTS), torch.tensor(WEIGHTS), 0, 0.0
    pairs = list(zip(network.sizes, network.sizes[1:]))
    for i, (inputs, units) in enumerate(pairs):
        layer = w[start : start + units * (inputs + 1)].view(units, inputs + 1)
        start += layer.numel()
        penalty = penalty + layer[:, :-1].square().sum()
        values = values @ layer[:, :-1].T + layer[:, -1]
        values = values if i == len(pairs) - 1 else TORCH[network.activation](values)
    if name == "logistic":
        targets = torch.tensor(LABELS % 2, dtype=torch.float64)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(values[:, 0], targets, reduction="none")
    elif name == "softmax":
        losses = torch.nn.functional.cross_entropy(values, torch.tensor(LABELS), reduction="none")
    else:
        losses = (values - torch.tensor(TARGETS)).square().sum(1) / 2
    total = (weights * losses).sum() + alpha / 2 * penalty
    (gradient,) = torch.autograd.grad(total, w)
    return total.item(), gradient.numpy()


@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_autograd(name, activation, hidden):
    loss = LOSSES[name]
    network = Network((D, *hidden, loss.outputs), activation)
    parameters = 0.8 * RNG.normal(size=(3, network.size))
    values, gradients = Objective(network, loss, INPUTS, 0.02)(parameters)
    for i in range(3):
        value, gradient = twin(network, name, 0.02, parameters[i])
        assert values[i] == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(gradients[i], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu"}))
def test_gradients_are_those_of_finite_differences(activation):
    network = Network((D, 4, 3), activation)
    objective = Objective(network, LOSSES["softmax"], INPUTS, 0.02)
    parameters, direction, h = RNG.normal(size=(2, network.size)), RNG.normal(size=(2, network.size)), 1e-6
    difference = (objective(parameters + h * direction)[0] - objective(parameters - h * direction)[0]) / (2 * h)
    np.testing.assert_allclose((objective(parameters)[1] * direction).sum(1), difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_a_start_gives_the_same_bits_alone_and_among_others(name):
    network = Network((D, 7, 5, LOSSES[name].outputs), "tanh")
    objective = Objective(network, LOSSES[name], INPUTS, 0.02)
    parameters = RNG.normal(size=(5, network.size))
    values, gradients = objective(parameters)
    for i in range(5):
        value, gradient = objective(parameters[i : i + 1])
        assert value[0] == values[i]
        assert gradient[0].tobytes() == gradients[i].tobytes()


@pytest.mark.parametrize("name", LOSSES)
def test_scores_far_out_stay_finite_and_too_far_ones_give_no_warning(name):
    network = Network((D, LOSSES[name].outputs), "tanh")
    objective = Objective(network, LOSSES[name], INPUTS, 0.0)
    values, gradients = objective(np.full((1, network.size), 1e5))
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()
    assert not np.isfinite(objective(np.full((1, network.size), 1e308))[0]).any()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_come_in_blocks(name, monkeypatch):
    rows = RNG.integers(0, N, 600)
    parts = {
        "logistic": Logistic(LABELS[rows] % 2, WEIGHTS[rows]),
        "softmax": Softmax(LABELS[rows], WEIGHTS[rows], 3),
        "squared": Squared(TARGETS[rows], WEIGHTS[rows]),
    }
    network = Network((D, 4, parts[name].outputs), "gelu")
    parameters = RNG.normal(size=(2, network.size))
    whole = Objective(network, parts[name], INPUTS[rows], 0.02)
    monkeypatch.setattr(Objective, "BLOCK", 1)  # 256 rows: two blocks, and a smaller one
    in_blocks = Objective(network, parts[name], INPUTS[rows], 0.02)
    for a, b in zip(whole(parameters), in_blocks(parameters)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    assert in_blocks(parameters[1:])[1][0].tobytes() == in_blocks(parameters)[1][1].tobytes()


def test_scores_are_what_the_loss_sees():
    network = Network((D, 4, 3), "gelu")
    parameters = RNG.normal(size=(1, network.size))
    expected = LOSSES["squared"](network.scores(parameters[0], INPUTS).T[None])
    assert Objective(network, LOSSES["squared"], INPUTS, 0.0)(parameters)[0] == pytest.approx(expected, rel=1e-13)


def test_initial_weights_have_the_range_of_glorot_and_biases_are_zero():
    network = Network((30, 20, 2), "tanh")
    first, last = network.layers(network.initial(np.random.default_rng(0))[None])
    assert 0.95 * (6 / 50) ** 0.5 < np.abs(first[..., :-1]).max() <= (6 / 50) ** 0.5
    assert np.abs(last[..., :-1]).max() <= (6 / 22) ** 0.5
    assert not first[..., -1].any()
    assert not last[..., -1].any()
    assert network.size == 31 * 20 + 21 * 2
    assert network.weights_mask().sum() == 30 * 20 + 20 * 2
