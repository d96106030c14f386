"""``minilora diff``: what one method changes in another, as equations and as lines of code, and nothing else.

A method that inherits is read with what it inherits, so that the comparison is of methods and not of files.
"""

import difflib
import inspect
import re
import sys

from .. import methods

EQUATION = re.compile(r"^\s*([A-Z]\d+)  (.*)$")


def equations(name: str) -> dict[str, list[str]]:
    """The tagged lines of a method by kind (F, B, I, U) without their numbers; an inherited pass brings its own."""
    method, lines = methods.get(name), []
    for cls in method.__mro__:
        doc = inspect.getdoc(sys.modules[cls.__module__]) if cls.__module__.startswith(methods.__name__) else ""
        found = [m.groups() for line in doc.split("\n") if (m := EQUATION.match(line))]
        passes = {"F": "forward", "B": "backward"}
        lines += [
            (tag, text)
            for tag, text in found
            if cls is method
            or (tag[0] in passes and passes[tag[0]] in vars(cls) and passes[tag[0]] not in vars(method))
        ]
    kinds = dict.fromkeys(tag[0] for tag, _ in lines)
    tidy = lambda text: re.sub(r"\s{2,}", "   ", text.replace("  =", " ="))
    return {kind: [tidy(text) for tag, text in lines if tag[0] == kind] for kind in kinds}


def code(name: str) -> dict[str, list[str]]:
    """The method's functions by name, each as its lines without comments; those it inherits from a method included."""
    found = {}
    for cls in reversed(methods.get(name).__mro__):
        if not cls.__module__.startswith(methods.__name__ + "."):
            continue
        for member, value in vars(cls).items():
            function = value.fget if isinstance(value, property) else value
            if inspect.isfunction(function) and function.__module__ == cls.__module__ and not member.startswith("_"):
                lines = [line.split("  # ")[0].rstrip() for line in inspect.getsource(function).splitlines()]
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
            changed = changes(a.get(key, []), b.get(key, []))
            if changed:
                lines += ["", f"{title}{': ' + key if key else ''}", *changed]
    return "\n".join(lines) if len(lines) > 1 else f"{first} and {second} do not differ"


def changes(a: list[str], b: list[str]) -> list[str]:
    """The lines that are not common, - of ``a`` before + of ``b``; what stands behind three spaces is a remark."""
    plain = lambda lines: [line.strip().split("   ")[0] for line in lines]
    marked = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, plain(a), plain(b), autojunk=False).get_opcodes():
        if kind != "equal":
            marked += [f"  - {line.strip()}" for line in a[i:j]] + [f"  + {line.strip()}" for line in b[k:m]]
    return marked
