"""Reading and running the pages of docs/: what the suite needs to hold their code, its output and their links true."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def benchmark(name: str):
    """The module ``name`` of benchmarks/, which is not part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS.parent / "benchmarks")
        return importlib.import_module(name)


def blocks(page: str) -> list[tuple[str, str]]:
    """(code, the text block below it, or nothing) for each ```python block. Each text block belongs to one of them."""
    found = BLOCK.findall(page)
    assert len(found) == page.count("```python")
    assert page.count("```text") == sum(bool(expected) for _, expected in found)
    return found


def run(page: str, name: str) -> dict:
    """Run all blocks, top to bottom in one namespace, each printing exactly the text block below it."""
    namespace = {}
    for code, expected in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(Path(__file__).parent / name), "exec"), namespace)  # a test's, to --device standin
        assert printed.getvalue() == expected, f"{name} prints otherwise:\n{code}"
    return namespace


def sections(page: str, level: int) -> dict[str, str]:
    """Heading to text, up to the next heading of that level or above."""
    plain = FENCED.sub(lambda m: m[0].replace("#", "\0"), page)  # a comment in code is no heading
    parts = re.split(rf"^(#{{1,{level}}}) (.*)$", plain, flags=re.MULTILINE)[1:]
    found = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {heading: text.replace("\0", "#") for marks, heading, text in found if len(marks) == level}


def anchors(page: str) -> set[str]:
    """What a link may have behind its #, as GitHub and the site make it from the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(name: str) -> list[str]:
    """Links of the page ``name`` that lead to no file, or to no heading of a page; web addresses are not tried."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", read(name))):
        path, _, anchor = link.partition("#")
        target = (DOCS / name).parent / path if path else DOCS / name
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken
