"""The elementary operations compute what NumPy computes, and their gradients are those of finite differences.
These tests exist because every other test that compares with a composition stands on these few operations.
"""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from minilora import elementary
from minilora.engine import Saved, Tensor, backward
from minilora.errors import InputError
from minilora.tools.gradcheck import check_operation, gradcheck

pytestmark = pytest.mark.quick


def positive(*shape, seed=0):
    """Away from 0, where log and negative powers are defined and well conditioned."""
    return np.random.default_rng([seed, *shape]).uniform(0.5, 2.0, shape)


def check(f, **arrays):
    """``f`` of Tensors is that of arrays, and its gradients are the finite differences of ``f`` of constants."""
    tensors = {name: Tensor(a, requires_grad=True) for name, a in arrays.items()}
    y = f(**tensors)
    np.testing.assert_allclose(y.data, f(**arrays), rtol=1e-14, atol=0)
    dy = np.asarray(np.random.default_rng(1).standard_normal(y.shape))
    backward(y, dy)

    def value(**constants):
        return (f(**{name: Tensor(a) for name, a in constants.items()}).data * dy).sum()

    report = gradcheck(value, {name: np.asarray(t.grad) for name, t in tensors.items()}, arrays)
    assert report, report


CASES = {
    "add": (elementary.add, {"a": positive(2, 3), "b": positive(2, 3, seed=1)}, {}),
    "mul": (elementary.mul, {"a": positive(2, 3), "b": positive(2, 3, seed=1)}, {}),
    "matmul": (elementary.matmul, {"a": positive(2, 3), "b": positive(3, 4)}, {}),
    "sum": (elementary.sum_, {"x": positive(2, 3)}, {}),
    "exp": (elementary.exp, {"x": positive(2, 3)}, {}),
    "log": (elementary.log, {"x": positive(2, 3)}, {}),
    "tanh": (elementary.tanh, {"x": positive(2, 3)}, {}),
    "reshape": (elementary.reshape, {"x": positive(2, 6)}, {"shape": (3, 4)}),
    "transpose": (elementary.transpose, {"x": positive(2, 3, 4)}, {"axes": (1, 2, 0)}),
    "getitem": (elementary.getitem, {"x": positive(4, 3)}, {"index": np.array([2, 0, 2])}),
    **{f"pow {e}": (elementary.power, {"x": positive(2, 3)}, {"exponent": e}) for e in (1, 2, -1.5)},
}


def test_every_operation_is_checked_here():
    operations = {v for v in vars(elementary).values() if isinstance(v, elementary.Operation)}
    assert operations == {operation for operation, _, _ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_only_what_is_needed_is_computed_and_kept(name):
    """For each choice of inputs: the same gradients, None for the others, and no kept array that goes unused."""
    operation, arrays, constants = CASES[name]
    report = check_operation(operation, arrays, **constants)
    assert report, report
    names = operation.Need._fields
    everything = operation.Need(*[True] * len(names))
    y, saved = operation.forward(everything, *arrays.values(), **constants)
    dy = np.ones(y.shape)
    full = operation.backward(everything, dy, Saved(saved))
    for flags in itertools.product([False, True], repeat=len(names)):
        if not any(flags):
            continue
        need = operation.Need(*flags)
        _, saved = operation.forward(need, *arrays.values(), **constants)
        grads = operation.backward(need, dy, Saved(saved))
        for wanted, grad, expected in zip(flags, grads, full, strict=True):
            assert (grad is not None) == wanted
            assert not wanted or np.array_equal(grad, expected)
        for key in [k for k, v in saved.items() if isinstance(v, np.ndarray)]:
            with pytest.raises(AttributeError):
                operation.backward(need, dy, Saved({k: v for k, v in saved.items() if k != key}))


OPERATORS = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / b,
    "3 + a": lambda a, b: 3 + a * b,
    "3 - a": lambda a, b: 3 - a * b,
    "a - 3": lambda a, b: a * b - 3,
    "3 * a": lambda a, b: 3 * (a + b),
    "3 / a": lambda a, b: 3 / (a + b),
    "a / 3": lambda a, b: (a + b) / 3,
    "-a": lambda a, b: -a * b,
    "a**3": lambda a, b: a**3 * b**-2,
    "a @ b.T": lambda a, b: a @ b.T,
    "a.sum() * b": lambda a, b: a.sum() * b,
    "sum(axis=0)": lambda a, b: a.sum(axis=0) * b.sum(axis=-1, keepdims=True),
    "reshape": lambda a, b: a.reshape(3, -1) @ b,
    "transpose": lambda a, b: a.transpose() @ b,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_numpys_with_the_right_gradient(name):
    check(OPERATORS[name], a=positive(2, 3), b=positive(2, 3, seed=1))


@pytest.mark.parametrize("name", ["exp", "log", "tanh"])
def test_functions_compute_what_numpy_computes(name):
    x = positive(2, 3)
    np.testing.assert_array_equal(getattr(Tensor(x), name)().data, getattr(np, name)(x))


def test_the_power_zero_is_a_constant_also_at_zero():
    x = Tensor(np.array([0.0, 2.0]), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        backward((x**0).sum())
    np.testing.assert_array_equal(x.grad, [0.0, 0.0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["a + b", "a * b", "a - b", "a / b"]), mutually_broadcastable_shapes(num_shapes=2, max_dims=3))
def test_each_copy_that_broadcasting_made_passes_a_gradient_on(name, shapes):
    a, b = shapes.input_shapes
    check(OPERATORS[name], a=positive(*a), b=positive(*b, seed=1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(mutually_broadcastable_shapes(signature="(m,k),(k,n)->(m,n)", max_dims=2, max_side=3))
def test_matmul_broadcasts_its_leading_axes(shapes):
    a, b = shapes.input_shapes
    check(lambda a, b: a @ b, a=positive(*a), b=positive(*b, seed=1))


def test_no_copy_of_a_stretched_array_passes_nothing_on():
    np.testing.assert_array_equal(elementary.unbroadcast(np.ones(0), (1,)), [0.0])


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 1, -1, (-2, 0), (0, 1, 2), ()])
def test_sum_over_any_axes(axis, keepdims):
    check(lambda x: x.sum(axis=axis, keepdims=keepdims), x=positive(2, 3, 4))


INDICES = {
    "repeated": [2, 0, 2, 2],
    "repeated pairs": (np.array([1, 1, 0]), np.array([2, 2, 0])),
    "two axes of an index": np.array([[0, 1], [1, 1]]),
    "negative": -1,
    "one entry": (2, 0),
    "step": slice(None, None, -2),
    "column": (slice(None), 1),
    "ellipsis": (..., 0),
    "new axis": (slice(None), None),
    "mask": np.array([True, False, True, True]),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_entry_receives_once_for_each_time_it_was_picked(name):
    check(lambda x: x[INDICES[name]], x=positive(4, 3))


@pytest.mark.parametrize("axes", [*itertools.permutations(range(3)), (-2, -1, -3)])
def test_transpose_by_any_order_of_axes(axes):
    check(lambda x: x.transpose(*axes), x=positive(2, 3, 4))


MISTAKES = {
    "add": (lambda a, b: a + b[0, :2], r"add: shapes \(2, 3\) and \(2,\) do not broadcast \(3 against 2\)"),
    "mul": (lambda a, b: a * b.T, r"mul: shapes \(2, 3\) and \(3, 2\) do not broadcast"),
    "matmul": (lambda a, b: a @ b, r"matmul: \(2, 3\) @ \(2, 3\)"),
    "matmul of a vector": (lambda a, b: a @ b[0], r"matmul: \(2, 3\) @ \(3,\)"),
    "matmul, leading axes": (lambda a, b: a[[[0, 1]] * 2] @ b.T[None][[0, 0, 0]], "matmul"),
    "reshape": (lambda a, b: a.reshape(4), "reshape"),
    "transpose": (lambda a, b: a.transpose(0, 2), "transpose"),
    "sum": (lambda a, b: a.sum(axis=2), "sum"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_shapes_that_do_not_fit_are_named(name):
    f, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        f(*(Tensor(positive(2, 3, seed=seed), requires_grad=True) for seed in (0, 1)))
