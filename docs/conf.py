"""Configure Sphinx: `python -m sphinx -W -b html docs OUT`. Pages load nothing from outside."""

import importlib.metadata
import pathlib
import shutil
import sys
from typing import Any

from lora_jax.report import glossary

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "lora_jax"
author = "the lora_jax authors"
release = importlib.metadata.version("lora-jax")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docs.ext.docstrings",
    "docs.ext.coverage",
]
exclude_patterns = ["paper", "sequel", "ext", "look.html"]
suppress_warnings = ["config.cache"]
nitpicky = False

# Pages
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings: single backticks are code, Args and Returns are Google's
default_role = "code"
autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
templates_path = ["_templates"]
python_maximum_signature_line_length = 80

# HTML
html_theme = "sphinx_book_theme"
html_title = "lora_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_persistent": [],  # the search is in the sidebar
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_exclude = ".linenos, .gp, .go"


REPORTS = ("paper", "sequel")  # written by experiments


def read_report(app: Any, page: str, source: list[str]) -> None:
    """Put the text of a report, which a program made, at the end of its page."""
    if page in REPORTS:
        report = (ROOT / "docs" / page / "report.md").read_text().partition("\n")[2]
        link = f'<a href="{page}/report.html">the report with figures</a>'
        source[0] += report.replace("[report.html](report.html)", link)


def read_terms(app: Any, page: str, source: list[str]) -> None:
    """Put the words that reports explain at the end of the glossary. Reports link to them there."""
    if page == "glossary":
        for term in glossary.known():
            names = ", ".join(term.names)
            source[0] += f"\n{{#{term.anchor}}}\n**{names}**. {term.meaning}\n"


def leave_out_icons(app: Any, error: Exception | None) -> None:
    """Empty the theme's icon script of 1.5 MB: the style sheet has the icons as a font."""
    if error is None:
        (pathlib.Path(app.outdir) / "_static/scripts/fontawesome.js").write_text("")


def add_report(app: Any, error: Exception | None) -> None:
    """Copy the reports with figures, each of which is one file."""
    for page in REPORTS if error is None else ():
        folder = pathlib.Path(app.outdir) / page
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / "docs" / page / "report.html", folder)


def setup(app: Any) -> None:
    """Connect the functions above to the events of Sphinx."""
    app.connect("source-read", read_report)
    app.connect("source-read", read_terms)
    app.connect("build-finished", add_report)
    app.connect("build-finished", leave_out_icons)
