"""A few elementary operations, enough to build anything small from nothing: ``a * b``, ``x @ w``, ``x.sum()``.

The layer-sized operations of ops.py are faster and keep less; tests hold each of them equal to its composition
from the operations here. In each pair, y is the result and dy the gradient that arrives at it.
"""

from .backend import array_module
from .engine import Operation, Tensor
from .errors import InputError


def unbroadcast(grad, shape):
    """Sum ``grad`` over the axes along which an array of ``shape`` was stretched: each copy passed a gradient on."""
    if grad.shape == shape:
        return grad
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=stretched, keepdims=True) if stretched else grad


def _check_broadcast(name, a, b):
    for m, n in zip(a.shape[::-1], b.shape[::-1], strict=False):
        if m != n and 1 not in (m, n):
            raise InputError(f"{name}: shapes {a.shape} and {b.shape} do not broadcast ({m} against {n})")


def add_forward(need, a, b):
    _check_broadcast("add", a, b)
    return a + b, {"shapes": (a.shape, b.shape)}


def add_backward(need, dy, saved):
    return tuple(unbroadcast(dy, shape) if n else None for n, shape in zip(need, saved.shapes, strict=True))


def mul_forward(need, a, b):
    _check_broadcast("mul", a, b)
    return a * b, {"a": a if need.b else None, "b": b if need.a else None, "shapes": (a.shape, b.shape)}


def mul_backward(need, dy, saved):
    da = unbroadcast(dy * saved.b, saved.shapes[0]) if need.a else None
    db = unbroadcast(dy * saved.a, saved.shapes[1]) if need.b else None
    return da, db


def pow_forward(need, x, *, exponent):
    exponent = float(exponent)  # a NumPy number would make float64 of float32
    return x**exponent, {"x": x, "exponent": exponent}


def pow_backward(need, dy, saved):
    if saved.exponent == 0.0:  # a constant, also at 0, where 0 · x⁻¹ would be no number
        return (0.0 * dy,)
    return (dy * (saved.exponent * saved.x ** (saved.exponent - 1)),)


def matmul_forward(need, a, b):
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise InputError(f"matmul: {a.shape} @ {b.shape}; the last axis of the first must equal the second-last")
    return a @ b, {"a": a if need.b else None, "b": b if need.a else None, "shapes": (a.shape, b.shape)}


def matmul_backward(need, dy, saved):
    da = unbroadcast(dy @ saved.b.swapaxes(-1, -2), saved.shapes[0]) if need.a else None
    db = unbroadcast(saved.a.swapaxes(-1, -2) @ dy, saved.shapes[1]) if need.b else None
    return da, db


def sum_forward(need, x, *, axis=None, keepdims=False):
    y = x.sum(axis=axis, keepdims=keepdims)
    kept = x.sum(axis=axis, keepdims=True).shape if axis is not None else (1,) * x.ndim
    return array_module(x).asarray(y), {"kept": kept, "shape": x.shape}


def sum_backward(need, dy, saved):
    return (array_module(dy).broadcast_to(dy.reshape(saved.kept), saved.shape),)


def exp_forward(need, x):
    y = array_module(x).exp(x)
    return y, {"y": y}


def exp_backward(need, dy, saved):
    return (dy * saved.y,)


def log_forward(need, x):
    return array_module(x).log(x), {"x": x}


def log_backward(need, dy, saved):
    return (dy / saved.x,)


def tanh_forward(need, x):
    y = array_module(x).tanh(x)
    return y, {"y": y}


def tanh_backward(need, dy, saved):
    return (dy * (1.0 - saved.y * saved.y),)


def reshape_forward(need, x, *, shape):
    return x.reshape(shape), {"shape": x.shape}


def reshape_backward(need, dy, saved):
    return (dy.reshape(saved.shape),)


def transpose_forward(need, x, *, axes):
    return x.transpose(axes), {"axes": axes}


def transpose_backward(need, dy, saved):
    axes = [axis % dy.ndim for axis in saved.axes]
    inverse = sorted(range(dy.ndim), key=axes.__getitem__)
    return (dy.transpose(inverse),)


def getitem_forward(need, x, *, index):
    return x[index], {"index": index, "shape": x.shape}


def getitem_backward(need, dy, saved):
    xp = array_module(dy)
    dx = xp.zeros(saved.shape, dy.dtype)
    xp.add.at(dx, saved.index, dy)  # an index that is named twice receives twice
    return (dx,)


add = Operation(add_forward, add_backward)
mul = Operation(mul_forward, mul_backward)
power = Operation(pow_forward, pow_backward)
matmul = Operation(matmul_forward, matmul_backward)
sum_ = Operation(sum_forward, sum_backward)
exp = Operation(exp_forward, exp_backward)
log = Operation(log_forward, log_backward)
tanh = Operation(tanh_forward, tanh_backward)
reshape = Operation(reshape_forward, reshape_backward)
transpose = Operation(transpose_forward, transpose_backward)
getitem = Operation(getitem_forward, getitem_backward)


def _tensor(value, like):
    """An array or a number as a constant; a number takes the dtype and device of ``like``: float32 stays float32."""
    if isinstance(value, Tensor):
        return value
    return Tensor(value if getattr(value, "shape", ()) else array_module(like.data).asarray(value, dtype=like.dtype))


Tensor.__add__ = Tensor.__radd__ = lambda a, b: add(a, _tensor(b, a))
Tensor.__mul__ = Tensor.__rmul__ = lambda a, b: mul(a, _tensor(b, a))
Tensor.__neg__ = lambda a: a * -1.0
Tensor.__sub__ = lambda a, b: a + _tensor(b, a) * -1.0
Tensor.__rsub__ = lambda a, b: _tensor(b, a) + a * -1.0
Tensor.__pow__ = lambda a, exponent: power(a, exponent=exponent)
Tensor.__truediv__ = lambda a, b: a * _tensor(b, a) ** -1.0
Tensor.__rtruediv__ = lambda a, b: _tensor(b, a) * a**-1.0
Tensor.__matmul__ = lambda a, b: matmul(a, _tensor(b, a))
Tensor.__rmatmul__ = lambda a, b: matmul(_tensor(b, a), a)
Tensor.__getitem__ = lambda x, index: getitem(x, index=index)
Tensor.sum = lambda x, axis=None, keepdims=False: sum_(x, axis=axis, keepdims=keepdims)
Tensor.exp, Tensor.log, Tensor.tanh = (lambda x: exp(x)), (lambda x: log(x)), (lambda x: tanh(x))
Tensor.reshape = lambda x, *shape: reshape(x, shape=shape)
Tensor.transpose = lambda x, *axes: transpose(x, axes=axes or tuple(range(len(x.shape)))[::-1])
Tensor.T = property(lambda x: x.transpose())
