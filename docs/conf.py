"""The site: Sphinx, MyST notebooks, the furo theme; ``make -C docs``. Nothing on a page comes from elsewhere.

The notebooks are run while the site is built, and a warning is an error.
"""

import importlib
import inspect
import os
import re
import shutil
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
REPOSITORY = "https://github.com/minilora/minilora"

project = "minilora"
author = "the minilora authors"
copyright = "2026, the minilora authors"
version = release = metadata.version("minilora")
html_title = "minilora"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "requirements.txt"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

html_theme = "furo"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["minilora.css"]
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
}
html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_block", "html_image"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

nb_execution_mode = os.environ.get("MINILORA_NOTEBOOKS", "cache")  # "off" for a quick look at the text
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ["*.md"]  # the pages' own code blocks are run by the tests
nb_execution_cache_path = str(HERE / "_build" / "notebook-cache")
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

suppress_warnings = ["toc.not_included"]  # the long tables behind a page are reached from it


def bring_in(app):
    """Copy what stands outside docs/ into it for the build: the notebooks, whose place is beside the package."""
    target = HERE / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
        text = re.sub(r"\[!\[([^]]*)\]\(https://colab[^)]*\)\]", r"[\1]", text)  # the badge's picture is elsewhere
        (target / path.name).write_text(with_links_to_code(text), encoding="utf-8")


def with_links_to_code(text: str) -> str:
    """Links to files that are no pages lead to the repository: on GitHub they work as they are, here they would not."""
    outside = "|".join(("minilora", "benchmarks", "tests", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"))
    return re.sub(rf"\]\((?:\.\./)+((?:{outside})[^)]*)\)", rf"]({REPOSITORY}/blob/main/\1)", text)


def rewrite(app, name, source):
    if not name.startswith("notebooks/"):
        source[0] = with_links_to_code(source[0])


def linkcode_resolve(domain, info):
    """Where the source of a documented name stands, for the link beside it."""
    found = importlib.import_module(info["module"])
    for part in info["fullname"].split("."):
        found = getattr(found, part, None)
    try:
        found = inspect.unwrap(found.fget if isinstance(found, property) else found)
        path, (_, line) = Path(inspect.getsourcefile(found)), inspect.getsourcelines(found)
    except TypeError:  # an attribute, which has no place of its own
        return None
    return f"{REPOSITORY}/blob/main/{path.relative_to(ROOT)}#L{line}"


def setup(app):
    app.connect("builder-inited", bring_in)
    app.connect("source-read", rewrite)
