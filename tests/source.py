"""Reading and breaking method files: what the suite needs to hold comments true and to make mutants."""

import re
import sys
import types
from pathlib import Path

from minilora import methods
from minilora.adapter import Adapter

TAG = re.compile(r"\b([FBIU]\d+)\b")  # forward, backward, initial values, update rule
TARGET = re.compile(r"^\s+(\w+) [-+*/]?= ")
ASSIGNMENT = re.compile(r"^(\s+)(\w+) = (.+?)  # (.*)$")
SHAPE = re.compile(r"^\(([^)]*)\)")


def path_of(name: str) -> Path:
    return Path(sys.modules[methods.get(name).__module__].__file__)


def docstring_and_code(source: str) -> tuple[str, str]:
    _, docstring, code = source.split('"""', 2)
    return docstring, code


def tags(text: str, where: str) -> list[str]:
    """Equation tags in order: in a docstring those that open a line, in code those in a line's closing comment."""
    if where == "docstring":
        return [m[1] for line in text.splitlines() if (m := re.match(r"\s*([FBIU]\d+)  ", line))]
    return [t for line in text.splitlines() if "  # " in line for t in TAG.findall(line.rsplit("  # ", 1)[1])]


def load(source: str, name: str) -> type[Adapter]:
    """The Adapter class of a method file's source, as if it stood in methods/."""
    module = types.ModuleType(f"minilora.methods.{name}")
    module.__package__ = "minilora.methods"
    saved = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, f"<mutant of {name}>", "exec"), vars(module))
    finally:
        if saved is not None:
            sys.modules[module.__name__] = saved
        else:
            del sys.modules[module.__name__]
    (found,) = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Adapter) and c.__module__ == module.__name__
    ]
    return found


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


def shape_comments(source: str) -> dict[int, tuple]:
    """The shape that each line's comment states, by line number: {41: ("N", "r")}."""
    found = {}
    for number, line in enumerate(source.splitlines(), 1):
        if "  # " in line and (match := SHAPE.match(line.rsplit("  # ", 1)[1])):
            found[number] = tuple(part.strip() for part in match[1].split(",") if part.strip())
    return found


def kept(docstring: str) -> dict[str, tuple]:
    """The line "Kept for backward: x (N, d_in), h (N, r)" as names and shapes."""
    line = re.search(r"^Kept for backward: (.*)$", docstring, re.MULTILINE)[1]
    return {
        name: tuple(s.strip() for s in shape.split(",") if s.strip())
        for name, shape in re.findall(r"(\w+) \(([^)]*)\)", line)
    }
