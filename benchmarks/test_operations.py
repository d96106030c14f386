"""Each operation of minilora beside its textbook form, at size M: first the same result, then the times.

pytest-benchmark puts each pair in a group of its own. From the root of the repository, on an idle machine:

    .bench/bin/pip install -e '.[test]' pytest-benchmark
    .bench/bin/python -m pytest benchmarks/test_operations.py --benchmark-json new.json
    .bench/bin/python benchmarks/compare_ratios.py benchmarks/operations.json new.json

The second command with ``--benchmark-json benchmarks/operations.json`` is what records the figures anew.
"""

import pytest

pytest.importorskip("pytest_benchmark")

import sizes  # noqa: F401  sets the threads, before NumPy
import textbook
from shapes import SIZES, R

# isort: split
import numpy as np

import minilora
from minilora import ops
from minilora.backend import keep_heap
from minilora.engine import Operation, Saved
from minilora.fast import thin
from minilora.nn import Parameter

VOCABULARY, T, D, LAYERS, HEADS, BATCH = SIZES["M"]
N = BATCH * T
TOLERANCE = 1e-4  # of the largest entry; float32
keep_heap()  # as train() does; for both sides

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape, np.float32)
ids = rng.integers(0, VOCABULARY, N)
SAME_DRAWS = lambda: {"p": 0.1, "rng": np.random.default_rng(0)}
CASES = {  # operation: its arrays, and a function of its constants (dropout's generator must be new each time)
    "linear": ([normal(N, D), normal(4 * D, D), normal(4 * D)], dict),
    "embedding": ([normal(VOCABULARY, D)], lambda: {"ids": ids}),
    "layer_norm": ([normal(N, D), normal(D), normal(D)], dict),
    "gelu": ([normal(N, 4 * D)], dict),
    "attention": ([normal(N, D), normal(N, D), normal(N, D)], lambda: {"batch": BATCH, "heads": HEADS}),
    "cross_entropy": ([normal(N, VOCABULARY)], lambda: {"targets": ids}),
    "dropout": ([normal(N, D)], SAME_DRAWS),
}
SIDES = ["minilora", "textbook"]


def forward_of(name, side):
    """The forward of ``name`` as a function without arguments: (y, saved)."""
    arrays, constants = CASES[name]
    if side == "textbook":
        return lambda: getattr(textbook, f"{name}_forward")(*arrays, **constants())
    operation = getattr(ops, name)
    return lambda: operation.forward(operation.Need(*[True] * len(arrays)), *arrays, **constants())


def backward_of(name, side):
    """The backward of ``name`` as a function without arguments: the gradients of its arrays."""
    y, saved = forward_of(name, side)()
    dy = np.asarray(np.random.default_rng(1).standard_normal(np.shape(y)), np.float32)
    if side == "textbook":
        return lambda: getattr(textbook, f"{name}_backward")(dy, saved)
    operation, saved = getattr(ops, name), Saved(saved)
    need = operation.Need(*[True] * len(CASES[name][0]))
    return lambda: operation.backward(need, dy, saved)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert np.shape(a) == np.shape(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype == np.float32
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()


def test_every_operation_is_here():
    assert set(CASES) == {name for name, value in vars(ops).items() if isinstance(value, Operation)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_forward(benchmark, name, side):
    functions = {each: forward_of(name, each) for each in SIDES}
    assert_same([functions["minilora"]()[0]], [functions["textbook"]()[0]])
    benchmark.group = f"{name} forward"
    benchmark(functions[side])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_backward(benchmark, name, side):
    functions = {each: backward_of(name, each) for each in SIDES}
    assert_same(functions["minilora"](), functions["textbook"]())
    benchmark.group = f"{name} backward"
    benchmark(functions[side])


@pytest.mark.parametrize("side", SIDES)
def test_adamw(benchmark, side):
    """One step of all LoRA matrices of a model of size M; the gradient is written first, since ours clears it."""
    linears = [(D, D)] * 4 + [(4 * D, D), (D, 4 * D)]
    shapes = LAYERS * [shape for d_out, d_in in linears for shape in ((R, d_in), (d_out, R))]
    starts, grads = ([normal(*shape) for shape in shapes] for _ in range(2))
    flat = np.concatenate([g.ravel() for g in grads])
    ours = minilora.AdamW({str(i): Parameter(a.copy()) for i, a in enumerate(starts)}, lr=1e-2)
    theirs = textbook.AdamW(starts, lr=1e-2)

    def our_step():
        ours.grad[:] = flat
        ours.step()

    for _ in range(3):
        our_step()
        theirs.step(grads)
    before = np.concatenate([a.ravel() for a in starts])
    after = np.concatenate([a.ravel() for a in theirs.params])
    assert_same([ours.data - before], [after - before])
    benchmark.group = "AdamW step"
    benchmark(our_step if side == "minilora" else lambda: theirs.step(grads))


@pytest.mark.parametrize("side", SIDES)
def test_thin_product(benchmark, side):
    """h = x Aᵀ as a method file writes it: the host hands x over as Rows."""
    x, A = normal(N, 4 * D), normal(R, 4 * D)
    functions = {"minilora": lambda: thin.plain(thin.rows(x) @ A.T), "textbook": lambda: x @ A.T}
    assert_same([functions["minilora"]()], [functions["textbook"]()])
    benchmark.group = "thin product"
    benchmark(functions[side])
