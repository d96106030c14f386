"""Every method by NumPy and by CuPy: forward, backward, the merged weight, and what happens after a step."""

import numpy as np
import pytest
from twice import TOLERANCE, assert_all_close, each_dtype, move

from minilora import methods
from minilora.engine import Saved
from minilora.tools.gradcheck import method_point

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", methods.names())
@each_dtype
@pytest.mark.parametrize("at_init", [False, True], ids=["random", "initial"])
def test_a_method(cupy, name, dtype, at_init):
    method = methods.create(name, **methods.known(name, r=4))
    x, W, p, _, dy = method_point(method, 40, 48, 32, at_init, seed=0)
    x, W, dy = (a.astype(dtype) for a in (x, W, dy))
    p = Saved((k, a.astype(dtype) if a.dtype.kind == "f" else a) for k, a in p.items())
    seen = []
    for xp in (np, cupy):
        x_, W_, p_, dy_ = move([x.copy(), W.copy(), Saved((k, a.copy()) for k, a in p.items()), dy.copy()], xp)
        y, saved = method.forward(x_, W_, p_)
        dx, grads = method.backward(dy_, Saved((k, v) for k, v in saved.items() if v is not None), W_, p_)
        found = {"y": y, "dx": dx, "merged": method.merge(W_, p_)} | {f"d{k}": grad for k, grad in grads.items()}
        for _ in range(2):  # Delta-LoRA's update is of two steps
            method.after_step(W_, p_)
        seen.append(found | {"W": W_} | {f"{k} after a step": a for k, a in p_.items()})
    assert_all_close(seen[1], seen[0], TOLERANCE[dtype], name)
