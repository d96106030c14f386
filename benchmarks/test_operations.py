"""Each faster form of minilora/fast next to its plain form in minilora/ops.py, at size M: same result, then the times.

pytest-benchmark puts each pair in a group of its own. Recorded by ``make -C benchmarks operations``, and compared with
the record by ``make -C benchmarks compare``, on an idle machine.
"""

import pytest

pytest.importorskip("pytest_benchmark")

import sizes  # noqa: F401  sets the threads, before NumPy
from shapes import SIZES, R

# isort: split
import numpy as np

import minilora
from minilora import ops
from minilora.engine import Operation, Saved
from minilora.fast.heap import keep_heap
from minilora.fast.products import product
from minilora.nn import Parameter

VOCABULARY, T, D, LAYERS, HEADS, BATCH = SIZES["M"]
N = BATCH * T
TOLERANCE = 1e-4  # of the largest entry; float32
keep_heap()  # as train() does
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


ARRAYS = {
    "linear": [normal(N, D), normal(4 * D, D), normal(4 * D)],
    "layer_norm": [normal(N, D), normal(D), normal(D)],
    "gelu": [normal(N, 4 * D)],
    "attention": [normal(N, D), normal(N, D), normal(N, D)],
    "cross_entropy": [normal(N, VOCABULARY)],
}
CONSTANTS = {
    "attention": {"batch": BATCH, "heads": HEADS},
    "cross_entropy": {"targets": rng.integers(0, VOCABULARY, N)},
}
SIDES = ["fast", "plain"]
HALVES = [(name, half) for name in ARRAYS for half in ("forward", "backward")]
HALVES.remove(("linear", "backward"))  # it has one form only


def functions(name, side):
    """Forward and backward of an operation on plain arrays, as functions without arguments."""
    operation = getattr(ops, name)
    forward, backward = operation.forms["numpy"] if side == "fast" else (operation.forward, operation.backward)
    need = operation.Need(*[True] * len(ARRAYS[name]))

    def go():
        return forward(need, *ARRAYS[name], **CONSTANTS.get(name, {}))

    y, saved = go()
    dy = np.asarray(np.random.default_rng(1).standard_normal(np.shape(y)), np.float32)
    return lambda: go()[:1], lambda: backward(need, dy, Saved(saved))


def assert_same(fast, plain):
    for a, b in zip(fast, plain, strict=True):
        assert np.shape(a) == np.shape(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype == np.float32
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()


def test_every_operation_with_a_faster_form_is_here():
    operations = {name: value for name, value in vars(ops).items() if isinstance(value, Operation)}
    assert set(ARRAYS) == {name for name, operation in operations.items() if "numpy" in operation.forms}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "half"), HALVES)
def test_operation(benchmark, name, half, side):
    pair = {each: functions(name, each)[half == "backward"] for each in SIDES}
    assert_same(pair["fast"](), pair["plain"]())
    benchmark.group = f"{name} {half}"
    benchmark(pair[side])


@pytest.mark.parametrize("side", SIDES)
def test_adamw(benchmark, side):
    """One step of all LoRA matrices of a model of size M."""
    linears = [(D, D)] * 4 + [(4 * D, D), (D, 4 * D)]
    shapes = LAYERS * [shape for d_out, d_in in linears for shape in ((R, d_in), (d_out, R))]
    starts, moved, steps = [normal(*shape) for shape in shapes], {}, {}
    gradient = normal(sum(a.size for a in starts))
    for each in SIDES:
        optimizer = minilora.AdamW({str(i): Parameter(a.copy()) for i, a in enumerate(starts)}, lr=1e-2)
        optimizer.grad[:] = gradient
        steps[each] = optimizer.step if each == "fast" else minilora.plain()(optimizer.step)
        for _ in range(3):
            steps[each]()
        moved[each] = optimizer.data - np.concatenate([a.ravel() for a in starts])
    assert_same([moved["fast"]], [moved["plain"]])
    benchmark.group = "AdamW step"
    benchmark(steps[side])


@pytest.mark.parametrize("side", SIDES)
def test_thin_product(benchmark, side):
    """h = x Aᵀ of LoRA."""
    x, A = normal(N, 4 * D), normal(R, 4 * D)
    functions = {"fast": lambda: product(x, A.T), "plain": lambda: x @ A.T}
    assert_same([functions["fast"]()], [functions["plain"]()])
    benchmark.group = "thin product"
    benchmark(functions[side])
