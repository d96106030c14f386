"""The fused kernels equal the plain operations, and each statement of them matters.

Without a GPU their CUDA source is compiled as C++ and run on the host (standin_cupy/kernels.py). test_nvrtc.py compiles
it as CuPy does, and tests/gpu runs it on a card.
"""

import contextlib
import functools
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import standin_cupy
from standin_cupy import kernels as emulation

import minilora
from minilora import ops, plain
from minilora.engine import Saved, Tensor, backward
from minilora.fast import fused
from minilora.nn import Parameter
from minilora.training.optim import AdamW

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no g++ or c++ to compile the kernels for the host")


@pytest.fixture(autouse=True)
def standin(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", standin_cupy.module())
    standin_cupy.launches.clear()


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
    "layer_norm, one column": norm(5, 1),
    "layer_norm, no row": norm(0, 4),
    "layer_norm, eps": norm(4, 6, eps=0.5),
    "gelu": gelu(5, 7),
    "gelu, no row": gelu(0, 4),
    "attention": attend(2, 3, 5, 5),
    "attention, one token": attend(2, 2, 1, 1),
    "attention, last 2 of 5": attend(2, 3, 2, 5),
    "cross_entropy": entropy(6, 5),
    "cross_entropy, ignored": entropy(6, 5, [0, 4]),
    "cross_entropy, index": entropy(6, 5, [2, 3], ignore_index=7),
    "cross_entropy, a vocabulary of 1": entropy(4, 1, [1]),
    # a row of 19 among eight threads: some merge twice, some three times, so that no sign can cancel
    "layer_norm, wide": norm(3, 19),
    "attention, wide": attend(1, 1, 19, 19),
    "cross_entropy, wide": entropy(3, 19),
}
LOGITS = [[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4 - 1, -1e4], [3.0, 3.0, 3.0], [0.0, 1e4, -1e4]]
LARGE = {"q": 1e2 * np.ones((4, 6)), "k": 1e2 * normal(4, 6, seed=1) ** 2, "v": normal(4, 6)}
EXTREME = {
    "layer_norm, no variance": ("layer_norm", {"x": np.full((3, 4), 3.0), "g": normal(4), "b": normal(4, seed=1)}, {}),
    "gelu, far out": ("gelu", {"x": np.array([-1e4, -30.0, -1e-3, 0.0, 1e-3, 30.0, 1e4])}, {}),
    "attention, large": ("attention", LARGE, {"batch": 1, "heads": 2}),
    "attention, small": ("attention", LARGE | {"q": -LARGE["q"]}, {"batch": 1, "heads": 2}),
    "cross_entropy, large": ("cross_entropy", {"logits": np.array(LOGITS)}, {"targets": np.array([0, 1, 1, 2, 0])}),
}


CASES |= EXTREME


def close(actual, expected, tolerance) -> bool:
    """Relative to the largest entry: a sum in another order is off by the rounding of its largest term."""
    if actual is None or expected is None:
        return actual is expected
    actual, expected = getattr(actual, "_host", actual), np.asarray(expected)
    if actual.shape != expected.shape or actual.dtype != expected.dtype or not np.isfinite(actual).all():
        return False
    return bool(not expected.size or np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3))


def run(pair, case, dtype, put, wanted=None):
    """[y, *gradients] of a pair (forward, backward) on the arrays of ``case``, where ``put`` puts them."""
    name, arrays, constants = case
    need = getattr(ops, name).Need(*(wanted is None or k in wanted for k in arrays))
    y, saved = pair[0](need, *(put(a.astype(dtype)) for a in arrays.values()), **constants)
    saved = Saved((k, v) for k, v in saved.items() if v is not None)
    dy = np.asarray(normal(*y.shape, seed=9), dtype)
    return [y, *(pair[1](need, put(dy), saved) if any(need) else ())]


@functools.cache
def plainly(name, dtype, wanted):
    operation = getattr(ops, CASES[name][0])
    return run((operation.forward, operation.backward), CASES[name], dtype, np.asarray, wanted)


def fused_result(case, dtype, wanted=None):
    return run(getattr(ops, case[0]).forms["cupy"], case, dtype, standin_cupy.device, wanted)


def agree(name, dtype, tolerance, wanted=None) -> bool:
    pairs = zip(fused_result(CASES[name], dtype, wanted), plainly(name, dtype, wanted), strict=True)
    return all(close(actual, expected, tolerance) for actual, expected in pairs)


# -------------------------------------------------------------------------------- equal to the plain form


@pytest.mark.parametrize("name", CASES)
def test_a_fused_pair_equals_the_plain_one_for_every_choice_of_gradients(name):
    names = list(CASES[name][1])
    for choice in itertools.product([False, True], repeat=len(names)):
        wanted = tuple(itertools.compress(names, choice))
        assert agree(name, np.float64, 1e-10 if name in EXTREME else 1e-12, wanted), wanted


@pytest.mark.parametrize("name", CASES)
def test_it_does_so_in_float32(name):
    if name in EXTREME:
        assert all(np.isfinite(array._host).all() for array in fused_result(CASES[name], np.float32))
    else:
        assert agree(name, np.float32, 1e-5)


def test_a_logit_of_minus_infinity_is_a_probability_of_zero():
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0], [-np.inf, -np.inf, 1.0, -np.inf]])
    loss, dlogits = fused_result(("cross_entropy", {"logits": logits}, {"targets": np.array([1, 2])}), np.float64)
    np.testing.assert_allclose(loss._host, np.log(2.0) / 2)
    assert not dlogits._host[np.isinf(logits)].any() and dlogits._host.any()


def test_layer_norm_of_a_shifted_row_loses_nothing():
    """The sum of squares less the square of the sum would: in float32 nothing is left of the variance."""
    x = (normal(4, 64) + 1e4).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
    y, *_ = fused_result(("layer_norm", {"x": x, "g": np.ones(64), "b": np.zeros(64)}, {}), np.float32)
    np.testing.assert_allclose(y._host, exact, atol=3e-3)  # an entry of 1e4 is itself rounded to 1e-3


# -------------------------------------------------------------------------------- who uses them


def launched():
    """The fused kernels that were launched."""
    return [name for name in standin_cupy.launches if name.startswith("minilora_")]


LAUNCHES = {"layer_norm": (2, 2), "gelu": (1, 0), "attention": (3, 2), "cross_entropy": (2, 1)}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_few_and_none_is_waited_for(name):
    operation, arrays, constants = getattr(ops, name), *CASES[name][1:]
    tensors = [Tensor(standin_cupy.device(a.copy()), requires_grad=True) for a in arrays.values()]
    waited = len(standin_cupy.waits)
    y = operation(*tensors, **constants)
    forward = len(launched())
    backward(y, standin_cupy.device(np.ones(y.shape)))
    assert (forward, len(launched()) - forward) == LAUNCHES[name]
    assert len(standin_cupy.waits) == waited


def test_a_step_launches_about_as_often_as_notebook_10_says():
    text = (Path(__file__).parents[2] / "notebooks" / "10_gpu.py").read_text(encoding="utf-8")
    (said,) = re.findall(r"^LAUNCHES = (\d+)$", text, re.MULTILINE)
    gpt = minilora.adapt(minilora.pretrained().to("cuda"), "lora", verbose=False)
    ids = np.random.default_rng(0).integers(0, 96, (1, 17))
    standin_cupy.launches.clear()
    minilora.train(gpt, AdamW(gpt.trainable(), 5e-3), [(ids[:, :-1], ids[:, 1:])], steps=1, progress=False)
    assert len(standin_cupy.launches) == pytest.approx(int(said), rel=0.1)


def test_the_host_and_complex_arrays_take_the_plain_form():
    for x in (normal(2, 3), standin_cupy.device(normal(2, 3) + 1j)):
        ops.gelu(Tensor(x))
    assert not launched()


def adamw(put, dtype, scale):
    params = {"W": Parameter(put(normal(3, 4).astype(dtype)), lr_scale=scale), "b": Parameter(put(np.ones(5, dtype)))}
    optimizer = AdamW(params, 1e-2, weight_decay=0.1, clip=1.0, eps=1e-6, betas=(0.8, 0.99))
    for step in range(20):
        optimizer.grad[...] = put(normal(17, seed=step).astype(dtype))
        with plain() if put is np.asarray else contextlib.nullcontext():
            optimizer.step()
        optimizer.lr *= 0.9
    return [getattr(a, "_host", a) for a in (optimizer.data, optimizer.m, optimizer.v)]


def adamw_agrees(dtype, scale, tolerance) -> bool:
    pairs = zip(adamw(standin_cupy.device, dtype, scale), adamw(np.asarray, dtype, scale), strict=True)
    return all(close(actual, expected, tolerance) for actual, expected in pairs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_adamw_equals_the_plain_one(dtype, tolerance, scale):
    assert adamw_agrees(dtype, scale, tolerance)
    assert launched() == 20 * ["minilora_adamw"]


# -------------------------------------------------------------------------------- every statement matters

FACTORS = ("1.1", "-1")
STATEMENT = re.compile(r"^(?P<head>\s*(?:T )?[\w\[\] /]+ -?= |\s*return (?=from))(?P<value>.*?)(?P<tail>;.*)$")
CONDITION = re.compile(r"^(?P<head>\s*if )(?P<value>\(.*?\))(?P<tail>(?: return .*)?)$")
FREE = ("Moments(T(1.1) * (1), x)", "Moments(T(-1) * (1), x)")  # the unit that entries are counted in cancels


def broken_lines(source):
    """Each mutant of a C++ text: a value scaled or negated, a condition turned round."""
    lines = source.split("\n")
    for k, line in enumerate(lines):
        values = []
        if m := STATEMENT.match(line):
            values = [f"!({m['value']})"] if "later = i" in line else [f"T({f}) * ({m['value']})" for f in FACTORS]
        elif m := CONDITION.match(line):
            values = [f"(!{m['value']})"]
        for value in values:
            yield "\n".join([*lines[:k], m["head"] + value + m["tail"], *lines[k + 1 :]])


def broken_parts(expression):
    """Each mutant of an expression of a reduction: of ``a + b``, of ``f(x, y)``, and of ``u = x, v = y``."""
    m = re.fullmatch(r"((?:later \? Softmax\(\) : )?[A-Z]\w*\()(.*)\)", expression)
    head, inside, tail = (m[1], m[2], ")") if m else ("", expression, "")
    parts = re.split(r",(?![^(]*\))", inside)
    for (k, part), factor in itertools.product(enumerate(parts), FACTORS):
        target, equals, value = part.rpartition(" = ")
        yield head + ",".join([*parts[:k], f"{target}{equals}T({factor}) * ({value})", *parts[k + 1 :]]) + tail


def mutants():
    """(table, kernel, its broken definition)."""
    for name, (*params, operation) in fused.ELEMENTWISE.items():
        for broken in broken_lines(operation):
            yield fused.ELEMENTWISE, name, (*params, broken)
    for name, definition in fused.REDUCTION.items():
        broken = [(k, b) for k in (2, 3, 4) if definition[k] != "merge(a, b)" for b in broken_parts(definition[k])]
        for k, text in [*broken, *((7, b) for b in broken_lines(definition[7]))]:
            if text not in FREE:
                yield fused.REDUCTION, name, (*definition[:k], text, *definition[k + 1 :])


USERS = {"softmax": "attention", "later": "attention", "softmax_all": "cross_entropy"}


def disagreement(name):
    """Whether the kernel ``name`` lets its operation differ from the plain form."""
    operation = USERS.get(name) or next(u for u in [*LAUNCHES, "adamw", "softmax"] if name.startswith(u))
    operation = USERS.get(operation, operation)
    if operation == "adamw":
        return not adamw_agrees(np.float64, 16.0, 1e-12)
    telling = {operation, f"{operation}, wide"} | EXTREME.keys()
    cases = [key for key in CASES if key in telling and CASES[key][0] == operation]
    return not all(agree(key, np.float64, 1e-10, wanted) for key in cases for wanted in (None, ()))


def test_each_broken_statement_is_seen(monkeypatch):
    """In one test, since all of them are compiled in one call of the compiler."""
    assert not any(map(disagreement, [*fused.ELEMENTWISE, *fused.REDUCTION]))
    found, sources, passed = list(mutants()), {}, []
    for table, name, definition in found:
        with broken(monkeypatch, table, name, definition):
            source, text = fused.kernel(sys.modules["cupy"], name).source(T="float64", I="int64")
            sources[source] = text
    emulation.build(sources)
    for table, name, definition in found:
        with broken(monkeypatch, table, name, definition), np.errstate(all="ignore"):
            if not disagreement(name):
                passed.append((name, definition))
    assert len(found) > 100 and not passed


@contextlib.contextmanager
def broken(monkeypatch, table, name, definition):
    with monkeypatch.context() as patch:
        patch.setitem(table, name, definition)
        fused.kernel.cache_clear()
        yield
    fused.kernel.cache_clear()


def test_every_statement_is_broken():
    """No line of a kernel is passed over for its form: what is left is a declaration, or a return of finished parts."""
    harmless = re.compile(r"\s*(//.*|struct .*|T \w+(, \w+)*;|__device__ .*|return \w+(\(.*\))?;|\};?|)$")
    for definition in [*fused.ELEMENTWISE.values(), *fused.REDUCTION.values()]:
        for line in definition[-1].split("\n"):
            assert STATEMENT.match(line) or CONDITION.match(line) or harmless.match(line), line


# -------------------------------------------------------------------------------- the stand-in keeps CuPy's rules


def elementwise(*args, params=("T x", "T y"), code="y = x"):
    sys.modules["cupy"].ElementwiseKernel(*params, code)(*args)


def there(*shape, dtype=np.float64):
    return standin_cupy.device(np.ones(shape, dtype))


REFUSED = {
    "a host array": (lambda: elementwise(np.ones(3), there(3)), TypeError, "Unsupported type"),
    "a number for an output": (lambda: elementwise(there(3), 1.0), TypeError, "Output arguments type"),
    "an output of another shape": (lambda: elementwise(there(2, 3), there(3)), ValueError, "Out shape"),
    "shapes that do not fit": (lambda: elementwise(there(3), there(4)), ValueError, "broadcast"),
    "two types for one letter": (lambda: elementwise(there(3), there(3, dtype=np.float32)), TypeError, "mismatched"),
    "too few arguments": (lambda: elementwise(there(3)), TypeError, "Wrong number of arguments"),
    "an input written to": (lambda: elementwise(there(3), there(3), code="x = y"), RuntimeError, "read-only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_stand_in_refuses_what_cupy_refuses(name):
    f, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        f()
