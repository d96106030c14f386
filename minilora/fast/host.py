"""A faster host for a method: its own lines, on the real arrays, with ``@`` computed by products.py.

``a @ b`` in forward and backward becomes ``product(a, b)``. After ``h = x @ G``, ``x @ F + h @ E`` becomes
``chain(x, F, h, G, E)``, which may compute x @ (F + G @ E). The line that assigns dx is left out where nothing below
the layer is trained. The rewritten function keeps the file and the line numbers of the original, so that a debugger
steps through the method's file as before.
"""

import ast
import linecache
from collections import Counter
from functools import cache
from types import CodeType, FunctionType

import numpy as np

from ..adapter import AdaptedLinear
from ..engine import record
from .blocked import empty, rowwise
from .products import chain, product


def host(layer, x):
    """AdaptedLinear.host() with the method's functions rewritten."""
    layer.check(x)
    method, W, b, need_dx = layer.method, layer.base.W.data, layer.base.b, x.requires_grad
    y, saved = rewritten(type(method).forward)(method, x.data, W, layer.p)
    if b is not None:
        y = rowwise(np.add, y, b.data, out=empty(y.shape, y))
    trained = {name: t for name, t in vars(layer.arrays).items() if t.node}
    names = list(trained)

    def vjp(dy, saved):
        backward = rewritten(type(method).backward, None if need_dx else "dx")
        dx, grads = backward(method, dy, saved, layer.base.W.data, layer.p)
        return dx, *(grads[name] for name in names)

    return record(method.name, y, saved, vjp, [x, *trained.values()])


@cache
def rewritten(function, unneeded=None):
    """``function`` with faster products, without the line for ``unneeded``; itself where it cannot be rewritten."""
    code = getattr(function, "__code__", None)
    if code is None or function.__closure__:
        return function  # no function of Python's, or one that stands on more than its text
    source = "".join(linecache.getlines(code.co_filename))
    try:
        tree, original = ast.parse(source), code_of(source, code)
    except SyntaxError:
        return function
    definition = definition_of(tree, code)
    if definition is None or original is None or original.co_code != code.co_code:
        return function  # the file has changed since, or there is none
    Products(definition).visit(definition)
    if unneeded is not None:
        leave_out(definition, unneeded)
    defaults = {"product_": product, "chain_": chain}
    definition.args.kwonlyargs += [ast.arg(name) for name in defaults]
    definition.args.kw_defaults += [None] * len(defaults)
    fast = FunctionType(code_of(ast.fix_missing_locations(tree), code), function.__globals__, function.__name__)
    fast.__defaults__, fast.__kwdefaults__ = function.__defaults__, {**(function.__kwdefaults__ or {}), **defaults}
    return fast


def definition_of(tree, code: CodeType):
    """The definition in a file's ``tree`` that ``code`` was compiled from."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == code.co_name]
    return next((node for node in found if node.lineno == code.co_firstlineno), None)


def code_of(file, code: CodeType):
    """The code of the same function in ``file``, a text or a tree, compiled as a whole: names that it imports count."""
    todo = [compile(file, code.co_filename, "exec")]
    while todo:
        other = todo.pop()
        if (other.co_name, other.co_firstlineno) == (code.co_name, code.co_firstlineno):
            return other
        todo += [constant for constant in other.co_consts if isinstance(constant, CodeType)]
    return None


class Products(ast.NodeTransformer):
    """``a @ b`` as a call; ``x @ F + h @ E``, after the one assignment ``h = x @ G``, as ``chain(x, F, h, G, E)``."""

    def __init__(self, definition):
        self.assigned = Counter(node.id for node in ast.walk(definition) if is_stored(node))
        self.assigned.update(a.arg for a in definition.args.args)
        self.products = {}  # h: x, for each h = x @ G of names that are assigned once; G is then in the variable h_G

    def visit_Assign(self, node):
        target, value = node.targets[0], node.value
        if is_product(value) and isinstance(target, ast.Name) and isinstance(value.left, ast.Name):
            x, h = value.left.id, target.id
            if self.assigned[x] == self.assigned[h] == 1:
                self.products[h] = x
                kept = ast.NamedExpr(ast.Name(f"{h}_G", ast.Store()), self.visit(value.right))
                node.value = call("product_", [value.left, kept], value)
                return node
        return self.generic_visit(node)

    def visit_BinOp(self, node):
        if isinstance(node.op, ast.Add) and is_product(node.left) and is_product(node.right):
            x, h = node.left.left, node.right.left
            if isinstance(x, ast.Name) and isinstance(h, ast.Name) and self.products.get(h.id) == x.id:
                G = ast.Name(f"{h.id}_G", ast.Load())
                F, E = self.visit(node.left.right), self.visit(node.right.right)
                return call("chain_", [x, F, h, G, E], node)
        if is_product(node):
            return call("product_", [self.visit(node.left), self.visit(node.right)], node)
        return self.generic_visit(node)


def call(name, arguments, node):
    return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), arguments, []), node)


def is_stored(node) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def is_product(node) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)


def leave_out(definition, name) -> None:
    """Drop the one assignment of ``name``, and return None for it, where only ``return name, …`` uses it."""
    used = [n for n in ast.walk(definition) if isinstance(n, ast.Name) and n.id == name]
    stores = [s for s in definition.body if isinstance(s, ast.Assign) and is_name(s.targets, name)]
    last = definition.body[-1]
    returned = isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple) and is_name(last.value.elts, name)
    if len(used) == 2 and len(stores) == 1 and returned:
        definition.body.remove(stores[0])
        last.value.elts[0] = ast.copy_location(ast.Constant(None), last.value.elts[0])


def is_name(nodes, name) -> bool:
    return bool(nodes) and isinstance(nodes[0], ast.Name) and nodes[0].id == name


AdaptedLinear.forms["numpy"] = host
