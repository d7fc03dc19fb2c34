"""Models: published parameter and operation counts, gradients, determinism, mixed precision, memory formats."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conjugo.errors import UnknownName
from conjugo.training import models
from conjugo.training.data import Dataset, Split

COLOUR = (3, 32, 32)
SMALL = [name for name in models.names() if name not in ("resnet50", "resnet56", "resnet56v1")]


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make(name: str, shape=COLOUR, classes=10, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(name, input_shape=shape, num_classes=classes, **options)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("mlp", (1, 8, 8), 10, 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ("mlp-bn", (1, 8, 8), 10, 64 * 128 + 256 + 128 * 128 + 256 + 128 * 10 + 10),
        ("mlp", (30,), 2, 30 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2),
        ("cnn", COLOUR, 10, 9 * (3 * 16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 64 * 10 + 10),
        ("resnet32", COLOUR, 100, 472_820),
        ("resnet32", COLOUR, 10, 466_970),
        ("resnet20v1", COLOUR, 10, 269_722),
        ("resnet32v1", COLOUR, 10, 464_154),
        ("resnet56v1", COLOUR, 10, 853_018),
        ("resnet50", (3, 224, 224), 1000, 25_557_032),
    ],
)
def test_number_of_parameters(name, shape, classes, parameters):
    assert count(make(name, shape, classes)) == parameters


def flops(model: torch.nn.Module, shape: tuple[int, ...]) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(1, *shape))
    return counter.get_total_flops()


def test_operations_of_resnet32():
    assert flops(make("resnet32"), COLOUR) == pytest.approx(0.139e9, rel=0.005)


def test_operations_of_resnet50():
    assert flops(make("resnet50", (3, 224, 224), 1000), (3, 224, 224)) == pytest.approx(2 * 4.09e9, rel=0.005)


@pytest.mark.parametrize(("name", "layers"), [(f"resnet{d}{v}", d) for d in (8, 20, 32, 56) for v in ("", "v1")])
def test_depth_counts_the_weight_layers(name, layers):
    weights = [m for m in make(name).modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert len([m for m in weights if getattr(m, "kernel_size", None) != (1, 1)]) == layers


@pytest.mark.parametrize("name", [*SMALL, "resnet50"])
def test_gradients_flow_to_every_parameter(name):
    model = make(name)
    images, targets = torch.randn(8, *COLOUR), torch.arange(8)
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert torch.isfinite(p.grad).all(), parameter_name
        assert p.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", [*SMALL, "resnet50"])
def test_same_seed_same_model_and_evaluation_changes_nothing(name):
    first, second = make(name).eval(), make(name).eval()
    before = {k: v.clone() for k, v in first.state_dict().items()}
    images = torch.randn(4, *COLOUR)
    with torch.no_grad():
        assert torch.equal(first(images), first(images))
        assert torch.equal(first(images), second(images))
        # Each example is judged alone in evaluation; the matrix products of other batch sizes may round differently.
        torch.testing.assert_close(first(images)[:1], first(images[:1]), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in first.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast(name):
    model = make(name)
    images = torch.randn(4, *COLOUR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    assert logits.shape == (4, 10)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in SMALL if not n.startswith("mlp")])
def test_channels_last_computes_the_same(name):
    model = make(name).double()
    images = torch.randn(4, *COLOUR, dtype=torch.float64)
    expected = model(images)
    model = make(name).double().to(memory_format=torch.channels_last)
    actual = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_initial_weights_of_version_2_have_variance_one_over_fan_in():
    model = make("resnet32")
    for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() >= 4000):
        weight = conv.weight.detach()
        std = 1 / math.sqrt(weight[0].numel())
        n = weight.numel()
        # The kurtosis of the truncated normal is below 3, so 5 standard errors of the normal's std estimate are
        # generous.
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert weight.abs().max().item() <= 2 * std / 0.8796 + 1e-6


@pytest.mark.parametrize("name", ["resnet8", "resnet8v1"])
def test_batch_norm_settings(name):
    norms = [m for m in make(name).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-5}
    assert {m.momentum for m in norms} == {0.1 if name.endswith("v1") else 0.01}


def test_zero_init_makes_every_block_the_identity_on_positive_input():
    blocks = make("resnet50", zero_init_last_gamma=True).eval().blocks
    x = torch.rand(2, 256, 4, 4)
    torch.testing.assert_close(blocks[1](x), x, rtol=0, atol=0)
    assert not torch.equal(make("resnet50").eval().blocks[1](x), x)


def test_options_reach_the_model():
    assert count(make("mlp", (4,), 3, hidden=(5,))) == 4 * 5 + 5 + 5 * 3 + 3
    assert count(make("mlp", (4,), 3, hidden=())) == 4 * 3 + 3


def test_bad_input_is_named():
    with pytest.raises(UnknownName, match="resnet32"):
        make("resnet33")
    with pytest.raises(ValueError, match=r"input_shape.*\(30,\)"):
        make("cnn", (30,))
    with pytest.raises(ValueError, match="input_shape"):
        make("mlp", ())
    with pytest.raises(ValueError, match=r"num_classes.*got 1"):
        make("mlp", (4,), 1)
    with pytest.raises(ValueError, match=r"hidden"):
        make("mlp", (4,), 2, hidden=(0,))
    with pytest.raises(ValueError, match=r"depth.*got 9"):
        models.ResNet(COLOUR, 10, depth=9)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((30,), "mlp"),
        ((1, 8, 8), "mlp"),
        ((1, 28, 28), "cnn"),
        ((3, 32, 32), "resnet8"),
        ((3, 64, 64), "resnet8"),
        ((3, 224, 224), "resnet50"),
    ],
)
def test_default_model(shape, expected):
    dtype = torch.float32 if len(shape) == 1 else torch.uint8
    split = Split(torch.zeros(2, *shape, dtype=dtype), torch.tensor([0, 1]))
    dataset = Dataset("made up", "table" if len(shape) == 1 else "image", split, split, ("a", "b"))
    assert models.default_for(dataset) == expected
    assert models.build(expected, input_shape=shape, num_classes=2)(torch.randn(2, *shape)).shape == (2, 2)
