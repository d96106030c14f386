"""Every operation, forward, what is kept and backward, by NumPy and by CuPy; each fused kernel by its plain pair."""

import numpy as np
import pytest
from twice import DTYPES, TOLERANCE, arrays_of, assert_all_close, assert_close, draw, kept, move

from minilora import elementary, ops
from minilora.backend import to_host
from minilora.engine import Tensor, backward
from minilora.fast import fused as kernels

pytestmark = [pytest.mark.gpu, pytest.mark.host("both devices in one test")]

IDS = np.random.default_rng(1).integers(0, 50, 96)
TARGETS = np.where(np.arange(96) % 7 == 0, ops.IGNORE_INDEX, IDS)
QKV = {"q": (160, 64), "k": (160, 64), "v": (160, 64)}  # 2 samples of 80 tokens: more than one block of queries
ONE = {"q": (2, 64), "k": (160, 64), "v": (160, 64)}
ROWS, MATRIX = {"x": (96, 64)}, {"x": (96, 64), "W": (48, 64)}
NORM = {"x": (96, 64), "g": (64,), "b": (64,)}

CASES = {  # operation, shapes by name, constants
    "linear": (ops.linear, MATRIX | {"b": (48,)}, {}),
    "linear without bias": (ops.linear, MATRIX, {}),
    "embedding": (ops.embedding, {"table": (50, 64)}, {"ids": IDS}),
    "layer_norm": (ops.layer_norm, NORM, {}),
    "layer_norm, recompute": (ops.layer_norm, NORM, {"recompute": True}),
    "layer_norm, wide": (ops.layer_norm, {"x": (5, 1500), "g": (1500,), "b": (1500,)}, {}),
    "gelu": (ops.gelu, ROWS, {}),
    "gelu, recompute": (ops.gelu, ROWS, {"recompute": True}),
    "attention": (ops.attention, QKV, {"batch": 2, "heads": 4}),
    "attention, recompute": (ops.attention, QKV, {"batch": 2, "heads": 4, "recompute": True}),
    "attention, one query": (ops.attention, ONE, {"batch": 2, "heads": 4}),
    "cross_entropy": (ops.cross_entropy, {"logits": (96, 50)}, {"targets": TARGETS}),
    "dropout": (ops.dropout, ROWS, {"p": 0.3}),
    "add": (elementary.add, {"a": (6, 5, 4), "b": (5, 1)}, {}),
    "mul": (elementary.mul, {"a": (6, 5, 4), "b": (4,)}, {}),
    "power": (elementary.power, ROWS, {"exponent": 3}),
    "matmul": (elementary.matmul, {"a": (3, 5, 16), "b": (16, 4)}, {}),
    "sum": (elementary.sum_, ROWS, {}),
    "sum, axis": (elementary.sum_, {"x": (6, 5, 4)}, {"axis": (0, 2)}),
    "exp": (elementary.exp, ROWS, {}),
    "log": (elementary.log, ROWS, {}),
    "tanh": (elementary.tanh, ROWS, {}),
    "reshape": (elementary.reshape, ROWS, {"shape": (64, 96)}),
    "transpose": (elementary.transpose, {"x": (6, 5, 4)}, {"axes": (2, 0, 1)}),
    "getitem": (elementary.getitem, ROWS, {"index": (slice(None), IDS[:20])}),
}
FUSED = [name for name in CASES if CASES[name][0].name in kernels.FUSED]

each_case = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def prepared(name, dtype):
    """(operation, host arrays, constants, dy for a result y)."""
    operation, shapes, constants = CASES[name]
    arrays = draw(shapes, dtype)
    if name == "log":
        arrays = {"x": np.abs(arrays["x"]) + dtype(0.1)}
    return operation, arrays, constants, lambda y: draw({"dy": y.shape}, dtype, seed=2)["dy"]


def on(xp, constants):
    """The constants of a call on ``xp``; ids and targets stay on the host, as in training."""
    own = {"index": move(constants["index"], xp)} if "index" in constants else {}
    own |= {"rng": np.random.default_rng(3)} if "p" in constants else {}
    return constants | own


def by_hand(pair, operation, arrays, constants, dy_like, wanted=None):
    """(y, saved, gradients by name) of a forward and a backward on plain arrays; ``wanted``: all of them by default."""
    wanted = arrays if wanted is None else wanted
    need = operation.Need(*(name in wanted for name in operation.Need._fields))
    y, saved = pair[0](need, *(arrays.get(name) for name in need._fields), **constants)
    if not wanted:
        return y, saved, {}
    grads = pair[1](need, dy_like(y), kept(saved))
    return y, saved, {name: grad for name, grad in zip(need._fields, grads, strict=True) if name in wanted}


@each_case
@each_dtype
def test_the_plain_pair(cupy, name, dtype):
    operation, arrays, constants, dy = prepared(name, dtype)
    pair = operation.forward, operation.backward
    here = by_hand(pair, operation, arrays, on(np, constants), dy)
    there = by_hand(pair, operation, move(arrays, cupy), on(cupy, constants), lambda y: move(dy(y), cupy))
    assert_close(there[0], np.asarray(here[0]), TOLERANCE[dtype], "y")
    assert_all_close(arrays_of(there[1]), arrays_of(here[1]), TOLERANCE[dtype], "kept")
    assert_all_close(there[2], here[2], TOLERANCE[dtype], "gradient of")


@each_case
@each_dtype
def test_as_a_model_calls_it(cupy, name, dtype):
    operation, arrays, constants, dy = prepared(name, dtype)
    seen = []
    for xp in (np, cupy):
        leaves = {k: Tensor(move(a, xp), requires_grad=True) for k, a in arrays.items()}
        y = operation(*(leaves.get(k) for k in operation.Need._fields), **on(xp, constants))
        backward(y, move(dy(y), xp))
        seen.append((y.data, {k: leaf.grad for k, leaf in leaves.items()}))
    (y, grads), (y_there, grads_there) = seen
    assert_close(y_there, np.asarray(y), TOLERANCE[dtype], "y")
    assert_all_close(grads_there, grads, TOLERANCE[dtype], "gradient of")


@pytest.mark.parametrize("name", FUSED)
@each_dtype
@pytest.mark.parametrize("which", ["all", "first", "none"])
def test_a_fused_kernel_by_its_plain_pair_on_the_gpu(cupy, name, dtype, which):
    operation, arrays, constants, dy = prepared(name, dtype)
    wanted = {"all": list(arrays), "first": list(arrays)[:1], "none": []}[which]
    arrays, constants = move(arrays, cupy), on(cupy, constants)
    fused, plain = (
        by_hand(pair, operation, arrays, constants, lambda y: move(dy(y), cupy), wanted)
        for pair in (kernels.FUSED[operation.name], (operation.forward, operation.backward))
    )
    assert_close(fused[0], to_host(plain[0]), TOLERANCE[dtype], "y")
    assert_all_close(fused[2], {k: to_host(g) for k, g in plain[2].items()}, TOLERANCE[dtype], "gradient of")


def test_every_operation_is_here():
    mine = {CASES[name][0] for name in CASES}
    for place in (ops, elementary):
        for value in vars(place).values():
            assert not isinstance(value, type(ops.linear)) or value in mine, value.name
    assert kernels.FUSED.keys() <= {operation.name for operation in mine}
