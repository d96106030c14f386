"""The engine adds gradients along every path, frees what it kept, and refuses what has no gradient.
These tests exist because a gradient that is assigned, doubled or shared looks plausible and trains badly.
"""

import copy
import operator
import weakref

import numpy as np
import pytest

from minilora import ops
from minilora.engine import Operation, Saved, Tensor, backward, is_recording, no_grad, plain, record
from minilora.errors import InputError

pytestmark = pytest.mark.quick


def leaf(*shape, dtype=np.float64, seed=0):
    return Tensor(np.random.default_rng(seed).uniform(0.5, 2.0, shape).astype(dtype), requires_grad=True)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=0)


# -------------------------------------------------------------------------------- which gradient


def long_way(y):
    return ((y + 1.0) * 3.0 + 5.0) * y


PATHS = {  # what is done with y = x², and its derivative by x
    "two paths": (lambda y: y * 2.0 + y * y, lambda x: 4.0 * x + 4.0 * x**3),
    "the longer path first": (lambda y: long_way(y) + y, lambda x: 2.0 * x * (6.0 * x**2 + 9.0)),
    "the longer path last": (lambda y: y + long_way(y), lambda x: 2.0 * x * (6.0 * x**2 + 9.0)),
    "twice in one operation": (lambda y: y + y, lambda x: 4.0 * x),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_value_receives_from_every_path(name):
    f, derivative = PATHS[name]
    x = leaf(4)
    backward(f(x * x).sum())
    close(x.grad, derivative(x.data))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_dy_arrives_at_the_result_and_a_gradient_has_the_shape_of_its_leaf(shape):
    x, dy = leaf(*shape), np.asarray(np.random.default_rng(1).standard_normal(shape))
    backward(x, dy)
    np.testing.assert_array_equal(x.grad, dy)
    assert type(x.grad) is type(x.data) and x.grad.shape == shape
    backward(x * x, dy)
    close(x.grad, dy + 2.0 * x.data * dy)


def test_a_constant_has_no_gradient_and_makes_no_node():
    a = Tensor(np.ones(3))
    assert a.grad is None and not a.requires_grad
    assert (a * a).node is None and (a * leaf(3)).node is not None


def test_a_long_chain_is_walked_and_dropped_without_overflowing_the_stack():
    x, factor = leaf(1), Tensor(np.ones(1))
    y = x
    for _ in range(3_000):
        y = record("step", y.data, {}, lambda dy, saved: (dy,), [y])
    backward(y.sum())
    np.testing.assert_array_equal(x.grad, [1.0])
    kept = weakref.ref(factor.data)  # by the first node of the chain
    y = x * factor
    for _ in range(30_000):
        y = record("step", y.data, {}, lambda dy, saved: (dy,), [y])
    del factor
    assert kept() is not None
    del y
    assert kept() is None


def test_no_grad_makes_constants_and_ends_with_its_block_or_an_exception():
    x = leaf(3)
    with pytest.raises(ZeroDivisionError), no_grad():
        with no_grad():
            pass
        assert not is_recording()
        c = x * x
        assert c.node is None
        raise ZeroDivisionError
    assert is_recording()
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


def test_a_second_backward_is_refused_before_any_gradient_changes():
    x, w = leaf(3), leaf(3)
    trunk = x * x
    first, second = trunk.sum(), (trunk * w).sum()
    backward(first)
    once = x.grad.copy()
    for spent in (first, second):  # the same result, and another one on a trunk that is spent
        with pytest.raises(RuntimeError, match="run the forward pass again"):
            backward(spent)
    assert w.grad is None
    np.testing.assert_array_equal(x.grad, once)


REFUSED = {
    "no scalar, no dy": (lambda: backward(leaf(3) * 2.0), r"shape \(3,\) needs dy"),
    "dy of another shape": (lambda: backward(leaf(3) * 2.0, np.ones((1, 3))), r"dy is .*the result is float64\(3,\)"),
    "dy of another dtype": (lambda: backward(leaf(3) * 2.0, np.ones(3, np.float32)), "dy is .*the result is float64"),
    "nothing to differentiate": (lambda: backward(Tensor(np.ones(())) * 2.0), "requires_grad=True"),
    "integers": (lambda: Tensor(np.arange(3)), "floating-point data"),
    "a list of integers": (lambda: Tensor([1, 2]), "floating-point data"),
    "booleans": (lambda: Tensor(np.array([True])), "floating-point data"),
    "text": (lambda: Tensor(np.array(["a"])), "floating-point data"),
    "no array": (lambda: Tensor(None), "expected a NumPy or CuPy array, got NoneType"),
    "two dtypes": (lambda: leaf(3) + leaf(3, dtype=np.float32), "add: all inputs need one dtype, got float64, float32"),
    "an array's own dtype": (lambda: leaf(3, dtype=np.float32) * np.ones(3), "mul: all inputs need one dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_is_refused(name):
    f, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        f()


def test_a_backward_with_the_wrong_number_of_gradients_is_an_error():
    def pair_forward(need, a, b):
        return a + b, {}

    with pytest.raises(ValueError, match="argument 2 is shorter"):
        backward(Operation(pair_forward, lambda need, dy, saved: (dy,))(leaf(2), leaf(2)), np.ones(2))


# -------------------------------------------------------------------------------- dtypes

EXPRESSIONS = [  # a Python or NumPy number takes the Tensor's dtype
    lambda t: 2.0 * t + 1,
    lambda t: 1 - t / 3.0,
    lambda t: 1.0 / t - 1,
    lambda t: -(t**2),
    lambda t: t * np.float64(2.0),
    lambda t: np.float64(2.0) * t,
    lambda t: t ** np.float64(-0.5),
    lambda t: t @ t.T,
    lambda t: t.sum() * t.exp().log(),
    lambda t: t[0, 0] * t[0].tanh(),
    lambda t: t.reshape(4),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_that_goes_in_comes_out(dtype):
    for number, f in enumerate(EXPRESSIONS):
        t = leaf(2, 2, dtype=dtype)
        y = f(t)
        assert y.dtype == dtype, number
        backward(y, np.ones(y.shape, dtype))
        assert t.grad.dtype == dtype, number


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul])
def test_an_array_on_the_left_is_a_constant(op):
    """NumPy would otherwise take the Tensor for one object per entry."""
    a, t = np.arange(3.0), leaf(3)
    y = op(a, t)
    assert isinstance(y, Tensor)
    np.testing.assert_array_equal(y.data, op(a, t.data))


# -------------------------------------------------------------------------------- memory


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
    "sum": lambda a, b: (a + b).sum(axis=0),
    "reshape": lambda a, b: (a.reshape(9) + b.reshape(9)).reshape(3, 3),
    "transpose": lambda a, b: (a.T - b.T).T,
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


@pytest.mark.parametrize("swap", [False, True])  # the failing branch is visited after the other, or before it
def test_a_failed_backward_leaves_nothing_behind_in_a_shared_trunk(swap):
    """Else the half-finished gradient of the first pass would be added to that of the next."""

    def fails(dy, saved):
        raise MemoryError

    x = leaf(3)
    trunk = x * 2.0
    bad = record("fails", trunk.data.sum(), {}, fails, [trunk])
    good = trunk.sum()
    with pytest.raises(MemoryError):
        backward(good + bad if swap else bad + good)
    assert x.grad is None
    backward((trunk * 1.0).sum())
    np.testing.assert_array_equal(x.grad, [2.0, 2.0, 2.0])


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
    x, z = leaf(2, 3), leaf(2, 3)
    y = ops.gelu(x)
    with plain():
        backward(y.sum())
        y = ops.gelu(z)
    backward(y.sum())
    np.testing.assert_allclose(x.grad, z.grad, rtol=1e-14)


def test_a_name_that_was_not_saved_is_an_attribute_error():
    saved = Saved(x=1)
    assert saved.x == 1 and not hasattr(saved, "y") and copy.deepcopy(saved) == saved
    with pytest.raises(AttributeError, match="there is no array 'y'; there are x"):
        _ = saved.y
