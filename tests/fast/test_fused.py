"""The fused kernels equal the plain operations. Without a GPU their C++ source is compiled for the host and run by
CuPy's rules (standin_cupy/kernels.py), each statement of it is broken on purpose, and, marked nvrtc, the real CuPy's
translation of every launch is compiled to machine code for three GPUs.
"""

import contextlib
import itertools
import re
import sys

import numpy as np
import pytest
import standin_cupy
import translation
from standin_cupy import kernels as emulation

from minilora import ops
from minilora.engine import Saved, Tensor, backward
from minilora.fast import blocked as blocks
from minilora.fast import fused as kernels
from minilora.nn import Parameter
from minilora.training.optim import AdamW

pytestmark = pytest.mark.host("puts its arrays on the device itself")
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture(autouse=True)
def standin(request, monkeypatch):
    """The stand-in as the module cupy, with kernels that are compiled for the host."""
    if emulation.COMPILER is None and not request.node.get_closest_marker("nvrtc"):
        pytest.skip("no g++ or c++ to compile the kernels for the host")
    monkeypatch.setitem(sys.modules, "cupy", standin_cupy.module())
    monkeypatch.setattr(emulation, "launches", [])


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def norm(N, d, **constants):
    return "layer_norm", {"x": normal(N, d) + 3.0, "g": normal(d), "b": normal(d, seed=1)}, constants


def gelu(*shape):
    return "gelu", {"x": 2.0 * normal(*shape)}, {}


def attend(batch, heads, Tq, T, e=3):
    shapes = {"q": (batch * Tq, heads * e), "k": (batch * T, heads * e), "v": (batch * T, heads * e)}
    arrays = {name: normal(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    return "attention", arrays, {"batch": batch, "heads": heads}


def entropy(N, V, ignored=(), **constants):
    targets = np.random.default_rng(5).integers(0, V, N)
    targets[list(ignored)] = constants.get("ignore_index", -100)
    return "cross_entropy", {"logits": normal(N, V)}, {"targets": targets, **constants}


CASES = {
    "layer_norm": norm(5, 7),
    "layer_norm, one row": norm(1, 7),
    "layer_norm, one column": norm(5, 1),
    "layer_norm, no row": norm(0, 4),
    "layer_norm, 130 x 65": norm(130, 65),
    "layer_norm, eps": norm(4, 6, eps=0.5),
    "gelu": gelu(5, 7),
    "gelu, one entry": gelu(1),
    "gelu, 3 axes": gelu(2, 3, 4),
    "gelu, no row": gelu(0, 4),
    "attention": attend(2, 3, 5, 5),
    "attention, 1 x 1": attend(1, 1, 4, 4),
    "attention, one token": attend(2, 2, 1, 1),
    "attention, last 2 of 5": attend(2, 3, 2, 5),
    "attention, last 1 of 5": attend(3, 2, 1, 5),
    "attention, width 1": attend(1, 2, 6, 6, 1),
    "attention, 65 tokens": attend(2, 2, 65, 65),
    "cross_entropy": entropy(6, 5),
    "cross_entropy, ignored": entropy(6, 5, [0, 4]),
    "cross_entropy, index": entropy(6, 5, [2, 3], ignore_index=7),
    "cross_entropy, one row": entropy(1, 5),
    "cross_entropy, a vocabulary of 1": entropy(4, 1, [1]),
    "cross_entropy, 65": entropy(70, 65, [69]),
}
# A row of 19 among eight threads: some merge twice, some three times, so that no sign can cancel.
WIDE = {"layer_norm": norm(3, 19), "gelu": gelu(3), "attention": attend(1, 1, 19, 19), "cross_entropy": entropy(3, 19)}
EXTREME = {
    "layer_norm": [("layer_norm", {"x": np.full((3, 4), 3.0), "g": normal(4), "b": normal(4, seed=1)}, {})],
    "gelu": [("gelu", {"x": np.array([-1e4, -30.0, -1e-3, 0.0, 1e-3, 30.0, 1e4])}, {})],
    "attention": [
        ("attention", {"q": sign * 1e2 * np.ones((4, 6)), "k": 1e2 * normal(4, 6, seed=1) ** 2, "v": normal(4, 6)}, how)
        for sign, how in itertools.product([1.0, -1.0], [{"batch": 1, "heads": 2}])
    ],
    "cross_entropy": [
        ("cross_entropy", {"logits": logits}, {"targets": np.array([0, 1, 1, 2, 0])})
        for logits in [
            np.array([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4 - 1, -1e4], [3.0, 3.0, 3.0], [0.0, 1e4, -1e4]])
        ]
    ],
}
EXTREMES = {f"{name} {k}": case for name, cases in EXTREME.items() for k, case in enumerate(cases)}


def close(actual, expected, tolerance):
    """Relative to the largest entry: a sum in another order is off by the rounding of its largest term."""
    actual = getattr(actual, "_host", actual)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert not expected.size or np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def both(case, dtype, wanted=None, **more):
    """(forward's y and saved, backward's gradients), plain on the host and fused on the device."""
    name, arrays, constants = case
    arrays = {k: a.astype(dtype) for k, a in arrays.items()}
    operation, results, dy = getattr(ops, name), [], None
    need = operation.Need(*(wanted is None or k in wanted for k in arrays))
    for forward, vjp, put in (
        (operation.forward, operation.backward, np.asarray),
        (*kernels.FUSED[name], standin_cupy.device),
    ):
        y, saved = forward(need, *(put(a.copy()) for a in arrays.values()), **constants, **more)
        dy = np.asarray(normal(*y.shape, seed=9), dtype) if dy is None else dy
        saved = Saved((k, v) for k, v in saved.items() if v is not None)
        kept = dict(saved)
        results.append((y, kept, vjp(need, put(dy), saved) if any(need) else ()))
    return results


def whole(saved, rows, keys):
    """The plain form's P, kept block by block with the keys down, as the fused form's (batch, heads, Tq, T)."""
    batch, heads, block, _ = saved["how"]
    P = np.zeros((batch, heads, rows // batch, keys // batch), saved["P"].dtype)
    for samples, queries, seen, entries in blocks.causal_blocks(batch, keys // batch, rows // batch, heads, block):
        P[samples, :, queries, seen] = blocks.scores(saved["P"][entries], samples, heads, seen)[1].swapaxes(-1, -2)
    return P


def agree(case, dtype, tolerance, wanted=None, **more):
    (y, saved, grads), (fused_y, fused_saved, fused_grads) = both(case, dtype, wanted, **more)
    close(fused_y, np.asarray(y), tolerance)
    if case[0] == "attention" and "P" in saved:
        saved["P"] = whole(saved, len(y), len(saved["k"]))
    assert saved.keys() == fused_saved.keys()
    for key, value in saved.items():
        if isinstance(value, np.ndarray):
            close(fused_saved[key], value, tolerance)
        else:
            assert fused_saved[key] == value
    for grad, fused in zip(grads, fused_grads, strict=True):
        assert (grad is None) == (fused is None)
        if grad is not None:
            close(fused, grad, tolerance)


# -------------------------------------------------------------------------------- equal to the plain form


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_a_fused_pair_equals_the_plain_one(name, dtype):
    agree(CASES[name], dtype, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["layer_norm", "gelu", "attention", "attention, last 2 of 5", "cross_entropy"])
def test_whatever_is_needed_is_the_same(name):
    arrays = CASES[name][1]
    for count in range(len(arrays) + 1):
        for wanted in itertools.combinations(arrays, count):
            agree(CASES[name], np.float64, 1e-12, wanted)


@pytest.mark.parametrize("name", ["layer_norm", "gelu", "attention", "attention, last 2 of 5"])
def test_what_is_recomputed_is_the_same(name):
    agree(CASES[name], np.float64, 1e-12, recompute=True)


@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
def test_what_is_computed_again_is_the_same_to_the_bit(name):
    again_equals_forward(CASES[name])


def again_equals_forward(case, dtype=np.float64):
    name, arrays = case[0], {k: a.astype(dtype) for k, a in case[1].items()}
    need = getattr(ops, name).Need(*(True for _ in arrays))
    y, saved = kernels.FUSED[name][0](need, *map(standin_cupy.device, arrays.values()), recompute=True)
    again = kernels.AGAIN[name](Saved((k, v) for k, v in saved.items() if v is not None))
    np.testing.assert_array_equal(again._host, y._host)


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_values(name):
    agree(EXTREMES[name], np.float64, 1e-10)
    _, (y, saved, grads) = both(EXTREMES[name], np.float32)
    assert all(np.isfinite(a._host).all() for a in (y, *grads))
    if "P" in saved:
        np.testing.assert_allclose(saved["P"]._host.sum(axis=-1), 1.0, rtol=1e-5)


def test_minus_infinity_among_the_logits_is_a_probability_of_zero():
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0], [-np.inf, -np.inf, 1.0, -np.inf]])
    _, (loss, saved, _) = both(("cross_entropy", {"logits": logits}, {"targets": np.array([1, 2])}), np.float64)
    np.testing.assert_allclose(saved["p"]._host, [[0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0]])
    np.testing.assert_allclose(loss._host, np.log(2.0) / 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    logits = normal(3, 5)
    logits[1, 2] = bad
    with np.errstate(all="ignore"):
        loss, _ = kernels.FUSED["cross_entropy"][0](
            ops.cross_entropy.Need(True), standin_cupy.device(logits), targets=np.array([0, 1, 2])
        )
    assert not np.isfinite(loss._host)


def test_layer_norm_of_a_shifted_row_loses_nothing():
    """The sum of squares less the square of the sum would: in float32 nothing is left of the variance."""
    x = (normal(4, 64) + 1e4).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
    one, zero = np.ones(64, np.float32), np.zeros(64, np.float32)
    y, _ = kernels.layer_norm_forward(ops.layer_norm.Need(*3 * [False]), *map(standin_cupy.device, (x, one, zero)))
    np.testing.assert_allclose(y._host, exact, atol=3e-3)  # an entry of 1e4 is itself rounded to 1e-3


MISTAKES = {
    "layer_norm": (lambda f, a: f(None, a(2, 3), a(4), a(4)), r"layer_norm: x \(2, 3\), g \(4,\)"),
    "attention": (lambda f, a: f(None, a(4, 6), a(4, 6), a(4, 6), batch=3, heads=1), "do not divide .* batch of 3"),
    "cross_entropy": (lambda f, a: f(None, a(2, 3), targets=np.array([0, 3])), "ids run from 0 to 3"),
    "cross_entropy, shape": (lambda f, a: f(None, a(2, 3), targets=np.array([0])), r"logits \(2, 3\) and targets"),
    "cross_entropy, ignored": (lambda f, a: f(None, a(1, 3), targets=np.array([-100])), "every target is ignore_index"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_as_by_the_plain_form(name):
    f, message = MISTAKES[name]
    with pytest.raises(ops.InputError, match=message):
        f(kernels.FUSED[name.split(",")[0]][0], lambda *shape: standin_cupy.device(np.ones(shape)))


# -------------------------------------------------------------------------------- who takes them


LAUNCHES = {"layer_norm": (2, 2), "gelu": (1, 0), "attention": (3, 2), "cross_entropy": (2, 1)}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_few_and_none_is_waited_for(name):
    operation, arrays, constants = getattr(ops, name), *CASES[name][1:]
    tensors = [Tensor(standin_cupy.device(a.copy()), requires_grad=True) for a in arrays.values()]
    waited = len(standin_cupy.frames.syncs)
    y = operation(*tensors, **constants)
    forward = len(emulation.launches)
    backward(y, standin_cupy.device(np.ones(y.shape)))
    assert (forward, len(emulation.launches) - forward) == LAUNCHES[name]
    assert len(standin_cupy.frames.syncs) == waited


def test_the_host_and_complex_arrays_take_the_plain_form():
    for x in (normal(2, 3), standin_cupy.device(normal(2, 3) + 1j)):
        ops.gelu(Tensor(x))
    assert not emulation.launches


def network(put, recompute):
    """The gradients of a small network that recomputes what it can."""
    dtype_of = {name: put(normal(*s, seed=k)) for k, (name, s) in enumerate(
        {"x": (10, 6), "g": (6,), "b": (6,), "W": (6, 6), "head": (7, 6)}.items()
    )}  # fmt: skip
    t = {name: Tensor(a, requires_grad=True) for name, a in dtype_of.items()}
    h = ops.layer_norm(t["x"], t["g"], t["b"], recompute=recompute)
    q = ops.linear(h, t["W"], None)
    h = ops.attention(q, h, q, batch=2, heads=3, recompute=recompute)
    h = ops.gelu(ops.linear(h, t["W"], None), recompute=recompute)
    loss = ops.cross_entropy(ops.linear(h, t["head"], None), targets=np.arange(10) % 7)
    backward(loss)
    return {name: getattr(a.grad, "_host", a.grad) for name, a in t.items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_network_of_them_equals_the_plain_one(recompute):
    expected, actual = network(np.asarray, False), network(standin_cupy.device, recompute)
    assert emulation.launches
    for name, grad in expected.items():
        close(actual[name], grad, 1e-12)


def adamw(put, dtype, scales, steps=20, **options):
    params = {f"{k}": Parameter(put(normal(*shape).astype(dtype)), lr_scale=scale)
              for k, (shape, scale) in enumerate(zip([(3, 4), (5,)], scales, strict=True))}  # fmt: skip
    optimizer = AdamW(params, 1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        optimizer.grad[...] = put(normal(17, seed=step).astype(dtype))
        optimizer.move()
        optimizer.lr *= 0.9
    return [getattr(a, "_host", a) for a in (optimizer.data, optimizer.m, optimizer.v)]


@each_dtype
@pytest.mark.parametrize("scales", [(1.0, 1.0), (16.0, 1.0)])
def test_adamw_equals_the_plain_one(dtype, scales):
    for actual, expected in zip(
        adamw(standin_cupy.device, dtype, scales), adamw(np.asarray, dtype, scales), strict=True
    ):
        close(actual, expected, TOLERANCE[dtype])
    assert len(emulation.launches) == 20


@each_dtype
def test_steps_of_adamw_with_decay_and_clipping_equal_the_plain_ones(dtype):
    ends = []
    for put in (np.asarray, standin_cupy.device):
        params = {"W": Parameter(put(normal(3, 4).astype(dtype)), lr_scale=2.0), "b": Parameter(put(np.ones(5, dtype)))}
        optimizer = AdamW(params, 1e-2, weight_decay=0.1, clip=1.0, eps=1e-6, betas=(0.8, 0.99))
        for step in range(20):
            optimizer.grad[...] = put(normal(17, seed=step).astype(dtype))
            optimizer.step()
        ends.append(getattr(optimizer.data, "_host", optimizer.data))
    close(ends[1], ends[0], TOLERANCE[dtype])


# -------------------------------------------------------------------------------- every statement matters


def split(text):
    """The parts between the commas of ``text`` that stand in no parentheses."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return parts


STATEMENT = re.compile(r"^(?P<head>\s*(?:T )?[\w\[\] /]+ -?= |\s*return (?=from))(?P<value>.*?)(?P<tail>;.*)$")
CONDITION = re.compile(r"^(?P<head>\s*if )(?P<value>\(.*?\))(?P<tail>(?: return .*)?)$")


def broken_lines(source):
    """Each mutant of a C++ text: a value scaled, negated or zeroed, a condition turned round."""
    lines = source.split("\n")
    for k, line in enumerate(lines):
        values = []
        if m := STATEMENT.match(line):
            truth = "later = i" in line
            values = [f"!({m['value']})"] if truth else [f"T({f}) * ({m['value']})" for f in FACTORS]
        elif m := CONDITION.match(line):
            values = [f"(!{m['value']})"]
        for value in values:
            yield "\n".join([*lines[:k], m["head"] + value + m["tail"], *lines[k + 1 :]])


def broken_parts(expression):
    """Each mutant of an expression of a reduction: of ``a + b``, of ``f(x, y)``, and of ``u = x, v = y``."""
    m = re.fullmatch(r"((?:later \? Softmax\(\) : )?[A-Z]\w*\()(.*)\)", expression)
    head, inside, tail = (m[1], m[2], ")") if m else ("", expression, "")
    parts = split(inside)
    for k, part in enumerate(parts):
        target, equals, value = part.partition(" = ") if " = " in part else ("", "", part)
        for factor in FACTORS:
            changed = f"{target}{equals}T({factor}) * ({value})"
            yield head + ",".join([*parts[:k], changed, *parts[k + 1 :]]) + tail


FACTORS = ("1.1", "-1", "0")
FREE = ("Moments(T(1.1) * (1), x)", "Moments(T(-1) * (1), x)")  # the unit that entries are counted in drops out


def mutants():
    """(table, kernel, its broken definition)."""
    for name, (*params, operation) in kernels.ELEMENTWISE.items():
        for broken in broken_lines(operation):
            yield kernels.ELEMENTWISE, name, (*params, broken)
    for name, definition in kernels.REDUCTION.items():
        for k in (2, 3, 4):
            if definition[k] != "merge(a, b)":
                for broken in (b for b in broken_parts(definition[k]) if b not in FREE):
                    yield kernels.REDUCTION, name, (*definition[:k], broken, *definition[k + 1 :])
        for broken in broken_lines(definition[-1]):
            yield kernels.REDUCTION, name, (*definition[:-1], broken)


USERS = {"softmax": "attention", "later": "attention", "softmax_all": "cross_entropy"}


def seen(name):
    """Whether a disagreement with the plain form is found, in the cases of the operation that uses the kernel."""
    user = USERS.get(name) or next(u for u in [*EXTREME, "adamw", "softmax"] if name.startswith(u))
    user = USERS.get(user, user)
    try:
        if user == "adamw":
            for one, other in zip(
                adamw(standin_cupy.device, np.float64, (16.0, 1.0)), adamw(np.asarray, np.float64, (16.0, 1.0)),
                strict=True,
            ):  # fmt: skip
                close(one, other, 1e-12)
        else:
            for case in [*EXTREME[user], WIDE[user]]:
                agree(case, np.float64, 1e-10)
            for more in [{}] if user == "cross_entropy" else [{}, {"recompute": True}]:
                agree(CASES[user], np.float64, 1e-12, **more)
            if user in kernels.AGAIN:
                agree(CASES[user], np.float64, 1e-12, ())
                again_equals_forward(CASES[user])
    except AssertionError:
        return True
    return False


def changed(old, new):
    """The line that a mutant changed, to name it by."""
    pairs = zip("\n".join(map(str, old)).split("\n"), "\n".join(map(str, new)).split("\n"), strict=True)
    return next(f"{after.strip()}" for before, after in pairs if before != after)


MUTANTS = list(mutants())


@pytest.mark.parametrize("k", range(len(MUTANTS)), ids=lambda k: f"{MUTANTS[k][1]}-{k}")
def test_a_broken_statement_is_seen(k, monkeypatch):
    table, name, broken = MUTANTS[k]
    line = changed(table[name], broken)
    monkeypatch.setitem(table, name, broken)
    with np.errstate(all="ignore"):
        assert seen(name), f"{name}: {line} passes"


def test_the_unbroken_kernels_pass():
    assert not any(seen(name) for name in [*kernels.ELEMENTWISE, *kernels.REDUCTION])


def test_every_statement_is_broken():
    """No line of a kernel is passed over for its form: what is left is a declaration, or a return of finished parts."""
    harmless = re.compile(r"\s*(//.*|struct .*|T \w+(, \w+)*;|__device__ .*|return \w+(\(.*\))?;|\};?|)$")
    for definition in [*kernels.ELEMENTWISE.values(), *kernels.REDUCTION.values()]:
        for line in definition[-1].split("\n"):
            assert STATEMENT.match(line) or CONDITION.match(line) or harmless.match(line), line


# -------------------------------------------------------------------------------- the stand-in keeps CuPy's rules


def elementwise(*args, params=("T x", "T y"), code="y = x", **options):
    return sys.modules["cupy"].ElementwiseKernel(*params, code)(*args, **options)


def reduction(*args, params=("T x", "T y"), identity="0", **options):
    return sys.modules["cupy"].ReductionKernel(*params, "x", "a + b", "y = a", identity)(*args, **options)


def there(*shape, dtype=np.float64):
    return standin_cupy.device(np.ones(shape, dtype))


REFUSED = {
    "a host array": (lambda: elementwise(np.ones(3)), TypeError, "Unsupported type"),
    "a number for an output": (lambda: elementwise(there(3), 1.0), TypeError, "Output arguments type"),
    "an output of another shape": (lambda: elementwise(there(3, 1), there(1, 1)), ValueError, "Out shape"),
    "an output that is broadcast": (lambda: elementwise(there(2, 3), there(3)), ValueError, "Out shape"),
    "shapes that do not fit": (lambda: elementwise(there(3), there(4)), ValueError, "broadcast"),
    "two types for one letter": (lambda: elementwise(there(3), there(3, dtype=np.float32)), TypeError, "mismatched"),
    "no array": (lambda: elementwise(1.0), ValueError, "Loop size is undecided"),
    "too few arguments": (lambda: elementwise(), TypeError, "Wrong number of arguments"),
    "a size beside whole arrays": (lambda: elementwise(there(3), size=3), ValueError, "'size' can be used only"),
    "a raw output that is not given": (
        lambda: elementwise(there(3), params=("T x", "raw T y"), code="y[i] = x"),
        ValueError,
        "size is Undecided",
    ),
    "i as a name": (lambda: elementwise(there(3), params=("T i", "T y")), ValueError, "Can not use 'i'"),
    "an input written to": (lambda: elementwise(there(3), code="x = y"), RuntimeError, "read-only"),
    "an entry reduced to an output of the whole shape": (
        lambda: reduction(there(2, 3), there(2, 3), axis=1),
        ValueError,
        "Out shape",
    ),
    "a raw input whose axes move": (
        lambda: reduction(there(2, 3), there(2, 3), params=("T x, raw T z", "T y"), axis=1),
        NotImplementedError,
        "Illegal conditions",
    ),
    "nothing to begin with": (lambda: reduction(there(2, 0), identity=None, axis=1), ValueError, "no identity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_stand_in_refuses_what_cupy_refuses(name):
    f, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        f()


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, (0, 2), (2, 1)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_a_reduction_is_numpys_sum(axis, keepdims):
    x = normal(3, 20, 5)
    for view in (x, x.transpose(2, 0, 1), x[:, ::2], x[:0]):
        actual = reduction(standin_cupy.device(view), axis=axis, keepdims=keepdims)
        np.testing.assert_allclose(actual._host, view.sum(axis=axis, keepdims=keepdims), rtol=1e-12, atol=1e-12)


def test_an_elementwise_kernel_broadcasts_and_indexes_as_cupy_does():
    x, z = normal(3, 1, 4).transpose(2, 0, 1), normal(5)
    kernel = sys.modules["cupy"].ElementwiseKernel(
        "T x, raw T z, int64 n", "T y, S k", "y = x + z[i % n]; k = _ind.size()", return_tuple=True
    )
    y, k = standin_cupy.device(np.zeros((4, 3, 5))), standin_cupy.device(np.zeros((4, 3, 5), np.int32))
    assert kernel(standin_cupy.device(x), standin_cupy.device(z), 5, y, k) == (y, k)
    np.testing.assert_array_equal(y._host, x + z)
    assert (k._host == 60).all()


# -------------------------------------------------------------------------------- as CuPy compiles them


@pytest.fixture
def cupy_itself():
    if why := translation.missing():
        pytest.skip(f"{why} is installed; pip install 'minilora[kernels]'")
    return translation.real()


@pytest.fixture
def units(monkeypatch, cupy_itself):
    """{kernel and dtypes and code: code}, CuPy's translation of every launch of the cases."""
    monkeypatch.setattr(emulation.Kernel, "execute", lambda *args: None)  # nothing runs: no g++ is needed
    for dtype in TOLERANCE:
        for case in CASES.values():
            for more in [{}] if case[0] == "cross_entropy" else [{}, {"recompute": True}]:
                both(case, dtype, **more)
                both(case, dtype, (), **more)
        for name in kernels.AGAIN:
            with contextlib.suppress(AssertionError):  # nothing is computed
                again_equals_forward(CASES[name], dtype)
        for scales in (1.0, 1.0), (16.0, 1.0):
            adamw(standin_cupy.device, dtype, scales, steps=1)
    found = {}
    for kernel, args, types in emulation.launches:
        dtypes = ", ".join(f"{letter} = {dtype}" for letter, dtype in types.items())
        code = translation.unit((kernel, args, types))
        found[f"{kernel.name}: {dtypes}: {code}"] = code
    names = {key.partition(":")[0].removeprefix("minilora_") for key in found}
    assert names == {*kernels.ELEMENTWISE, *kernels.REDUCTION}
    return found


@pytest.mark.nvrtc
@pytest.mark.parametrize("architecture", [70, 80, 90])
def test_cupy_s_translation_of_every_launch_compiles_to_machine_code(units, cupy_itself, architecture):
    if architecture < 75 and cupy_itself.version >= (13, 0):
        pytest.skip("CUDA 13 has given this architecture up")
    for name, code in units.items():
        assert translation.compiled(code, architecture).startswith(b"\x7fELF"), name


@pytest.mark.nvrtc
def test_nothing_in_float32_is_computed_in_float64(units):
    for name, code in units.items():
        assembly = translation.compiled(code, 80, "ptx").split(b"\n")
        wide = any(b".f64" in line for line in assembly if not line.startswith(b".global"))  # a header's constants
        assert wide == ("float64" in name.split(":")[1]), name


@pytest.mark.nvrtc
def test_a_broken_kernel_does_not_compile(units, cupy_itself):
    for name, code in units.items():
        if "float32" in name:
            for broken in (code.replace("T total", "T totl"), code.replace(" = ", " = undeclared + ", 1)):
                if broken != code:
                    with pytest.raises(cupy_itself.compiler.CompileException):
                        translation.compiled(broken, 80)


@pytest.mark.nvrtc
@pytest.mark.skipif(emulation.COMPILER is None, reason="no g++ or c++ to compile CuPy's translation for the host")
@each_dtype
def test_cupy_s_translation_computes_what_the_plain_form_does(monkeypatch, cupy_itself, dtype):
    """With CuPy's own arrays, indices and order of threads; only the GPU's arithmetic is missing."""
    ran = []

    def execute(kernel, args, types, *_):
        ran.append(kernel.name.removeprefix("minilora_"))
        translation.run_on_host(kernel, args, types)

    monkeypatch.setattr(emulation.Kernel, "execute", execute)
    for name, case in CASES.items():
        for more in [{}] if case[0] == "cross_entropy" else [{}, {"recompute": True}]:
            agree(case, dtype, TOLERANCE[dtype], **more)
            agree(case, dtype, TOLERANCE[dtype], (), **more)
        if name in kernels.AGAIN:
            again_equals_forward(case, dtype)
    for scales in (1.0, 1.0), (16.0, 1.0):
        pairs = adamw(standin_cupy.device, dtype, scales), adamw(np.asarray, dtype, scales)
        for actual, expected in zip(*pairs, strict=True):
            close(actual, expected, TOLERANCE[dtype])
    assert {*ran} == {*kernels.ELEMENTWISE, *kernels.REDUCTION}
