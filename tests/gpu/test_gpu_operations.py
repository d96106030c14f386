"""Every operation, forward and backward, by NumPy's plain form and by CuPy's plain and fused ones."""

from contextlib import nullcontext

import numpy as np
import pytest
from twice import TOLERANCE, assert_close, each_dtype, move

from minilora import elementary, ops, plain
from minilora.engine import Operation, Tensor, backward

pytestmark = pytest.mark.gpu

IDS = np.random.default_rng(1).integers(0, 50, 96)
TARGETS = np.where(np.arange(96) % 7 == 0, ops.IGNORE_INDEX, IDS)
QKV = {"q": (160, 64), "k": (160, 64), "v": (160, 64)}  # 2 samples of 80 tokens
ROWS, MATRIX, CUBE = {"x": (96, 64)}, {"x": (96, 64), "W": (48, 64)}, {"x": (6, 5, 4)}

CASES = {  # operation, shapes by name, constants
    "linear": (ops.linear, MATRIX | {"b": (48,)}, {}),
    "linear without bias": (ops.linear, MATRIX, {}),
    "embedding": (ops.embedding, {"table": (50, 64)}, {"ids": IDS}),
    "layer_norm": (ops.layer_norm, {"x": (96, 64), "g": (64,), "b": (64,)}, {}),
    "layer_norm, wide": (ops.layer_norm, {"x": (5, 1500), "g": (1500,), "b": (1500,)}, {}),
    "gelu": (ops.gelu, ROWS, {}),
    "attention": (ops.attention, QKV, {"batch": 2, "heads": 4}),
    "attention, one query": (ops.attention, QKV | {"q": (2, 64)}, {"batch": 2, "heads": 4}),
    "cross_entropy": (ops.cross_entropy, {"logits": (96, 50)}, {"targets": TARGETS}),
    "dropout": (ops.dropout, ROWS, {"p": 0.3}),
    "add": (elementary.add, {"a": (6, 5, 4), "b": (5, 1)}, {}),
    "mul": (elementary.mul, {"a": (6, 5, 4), "b": (4,)}, {}),
    "power": (elementary.power, ROWS, {"exponent": 3}),
    "matmul": (elementary.matmul, {"a": (3, 5, 16), "b": (16, 4)}, {}),
    "sum": (elementary.sum_, ROWS, {}),
    "sum, axis": (elementary.sum_, CUBE, {"axis": (0, 2)}),
    "exp": (elementary.exp, ROWS, {}),
    "log": (elementary.log, ROWS, {}),
    "tanh": (elementary.tanh, ROWS, {}),
    "reshape": (elementary.reshape, ROWS, {"shape": (64, 96)}),
    "transpose": (elementary.transpose, CUBE, {"axes": (2, 0, 1)}),
    "getitem": (elementary.getitem, ROWS, {"index": (slice(None), IDS[:20])}),
}


def run(name, dtype, xp, wanted):
    """{name: array}: the result, and the gradient of each of the arrays ``wanted``."""
    operation, shapes, constants = CASES[name]
    rng = np.random.default_rng(0)
    arrays = {k: rng.standard_normal(shape).astype(dtype) for k, shape in shapes.items()}
    if name == "log":
        arrays = {"x": np.abs(arrays["x"]) + dtype(0.1)}
    if "index" in constants:
        constants = {"index": move(constants["index"], xp)}  # ids and targets stay on the host, as in training
    if "p" in constants:
        constants = constants | {"rng": np.random.default_rng(3)}
    leaves = {k: Tensor(move(a, xp), requires_grad=k in wanted) for k, a in arrays.items()}
    y = operation(*(leaves.get(k) for k in operation.Need._fields), **constants)
    backward(y, move(np.asarray(rng.standard_normal(y.shape), dtype), xp))
    return {"y": y.data} | {f"d{k}": leaves[k].grad for k in wanted}


@pytest.mark.parametrize("name", CASES)
@each_dtype
@pytest.mark.parametrize("form", [plain, nullcontext], ids=["plain", "fast"])
def test_an_operation(cupy, name, dtype, form):
    shapes = CASES[name][1]
    for wanted in (list(shapes), list(shapes)[:1]):
        with plain():
            here = run(name, dtype, np, wanted)
        with form():
            there = run(name, dtype, cupy, wanted)
        for key, array in here.items():
            assert_close(there[key], np.asarray(array), TOLERANCE[dtype], key)


def test_every_operation_is_here():
    operations = [v for v in (vars(ops) | vars(elementary)).values() if isinstance(v, Operation)]
    assert {o.name for o in operations} == {operation.name for operation, *_ in CASES.values()}
