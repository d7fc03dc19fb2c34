"""NLCG at the paper's own scale: ResNet-50 on ImageNet at batch 65,536. Nothing is run: this is the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conjugo.optim.schedules import scale_lr
from conjugo.studies.reproduce.grids import save
from conjugo.studies.reproduce.paper import Request, new_table
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ImageNetPlan", "imagenet"]

_IMAGES = 1_281_167  # training images of ILSVRC 2012
_FLOP = 3 * 8.2e9  # forward and backward, per image of 224 x 224


@dataclass(frozen=True)
class ImageNetPlan:
    """What would be run: *train* with each of *optimizers*, at each of *lrs*, with *seeds* seeds."""

    train: TrainConfig
    optimizers: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: int

    @property
    def steps(self) -> int:
        """Of a run."""
        assert self.train.batch_size != "full"
        return int(self.train.epochs * _IMAGES / self.train.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "nlcg",
            "scale": "full",
            "train": self.train.to_dict(),
            "optimizers": list(self.optimizers),
            "lrs": list(self.lrs),
            "seeds": self.seeds,
            "steps": self.steps,
        }

    def tables(self) -> list[RenderableType]:
        """The configuration."""
        train = self.train
        table = new_table("ResNet-50, ImageNet: what would be run", "Weight decay is part of the gradient.")
        table.add_column("")
        rows = {
            "data, model": f"ImageNet (ILSVRC 2012, {_IMAGES:,} images of 224 x 224 pixels), {train.model}",
            "batch": f"{train.batch_size:,}, in micro-batches of {train.micro_batch}",
            "length": f"{train.epochs:g} epochs, {self.steps:,} steps",
            "schedule": f"warm-up over {train.warmup:.1%} of the steps with power 1/2, drops at 51 % and 76.5 %",
            "weight decay": f"{train.weight_decay:g}, none on parameters with one dimension",
            "evaluation": f"weights averaged with a decay of up to {train.ema}",
            "label smoothing": f"{train.label_smoothing:g}",
            "optimizers": ", ".join(self.optimizers),
            "learning rates": f"{', '.join(f'{lr:g}' for lr in self.lrs)} for each",
            "seeds": str(self.seeds),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return [table]

    def text(self) -> str:
        """What it would take, and what was published."""
        runs = len(self.optimizers) * len(self.lrs) * self.seeds
        each = self.train.epochs * _IMAGES * _FLOP
        return (
            f"Nothing was run: these are {runs} runs of {each:.1e} floating-point operations each. The paper's abstract "
            "claims more than 10 points of top-1 accuracy over its baseline at batches above 65,000; its learning rates "
            "are not known, those here follow the linear rule 0.1 · batch / 256, half and twice that."
        )


def imagenet(request: Request) -> ImageNetPlan:
    """The plan."""
    batch = 65_536
    train = TrainConfig(
        data="imagefolder",
        image_size=224,
        model="resnet50",
        batch_size=batch,
        micro_batch=256,
        epochs=90.0,
        schedule="polynomial",
        warmup=0.125,
        weight_decay=1e-4,
        decay_norm_and_bias=False,
        ema=0.9999,
    )
    lr = scale_lr(0.1, batch, 256)
    optimizers = ("nlcg-step", "nlcg", "momentum", "nesterov", "lars")
    plan = ImageNetPlan(train, optimizers, (lr / 2, lr, 2 * lr), seeds=2)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        save(plan.to_dict(), {}, request.out)
    return plan
