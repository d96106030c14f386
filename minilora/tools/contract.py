"""What docs/contract.md asks of a method file beside its equations, as checks that any file can be put through.

The suite holds the shipped methods to more; these are the checks that need nothing but the file.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..adapter import Adapter
from ..engine import Saved
from .gradcheck import check_method, method_point
from .methodfile import docstring_and_code, kept, tags
from .trial import Trial

SIZES = {"N": 5, "d_in": 7, "d_out": 6}  # and r = 3: all different, so that no axis can stand in for another


@dataclass(frozen=True)
class Case:
    """A method, the text of its file, and a float64 point off the initial one."""

    method: Adapter
    source: str
    x: np.ndarray
    W: np.ndarray
    p: Saved
    trainable: list
    dy: np.ndarray

    @classmethod
    def of(cls, method: Adapter, source: str) -> "Case":
        return cls(method, source, *method_point(method, **SIZES, at_init=False, seed=0))

    def forward(self):
        y, saved = self.method.forward(self.x, self.W, self.p)
        return y, Saved(saved)

    def backward(self, method=None):
        """What backward returns, of ``method`` where it is another; from copies, so that it can spoil nothing."""
        _, saved = self.forward()
        copies = [type(given)((k, a.copy()) for k, a in given.items()) for given in (saved, self.p)]
        return (method or self.method).backward(self.dy.copy(), copies[0], self.W.copy(), copies[1])

    def gradient_arrays(self) -> dict:
        """The arrays that backward gives a gradient for, by name."""
        return {"x": self.x, **{name: self.p[name] for name in self.trainable}}


def gradients(c: Case) -> str:
    """What is wrong, or an empty string; so for all checks here."""
    ranks = [replace(c.method, r=r) for r in (1, 6)] if hasattr(c.method, "r") else []
    for method in [c.method, *ranks]:
        for where in ({"at_init": True}, {"N": 1}):
            if not (report := check_method(method, **where)):
                row = next(row for row in report.rows if not row.ok)
                return f"{report.title}: {row.array}: {row.advice}"
    return ""


def merge(c: Case) -> str:
    merged = c.method.merge(c.W, c.p)
    same = merged.shape == c.W.shape and Trial.same(c.x @ merged.T, c.forward()[0])
    return "" if same else "forward(x) is not x @ merge(W, p).T"


def inputs(c: Case) -> str:
    saved = c.forward()[1]
    given = {"dy": c.dy, "W": c.W, **c.p, **{f"saved.{name}": array for name, array in saved.items()}}
    before = {name: array.copy() for name, array in given.items()}
    c.method.backward(c.dy, saved, c.W, c.p)
    changed = [name for name in given if not (given[name] == before[name]).all()]
    return f"backward changes {', '.join(changed)}" if changed else ""


def dtype(c: Case) -> str:
    x, W, dy = (a.astype(np.float32) for a in (c.x, c.W, c.dy))
    p = Saved((name, array.astype(np.float32)) for name, array in c.p.items())
    y, saved = c.method.forward(x, W, p)
    dx, grads = c.method.backward(dy, Saved(saved), W, p)
    results = {"y": y, "dx": dx, "merge": c.method.merge(W, p), **saved, **{f"d{k}": g for k, g in grads.items()}}
    wrong = [f"{name} is {array.dtype}" for name, array in results.items() if array.dtype != np.float32]
    return f"from float32, {', '.join(wrong)}" if wrong else ""


def keeps(c: Case) -> str:
    lengths = {**SIZES, "r": getattr(c.method, "r", "r")}
    show = lambda shapes: ", ".join(f"{name} ({', '.join(map(str, s))})" for name, s in shapes.items()) or "nothing"
    stated, found = kept(docstring_and_code(c.source)[0]), {k: a.shape for k, a in c.forward()[1].items()}
    if {name: tuple(lengths.get(axis, axis) for axis in shape) for name, shape in stated.items()} == found:
        return ""
    return f'"Kept for backward" states {show(stated)}; forward keeps {show(found)}'


def tagged(c: Case) -> str:
    docstring, code = docstring_and_code(c.source)
    stated, written = tags(docstring, "docstring"), tags(code, "code")
    same = stated and sorted(stated) == sorted(written)
    return "" if same else f"the docstring has {', '.join(stated) or 'none'}; the lines {', '.join(written) or 'none'}"


def claims(c: Case) -> str:
    failed = [text for text, holds in c.method.claims.items() if not holds(Trial(c.method))]
    return f'"{failed[0]}" does not hold' if failed else ""


CHECKS = {
    "gradients at the initial point, for one row, and at other ranks": gradients,
    "merge is forward as one weight": merge,
    "backward leaves what it is given as it is": inputs,
    "dtype in is dtype out": dtype,
    "the line Kept for backward": keeps,
    "equation tags, in the docstring and on the lines": tagged,
    "the claims": claims,
}
