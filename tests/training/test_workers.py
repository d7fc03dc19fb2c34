"""Several workers train one model: the numbers of one worker, the same decisions on all, no worker left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed import ranks
from tests.training.small_data import images, table

from conjugo.distributed import Checkpointer
from conjugo.errors import ReplicasDiffer, TrainingDiverged
from conjugo.training import TrainConfig, Trainer, train
from conjugo.training.data import Split
from conjugo.training.metrics import read_metrics

DIGITS = TrainConfig(optimizer="nlcg", lr=0.3, batch_size=128, steps=50, evaluations=2, threads=1)
TABLE = TrainConfig(optimizer="nlcg", lr=0.2, batch_size=20, steps=12, evaluations=3, threads=1)
IMAGES = TrainConfig(model="cnn", optimizer="nlcg", lr=0.1, batch_size=22, steps=6, evaluations=2, threads=1)
DATA = {"table": table, "images": images}


def whole(model: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters, gathered."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def trained(config: TrainConfig, name: str | None = None, **options: Any) -> dict[str, Any]:
    """What a rank sees: the losses of all steps and the end."""
    losses = []
    before = Trainer.train_step

    def noted(self: Trainer) -> None:
        so_far = self.loss_sum.item()
        before(self)
        losses.append(self.loss_sum.item() - so_far)

    Trainer.train_step = noted  # this process is for one test
    try:
        result = train(config, data=None if name is None else DATA[name](), progress=False, **options)
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
GROWING = replace(NO_NORM, batch_schedule=((1, 31), (2, 48)), steps=11)  # 20 x 4, 31 x 3, 48 x 4
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
    "a parabola along the direction": (
        replace(
            NO_NORM, optimizer="nlcg-adam", lr=1.0, weight_decay=0.01, optimizer_options={"line_search": "parabola"}
        ),
        "table",
    ),
    "augmented images": (replace(IMAGES, model="mlp", micro_batch=4), "images"),
    "growing batch": (replace(GROWING, batch_schedule_lr="linear", lr=0.1), "table"),
    "growing batch of augmented images": (
        replace(IMAGES, model="mlp", batch_size=8, batch_schedule=((1, 30),), steps=11),
        "images",
    ),
    "without small losses": (replace(GROWING, micro_batch=None, discard_small_loss=0.6), "table"),
    "without small losses, micro-batches": (
        replace(GROWING, discard_small_loss=0.6, discard_forward="twice"),
        "table",
    ),
    "synchronised batch norm": (replace(IMAGES, sync_batch_norm=True, precision="float32"), "images"),
}
LAYOUTS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "hsdp": {"parallel": "hsdp", "shard_workers": 2},
}


def all_trained(runs: list[tuple[TrainConfig, str]]) -> list[dict[str, Any]]:
    """Several runs in a row, for which the workers are started once."""
    return [trained(config, name) for config, name in runs]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one worker makes of the hard cases."""
    return {name: trained(config, data) for name, (config, data) in HARD.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_setting_gives_what_one_worker_gives(layout, alone):
    runs = [(replace(config, **LAYOUTS[layout]), data) for config, data in HARD.values()]
    by_rank = ranks.run(4 if layout == "hsdp" else 3, all_trained, runs)
    for name, *results in zip(HARD, *by_rank):
        print(name)
        assert_close(results, alone[name], rtol=1e-4)


def test_state_of_nlcg_in_slices():
    config = replace(NO_NORM, shard_state=True)
    assert_close(ranks.run(2, trained, config, "table"), trained(config, "table"))


def statistics(config: TrainConfig) -> tuple[list[torch.Tensor], float | None]:
    """The running statistics at the end of a run, and the loss with them."""
    result = train(config, data=images())
    return list(result.model.buffers()), result.loss


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_statistics_of_batch_norm_are_averaged_over_workers(parallel):
    config = replace(IMAGES, parallel=parallel, lr=0.0, augment=False, precision="float32", batch_size=64)
    (first, loss), (second, other_loss) = ranks.run(2, statistics, config)
    assert loss == other_loss
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    alone = train(replace(config, micro_batch=32), data=images())  # the same halves, one after the other
    for one, both in zip(alone.model.buffers(), first):
        if one.is_floating_point():
            torch.testing.assert_close(both, one, rtol=0.05, atol=0.02)


def test_bfloat16_shards_train_with_batch_norm():
    config = replace(IMAGES, precision="bfloat16", parallel="fsdp", ema=0.9, steps=4)
    first, second = ranks.run(2, trained, config, "images")
    assert first["losses"] == second["losses"]
    assert first["train_loss"] < 0.8
    assert {p.dtype for p in first["weights"]} == {torch.float32}


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2}, "TrainConfig: batch_size must be at least 3, the number of workers, got 2"),
        (
            {"parallel": "hsdp", "shard_workers": 2},
            "shard_workers must be a divisor of 3, the number of workers, got 2",
        ),
        ({"device": "cpu:0"}, "device must be without a number"),
        (
            {"batch_schedule": ((1, 2),)},
            "TrainConfig: batch_schedule must be at least 3, the number of workers, got 2",
        ),
        (
            {"discard_small_loss": 0.9, "discard_forward": "twice"},
            "discard_small_loss must be so small that of 20 examples each of 3 workers has one, got 0.9",
        ),
    ],
)
def test_what_does_not_go_with_three_workers(settings, message):
    with pytest.raises(ranks.RankFailed, match=message) as failed:
        ranks.run(3, trained, replace(TABLE, **settings), "table")
    assert failed.value.kinds == dict.fromkeys(range(3), "ValueError")


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        ({"parallel": "dp"}, "unknown parallel 'dp'"),
        ({"shard_workers": 2}, "shard_workers must be None unless parallel is 'hsdp', got 2"),
        ({"parallel": "hsdp", "shard_workers": 0}, "shard_workers must be an integer >= 1 or None, got 0"),
        (
            {"shard_state": True, "parallel": "fsdp"},
            "shard_state must be False unless the optimizer is NLCG, under 'ddp'",
        ),
        ({"shard_state": True, "optimizer": "adamw"}, "shard_state must be False unless the optimizer is NLCG"),
        ({"replica_check": -1}, "replica_check must be an integer >= 0, got -1"),
    ],
)
def test_settings_that_do_not_go_together(settings, accepted):
    with pytest.raises(ValueError, match=accepted):
        TrainConfig(**settings)


# Numbers that are not finite ------------------------------------------------------------------------------------------


def poisoned(config: TrainConfig, rows: slice) -> dict[str, Any]:
    """Some *rows* of the data are NaN: they come to one worker."""
    data = table()
    inputs = data.train.inputs.clone()
    inputs[rows] = torch.nan
    data = replace(data, train=Split(inputs, data.train.targets))
    result = train(config, data=data, progress=False, stop_on_divergence=False)
    with pytest.raises(TrainingDiverged, match="step 2: 2 steps in a row"):
        train(replace(config, max_skipped=2, batch_size="full", micro_batch=None), data=data)
    return {"skipped": result.skipped_steps, "weights": whole(result.model), "diverged": result.diverged}


def all_poisoned(configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """Several runs in a row."""
    return [poisoned(config, slice(0, 1)) for config in configs]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_nan_on_one_worker_is_skipped_by_all(parallel):
    optimizers = ["nlcg", "momentum", "adamw", "lamb"]
    configs = [replace(TABLE, optimizer=optimizer, parallel=parallel) for optimizer in optimizers]
    for first, second in zip(*ranks.run(2, all_poisoned, configs)):
        assert first["skipped"] == second["skipped"]
        assert 0 < first["skipped"] < 12
        assert not first["diverged"]
        assert all(w.isfinite().all() for w in first["weights"])
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"]))


# Damaged memory -------------------------------------------------------------------------------------------------------


def damaged(config: TrainConfig, out: Path) -> str:
    """A bit of rank 1 flips in step 6; the last checkpoint is from before that."""
    before = Trainer.train_step

    def flips(self: Trainer) -> None:
        before(self)
        if self.step == 6 and self.workers.rank == 1:
            next(self.model.parameters()).data[0, 0] += 1e-3

    Trainer.train_step = flips
    try:
        train(config, data=table(), out=out)
    except ReplicasDiffer as error:
        return str(error)
    return "not found"


@pytest.mark.parametrize("every", [2, 100])
def test_replicas_that_differ_are_found_before_a_checkpoint_is_written(every, tmp_path):
    config = replace(TABLE, replica_check=every, checkpoints=3)  # at 4, 8, 12
    found = ranks.run(3, damaged, config, tmp_path)
    assert len(set(found)) == 1
    assert "rank 1 on host" in found[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


# Interrupting and resuming --------------------------------------------------------------------------------------------


def stopped(config: TrainConfig, name: str, out: Path, step: int, signum: int) -> str:
    """The last rank gets a signal in *step*."""
    before = Trainer.train_step

    def signalled(self: Trainer) -> None:
        if self.step == step - 1 and self.workers.rank == self.workers.size - 1:
            os.kill(os.getpid(), signum)
        before(self)

    Trainer.train_step = signalled
    try:
        train(config, data=DATA[name](), out=out)
    except (KeyboardInterrupt, SystemExit) as stop:
        return repr(stop)
    finally:
        Trainer.train_step = before
    return "not stopped"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_worker_stops_all_in_the_same_step(tmp_path, signum):
    expected = {signal.SIGINT: "KeyboardInterrupt()", signal.SIGTERM: "SystemExit(143)"}[signum]
    config = replace(TABLE, checkpoints=0)
    assert ranks.run(3, stopped, config, "table", tmp_path, 7, signum) == [expected] * 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]


RESUMED = {
    "ddp": (replace(NO_NORM, ema=0.9), "table"),
    "ddp, state in slices": (replace(NO_NORM, shard_state=True), "table"),
    "ddp, adamw": (replace(NO_NORM, optimizer="adamw", asynchronous=True), "table"),
    "fsdp": (replace(NO_NORM, parallel="fsdp", ema=0.9), "table"),
    "fsdp, momentum": (replace(NO_NORM, parallel="fsdp", optimizer="momentum"), "table"),
    "ddp, growing batch": (replace(GROWING, batch_schedule_lr="sqrt"), "table"),
    "ddp, without small losses": (replace(GROWING, discard_small_loss=0.4, discard_forward="twice"), "table"),
    "ddp, images": (replace(IMAGES, checkpoints=0), "images"),
    "fsdp, images": (replace(IMAGES, checkpoints=0, parallel="fsdp"), "images"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_as_many_workers_go_on_bit_for_bit(name, tmp_path):
    config, data = RESUMED[name]
    expected = ranks.run(2, trained, config, data)
    ranks.run(2, stopped, config, data, tmp_path, config.steps // 2 + 1, signal.SIGINT)
    resumed = ranks.run(2, resume, config, data, tmp_path)
    for one, other in zip(resumed, expected):
        assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"]))
        assert {k: one[k] for k in ("curve", "loss", "train_loss")} == {
            k: other[k] for k in ("curve", "loss", "train_loss")
        }


def resume(config: TrainConfig, name: str, out: Path) -> dict[str, Any]:
    """The rest of a run."""
    return trained(config, name, out=out, resume=True)


@pytest.mark.filterwarnings("ignore:.*was saved by:UserWarning")
@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_other_workers_go_on_with_the_same_examples(first, then, tmp_path):
    config = replace(IMAGES, model="mlp", steps=12, checkpoints=0)  # augmented
    expected = trained(config, "images")
    ranks.run(3, stopped, replace(config, parallel=first), "images", tmp_path / "a", 7, signal.SIGINT)
    resumed = ranks.run(2, resume, replace(config, parallel=then), "images", tmp_path / "a")
    assert_close(resumed, {**expected, "losses": expected["losses"][7:]}, rtol=1e-4)
    ranks.run(2, stopped, replace(config, parallel=first), "images", tmp_path / "b", 7, signal.SIGINT)
    alone = resume(config, "images", tmp_path / "b")
    assert_close([alone], {**expected, "losses": expected["losses"][7:]}, rtol=1e-4)


def random_numbers(config: TrainConfig, out: Path) -> list[float]:
    """Go on from the checkpoint in *out*, and draw what a dropout layer would."""
    trainer = Trainer(config, table())
    checkpoints = Checkpointer(out)
    if checkpoints.load_latest(**trainer.stateful()) is None:
        checkpoints.save(0, **trainer.stateful())
    return torch.rand(3).tolist()


@pytest.mark.filterwarnings("ignore:.*was saved by:UserWarning")
def test_each_worker_has_random_numbers_of_its_own(tmp_path):
    begun = ranks.run(2, random_numbers, TABLE, tmp_path)
    assert begun[0] != begun[1]
    assert ranks.run(2, random_numbers, TABLE, tmp_path) == begun
    others = ranks.run(3, random_numbers, TABLE, tmp_path)
    assert len({tuple(numbers) for numbers in others}) == 3
    assert ranks.run(3, random_numbers, TABLE, tmp_path) == others


# One worker fails -----------------------------------------------------------------------------------------------------


def one_fails(config: TrainConfig) -> None:
    """Rank 1 raises an exception in the fourth step."""
    before = Trainer.train_step

    def broken(self: Trainer) -> None:
        if self.step == 3 and self.workers.rank == 1:
            raise MemoryError("no more")
        before(self)

    Trainer.train_step = broken
    train(config, data=table())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_others_do_not_wait_for_a_worker_that_failed(parallel):
    began = time.monotonic()
    with pytest.raises(ranks.RankFailed) as failed:
        ranks.run(3, one_fails, replace(TABLE, parallel=parallel))
    assert time.monotonic() - began < 20
    assert failed.value.kinds[1] == "MemoryError"
    assert set(failed.value.kinds) == {0, 1, 2}


# The command ----------------------------------------------------------------------------------------------------------

COMMANDED = TrainConfig(epochs=60, evaluations=30, checkpoints=30, threads=1)
WORDS = ["train", "--workers", "2", "--epochs", "60", "--evaluations", "30", "--checkpoints", "30", "--threads", "1"]


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "conjugo", *WORDS, *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The process numbers of the workers."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, listed) if b"conjugo.cli._worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def assert_uninterrupted(run: Path) -> None:
    """The result in *run* is that of workers that nothing happened to, bit for bit."""
    result = json.loads((run / "result.json").read_text())
    expected = ranks.run(2, trained, COMMANDED)[0]
    for name in ("loss", "train_loss", "accuracy", "steps", "samples"):
        assert result[name] == expected[name]
    assert tuple(map(tuple, result["curve"])) == expected["curve"]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@needs_proc
def test_workers_by_command_survive_kill_9(tmp_path):
    process = start("--out", "run", cwd=tmp_path)
    wait_for(lambda: len(list((tmp_path / "run").glob("checkpoints/step-*"))) > 1, process)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    assert "on 2 workers" in said
    assert said.count("run directory: run") == 1
    assert "starting all workers anew (1 of 3)" in complained
    assert "Traceback" not in complained
    assert_uninterrupted(tmp_path / "run")


@needs_proc
@pytest.mark.slow
def test_workers_by_command_go_on_after_ctrl_c(tmp_path):
    process = start("--out", "run", cwd=tmp_path)
    records = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: records.exists() and len(read_metrics(records)) > 1, process)
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=120)
    assert process.returncode == 130, complained
    assert f"to go on: conjugo {' '.join(WORDS)} --out run --resume" in complained
    assert "Traceback" not in complained
    again = start("--out", "run", cwd=tmp_path)
    _, complained = again.communicate(timeout=120)
    assert (again.returncode, complained.count("holds a run already")) == (2, 1)
    resumed = start("--out", "run", "--resume", cwd=tmp_path)
    _, complained = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, complained
    assert_uninterrupted(tmp_path / "run")


@pytest.mark.slow
def test_failures_that_would_repeat_are_not_repeated(tmp_path):
    process = start("--out", "run", "--optimizer", "sgd", "--lr", "1e30", cwd=tmp_path)
    _, complained = process.communicate(timeout=120)
    assert process.returncode == 1
    assert complained.count("not finite") == 1
    assert len(complained.strip().splitlines()) == 1


def test_small_micro_batches_are_warned_of_where_there_is_batch_norm():
    with pytest.warns(UserWarning, match="batch norm sees 11 examples at a time"):
        Trainer(replace(IMAGES, micro_batch=12), images())
    Trainer(replace(IMAGES, micro_batch=12, model="mlp"), images())
    Trainer(replace(IMAGES, batch_size=8), images())  # as asked for
