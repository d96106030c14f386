"""Every method, forward, what is kept, backward and the merged weight, by NumPy and by CuPy."""

import numpy as np
import pytest
from twice import DTYPES, TOLERANCE, arrays_of, assert_all_close, assert_close, kept, move

from minilora import methods
from minilora.engine import Saved
from minilora.tools.gradcheck import method_point

pytestmark = [pytest.mark.gpu, pytest.mark.host("both devices in one test")]


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("at_init", [False, True], ids=["random", "initial"])
def test_a_method(cupy, name, dtype, at_init):
    method = methods.create(name, **methods.known(name, r=4))
    x, W, p, _, dy = method_point(method, 40, 48, 32, at_init, seed=0)
    x, W, dy = (a.astype(dtype) for a in (x, W, dy))
    p = Saved((k, a.astype(dtype)) for k, a in p.items())
    seen = []
    for xp in (np, cupy):
        x_, W_, p_, dy_ = move([x, W, p, dy], xp)
        y, saved = method.forward(x_, W_, p_)
        dx, grads = method.backward(dy_, kept(saved), W_, p_)
        seen.append(({"y": y, "dx": dx, "merged": method.merge(W_, p_)}, arrays_of(saved), grads))
    here, there = seen
    for what, a, b in zip(("", "kept", "gradient of"), there, here, strict=True):
        assert_all_close(a, b, TOLERANCE[dtype], what)


@pytest.mark.parametrize("name", methods.names())
def test_what_a_method_does_after_a_step(cupy, name):
    method = methods.create(name, **methods.known(name, r=4))
    _, W, p, _, _ = method_point(method, 40, 48, 32, False, seed=0)
    seen = []
    for xp in (np, cupy):
        W_, p_ = move([W.copy(), Saved((k, a.copy()) for k, a in p.items())], xp)
        method.after_step(W_, p_)
        method.after_step(W_, p_)  # Delta-LoRA's update is of two steps
        seen.append((W_, p_))
    assert_close(seen[1][0], seen[0][0], TOLERANCE[np.float64], "W")
    assert_all_close(seen[1][1], seen[0][1], TOLERANCE[np.float64], "after_step:")
