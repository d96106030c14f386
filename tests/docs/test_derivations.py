"""docs/methods: every method has its page, every tag is derived there and ends in the file's own line."""

import re

import pages
import pytest
import source

from minilora import methods
from minilora.tools.methodfile import TAG, code_tags, docstring_and_code, equations, kept

PAGES = sorted(path.stem for path in (pages.DOCS / "methods").glob("*.md"))
PARTS = [
    "The problem",
    "The idea",
    "The picture",
    "Equations",
    "Derivation",
    "What it keeps, and why",
    "How it compares",
    "What is exactly true",
    "In the paper and in PEFT",
    "Traps",
]
every_page = pytest.mark.parametrize("name", PAGES)


def parts_of(name: str) -> dict[str, str]:
    return pages.sections(pages.read(f"methods/{name}.md"), 2)


def test_each_method_has_a_page():
    missing = ", ".join(f"docs/methods/{name}.md" for name in methods.names() if name not in PAGES)
    assert not missing, f"a method needs its page; missing: {missing}"
    assert methods.names() == PAGES, "a page is left over"


@every_page
def test_a_page_has_all_its_parts_in_order_and_its_picture(name):
    assert list(parts_of(name)) == PARTS
    assert re.search(rf"!\[.{{20,}}\]\({name}\.png\)", parts_of(name)["The picture"])


@every_page
def test_every_tag_is_derived_and_the_derivation_ends_in_its_line(name):
    """A heading for each tag of the file, in order, with the tagged line of code at its end.

    Lines that the tagged one needs may stand above it, in the file's order. A gradient is derived in index form.
    """
    docstring, file = docstring_and_code(source.path_of(name).read_text(encoding="utf-8"))
    parts, lines = parts_of(name), [line.strip() for line in file.splitlines()]
    wanted, derivation = [tag for tag, _ in equations(docstring)], pages.sections(parts["Derivation"], 3)
    assert [heading for heading in derivation if TAG.fullmatch(heading)] == wanted
    assert re.findall(r"^\| ([FBIU]\d+) \|", parts["Equations"], re.MULTILINE) == wanted
    for tag in wanted:
        quoted = "".join(re.findall(r"^```py\n(.*?)^```$", derivation[tag], re.MULTILINE | re.DOTALL)).splitlines()
        assert not (strange := [line for line in quoted if line not in lines]), f"no lines of the file: {strange}"
        assert sorted(quoted, key=lines.index) == quoted, f"the lines of {tag} stand in another order"
        assert [code_tags(line) for line in quoted[:-1]] == [[]] * (len(quoted) - 1), f"{tag} quotes another's line"
        assert quoted and tag in code_tags(quoted[-1]), f"{tag} does not end in its line"
        displays = re.findall(r"^\$\$\n(.*?)\n\$\$$", derivation[tag], re.MULTILINE | re.DOTALL)
        assert not tag.startswith("B") or any(re.search(r"_\{?[a-z]", d) for d in displays), f"{tag}: no index form"


@every_page
def test_what_is_kept_and_the_claims_are_the_file_s(name):
    docstring, _ = docstring_and_code(source.path_of(name).read_text(encoding="utf-8"))
    why, true = parts_of(name)["What it keeps, and why"], " ".join(parts_of(name)["What is exactly true"].split())
    line = re.search(r"^Kept for backward: (.*)$", docstring, re.MULTILINE)[1]
    assert f"Kept for backward: `{line}`" in why
    assert not [array for array in kept(docstring) if not re.search(rf"`{array}`( for|,)", why)], "no reason is given"
    assert not [claim for claim in methods.get(name).claims if f"- {claim}" not in true], "a claim is missing"


@every_page
def test_the_defaults_named_are_those_of_the_options(name):
    """``alpha`` = 16 and the like, in the first column, "here", of the table next to the paper and PEFT."""
    known = methods.options(name)
    for cell in re.findall(r"^\| (.*?) \|", parts_of(name)["In the paper and in PEFT"], re.MULTILINE):
        for option, value in re.findall(r"`(\w+)` = ([\d.]+)", cell):
            assert option not in known or float(value) == float(known[option][1]), f"{option} = {value}"


def test_every_question_is_listed():
    listed = re.findall(r"^- \[(.+?)\]\(why/([\w-]+\.md)\)", pages.read("why.md"), re.MULTILINE)
    asked = [(pages.read(f"why/{p.name}").splitlines()[0][2:], p.name) for p in (pages.DOCS / "why").glob("*.md")]
    assert sorted(listed) == sorted(asked)
