"""docs/reliability.md: every promise has a command of its own, and every word of it selects a test that exists."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = [row.strip("| ").split(" | ") for row in PAGE.splitlines() if row.startswith("| ") and "---" not in row]
COMMANDS = [proof.strip("`") for promise, proof in ROWS if promise != "promise"]


def test_every_promise_has_a_command_of_its_own():
    assert len(set(COMMANDS)) == len(COMMANDS) >= 20


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_selects_tests_that_exist(command):
    program, *words = shlex.split(command)
    path = ROOT / next(word for word in words if word.startswith("tests/"))
    names = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    assert program == "pytest" and names
    for wanted in words[words.index("-k") + 1].split(" or ") if "-k" in words else []:
        assert any(wanted in name for name in names), wanted
    assert ("oracle" in words) == ("pytest.mark.oracle" in path.read_text())
