"""The reproduction of batch norm on gradient descent: its verdicts, the real thing, small, resuming, and the part on images."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from conjugo.studies.reproduce import bngd, bngd_networks, paper, reproduce
from conjugo.studies.reproduce.bngd import PARTS, BngdPlan, BngdResult, experiment, images
from conjugo.studies.reproduce.bngd_networks import ImagePlan, NetworkPlan, image_run, perceptron, without_batch_norm
from conjugo.studies.reproduce.paper import Request
from conjugo.training import models

NETWORKS = NetworkPlan(lrs=(0.1, 1.0, 100.0), hidden=12, steps=30, batch=50, seeds=1, layer_hidden=4, layer_examples=60)
TINY = BngdPlan(
    d=8,
    kappas=(25.0,),
    steps=400,
    long=2000,
    lrs=22,
    lr_as=3,
    dimensions=(4, 12),
    starts=3,
    run_starts=1,
    data={"diabetes": 1e-3},
    data_steps=300,
    data_lrs=13,
    data_starts=2,
    networks=NETWORKS,
)


def shown(result):
    console = Console(width=200, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def small():
    return experiment(Request(progress=False), plan=TINY)


def test_really(small):
    verdicts = {claim.statement[:30]: claim.verdict for claim in small.claims()}
    assert verdicts["no pair of learning rates make"] == "reproduced"
    assert verdicts["BNGD converges for every pair "] == "not reproduced"
    assert verdicts["the effective condition number"] == "reproduced"
    assert verdicts["weights r times as long with r"] == "reproduced"
    assert verdicts["layers before batch norm are b"] == "reproduced"
    json.dumps(small.to_dict(), allow_nan=False)
    text = shown(small)
    assert "κ 25: BNGD, w0 = Hu / |Hu|" in text
    assert "diabetes (d = 10)" in text
    assert "BN, layer 2, trained" in text
    (case,) = small.parts["maps"].values()
    assert case["starts"]["random"]["asymptotes"]["power"] == 1
    assert case["starts"]["g"]["asymptotes"]["power"] == 3
    assert case["starts"]["random"]["status"] != case["starts"]["g"]["status"]
    assert case["gd"]["excess"][-1] is None
    assert "relative): the eps of batch norm breaks the law" in small.text()
    assert small.parts["scale"]["1e-05"]["0.1"] != small.parts["scale"]["1e-30"]["0.1"]


def changed(result, **parts):
    return BngdResult(result.plan, {**json.loads(json.dumps(result.parts)), **parts}, result.versions)


def verdict(result, beginning):
    (found,) = [claim for claim in result.claims() if claim.statement.startswith(beginning)]
    return found.verdict


def test_verdicts_turn(small):
    maps = json.loads(json.dumps(small.parts["maps"]))
    for run in maps["25"]["starts"].values():
        run["counts"] = {"converged": 65, "diverged": 1}
        run["rate"] = [0.5] * TINY.lrs
        run["small"][1] = [0.1, 0.1, 0.1]
    other = changed(small, maps=maps)
    assert verdict(other, "no pair") == "not reproduced"
    assert verdict(other, "BNGD converges for every") == "not reproduced"
    assert verdict(other, "convergence is linear") in ("not reproduced", "not judged")
    assert verdict(other, "the effective learning rate goes") == "not reproduced"
    for run in maps["25"]["starts"].values():
        run["counts"] = {"converged": 66}
    assert verdict(other, "BNGD converges for every") == "reproduced"
    maps["25"]["kappa_star"] = 26.0
    assert verdict(other, "the effective condition") == "reproduced in part"

    widths = {"10": {name: [10.0] for name in bngd.WIDTHS}, "100": {name: [100.0] for name in bngd.WIDTHS}}
    assert changed(small, widths=widths).slope("runs") == pytest.approx(1)
    assert verdict(changed(small, widths=widths), "the range of good") == "reproduced"
    widths["100"] = {name: [11.0] for name in bngd.WIDTHS}
    assert verdict(changed(small, widths=widths), "the range of good") == "not reproduced"


def test_verdicts_about_data(small):
    def of(gd, ours):
        case = {**small.parts["data"]["diabetes"], "gd": gd, "lrs": [0.1, 1.0, 10.0, 100.0, 1000.0], "bngd": ours}
        return changed(small, data={"diabetes": case})

    gd = {"0.99": 100, "0.5": 200, "0.1": None, "0.01": None, "1.01": None}
    fast = of(gd, [[90, 60, 50, 70, 290], [80, 80, 80, 80, 80]])
    assert fast.ranges("diabetes") == [(50, 1000.0, 10_000.0), (80, 10_000.0, 10_000.0)]
    assert verdict(fast, "BNGD takes fewer steps") == "reproduced"
    assert verdict(fast, "the learning rates with which") == "reproduced"
    slow = of(gd, [[None, 180, 150, None, None], [80, 80, 80, 80, 80]])
    assert verdict(slow, "BNGD takes fewer steps") == "not reproduced"
    assert verdict(slow, "the learning rates with which") == "not reproduced"  # a range of 10 against one of 3
    never = of(dict.fromkeys(gd), [[None] * 5] * 2)
    assert never.ranges("diabetes") == [None, None]
    assert verdict(never, "BNGD takes fewer steps") == "not judged"
    assert verdict(never, "the learning rates with which") == "not judged"
    assert "–" in shown(never)


def test_verdicts_about_networks(small):
    losses = {"plain": [[2.0], [0.1], [None]], "bn": [[0.1], [0.05], [0.1]], "own": [[2.0], [0.1], [None]]}
    other = changed(small, sweep=losses)
    assert other.usable("bn") == 1000
    assert other.usable("plain") == 1
    assert math.isnan(other.losses("own")[2])
    assert verdict(other, "with batch norm a network learns") == "reproduced in part"
    scale = {"1e-30": {"0.1": 0.2, "1": 0.2001}, "1e-05": {"0.1": 0.2, "1": 0.2}}
    assert verdict(changed(small, scale=scale), "weights r times") == "not reproduced"
    layers = json.loads(json.dumps(small.parts["layers"]))
    for layer in layers:
        layer["lam_max"], layer["quantile"] = (9.0, 0.0) if layer["network"] == "bn" else (1.0, 1.0)
    assert verdict(changed(small, layers=layers), "layers before batch norm") == "not reproduced"
    assert verdict(changed(small, layers=layers), "and better than the raw") == "not reproduced"


def test_resumes(small, tmp_path):
    done = []

    def part(name, fail=False):
        def compute(plan):
            done.append(name)
            if fail:
                raise KeyboardInterrupt
            return small.parts[name]

        return compute

    first = {name: part(name, fail=name == "data") for name in PARTS}
    with pytest.raises(KeyboardInterrupt):
        experiment(Request(progress=False, out=tmp_path), plan=TINY, parts=first)
    assert done == ["maps", "widths", "data"]
    done.clear()
    again = {name: part(name) for name in PARTS}
    result = experiment(Request(progress=False, out=tmp_path, resume=True), plan=TINY, parts=again)
    assert done == ["data", "sweep", "scale", "layers"]
    names = {path.name for path in tmp_path.iterdir()}
    figures = ("map", "rates", "effective", "widths", "data", "digits")
    assert names >= {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    with pytest.raises(ValueError, match="another experiment"):
        experiment(Request(progress=False, out=tmp_path, resume=True), plan=replace(TINY, steps=401), parts=again)
    with pytest.raises(ValueError, match="without an experiment"):
        experiment(Request(progress=False, out=tmp_path), plan=TINY, parts=again)


@pytest.mark.parametrize("name", ["jobs", "workers"])
@pytest.mark.parametrize("of", [experiment, images])
def test_one_run_after_another(name, of):
    with pytest.raises(ValueError, match=f"{name} must be 1 for bngd"):
        of(Request(**{name: 2}))


# ---- networks ----


def test_the_perceptron_and_its_training():
    model = perceptron((6, 5, 3), 0, norm=True, last=True, eps=1e-30)
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert model[0].bias is None
    assert model[1].eps == 1e-30
    assert [type(m).__name__ for m in perceptron((6, 5, 3), 0, norm=False)] == ["Linear", "ReLU", "Linear"]
    data = torch.randn(40, 6).double(), torch.arange(40) % 3
    options = {"steps": 3, "batch": 10, "seed": 0}
    before = [p.detach().clone() for p in model.parameters()]
    bngd_networks._train(model, data, 0.1, 0.0, **options)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert moved == [True, False, False, True, False, False]  # own learning rate 0 of batch norm's parameters
    assert math.isnan(bngd_networks._train(perceptron((6, 5, 3), 0, norm=False), data, 1e200, 1.0, **options))


# ---- images ----

IMAGES = ImagePlan(data="digits", model="cnn", lrs=(0.1, 1.0), epochs=0.1, batch=32, looks=2, layers=1, examples=64)


def test_biases_take_the_place_of_batch_norm():
    net = without_batch_norm(models.build("resnet8", input_shape=(3, 8, 8), num_classes=4))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert sum(isinstance(module, bngd_networks._Bias) for module in net.modules()) == 7
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_images_really(tmp_path):
    request = Request(progress=False, force=True, out=tmp_path)
    result = images(request, plan=IMAGES)
    first = result.runs[0]
    assert (first["variant"], first["lr"], first["steps"]) == ("bn", 0.1, 4)
    assert [look["step"] for look in first["looks"]] == [2, 4]
    last = first["looks"][-1]
    assert set(last["eff_lr"]) == {f"features.{i}.weight" for i in (0, 3, 6)}
    assert set(last["edge"]) == {"features.0.weight"}
    assert all(edge > 0 for edge in last["edge"].values())
    assert all(angle > 0 for angle in last["angle"].values())
    assert all(0 <= run["accuracy"] <= 1 for run in result.runs)
    assert result.of("plain")[0]["looks"] == []
    assert "BN" in shown(result)
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "images.png", "images.svg"}

    def never(*_):
        raise AssertionError

    again = images(replace(request, resume=True), plan=IMAGES, run=never)
    assert again.text() == result.text()


def test_verdicts_about_images():
    def run(plan, variant, lr, dataset, device):
        bad = variant == "plain" and lr > 0.5
        edge = {"a": 0.9, "b": None}
        looks = [{"step": 1, "eff_lr": {}, "angle": {}, "edge": edge}] if variant == "bn" else []
        loss = None if bad else 0.5
        return {
            "variant": variant,
            "lr": lr,
            "steps": 1,
            "loss": loss,
            "accuracy": None if bad else 0.5,
            "looks": looks,
        }

    plan = replace(IMAGES, lrs=(0.1, 0.3, 1.0, 30.0))
    result = images(Request(progress=False, force=True), plan=plan, run=run)
    assert [claim.verdict for claim in result.claims()] == ["reproduced", "reproduced"]
    assert "at most 0.9 at the end" in result.text()

    def reverse(plan, variant, lr, dataset, device):
        found = run(plan, {"bn": "plain", "plain": "bn"}[variant], lr, dataset, device)
        return {**found, "variant": variant}

    result = images(Request(progress=False, force=True), plan=plan, run=reverse)
    assert [claim.verdict for claim in result.claims()] == ["not reproduced", "not judged"]
    assert "nan" in shown(result)


def test_a_run_that_diverges():
    dataset = bngd_networks.load_data(bngd.TrainConfig(data="digits"), None, None)
    found = image_run(IMAGES, "plain", 1e30, dataset, torch.device("cpu"))
    assert (found["loss"], found["accuracy"]) == (None, None)
    assert found["steps"] < 4


def test_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(bngd, "choose_device", lambda name: torch.device("cpu"))
    with pytest.raises(ValueError, match="torch finds no accelerator"):
        reproduce("bngd", scale="gpu")


def test_what_is_not_run(tmp_path):
    result = reproduce("bngd", scale="full", out=tmp_path)
    assert "3,300 runs" in result.text()
    assert paper("bngd").source.startswith("Y. Cai")
