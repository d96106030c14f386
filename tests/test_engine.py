"""The engine adds gradients along every path, frees what it kept, and refuses what has no gradient.
These tests exist because a gradient that is assigned, doubled or shared looks plausible and trains badly.
"""

import copy
import operator
import weakref

import numpy as np
import pytest

from minilora import ops
from minilora.engine import (
    Operation,
    Saved,
    Tensor,
    backward,
    gradients,
    is_recording,
    no_grad,
    nodes_of,
    plain,
    record,
)
from minilora.errors import InputError
from minilora.tools.gradcheck import check_operation

pytestmark = pytest.mark.quick


def leaf(*shape, dtype=np.float64, seed=0):
    return Tensor(np.random.default_rng(seed).uniform(0.5, 2.0, shape).astype(dtype), requires_grad=True)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=0)


# -------------------------------------------------------------------------------- which gradient


def test_a_value_used_by_two_paths_receives_from_both():
    x = leaf(4)
    y = x * x
    backward((y * 2.0 + y * y).sum())  # 2 x² + x⁴
    close(x.grad, 4.0 * x.data + 4.0 * x.data**3)


@pytest.mark.parametrize("swap", [False, True])
def test_a_node_waits_for_the_longer_of_two_paths(swap):
    x = leaf(4)
    y = x * 2.0
    long_way = ((y + 1.0) * 3.0 + 5.0) * y
    a, b = (y, long_way) if swap else (long_way, y)
    backward((a + b).sum())  # y + (3 y + 8) y with y = 2 x
    close(x.grad, 2.0 * (1.0 + 6.0 * (2.0 * x.data) + 8.0))


def test_a_tensor_used_twice_by_one_operation_receives_twice():
    x = leaf(3)
    backward((x + x).sum())
    close(x.grad, [2.0, 2.0, 2.0])
    x = leaf(3)
    backward((x * x).sum())
    close(x.grad, 2.0 * x.data)


def test_two_backward_calls_add_into_the_same_buffer():
    x = leaf(3)
    backward((x * 2.0).sum())
    buffer = x.grad
    backward((x * x).sum())
    close(x.grad, 2.0 + 2.0 * x.data)
    assert x.grad is buffer  # the optimizer's flat buffer relies on it


def test_backward_from_a_leaf_is_the_gradient_that_arrives():
    x = leaf()
    backward(x)
    assert x.grad == 1.0
    y, dy = leaf(3), np.array([1.0, 2.0, 3.0])
    backward(y, dy)
    np.testing.assert_array_equal(y.grad, dy)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_gradient_is_an_array_of_the_shape_of_its_leaf(shape):
    x = leaf(*shape)
    backward((x * x).sum())
    assert type(x.grad) is type(x.data)
    assert x.grad.shape == shape


def test_a_constant_has_no_gradient():
    assert Tensor(np.ones(3)).grad is None
    assert not Tensor(np.ones(3)).requires_grad


def test_gradients_may_be_had_without_being_added():
    x, w = leaf(3), leaf(3, seed=1)
    by_leaf = gradients((x * w + x).sum())
    assert x.grad is None and w.grad is None
    assert set(by_leaf) == {x.node, w.node}
    close(by_leaf[x.node], w.data + 1.0)
    backward((x * w + x).sum())
    np.testing.assert_array_equal(x.grad, by_leaf[x.node])


def test_dy_is_the_gradient_of_the_result():
    x, dy = leaf(2, 3), np.arange(6.0).reshape(2, 3)
    backward(x * x, dy)
    close(x.grad, 2.0 * x.data * dy)


def test_nodes_come_once_each_with_parents_before_children():
    x = leaf(3)
    y = x * x
    z = y * y + y
    order = nodes_of(z)
    assert len(order) == len({id(n) for n in order}) == 4  # x, y, y * y, z
    place = {id(node): i for i, node in enumerate(order)}
    assert all(place[id(p)] < place[id(n)] for n in order for p in n.parents)


def test_a_chain_of_ten_thousand_operations():
    x = leaf(2)
    y = x
    for _ in range(10_000):
        y = y + x
    backward(y.sum())
    np.testing.assert_array_equal(x.grad, [10_001.0, 10_001.0])


def test_a_long_chain_is_dropped_without_overflowing_the_stack():
    x, factor = leaf(1), Tensor(np.ones(1))
    kept = weakref.ref(factor.data)  # by the first node of the chain
    y = x * factor
    for _ in range(100_000):
        y = record("step", y.data, {}, lambda dy, saved: (dy,), [y])
    del factor
    assert kept() is not None
    del y
    assert kept() is None


# -------------------------------------------------------------------------------- when nothing is recorded


def test_constants_make_no_node():
    a, b = Tensor(np.ones(3)), Tensor(np.ones(3))
    assert (a * b).node is None
    assert (a * leaf(3)).node is not None


def test_no_grad_records_nothing_and_ends_with_its_block():
    x = leaf(3)
    with no_grad():
        assert not is_recording()
        assert (x * x).node is None
        with no_grad():
            pass
        assert not is_recording()
    assert is_recording()
    assert (x * x).requires_grad


def test_no_grad_ends_at_an_exception():
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert is_recording()


def test_what_no_grad_computed_is_a_constant():
    x = leaf(3)
    with no_grad():
        c = x * x
    backward((c * x).sum())
    close(x.grad, x.data**2)


def test_need_tells_forward_which_arrays_want_a_gradient():
    seen = []

    def probe_forward(need, a, b):
        seen.append(tuple(need))
        return a + b, {}

    probe = Operation(probe_forward, lambda need, dy, saved: (dy, dy))
    x, c = leaf(2), Tensor(np.ones(2))
    probe(x, c)
    probe(c, x)
    with no_grad():
        probe(x, x)
    assert seen == [(True, False), (False, True), (False, False)]
    assert probe.name == "probe"


# -------------------------------------------------------------------------------- what is refused


def test_a_second_backward_is_an_error():
    x = leaf(3)
    loss = (x * x).sum()
    backward(loss)
    once = x.grad.copy()
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        backward(loss)
    np.testing.assert_array_equal(x.grad, once)


def test_a_graph_on_a_spent_trunk_is_refused_before_any_gradient_changes():
    x, w = leaf(3), leaf(3)
    trunk = x * x
    first, second = trunk.sum(), (trunk * w).sum()
    backward(first)
    once = x.grad.copy()
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        backward(second)
    assert w.grad is None
    np.testing.assert_array_equal(x.grad, once)


def test_a_result_that_is_no_scalar_needs_dy():
    with pytest.raises(InputError, match=r"shape \(3,\) needs dy"):
        backward(leaf(3) * 2.0)


@pytest.mark.parametrize("dy", [np.ones(4), np.ones((1, 3)), np.ones(()), np.ones(3, np.float32)])
def test_dy_of_another_shape_or_dtype_is_refused(dy):
    x = leaf(3)
    with pytest.raises(InputError, match=r"dy is .*the result is float64\(3,\)"):
        backward(x * 2.0, dy)
    assert x.grad is None


def test_nothing_to_differentiate_is_an_error():
    with pytest.raises(InputError, match="requires_grad=True"):
        backward(Tensor(np.ones(())) * 2.0)


@pytest.mark.parametrize("data", [np.arange(3), [1, 2], np.array([True]), np.array(["a"])])
def test_data_without_a_gradient_is_refused(data):
    with pytest.raises(InputError, match="floating-point data"):
        Tensor(data)


@pytest.mark.parametrize("data", [3, "text", None])
def test_data_that_is_no_array_is_refused(data):
    with pytest.raises(InputError, match="expected a NumPy or CuPy array"):
        Tensor(data)


def test_mixed_dtypes_are_refused_by_name():
    with pytest.raises(InputError, match="add: all inputs need one dtype, got float64, float32"):
        leaf(3) + leaf(3, dtype=np.float32)


# -------------------------------------------------------------------------------- dtypes

EXPRESSIONS = {
    "t * 2": lambda t: t * 2.0,
    "2 * t": lambda t: 2.0 * t,
    "t + 1": lambda t: t + 1,
    "1 - t": lambda t: 1 - t,
    "t - 1": lambda t: t - 1,
    "-t": lambda t: -t,
    "t / 3": lambda t: t / 3.0,
    "1 / t": lambda t: 1.0 / t,
    "t**2": lambda t: t**2,
    "t**-0.5": lambda t: t**-0.5,
    "t * np.float64": lambda t: t * np.float64(2.0),
    "np.float64 * t": lambda t: np.float64(2.0) * t,
    "t**np.float64": lambda t: t ** np.float64(2.0),
    "t @ t": lambda t: t @ t,
    "t.sum()": lambda t: t.sum(),
    "t.exp()": lambda t: t.exp(),
    "t.log()": lambda t: t.log(),
    "t.tanh()": lambda t: t.tanh(),
    "t.T": lambda t: t.T,
    "t[0]": lambda t: t[0],
    "t[0, 0]": lambda t: t[0, 0],
    "t.reshape": lambda t: t.reshape(4),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_dtype_that_goes_in_comes_out(name, dtype):
    t = leaf(2, 2, dtype=dtype)
    y = EXPRESSIONS[name](t)
    assert y.dtype == dtype
    backward(y, np.ones(y.shape, dtype))
    assert t.grad.dtype == dtype


def test_an_array_keeps_its_own_dtype_and_is_not_cast_in_silence():
    with pytest.raises(InputError, match="mul: all inputs need one dtype, got float32, float64"):
        leaf(3, dtype=np.float32) * np.ones(3)


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul])
def test_an_array_on_the_left_is_a_constant(op):
    """NumPy would otherwise take the Tensor for one object per entry."""
    a, t = np.arange(3.0), leaf(3)
    y = op(a, t)
    assert isinstance(y, Tensor)
    np.testing.assert_array_equal(y.data, op(a, t.data))


# -------------------------------------------------------------------------------- memory


def test_an_input_that_nobody_kept_is_freed_after_forward():
    x = leaf(3)
    h = x * 2.0
    alive = weakref.ref(h.data)
    y = (h + 1.0).sum()
    del h
    assert alive() is None
    assert y.requires_grad


def test_what_an_operation_kept_lives_until_backward_has_passed_it():
    x, seen = leaf(3), []

    def probe(dy, saved):
        seen.append(kept())
        return (dy,)

    h = record("probe", x.data * 1.0, {}, probe, [x])
    e = h.exp()
    kept = weakref.ref(e.data)  # exp keeps its result
    loss = e.sum()
    del e
    assert kept() is not None
    backward(loss)
    assert seen == [None]  # freed during the pass, before the next node was visited
    assert loss.node.saved is None
    assert loss.node.parents == ()


GRAPHS = {
    "a + b": lambda a, b: a + b,
    "sum": lambda a, b: (a + b).sum(axis=0),
    "reshape": lambda a, b: (a.reshape(9) + b.reshape(9)).reshape(3, 3),
    "transpose": lambda a, b: (a.T + b.T).T,
    "a - b": lambda a, b: a - b,
    "a only": lambda a, b: a + b * 1.0,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_share_no_memory(name):
    a, b = leaf(3, 3), leaf(3, 3, seed=1)
    y = GRAPHS[name](a, b)
    dy = np.ones(y.shape)
    backward(y, dy)
    for one, other in [(a.grad, b.grad), (a.grad, dy), (b.grad, dy)]:
        assert not np.shares_memory(one, other)
    assert a.grad.flags.writeable and b.grad.flags.writeable


# -------------------------------------------------------------------------------- after an exception


def test_a_failed_forward_leaves_recording_and_gradients_alone():
    x = leaf(3)
    with pytest.raises(InputError):
        x + leaf(4)
    assert is_recording()
    backward(x.sum())
    np.testing.assert_array_equal(x.grad, np.ones(3))


def test_a_failed_backward_leaves_nothing_behind_in_a_shared_trunk():
    """Else the half-finished gradient of the first pass would be added to that of the next."""

    def fails(dy, saved):
        raise MemoryError

    for swap in (False, True):  # the failing branch is visited after the other, or before it
        x = leaf(3)
        trunk = x * 2.0
        bad = record("fails", trunk.data.sum(), {}, fails, [trunk])
        good = trunk.sum()
        with pytest.raises(MemoryError):
            backward(good + bad if swap else bad + good)
        assert x.grad is None
        backward((trunk * 1.0).sum())
        np.testing.assert_array_equal(x.grad, [2.0, 2.0, 2.0])


def test_a_backward_with_the_wrong_number_of_gradients_is_an_error():
    def pair_forward(need, a, b):
        return a + b, {}

    with pytest.raises(ValueError, match="argument 2 is shorter"):
        check_operation(Operation(pair_forward, lambda need, dy, saved: (dy,)), {"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        backward(Operation(pair_forward, lambda need, dy, saved: (dy,))(leaf(2), leaf(2)), np.ones(2))


# -------------------------------------------------------------------------------- forms


def test_a_registered_form_runs_by_default_and_not_within_plain_nor_on_complex_arrays():
    def twice_forward(need, x):
        return 2.0 * x, {"form": "plain"}

    twice = Operation(twice_forward, lambda need, dy, saved: (2.0 * dy,))
    twice.forms["numpy"] = lambda need, x: (x + x, {"form": "fast"}), lambda need, dy, saved: (dy + dy,)

    def used(dtype=float):
        return twice(Tensor(np.ones(2, dtype), requires_grad=True)).node.saved.form

    assert used() == "fast"
    with plain():
        assert used() == "plain"
        with pytest.raises(KeyError), plain():
            raise KeyError
        assert used() == "plain"
    assert used() == "fast" and used(complex) == "plain"


def test_backward_is_of_the_form_that_ran_forward():
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    y = ops.gelu(x)
    with plain():
        backward(y.sum())
    z = Tensor(np.ones((2, 3)), requires_grad=True)
    with plain():
        y = ops.gelu(z)
    backward(y.sum())
    np.testing.assert_allclose(x.grad, z.grad, rtol=1e-14)


def test_a_name_that_was_not_saved_is_an_attribute_error():
    saved = Saved(x=1)
    assert saved.x == 1 and not hasattr(saved, "y") and copy.deepcopy(saved) == saved
    with pytest.raises(AttributeError, match="there is no array 'y'; there are x"):
        _ = saved.y
