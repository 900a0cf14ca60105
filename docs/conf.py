"""The site, built by `make docs`: offline, and any warning is an error."""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "numpy")  # nothing is computed here, and it starts fastest
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import keras_tnt  # noqa: E402

project = "keras_tnt"
author = "the keras_tnt authors"
version = release = keras_tnt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "made_of_code",
]
exclude_patterns = ["README.md"]

# === Pages ===

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
# A link to a file of the repository that is no page offers it as it is.
suppress_warnings = ["myst.header"]

smartquotes = False  # `--flag` in a sentence stays what one types

# === Docstrings ===

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Call arguments", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
# `name` in a docstring is a link where there is such a name, and code where there is none.
default_role = "py:obj"
# Of our own names all must exist; those of other packages are not looked up, for want of a network.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?s)(?!(keras_tnt|training)\.[\w.]+\Z).*")]

# === Looks ===

html_theme = "furo"
html_title = f"keras_tnt {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
