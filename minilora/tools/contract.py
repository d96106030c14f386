"""The rules of docs/contract.md as checks that any method file can be put through, beyond its backward equations.

The test suite holds the shipped methods to more; these checks need nothing but the file.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..adapter import AdaptedLinear, Adapter
from ..backend import to_host
from ..engine import Saved, Tensor, backward
from ..errors import InputError
from ..memory import owner
from ..nn import Linear, Parameter
from .gradcheck import cast, check_method, method_point
from .methodfile import code_tags, docstring_and_code, equations, kept, length, listed, sizes_of, stated_shapes
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
        saved, p = (Saved((k, a.copy()) for k, a in given.items()) for given in (self.forward()[1], self.p))
        return (method or self.method).backward(self.dy.copy(), saved, self.W.copy(), p)

    def gradient_arrays(self) -> dict:
        """The arrays that backward gives a gradient for, by name."""
        return {"x": self.x, **{name: self.p[name] for name in self.trainable}}


def shapes(c: Case) -> str:
    """What is wrong, or an empty string; so for all checks here."""
    for d_out, d_in in ((SIZES["d_out"], SIZES["d_in"]), (9, 5)):
        rng, method = np.random.default_rng(0), c.method
        W = rng.standard_normal((d_out, d_in))
        shared = method.init_shared([W.shape], rng)
        trainable, buffers = method.init(W, rng, Saved(shared))
        trained, stored = method.shapes(d_out, d_in)
        groups = [("trainable", trained, trainable), ("a buffer", stored, buffers)]
        for kind, declared, made in [*groups, ("shared", method.shared_shapes(d_out, d_in), shared)]:
            found = {name: array.shape for name, array in made.items()}
            for name in dict.fromkeys([*declared, *found]):
                if declared.get(name) != found.get(name):
                    what, where = f"{name} ({kind}) is {declared.get(name)}", f"in a layer ({d_out}, {d_in})"
                    return f"{what} by shapes, and init makes {found.get(name)}, {where}"
        whole = {name for name, array in {**shared, **trainable, **buffers}.items() if array.dtype.kind in "iub"}
        if wrong := whole ^ set(method.integers) or whole & set(trainable):
            return f"integers is {method.integers}, the integers that init makes are in {sorted(whole)}: {min(wrong)}"
        sizes = sizes_of(method, SIZES["N"], d_in, d_out)
        for name, stated in stated_shapes(method).items():
            declared = {**trained, **stored, **method.shared_shapes(d_out, d_in)}[name]
            if tuple(length(axis, sizes) for axis in stated) != declared:
                return f"the docstring has {name} ({', '.join(stated)}), and shapes {declared}"
    return ""


def gradients(c: Case) -> str:
    ranks = [replace(c.method, r=r) for r in (1, 6)] if hasattr(c.method, "r") else []
    for method in [c.method, *ranks]:
        for where in ({"at_init": True}, {"N": 1}):
            if not (report := check_method(method, **where)):
                row = next(row for row in report.rows if not row.ok)
                return f"{report.title}: {row.array}: {row.advice}"
    return ""


def start(c: Case) -> str:
    rng = np.random.default_rng(1)
    x, original = rng.standard_normal(c.x.shape), rng.standard_normal(c.W.shape)
    W, shared = original.copy(), Saved(c.method.init_shared([c.W.shape], rng))
    trainable, buffers = c.method.init(W, rng, shared)
    y, _ = c.method.forward(x, W, Saved({**shared, **trainable, **buffers}))
    if Trial.same(y, x @ original.T) == bool(c.method.starts_elsewhere):
        found = "it does" if c.method.starts_elsewhere else "it does not"
        return f"{found}, and starts_elsewhere is {c.method.starts_elsewhere!r}"
    return "" if c.method.updates_base or equal(W, original) else "init changes W without updates_base = True"


def merge(c: Case) -> str:
    merged, factors = c.method.merge(c.W, c.p), c.method.factors(c.W, c.p)
    if merged.shape != c.W.shape or not Trial.same(c.x @ merged.T, c.forward()[0]):
        return "forward(x) is not x @ merge(W, p).T"
    if factors is not None and not Trial.same(merged, c.W + factors[0] @ factors[1]):
        return "merge(W, p) is not W + B @ A with the B and A of factors"
    same = [name for name, array in {"W": c.W, **c.p}.items() if owner(merged) is owner(array)]
    return f"it must be a new array, and is {same[0]}" if same else ""


def inputs(c: Case) -> str:
    saved = c.forward()[1]
    given = {"dy": c.dy, "W": c.W, **c.p, **{f"saved.{name}": array for name, array in saved.items()}}
    before = {name: array.copy() for name, array in given.items()}
    dx, grads = c.method.backward(c.dy, saved, c.W, c.p)
    if changed := [name for name in given if not equal(given[name], before[name])]:
        return f"backward changes {', '.join(changed)}"
    again, grads_again = c.method.backward(c.dy, saved, c.W, c.p)
    same = equal(dx, again) and all(equal(grads[name], grads_again[name]) for name in grads)
    return "" if same else "a second call returns other gradients"


def equal(a, b) -> bool:
    return np.array_equal(to_host(a), to_host(b))


def hosted(c: Case) -> str:
    shared = {name: Parameter(c.p[name].copy(), False) for name in c.method.shared_shapes(*c.W.shape)}
    bias = c.W[:, 0].copy()
    layer = AdaptedLinear(Linear(c.W.copy(), bias), c.method, 0, shared)
    layer.base.W.data = c.W.copy()
    for name, parameter in vars(layer.arrays).items():
        parameter.data = c.p[name].copy()
    x, (y, saved), (dx, grads) = Tensor(c.x.copy(), requires_grad=True), c.forward(), c.backward()
    out = layer(x)
    found = {"y": out.data, **{f"saved {name}": array for name, array in out.node.saved.items()}}
    wanted = {"y": y + bias, **{f"saved {name}": array.copy() for name, array in saved.items()}}
    backward(out, c.dy.copy())
    found |= {"dx": x.grad, **{f"d{name}": parameter.grad for name, parameter in layer.arrays.trainable().items()}}
    wanted |= {"dx": dx, **{f"d{name}": grad for name, grad in grads.items()}}
    wrong = [name for name in wanted if name not in found or not Trial.same(found[name], wanted[name])]
    return f"in a layer with a bias, {', '.join(wrong)} differs from the method's own" if wrong else ""


def dtype(c: Case) -> str:
    x, W, dy = (a.astype(np.float32) for a in (c.x, c.W, c.dy))
    p = cast(c.p, np.float32)
    y, saved = c.method.forward(x, W, p)
    dx, grads = c.method.backward(dy, Saved(saved), W, p)
    results = {"y": y, "dx": dx, "merge": c.method.merge(W, p), **{f"d{k}": g for k, g in grads.items()}}
    results |= {name: array for name, array in saved.items() if array.dtype.kind not in "iub"}
    wrong = [f"{name} is {array.dtype}" for name, array in results.items() if array.dtype != np.float32]
    return f"from float32, {', '.join(wrong)}" if wrong else ""


def keeps(c: Case) -> str:
    stated, found = kept(docstring_and_code(c.source)[0]), {k: a.shape for k, a in c.forward()[1].items()}
    sizes = sizes_of(c.method, **SIZES)
    try:
        if {name: tuple(length(axis, sizes) for axis in shape) for name, shape in stated.items()} == found:
            return ""
    except InputError as error:
        return str(error)
    return f'"Kept for backward" states {listed(stated)}; forward keeps {listed(found)}'


def tagged(c: Case) -> str:
    docstring, code = docstring_and_code(c.source)
    stated, written = [tag for tag, _ in equations(docstring)], code_tags(code)
    same = stated and sorted(stated) == sorted(written)
    return "" if same else f"the docstring has {', '.join(stated) or 'none'}; the lines {', '.join(written) or 'none'}"


def claims(c: Case) -> str:
    failed = [text for text, holds in c.method.claims.items() if not holds(Trial(c.method))]
    return f'"{failed[0]}" does not hold' if failed else ""


CHECKS = {
    "shapes are those of the arrays that init makes": shapes,
    "gradients at the initial point, for one row, and at other ranks": gradients,
    "starts as the base model, or says why not": start,
    "merge is forward as one weight": merge,
    "backward leaves what it is given as it is": inputs,
    "a layer with a bias does the same": hosted,
    "dtype in is dtype out": dtype,
    "the line Kept for backward": keeps,
    "equation tags, in the docstring and on the lines": tagged,
    "the claims": claims,
}
