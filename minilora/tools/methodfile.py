"""Reading a method's file: what its docstring states, which line computes which equation, and the class it defines.

The exercises take a file apart with this, and the tests hold what stands in it true.
"""

import ast
import inspect
import re
import sys
import traceback
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import methods
from ..adapter import Adapter
from ..errors import InputError

TAG = re.compile(r"\b([FBIU]\d+)\b")  # forward, backward, initial values, update rule
EQUATION = re.compile(r"^\s*([FBIU]\d+)  (.*)$", re.MULTILINE)
BACKWARD = re.compile(r"^\s*(B\d+)  (\w+) *= .*?\s{2,}(\([^()]*\))", re.MULTILINE)
KEPT = re.compile(r"^Kept for backward: (.*)$", re.MULTILINE)
FORWARD = re.compile(r"^Forward, (.*?):$", re.MULTILINE | re.DOTALL)
ARRAY = re.compile(r"(\w+) \(([^()]*)\)")
SHAPE = re.compile(r"^\(([^()]*)\)")


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


def equations(docstring: str) -> list[tuple[str, str]]:
    """The tagged lines of a docstring in order, as (tag, equation with shape and remark)."""
    return EQUATION.findall(docstring)


def code_tags(code: str) -> list[str]:
    """The tags in the closing comments of the lines, in order."""
    return [tag for line in code.splitlines() for tag in TAG.findall(comment_of(line))]


def comment_of(line: str) -> str:
    return line.rpartition("  # ")[2] if "  # " in line else ""


# ------------------------------------------------------------------------------------------------- shapes in letters


def axes(text: str) -> tuple[str, ...]:
    """ "N, d_in" as ("N", "d_in")."""
    return tuple(axis.strip() for axis in text.split(",") if axis.strip())


def length(axis: str, sizes: dict) -> int:
    """The length of an axis: a letter, a number, or a product or power of them, such as "2 k", "r r" and "r²".

    Raises InputError for a letter that is not in ``sizes``.
    """
    product = 1
    for factor in axis.replace("²", "^2").replace("³", "^3").replace("·", " ").split():
        base, _, power = factor.partition("^")
        if not base.isdecimal() and base not in sizes:
            raise InputError(f'the axis "{axis}" has the letter {base}; there are {", ".join(sizes)}')
        product *= (int(base) if base.isdecimal() else sizes[base]) ** int(power or 1)
    return product


def kept(docstring: str) -> dict[str, tuple]:
    """The line "Kept for backward: x (N, d_in), h (N, r)" as names and axes; nothing if there is no such line."""
    line = KEPT.search(docstring)
    return {name: axes(shape) for name, shape in ARRAY.findall(line[1] if line else "")}


def listed(shapes) -> str:
    """Names and axes in one line: "A (r, d_in), B (d_out, r)"."""
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items()) or "nothing"


def stated_shapes(method: Adapter) -> dict[str, tuple]:
    """The method's own arrays in the line "Forward, x (N, d_in), A (r, d_in) …:" of the file that defines forward."""
    line = FORWARD.search(inspect.unwrap(type(method).forward).__globals__["__doc__"] or "")
    known = shapes_of(method, 1, 1)
    return {name: axes(shape) for name, shape in ARRAY.findall(line[1] if line else "") if name in known}


def shapes_of(method: Adapter, d_out: int, d_in: int) -> dict[str, tuple]:
    """The declared shapes of all arrays in ``p``: those of the layer, and those that layers share."""
    trainable, buffers = method.shapes(d_out, d_in)
    return {**method.shared_shapes(d_out, d_in), **trainable, **buffers}


def sizes_of(method: Adapter, N: int, d_in: int, d_out: int) -> dict[str, int]:
    """What the letters of the method's file stand for: N, d_in, d_out, and its integer fields.

    A letter of its own, as in M (m, m), is the length that ``shapes`` declares where the Forward line has the letter.
    """
    fields = {name: value for name, value in vars(method).items() if type(value) is int}
    sizes, declared = {**fields, "N": N, "d_in": d_in, "d_out": d_out}, shapes_of(method, d_out, d_in)
    for name, shape in stated_shapes(method).items():
        for axis, n in zip(shape, declared[name], strict=False):
            if axis.isidentifier():
                sizes.setdefault(axis, n)
    return sizes


def shape_comments(source: str) -> dict[int, tuple]:
    """The shape that each line's comment states, by line number: {41: ("N", "r")}."""
    lines = enumerate(map(comment_of, source.splitlines()), 1)
    return {number: axes(match[1]) for number, comment in lines if (match := SHAPE.match(comment))}


# --------------------------------------------------------------------------------------------------- the file as code


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
            cls = methods.defined_in(module, file)
            types_of_fields = typing.get_type_hints(cls)  # annotations may be text, which only the module explains
            cls.__annotations__ = {name: types_of_fields[name] for name in inspect.get_annotations(cls)}
        return cls
    finally:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before


def read(path) -> str:
    """The text of a method file. Raises InputError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'cannot read "{path}": {getattr(error, "strerror", None) or "it is not UTF-8"}') from error


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions of the classes in ``tree``, by name."""
    members = [member for node in tree.body if isinstance(node, ast.ClassDef) for member in node.body]
    return {member.name: member for member in members if isinstance(member, ast.FunctionDef)}


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
