"""Configuration of the documentation site: `make docs` builds it into docs/_build/html, without any network."""

import inspect
import re

from conjugo import __version__

project = "conjugo"
author = "The conjugo developers"
version = release = __version__
html_title = f"conjugo {version}"
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "api"]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # types are in the signatures of the source, and in words in the docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"


def name_arguments(app, what, name, obj, options, lines):
    """Emphasise the arguments that a docstring explains in running text, "lr: ...; lr, momentum: ..."."""
    try:
        names = "|".join(sorted(inspect.signature(obj).parameters, key=len, reverse=True))
    except (TypeError, ValueError):
        return
    explained = re.compile(rf"(?<![\w`*:.])((?:{names})(?:, (?:{names}))*):(?=\s|$)")
    for i, line in enumerate(lines):
        if names and not line.lstrip().startswith((":", ">>>")):
            lines[i] = explained.sub(r"**\1**:", line)


def escape_bars(app, what, name, obj, options, lines):
    """In docstrings |x| is a norm, not a substitution of reStructuredText."""
    for i, line in enumerate(lines):
        pieces = re.split(r"(``.*?``|:math:`.*?`)", line)
        lines[i] = "".join(p if p.startswith(("``", ":math:")) else re.sub(r"(?<!\\)\|", r"\\|", p) for p in pieces)


def setup(app):
    """Hook into autodoc, after napoleon."""
    app.connect("autodoc-process-docstring", name_arguments, priority=800)
    app.connect("autodoc-process-docstring", escape_bars, priority=900)
