"""Sphinx configuration of the site; ``python examples/gallery.py --site`` builds it, offline."""

import sys
from pathlib import Path

from sphinx_gallery.sorting import ExplicitOrder  # noqa: F401 - proves that the extra "docs" is installed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import inventories  # noqa: E402

import deepinv_flows  # noqa: E402

project, author, copyright = "deepinv_flows", "the authors of deepinv_flows", "the authors of deepinv_flows"
version = release = deepinv_flows.__version__
extensions = [
    "myst_parser",
    "results",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
templates_path = ["_templates"]
exclude_patterns = ["build", "_templates", "inventories", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5"]
nitpicky = True
suppress_warnings = ["config.cache", "myst.header"]

html_theme = "pydata_sphinx_theme"
html_title = f"deepinv_flows {release}"
html_static_path = ["../thumbnails"]
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "getting_started", "benchmarks", "differences", "changelog")}
html_theme_options = {
    "navbar_align": "left",
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "none"  # the docstrings say types, with shapes and units
python_use_unqualified_type_names = True

intersphinx_mapping = inventories.mapping()
intersphinx_disabled_reftypes = ["std:doc"]

sphinx_gallery_conf = {
    "examples_dirs": "..",
    "gallery_dirs": "gallery",
    "filename_pattern": "/demo_",
    "ignore_pattern": r"(gallery|train|train_gravel|train_lfw|train_natural|plain_deepinv|conf)\.py",
    "plot_gallery": "False",  # each figure is the one that the script wrote when it was last run in full
    "download_all_examples": False,
    "notebook_images": True,  # inside the notebook, which then needs no other file
    "show_memory": False,
    "reference_url": {},
    "remove_config_comments": True,
}


def setup(app):
    app.connect("autodoc-process-bases", _public_bases)


def _public_bases(app, name, obj, options, bases):
    """In place of a base class that is not public, the first of its bases that another package has."""
    for k, base in enumerate(bases):
        public = [
            c
            for c in base.__mro__
            if c.__module__.split(".")[0] != "deepinv_flows" or hasattr(deepinv_flows, c.__name__)
        ]
        bases[k] = public[0]
    bases[:] = [base for base in dict.fromkeys(bases) if base is not object]
