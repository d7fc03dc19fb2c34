"""Layers and networks in the standard and in the NTK parameterisation, and the way from one to the other.

Standard: y = W x + b with W ~ N(0, s / n_in). NTK (Jacot, Gabriel & Hongler 2018): y = W x / sqrt(n_in) + b with W ~ N(0, s).
Both are the same function of x at initialisation. They remain so under SGD if each weight tensor has a learning rate
proportional to the variance with which it was drawn: eps for NTK weights, eps / n_in for standard ones, and eps for biases in
both (Park, Sohl-Dickstein, Le & Smith 2019, arXiv:1905.03776, use both forms; the identity is elementary).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjugo.errors import check, unknown

__all__ = [
    "HiddenLayer",
    "NTKConv2d",
    "NTKLinear",
    "Parameterization",
    "check_parameterization",
    "convert",
    "convnet",
    "hidden_layers",
    "mlp",
    "parameter_groups",
]

Parameterization: TypeAlias = Literal["ntk", "standard"]


def check_parameterization(name: str) -> None:
    """Raise UnknownName unless *name* is a parameterisation."""
    if name not in get_args(Parameterization):
        unknown("parameterization", name, get_args(Parameterization))


def fan_in(weight: Tensor) -> int:
    """How many inputs each output of a linear layer or a convolution has."""
    return math.prod(weight.shape[1:])


class NTKLinear(nn.Linear):
    """A linear layer in NTK parameterisation: y = W x / sqrt(in_features) + b.

    weight_var: variance s > 0 of the entries of W [out, in] at the beginning; 2 keeps the size of signals through ReLU (He et
    al. 2015). b [out] begins at 0. Other arguments are those of ``torch.nn.Linear``. Raises ValueError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_var: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_variance("NTKLinear", weight_var)
        self.weight_var = weight_var
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        _draw(self, self.weight_var, None)

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]; gives [..., out_features]."""
        return F.linear(input * fan_in(self.weight) ** -0.5, self.weight, self.bias)


class NTKConv2d(nn.Conv2d):
    """A 2-D convolution in NTK parameterisation: y = W * x / sqrt(n_in) + b, with n_in = in_channels / groups x kernel size.

    weight_var: variance s > 0 of the entries of W at the beginning. b begins at 0. Other arguments are those of
    ``torch.nn.Conv2d``. Raises ValueError.
    """

    def __init__(self, *args: Any, weight_var: float = 1.0, **kwargs: Any) -> None:
        _check_variance("NTKConv2d", weight_var)
        self.weight_var = weight_var
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        _draw(self, self.weight_var, None)

    def forward(self, input: Tensor) -> Tensor:
        """input: [N, C, H, W]; gives the convolved images."""
        out: Tensor = self._conv_forward(input, self.weight * fan_in(self.weight) ** -0.5, self.bias)
        return out


_TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: NTKLinear, nn.Conv2d: NTKConv2d}
_BACK = {ntk: standard for standard, ntk in _TWINS.items()}


def _check_variance(owner: str, weight_var: float) -> None:
    check(0 < weight_var < math.inf, owner, "weight_var", weight_var, "a finite number > 0")


def _draw(layer: nn.Linear | nn.Conv2d, variance: float, generator: torch.Generator | None) -> None:
    nn.init.normal_(layer.weight, std=variance**0.5, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# ---- families ----


def mlp(
    sizes: Sequence[int],
    parameterization: Parameterization = "ntk",
    *,
    weight_var: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """A perceptron with ReLU between its layers; inputs [N, ...] are flattened.

    sizes: number of inputs, width of each hidden layer, number of outputs; at least two numbers >= 1. weight_var: s > 0;
    weights are drawn from N(0, s) (``"ntk"``) or N(0, s / n_in) (``"standard"``), biases begin at 0. seed: of the weights;
    the same seed gives the same function in both parameterisations. Raises ValueError; UnknownName.
    """
    _check_variance("mlp", weight_var)
    check_parameterization(parameterization)
    check(len(sizes) >= 2 and min(sizes) >= 1, "mlp", "sizes", tuple(sizes), "at least two numbers >= 1")
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [NTKLinear(n_in, n_out, weight_var=weight_var, dtype=dtype), nn.ReLU()]
    return _finished(nn.Sequential(*layers[:-1]), parameterization, weight_var, seed)


def convnet(
    channels: int,
    width: int,
    classes: int,
    parameterization: Parameterization = "ntk",
    *,
    depth: int = 3,
    weight_var: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """A convolutional network without batch norm: 3 x 3 convolutions with ReLU, mean over places, a linear layer.

    channels: of the images [N, channels, H, W]. width: channels of each of the *depth* convolutions; from the second on they
    halve the side. classes: number of outputs. All >= 1. weight_var, seed: as in :func:`mlp`. Raises ValueError; UnknownName.
    """
    _check_variance("convnet", weight_var)
    check_parameterization(parameterization)
    for name, value in (("channels", channels), ("width", width), ("classes", classes), ("depth", depth)):
        check(value >= 1, "convnet", name, value, ">= 1")
    layers: list[nn.Module] = []
    for i in range(depth):
        n_in, stride = (width, 2) if i else (channels, 1)
        layers += [NTKConv2d(n_in, width, 3, stride, 1, weight_var=weight_var, dtype=dtype), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(width, classes, weight_var=weight_var, dtype=dtype)]
    return _finished(nn.Sequential(*layers), parameterization, weight_var, seed)


def _finished(model: nn.Sequential, parameterization: Parameterization, weight_var: float, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    for module in model:
        if isinstance(module, NTKLinear | NTKConv2d):
            _draw(module, weight_var, generator)
    found = convert(model, parameterization)
    assert isinstance(found, nn.Sequential)
    return found


# ---- from one parameterisation to the other ----


def convert(model: nn.Module, parameterization: Parameterization) -> nn.Module:
    """A copy of *model* in the given parameterisation that computes the same function.

    ``torch.nn.Linear`` and ``Conv2d`` become :class:`NTKLinear` and :class:`NTKConv2d`, or the other way round; weights are
    multiplied, or divided, by sqrt(n_in). Everything else, subclasses among it, stays. It is not for modules that read the
    weights of their layers past their ``forward``, as ``torch.nn.TransformerEncoderLayer`` does. Raises UnknownName, and
    ValueError if such a weight is shared with a module that stays (a tied embedding).
    """
    check_parameterization(parameterization)
    twins = _TWINS if parameterization == "ntk" else _BACK
    model = copy.deepcopy(model)
    chosen = [
        module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d) and type(module) in twins
    ]
    weights = {layer.weight for layer in chosen}
    others = [module for module in model.modules() if type(module) not in twins]
    tied = [type(module).__name__ for module in others if not weights.isdisjoint(module._parameters.values())]
    check(
        not tied,
        "convert",
        "model",
        tied,
        "one whose linear layers and convolutions share no weight with other modules",
    )
    with torch.no_grad():
        for weight in weights:
            root = fan_in(weight) ** 0.5
            weight.mul_(root if parameterization == "ntk" else 1 / root)
    for layer in chosen:
        layer.__class__ = twins[type(layer)]  # type: ignore[assignment]
        if isinstance(layer, NTKLinear | NTKConv2d):
            layer.weight_var = float(layer.weight.detach().square().mean())
        else:
            del layer.weight_var
    return model


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameter groups for an SGD optimizer that give *model* the NTK learning rate *lr*, whatever its parameterisation.

    Weights of ``torch.nn.Linear`` and ``Conv2d`` get lr / n_in, all other parameters lr. With them ``model`` and
    ``convert(model, "ntk")`` compute the same function after every step of SGD, with and without momentum, to rounding.
    lr: finite, > 0. Raises ValueError.
    """
    check(0 < lr < math.inf, "parameter_groups", "lr", lr, "a finite number > 0")
    rates: dict[nn.Parameter, float] = dict.fromkeys(model.parameters(), lr)
    for module in model.modules():
        if isinstance(module, tuple(_TWINS)) and not isinstance(module, tuple(_BACK)):
            assert isinstance(module.weight, nn.Parameter)
            rates[module.weight] = lr / fan_in(module.weight)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in rates.items():
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


# ---- what a model says ----


class HiddenLayer(NamedTuple):
    """A layer whose fan-in is the width of the layer before it."""

    name: str
    """Of its module in the model."""
    fan_in: int
    """n_in: inputs of each of its outputs."""
    init_var: float
    """Mean square of its weights, which is their variance while they are as they were drawn."""


def hidden_layers(model: nn.Module) -> tuple[HiddenLayer, ...]:
    """The layers of *model* that count for the normalised noise scale: all linear ones and convolutions but the first.

    The first one's fan-in is that of the data, and does not grow with the width. Read before training: the variance is
    measured, with a relative standard error of about sqrt(2 / number of weights). The order is that of ``model.modules()``.
    Raises ValueError if there are fewer than two such layers.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [(name, module.weight.detach()) for name, module in model.named_modules() if isinstance(module, kinds)]
    accepted = "a model with at least two linear layers or convolutions"
    check(len(found) >= 2, "hidden_layers", "model", type(model).__name__, accepted)
    return tuple(
        HiddenLayer(name, fan_in(weight), float(weight.double().square().mean())) for name, weight in found[1:]
    )
