"""The reproduction of Hessian eigenvalue densities: its verdicts, and the real thing, small."""

import functools
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from conjugo.curvature import SpectralDensity
from conjugo.studies.reproduce import hessian_accuracy, paper, reproduce
from conjugo.studies.reproduce.hessian_accuracy import AccuracyPlan, compare_with_exact
from conjugo.studies.reproduce.hessian_networks import (
    CIFAR,
    CLAIMS,
    DIGITS,
    NetworksResult,
    SmallResNet,
    numbers,
    train_and_measure,
)
from conjugo.studies.reproduce.hessian_spectrum import experiment
from conjugo.studies.reproduce.paper import Request
from conjugo.training.spectrum import Spectrum

ACCURACY = AccuracyPlan(hidden=2, epochs=3, probes=3, steps=80, seeds=1)
TINY = replace(
    DIGITS,
    width=8,
    depth=2,
    drop_at=1,
    dropped=1,
    seeds=1,
    steps=8,
    probes=1,
    train_limit=256,
    test_limit=50,
    examples=128,
    top=2,
    method="autograd",
)
IMAGES = replace(
    TINY, label="images", model="resnet", width=4, depth=1, control=False, equal=None, examples=60, batch=60
)


def spectrum(place, largest, tenth, fraction, smallest):
    nodes = torch.tensor([smallest, 0.0, tenth], dtype=torch.float64)
    density = SpectralDensity(
        nodes=[nodes],
        weights=[torch.tensor([0.1, 0.8, 0.09], dtype=torch.float64)],
        eigenvalues=torch.tensor([largest], dtype=torch.float64),
        size=100,
        steps=3,
        probe="rademacher",
        seed=0,
        n_matvec=3,
    )
    values = torch.linspace(largest, tenth, 10).tolist()
    epoch = {"init": 0, "before": 1}.get(place.moment, 2)
    about = {
        **place._asdict(),
        "epoch": epoch,
        "accuracy": 0.9,
        "products": 3,
        "seconds": 1.0,
        "dtype": "float32",
        "device": "cpu",
    }
    return Spectrum(
        density=density,
        eigenvalues=tuple(values),
        residuals=(0.0,) * 10,
        fractions=(fraction / 10,) * 10,
        loss=0.1,
        gradient_norm=1.0,
        about=about,
    )


def as_published(plan, net, seed, keep):
    for place in plan.places(net, seed):
        at_first, dropped = place.moment == "init", place.moment == "after"
        plain = place.view == "plain"
        largest = 1.0 if at_first else (0.5 if dropped else 1.0) * (20.0 if plain else 2.0)
        fraction = 0.9 if plain and not at_first else 0.05
        keep(place, spectrum(place, largest, 0.5, fraction, -0.5 if at_first else -0.001))


def reversed_(plan, net, seed, keep):
    for place in plan.places(net, seed):
        plain, at_first = place.view == "plain", place.moment == "init"
        largest = 5.0 if at_first else 3.0 + (place.moment == "after") if plain else 30.0 + (place.moment == "after")
        keep(place, spectrum(place, largest, 0.5, 0.3 if plain else 0.8, -largest / 2))


@functools.cache
def compared(plan):
    return compare_with_exact(plan)


def stand_in(run, request=None, **plans):
    plans = {"accuracy": ACCURACY, "digits": TINY, "cifar": IMAGES, **plans}
    return experiment(request or Request(progress=False), run=run, compare=compared, **plans)


def verdicts(result):
    names = {statement: name for name, statement in CLAIMS.items()}
    return {names[claim.statement]: claim.verdict for claim in result.claims() if claim.statement in names}


def shown(result):
    console = Console(width=200, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    return console.file.getvalue()


def test_the_plans():
    assert DIGITS.trained == ("equal", "undropped")
    assert CIFAR.trained == ("before", "after")
    places = [place for net, seed in CIFAR.runs for place in CIFAR.places(net, seed)]
    assert len(places) == len(set(places)) == 2 * (3 + 5)


def test_accuracy_against_all_eigenvalues():
    result = compared(ACCURACY)
    model, (inputs, targets) = hessian_accuracy._trained(ACCURACY)
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def loss(vector):
        pieces = {n: v.view(p.shape) for n, v, p in zip(names, vector.split(sizes), model.parameters())}
        return F.cross_entropy(torch.func.functional_call(model, pieces, (inputs,)), targets)

    vector = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.linalg.eigvalsh(torch.func.hessian(loss)(vector)).flip(0)
    torch.testing.assert_close(torch.tensor(result.exact, dtype=torch.float64), expected, rtol=1e-10, atol=1e-12)
    for quantity in ("distance", "trace", "mass"):
        assert result.mean("deflated", quantity) < 0.5 * result.mean("plain", quantity)
    assert result.mean("deflated", "top") < 1e-8
    assert [claim.verdict for claim in result.claims()][1] == "reproduced"


def test_what_was_published_is_recognised():
    result = stand_in(as_published, Request(progress=False, force=True))
    assert set(verdicts(result).values()) == {"reproduced"}
    assert list(verdicts(result)) == list(CLAIMS)
    text = shown(result)
    assert "images: the Hessian" in text
    assert "2, after drop" in text
    assert "BN running" in text
    assert "Given up" not in result.text()
    json.dumps(result.to_dict(), allow_nan=False)


def test_what_does_not_reproduce_is_said():
    result = stand_in(reversed_)
    assert set(verdicts(result).values()) == {"not reproduced"}
    assert "images was left out: it takes" in result.text()
    assert result.cifar10 in result.text()


def test_a_claim_must_hold_for_every_seed():
    def unsteady(plan, net, seed, keep):
        (as_published if seed else reversed_)(plan, net, seed, keep)

    result = stand_in(unsteady, digits=replace(TINY, seeds=2))
    assert verdicts(result)["ratio"] == "not reproduced"
    assert "so for 1 of 2 seeds" in result.text()


def test_nothing_measured_is_not_judged():
    cases = NetworksResult(TINY, {}).cases()
    assert {holds for said in cases.values() for holds, _ in said.values()} == {None}


def test_really():
    result = stand_in(train_and_measure, Request(progress=False, force=True))
    for plan, networks in ((TINY, result.digits), (IMAGES, result.cifar10)):
        assert not networks.crashes
        assert set(networks.spectra) == {place for net, seed in plan.runs for place in plan.places(net, seed)}
        found = {place[:2]: numbers(spectrum) for place, spectrum in networks.spectra.items()}
        largest = {place: values["lambda_max"] for place, values in found.items() if place[1] != "equal"}
        assert len(set(largest.values())) == len(largest)  # all are of different points or different functions
        assert found["bn train", "after"]["loss"] != found["bn eval", "after"]["loss"]
        assert found["plain", "before"]["loss"] != found["plain", "after"]["loss"]
        assert all(0 <= values["fraction"] <= 1 + 1e-6 for values in found.values())
        assert all(values["loss"] < 5 for values in found.values())
    epochs = {place.moment: spectrum.about["epoch"] for place, spectrum in result.digits.spectra.items()}
    assert {**epochs, "equal": None} == {"init": 0, "equal": None, "before": 1, "after": 2, "undropped": 2}
    assert result.cifar10.spectra[IMAGES.places("plain", 0)[0]].about["examples"] == 60


def test_resumes(tmp_path):
    whole = stand_in(as_published)
    wanted = iter("five ")

    def interrupted(plan, net, seed, keep):
        def last(place, spectrum):
            keep(place, spectrum)
            if next(wanted, None) is None:
                raise KeyboardInterrupt

        as_published(plan, net, seed, last)

    with pytest.raises(KeyboardInterrupt):
        stand_in(interrupted, Request(progress=False, out=tmp_path))
    assert len(list((tmp_path / "digits").iterdir())) == 6
    runs = []

    def noting(plan, net, seed, keep):
        runs.append(net)
        as_published(plan, net, seed, keep)

    resumed = stand_in(noting, Request(progress=False, resume=True, out=tmp_path))
    assert runs == ["bn"]  # the other one had ended
    assert resumed.text() == whole.text()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {f"digits_{what}.{kind}" for what in ("densities", "drop", "gradients") for kind in ("png", "svg")}
    assert names >= {"results.json", "accuracy.svg"}
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(resumed.to_dict()))
    with pytest.raises(ValueError, match="another experiment"):
        stand_in(noting, Request(progress=False, resume=True, out=tmp_path), digits=replace(TINY, lr=0.1))
    with pytest.raises(ValueError, match="without an experiment"):
        stand_in(noting, Request(progress=False, out=tmp_path))


def test_the_drop_is_a_tenth_of_the_rate_and_the_control_goes_on(monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def noting(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    train_and_measure(TINY, "plain", 0, lambda *_: None)
    assert rates == [0.05] * 2 + [pytest.approx(0.005)] * 2 + [0.05] * 2


@pytest.mark.parametrize(("equal", "epoch"), [(100.0, 1), (0.0, 2)])
def test_equal_losses(equal, epoch):
    """At the first epoch with so low a loss; at the last one, where there is none."""
    found = {}
    train_and_measure(replace(TINY, equal=equal), "plain", 0, found.__setitem__)
    at = {place.moment: spectrum for place, spectrum in found.items()}
    assert at["equal"].about["epoch"] == epoch
    assert at["equal"].loss == at["before" if epoch == 1 else "undropped"].loss


def test_a_network_that_diverges_is_reported():
    result = stand_in(train_and_measure, digits=replace(TINY, lr=1e30))
    assert "Given up: digits, plain, seed 0: the loss is" in result.text()
    assert not any(place.moment != "init" for place in result.digits.spectra)


def test_without_data(monkeypatch, tmp_path):
    monkeypatch.setenv("CONJUGO_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = stand_in(as_published, Request(progress=False, force=True), cifar=replace(CIFAR, seeds=1))
    assert result.cifar10.startswith("CIFAR-10 was left out: ")
    assert len(result.networks) == 1


@pytest.mark.parametrize("name", ["jobs", "workers"])
def test_one_run_after_another(name):
    with pytest.raises(ValueError, match=f"{name}.*one after another"):
        stand_in(as_published, Request(**{name: 2}))


def test_the_residual_network():
    torch.manual_seed(0)
    for batch_norm in (False, True):
        net = SmallResNet(3, 10, width=4, depth=2, batch_norm=batch_norm)
        layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        assert len(layers) == 14
        assert all((m.bias is None) == batch_norm for m in layers[:-1])
        outputs = net(torch.randn(16, 3, 16, 16))
        assert outputs.shape == (16, 10)
        assert 0.05 < float(outputs.detach().std()) < 5


@pytest.mark.parametrize("scale", ["gpu", "full"])
def test_larger_scales_are_plans(tmp_path, scale):
    assert set(paper("hessian-spectrum").scales) == {"cpu", "gpu", "full"}
    result = reproduce("hessian-spectrum", scale=scale, out=tmp_path)
    assert "Nothing was run" in result.text()
    assert json.loads((tmp_path / "results.json").read_text())["scale"] == scale
