"""Reading and breaking method files: what the suite needs to hold comments true and to make mutants."""

import re
import sys
from pathlib import Path

from minilora import methods
from minilora.adapter import Adapter
from minilora.tools import methodfile
from minilora.tools.methodfile import TAG

DROPPED_IN = Path(__file__).parent / "dropped_in"  # method files that are not in the registry
TARGET = re.compile(r"^\s+(\w+) [-+*/]?= ")
ASSIGNMENT = re.compile(r"^(\s+)(\w+) = (.+?)  # (.*)$")


def path_of(name: str) -> Path:
    return Path(sys.modules[methods.get(name).__module__].__file__)


def text_of(name: str) -> str:
    return path_of(name).read_text(encoding="utf-8")


def load(source: str, name: str) -> type[Adapter]:
    """The Adapter class of a method file's source, as if it stood in methods/."""
    return methodfile.load(source, name, f"<mutant of {name}>")


MUTATIONS = {
    "scaled": lambda expression: f"1.1 * ({expression})",
    "sign": lambda expression: f"-({expression})",
    "zero": lambda expression: f"0.0 * ({expression})",
}


def mutants(source: str):
    """(description, source) for each mutation of each tagged backward line, one at a time."""
    lines = source.split("\n")
    for i, line in enumerate(lines):
        match = ASSIGNMENT.match(line)
        if not match or not any(t.startswith("B") for t in TAG.findall(match[4])):
            continue
        indent, target, expression, comment = match.groups()
        for kind, mutate in MUTATIONS.items():
            broken = f"{indent}{target} = {mutate(expression)}  # {comment}"
            yield f"{comment.split()[-1]} {kind}", "\n".join([*lines[:i], broken, *lines[i + 1 :]])
