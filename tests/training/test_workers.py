"""Several workers train one model: the numbers of one worker, the same decisions on all, no worker left behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.distributed import ranks
from tests.training.small_data import images, table

from conjugo.training import TrainConfig, Trainer, train

DIGITS = TrainConfig(optimizer="nlcg", lr=0.3, batch_size=128, steps=50, evaluations=2, threads=1)
TABLE = TrainConfig(optimizer="nlcg", lr=0.2, batch_size=20, steps=12, evaluations=3, threads=1)
IMAGES = TrainConfig(model="cnn", optimizer="nlcg", lr=0.1, batch_size=22, steps=6, evaluations=2, threads=1)
DATA = {"table": table, "images": images}


def whole(model: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters, gathered."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def trained(config: TrainConfig, name: str | None = None) -> dict[str, Any]:
    """What a rank sees: the losses of all steps and the end."""
    losses = []
    before = Trainer.train_step

    def noted(self: Trainer) -> None:
        so_far = self.loss_sum.item()
        before(self)
        losses.append(self.loss_sum.item() - so_far)

    Trainer.train_step = noted  # this process is for one test
    try:
        result = train(config, data=None if name is None else DATA[name](), progress=False)
    finally:
        Trainer.train_step = before
    numbers = {key: value for key, value in result.to_dict().items() if key not in ("seconds", "images_per_second")}
    return {"losses": losses, "weights": whole(result.model), **numbers}


def assert_close(results: list[dict[str, Any]], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """All ranks say the same, and that is *expected* but for rounding."""
    for other in results[1:]:
        assert other["losses"] == results[0]["losses"]
        assert all(torch.equal(a, b) for a, b in zip(other["weights"], results[0]["weights"]))
        assert {k: v for k, v in other.items() if k != "weights"} == {
            k: v for k, v in results[0].items() if k != "weights"
        }
    found = results[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=rtol)
    assert (found["steps"], found["samples"]) == (expected["steps"], expected["samples"])
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.006)
    for a, b in zip(found["weights"], expected["weights"]):
        torch.testing.assert_close(a, b, rtol=100 * rtol, atol=100 * rtol)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_losses_of_one_worker(world, parallel):
    expected = trained(DIGITS)
    config = replace(DIGITS, micro_batch=32, parallel=parallel)
    assert_close([trained(replace(DIGITS, micro_batch=32))], expected)
    assert_close(ranks.run(world, trained, config), expected)


NO_NORM = replace(TABLE, micro_batch=7)  # 7 + 7 + 6: unequal shares
HARD = {
    "uneven shares": (NO_NORM, "table"),
    "one example at a time": (replace(TABLE, batch_size=7, micro_batch=1), "table"),
    "line search": (replace(NO_NORM, optimizer="nlcg-step"), "table"),
    "clipping and decay groups": (
        replace(NO_NORM, clip_norm=0.5, weight_decay=0.01, decay_norm_and_bias=False),
        "table",
    ),
    "layer-wise NLCG": (replace(NO_NORM, optimizer_options={"lars": 0.1}), "table"),
    "momentum, average": (replace(NO_NORM, optimizer="momentum", ema=0.9), "table"),
    "adamw, clipping": (replace(NO_NORM, optimizer="adamw", clip_norm=0.5), "table"),
    "rmsprop": (replace(NO_NORM, optimizer="rmsprop", lr=0.01), "table"),
    "lars": (replace(NO_NORM, optimizer="lars", lr=10.0), "table"),
    "lamb": (replace(NO_NORM, optimizer="lamb"), "table"),
    "augmented images": (replace(IMAGES, model="mlp", micro_batch=4), "images"),
    "synchronised batch norm": (replace(IMAGES, sync_batch_norm=True, precision="float32"), "images"),
}
LAYOUTS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "hsdp": {"parallel": "hsdp", "shard_workers": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HARD)
def test_every_setting_gives_what_one_worker_gives(name, layout):
    config, data = HARD[name]
    world = 4 if layout == "hsdp" else 3
    expected = trained(config, data)
    assert_close(ranks.run(world, trained, replace(config, **LAYOUTS[layout]), data), expected, rtol=1e-4)


def test_state_of_nlcg_in_slices():
    config = replace(NO_NORM, shard_state=True)
    assert_close(ranks.run(2, trained, config, "table"), trained(config, "table"))
