"""Every page: its links lead somewhere, its code prints what it shows, its mathematics and commands can be read."""

import re
import shlex

import pages
import pytest

from minilora.cli import build_parser

ALL = sorted(
    str(path.relative_to(pages.DOCS))
    for path in pages.DOCS.rglob("*.md")
    if not {"_build", "notebooks"} & set(path.relative_to(pages.DOCS).parts)
)
PARSER = build_parser()
RUN = [
    name for name in ALL if name.startswith(("methods/", "why/")) or name in ("glossary.md", "conventions.md", "cli.md")
]


@pytest.mark.parametrize("name", [*ALL, "../README.md", "../CONTRIBUTING.md"])
def test_links_lead_to_files_and_headings(name):
    assert not pages.broken_links(name)


@pytest.mark.parametrize("name", RUN)
def test_code_blocks_print_what_the_page_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(pages.read(name), f"docs/{name}")


@pytest.mark.parametrize("name", ALL)
def test_the_mathematics_is_what_github_and_the_site_both_read(name):
    """$$ on lines of their own and in pairs; nothing that Markdown eats, no macro, no label."""
    text = re.sub(r"`[^`\n]*`", "", pages.FENCED.sub("", pages.read(name)))
    displays = re.findall(r"^\$\$\n(.*?)\n\$\$$", text, re.MULTILINE | re.DOTALL)
    assert text.count("$$") == 2 * len(displays)
    inline = re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.MULTILINE | re.DOTALL)
    within = re.findall(r"\$([^$]+)\$", inline)
    assert not [line for line in inline.splitlines() if line.count("$") % 2]
    for formula in displays + within:
        assert not re.search(r"\\(label|newcommand|def|tag)\b|\\[,;!{}_]|\n\n", formula), formula
        assert formula.count("{") == formula.count("}"), formula
    assert not [formula for formula in within if formula != formula.strip()]


@pytest.mark.parametrize("name", [*ALL, "../README.md"])
def test_no_line_of_code_is_cut_off(name):
    """92 characters are seen on the site; GitHub's page, for the README, is wider."""
    most = 120 if name == "../README.md" else 92
    lines = "\n".join(pages.FENCED.findall(pages.read(name))).splitlines()
    assert not [line for line in lines if len(line) > most]


def command_lines():
    """Each ``minilora …`` in a shell block, with the page that shows it."""
    for name in [*ALL, "../README.md", "../CONTRIBUTING.md"]:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", pages.read(name), re.DOTALL):
            for line in re.findall(r"(?:^|&& |\.venv/bin/)(minilora .*?)(?=$| &&)", block, re.MULTILINE):
                yield pytest.param(line, id=f"{name}: {line}"[:80])


@pytest.mark.parametrize("line", list(command_lines()))
def test_a_command_line_is_one_that_the_program_takes(line):
    PARSER.parse_args(shlex.split(line, comments=True)[1:])  # exits with a message if it does not
