"""The elements of HTML reports, as strings; all texts are escaped where nothing else is said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from conjugo.studies import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bullets", "cell", "definitions", "figure", "grid", "page", "paragraph", "section", "table"]


def page(title: str, header: str, main: str, footer: str) -> str:
    """A whole page of its parts (HTML), in the frame and style of report.html."""
    template = Template(resources.files("conjugo.studies").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=f"{header}\n<main>\n{main}\n</main>\n{footer}")


def section(title: str, *content: str) -> str:
    """A section with a heading; empty parts of *content* (HTML) are left out."""
    name = title.lower().replace(" ", "-")
    inner = "\n".join(part for part in content if part)
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n{inner}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, or nothing for an empty text; *kind* is its class."""
    if not text:
        return ""
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def bullets(items: Iterable[str]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def definitions(values: Mapping[str, object]) -> str:
    """Names and their values, which are shown as they are (text) or as JSON."""
    shown = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in values.items()
    }
    return f"<dl>{''.join(f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>' for key, value in shown.items())}</dl>"


def grid(figures: Sequence[str]) -> str:
    """*figures* (HTML) side by side, as many as find room."""
    return f'<div class="figures">{"".join(figures)}</div>'


def figure(drawn: Figure, name: str, title: str, caption: str, *, label: str = "", single: bool = False) -> str:
    """*drawn* as an element with a title and a caption above; *label* describes it to those who do not see it.

    name: makes ids unique on the page. single: it stands alone, and is not as wide as the page.
    """
    svg = drawing.inline_svg(drawn, name, label or title)
    kind = ' class="single"' if single else ""
    return f"<figure{kind}><figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>{svg}</figure>\n"


def cell(text: str, more: str = "", *, kind: str = "") -> str:
    """A table cell of *text* (escaped) and *more* (HTML); *kind* is its class."""
    return f"<td{f' class={kind}' if kind else ''}>{escape(text)}{more}</td>"


def table(caption: str, header: Sequence[str], body: Sequence[str]) -> str:
    """A table in a box of its own that scrolls sideways; *header* (HTML) and *body* (rows) are used as they are."""
    head = "".join(f'<th scope="col">{text}</th>' for text in header)
    rows = "\n".join(body)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n"
        "</table>\n</div>\n"
    )
