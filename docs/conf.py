"""Sphinx configuration; the pages in papers/ and api/ are generated from the records and packages first."""

import os
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
