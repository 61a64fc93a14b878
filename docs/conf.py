"""Sphinx's settings for the documentation: `make docs` builds it into build/docs, warnings are errors."""

from __future__ import annotations

from importlib.metadata import version as installed_version

from docutils import nodes
from sphinx.application import Sphinx

project = "medusa-export"
author = "The medusa-export developers"
project_copyright = f"2026, {author}"
version = release = installed_version("medusa-export")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
add_module_names = False

smartquotes_action = "qe"  # quotes and ellipses; `--option` keeps its dashes

html_theme = "furo"
html_title = "medusa-export"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
copybutton_prompt_text = "$ "


def setup(app: Sphinx) -> None:
    """Write the dash between a parameter and its description as a dash, and examples of commands as code."""
    app.connect("sphinx-click-process-epilog", lambda _app, _context, lines: show_as_code(lines))
    app.connect("doctree-resolved", lambda _app, doctree, _name: write_dashes(doctree))


def show_as_code(lines: list[str]) -> None:
    """Turn the line block `Example:` of a command's help into a block of code."""
    if lines and lines[0].startswith("| Example:"):
        lines[:] = ["Example:", "", ".. code-block:: sh", "", *(line.removeprefix("|") for line in lines[1:])]


def write_dashes(doctree: nodes.document) -> None:
    """Replace the separate texts ` -- ` of a page's parameter lists."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))
