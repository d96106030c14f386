"""The blocked forms for NumPy equal the plain forms of ops.py, whatever the blocks, and a broken line is seen."""

import itertools
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
from test_ops import CASES, QKV, fresh, normal

from minilora import ops
from minilora.engine import Saved, plain
from minilora.fast import blocked
from minilora.nn import Parameter
from minilora.training.optim import AdamW

pytestmark = pytest.mark.quick

REGISTERED = ["linear", "layer_norm", "gelu", "attention", "cross_entropy"]
LARGE = {  # more rows than a block has, rows longer than a block, none at all
    "layer_norm, many rows": ("layer_norm", {"x": (701, 100), "g": (100,), "b": (100,)}, {}),
    "layer_norm, long rows": ("layer_norm", {"x": (2, 70_000), "g": (70_000,), "b": (70_000,)}, {}),
    "layer_norm, no row": ("layer_norm", {"x": (0, 4), "g": (4,), "b": (4,)}, {}),
    "gelu, many rows": ("gelu", {"x": (701, 100)}, {}),
    "gelu, long rows": ("gelu", {"x": (2, 70_000)}, {}),
    "gelu, one axis": ("gelu", {"x": (70_001,)}, {}),
    "gelu, no row": ("gelu", {"x": (0, 4)}, {}),
    "cross_entropy, many rows": ("cross_entropy", {"logits": (701, 100)}, {"targets": np.arange(701) % 100}),
    "attention, many queries": ("attention", {"q": (400, 8), "k": (400, 8), "v": (400, 8)}, {"batch": 2, "heads": 2}),
    "attention, last 70 of 130": ("attention", {"q": (140, 8), "k": (260, 8), "v": (260, 8)}, {"batch": 2, "heads": 2}),
    "attention, many samples": ("attention", {"q": (900, 8), "k": (900, 8), "v": (900, 8)}, {"batch": 90, "heads": 4}),
}
SMALL = {
    name: (definition.__name__, {k: a.shape for k, a in arrays.items()}, constants)
    for name, (definition, arrays, constants) in CASES.items()
    if definition.__name__ in REGISTERED
}


def drawn(shapes, dtype):
    return {k: normal(*shape, seed=i).astype(dtype) for i, (k, shape) in enumerate(shapes.items())}


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.abs(actual - expected).max(initial=0.0) <= tolerance * np.abs(expected).max(initial=1e-300)


def both(name, module=blocked, dtype=np.float64, wanted=None):
    """((y, gradients) of the plain form, the same of the fast one of ``module``)."""
    kind, shapes, constants = {**SMALL, **LARGE}[name]
    operation, arrays = getattr(ops, kind), drawn(shapes, dtype)
    need = operation.Need(*(k in (arrays if wanted is None else wanted) for k in operation.Need._fields))
    given = [arrays.get(k) for k in operation.Need._fields]
    backward = getattr(module, f"{kind}_backward", operation.backward)  # where it has no fast one
    results = []
    for f, b in ((operation.forward, operation.backward), (getattr(module, f"{kind}_forward"), backward)):
        y, saved = f(need, *given, **fresh(constants))
        dy = np.asarray(normal(*y.shape, seed=9)).astype(dtype)
        grads = b(need, dy, Saved((k, v) for k, v in saved.items() if v is not None)) if any(need) else ()
        results.append((y, grads))
    return results


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_it_equals_the_plain_form(name, dtype, tolerance):
    (y, grads), (fast_y, fast_grads) = both(name, dtype=dtype)
    close(fast_y, y, tolerance)
    for fast, grad in zip(fast_grads, grads, strict=True):
        assert (fast is None) == (grad is None)
        if grad is not None:
            close(fast, grad, tolerance)


@pytest.mark.parametrize("name", [name for name in SMALL if "," not in name])
def test_whatever_is_needed(name):
    arrays = SMALL[name][1]
    for wanted in itertools.chain.from_iterable(itertools.combinations(arrays, n) for n in range(len(arrays))):
        (y, grads), (fast_y, fast_grads) = both(name, wanted=wanted)
        close(fast_y, y, 1e-12)
        assert [g is None for g in fast_grads] == [g is None for g in grads]


def test_every_registered_form_is_the_one_of_this_module():
    for name in REGISTERED:
        assert getattr(ops, name).forms["numpy"][0] is getattr(blocked, f"{name}_forward"), name
    assert AdamW.forms["numpy"] is blocked.adamw


@pytest.mark.parametrize("together", [1, 2, 3, 7])
def test_attention_takes_every_sample_once_however_many_go_together(monkeypatch, together):
    monkeypatch.setattr(blocked, "BLOCK", together * 2 * 5 * 5)
    assert len(blocked.causal_tiles(7, 5, 5, 2)) == math.ceil(7 / together)
    arrays, need = QKV(35, 35, 6), ops.attention.Need(True, True, True)
    (y, saved), (fast_y, fast_saved) = (
        f(need, *arrays.values(), batch=7, heads=2) for f in (ops.attention_forward, blocked.attention_forward)
    )
    dy = normal(35, 6, seed=9)
    close(fast_y, y, 1e-12)
    fast_grads = blocked.attention_backward(need, dy, Saved(fast_saved))
    for fast, grad in zip(fast_grads, ops.attention_backward(need, dy, Saved(saved)), strict=True):
        close(fast, grad, 1e-12)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 16.0)])
def test_adamw_equals_its_three_equations(scales):
    def run():
        sizes = ((300, 200), (70_001,))
        params = {
            str(i): Parameter(normal(*s, seed=i), lr_scale=k)
            for i, (s, k) in enumerate(zip(sizes, scales, strict=True))
        }
        optimizer = AdamW(params, lr=0.01, weight_decay=0.1, clip=1.0)
        for step in range(3):
            optimizer.grad[:] = normal(optimizer.grad.size, seed=10 + step)
            optimizer.step()
        return optimizer

    with plain():
        expected = run()
    actual = run()
    for name in ("data", "m", "v"):
        close(getattr(actual, name), getattr(expected, name), 1e-12)


@pytest.mark.parametrize("shape", [(3,), (5, 7), (64, 64), (513, 128), (0, 4), (2, 3, 4)])
def test_an_empty_array_is_contiguous_and_begins_at_a_cache_line_where_it_is_large(shape):
    for dtype in (np.float32, np.float64):
        a = blocked.empty(shape, np.zeros(1, dtype))
        assert a.shape == shape and a.dtype == dtype and a.flags.c_contiguous and a.flags.writeable
        assert a.nbytes < 4096 or a.ctypes.data % 64 == 0


# -------------------------------------------------------------------------------- each line broken on purpose

SOURCE = Path(blocked.__file__).read_text().split("\n")
TAGGED = re.compile(r"  # .*\b([FB]\d+)\b")
TARGET = re.compile(
    r"^(\s+)(?:.*\bout=([\w\[\]:., ]+)\)  #|add_product\(.*, (\w+\[.*\]), first\)|([\w\[\]:\-]+) [-+*/]?= )"
)
LINES = [n for n, line in enumerate(SOURCE) if TAGGED.search(line)]


def mutant(number):
    """The module with what line ``number`` computes, or returns, multiplied by 1.1."""
    line = SOURCE[number]
    if line.strip().startswith("return ("):
        new = [line.replace("return (", "return (1.1 * ", 1)]
    else:
        indent, *targets = TARGET.match(line).groups()
        (target,) = filter(None, targets)
        new = [line, f"{indent}if {target} is not None:", f"{indent}    {target} *= 1.1"]
    module = types.ModuleType("minilora.fast.mutant")
    module.__package__ = "minilora.fast"
    source = [*SOURCE[:number], *new, *SOURCE[number + 1 :]]
    code = "\n".join(source[: next(i for i, s in enumerate(source) if s.startswith("ops.linear.forms"))])
    exec(compile(code, "<mutant of blocked.py>", "exec"), vars(module))
    return module


def differs(module, name):
    (y, grads), (fast_y, fast_grads) = both(name, module)
    pairs = [(y, fast_y), *((g, f) for g, f in zip(grads, fast_grads, strict=True) if g is not None)]
    return any(np.abs(a - b).max() > 1e-9 * np.abs(a).max() for a, b in pairs)


@pytest.mark.parametrize("number", LINES, ids=lambda n: f"line {n + 1} {TAGGED.search(SOURCE[n])[1]}")
def test_a_broken_line_is_seen(number):
    function = next(line for line in reversed(SOURCE[:number]) if line.startswith("def "))
    kind = re.match(r"def (\w+)_(?:forward|backward)", function)[1]
    module = mutant(number)
    assert any(differs(module, name) for name in SMALL if SMALL[name][0] == kind), SOURCE[number]
