import re
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.studies.stand_ins import result

from conjugo.studies import drawing, plots

LIGHT, DARK = "#ffffff", "#14171b"


@pytest.fixture(scope="module")
def compared():
    return result()


FIGURES = {
    "accuracy": plots.accuracy,
    "steps_to_target": plots.steps_to_target,
    "learning_curves": lambda compared: plots.learning_curves(compared, 16),
    "tuning": lambda compared: plots.tuning(compared, "momentum"),
}


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colors_stand_out_from_light_and_dark_pages(compared):
    for color in (*drawing.COLORS, *plots.batch_colors(compared).values()):
        assert min(contrast(color, LIGHT), contrast(color, DARK)) >= 3, color


def test_an_optimizer_has_one_look_and_no_two_share_it():
    looks = drawing.styles([f"optimizer {i}" for i in range(20)])
    assert len(set(looks.values())) == 20
    assert drawing.styles(["a", "b"])["b"] == drawing.styles(["c", "b"])["b"]


@pytest.mark.parametrize("name", FIGURES)
def test_svg_for_a_page(compared, name):
    text = drawing.inline_svg(FIGURES[name](compared), "here", 'Label with "quotes" & <signs>')
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'Label with "quotes" & <signs>'
    assert root.get("viewBox")
    assert root.get("width") is None
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert all(each.startswith("here-") for each in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
    assert drawing.INK not in text
    assert "currentColor" in text
    assert "<style" not in text
    assert "DejaVu" not in text


@pytest.mark.parametrize("name", FIGURES)
def test_equal_figures_give_equal_files(compared, name):
    assert drawing.svg(FIGURES[name](compared), "a") == drawing.svg(FIGURES[name](compared), "a")
    assert drawing.png(FIGURES[name](compared))[:8] == b"\x89PNG\r\n\x1a\n"


def test_lines_carry_their_names(compared):
    for name in ("accuracy", "steps_to_target", "learning_curves"):
        texts = [
            element.text
            for element in ElementTree.fromstring(drawing.svg(FIGURES[name](compared), "a")).iter()
            if element.text
        ]
        assert {"momentum", "sgd"} <= {text.strip() for text in texts}, name


def test_nobody_reaches_the_target():
    text = drawing.svg(plots.steps_to_target(result(target=1.0)), "a")
    assert "no optimizer reached the target" in text


def test_spread():
    assert drawing.spread([0.0, 0.5, 1.0], 0.25) == [0.0, 0.5, 1.0]
    assert drawing.spread([0.5, 0.5, 0.5], 0.25) == [0.25, 0.5, 0.75]
    assert drawing.spread([], 0.1) == []
    moved = drawing.spread([0.1, 0.12, 0.13, 0.9], 0.1)
    assert np.diff(moved).min() >= 0.1 - 1e-12
    assert moved[3] == 0.9


def test_perfect_and_useless_accuracies_can_be_drawn():
    from dataclasses import replace

    from tests.studies.stand_ins import config, pretend

    from conjugo.studies import compare

    for accuracy in (0.0, 1.0):
        flat = compare(
            config(), run=lambda c, t, a=accuracy: replace(pretend(c, t), accuracy=a, curve=((1, a), (2, a)))
        )
        for draw in FIGURES.values():
            drawing.png(draw(flat))
