"""Is a hand-written gradient right? Compare it with finite differences and the complex step, and say what is wrong.

Central differences work for any function; the complex step, f(x + ih).imag / h, has no subtraction and so is exact
to rounding, where the code is holomorphic (Squire & Trapp 1998, doi 10.1137/S003614459631241X). Both in float64.
"""

from dataclasses import asdict, dataclass

import numpy as np

from ..adapter import cast_to
from ..backend import array_module, to_device, to_host
from ..engine import Operation, Saved
from ..errors import InputError

CENTRAL_TOLERANCE = 1e-7  # relative to the largest entry of the numeric gradient
COMPLEX_TOLERANCE = 1e-12
MAX_ENTRIES = 2048  # larger arrays are checked along random directions instead of entry by entry
DIRECTIONS = 16


@dataclass(frozen=True)
class Row:
    """The verdict on one array by one method: worst entry, both values there, and a guess at what is wrong."""

    array: str
    method: str  # "central" or "complex"; "shape" where the gradient's shape is wrong and no number is compared
    ok: bool
    error: float  # largest difference, relative to the largest numeric entry
    worst: tuple  # index of the worst entry; the direction's number where directions were taken
    analytic: float
    numeric: float
    advice: str


@dataclass(frozen=True)
class Report:
    """All rows of one check; true where every row is ok. ``print(report)`` shows them, ``dict()`` is for JSON."""

    title: str
    rows: tuple

    def __bool__(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def worst_error(self) -> float:
        return max(row.error for row in self.rows)

    def dict(self) -> dict:
        """For JSON, which knows no infinity: a number that is not finite becomes None."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row |= {key: None for key, value in row.items() if isinstance(value, float) and not np.isfinite(value)}
        return {"title": self.title, "ok": bool(self), "rows": rows}

    def __str__(self):
        lines = [f"{'ok  ' if self else 'FAIL'} {self.title}"]
        for r in self.rows:
            line = f"  {'ok  ' if r.ok else 'FAIL'} {r.array:<8} {r.method:<8}"
            if r.method != "shape":
                line += f" relative error {r.error:.1e}"
                if not r.ok:
                    line += f", worst at {list(r.worst)}: analytic {r.analytic:+.6e}, numeric {r.numeric:+.6e}"
            lines.append(line.rstrip() + (f"\n       {r.advice}" if r.advice else ""))
        return "\n".join(lines)


def gradcheck(f, grads: dict, arrays: dict, title="gradient", complex_step=True, seed=0) -> Report:
    """Check ``grads`` of the scalar function ``f(**arrays)``; both dicts by array name, float64.

    Arrays of more than MAX_ENTRIES entries are checked along random directions. With ``complex_step``, f must be
    holomorphic and accept complex128 arrays. Raises InputError for a wrong dtype or a gradient without an array.
    """
    for name, grad in grads.items():
        if name not in arrays:
            raise InputError(f'gradcheck: there is a gradient for "{name}", the arrays are {sorted(arrays)}')
        if arrays[name].dtype != np.float64:
            raise InputError(f"gradcheck: {name} is {arrays[name].dtype}; a check needs float64")
        if isinstance(grad, np.generic) or not hasattr(grad, "nbytes"):
            raise InputError(f"gradcheck: the gradient of {name} is {type(grad).__name__}, not an array")
    if (xp := array_module(*arrays.values())) is not np:  # f is computed on the GPU, all the rest here
        grads, arrays = ({k: to_host(a) for k, a in given.items()} for given in (grads, arrays))
        on_device = f

        def f(**arrays):
            return to_host(on_device(**{name: to_device(array, xp) for name, array in arrays.items()}))

    kinds = [("central", central_difference, CENTRAL_TOLERANCE)]
    kinds += [("complex", complex_difference, COMPLEX_TOLERANCE)] if complex_step else []
    rows, size = [], abs(f(**arrays))
    for name, grad in grads.items():
        x = arrays[name]
        if grad.shape != x.shape:
            turned = ", the transpose of it" if grad.shape == x.shape[::-1] else ""
            advice = f"guess: the gradient has shape {grad.shape}{turned}; it must have the array's shape, {x.shape}"
            rows.append(Row(name, "shape", False, np.inf, (), np.nan, np.nan, advice))
            continue
        rng, along, directions = np.random.default_rng(seed), grad, None
        if x.size > MAX_ENTRIES:
            directions = [rng.standard_normal(x.shape) for _ in range(DIRECTIONS)]
            along = np.array([(grad * v).sum() for v in directions])
        for kind, difference, tolerance in kinds:
            steps = directions or units(x.shape)
            numeric = np.array([difference(f, arrays, name, x, v) for v in steps]).reshape(along.shape)
            rounding = 16 * np.finfo(np.float64).eps * size / (step_of(x) if kind == "central" else 1.0)
            rows.append(judge(name, kind, along, numeric, tolerance, rounding))
    return Report(title, tuple(rows))


def units(shape):
    """The unit vectors of an array's entries, in order; each is an array of ``shape``."""
    for index in np.ndindex(*shape):
        v = np.zeros(shape)
        v[index] = 1.0
        yield v


def step_of(x) -> float:
    """The step of a fourth-order central difference: its truncation, h⁴ times a fifth derivative that may be large, and
    its rounding, eps / h, are then both far below CENTRAL_TOLERANCE.
    """
    return np.finfo(np.float64).eps ** (1 / 4) * max(1.0, np.abs(x).max(initial=0.0))


def central_difference(f, arrays, name, x, v):
    """(8 (f(x + hv) − f(x − hv)) − (f(x + 2hv) − f(x − 2hv))) / 12h, of fourth order."""
    h = step_of(x) / np.abs(v).max()
    two_below, below, above, two_above = (f(**{**arrays, name: x + k * h * v}) for k in (-2, -1, 1, 2))
    return (8 * (above - below) - (two_above - two_below)) / (12 * h)


def complex_difference(f, arrays, name, x, v):
    """Im f(x + ihv) / h; h may be tiny because nothing is subtracted."""
    h = 1e-100
    value = f(**{**cast(arrays, np.complex128), name: x + 1j * h * v})
    if not np.iscomplexobj(value):
        raise InputError(f"gradcheck: the function drops the imaginary part of {name}; use complex_step=False")
    return value.imag / h


def cast(arrays, dtype) -> Saved:
    """The arrays by name in another dtype; those of integers and booleans as they are."""
    return Saved((name, array.astype(cast_to(array, dtype), copy=False)) for name, array in arrays.items())


def judge(name, kind, analytic, numeric, tolerance, rounding=0.0) -> Row:
    """Compare entry by entry, relative to the largest numeric entry, and guess at what is wrong.

    ``rounding``: what float64 cannot resolve of the numeric gradient; a difference below it proves nothing wrong.
    """
    scale = np.abs(numeric).max(initial=0.0)
    difference = np.abs(analytic - numeric)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    worst = tuple(map(int, np.unravel_index(difference.argmax(), difference.shape)))
    largest = difference[worst]
    error = float(largest / scale if scale > 0 else largest)
    ok = bool(error <= tolerance or largest <= rounding)
    advice = ""
    if not ok:
        advice = "guess: " + guess(analytic, numeric)
    elif scale <= rounding:
        advice = "blind spot: the numeric gradient is zero everywhere, so an error could hide; move off this point"
    return Row(name, kind, ok, error, worst, float(analytic[worst]), float(numeric[worst]), advice)


def guess(analytic, numeric, close=1e-4) -> str:
    """The likeliest mistake behind an analytic gradient that differs from the numeric one."""
    size = np.linalg.norm(numeric)

    def near(a, b):
        return np.linalg.norm(a - b) <= close * size

    if not np.isfinite(analytic).all():
        return "the gradient has entries that are not finite"
    if size == 0:
        return "the function does not depend on this array, yet the gradient is not zero"
    if not analytic.any():
        return "the gradient is zero everywhere: it was never computed, or a factor in it is zero here"
    if near(analytic, -numeric):
        return "the sign is flipped"
    factor = (analytic * numeric).sum() / size**2
    if near(analytic, numeric):
        return "almost right: a small term is missing, such as an epsilon, or the point is badly conditioned"
    if factor and near(analytic, factor * numeric):
        return f"off by a constant factor {factor:.6g}: a forgotten or doubled scale, such as alpha / r or 1 / N"
    if analytic.ndim == 2 and analytic.shape[0] == analytic.shape[1] and near(analytic.T, numeric):
        return "transposed"
    missing = numeric - analytic
    if np.linalg.norm(missing) < size:
        return f"a term of {np.linalg.norm(missing) / size:.2g} times the gradient's length is missing or wrong"
    return "no simple pattern; check this line's equation"


# ---------------------------------------------------------------- what minilora itself is checked with


def check_method(method, N=5, d_in=7, d_out=6, at_init=False, seed=0, complex_step=None) -> Report:
    """Check the backward of an adapter method: the gradient of x and of each trainable array.

    Off the initial point unless ``at_init``: where B = 0, a dA that is wrong by any factor passes, since it is zero.
    ``method``: an Adapter. A method that is not holomorphic says so in ``holomorphic = False``.
    """
    x, W, p, names, dy = method_point(method, N, d_in, d_out, at_init, seed)
    _, saved = method.forward(x, W, p)
    dx, grads = method.backward(dy, Saved(saved), W, p)
    if set(grads) != set(names):
        have = f"backward returns gradients for {sorted(grads)}"
        raise InputError(f"{method.name}: {have}, trainable are {sorted(names)}")
    arrays = {"x": x, **{name: p[name] for name in names}}
    point = "initial point" if at_init else "random point"
    title = f"{method.name}  x ({N}, {d_in}), W ({d_out}, {d_in}), {point}"
    holomorphic = method.holomorphic if complex_step is None else complex_step
    return gradcheck(method_loss(method, W, p, dy), {"x": dx, **grads}, arrays, title, holomorphic, seed)


def method_loss(method, W, p, dy):
    """The loss, a function of x and of trained arrays by name, whose gradient with respect to y is ``dy``."""

    def loss(x, **trained):
        at = cast(p, x.dtype)
        return (method.surrogate(x, W.astype(x.dtype), Saved(at | trained), at) * dy).sum()

    return loss


def method_point(method, N, d_in, d_out, at_init, seed):
    """(x, W, p, trainable names, dy) in float64, drawn from ``seed``; every trained array random unless ``at_init``.

    W is as ``init`` left it.
    """
    rng = np.random.default_rng(seed)
    W, x, dy = (rng.standard_normal(shape) for shape in [(d_out, d_in), (N, d_in), (N, d_out)])
    method.check_layer("this layer", W.shape)
    shared = Saved(method.init_shared([W.shape], rng))
    trainable, buffers = method.init(W, rng, shared)
    if not at_init:
        trainable = {k: a + 0.5 * rng.standard_normal(a.shape) for k, a in trainable.items()}
    return x, W, Saved({**shared, **buffers, **trainable}), list(trainable), dy


def check_operation(operation: Operation, arrays: dict, title=None, complex_step=True, seed=0, **constants) -> Report:
    """Check an operation of ops.py: the gradient of each array of ``arrays`` (by name, in forward's order)."""
    rng = np.random.default_rng(seed)
    need = operation.Need(*(name in arrays for name in operation.Need._fields))

    def run(**arrays):
        return operation.forward(need, *(arrays.get(name) for name in need._fields), **constants)

    y, saved = run(**arrays)
    dy = array_module(y).asarray(rng.standard_normal(y.shape))
    returned = zip(need._fields, operation.backward(need, dy, Saved(saved)), strict=True)
    grads = {name: grad for name, grad in returned if name in arrays}

    def loss(**arrays):
        return (run(**arrays)[0] * dy).sum()

    return gradcheck(loss, grads, arrays, title or operation.name, complex_step, seed)


def check_operations(seed=0, ops=None) -> list[Report]:
    """Check every layer-sized operation at a small random point; ``ops``: another module of the same operations."""
    if ops is None:
        from .. import ops
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape)

    ids = np.array([3, 0, 3, 5, 1, 3])  # a repeated id: its row receives twice
    targets = np.array([4, ops.IGNORE_INDEX, 0, 2, 2, 1])
    qkv = {"q": draw(10, 6), "k": draw(10, 6), "v": draw(10, 6)}
    short = {"q": draw(4, 6), "k": draw(10, 6), "v": draw(10, 6)}

    def dropout(need, x):  # a Generator moves on when it is used: start it anew for each call
        return ops.dropout_forward(need, x, p=0.4, rng=np.random.default_rng(seed))

    return [
        check_operation(ops.linear, {"x": draw(5, 4), "W": draw(3, 4), "b": draw(3)}),
        check_operation(ops.linear, {"x": draw(5, 4), "W": draw(3, 4)}, "linear without bias"),
        check_operation(ops.add, {"x": draw(5, 4), "y": draw(5, 4)}),
        check_operation(ops.embedding, {"table": draw(6, 3)}, ids=ids),
        check_operation(ops.layer_norm, {"x": draw(4, 6), "g": draw(6), "b": draw(6)}),
        check_operation(ops.gelu, {"x": 2.0 * draw(5, 6)}),
        check_operation(ops.attention, qkv, batch=2, heads=3),
        check_operation(ops.attention, short, "attention, 2 queries on 5 keys", batch=2, heads=2),
        check_operation(ops.cross_entropy, {"logits": draw(6, 5)}, targets=targets),
        check_operation(Operation(dropout, ops.dropout_backward), {"x": draw(5, 4)}, "dropout, one fixed mask"),
    ]


def check_methods(names=None) -> list[Report]:
    """Check the adapter methods ``names`` (all by default) at and off the initial point, at the edges of N and r."""
    from .. import methods

    reports = []
    for name in methods.names() if names is None else names:
        ranks = [{"r": 3}, {"r": 1}, {"r": 6}] if "r" in methods.options(name) else [{}]
        for options in ranks:
            method = methods.create(name, **options)
            reports += [check_method(method), check_method(method, at_init=True), check_method(method, N=1)]
    return reports


def check_model(model, ids, targets, seed=0) -> Report:
    """Check a whole float64 model: the gradient of its loss with respect to every trained parameter."""
    from ..engine import backward, no_grad

    params, everything, grads = model.trainable(), dict(model.named_parameters()), {}
    before = {name: p.grad for name, p in params.items()}
    try:
        for p in params.values():
            p.node.grad = None
        backward(model.loss(ids, targets))
        for name, p in params.items():
            grads[name] = array_module(p.data).zeros_like(p.data) if p.grad is None else p.grad
    finally:  # an optimizer's gradients are views of its buffer
        for name, p in params.items():
            p.node.grad = before[name]
    arrays = {name: p.data for name, p in everything.items()}

    def loss(**values):
        try:
            for name, p in everything.items():
                p.data = values[name]
            with no_grad():
                return model.loss(ids, targets).data
        finally:
            for name, p in everything.items():
                p.data = arrays[name]

    return gradcheck(loss, grads, arrays, "model", seed=seed)
