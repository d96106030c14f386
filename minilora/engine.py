"""The autograd engine: a Tensor is a value, a Node is what the backward pass needs, and backward walks the nodes.

An operation is a pair of functions on plain arrays. Its forward returns the result *and* what its backward will
need, so whatever is kept in memory is written down in one place and can be read, counted and freed.
"""

import inspect
from collections import namedtuple
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from .backend import array_module
from .errors import InputError

_recording = ContextVar("minilora_recording", default=True)


class Node:
    """One step of the backward pass. It holds parent nodes and ``saved``, never an input Tensor.

    A leaf (a Tensor that asks for a gradient) is a Node without ``vjp``; ``grad`` is where its gradient is added up.
    """

    __slots__ = ("grad", "name", "parents", "saved", "vjp")

    def __init__(self, name="leaf", vjp=None, saved=None, parents=()):
        self.name, self.vjp, self.saved, self.parents, self.grad = name, vjp, saved, parents, None


class Saved(dict):
    """What a forward kept for its backward, or a layer's arrays: ``saved.x`` is ``saved["x"]``."""

    __getattr__ = dict.__getitem__


class Again:
    """Stands in ``saved`` for the result of an operation that is computed again when backward asks for it.

    The result then stays with the operation's own node, so that it is computed once for all who ask.
    """

    __slots__ = ("compute", "node")

    def __init__(self, compute, node):
        self.compute, self.node = compute, node

    def __call__(self):
        saved = self.node.saved
        if "again" not in saved:
            saved.update((k, v()) for k, v in [*saved.items()] if isinstance(v, Again))
            saved["again"] = self.compute(saved)
        return saved["again"]


class Tensor:
    """An array (float or complex) and the Node that its gradient arrives at; ``node`` is None for a constant.

    ``again`` is set where the array need not be kept, because its operation computes it again for who wants it.
    Raises InputError for integer or other data that has no gradient; with ``integers``, integers and booleans will do.
    """

    __slots__ = ("again", "data", "node")
    __array_ufunc__ = None  # array + Tensor is the Tensor's affair, not one object for each entry

    def __init__(self, data, requires_grad=False, node=None, integers=False):
        if isinstance(data, list | tuple | float):
            data = np.asarray(data)
        if array_module(data) and data.dtype.kind not in ("fciub" if integers else "fc"):
            raise InputError(f"a Tensor holds floating-point data, got {data.dtype}; use .astype(np.float32) first")
        self.data, self.again = data, None
        self.node = Node() if requires_grad else node

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    grad = property(lambda self: self.node.grad if self.node else None)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def __repr__(self):
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, node={self.node.name if self.node else None})"


class Operation:
    """A forward/backward pair on plain arrays, callable on Tensors.

    ``forward(need, *arrays, **constants) -> y, saved`` and ``backward(need, dy, saved) -> one gradient per array``.
    ``need`` has a flag for each array by its name in forward's signature: keep and compute only what is asked for.
    ``again(saved) -> y``, where there is one, is for a call with the constant ``recompute``: nobody then keeps y.
    """

    def __init__(self, forward, backward, again=None):
        self.forward, self.backward, self.again = forward, backward, again
        self.name = forward.__name__.removesuffix("_forward")
        params = list(inspect.signature(forward).parameters.values())[1:]
        self.Need = namedtuple("Need", [p.name for p in params if p.kind is p.POSITIONAL_OR_KEYWORD])

    def __call__(self, *tensors, **constants) -> Tensor:
        """Raises InputError where dtypes or libraries differ, or shapes do not fit."""
        given = [t for t in tensors if t is not None]
        xp = array_module(*(t.data for t in given))
        if len({t.dtype for t in given}) > 1:
            raise InputError(f"{self.name}: all inputs need one dtype, got {', '.join(str(t.dtype) for t in given)}")
        need = self.Need(*(t is not None and t.requires_grad and _recording.get() for t in tensors))
        forward, vjp, again = self.parts(xp, given[0].dtype)
        try:
            y, saved = forward(need, *(None if t is None else t.data for t in tensors), **constants)
        except InputError:
            raise
        except ValueError as error:  # the array library's word on shapes and axes
            raise InputError(f"{self.name}: {error}") from error
        result = record(self.name, y, saved, lambda dy, saved: vjp(need, dy, saved), tensors)
        if again and constants.get("recompute") and result.node:
            result.again = Again(again, result.node)
        return result

    def parts(self, xp, dtype):
        """(forward, backward, again): on a GPU, where there are any, those that take few launches and mean the same."""
        if xp is not np and dtype.kind != "c":
            from .fast.fused import AGAIN, FUSED

            if self.name in FUSED:
                return *FUSED[self.name], AGAIN.get(self.name)
        return self.forward, self.backward, self.again


def record(name, y, saved, vjp, tensors) -> Tensor:
    """The result ``y`` as a Tensor; a node is made only where a gradient is wanted below it."""
    parents = [t.node if t is not None else None for t in tensors]
    if not _recording.get() or not any(parents):
        return Tensor(y)
    again = {id(t.data): t.again for t in tensors if t is not None and t.again}
    kept = Saved((k, again.get(id(v), v)) for k, v in saved.items() if v is not None)
    return Tensor(y, node=Node(name, vjp, kept, parents))


def is_recording() -> bool:
    """False within no_grad()."""
    return _recording.get()


@contextmanager
def no_grad():
    """Within this context no operation is recorded: for evaluation and sampling."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


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
        saved = Saved((k, v() if isinstance(v, Again) else v) for k, v in node.saved.items())
        for parent, grad in zip(node.parents, node.vjp(dy, saved), strict=True):
            if parent is not None:  # gradients are added, never assigned: a tensor that is used twice receives twice
                arriving[parent] = arriving[parent] + grad if parent in arriving else grad
        node.vjp, node.saved, node.parents = _spent, None, ()
    return leaves


def _spent(*_):
    raise RuntimeError("backward went through this graph before and freed it; run the forward pass again")
