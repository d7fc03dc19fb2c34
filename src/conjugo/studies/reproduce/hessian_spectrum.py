"""Ghorbani, Krishnan & Xiao 2019: the eigenvalue density of the Hessian, at the scale of a CPU, in three parts.

Accuracy: see :mod:`conjugo.studies.reproduce.hessian_accuracy`.

Digits: a perceptron with five hidden layers of 32, with and without batch norm, learning rate 0.05, momentum 0.9, batch 128, 30
epochs, three seeds; a branch at epoch 20 goes on with a tenth of the learning rate.
Also measured at the first epoch that leaves a loss of at most 0.5.

CIFAR-10 made smaller, if ``force`` asks for it and the data is there: the first 4,096 images, pooled to 16 x 16 pixels; a
residual network of 14 layers, 8 channels wide, with batch norm and without, learning rate 0.05, 20 epochs and 10 more with a
tenth of it, two seeds; Hessians over 1,000 training images.

Runs are done one after another. See :mod:`conjugo.studies.reproduce.hessian_networks`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conjugo.errors import DataUnavailable, check
from conjugo.studies.reproduce.grids import open_folder, save
from conjugo.studies.reproduce.hessian_accuracy import AccuracyPlan, AccuracyResult, compare_with_exact
from conjugo.studies.reproduce.hessian_networks import (
    CIFAR,
    CLAIMS,
    DIGITS,
    NetworkPlan,
    NetworksResult,
    Place,
    read,
    train_and_measure,
)
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, sentences
from conjugo.studies.runs import load_data, versions
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conjugo.training.spectrum import Spectrum

__all__ = ["PAPER", "HessianSpectrumResult", "experiment"]

Run = Callable[[NetworkPlan, Any, int, Callable[[Place, "Spectrum"], None]], None]
"""Trains and measures; a stand-in for tests."""


def experiment(
    request: Request,
    *,
    accuracy: AccuracyPlan | None = None,
    digits: NetworkPlan = DIGITS,
    cifar: NetworkPlan = CIFAR,
    run: Run = train_and_measure,
    compare: Callable[[AccuracyPlan], AccuracyResult] = compare_with_exact,
) -> HessianSpectrumResult:
    """Do the experiment of these plans; run, compare: do one run, and the part about accuracy (stand-ins for tests).

    The part with CIFAR-10 is done if *request* says force, or resumes a folder in which it has begun.
    """
    from conjugo.studies.reproduce import hessian_figures

    for name in ("jobs", "workers"):
        value = getattr(request, name)
        check(value == 1, "reproduce", name, value, "1 for hessian-spectrum, whose runs are done one after another")
    accuracy = AccuracyPlan() if accuracy is None else accuracy
    out = request.out
    if out is not None:
        plans = {"paper": "hessian-spectrum", "workers": 1, "digits": digits.to_dict(), "cifar10": cifar.to_dict()}
        open_folder(out, json.loads(json.dumps(plans)), resume=request.resume)
    exact = compare(accuracy)
    on_digits = _networks(digits, None if out is None else out / "digits", request, run)
    part = None if out is None else out / "cifar10"
    reason = _why_not(cifar, request, part)
    on_cifar = _networks(cifar, part, request, run) if reason is None else reason
    result = HessianSpectrumResult(exact, on_digits, on_cifar, versions(TrainConfig(data=digits.data)))
    if out is not None:
        drawn = {"accuracy": hessian_figures.accuracy(exact)}
        for networks in result.networks:
            if networks.spectra:
                name = networks.plan.data
                drawn[f"{name}_densities"] = hessian_figures.densities(networks)
                drawn[f"{name}_drop"] = hessian_figures.drop(networks)
                drawn[f"{name}_gradients"] = hessian_figures.gradients(networks)
        save(result.to_dict(), drawn, out)
    return result


def _why_not(plan: NetworkPlan, request: Request, folder: Path | None) -> str | None:
    """Why the part with images should be left out; None if there is nothing against it."""
    try:
        load_data(TrainConfig(data=plan.data), plan.train_limit, plan.test_limit)
    except DataUnavailable as error:
        return f"{plan.label} was left out: {error}"
    begun = request.resume and folder is not None and folder.exists()
    if request.force or begun:
        return None
    return (
        f"{plan.label} was left out: it takes about 15 minutes of one core. --force (force=True), with --resume to keep what "
        "is done, does it all the same."
    )


def _networks(plan: NetworkPlan, folder: Path | None, request: Request, run: Run) -> NetworksResult:
    """Do the runs of *plan*, or read them where they have been done."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
    spectra: dict[Place, Spectrum] = {}
    crashes: list[str] = []
    shown = sys.stderr.isatty() if request.progress is None else request.progress
    for i, (net, seed) in enumerate(plan.runs):
        before = read(plan, net, seed, folder)
        if before is not None:
            spectra |= before
            continue
        if shown:
            print(f"{plan.label}: run {i + 1} of {len(plan.runs)}", file=sys.stderr)
        found: dict[Place, Spectrum] = {}

        def keep(place: Place, spectrum: Spectrum, found: dict[Place, Spectrum] = found) -> None:
            found[place] = spectrum
            if folder is not None:
                spectrum.save(folder / place.file)

        try:
            run(plan, net, seed, keep)
        except FloatingPointError as error:
            crashes.append(f"{plan.label}, {net}, seed {seed}: {error}")
            continue
        spectra |= found
    return NetworksResult(plan, spectra, tuple(crashes))


@dataclass(frozen=True, eq=False)
class HessianSpectrumResult:
    """All parts; cifar10 is a sentence that says why if it was left out."""

    exact: AccuracyResult
    digits: NetworksResult
    cifar10: NetworksResult | str
    versions: dict[str, str]

    @property
    def networks(self) -> list[NetworksResult]:
        """The parts about networks that are there."""
        return [part for part in (self.digits, self.cifar10) if not isinstance(part, str)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "hessian-spectrum",
            "scale": "cpu",
            "versions": self.versions,
            "accuracy": self.exact.to_dict(),
            "digits": self.digits.to_dict(),
            "cifar10": self.cifar10 if isinstance(self.cifar10, str) else self.cifar10.to_dict(),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    def tables(self) -> list[RenderableType]:
        """Accuracy, then the networks."""
        return [self.exact.table(), *(networks.table() for networks in self.networks)]

    def text(self) -> str:
        """What reproduced and what did not."""
        notes = [
            "A claim holds in a case if it does for every seed. Figures are means over the seeds.",
            *(f"Given up: {crash}" for networks in self.networks for crash in networks.crashes),
            *([self.cifar10] if isinstance(self.cifar10, str) else []),
        ]
        return sentences(self.claims(), notes)

    def claims(self) -> list[Claim]:
        """What was published or expected, judged by the runs."""
        parts = [networks.cases() for networks in self.networks]
        judged = [
            Claim(statement, {case: said for cases in parts for case, said in cases[name].items()})
            for name, statement in CLAIMS.items()
        ]
        return [*self.exact.claims(), *judged]


PAPER = Paper(
    title="An Investigation into Neural Net Optimization via Hessian Eigenvalue Density",
    source="B. Ghorbani, S. Krishnan, Y. Xiao, ICML 2019; arXiv:1901.10159",
    scales={
        "cpu": experiment,
        "gpu": NotRun(
            "hessian-spectrum",
            "gpu",
            "This would be ResNet-20 and ResNet-32 on all of CIFAR-10, with and without batch norm and shortcuts, Hessians "
            "over all training images at the beginning, before and after the drop of the learning rate: 80 steps and 3 random "
            "vectors, about 0.5 s a product.",
        ),
        "full": NotRun(
            "hessian-spectrum",
            "full",
            "This would be ResNet-18, ResNet-50 and VGG-11 on CIFAR-10 and ImageNet, with and without batch norm, 10 random "
            "vectors of 90 steps: 900 passes over the data for each density, at six times the cost of a forward pass.",
        ),
    },
)
