"""The report: its HTML by itself, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
from tests.studies.stand_ins import config, pretend, result

from conjugo.studies import compare, report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags of a page; fails where they are not properly nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def seven():
    """As wide as reports get: all seven optimizers, five batch sizes."""
    return result(
        optimizers=("nlcg", "sgd", "momentum", "nesterov", "adamw", "lars", "lamb"),
        batch_sizes=(4, 16, 32, 64, "full"),
        trials=3,
    )


@pytest.fixture(scope="module")
def text(seven):
    return report.page(seven)


def test_structure(text):
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.named("html") == [{"lang": "en"}]
    assert page.named("meta")[:2] == [
        {"charset": "utf-8"},
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ]
    for tag in ("title", "header", "main", "h1", "footer"):
        assert len(page.named(tag)) == 1, tag
    assert len(page.named("table")) == len(page.named("caption")) == 4
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.named("th"))
    assert len(page.named("figure")) == len(page.named("figcaption")) == 2 + 5 + 7
    for attrs in page.named("svg"):
        assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])


def test_ids_are_unique_and_references_lead_somewhere(text):
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in ("aria-labelledby", "xlink:href", "href"):
            assert attrs.get(name, "").lstrip("#") in (*ids, "")
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)


def test_nothing_is_loaded_from_elsewhere(text):
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object", "embed", "image"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any("src" in attrs or "srcset" in attrs for _, attrs in page.tags)
    assert all(attrs.get(name, "#").startswith("#") for _, attrs in page.tags for name in ("href", "xlink:href"))
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'<>)]*", text)) <= {"http://www.w3.org/1999/xlink"}


def test_the_page_tells_everything(text, seven):
    words = " ".join("".join(Page(text).text).split())
    for name in (
        "nlcg",
        "lamb",
        "120 (full)",
        "momentum 0.7 to 0.99, logarithmic in 1 - momentum",
        "polynomial",
        "7.5 × 120" and "2 × 120",
    ):
        assert name in words, name
    for cell in seven.cells:
        assert f"{cell.best.lr:.3g}" in words
    for value in seven.versions.values():
        assert value in words
    assert "It never sees the test split" in words
    assert "Not finished" not in words


def test_text_is_escaped(seven):
    nasty = '<script>alert("x")</script> & $title'

    def run(config, task):
        if task.contender == "sgd":
            raise RuntimeError(nasty)
        return pretend(config, task)

    broken = replace(compare(config(), run=run), versions={**seven.versions, "processor": nasty})
    text = report.page(broken)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert text.count(escape(nasty)) >= 3
    assert "2 of 4 cells are not finished" in text


def test_an_empty_comparison_has_a_page():
    nothing = compare(config(), run=lambda c, t: 1 / 0)
    assert "No cell of this comparison is finished yet" in report.page(nothing)
    Page(report.page(nothing))


def test_equal_results_give_equal_pages(text, seven):
    assert report.page(seven) == text


def test_one_optimizer_and_one_seed(tmp_path):
    lonely = result(optimizers=("momentum",), seeds=1, batch_sizes=("full",))
    Page(report.page(lonely))
    report.write(lonely, tmp_path / "report.html")
    report.write_plots(lonely, tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.page(lonely)
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".png", ".svg"}


# ---- in a browser ----

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """
<!DOCTYPE html><title>probe</title><body style="margin:0">
<iframe id="page" style="border:0;width:%dpx;height:900px" srcdoc="%s"></iframe>
<script>
addEventListener("load", () => {
  const doc = document.getElementById("page").contentDocument, view = doc.defaultView, root = doc.documentElement;
  const style = (selector) => view.getComputedStyle(doc.querySelector(selector));
  const sticking = [...doc.querySelectorAll("body *")].filter((e) =>
    !e.closest(".scroll table") && !e.closest("svg") && e.getBoundingClientRect().right > root.clientWidth + 0.5);
  const found = {
    width: root.clientWidth, scrollWidth: root.scrollWidth, sticking: sticking.map((e) => e.tagName),
    scrolls: [...doc.querySelectorAll(".scroll")].map((e) => [e.scrollWidth, e.clientWidth]),
    svgs: [...doc.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().width),
    letters: Math.min(...[...doc.querySelectorAll("figure text")].map((e) => e.getBoundingClientRect().height)),
    page: style("body").backgroundColor, ink: style("body").color, quiet: style(".note").color,
    axis: style("figure text").fill, flag: doc.querySelector(".flag") ? style(".flag").color : null,
  };
  document.title = "done"; const out = document.createElement("pre"); out.id = "found";
  out.textContent = JSON.stringify(found); document.body.replaceChildren(out);
});
</script></body>
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Runs headless Chromium with some flags on a file and gives its standard output."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")

    def run(path, *more):
        profile = tmp_path_factory.mktemp("profile")
        command = [program, *FLAGS, f"--user-data-dir={profile}", *more, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


def probe(chromium, tmp_path, text, width, *flags):
    path = tmp_path / f"probe-{width}.html"
    path.write_text(PROBE % (width, escape(text)), encoding="utf-8")
    dom = chromium(path, "--window-size=1400,1000", "--dump-dom", *flags)
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found is not None, dom[-2000:]
    return json.loads(found[1])


def channels(color):
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", color)[:3])


@pytest.mark.browser
@pytest.mark.parametrize("width", [375, 768, 1280])
def test_the_page_does_not_scroll_sideways(chromium, tmp_path, text, width):
    found = probe(chromium, tmp_path, text, width)
    assert found["width"] == width
    assert found["scrollWidth"] <= width
    assert found["sticking"] == []
    assert all(150 < each <= width for each in found["svgs"])
    assert found["letters"] >= 9  # pixels
    if width == 375:
        assert any(content > box for content, box in found["scrolls"])  # wide tables scroll in their own box


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "dark"), [("1", False), ("0", True)], ids=["light", "dark"])
def test_light_and_dark_pages_are_readable(chromium, tmp_path, text, scheme, dark):
    from tests.studies.test_plots import contrast, luminance

    found = probe(chromium, tmp_path, text, 375, f"--blink-settings=preferredColorScheme={scheme}")
    assert (luminance(channels(found["page"])) < 0.1) == dark
    for name in ("ink", "quiet", "axis", "flag"):
        if found[name] is not None:
            assert contrast(channels(found[name]), channels(found["page"])) >= 4.5, name


@pytest.mark.browser
def test_the_page_prints(chromium, tmp_path, text):
    path, pdf = tmp_path / "report.html", tmp_path / "report.pdf"
    path.write_text(text, encoding="utf-8")
    chromium(path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
