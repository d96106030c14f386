"""The faster host computes what the plain one computes, for every method, and calls the method with its real arrays."""

import itertools
import sys
import textwrap

import numpy as np
import pytest

from minilora import methods
from minilora.adapter import AdaptedLinear
from minilora.engine import Tensor, backward, plain
from minilora.fast import host as fast
from minilora.fast.products import chain, product
from minilora.nn import Linear

pytestmark = pytest.mark.quick
every_method = pytest.mark.parametrize("name", methods.names())


def random(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def layer_of(method, d_out, d_in, dtype):
    """A layer with a bias, every trained array off its start."""
    base = Linear(random(d_out, d_in, dtype=dtype), random(d_out, dtype=dtype))
    shared = method.init_shared([(d_out, d_in)], np.random.default_rng(0))
    shared = {k: Tensor(np.asarray(a, dtype)) for k, a in shared.items()}
    layer = AdaptedLinear(base, method, 0, shared)
    for i, p in enumerate(layer.arrays.trainable().values()):
        p.data = p.data + 0.3 * random(*p.shape, seed=i, dtype=dtype)
    return layer


def passed(layer, x, need_dx=True):
    """(y, saved, dx, gradients) of one pass."""
    for p in layer.arrays.trainable().values():
        p.node.grad = None
    leaf = Tensor(x, requires_grad=need_dx)
    y = layer(leaf)
    saved = {k: v for k, v in y.node.saved.items() if isinstance(v, np.ndarray)}
    backward(y, random(*y.shape, seed=7, dtype=x.dtype))
    return y.data, saved, leaf.grad, {k: p.grad for k, p in layer.arrays.trainable().items()}


@every_method
@pytest.mark.parametrize(("N", "d_out", "d_in"), [(300, 24, 40), (256, 300, 70), (1, 6, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 5e-5)])
def test_it_equals_the_plain_host(name, N, d_out, d_in, dtype, tolerance):
    layer = layer_of(methods.create(name, **methods.known(name, r=3)), d_out, d_in, dtype)
    x = random(N, d_in, seed=3, dtype=dtype)
    for need_dx in (True, False):
        with plain():
            y, saved, dx, grads = passed(layer, x, need_dx)
        fast_y, fast_saved, fast_dx, fast_grads = passed(layer, x, need_dx)
        close(fast_y, y, tolerance)
        assert fast_saved.keys() == saved.keys() and fast_grads.keys() == grads.keys()
        for k in saved:
            close(fast_saved[k], saved[k], tolerance)
        for k in grads:
            close(fast_grads[k], grads[k], tolerance)
        assert (fast_dx is None) == (dx is None) == (not need_dx)
        if need_dx:
            close(fast_dx, dx, tolerance)


@every_method
def test_both_functions_of_every_method_are_rewritten(name):
    for function in (methods.get(name).forward, methods.get(name).backward):
        rewritten = fast.rewritten(function)
        assert rewritten is not function and "product_" in rewritten.__kwdefaults__
        assert rewritten.__code__.co_filename == function.__code__.co_filename
        assert rewritten.__code__.co_firstlineno == function.__code__.co_firstlineno


def test_the_method_sees_its_real_arrays_line_by_line():
    """What a reader prints in lora.py's forward has the shapes and values that its docstring states."""
    layer, x, seen = layer_of(methods.create("lora", r=3), 24, 40, np.float64), random(300, 40, seed=3), {}
    file = methods.get("lora").forward.__code__.co_filename

    def trace(frame, event, argument):
        if frame.f_code.co_filename == file and event == "return" and frame.f_code.co_name == "forward":
            seen.update(frame.f_locals)
        return trace

    sys.settrace(trace)
    try:
        y = layer(Tensor(x))
    finally:
        sys.settrace(None)
    assert seen["x"] is x and seen["W"] is layer.base.W.data and seen["W"].shape == (24, 40)
    assert type(seen["y"]) is np.ndarray and seen["y"].shape == (300, 24) and seen["h"].shape == (300, 3)
    np.testing.assert_allclose(y.data, seen["y"] + layer.base.b.data, rtol=1e-12)


def method_from(tmp_path, body, name="probe"):
    """The Adapter class of a file whose forward and backward are ``body``."""
    source = "from dataclasses import dataclass\nimport numpy as np\nfrom minilora.adapter import Adapter\n\n\n"
    source += "@dataclass(frozen=True)\nclass Probe(Adapter):\n" + textwrap.indent(body, "    ")
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    namespace = {"__name__": f"minilora.methods.{name}"}
    module = sys.modules.setdefault(namespace["__name__"], type(sys)(namespace["__name__"]))
    exec(compile(source, str(path), "exec"), vars(module))
    return module.Probe, path


PROBE = """
def forward(self, x, W, p):
    h = x @ W.T
    x = 2.0 * x
    y = x @ W.T + h @ np.eye(len(W))
    return y, {"x": x}

def backward(self, dy, saved, W, p):
    dx = 3.0 * (dy @ W)
    return dx, {}

def uses_dx(self, dy, saved, W, p):
    dx = dy @ W
    return dx, {"a": dx.sum(axis=0)}
"""


def test_lines_that_cannot_be_taken_together_or_left_out_are_not(tmp_path):
    """x changes between h = x @ G and x @ F + h @ E, so that the sum is not x @ (F + G @ E); a line may use dx."""
    cls, _ = method_from(tmp_path, PROBE)
    x, dy, W = random(50, 4), random(50, 3), random(3, 4)
    forward = fast.rewritten(cls.forward)
    assert forward is not cls.forward
    np.testing.assert_allclose(forward(cls(), x, W, {})[0], cls().forward(x, W, {})[0], rtol=1e-12)
    assert fast.rewritten(cls.backward, "dx")(cls(), dy, {}, W, {})[0] is None
    dx, grads = fast.rewritten(cls.uses_dx, "dx")(cls(), dy, {}, W, {})
    np.testing.assert_array_equal(grads["a"], dx.sum(axis=0))


def test_a_file_that_has_changed_since_and_code_with_super_run_as_they_are(tmp_path):
    cls, path = method_from(tmp_path, "def forward(self, x, W, p):\n    return x @ W.T, {}\n", "changed")
    path.write_text(path.read_text().replace("x @ W.T", "x @ W.T + 1.0"))

    class Child(methods.get("lora")):
        def forward(self, x, W, p):
            return super().forward(x, W, p)

    for function in (cls.forward, Child.forward, len):
        assert fast.rewritten(function) is function


SIZES = [(640, 200, 8), (640, 8, 300), (8, 6400, 40), (1000, 3, 700), (7, 5, 3), (200, 200, 200)]


@pytest.mark.parametrize("shape", SIZES)
def test_a_product_of_any_shape_and_layout(shape):
    M, K, N = shape
    for turn_a, turn_b in itertools.product([False, True], repeat=2):  # a C-contiguous array, and a view of one
        a, b = random(K, M).T if turn_a else random(M, K), random(N, K).T if turn_b else random(K, N)
        close(product(a, b), a @ b, 1e-12)
        close(product(a.astype(np.float32), b.astype(np.float32)), (a @ b).astype(np.float32), 1e-4)


def test_what_is_no_plain_product_is_left_to_numpy():
    a, b = random(640, 200), random(200, 8)
    for x, y in ((a[None], b), (a, b[:, 0]), (a.astype(complex), b), (a.astype(np.float32), b)):
        np.testing.assert_array_equal(product(x, y), x @ y)
    with pytest.raises(ValueError, match="mismatch"):
        product(a, b[1:])


@pytest.mark.parametrize("N", [3, 500])
def test_a_chain_is_the_sum_of_its_products(N):
    x, F, G, E = random(N, 40), random(40, 24), random(40, 3), random(3, 24)
    close(chain(x, F, x @ G, G, E), x @ F + (x @ G) @ E, 1e-12)
