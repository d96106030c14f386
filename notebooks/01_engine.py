# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/01_engine.ipynb)
#
# # 01 · The engine
#
# Reverse-mode differentiation in forty lines, built from nothing. Then we break it in the four ways in which such
# engines break, see each one caught, and mend it; what is left is `minilora/engine.py`.
#
# **After this you can**
#
# - write an engine that differentiates any expression of `+ * @ tanh sum`
# - say why gradients are added, why each node waits for all its users, and why backward must not recurse
# - sum the gradient of a broadcast array, and see at its shape that somebody did not
# - read a graph: its nodes, its edges, and what is kept at each node
# - say why a node must not hold its inputs, and why operations should be the size of a layer
#
# Read before: nothing but the chain rule. [00](00_tour.ipynb) shows what all of this is for.

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora

# %%
import time
import tracemalloc

import numpy as np

import minilora
from minilora import plots
from minilora.engine import nodes_of
from minilora.memory import kept_bytes
from minilora.tools.exercises import assess
from minilora.tools.gradcheck import gradcheck

rng = np.random.default_rng(0)

# %% [markdown]
# ## The chain rule, backwards
#
# A computation ends in one number $L$. For an array $v$ in it, write $dv = \partial L/\partial v$: it has $v$'s shape.
# If $v$ is used by operations with results $u_1, u_2, \dots$ then
#
# $$dv_j = \sum_{k} \sum_i \frac{\partial u_{k,i}}{\partial v_j}\, du_{k,i} \qquad\text{(B1)}$$
#
# The inner sum is the business of the operation alone: given $dy$ at its result, it gives a gradient for each input.
# That function is called its vjp, for vector-Jacobian product. The outer sum is the business of the engine.
#
# So a value carries a **node**: the nodes of its inputs, and the vjp.


# %%
class Node:
    def __init__(self, parents=(), vjp=None):
        self.parents, self.vjp, self.grad = parents, vjp, None


class Tensor:
    def __init__(self, data, node=None):
        self.data = np.asarray(data)
        self.node = Node() if node is None else node

    def __add__(self, other):
        return Tensor(
            self.data + other.data, Node((self.node, other.node), lambda dy: (dy, dy))
        )

    def __mul__(self, other):
        a, b = self.data, other.data
        return Tensor(a * b, Node((self.node, other.node), lambda dy: (dy * b, dy * a)))

    def __matmul__(self, other):
        a, b = self.data, other.data
        return Tensor(a @ b, Node((self.node, other.node), lambda dy: (dy @ b.T, a.T @ dy)))

    def tanh(self):
        y = np.tanh(self.data)
        return Tensor(y, Node((self.node,), lambda dy: (dy * (1 - y * y),)))

    def sum(self):
        shape = self.data.shape
        return Tensor(
            self.data.sum(), Node((self.node,), lambda dy: (np.broadcast_to(dy, shape),))
        )


# %% [markdown]
# Each vjp in one line of index notation:
#
# - add: $y_i = a_i + b_i$, so $\partial y_i/\partial a_i = 1$ and $da = dy$, $db = dy$
# - mul: $y_i = a_i b_i$, so $da_i = dy_i\, b_i$ and $db_i = dy_i\, a_i$
# - matmul: $y_{ni} = \sum_k a_{nk} b_{ki}$. $a_{nk}$ reaches $y_{ni}$ for every $i$, through $b_{ki}$, so
#   $da_{nk} = \sum_i dy_{ni} b_{ki}$, which is $dy\, b^\top$; in the same way $db = a^\top dy$
# - tanh: $\tanh' = 1 - \tanh^2$, so $da_i = dy_i (1 - y_i^2)$
# - sum: every entry reaches $y$ with factor 1, so each receives $dy$
#
# ## First try: walk down and write
#
# From the loss to its parents, to their parents, and so on.
#
# Is it right? `gradcheck` compares every entry with two numeric gradients. *Central differences* take the slope between
# points on both sides, in the simplest form $(f(x + h) - f(x - h)) / 2h$, and lose digits in the subtraction; the
# *complex step*, $\mathrm{Im}\, f(x + ih) / h$, subtracts nothing and is exact to rounding. The largest error is given
# relative to the largest entry, and its *tolerance*, the most that it may be, is $10^{-7}$ for the one and $10^{-12}$
# for the other.


# %%
def backward_that_overwrites(node, dy=1.0):
    node.grad = dy
    if node.vjp is not None:
        for parent, grad in zip(node.parents, node.vjp(dy), strict=True):
            backward_that_overwrites(parent, grad)


def check(f, arrays, backward, title):
    """Our gradient of f(tensors) against central differences and the complex step."""
    leaves = {name: Tensor(array) for name, array in arrays.items()}
    backward(f(**leaves).node)
    value = lambda **arrays: (
        f(**{name: Tensor(array) for name, array in arrays.items()}).data
    )
    return gradcheck(
        value, {name: leaf.node.grad for name, leaf in leaves.items()}, arrays, title
    )


x, W = rng.standard_normal((4, 3)), rng.standard_normal((3, 2))
print(
    check(
        lambda x, W: (x @ W).tanh().sum(),
        {"x": x, "W": W},
        backward_that_overwrites,
        "tanh(x W)",
    )
)

# %% [markdown]
# It works, so far. Now use a tensor twice.

# %%
report = check(lambda x: (x * x).sum(), {"x": x}, backward_that_overwrites, "x · x")
print(report)

# %%
plots.show(
    plots.gradient_report(report),
    "Both rows for x are marked wrong: relative errors of 0.5, far to the right of the "
    "tolerances",
)

# %% [markdown]
# The derivative of $x^2$ is $2x$, and we got $x$: the second path overwrote the first. The report even says so: off by
# the constant factor 0.5. This is the outer sum of (B1), forgotten. **Gradients are added, never assigned.**
#
# ## Second try: walk down and add


# %%
def backward_along_paths(node, dy=1.0):
    node.grad = dy if node.grad is None else node.grad + dy
    if node.vjp is not None:
        for parent, grad in zip(node.parents, node.vjp(dy), strict=True):
            backward_along_paths(parent, grad)


print(check(lambda x: (x * x).sum(), {"x": x}, backward_along_paths, "x · x"))

# %% [markdown]
# Right. But what does it cost? Here is $y \leftarrow y + y$, again and again; we count the calls of vjp.


# %%
def doubled(n, calls):
    y = Tensor(1.0)
    for _ in range(n):
        y = y + y
        y.node.vjp = lambda dy: (calls.append(1), (dy, dy))[1]
    return y


for n in (4, 8, 12, 16):
    calls = []
    backward_along_paths(doubled(n, calls).node)
    print(f"{n:>2} operations: {len(calls):>6,} calls")

# %% [markdown]
# $2^n - 1$: it walks every *path* from the loss to the leaf, and there are exponentially many. A block of a transformer
# has two residual additions, so a GPT of 12 blocks has at least $2^{24}$ paths.
#
# The mending is in (B1) as well: add up all that arrives at a node, then call its vjp once. A node must wait for all
# its users. An order in which every node comes after its users is a **topological order**, reversed.
#
# ## Third try: in topological order


# %%
def order_by_recursion(node, order, seen):
    if node not in seen:
        seen.add(node)
        for parent in node.parents:
            order_by_recursion(parent, order, seen)
        order.append(node)  # after all its parents
    return order


def backward_in(order):
    order[-1].grad = np.float64(1.0)
    for node in reversed(order):
        if node.vjp is not None:
            for parent, grad in zip(node.parents, node.vjp(node.grad), strict=True):
                parent.grad = grad if parent.grad is None else parent.grad + grad


calls = []
backward_in(order_by_recursion(doubled(16, calls).node, [], set()))
print(len(calls), "calls for 16 operations")

# %% [markdown]
# One call per operation. Now a long chain: a recurrent network over 10,000 steps, or just a sum in a loop.


# %%
def chain(n):
    x = Tensor(1.0)
    y = x
    for _ in range(n):
        y = y + x
    return x, y


x_leaf, y = chain(10_000)
try:
    order_by_recursion(y.node, [], set())
except RecursionError as error:
    print(type(error).__name__, "for a chain of 10,000 additions")

# %% [markdown]
# Python's stack ends at about a thousand calls. Raising the limit only moves the crash. Keep the stack yourself:
#
# ## Fourth try: a stack of our own


# %%
def nodes_below(node):
    order, seen, stack = [], set(), [(node, False)]
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))  # come back to it when its parents are in
            stack.extend((parent, False) for parent in node.parents)
    return order


def backward(node):
    backward_in(nodes_below(node))


backward(y.node)
print("x was used 10,001 times; its gradient is", x_leaf.node.grad)

# %% [markdown]
# That is `nodes_of` and `backward` of `minilora/engine.py`, which also frees what is kept as it goes.
#
# ## Broadcasting
#
# One bug is left. A bias `b (2,)` is added to every row of `x W (4, 2)`.

# %%
b = rng.standard_normal(2)
affine = lambda x, W, b: (x @ W + b).tanh().sum()
print(check(affine, {"x": x, "W": W, "b": b}, backward, "tanh(x W + b)"))

# %% [markdown]
# NumPy stretched `b` in the forward pass, and nobody shrank its gradient. In index form $y_{ni} = z_{ni} + b_i$, and
# $b_i$ is used once by *every* row $n$, so by (B1)
#
# $$db_i = \sum_n dy_{ni} \qquad\text{(B2)}$$
#
# Two things happen when NumPy broadcasts. An axis may be missing at the left: sum over it. An axis of length 1 may be
# stretched: sum over it, and keep it.


# %%
def unbroadcast(grad, shape):
    missing = tuple(range(grad.ndim - len(shape)))
    grad = grad.sum(axis=missing)  # B2
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=stretched, keepdims=True) if stretched else grad  # B2


def add(a, b):
    vjp = lambda dy, s=a.data.shape, t=b.data.shape: (
        unbroadcast(dy, s),
        unbroadcast(dy, t),
    )
    return Tensor(a.data + b.data, Node((a.node, b.node), vjp))


def mul(a, b):
    x, y = a.data, b.data
    vjp = lambda dy: (unbroadcast(dy * y, x.shape), unbroadcast(dy * x, y.shape))
    return Tensor(x * y, Node((a.node, b.node), vjp))


Tensor.__add__, Tensor.__mul__ = add, mul
report = check(
    affine, {"x": x, "W": W, "b": b}, backward, "tanh(x W + b), gradients summed"
)
print(report)

# %%
plots.show(
    plots.gradient_report(report),
    "All six rows, for x, W and b, are marked right and end left of their tolerances",
)

# %% [markdown]
# Worse than a wrong shape is a wrong shape that fits. With a batch of one row, the gradient that nobody summed is
# `(1, 2)`: all its numbers are right, and `b - lr * db` broadcasts without an error to a bias of shape `(1, 2)`. That is
# why the check compares shapes before numbers, and why every method of the library is checked at N = 1 too.
#
# ## The same in minilora
#
# One expression, two engines.


# %%
def expression(x, W, b):
    h = (x @ W + b).tanh()
    return (h * h + h * b).sum()


ours = [Tensor(a) for a in (x, W, b)]
theirs = [minilora.Tensor(a, requires_grad=True) for a in (x, W, b)]
backward(expression(*ours).node)
result = expression(*theirs)
figure = plots.graph(
    result, "tanh(x W + b), used three times", names=dict(zip("xWb", theirs, strict=True))
)
minilora.backward(result)
for name, a, t in zip("xWb", ours, theirs, strict=True):
    print(
        f"d{name}: largest relative difference "
        f"{np.abs(a.node.grad - t.grad).max() / np.abs(t.grad).max():.0e}"
    )

# %%
plots.show(
    figure,
    "The graph from the leaves x, W and b at the top to the sum at the bottom; each box "
    "lists the arrays it keeps",
)

# %% [markdown]
# Green ellipses are leaves, blue boxes operations, and the grey lines below each box are the arrays it keeps. They have
# the operation's own names: `a` is its first input and `b` its second, whatever these are called outside. Count the
# arrows that leave `tanh`: three, so three gradients are added up there. `add` and `sum` keep nothing.
#
# ## A node is not a value
#
# What backward needs is in the vjp, and nothing else. It is tempting to store the input *tensors* in a node, since they
# have the parents' nodes. Then every node keeps its inputs alive, needed or not. `add` needs neither input:


# %%
class HoldingTensor:
    """The tempting way: an operation remembers its inputs."""

    def __init__(self, data, inputs=()):
        self.data, self.inputs = data, inputs

    def __add__(self, other):
        return HoldingTensor(self.data + other.data, (self, other))


def megabytes(make):
    """What the result of ten additions keeps alive beyond the inputs and itself, in MiB."""
    start = make(np.zeros((256, 512)))
    bias = make(np.zeros(512))
    tracemalloc.start()
    y = start
    for _ in range(10):
        y = y + bias
    grown = tracemalloc.get_traced_memory()[0] - y.data.nbytes
    tracemalloc.stop()
    return grown / 2**20


print(f"nodes that hold their inputs: {megabytes(HoldingTensor):.1f} MiB")
print(f"nodes that hold nodes:        {megabytes(Tensor):.1f} MiB")

# %% [markdown]
# Nine intermediate results of 1 MiB, for nothing. For LoRA this decides everything: a frozen layer needs its weight for
# $dx$ but not its input. LoRA-FA, which freezes one of LoRA's two matrices just so that the layer's input need not be
# kept, would save nothing in an engine that holds inputs; notebook 04 measures what it saves here.
#
# ## Operations the size of a layer
#
# Elementary operations are enough for everything. Here is a layer norm made of them, beside minilora's, which is one
# operation with its own derivation (notebook 02).


# %%
def layer_norm(x, g, b, eps=1e-5):
    d = x.shape[1]
    centred = x - x.sum(axis=1, keepdims=True) / d
    variance = (centred * centred).sum(axis=1, keepdims=True) / d
    return centred * (variance + eps) ** -0.5 * g + b


def measure(f):
    leaves = [minilora.Tensor(a, requires_grad=True) for a in (rows, g, b)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        loss = f(*leaves).sum()
        kept = kept_bytes(loss)
        nodes = len(nodes_of(loss))
        minilora.backward(loss)
        seconds.append(time.perf_counter() - start)
    return nodes, kept / 2**20, min(seconds) * 1e3, loss.data


rows, g, b = (
    rng.standard_normal((1024, 256)),
    rng.standard_normal(256),
    rng.standard_normal(256),
)
print(f"{'':<12}{'nodes':>6}{'kept, MiB':>12}{'ms':>8}")
results = []
for name, f in [("elementary", layer_norm), ("one node", minilora.ops.layer_norm)]:
    nodes, kept, ms, value = measure(f)
    results.append(value)
    print(f"{name:<12}{nodes:>6}{kept:>12.1f}{ms:>8.1f}")
print("same result:", np.isclose(*results, rtol=1e-12))

# %% [markdown]
# The counts include the three leaves and the final sum, so the layer norm itself is 12 nodes or one. The elementary
# form keeps two arrays of the input's size where one is enough, and passes over memory many more times.
# And its backward is nowhere to be read. A layer-sized operation is faster, keeps less, and its gradient stands on the
# page. The price: somebody must derive it, and a check must hold it. That is notebook 02.
#
# ## Exercises
#
# The first three answers are vjps, as in the engine above: each takes $dy$ and what forward saw, and returns a tuple, the
# gradient of each input. They are checked by central differences and the complex step.


# %%
def right(forward, vjp, **arrays):
    """Whether vjp(dy, *arrays) is the gradient of the sum of forward(*arrays) · dy."""
    dy = np.random.default_rng(1).standard_normal(np.shape(forward(*arrays.values())))
    grads = dict(zip(arrays, vjp(dy, *arrays.values()), strict=True))
    return bool(gradcheck(lambda **a: (forward(*a.values()) * dy).sum(), grads, arrays))


p, q = rng.standard_normal((3, 4)), 1.0 + rng.random((3, 4))

# %% [markdown]
# **1.** Division, $y = a / b$, for arrays of one shape.


# %%
def division_vjp(dy, a, b):
    """(da, db)"""
    ...


# %%
assess(
    "division_vjp",
    division_vjp,
    (
        "da: y is linear in a, with the factor 1 / b",
        lambda f: np.allclose(f(np.ones((3, 4)), p, q)[0], 1 / q),
    ),
    (
        "db: the slope of 1/b is −1/b², and a stays as a factor",
        lambda f: right(lambda a, b: a / b, f, a=p, b=q),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def division_vjp(dy, a, b):
#     return dy / b, -dy * a / (b * b)
# ```
# </details>
#
# **2.** The mean over the rows, $y_i = \frac1N \sum_n x_{ni}$. It is broadcasting, read backwards.


# %%
def mean_vjp(dy, x):
    """(dx,) for x (N, d) and dy (d,)"""
    ...


# %%
assess(
    "mean_vjp",
    mean_vjp,
    ("a vjp returns a tuple: (dx,)", lambda f: isinstance(f(np.ones(4), p), tuple)),
    ("dx has the shape of x", lambda f: f(np.ones(4), p)[0].shape == p.shape),
    ("each row receives dy / N", lambda f: right(lambda x: x.mean(axis=0), f, x=p)),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mean_vjp(dy, x):
#     return (np.broadcast_to(dy / len(x), x.shape),)
# ```
# </details>
#
# **3.** Rows looked up by index, $y_n = x_{k_n}$, as an embedding does. `index` may name a row twice.


# %%
def rows_vjp(dy, x, index):
    """(dx,) for y = x[index], with dy of y's shape; an index has no gradient"""
    ...


# %%
index = np.array([2, 0, 2, 0, 2])
ones = np.ones((5, 4))
expected = np.zeros((3, 4))
expected[0], expected[2] = 2.0, 3.0
assess(
    "rows_vjp",
    rows_vjp,
    ("a vjp returns a tuple: (dx,)", lambda f: isinstance(f(ones, p, index), tuple)),
    ("dx has the shape of x", lambda f: f(ones, p, index)[0].shape == p.shape),
    (
        "a row that nobody looked up receives nothing",
        lambda f: not f(ones, p, index)[0][1].any(),
    ),
    (
        "row 2 was looked up three times: dx[index] += dy adds only once",
        lambda f: np.allclose(f(ones, p, index)[0], expected),
    ),
    (
        "not right at a random dy",
        lambda f: right(lambda x: x[index], lambda dy, x: f(dy, x, index), x=p),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rows_vjp(dy, x, index):
#     dx = np.zeros_like(x)
#     np.add.at(dx, index, dy)
#     return (dx,)
# ```
# </details>
#
# **4.** The engine itself: from the nodes of a graph, parents before children, and the gradient at the last, return the
# gradient of each node. A node's gradient must be whole before its vjp is called, and each vjp is called once.


# %%
def gradients(order, dy):
    """{node: its gradient}"""
    ...


# %%
def on_a_graph(f, dy=1.0):
    """What f finds for a, b and L on a new graph of L = a² + a³, and its calls of vjps."""
    a = Tensor(3.0)
    b = a * a
    L = b + a * b
    order, calls = nodes_below(L.node), []
    for node in order:
        if node.vjp is not None:
            node.vjp = lambda dy, vjp=node.vjp: (calls.append(1), vjp(dy))[1]
    found = f(order, np.float64(dy))
    return {name: found[t.node] for name, t in [("a", a), ("b", b), ("L", L)]} | {
        "calls": len(calls)
    }


assess(
    "gradients",
    gradients,
    ("the last node receives dy itself", lambda f: on_a_graph(f)["L"] == 1.0),
    ("dL/db = 1 + a = 4: b is used twice", lambda f: on_a_graph(f)["b"] == 4.0),
    ("dL/da = 2a + 3a² = 33", lambda f: on_a_graph(f)["a"] == 33.0),
    ("it scales with dy", lambda f: on_a_graph(f, 2.0)["a"] == 66.0),
    ("call each vjp once: there are three", lambda f: on_a_graph(f)["calls"] == 3),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gradients(order, dy):
#     found = {order[-1]: dy}
#     for node in reversed(order):
#         if node.vjp is not None:
#             for parent, grad in zip(node.parents, node.vjp(found[node])):
#                 found[parent] = found.get(parent, 0.0) + grad
#     return found
# ```
# </details>
