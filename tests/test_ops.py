"""Each layer-sized operation equals its composition from elementary operations, forward and in every gradient.
The compositions here are the executable definition of ops.py; the rest is what a composition cannot show. Every test
runs on the plain form and on the one that is used by default.
"""

import contextlib
import inspect
import itertools
import math
import re

import numpy as np
import pytest

from minilora import ops
from minilora.engine import Operation, Saved, Tensor, backward, form, plain
from minilora.errors import InputError
from minilora.tools import gradcheck

pytestmark = pytest.mark.quick


@pytest.fixture(params=["plain", "default"], autouse=True)
def which_form(request):
    with plain() if request.param == "plain" else contextlib.nullcontext():
        yield


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def close(actual, expected, tolerance=1e-12):
    """Relative to the largest entry: a sum in another order is off by the rounding of its largest term."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


# -------------------------------------------------------------------------------- the definitions


def linear(x, W, b=None):
    return x @ W.T if b is None else x @ W.T + b


def add(x, y):
    return x + y


def embedding(table, *, ids):
    return table[ids]


def layer_norm(x, g, b, *, eps=1e-5):
    d = x.shape[1]
    centred = x - x.sum(axis=1, keepdims=True) / d
    variance = (centred**2).sum(axis=1, keepdims=True) / d
    return g * centred * (variance + eps) ** -0.5 + b


def gelu(x):
    return 0.5 * x * (1.0 + (math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)).tanh())


def softmax(s):
    e = (s - Tensor(s.data.max(axis=-1, keepdims=True))).exp()  # a shift of the whole row changes nothing
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v, *, batch, heads):
    d, e = q.shape[1], q.shape[1] // heads
    split = lambda a: a.reshape(batch, -1, heads, e).transpose(0, 2, 1, 3)  # (batch, heads, T, e)
    q, k, v = split(q), split(k), split(v)
    Tq, T = q.shape[2], k.shape[2]
    sees = np.arange(T) <= np.arange(T - Tq, T)[:, None]  # query i is at position T − Tq + i
    S = q @ k.transpose(0, 1, 3, 2) / math.sqrt(e) + Tensor(np.where(sees, 0.0, -np.inf))
    return (softmax(S) @ v).transpose(0, 2, 1, 3).reshape(-1, d)


def cross_entropy(logits, *, targets, ignore_index=-100):
    rows = np.flatnonzero(targets != ignore_index)
    return -softmax(logits).log()[rows, targets[rows]].sum() / len(rows)


def dropout(x, *, p, rng):
    return x * Tensor((rng.random(x.shape) >= p) / (1.0 - p))


IDS, TARGETS = np.array([3, 0, 3, 5, 1, 3]), np.array([4, -100, 0, 2, -100, 1])
SEED = {"p": 0.4, "rng": lambda: np.random.default_rng(7)}  # a Generator moves on: each use makes its own
QKV = lambda Tq, T, d: {"q": normal(Tq, d), "k": normal(T, d, seed=1), "v": normal(T, d, seed=2)}
CASES = {
    "linear": (linear, {"x": normal(5, 4), "W": normal(3, 4), "b": normal(3)}, {}),
    "linear, one row": (linear, {"x": normal(1, 4), "W": normal(3, 4), "b": normal(3)}, {}),
    "linear without bias": (linear, {"x": normal(5, 4), "W": normal(3, 4)}, {}),
    "add": (add, {"x": normal(5, 4), "y": normal(5, 4, seed=1)}, {}),
    "embedding": (embedding, {"table": normal(6, 3)}, {"ids": IDS}),
    "layer_norm": (layer_norm, {"x": normal(4, 6) + 3.0, "g": normal(6), "b": normal(6, seed=1)}, {}),
    "layer_norm, eps": (layer_norm, {"x": normal(4, 6), "g": normal(6), "b": normal(6, seed=1)}, {"eps": 0.5}),
    "gelu": (gelu, {"x": 2.0 * normal(5, 6)}, {}),
    "attention 1x1": (attention, QKV(4, 4, 6), {"batch": 1, "heads": 1}),
    "attention 2x3": (attention, QKV(10, 10, 6), {"batch": 2, "heads": 3}),
    "attention 3x2": (attention, QKV(12, 12, 8), {"batch": 3, "heads": 2}),
    "attention, one token": (attention, QKV(2, 2, 6), {"batch": 2, "heads": 2}),
    "attention, last 2 of 5": (attention, QKV(4, 10, 6), {"batch": 2, "heads": 2}),
    "attention, more than a block": (attention, QKV(200, 200, 2), {"batch": 2, "heads": 2}),
    "attention, last 1 of 5": (attention, QKV(2, 10, 6), {"batch": 2, "heads": 6}),
    "cross_entropy": (cross_entropy, {"logits": normal(6, 5)}, {"targets": np.abs(TARGETS) % 5}),
    "cross_entropy, ignored": (cross_entropy, {"logits": normal(6, 5)}, {"targets": TARGETS}),
    "cross_entropy, index": (cross_entropy, {"logits": normal(6, 5)}, {"targets": IDS % 5, "ignore_index": 3}),
    "dropout": (dropout, {"x": normal(5, 4)}, SEED),
    "dropout, p = 0": (dropout, {"x": normal(5, 4)}, {**SEED, "p": 0.0}),
}
each_case = pytest.mark.parametrize("name", CASES)


def case(name, dtype=np.float64):
    """(operation, its definition, arrays, constants)."""
    definition, arrays, constants = CASES[name]
    arrays = {k: a.astype(dtype) for k, a in arrays.items()}
    return getattr(ops, definition.__name__), definition, arrays, constants


def fresh(constants):
    return {k: c() if k == "rng" else c for k, c in constants.items()}


def run(f, arrays, constants, dy):
    """(result, gradients by name) of ``f`` of Tensors."""
    tensors = {k: Tensor(a, requires_grad=True) for k, a in arrays.items()}
    given = [tensors.get(k) for k in f.Need._fields] if isinstance(f, Operation) else tensors.values()
    y = f(*given, **fresh(constants))
    backward(y, dy)
    return y.data, {k: t.grad for k, t in tensors.items()}


def pair(operation, arrays, constants, need=None):
    """(need, y, saved, backward) of the form in use, on plain arrays; everything given is needed by default."""
    names = operation.Need._fields
    need = operation.Need(*(k in arrays if need is None else k in need for k in names))
    first = next(iter(arrays.values()))
    forward, backward = form(operation.forms, first, (operation.forward, operation.backward))
    y, saved = forward(need, *(arrays.get(k) for k in names), **fresh(constants))
    return need, y, Saved((k, v) for k, v in saved.items() if v is not None), backward


# -------------------------------------------------------------------------------- equal to its definition


def test_every_operation_is_defined_here():
    operations = {name for name, v in vars(ops).items() if isinstance(v, Operation)}
    assert operations == {definition.__name__ for definition, _, _ in CASES.values()}


@each_case
def test_it_equals_its_composition(name):
    operation, definition, arrays, constants = case(name)
    shape = pair(operation, arrays, constants)[1].shape
    dy = np.asarray(normal(*shape, seed=9))
    y, grads = run(operation, arrays, constants, dy)
    expected, expected_grads = run(definition, arrays, constants, dy)
    close(y, expected)
    for k in arrays:
        close(grads[k], expected_grads[k])


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("attention")])
def test_attention_by_naive_loops(name):
    _, _, arrays, constants = case(name)
    batch, heads = constants["batch"], constants["heads"]
    q, k, v = (a.reshape(batch, -1, heads, a.shape[1] // heads) for a in arrays.values())
    expected = np.zeros_like(q)
    Tq, T = q.shape[1], k.shape[1]
    for b, h, i in itertools.product(range(batch), range(heads), range(Tq)):
        visible = range(T - Tq + i + 1)
        weights = [math.exp(q[b, i, h] @ k[b, j, h] / math.sqrt(q.shape[-1])) for j in visible]
        expected[b, i, h] = sum(w / sum(weights) * v[b, j, h] for w, j in zip(weights, visible, strict=True))
    y = ops.attention(*map(Tensor, arrays.values()), **constants)
    close(y.data, expected.reshape(y.shape))


@pytest.mark.parametrize("seed", range(3))
def test_finite_differences_agree(seed):
    reports = gradcheck.check_operations(seed)
    assert {r.title.split()[0].strip(",") for r in reports} == {d.__name__ for d, _, _ in CASES.values()}
    for report in reports:
        assert report, report


# -------------------------------------------------------------------------------- the contract of a pair


@each_case
def test_float32_in_is_float32_out(name):
    operation, _, arrays, constants = case(name, np.float32)
    dy = np.asarray(normal(*pair(operation, arrays, constants)[1].shape, seed=9))
    y, grads = run(operation, arrays, constants, dy.astype(np.float32))
    assert y.dtype == np.float32
    expected, expected_grads = run(operation, {k: a.astype(np.float64) for k, a in arrays.items()}, constants, dy)
    close(y, expected, 1e-5)
    for k, grad in grads.items():
        assert grad.dtype == np.float32
        close(grad, expected_grads[k], 1e-5)


@each_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_kept_has_the_dtype_of_the_input(name, dtype):
    operation, _, arrays, constants = case(name, dtype)
    kept = [v for v in pair(operation, arrays, constants)[2].values() if isinstance(v, np.ndarray)]
    assert {a.dtype for a in kept if a.dtype.kind == "f"} <= {np.dtype(dtype)}


@each_case
def test_backward_twice_gives_the_same_and_changes_nothing(name):
    operation, _, arrays, constants = case(name)
    originals = {k: a.copy() for k, a in arrays.items()}
    need, y, saved, backward = pair(operation, arrays, constants)
    dy = np.asarray(normal(*y.shape, seed=9))
    kept = {k: np.copy(v) for k, v in saved.items()}
    kept_dy, kept_y = dy.copy(), y.copy()
    first, second = (backward(need, dy, saved) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)
    np.testing.assert_array_equal(dy, kept_dy)
    np.testing.assert_array_equal(y, kept_y)
    assert all(np.array_equal(saved[k], v) for k, v in kept.items())
    assert all(np.array_equal(arrays[k], a) for k, a in originals.items())


@each_case
def test_only_what_is_needed_is_computed_and_kept(name):
    """For each choice of inputs: the same gradients, None for the others, and no kept array that goes unused."""
    operation, _, arrays, constants = case(name)
    everything, y, saved, backward = pair(operation, arrays, constants)
    dy = np.asarray(normal(*y.shape, seed=9))
    full = dict(zip(everything._fields, backward(everything, dy, saved), strict=True))
    for count in range(1, len(arrays) + 1):
        for wanted in itertools.combinations(arrays, count):
            need, _, saved, backward = pair(operation, arrays, constants, wanted)
            for k, grad in zip(need._fields, backward(need, dy, saved), strict=True):
                assert (grad is not None) == (k in wanted), f"gradient of {k} where {wanted} are needed"
                assert grad is None or np.array_equal(grad, full[k])
            for key in [k for k, v in saved.items() if isinstance(v, np.ndarray)]:
                with pytest.raises((AttributeError, TypeError)):
                    backward(need, dy, Saved({k: v for k, v in saved.items() if k != key}))
                    pytest.fail(f"{key} is kept but not used where {wanted} are needed")


def test_a_frozen_weight_keeps_no_input():
    x, W = Tensor(normal(5, 4), requires_grad=True), Tensor(normal(3, 4))
    assert set(ops.linear(x, W, None).node.saved) == {"W"}
    x, W = Tensor(normal(5, 4)), Tensor(normal(3, 4), requires_grad=True)
    assert set(ops.linear(x, W, None).node.saved) == {"x"}
    assert not pair(ops.gelu, {"x": normal(2, 2)}, {}, need=())[2]


def equation_tags(function):
    """(tags that the docstring defines, tags at line ends of the code): ``F1  y = …`` and ``# F1``."""
    source, doc = inspect.getsource(function), function.__doc__
    code = source.replace(source[source.index('"""') : source.rindex('"""') + 3], "")
    return re.findall(r"^\s*([FB]\d+)\s", doc, re.MULTILINE), re.findall(r"#.*?\b([FB]\d+)\b", code)


@pytest.mark.parametrize("name", sorted({d.__name__ for d, _, _ in CASES.values()}))
def test_every_equation_is_marked_on_the_line_that_computes_it(name):
    operation = getattr(ops, name)
    (stated, at_ends), (stated_too, at_ends_too) = map(equation_tags, (operation.forward, operation.backward))
    defined, marked = stated + stated_too, at_ends + at_ends_too
    assert sorted(defined) == sorted(marked)
    assert len(set(defined)) == len(defined)
    assert {"F1", "B1"} <= set(defined)


# -------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_logits_give_a_finite_loss_and_gradient(dtype):
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]], dtype)
    x = Tensor(logits, requires_grad=True)
    loss = ops.cross_entropy(x, targets=np.array([1, 1, 2]))
    backward(loss)
    np.testing.assert_allclose(loss.data, (2e4 + math.log(2) + math.log(3)) / 3, rtol=1e-6)
    third = 1 / 3
    expected = np.array([[1.0, -1.0, 0.0], [0.0, -0.5, 0.5], [third, third, third - 1.0]]) / 3
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_scores_give_finite_attention(dtype):
    arrays = {k: (1e4 * a).astype(dtype) for k, a in QKV(6, 6, 4).items()}
    y, grads = run(ops.attention, arrays, {"batch": 2, "heads": 2}, np.ones((6, 4), dtype))
    assert all(np.isfinite(a).all() for a in (y, *grads.values()))
    np.testing.assert_array_equal(y[[0, 3]], arrays["v"][[0, 3]])  # the first token sees itself alone


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_of_extreme_inputs(dtype):
    x = Tensor(np.array([-1e4, -30.0, 0.0, 30.0, 1e4], dtype), requires_grad=True)
    y = ops.gelu(x)
    backward(y.sum())
    np.testing.assert_array_equal(y.data, [0.0, 0.0, 0.0, 30.0, 1e4])
    np.testing.assert_array_equal(x.grad, [0.0, 0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layer_norm_of_a_constant_row_is_its_shift(dtype):
    x = np.full((2, 4), 3.0, dtype)
    y, grads = run(ops.layer_norm, {"x": x, "g": np.ones(4, dtype), "b": np.arange(4, dtype=dtype)}, {}, x)
    np.testing.assert_array_equal(y, [[0, 1, 2, 3]] * 2)
    assert np.isfinite(grads["x"]).all()


@pytest.mark.parametrize("ignored", [[-np.inf, 1.0, np.inf], [np.nan] * 3])
def test_an_ignored_row_may_hold_anything(ignored):
    logits, targets = np.array([[0.5, 1.0, 2.0], ignored, [-np.inf, 0.0, 1.0]]), np.array([1, -100, 2])
    counted, targets_of = logits[[0, 2]], targets[[0, 2]]
    (loss, grads), (expected, wanted) = (
        run(ops.cross_entropy, {"logits": x}, {"targets": t}, np.ones(()))
        for x, t in ((logits, targets), (counted, targets_of))
    )
    assert loss == expected
    np.testing.assert_array_equal(grads["logits"], [wanted["logits"][0], [0.0, 0.0, 0.0], wanted["logits"][1]])


def test_dropout_keeps_the_mean_and_drops_the_share_it_says():
    x, p = Tensor(np.ones((200, 200))), 0.3
    y = ops.dropout(x, p=p, rng=np.random.default_rng(0)).data
    assert set(np.unique(y)) == {0.0, 1.0 / (1.0 - p)}
    four_deviations = 4 * math.sqrt(p * (1 - p) / x.data.size)
    assert abs((y == 0).mean() - p) < four_deviations


@pytest.mark.parametrize("shape", [(701, 100), (40_000, 1), (2, 40_000), (33_000,), (0, 4)])
def test_gelu_takes_every_row_once_whatever_the_number_of_blocks(shape):
    x, dy = normal(*shape), normal(*shape, seed=1)
    y, grads = run(ops.gelu, {"x": x}, {}, dy)
    expected, expected_grads = run(gelu, {"x": x}, {}, dy)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grads["x"], expected_grads["x"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(701, 100), (2, 40_000), (0, 4)])
def test_layer_norm_takes_every_row_once_whatever_the_number_of_blocks(shape):
    arrays = {"x": normal(*shape), "g": normal(shape[1]), "b": normal(shape[1], seed=1)}
    dy = normal(*shape, seed=2)
    y, grads = run(ops.layer_norm, arrays, {}, dy)
    expected, expected_grads = run(layer_norm, arrays, {}, dy)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    for k in arrays:
        np.testing.assert_allclose(grads[k], expected_grads[k], rtol=1e-9, atol=1e-10)


# -------------------------------------------------------------------------------- what is refused


def tensors(*shapes):
    return [Tensor(np.ones(shape)) for shape in shapes]


def attend(q, k, v, batch=1, heads=1):
    return lambda: ops.attention(*tensors(q, k, v), batch=batch, heads=heads)


def look_up(ids):
    return lambda: ops.embedding(*tensors((5, 2)), ids=np.array(ids))


def score(targets, shape=(2, 5)):
    return lambda: ops.cross_entropy(*tensors(shape), targets=np.array(targets))


def drop(p):
    return lambda: ops.dropout(*tensors((2, 2)), p=p, rng=np.random.default_rng(0))


MISTAKES = {
    "linear: width": (lambda: ops.linear(*tensors((2, 3), (4, 5)), None), r"linear: x has shape \(2, 3\), W \(4, 5\)"),
    "linear: x of 3 axes": (lambda: ops.linear(*tensors((2, 3, 4), (5, 4)), None), "linear: x has shape"),
    "linear: x of 1 axis": (lambda: ops.linear(*tensors((4,), (5, 4)), None), "linear: x has shape"),
    "linear: W of 1 axis": (lambda: ops.linear(*tensors((2, 3), (3,)), None), "linear: .*W"),
    "linear: b too long": (lambda: ops.linear(*tensors((2, 3), (4, 3), (5,))), "linear: .*b"),
    "linear: b of one entry": (lambda: ops.linear(*tensors((2, 3), (4, 3), (1,))), "linear: .*b"),
    "linear: b of two axes": (lambda: ops.linear(*tensors((2, 3), (4, 3), (2, 4))), "linear: .*b"),
    "add: shapes": (lambda: ops.add(*tensors((2, 3), (1, 3))), r"add: x \(2, 3\) and y \(1, 3\)"),
    "embedding: too large": (look_up([0, 5]), r"embedding: ids run from 0 to 5; they must lie in 0 … 4"),
    "embedding: negative": (look_up([-1, 4]), "embedding: ids run from -1 to 4"),
    "embedding: float": (look_up([0.0, 1.0]), "embedding: ids must be integers, got float64"),
    "embedding: bool": (look_up([True]), "embedding: ids must be integers, got bool"),
    "layer_norm: g": (lambda: ops.layer_norm(*tensors((2, 3), (4,), (4,))), r"layer_norm: x \(2, 3\), g \(4,\)"),
    "layer_norm: b": (lambda: ops.layer_norm(*tensors((2, 3), (3,), (1,))), r"layer_norm: .*b \(1,\)"),
    "layer_norm: x": (lambda: ops.layer_norm(*tensors((3,), (), ())), r"layer_norm: x \(3,\)"),
    "attention: heads": (attend((4, 6), (4, 6), (4, 6), heads=4), "attention: .* 4 heads"),
    "attention: no heads": (attend((4, 6), (4, 6), (4, 6), heads=0), "attention: .* 0 heads"),
    "attention: width": (attend((4, 6), (4, 8), (4, 8)), r"attention: q \(4, 6\), k \(4, 8\)"),
    "attention: k and v": (attend((4, 6), (4, 6), (5, 6)), r"attention: .* v \(5, 6\)"),
    "attention: 3 axes": (attend((1, 4, 6), (1, 4, 6), (1, 4, 6)), r"attention: q \(1, 4, 6\)"),
    "attention: k of 1 axis": (attend((4, 6), (6,), (6,)), r"attention: .* k \(6,\)"),
    "attention: more queries": (attend((6, 6), (4, 6), (4, 6), batch=2), r"attention: q \(6, 6\)"),
    "attention: batch": (attend((4, 6), (4, 6), (4, 6), batch=3), "attention: 4 and 4 rows do not divide .* of 3"),
    "attention: batch of keys": (attend((2, 6), (5, 6), (5, 6), batch=2), "attention: 2 and 5 rows do not divide"),
    "attention: no batch": (attend((4, 6), (4, 6), (4, 6), batch=0), "attention: .*batch of 0"),
    "cross_entropy: count": (score([0, 1, 2]), r"cross_entropy: logits \(2, 5\) and targets \(3,\)"),
    "cross_entropy: axes": (score([0, 1], (2, 1, 5)), r"cross_entropy: logits \(2, 1, 5\)"),
    "cross_entropy: targets of 2 axes": (score([[0], [1]]), r"cross_entropy: .* targets \(2, 1\)"),
    "cross_entropy: too large": (score([0, 5]), "cross_entropy: ids run from 0 to 5"),
    "cross_entropy: negative": (score([0, -1]), "cross_entropy: ids run from -1 to 0"),
    "cross_entropy: float": (score([0.0, 1.0]), "cross_entropy: ids must be integers"),
    "cross_entropy: all ignored": (score([-100, -100]), r"every target is ignore_index \(-100\)"),
    "dropout: 1": (drop(1.0), r"dropout: p is 1.0"),
    "dropout: negative": (drop(-0.1), r"dropout: p is -0.1"),
    "dropout: nan": (drop(math.nan), r"dropout: p is nan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    f, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        f()
