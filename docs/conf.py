"""How Sphinx builds the pages: `nox -s docs`."""

import sys
from pathlib import Path

import fastbn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]
import report  # noqa: E402
from draw import draw  # noqa: E402

draw()
report.write_pages(HERE)

project = author = "fastbn"
release = fastbn.__version__
extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "bench", "drawn", "gallery"]

# Docstrings put parameters and functions between single backticks. Sphinx links those that are
# public names and sets the others as code.
default_role = "py:obj"
autodoc_typehints = "none"  # the docstrings tell types and shapes in fewer words
numpydoc_show_class_members = False
toc_object_entries_show_parents = "hide"
templates_path = ["_templates"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
doctest_global_setup = """
import numpy as np
import fastbn
from fastbn.optim import *
from fastbn.tune import *
"""

html_theme = "pydata_sphinx_theme"
html_title = "fastbn"
html_static_path = ["_static"]
html_css_files = ["fastbn.css"]
html_sidebars = {"start": [], "questions": []}  # they have no pages beneath them
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_theme_options = {
    "logo": {"text": "fastbn"},
    "navbar_persistent": ["search-button"],
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "why",
    "ignore_pattern": r"common\.py",
    "within_subsection_order": "FileNameSortKey",
    "image_srcset": ["2x"],
    "download_all_examples": False,
    "show_signature": False,
    "capture_repr": (),
    "remove_config_comments": True,
    "parallel": 2,
}
