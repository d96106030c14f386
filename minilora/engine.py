"""The autograd engine: a Tensor is a value, a Node is what the backward pass needs, and backward walks the nodes.

An operation is a pair of functions on plain arrays. Its forward returns the result *and* the arrays that its backward
will need, so that what is kept in memory is written down in one place.
"""

import inspect
from collections import namedtuple
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from .backend import array_module
from .errors import InputError

_recording = ContextVar("minilora_recording", default=True)
_plain = ContextVar("minilora_plain", default=False)


class Node:
    """One step of the backward pass. It holds parent nodes and ``saved``, never an input Tensor.

    A leaf (a Tensor that asks for a gradient) is a Node without ``vjp``; ``grad`` is where its gradient is added up.
    """

    __slots__ = ("grad", "name", "parents", "saved", "vjp")

    def __init__(self, name="leaf", vjp=None, saved=None, parents=()):
        self.name, self.vjp, self.saved, self.parents, self.grad = name, vjp, saved, parents, None


class Saved(dict):
    """The arrays that a forward saved for its backward, or those of a layer: ``saved.x`` is ``saved["x"]``."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(f"there is no array {name!r}; there are {', '.join(self) or 'none'}")


class Tensor:
    """An array (float or complex) and the Node that its gradient arrives at; ``node`` is None for a constant.

    Raises InputError for integer or other data that has no gradient, unless ``integers`` allows integers and booleans.
    """

    __slots__ = ("data", "node")
    __array_ufunc__ = None  # array + Tensor calls Tensor.__radd__, instead of making one object per entry

    def __init__(self, data, requires_grad=False, node=None, integers=False):
        if isinstance(data, list | tuple | float):
            data = np.asarray(data)
        if array_module(data) and data.dtype.kind not in ("fciub" if integers else "fc"):
            raise InputError(f"a Tensor holds floating-point data, got {data.dtype}; use .astype(np.float32) first")
        self.data = data
        self.node = Node() if requires_grad else node

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    grad = property(lambda self: self.node.grad if self.node else None)
    requires_grad = property(lambda self: self.node is not None)

    def __repr__(self):
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, node={self.node.name if self.node else None})"


class Operation:
    """A forward/backward pair on plain arrays, callable on Tensors.

    ``forward(need, *arrays, **constants) -> y, saved`` and ``backward(need, dy, saved) -> one gradient per array``.
    ``need`` has a flag for each array by its name in forward's signature: save and compute only what is asked for.
    ``forms`` {"numpy" or "cupy": (forward, backward)}: faster pairs that compute the same, registered by ``fast/``.
    """

    def __init__(self, forward, backward):
        self.forward, self.backward, self.forms = forward, backward, {}
        self.name = forward.__name__.removesuffix("_forward")
        params = list(inspect.signature(forward).parameters.values())[1:]
        self.Need = namedtuple("Need", [p.name for p in params if p.kind is p.POSITIONAL_OR_KEYWORD])

    def __call__(self, *tensors, **constants) -> Tensor:
        """Raises InputError where dtypes or libraries differ, or shapes do not fit."""
        given = [t.data for t in tensors if t is not None]
        array_module(*given)
        if len({array.dtype for array in given}) > 1:
            raise InputError(f"{self.name}: all inputs need one dtype, got {', '.join(str(a.dtype) for a in given)}")
        need = self.Need(*(t is not None and t.requires_grad and _recording.get() for t in tensors))
        forward, backward = form(self.forms, given[0], (self.forward, self.backward))
        try:
            y, saved = forward(need, *(None if t is None else t.data for t in tensors), **constants)
        except InputError:
            raise
        except ValueError as error:  # NumPy's or CuPy's own error about shapes or axes
            raise InputError(f"{self.name}: {error}") from error
        return record(self.name, y, saved, lambda dy, saved: backward(need, dy, saved), tensors)


def form(forms: dict, array, plain):
    """The faster form for the array's library; ``plain`` if there is none, within plain(), or for complex arrays."""
    if _plain.get() or array.dtype.kind == "c":
        return plain
    return forms.get(array_module(array).__name__, plain)


def plain():
    """A context in which every operation, and the optimizer, uses its plain form: nothing of ``fast/`` runs."""
    return _within(_plain, True)


def no_grad():
    """A context in which no operation is recorded: for evaluation and sampling."""
    return _within(_recording, False)


@contextmanager
def _within(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def record(name, y, saved, vjp, tensors) -> Tensor:
    """The result ``y`` as a Tensor. It gets a node only if one of ``tensors`` wants a gradient."""
    parents = [t.node if t is not None else None for t in tensors]
    if not _recording.get() or not any(parents):
        return Tensor(y)
    kept = Saved((key, value) for key, value in saved.items() if value is not None)
    return Tensor(y, node=Node(name, vjp, kept, parents))


def is_recording() -> bool:
    """False within no_grad()."""
    return _recording.get()


def nodes_of(tensor: Tensor) -> list[Node]:
    """Every node below ``tensor``, parents before children. Iterative: a graph may be deeper than Python's stack."""
    order, seen, stack = [], set(), [(tensor.node, False)]
    while stack:
        node, children_done = stack.pop()
        if children_done:
            order.append(node)
        elif node is not None and id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent in reversed(node.parents))
    return order


def backward(loss: Tensor, dy=None) -> None:
    """Add d(loss)/d(leaf) to the ``grad`` of every leaf below ``loss``; ``saved`` is freed on the way.

    ``dy`` is the gradient that arrives at ``loss``, of its shape; 1 for a scalar.
    Raises InputError for a loss without a graph or that is no scalar, RuntimeError for a second pass.
    """
    for leaf, grad in gradients(loss, dy).items():
        if leaf.grad is None:
            leaf.grad = array_module(grad).array(grad)  # a copy: what outlives the pass shares memory with no other
        else:
            leaf.grad += grad


def gradients(loss: Tensor, dy=None) -> dict[Node, object]:
    """What backward() adds, by leaf, without adding it: passes that run side by side can be summed afterwards."""
    if loss.node is None:
        raise InputError("backward: no input of this result has requires_grad=True, so there is no gradient to compute")
    if dy is None and loss.shape != ():
        raise InputError(f"backward: a result of shape {loss.shape} needs dy of that shape; only a scalar goes without")
    dy = array_module(loss.data).ones_like(loss.data) if dy is None else dy
    if dy.shape != loss.shape or dy.dtype != loss.dtype:
        raise InputError(f"backward: dy is {dy.dtype}{dy.shape}, the result is {loss.dtype}{loss.shape}")
    order = nodes_of(loss)
    if any(node.vjp is _spent for node in order):
        _spent()
    arriving, leaves = {loss.node: dy}, {}
    while order:
        node = order.pop()
        dy = arriving.pop(node)
        if node.vjp is None:
            leaves[node] = dy
            continue
        for parent, grad in zip(node.parents, node.vjp(dy, node.saved), strict=True):
            if parent is not None:  # gradients are added, never assigned: a tensor that is used twice receives twice
                arriving[parent] = arriving[parent] + grad if parent in arriving else grad
        node.vjp, node.saved, node.parents = _spent, None, ()
    return leaves


def _spent(*_):
    raise RuntimeError("backward went through this graph before and freed it; run the forward pass again")
