"""Small made-up data sets on which training takes no time."""

import torch

from conjugo.training.data import Dataset, Split


def table(n: int = 96, features: int = 6, classes: int = 3, *, seed: int = 0) -> Dataset:
    """Classes along a random direction each: learnable, not trivial."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, features, generator=generator)
    inputs = torch.randn(n + 48, features, generator=generator)
    targets = (inputs @ directions.T + 0.3 * torch.randn(n + 48, classes, generator=generator)).argmax(1)
    train, test = Split(inputs[:n], targets[:n]), Split(inputs[n:], targets[n:])
    return Dataset("table", "table", train, test, tuple("abc"[:classes]))


def images(n: int = 64, side: int = 16, *, seed: int = 0) -> Dataset:
    """Colour images of noise, brighter in one half of the rows: which half is the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (n + 32,), generator=generator)
    inputs = torch.randint(0, 160, (n + 32, 3, side, side), generator=generator)
    bright = torch.arange(side)[None, :] // (side // 2) == targets[:, None]
    inputs = (inputs + 80 * bright[:, None, :, None]).to(torch.uint8)
    train, test = Split(inputs[:n], targets[:n]), Split(inputs[n:], targets[n:])
    return Dataset("images", "image", train, test, ("up", "down"))
