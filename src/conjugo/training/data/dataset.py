"""What a data set is: two splits of tensors and the names of its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from conjugo.errors import check

__all__ = ["Dataset", "Split"]


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their classes.

    inputs: images uint8 [N, C, H, W] with values 0..255, or table rows float32 [N, F]. targets: class indices int64
    [N]. Raises ValueError when the two do not fit together.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        form = (self.inputs.dtype, self.inputs.ndim)
        accepted = "uint8 [N, C, H, W] or float32 [N, F]"
        given = f"{self.inputs.dtype} {list(self.inputs.shape)}"
        check(form in ((torch.uint8, 4), (torch.float32, 2)), "Split", "inputs", given, accepted)
        given = f"{self.targets.dtype} {list(self.targets.shape)}"
        fits = self.targets.dtype == torch.int64 and self.targets.shape == self.inputs.shape[:1]
        check(fits, "Split", "targets", given, f"int64 [{len(self.inputs)}]")

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set that lies in memory, or in a mapped file, as a whole.

    name: the name under which it was loaded. kind: ``image`` or ``table``. classes: names of the classes, by index.
    Raises ValueError when the splits differ in shape or a target is no index into *classes*.
    """

    name: str
    kind: Literal["image", "table"]
    train: Split
    test: Split
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            shape = tuple(split.inputs.shape[1:])
            check(shape == self.input_shape, "Dataset", part, shape, f"of input shape {self.input_shape}")
            if len(split):
                lowest, highest = (int(t) for t in split.targets.aminmax())
                accepted = f"class indices in 0..{self.num_classes - 1}"
                check(
                    lowest >= 0 and highest < self.num_classes,
                    "Dataset",
                    f"{part}.targets",
                    (lowest, highest),
                    accepted,
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (C, H, W) or (F,)."""
        return tuple(self.train.inputs.shape[1:])
