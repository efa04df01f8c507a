"""Sphinx configuration; the pages in papers/ and api/ are generated from the records and packages first."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# The documentation imports every module on machines without a display.
os.environ["MPLBACKEND"] = "agg"

import generate  # noqa: E402

import omniconv  # noqa: E402

generate.main(HERE)

project = "omniconv"
author = "The omniconv contributors"
copyright = author
release = version = omniconv.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"omniconv {release}"
html_static_path: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]
napoleon_use_ivar = True


def take_literally(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep `*` and `|` of shapes such as (N, C, *S) and |x| from being read as markup; formulas stay as they are."""
    formula: int | None = None
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if formula is not None and line.strip() and indent <= formula:
            formula = None
        if line.lstrip().startswith((".. math::", ">>>")):
            formula = indent
        if formula is None and line.count("`") % 2 == 0:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
            lines[index] = "".join(parts)


def setup(app) -> None:
    """Run before napoleon, whose own markup is to be read."""
    app.connect("autodoc-process-docstring", take_literally, priority=400)
