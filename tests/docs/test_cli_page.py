"""docs/cli.md has every command, each in the place where the site puts what its ``--help`` prints."""

import re

import pages
import pytest

from minilora.cli import COMMANDS, main

PAGE = pages.read("cli.md")
MARKS = [mark.split() for mark in re.findall(r"<!-- minilora (.*) -->", PAGE)]


def test_every_command_has_its_help_below_its_heading():
    sections = pages.sections(PAGE, 3)
    assert sorted(sections) == sorted(COMMANDS)
    for command, text in sections.items():
        assert re.findall(r"<!-- minilora (\w+)", text) == [command]


@pytest.mark.parametrize("words", MARKS, ids=" ".join)
def test_a_mark_is_a_command_that_prints_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and printed.startswith("usage: minilora")
    assert not re.search(r"\(default:\s+(None|\[\]|False)\)", printed)
    assert "every random draw" not in printed or re.search(r"every random draw\s+\(default:\s+0\)", printed)
