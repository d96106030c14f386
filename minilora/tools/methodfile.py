"""Reading a method's file: what its docstring states, which line computes which equation, and the class it defines.

The exercises take a file apart with this, and the tests hold what stands in it true.
"""

import ast
import re
import sys
import traceback
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..errors import InputError

TAG = re.compile(r"\b([FBIU]\d+)\b")  # forward, backward, initial values, update rule
BACKWARD = re.compile(r"^\s*(B\d+)  (\w+) *= .*?\s{2,}(\([^()]*\))", re.MULTILINE)
KEPT = re.compile(r"^Kept for backward: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Equation:
    """A backward equation of the docstring: B2, dB, (d_out, r)."""

    tag: str
    name: str
    shape: str

    def __str__(self):
        return f"{self.tag} {self.name}"


def docstring_and_code(source: str) -> tuple[str, str]:
    _, docstring, code = source.split('"""', 2)
    return docstring, code


def backward_equations(source: str) -> list[Equation]:
    """The equations B1, B2 … of the file's docstring, in order; none where backward is inherited."""
    return [Equation(*found) for found in BACKWARD.findall(ast.get_docstring(ast.parse(source)) or "")]


def tags(text: str, where: str) -> list[str]:
    """Equation tags in order: in a docstring those that open a line, in code those in a line's closing comment."""
    if where == "docstring":
        return [m[1] for line in text.splitlines() if (m := re.match(r"\s*([FBIU]\d+)  ", line))]
    return [t for line in text.splitlines() if "  # " in line for t in TAG.findall(line.rsplit("  # ", 1)[1])]


def kept(docstring: str) -> dict[str, tuple]:
    """The line "Kept for backward: x (N, d_in), h (N, r)" as names and shapes; nothing where there is no such line."""
    line = KEPT.search(docstring)
    return {
        name: tuple(s.strip() for s in shape.split(",") if s.strip())
        for name, shape in re.findall(r"(\w+) \(([^)]*)\)", line[1] if line else "")
    }


def load(source: str | ast.Module, name: str, file: str, **given) -> type[Adapter]:
    """The Adapter class that a method file's ``source`` defines, as if it stood in methods/ as ``name``.

    ``given``: more names that its code finds. Raises InputError, with the line, for a file that does not run, and where
    it does not define exactly one Adapter class.
    """
    module = types.ModuleType(f"minilora.methods.{name}")
    module.__package__ = "minilora.methods"
    vars(module).update(given)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        with located(file):
            exec(compile(source, file, "exec"), vars(module))
    finally:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
    is_method = lambda c: isinstance(c, type) and issubclass(c, Adapter) and c.__module__ == module.__name__
    found = [c for c in vars(module).values() if is_method(c)]
    if len(found) != 1:
        raise InputError(f"{file} defines {len(found)} Adapter classes; a method file defines exactly one")
    return found[0]


def read(path) -> str:
    """The text of a method file. Raises InputError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'cannot read "{path}": {getattr(error, "strerror", None) or "it is not UTF-8"}') from error


def function_of(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The method ``name`` of a class in ``tree``, if it is defined there."""
    members = [member for node in tree.body if isinstance(node, ast.ClassDef) for member in node.body]
    return next((m for m in members if isinstance(m, ast.FunctionDef) and m.name == name), None)


@contextmanager
def located(file: str):
    """Whatever the code of ``file`` raises becomes an InputError that names the line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file}, {place(error, file)}") from error


def place(error: Exception, file: str) -> str:
    """Where in ``file`` an error came up, and what it says: "line 41: ValueError: …"."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {error}"
