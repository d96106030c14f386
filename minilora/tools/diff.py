"""``minilora diff``: what one method changes in another, as equations and as lines of code, and nothing else.

A method that inherits is read with what it inherits, so that the comparison is of methods and not of files.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

from .. import methods
from . import methodfile


def files_of(name: str) -> list[tuple[type, str]]:
    """(class, source) of the method ``name`` and of the methods that it inherits from, nearest first."""
    inside = [cls for cls in methods.get(name).__mro__ if cls.__module__.startswith(f"{methods.__name__}.")]
    return [(cls, methodfile.read(Path(sys.modules[cls.__module__].__file__))) for cls in inside]


def equations(name: str) -> dict[str, list[str]]:
    """The tagged lines of a method by kind (F, B, I, U) without their numbers; an inherited pass brings its own."""
    kinds, (method, _) = {}, files_of(name)[0]
    passes = {"F": "forward", "B": "backward"}
    for cls, source in files_of(name):
        for tag, text in methodfile.equations(ast.get_docstring(ast.parse(source)) or ""):
            inherited = tag[0] in passes and getattr(method, passes[tag[0]]) is vars(cls).get(passes[tag[0]])
            if cls is method or inherited:
                kinds.setdefault(tag[0], []).append(re.sub(r"\s{2,}", "   ", text.replace("  =", " =")))
    return kinds


def code(name: str) -> dict[str, list[str]]:
    """The method's functions by name, each as its lines without comments; those it inherits from a method included."""
    found = {}
    for _, source in reversed(files_of(name)):
        for member, function in methodfile.functions(ast.parse(source)).items():
            if member.startswith("_"):
                continue
            first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
            lines = source.splitlines()[first - 1 : function.end_lineno]
            lines = [line.split("  # ")[0].rstrip() for line in lines]
            extends = any("super()." in line for line in lines)  # then what it calls still runs
            found[member] = (found.get(member, []) if extends else []) + lines
    return found


def difference(first: str, second: str) -> str:
    """The equations and lines that differ, with ``-`` for ``first`` and ``+`` for ``second``."""
    sections = [("options", *({"": [f"{k} = {v[1]}" for k, v in methods.options(n).items()]} for n in (first, second)))]
    sections += [("equations", equations(first), equations(second)), ("code", code(first), code(second))]
    lines = [f"{first} → {second}"]
    for title, a, b in sections:
        for key in dict.fromkeys([*a, *b]):
            if changed := changes(a.get(key, []), b.get(key, [])):
                lines += ["", f"{title}{': ' + key if key else ''}", *changed]
    return "\n".join(lines) if len(lines) > 1 else f"{first} and {second} do not differ"


def changes(a: list[str], b: list[str]) -> list[str]:
    """The lines that are not common, - of ``a`` before + of ``b``; what stands behind three spaces is a remark."""
    plain_a, plain_b = ([line.strip().split("   ")[0] for line in lines] for lines in (a, b))
    marked = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, plain_a, plain_b, autojunk=False).get_opcodes():
        if kind != "equal":
            marked += [f"  - {line.strip()}" for line in a[i:j]] + [f"  + {line.strip()}" for line in b[k:m]]
    return marked
