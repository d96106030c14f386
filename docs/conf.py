"""The site: Sphinx, MyST notebooks, the furo theme; ``make -C docs``. Nothing on a page comes from elsewhere.

The notebooks are shown with their committed outputs, and a warning is an error.
"""

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import shutil
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

from minilora.cli import build_parser

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

nb_execution_mode = "off"  # pytest -m notebooks runs the notebooks, and the tests run the pages' code blocks
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
        (target / path.name).write_text(with_alt_texts(with_links_to_code(text)), encoding="utf-8")


def with_alt_texts(text: str) -> str:
    """A notebook whose figures keep their alt texts: MyST asks the cell for them, and plots.show() gives them to the
    output."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if alt := output.get("metadata", {}).get("image/png", output.get("metadata", {})).get("alt"):
                cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
    return json.dumps(notebook)


def with_links_to_code(text: str) -> str:
    """Links to files that are no pages lead to the repository: on GitHub they work as they are, here they would not."""
    text = re.sub(r"\]\(((?:\.\./)*)\.\./notebooks/", r"](\1notebooks/", text)  # they are brought in, below docs/
    outside = "|".join(("minilora", "benchmarks", "tests", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"))
    return re.sub(rf"\]\((?:\.\./)+((?:{outside})[^)]*)\)", rf"]({REPOSITORY}/blob/main/\1)", text)


def rewrite(app, name, source):
    if not name.startswith("notebooks/"):
        source[0] = with_help(with_links_to_code(source[0]))


def with_help(text: str) -> str:
    """What each ``<!-- minilora … --help -->`` prints, in its place."""
    return re.sub(r"<!-- minilora (.*) -->", lambda found: f"```text\n{printed_help(found[1].split())}```", text)


def printed_help(words) -> str:
    os.environ["COLUMNS"] = "90"  # the width that argparse writes for
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        build_parser().parse_args(words)
    return printed.getvalue()


EQUATION = re.compile(r"\s*(?:[FBUI]\d+  |\w+ ← )")


def keep_equations(app, what, name, obj, options, lines):
    """Docstrings have equations one below the other, which a paragraph would run together: make each run a table."""
    found, run = [], []
    for line in [*lines, ""]:
        if EQUATION.match(line):
            run.append(re.split(r",?\s{2,}", line.strip()))
            continue
        if run:
            found += ["", *equation_table(run), ""]
            run = []
        found.append(line)
    lines[:] = found[:-1]


def equation_table(rows: list[list[str]]) -> list[str]:
    """reST for rows of a tag, an equation as code, and shapes or reasons; all but the equation may be missing."""
    width, table = max(map(len, rows)), [".. list-table::", ""]
    for row in rows:
        at = int(bool(re.fullmatch(r"[FBUI]\d+", row[0])))
        cells = row[:at] + [f"``{row[at]}``"] + row[at + 1 :] + [""] * (width - len(row))
        table += [f"   {'* -' if i == 0 else '  -'} {cell}".rstrip() for i, cell in enumerate(cells)]
    return table


SHAPE = re.compile(r"(\w*\([^()]*\))")


def keep_shapes_whole(app, doctree):
    """Mark short code in tables, and shapes such as (d_out, d_in); the style sheet keeps them on one line."""
    for cell in doctree.findall(nodes.entry):
        for code in cell.findall(nodes.literal):
            text = code.astext()
            code.children = []
            for part in [text] if len(text) <= 14 else filter(None, SHAPE.split(text)):
                whole = len(text) <= 14 or (len(part) <= 24 and SHAPE.fullmatch(part))
                code += nodes.inline(part, part, classes=["whole"]) if whole else nodes.Text(part)


def open_images(app, doctree, page):
    """A link from a picture to itself opens it; Sphinx would have it downloaded."""
    for link in list(doctree.findall(addnodes.download_reference)):
        for image in link.findall(nodes.image):
            file = f"{app.builder.imagedir}/{app.env.images[image['uri']][1]}"
            link.replace_self(nodes.reference("", "", image, refuri="../" * page.count("/") + file, internal=True))


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
    app.connect("autodoc-process-docstring", keep_equations)
    app.connect("doctree-read", keep_shapes_whole)
    app.connect("doctree-resolved", open_images)
