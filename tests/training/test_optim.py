"""AdamW and SGD over one flat buffer move each array as the papers' equations move it alone.
These tests exist because a flat buffer with the wrong slice or rate still trains, only a little worse.
"""

import math

import numpy as np
import pytest

from minilora.backend import to_host
from minilora.engine import Tensor, backward
from minilora.errors import InputError, TrainingStopped
from minilora.nn import Parameter
from minilora.training.optim import AdamW
from minilora.training.schedule import warmup_cosine
from minilora.training.sgd import SGD

pytestmark = pytest.mark.quick

SHAPES = {"W": (3, 4), "b": (3,), "B": (2, 3), "scale": (1,)}
RATES = {"W": 1.0, "b": 1.0, "B": 16.0, "scale": 0.5}


def parameters(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {k: Parameter(rng.standard_normal(s).astype(dtype), lr_scale=RATES[k]) for k, s in SHAPES.items()}


def gradients(steps=20):
    """For each step, a gradient for each array; sizes vary, so that clipping takes hold at some steps."""
    rng = np.random.default_rng(1)
    return [{k: rng.standard_normal(s) * 2.0 ** (step % 5 - 3) for k, s in SHAPES.items()} for step in range(steps)]


def clipped(grads, clip):
    norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
    return {k: g * min(1.0, clip / norm) if clip else g for k, g in grads.items()}


def adamw(params, history, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=None):
    """Kingma & Ba 2014, algorithm 1; the decay as in Loshchilov & Hutter 2017, algorithm 2, w ← w − lr λ w."""
    beta1, beta2 = betas
    for name, w in params.items():
        m, v, rate = np.zeros_like(w), np.zeros_like(w), lr * RATES[name]
        for t, grads in enumerate(history, start=1):
            g = clipped(grads, clip)[name]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            decay = weight_decay if w.ndim == 2 else 0.0
            w = w - rate * m_hat / (np.sqrt(v_hat) + eps) - rate * decay * w
        yield name, w


def sgd(params, history, lr, momentum=0.0, weight_decay=0.0, clip=None):
    for name, w in params.items():
        u, rate = np.zeros_like(w), lr * RATES[name]
        for grads in history:
            u = momentum * u + clipped(grads, clip)[name]
            w = w - rate * u - rate * (weight_decay if w.ndim == 2 else 0.0) * w
        yield name, w


def take(optimizer, params, history):
    """One step for each of the gradients, which arrive as by backward: added to what is there."""
    for grads in history:
        optimizer.zero()
        for name, p in params.items():
            p.node.grad += grads[name]
        optimizer.step()


OPTIONS = [{}, {"weight_decay": 0.1}, {"clip": 1.0}, {"weight_decay": 0.05, "clip": 0.5}]
RUNS = [(AdamW, adamw, o) for o in [*OPTIONS, {"eps": 0.1}, {"betas": (0.5, 0.9)}, {"betas": (0.0, 0.0)}]]
RUNS += [(SGD, sgd, o) for o in [OPTIONS[0], OPTIONS[3], {"momentum": 0.9}, {"momentum": 0.5, **OPTIONS[3]}]]


@pytest.mark.parametrize(("optimizer", "reference", "options"), RUNS)
def test_twenty_steps_equal_the_papers_equations(optimizer, reference, options):
    params, history = parameters(), gradients()
    start = {name: p.data.copy() for name, p in params.items()}
    take(optimizer(params, lr=0.01, **options), params, history)
    for name, expected in reference(start, history, lr=0.01, **options):
        np.testing.assert_allclose(params[name].data, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
def test_dtype_stays(optimizer):
    params = parameters(np.float32)
    o = optimizer(params, lr=np.float64(0.01), weight_decay=0.1, clip=1.0)
    take(o, params, gradients(1))
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    assert {a.dtype for k, a in o.state().items() if k != "t"} == {np.dtype(np.float32)}


def test_backward_adds_into_the_flat_buffer_and_zero_clears_it():
    params = parameters()
    optimizer = SGD(params, lr=0.01)
    x = Tensor(np.ones((1, 4)))
    for times in (1.0, 2.0):  # two passes before one step add up
        backward((x @ params["W"].T + params["b"]).sum())
        np.testing.assert_array_equal(params["W"].grad, np.full((3, 4), times))
        np.testing.assert_array_equal(params["b"].grad, np.full(3, times))
        assert optimizer.grad.sum() == 15 * times
    assert params["W"].data.base is optimizer.data and params["W"].grad.base is optimizer.grad
    assert optimizer.step() == pytest.approx(math.sqrt(15 * 2.0**2), rel=1e-14)
    assert optimizer.grad.sum() == 30  # a step looks at the gradient and leaves it
    optimizer.zero()
    assert not optimizer.grad.any() and not params["W"].grad.any()


@pytest.mark.parametrize(("cls", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_the_state_is_what_the_next_step_depends_on(cls, options):
    """A second optimizer with the parameters and state of the first goes on as the first does."""
    one, other = parameters(), parameters()
    a, b = cls(one, lr=0.01, **options), cls(other, lr=0.01, **options)
    first, second = gradients(2)
    take(a, one, [first])
    b.data[:] = a.data
    b.restore({name: to_host(array) for name, array in a.state().items()})
    take(a, one, [second])
    take(b, other, [second])
    np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize(("size", "moved"), [(10.0, 1.0), (0.1, 0.1)])
def test_a_long_gradient_is_clipped_and_a_step_returns_its_norm_before(size, moved):
    params = {"w": Parameter(np.zeros(4))}
    optimizer = SGD(params, lr=1.0, clip=1.0)
    params["w"].grad[:] = size * np.array([0.5, -0.5, 0.5, -0.5])  # a unit vector
    assert optimizer.step() == pytest.approx(size, rel=1e-14)
    np.testing.assert_allclose(params["w"].data, -moved * np.array([0.5, -0.5, 0.5, -0.5]), rtol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_a_gradient_that_is_not_finite_moves_nothing(cls, bad):
    params = parameters()
    optimizer = cls(params, lr=0.01, weight_decay=0.1, clip=1.0)
    take(optimizer, params, gradients(1))
    before, state = optimizer.data.copy(), {k: a.copy() for k, a in optimizer.state().items()}
    params["B"].grad[1, 2] = bad
    with pytest.raises(TrainingStopped, match=r"norm is (nan|inf); lower the learning rate"):
        optimizer.step()
    np.testing.assert_array_equal(optimizer.data, before)
    assert all(np.array_equal(a, state[k]) for k, a in optimizer.state().items())


REPLACED = {
    "data": lambda p: setattr(p, "data", p.data.copy()),
    "gradient": lambda p: setattr(p.node, "grad", None),
    "frozen": lambda p: p.freeze(),
    "another optimizer": lambda p: AdamW({"p": p}, lr=0.1),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_step_whose_parameters_were_replaced_is_refused(what):
    """As model.to() does: the optimizer's buffer would move, and the model would not."""
    params = parameters()
    optimizer = SGD(params, lr=0.1, weight_decay=0.1)
    REPLACED[what](params["b"])
    before = optimizer.data.copy()
    with pytest.raises(InputError, match=r"make the optimizer after model\.to\(\), adapt\(\) and loading"):
        optimizer.step()
    np.testing.assert_array_equal(optimizer.data, before)


REFUSED = [
    *((AdamW, {name: -1.0}, f"{name} is -1.0") for name in ("lr", "weight_decay", "clip")),
    *((AdamW, {name: math.nan}, f"{name} is nan") for name in ("lr", "weight_decay", "clip")),
    (SGD, {"lr": 0.0}, "lr is 0.0; it must be finite and above 0"),
    (SGD, {"clip": 0.0}, "clip is 0.0; it must be finite and above 0"),
    (SGD, {"weight_decay": math.inf}, "weight_decay is inf; it must be finite and at least 0"),
    (AdamW, {"eps": 0.0}, "eps is 0.0"),
    *((AdamW, {"betas": b}, "AdamW: betas are") for b in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan))),
    *((SGD, {"momentum": m}, f"SGD: momentum is {m}") for m in (1.0, -0.1, math.nan)),
]


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED, ids=str)
def test_a_number_out_of_range_is_refused(cls, options, message):
    with pytest.raises(InputError, match=message):
        cls(parameters(), **{"lr": 0.1, **options})


def test_nothing_to_train_and_mixed_dtypes_are_refused():
    with pytest.raises(InputError, match="every parameter is frozen"):
        SGD({}, lr=0.1)
    params = {"a": Parameter(np.ones(2, np.float32)), "b": Parameter(np.ones(2))}
    with pytest.raises(InputError, match=r"one dtype, got \['float32', 'float64'\]"):
        AdamW(params, lr=0.1)


def test_the_rate_rises_to_its_peak_and_falls_to_the_floor():
    rates = [warmup_cosine(step, 100, lr=2.0, warmup=10, floor=0.2) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-14)  # never 0, not even at first
    falling = 2.0 * (0.6 + 0.4 * np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(rates[10:], falling, rtol=1e-12)


def test_schedule_without_warmup_starts_at_the_peak_and_a_floor_of_one_is_constant():
    assert warmup_cosine(5, 10, lr=1.0) == pytest.approx((1.0 + 0.1) / 2, rel=1e-12)  # the floor is a tenth
    assert {warmup_cosine(step, 10, lr=0.5, floor=1.0) for step in range(10)} == {0.5}
    assert warmup_cosine(0, 1, lr=0.5) == 0.5
    assert [warmup_cosine(step, 4, lr=1.0, warmup=8) for step in range(4)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
