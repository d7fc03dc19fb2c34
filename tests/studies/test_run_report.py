"""The page of a training run, and the pictures of its spectra."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from tests.studies.test_report_page import Page
from tests.training.small_data import table

from conjugo.cli import main
from conjugo.studies import drawing, run_report, spectrum, spectrum_plots
from conjugo.training import TrainConfig, train

CONFIG = TrainConfig(optimizer="momentum", lr=0.1, batch_size=16, steps=12, evaluations=3, threads=1, checkpoints=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(replace(CONFIG, spectra=2, spectrum_at=(0,), spectrum_steps=8), data=table(), out=folder)
    return folder


def test_the_page_shows_the_spectra(folder):
    text = run_report.page(folder)
    page = Page(text)
    assert len(page.named("h2")) == 3
    assert len(page.named("figure")) == 2 + 3
    words = " ".join("".join(page.text).split())
    assert "Spectrum of the Hessian" in words
    for found in spectrum.recorded(folder)[0]:
        assert f"{found.numbers()['lambda_max']:.3g}" in words
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_run_without_spectra_has_a_page_without_them(tmp_path):
    train(CONFIG, data=table(), out=tmp_path)
    words = "".join(Page(run_report.page(tmp_path)).text)
    assert "Spectrum" not in words
    assert "Test accuracy" in words
    (tmp_path / "metrics.jsonl").unlink()
    assert "Nothing is evaluated yet" in run_report.page(tmp_path)


def test_the_noise_scale_and_the_batch_have_a_picture(tmp_path):
    growing = replace(CONFIG, steps=None, epochs=4.0, lr=0.02, noise_scale=1, batch_growth=1.0, optimizer="nlcg")
    train(growing, data=table(), out=tmp_path)
    page = Page(run_report.page(tmp_path))
    assert len(page.named("figure")) == 3
    words = "".join(page.text)
    assert all(name in words for name in ("Gradient noise scale.", "in the optimizer's metric", "batch"))


def test_of_a_hidden_gradient_the_lower_end_is_shown():
    known = {"noise_scale": 20.0, "noise_scale_low": 10.0, "noise_scale_high": 40.0}
    hidden = {"noise_scale": None, "noise_scale_low": 64.0, "noise_scale_high": None}
    nothing = {"noise_scale": None, "noise_scale_low": None, "noise_scale_high": None}
    history = [{"step": i, "batch_size": 16, **found} for i, found in enumerate((nothing, known, hidden))]
    (axes,) = run_report.noise_scale(history).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["noise scale"].get_ydata()[1] == 20
    (arrows,) = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    assert arrows.get_ydata()[2] == 64
    assert len(axes.collections) == 1


def test_the_command_writes_it(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == run_report.page(folder)
    assert str(folder / "report.html") in capsys.readouterr().out


def test_series_are_what_was_measured_alike(folder, tmp_path):
    (series,) = spectrum.recorded(folder)
    assert [found.about["step"] for found in series] == [0, 6, 12]
    (tmp_path / "spectra").mkdir()
    series[0].save(tmp_path / "spectra" / "a.json")
    replace(series[1], about={**series[1].about, "matrix": "ggn"}).save(tmp_path / "spectra" / "b.json")
    (tmp_path / "spectra" / "c.json").write_text("{")
    assert sorted(len(group) for group in spectrum.recorded(tmp_path)) == [1, 1]


def test_the_pictures(folder):
    (series,) = spectrum.recorded(folder)
    one = spectrum_plots.density(series[-1])
    even, logarithmic = one.axes
    values = [text.get_text() for text in even.texts]
    assert f"{series[-1].eigenvalues[0]:.3g}" in values
    assert even.get_yscale() == logarithmic.get_yscale() == "log"
    low, high = even.get_xlim()
    assert low < series[-1].density.lmin < series[-1].density.lmax < high
    # The curve of the left view has the mass of the whole.
    t, phi = series[-1].density.density()
    assert float(phi.sum() * (t[1] - t[0])) == pytest.approx(1, abs=1e-3)
    many = spectrum_plots.over_training(series)
    assert [axes.get_title(loc="left").split(" (")[0] for axes in many.axes if axes.get_visible()] == [
        "step 0",
        "step 6",
        "step 12",
    ]
    assert len({axes.get_xlim() for axes in many.axes}) == 1
    for figure in (one, many, spectrum_plots.numbers_over_training(series)):
        ElementTree.fromstring(drawing.inline_svg(figure, "name", "label"))
