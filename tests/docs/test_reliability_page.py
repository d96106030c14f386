"""docs/reliability.md names commands: each selects tests that exist, and none of them is skipped without a word."""

import re
import shlex
from pathlib import Path

import pytest

from minilora.files import tensorfile as files

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = [row.strip("| ").split(" | ") for row in PAGE.splitlines() if row.startswith("| ") and "pytest" in row]
COMMANDS = [re.fullmatch(r"`(.*)`", proof)[1] for _, proof in ROWS]


def selected(expression: str, path: Path) -> list[str]:
    """The test functions that ``-k expression`` selects: words joined by "or", looked for in their names."""
    names = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    return [name for name in names if any(word in name for word in expression.split(" or "))]


def test_every_promise_has_a_command_of_its_own():
    assert len(ROWS) >= 20
    assert len(set(COMMANDS)) == len(COMMANDS)
    assert len(re.findall(r"^\| ", PAGE, re.MULTILINE)) == len(ROWS) + 2 * PAGE.count("| --- |")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs_tests_that_exist(command):
    program, *words = shlex.split(command)
    assert program == "pytest"
    path = ROOT / next(word for word in words if word.startswith("tests/"))
    for word in words[words.index("-k") + 1].split(" or ") if "-k" in words else []:
        assert selected(word, path), word
    if "oracle" in words:
        assert words[:2] == ["-m", "oracle"] and "pytest.mark.oracle" in path.read_text()
    if "--kills" in words:
        assert "--kills 200" in (ROOT / ".ci/run").read_text()


def test_what_the_page_says_of_the_files_is_so():
    assert "SHA-256" in PAGE and files.DIGEST == "sha256"
