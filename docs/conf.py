"""Settings of Sphinx: `python -m sphinx -W -b html docs docs/_build`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, not an installed package

import gpu_hodlr

project = "gpu_hodlr"
author = "the gpu_hodlr developers"
project_copyright = "2026, the gpu_hodlr developers"
release = version = gpu_hodlr.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = "gpu_hodlr"
nitpicky = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

smartquotes = False  # "hss" is what one types
default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signatures of the source; the text says the shapes
autodoc_inherit_docstrings = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are not described twice

_MARKS = re.compile(r"(?<!\\)([|*])|(?<=\w)_(?=[\s(\[)])")


def plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with formulas: |x|, 2 * K and K_ are not markup."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")) or (i and lines[i - 1].lstrip()[:3] == ">>>"):
            continue  # examples stand as they are
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(
            part if part.startswith("`") else _MARKS.sub(lambda m: "\\" + m.group(0), part)
            for part in parts
        )


def setup(app: Any) -> None:
    """Before napoleon, which makes markup of the sections."""
    app.connect("autodoc-process-docstring", plain_text, priority=100)
