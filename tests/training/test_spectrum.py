"""Recording spectra while a model is trained: right numbers, and a training that does not notice."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from tests.training.small_data import images, table
from tests.training.test_resume import assert_same, interrupt_after, numbers

from conjugo.errors import CorruptFile
from conjugo.training import TrainConfig, train
from conjugo.training.metrics import read_metrics
from conjugo.training.spectrum import (
    Batches,
    Spectrum,
    SpectrumRecorder,
    batch_norm_batch,
    first_examples,
    normalises_batches,
)
from conjugo.training.workers import Workers

PLAIN = TrainConfig(optimizer="momentum", lr=0.1, batch_size=16, steps=18, evaluations=3, checkpoints=3, threads=1)
RECORDED = replace(PLAIN, spectra=3, spectrum_at=(0, 0.5), spectrum_steps=8)
NAMES = {"spectrum_step", *SpectrumRecorder.NAMES}


def saved(folder):
    return {path.name: Spectrum.load(path) for path in (folder / "spectra").iterdir()}


def test_it_is_recorded_when_it_was_asked_for(tmp_path):
    train(RECORDED, data=table(), out=tmp_path)
    found = saved(tmp_path)
    assert {spectrum.about["step"] for spectrum in found.values()} == {0, 3, 6, 12, 18}  # 0.5 epochs are 3 steps
    assert found["step-12.json"].about["epoch"] == 2
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["spectrum_step"] for record in records] == [6, 12, 18]
    for record in records:
        mine = found[f"step-{record['spectrum_step']}.json"].numbers()
        assert all(record[name] == mine[name] for name in SpectrumRecorder.NAMES)


def test_the_numbers_are_those_of_the_exact_hessian(tmp_path):
    """At the end of training, by dense second derivatives of the returned model."""
    config = replace(PLAIN, spectra=1, spectrum_examples=40, label_smoothing=0.1)
    data = table()
    result = train(config, data=data, out=tmp_path)
    found = saved(tmp_path)["step-18.json"]
    rows = first_examples(len(data.train), 40, config.seed)
    inputs, targets = data.train.inputs[rows].double(), data.train.targets[rows]
    model = result.model.double()
    named = {name: p.detach() for name, p in model.named_parameters()}

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}
        logits = torch.func.functional_call(model, values, (inputs,))
        return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)

    flat = torch.cat([p.reshape(-1) for p in named.values()])
    gradient = torch.func.grad(loss)(flat)

    def products(vector):
        return torch.func.jvp(torch.func.grad(loss), (flat,), (vector,))[1]

    operator = LinearOperator(
        (len(flat),) * 2, matvec=lambda v: products(torch.from_numpy(v.copy())).numpy(), dtype=float
    )
    values, vectors = map(torch.from_numpy, eigsh(operator, 3, which="LA"))
    assert found.loss == pytest.approx(float(loss(flat)), rel=1e-5)
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert found.eigenvalues == pytest.approx(values.flip(0).tolist(), rel=1e-4)
    fraction = float((vectors.T @ gradient).square().sum() / gradient.square().sum())
    assert found.gradient_fraction == pytest.approx(fraction, abs=1e-2)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_training_does_not_notice(model, tmp_path):
    """The same bits with recording and without, with batch norm and augmentation too."""
    data = images() if model == "cnn" else table()
    config = replace(PLAIN, model=model, steps=6, ema=0.9)
    expected = train(config, data=data, out=tmp_path / "plain")
    seen = torch.random.get_rng_state()
    recorded = replace(config, spectra=2, spectrum_at=(0,), spectrum_steps=4, spectrum_probes=1, spectrum_examples=20)
    assert_same(train(recorded, data=data, out=tmp_path / "recorded"), expected)
    assert torch.equal(torch.random.get_rng_state(), seen)
    plain, more = (numbers(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("plain", "recorded"))
    assert [{k: v for k, v in record.items() if k not in NAMES} for record in more] == plain
    assert len(saved(tmp_path / "recorded")) == 3


def test_a_resumed_run_goes_on_recording(tmp_path, monkeypatch):
    train(RECORDED, data=table(), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 14)
        with pytest.raises(KeyboardInterrupt):
            train(RECORDED, data=table(), out=tmp_path / "run")
    train(RECORDED, data=table(), out=tmp_path / "run", resume=True)
    whole, resumed = (numbers(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "run"))
    assert resumed == whole
    for name, spectrum in saved(tmp_path / "whole").items():
        other = saved(tmp_path / "run")[name]
        assert other.eigenvalues == spectrum.eigenvalues
        assert other.density.to_dict() == spectrum.density.to_dict()


def test_a_run_may_begin_to_record_when_it_is_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(PLAIN, data=table(), out=tmp_path)
    train(RECORDED, data=table(), out=tmp_path, resume=True)
    assert set(saved(tmp_path)) == {"step-12.json", "step-18.json"}


def test_weights_that_are_not_finite_leave_no_spectrum(tmp_path):
    def spoil(trainer):
        if trainer.step == 17:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(math.inf)

    config = replace(PLAIN, spectra=1, spectrum_steps=4)
    train(config, data=table(), out=tmp_path, callbacks=[spoil], stop_on_divergence=False)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["spectrum_step"] == 18
    assert all(last[name] is None for name in SpectrumRecorder.NAMES)
    assert not (tmp_path / "spectra").exists()


def test_callbacks_see_every_step_and_their_numbers_are_recorded(tmp_path):
    steps = []

    def note(trainer):
        steps.append(trainer.step)
        return {"last_seen": trainer.step} if trainer.step % 5 == 0 else None

    result = train(PLAIN, data=table(), out=tmp_path, callbacks=[note])
    assert steps == list(range(19))
    assert [record.get("last_seen") for record in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 15]
    assert result.steps == 18


@pytest.mark.parametrize(
    ("setting", "accepted"),
    [
        ({"spectra": -1}, "spectra must be an integer >= 0"),
        ({"spectrum_at": (-0.5,)}, "spectrum_at must be epochs in"),
        ({"spectrum_steps": 0}, "spectrum_steps must be an integer >= 1"),
        ({"spectrum_examples": 0}, "spectrum_examples must be an integer >= 1 or None"),
        ({"spectrum_bn_mode": "both"}, "spectrum_bn_mode"),
    ],
)
def test_settings_are_checked(setting, accepted):
    with pytest.raises(ValueError, match=accepted):
        TrainConfig(**setting)


def test_settings_survive_a_file():
    assert TrainConfig.from_dict(RECORDED.to_dict() | {"spectrum_at": [0, 0.5]}) == RECORDED


# ---- parts ----


class Place(Workers):
    """One of several workers that are not there."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("n", "batch", "size"), [(10, 4, 1), (10, 4, 3), (2, 4, 3), (11, 5, 2), (1, 1, 1)])
@pytest.mark.parametrize("together", [False, True])
def test_the_workers_see_each_example_once(n, batch, size, together):
    dealt = [list(Batches(lambda rows: (rows, rows), n, batch, Place(r, size), together=together)) for r in range(size)]
    assert sorted(int(row) for batches in dealt for rows, _ in batches for row in rows) == list(range(n))
    assert all(1 <= len(rows) <= batch for batches in dealt for rows, _ in batches)
    if together:  # the same batches as for one worker
        alone = {tuple(rows.tolist()) for rows, _ in Batches(lambda r: (r, r), n, batch, Place(0, 1), together=True)}
        assert {tuple(rows.tolist()) for batches in dealt for rows, _ in batches} == alone


def test_batches_are_as_large_as_batch_norm_sees_them():
    config = replace(PLAIN, batch_size=64)
    assert batch_norm_batch(config, 100, 1) == 64
    assert batch_norm_batch(config, 100, 4) == 16
    assert batch_norm_batch(replace(config, sync_batch_norm=True), 100, 4) == 64
    assert batch_norm_batch(replace(config, micro_batch=10), 100, 4) == 10
    assert batch_norm_batch(replace(config, batch_size="full"), 100, 1) == 100


def test_whether_batches_matter():
    norm = torch.nn.BatchNorm1d(3)
    assert normalises_batches(norm, "train")
    assert not normalises_batches(norm, "eval")
    assert normalises_batches(norm, "as_is")
    assert not normalises_batches(norm.eval(), "as_is")
    assert normalises_batches(torch.nn.BatchNorm1d(3, track_running_stats=False), "eval")
    assert not normalises_batches(torch.nn.Linear(3, 3), "train")


def test_files_come_back_and_damaged_ones_are_named(tmp_path):
    train(replace(PLAIN, spectra=1, spectrum_steps=4), data=table(), out=tmp_path)
    path = tmp_path / "spectra" / "step-18.json"
    assert Spectrum.load(path).to_dict() == Spectrum.from_dict(Spectrum.load(path).to_dict()).to_dict()
    path.write_text(path.read_text()[:-100])
    with pytest.raises(CorruptFile, match="is no spectrum"):
        Spectrum.load(path)
