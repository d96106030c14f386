"""What the host does for speed gives the method's own results: the shortcut through merge, and thin products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Tensor, adapt, backward, methods
from minilora.adapter import AdaptedLinear
from minilora.engine import Saved
from minilora.fast import thin
from minilora.fast.shortcut import Shortcut, shortcut
from minilora.nn import Linear, Module

pytestmark = pytest.mark.quick
every_method = pytest.mark.parametrize("name", methods.names())


def layer(name, N, d_out=96, d_in=64, dtype=np.float64, seed=0):
    """(adapted layer with every array random, x, dy) with enough rows, or too few, for the shortcut."""
    rng = np.random.default_rng(seed)
    method = methods.create(name, **methods.known(name, r=4))
    W, bias = rng.standard_normal((d_out, d_in)).astype(dtype), rng.standard_normal(d_out).astype(dtype)
    shared = {k: Tensor(v.astype(dtype)) for k, v in method.init_shared([W.shape], rng).items()}
    host = AdaptedLinear(Linear(W, bias), method, seed, shared)
    for p in host.arrays.trainable().values():
        p.data = p.data + rng.standard_normal(p.shape).astype(dtype)
    return host, rng.standard_normal((N, d_in)).astype(dtype), rng.standard_normal((N, d_out)).astype(dtype)


@every_method
@pytest.mark.parametrize("N", [128, 192, 97, 96, 95, 1])
def test_the_host_gives_the_method_s_own_results_for_any_number_of_rows(name, N):
    host, x, dy = layer(name, N)
    W, p, input = host.base.W.data, host.p, Tensor(x, requires_grad=True)
    y = host(input)
    own_y, saved = host.method.forward(x, W, p)
    np.testing.assert_allclose(y.data, own_y + host.base.b.data, rtol=1e-11, atol=1e-11)
    assert {k: type(a) for k, a in y.node.saved.items()} == dict.fromkeys(saved, type(input.data))
    for key in saved:
        np.testing.assert_allclose(y.node.saved[key], saved[key], rtol=1e-11, atol=1e-11)
    dx, grads = host.method.backward(dy, Saved(saved), W, p)
    backward(y, dy)
    np.testing.assert_allclose(input.grad, dx, rtol=1e-10, atol=1e-10)
    for key, parameter in host.arrays.trainable().items():
        assert type(parameter.grad) is type(parameter.data)
        np.testing.assert_allclose(parameter.grad, grads[key], rtol=1e-10, atol=1e-10)


@every_method
def test_no_dx_where_nobody_wants_it(name):
    """The input of the first layer asks for no gradient; the trained arrays get theirs all the same."""
    host, x, dy = layer(name, 128)
    y = host(Tensor(x))
    saved, W, p = Saved(y.node.saved), host.base.W.data, host.p
    if shortcut(host.method):
        assert shortcut(host.method).backward(dy, saved, W, p, need_dx=False)[0] is None
    backward(y, dy)
    _, grads = host.method.backward(dy, saved, W, p)
    for key, parameter in host.arrays.trainable().items():
        np.testing.assert_allclose(parameter.grad, grads[key], rtol=1e-10, atol=1e-10)


@every_method
def test_float32_stays_float32_and_keeps_what_the_method_keeps(name):
    host, x, _ = layer(name, 128, dtype=np.float32)
    y = host(Tensor(x, requires_grad=True))
    own = host.method.forward(x, host.base.W.data, host.p)[1]
    assert y.dtype == np.float32
    assert sum(a.nbytes for a in y.node.saved.values()) == sum(a.nbytes for a in own.values())


def test_which_methods_take_it():
    """LoRA and its relatives do; DoRA, which keeps z and needs the norm of every row, is found not to."""
    taken = {name for name in methods.names() if shortcut(methods.create(name))}
    assert {"lora", "lora_fa", "vera", "full"} <= taken
    assert not {"dora", "dora_detached"} & taken


def test_a_method_for_which_it_is_wrong_is_found_out(monkeypatch):
    """Not a declaration but a trial: a LoRA whose h looks at W's outputs must be refused."""
    lora = methods.get("lora")

    class Odd(lora):
        def forward(self, x, W, p):
            y, saved = super().forward(x, W, p)
            return y, {**saved, "h": saved["h"] * (1 + W.shape[0])}

    class Wrong(lora):
        def backward(self, dy, saved, W, p):
            dx, grads = super().backward(dy, saved, W, p)
            return dx, {**grads, "A": grads["A"] * (1 + p.A.shape[1])}

    class Raises(lora):
        def forward(self, x, W, p):
            p.B[0]
            return super().forward(x, W, p)

    assert isinstance(shortcut(lora(r=2)), Shortcut)
    assert shortcut(Odd(r=2)) is None
    assert shortcut(Wrong(r=2)) is None
    assert shortcut(Raises(r=2)) is None


def test_any_rank_may_take_it():
    for name in ("lora", "pissa", "vera"):
        assert all(shortcut(methods.create(name, r=r)) for r in (1, 11, 13, 16, 17, 19, 24, 32, 100))


def test_ranks_of_the_trial_s_sizes_are_harmless():
    for r in (11, 13, 17, 19):
        host, x, _ = layer("lora", 128)
        host.method = methods.create("lora", r=4, alpha=float(r))
        y = host(Tensor(x))
        np.testing.assert_allclose(
            y.data, host.method.forward(x, host.base.W.data, host.p)[0] + host.base.b.data, rtol=1e-11, atol=1e-11
        )
        net = Module()
        net.one = Linear(np.random.default_rng(0).standard_normal((32, 24)))
        adapt(net, "lora", verbose=False, r=r)
        assert np.isfinite(net.one(Tensor(np.ones((64, 24)))).data).all()


# ---------------------------------------------------------------------------------------------------- thin products

rows = st.sampled_from([1, 3, 63, 64, 65, 128, 192])
thin_or_not = st.sampled_from([0, 1, 2, 8, 32, 33, 64, 128])


@settings(max_examples=150, deadline=None)
@given(
    M=rows,
    K=thin_or_not,
    N=thin_or_not,
    dtype=st.sampled_from([np.float32, np.float64, np.complex128]),
    seed=st.integers(0, 9),
    small=st.sampled_from([0, 2000, 10**6]),  # what counts as small enough to be left whole, or in stacks of 64
)
def test_a_thin_product_is_the_product(M, K, N, dtype, seed, small):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == np.float32 else {"rtol": 1e-11, "atol": 1e-11}
    for a, b in (
        (draw(M, K), draw(K, N)),
        (draw(M, K), draw(N, K).T),
        (draw(M, K).T, draw(M, N)),
        (draw(K, M), draw(M, N)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thin, "SMALL", small)
            result = thin.product(a, b)
        assert result.shape == (a.shape[0], b.shape[1]) and result.dtype == dtype
        np.testing.assert_allclose(result, a @ b, **tolerance)


def test_rows_share_memory_and_multiply_from_both_sides():
    x, A = np.random.default_rng(0).standard_normal((128, 64)), np.random.default_rng(1).standard_normal((4, 64))
    view = thin.rows(x)
    assert np.shares_memory(view, x) and type(thin.plain(view)) is np.ndarray
    np.testing.assert_allclose(thin.plain(view @ A.T), x @ A.T, rtol=1e-12)
    np.testing.assert_allclose(thin.plain(A @ view.T), A @ x.T, rtol=1e-12)
    np.testing.assert_allclose(thin.plain(view.T @ (view @ A.T)), x.T @ (x @ A.T), rtol=1e-12)


def test_the_short_way_is_taken(monkeypatch):
    """Otherwise the equality above would say nothing: a stack of short products is what runs."""
    seen, right = [], np.ndarray.reshape

    class Spy(np.ndarray):
        def reshape(self, *shape):
            seen.append(shape)
            return right(self.view(np.ndarray), *shape)

    a, b = np.ones((4096, 64)).view(Spy), np.ones((64, 4))
    thin.product(a, b)
    assert (64, thin.ROWS, 64) in seen
    thin.product(np.ones((1024, 4096)).view(Spy), np.ones((4096, 4)))  # 64 rows would be more than a million products
    assert (32, 32, 4096) in seen
    seen.clear()
    thin.product(a[:128], b)  # small as it is
    assert not seen


def test_shapes_that_do_not_fit_are_numpy_s_error():
    with pytest.raises(ValueError):
        thin.product(np.ones((128, 5)), np.ones((4, 3)))
