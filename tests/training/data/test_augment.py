"""Augmentation against a naive loop over images with the same draws, and what is drawn."""

import math

import numpy as np
import pytest
import torch

from conjugo.training.data import Augment, Dataset, Split, default_augment


def random_images(n=7, channels=3, height=10, width=12) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_standardise(augment: Augment, image: np.ndarray) -> np.ndarray:
    x = image.astype(np.float64)
    if augment.standardize == "image":
        return (x - x.mean()) / max(x.std(), 1 / math.sqrt(x.size))
    if augment.standardize == "none":
        return x / 255
    mean, std = (np.broadcast_to(values, len(x)) for values in (augment.mean, augment.std))
    return np.stack([(plane / 255 - m) / s for plane, m, s in zip(x, mean, std)])


def naive(augment: Augment, images: torch.Tensor, draws: torch.Generator) -> np.ndarray:
    """One image after the other, in float64."""
    n, _, height, width = images.shape

    def draw(high: int) -> list[int]:
        return torch.randint(high, (n,), generator=draws).tolist()

    flips = draw(2) if augment.flip else [0] * n
    tops = draw(2 * augment.pad + 1) if augment.pad else [0] * n
    lefts = draw(2 * augment.pad + 1) if augment.pad else [0] * n
    centres = list(zip(draw(height), draw(width))) if augment.cutout else []
    out = []
    for i, image in enumerate(images.numpy()):
        padded = np.pad(image, ((0, 0), (augment.pad,) * 2, (augment.pad,) * 2))
        crop = padded[:, tops[i] : tops[i] + height, lefts[i] : lefts[i] + width]
        crop = crop[:, :, ::-1] if flips[i] else crop
        x = naive_standardise(augment, crop)
        if augment.cutout:
            top, left = (centre - augment.cutout // 2 for centre in centres[i])
            for row in range(max(top, 0), min(top + augment.cutout, height)):
                for column in range(max(left, 0), min(left + augment.cutout, width)):
                    x[:, row, column] = 0
        out.append(x)
    return np.stack(out)


AUGMENTS = [
    Augment(),
    Augment(pad=0),
    Augment(flip=False),
    Augment(pad=0, flip=False),
    Augment(pad=2, cutout=5),
    Augment(pad=15, cutout=1, standardize="none"),
    Augment(cutout=4, standardize="channel", mean=(0.5,), std=(0.25,)),
    Augment(cutout=30),
]


@pytest.mark.parametrize("augment", AUGMENTS, ids=repr)
@pytest.mark.parametrize("channels", [1, 3])
def test_training_batches_equal_those_of_a_naive_loop(augment, channels):
    images = random_images(channels=channels)
    actual = augment(images, train=True, generator=generator())
    expected = torch.from_numpy(naive(augment, images, generator()))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()


def test_one_mean_and_deviation_per_channel():
    augment = Augment(standardize="channel", mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    images = random_images()
    expected = torch.from_numpy(naive(augment, images, generator()))
    torch.testing.assert_close(augment(images, train=True, generator=generator()).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("augment", AUGMENTS, ids=repr)
def test_evaluation_only_standardises_and_draws_nothing(augment):
    images = random_images()
    source = generator()
    before = source.get_state(), torch.get_rng_state()
    actual = augment(images, train=False, generator=source)
    expected = np.stack([naive_standardise(augment, image) for image in images.numpy()])
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    assert torch.equal(source.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_uniform_image_becomes_zero():
    """The deviation is bounded below, so that there is no division by zero."""
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(Augment()(images, train=False), torch.zeros(2, 3, 4, 4))


def test_a_nearly_uniform_image_is_divided_by_the_bound():
    images = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    images[0, 0, 0, 0] = 1  # deviation about 1/32, its bound exactly 1/32
    expected = (images.double() - 1 / 1024) * 32
    torch.testing.assert_close(Augment()(images, train=False).double(), expected, rtol=0, atol=1e-6)


def test_the_input_is_not_changed():
    images = random_images()
    before = images.clone()
    for augment in AUGMENTS:
        augment(images, train=True)
        augment(images, train=False)
    assert torch.equal(images, before)


def test_the_generator_determines_the_batch():
    augment, images = Augment(cutout=3), random_images()
    first = augment(images, train=True, generator=generator(1))
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(first, augment(images, train=True, generator=generator(1)))
    assert not torch.equal(first, augment(images, train=True, generator=generator(2)))


def test_without_a_generator_torchs_global_one_is_used():
    images = random_images()
    torch.manual_seed(5)
    first = Augment()(images, train=True)
    torch.manual_seed(5)
    assert torch.equal(first, Augment()(images, train=True))
    assert torch.equal(first, Augment()(images, train=True, generator=generator(5)))


@pytest.mark.parametrize("memory", ["channels_last", "expanded", "strided"])
def test_any_memory_layout(memory):
    images = random_images(6)
    other = {
        "channels_last": images.to(memory_format=torch.channels_last),
        "expanded": images[:1].expand(6, -1, -1, -1),
        "strided": random_images(12, width=24)[::2, :, :, ::2],
    }[memory]
    augment = Augment(cutout=3)
    expected = augment(other.contiguous(), train=True, generator=generator())
    actual = augment(other, train=True, generator=generator())
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()


def test_an_empty_batch():
    for train in (True, False):
        assert Augment(cutout=2)(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), train=train).shape == (0, 3, 8, 8)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_an_accelerator_makes_the_same_of_the_same_draws():
    images = random_images()
    for augment in AUGMENTS:
        expected = augment(images, train=True, generator=generator())
        actual = augment(images.to(torch.accelerator.current_accelerator()), train=True, generator=generator())
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-5)


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return ((counts - expected).square() / expected).sum().item()


def upper_bound(cells: int) -> float:
    """Mean and six standard deviations of chi-square: exceeded by chance about once in a million times."""
    return (cells - 1) + 6 * math.sqrt(2 * (cells - 1))


def test_offsets_and_flips_are_uniform_and_independent():
    """Two neighbouring pixels in the middle tell offset and flip of every image."""
    n, pad = 20_000, 2
    images = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4], images[:, :, 4, 5] = 255, 100
    out = Augment(pad=pad, standardize="none")(images, train=True, generator=generator()).flatten(1)
    first, second = out.argmax(1), (out * (out < 0.5)).argmax(1)
    flipped = (second < first).long()
    row = first // 9 - (4 - pad)
    column = torch.where(flipped == 1, 8 - first % 9, first % 9) - (4 - pad)
    assert set(row.tolist()) == set(column.tolist()) == set(range(2 * pad + 1))
    cells = (row * 5 + column) * 2 + flipped
    assert chi_square(torch.bincount(cells, minlength=50).double()) < upper_bound(50)


def test_holes_lie_anywhere_with_equal_probability():
    n = 20_000
    images = torch.full((n, 1, 6, 8), 9, dtype=torch.uint8)
    augment = Augment(pad=0, flip=False, cutout=1, standardize="none")
    holes = augment(images, train=True, generator=generator()) == 0
    assert (holes.flatten(1).sum(1) == 1).all()
    assert chi_square(holes.sum(0).flatten().double()) < upper_bound(48)


@pytest.mark.parametrize("side", [2, 5, 8])
def test_holes_are_squares_clipped_at_the_border_in_all_channels(side):
    images = torch.full((300, 3, 16, 16), 9, dtype=torch.uint8)
    augment = Augment(pad=0, flip=False, cutout=side, standardize="none")
    holes = augment(images, train=True, generator=generator()) == 0
    assert torch.equal(holes, holes[:, :1].expand_as(holes))
    whole = 0
    for hole in holes[:, 0]:
        rows, columns = (hole.any(dim).nonzero().flatten() for dim in (1, 0))
        height, width = (int(places[-1] - places[0]) + 1 for places in (rows, columns))
        assert hole.sum() == height * width
        assert side // 2 <= min(height, width) <= max(height, width) <= side
        whole += height == width == side
    assert 0 < whole < 300


def dataset(inputs: torch.Tensor) -> Dataset:
    split = Split(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    return Dataset("made up", "image" if inputs.ndim == 4 else "table", split, split, ("a",))


def test_default_for_colour_images():
    assert default_augment(dataset(random_images(2, 3, 32, 32))) == Augment(pad=4, flip=True, standardize="image")
    assert default_augment(dataset(random_images(2, 3, 64, 48))).pad == 6


def test_default_for_grey_images():
    images = random_images(50, 1)
    augment = default_augment(dataset(images))
    assert (augment.pad, augment.flip, augment.cutout, augment.standardize) == (0, False, 0, "channel")
    assert augment.mean == pytest.approx((images.double().mean().item() / 255,), rel=1e-12)
    assert augment.std == pytest.approx((images.double().std(correction=0).item() / 255,), rel=1e-12)
    out = augment(images, train=True)
    assert out.mean().item() == pytest.approx(0, abs=1e-5)
    assert out.std(correction=0).item() == pytest.approx(1, rel=1e-5)


def test_default_for_blank_images_is_finite():
    images = torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)
    assert torch.equal(default_augment(dataset(images))(images, train=True).round(decimals=5), torch.zeros(2, 1, 4, 4))


def test_bad_settings_are_named():
    for settings, message in [
        ({"pad": -1}, "pad must be >= 0, got -1"),
        ({"cutout": -2}, "cutout must be >= 0, got -2"),
        ({"standardize": "both"}, "standardize must be one of image, channel, none, got 'both'"),
        ({"mean": (0.1, 0.2)}, r"mean must be as long as std \(1.0,\)"),
        ({"std": (0.0,)}, "std must be > 0"),
        ({"std": (math.nan,)}, "std must be > 0"),
    ]:
        with pytest.raises(ValueError, match=f"Augment: {message}"):
            Augment(**settings)


def test_bad_images_are_named():
    with pytest.raises(ValueError, match=r"images must be uint8 \[B, C, H, W\], got 'torch.float32 \[2, 3, 4, 4\]'"):
        Augment()(torch.zeros(2, 3, 4, 4), train=True)
    with pytest.raises(ValueError, match=r"images must be uint8"):
        Augment()(torch.zeros(3, 4, 4, dtype=torch.uint8), train=True)
    three = Augment(standardize="channel", mean=(0.1,) * 3, std=(1.0,) * 3)
    with pytest.raises(ValueError, match=r"mean must be one number or one per channel of torch.uint8 \[7, 1, 10, 12\]"):
        three(random_images(channels=1), train=False)
    with pytest.raises(ValueError, match=r"default_augment: dataset must be a data set of images"):
        default_augment(dataset(torch.zeros(2, 3)))
