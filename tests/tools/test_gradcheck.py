"""The checker passes what is right, fails what is wrong, and its guess names the mistake.
These tests exist because a checker that cannot fail is worse than none: each mistake here is made on purpose.
"""

import json
import re

import numpy as np
import pytest

from minilora.engine import Operation, Tensor
from minilora.errors import InputError
from minilora.gpt import GPT, GPTConfig
from minilora.methods.lora import LoRA
from minilora.nn import Module, Parameter
from minilora.surgery import adapt
from minilora.tools import gradcheck as module
from minilora.tools.gradcheck import MAX_ENTRIES, check_method, check_methods, check_model, check_operation, gradcheck
from minilora.training.sgd import SGD

pytestmark = pytest.mark.quick


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def rows(report, array):
    return [row for row in report.rows if row.array == array]


# -------------------------------------------------------------------------------- LoRA with mistakes


class Wrong(LoRA):
    """LoRA whose backward is changed by ``mistake``, a function of (grads, dx, dy, saved, W, p) -> (dx, grads)."""

    mistake = None

    def backward(self, dy, saved, W, p):
        dx, grads = super().backward(dy, saved, W, p)
        return type(self).mistake(dx, dict(grads), dy, saved, W, p)


def wrong(mistake, **options):
    return type("Mutant", (Wrong,), {"mistake": staticmethod(mistake)})(**{"r": 3, "alpha": 6.0, **options})


def change(name, f):
    """The mistake that puts ``f(gradient)`` in the place of the gradient of ``name``."""
    return lambda dx, grads, *_: (f(dx), grads) if name == "x" else (dx, {**grads, name: f(grads[name])})


def without_a_path(dx, grads, dy, saved, W, p):
    return dy @ W, grads  # dx through the adapter is forgotten: + dh A


def another_batch(dx, grads, dy, saved, W, p):
    return dx, {**grads, "A": (dy @ (2.0 * p.B)).T @ saved.x[::-1]}  # s is alpha / r, 2


MISTAKES = {
    "sign of dA": (change("A", np.negative), "A", "the sign is flipped"),
    "sign of dx": (change("x", np.negative), "x", "the sign is flipped"),
    "factor in dB": (change("B", lambda g: 0.125 * g), "B", "off by a constant factor 0.125:"),
    "factor in dA": (change("A", lambda g: 3.0 * g), "A", "off by a constant factor 3:"),
    "dB is zero": (change("B", np.zeros_like), "B", "zero everywhere"),
    "dA is not finite": (change("A", lambda g: g / np.where(g == g.max(), 0.0, 1.0)), "A", "not finite"),
    "dA transposed": (change("A", np.transpose), "A", r"\(7, 3\), the transpose of it; it must have .* \(3, 7\)"),
    "dB of another shape": (change("B", lambda g: g[:, :1]), "B", r"shape \(6, 1\); it must have .* \(6, 3\)"),
    "dx lacks a term": (without_a_path, "x", "a term of .* is missing or wrong"),
    "dB has noise": (change("B", lambda g: 5.0 * g[::-1] + g[:, ::-1]), "B", "no simple pattern"),
    "x is that of another batch": (another_batch, "A", "missing or wrong|no simple pattern"),
    "dA is a little off": (change("A", lambda g: g + 1e-5 * np.abs(g).mean()), "A", "almost right"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_each_mistake_fails_and_is_guessed(name):
    mistake, array, message = MISTAKES[name]
    assert check_method(LoRA(r=3, alpha=6.0))
    report = check_method(wrong(mistake))
    assert not report
    assert {row.array for row in report.rows if not row.ok} == {array}
    for row in rows(report, array):
        assert re.search(message, row.advice)


@pytest.mark.parametrize(("array", "sizes"), [("A", {"r": 7}), ("B", {"r": 6})])
def test_a_square_gradient_that_is_transposed_is_guessed(array, sizes):
    report = check_method(wrong(change(array, np.transpose), **sizes), d_in=7, d_out=8 if array == "A" else 6)
    assert {row.array for row in report.rows if not row.ok} == {array}
    assert all("transposed" in row.advice for row in rows(report, array))


def test_an_error_in_the_blind_spot_shows_only_off_the_initial_point():
    """This is why a method is checked at a random point too: seven times zero is zero."""
    seven_times = wrong(change("A", lambda g: 7.0 * g))
    report = check_method(seven_times, at_init=True)
    assert report
    assert all(("blind spot" in row.advice) == (row.array == "A") for row in report.rows)
    report = check_method(seven_times)
    assert not report
    assert all("constant factor 7:" in row.advice for row in rows(report, "A"))


def test_a_method_is_checked_by_both_ways_unless_it_is_not_holomorphic():
    assert {row.method for row in check_method(LoRA(r=3)).rows} == {"central", "complex"}
    assert {row.method for row in check_method(LoRA(r=3), complex_step=False).rows} == {"central"}
    stepped = type("Mutant", (LoRA,), {"holomorphic": False})(r=3)
    assert {row.method for row in check_method(stepped).rows} == {"central"}


def test_a_rank_that_does_not_fit_and_a_gradient_too_few_or_too_many_are_errors():
    with pytest.raises(InputError, match=r"r=7 is larger than this layer allows, \(6, 7\): at most 6"):
        check_method(LoRA(r=7))
    for mistake in (lambda dx, grads, *_: (dx, {"A": grads["A"]}), lambda dx, grads, *_: (dx, {**grads, "C": dx})):
        with pytest.raises(InputError, match=r"backward returns gradients for .*, trainable are \['A', 'B'\]"):
            check_method(wrong(mistake))


def test_methods_are_checked_at_and_off_the_initial_point_and_at_edges():
    reports = check_methods(["full", "lora"])
    assert all(reports)
    titles = [report.title for report in reports]
    assert len(titles) == 3 + 3 * 3  # at the random point, at the start, N = 1; for LoRA at three ranks
    assert sum("initial point" in title for title in titles) == sum("x (1, 7)" in title for title in titles) == 4


# -------------------------------------------------------------------------------- any function


def cubic(x, c):
    """Its gradient with respect to x is 3 c x², to c is x³."""
    return (c * x**3).sum()


POINT = {"x": normal(3, 4), "c": normal(4)}
RIGHT = {"x": 3 * POINT["c"] * POINT["x"] ** 2, "c": (POINT["x"] ** 3).sum(axis=0)}


def test_a_right_gradient_passes_by_both_methods():
    report = gradcheck(cubic, RIGHT, POINT, "cubic")
    assert report
    assert [(row.array, row.method) for row in report.rows] == [(a, m) for a in "xc" for m in ("central", "complex")]
    assert all(row.error <= (1e-7 if row.method == "central" else 1e-12) for row in report.rows)
    assert report.worst_error == max(row.error for row in report.rows)
    assert [row.method for row in gradcheck(cubic, RIGHT, POINT, complex_step=False).rows] == ["central", "central"]
    for gradient, right in ((6.0, True), (5.0, False)):  # of a scalar
        assert bool(gradcheck(lambda x: x * x, {"x": np.array(gradient)}, {"x": np.array(3.0)})) is right


def test_the_complex_step_sees_what_central_differences_cannot():
    """An error of 1e-10 drowns in the rounding of a difference, and stands out where nothing is subtracted."""
    nearly = {"x": RIGHT["x"] * (1.0 + 1e-10)}
    assert gradcheck(cubic, nearly, POINT, complex_step=False)
    assert [row.method for row in gradcheck(cubic, nearly, POINT).rows if not row.ok] == ["complex"]


def test_a_gradient_of_zero_is_right_and_a_blind_spot():
    zero = gradcheck(lambda x, c: (c**2).sum(), {"x": np.zeros((3, 4))}, POINT)
    assert zero
    assert all("blind spot" in row.advice for row in zero.rows)
    report = gradcheck(lambda x, c: (c**2).sum(), {"x": np.ones((3, 4))}, POINT)
    assert not report
    assert all("does not depend on this array" in row.advice for row in report.rows)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_gradient_of_zero_that_only_rounding_hides_is_right_too(size):
    """A row of a softmax sums to 1 whatever its scores: the numeric gradient is noise, with no scale of its own."""

    def rows_of_ones(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return size * (e / e.sum(axis=1, keepdims=True)).sum()

    report = gradcheck(rows_of_ones, {"x": np.zeros((3, 4))}, {"x": POINT["x"]})
    assert report, report


@pytest.mark.parametrize("added", [0.5, np.nan, np.inf])
def test_the_worst_entry_is_named_with_both_values(added):
    off = RIGHT["x"].copy()
    off[2, 1] += added
    for row in gradcheck(cubic, {"x": off}, POINT).rows:
        assert not row.ok and row.worst == (2, 1)
        if np.isfinite(added):
            assert row.analytic == off[2, 1]
            assert row.numeric == pytest.approx(RIGHT["x"][2, 1], rel=1e-7)
            assert row.error == pytest.approx(0.5 / np.abs(RIGHT["x"]).max(), rel=1e-6)
        else:
            assert "not finite" in row.advice


# -------------------------------------------------------------------------------- large arrays

LARGE = {"x": normal(52, 40)}


def squares(x):
    return (x * x).sum()


def test_a_large_array_is_checked_along_directions_which_catch_one_wrong_entry():
    assert LARGE["x"].size > MAX_ENTRIES
    calls = []

    def counted(x):
        calls.append(x.shape)
        return squares(x)

    report = gradcheck(counted, {"x": 2 * LARGE["x"]}, LARGE)
    assert report
    assert module.DIRECTIONS * (2 + 1) <= len(calls) < LARGE["x"].size / 10  # central: two calls; complex: one
    assert all(len(row.worst) == 1 for row in report.rows)  # the direction's number
    off = 2 * LARGE["x"]
    off[7, 3] += 1.0
    assert not any(row.ok for row in gradcheck(squares, {"x": off}, LARGE).rows)


# -------------------------------------------------------------------------------- what is refused


def test_a_function_that_is_not_holomorphic_is_refused_or_fails_the_complex_step():
    def lengths(x, c):
        return np.abs(x).sum()

    grads = {"x": np.sign(POINT["x"])}
    with pytest.raises(InputError, match="drops the imaginary part of x; use complex_step=False"):
        gradcheck(lengths, grads, POINT)
    assert gradcheck(lengths, grads, POINT, complex_step=False)

    def half(x, c):
        return (x * np.abs(x)).sum()  # complex in, complex out, yet d|x| is lost

    report = gradcheck(half, {"x": 2 * np.abs(POINT["x"])}, POINT)
    assert [row.ok for row in report.rows] == [True, False]


NOT_AN_ARRAY = "the gradient of x is {}, not an array"


@pytest.mark.parametrize(
    ("grads", "arrays", "message"),
    [
        (RIGHT, {**POINT, "x": POINT["x"].astype(np.float32)}, "x is float32; a check needs float64"),
        ({"y": RIGHT["x"]}, POINT, r'there is a gradient for "y", the arrays are \[\'c\', \'x\'\]'),
        ({"x": 1.0}, POINT, NOT_AN_ARRAY.format("float")),
        ({"x": Tensor(np.ones((3, 4)))}, POINT, NOT_AN_ARRAY.format("Tensor")),
    ],
)
def test_what_cannot_be_checked_is_refused(grads, arrays, message):
    with pytest.raises(InputError, match=message):
        gradcheck(cubic, grads, arrays)


# -------------------------------------------------------------------------------- reports


def test_a_report_is_true_or_false_and_prints_its_rows():
    good, bad = gradcheck(cubic, RIGHT, POINT, "cubic"), gradcheck(cubic, {"x": -RIGHT["x"]}, POINT, "cubic")
    assert good and not bad
    assert str(good).splitlines()[0] == "ok   cubic" and str(bad).splitlines()[0] == "FAIL cubic"
    assert len(str(good).splitlines()) == 1 + len(good.rows)
    assert str(bad).count("guess: the sign is flipped") == len(bad.rows) == 2
    assert f"analytic {bad.rows[0].analytic:+.6e}" in str(bad)
    assert str(gradcheck(cubic, {"x": RIGHT["c"]}, POINT, "cubic")).splitlines()[1:] == [
        "  FAIL x        shape",
        "       guess: the gradient has shape (4,); it must have the array's shape, (3, 4)",
    ]


@pytest.mark.parametrize("grads", [RIGHT, {"x": RIGHT["c"]}, {"x": np.nan * RIGHT["x"]}], ids=["right", "shape", "nan"])
def test_a_report_is_json_that_a_browser_reads(grads):
    """Infinity and NaN, which Python writes, are not JSON (RFC 8259, section 6)."""

    def refuse(constant):
        pytest.fail(f"{constant} in JSON")

    report = gradcheck(cubic, grads, POINT, "cubic")
    back = json.loads(json.dumps(report.dict()), parse_constant=refuse)
    assert back["title"] == "cubic" and back["ok"] is bool(report)
    assert [(row["ok"], row["advice"]) for row in back["rows"]] == [(row.ok, row.advice) for row in report.rows]


# -------------------------------------------------------------------------------- operations, models


def test_an_operation_with_a_wrong_backward_fails():
    def double_forward(need, a, b):
        return a * b, {"a": a, "b": b}

    right = Operation(double_forward, lambda need, dy, saved: (dy * saved.b, dy * saved.a))
    swapped = Operation(double_forward, lambda need, dy, saved: (dy * saved.a, dy * saved.b))
    arrays = {"a": normal(3), "b": normal(3, seed=1)}
    report = check_operation(right, arrays)
    assert report and report.title == "double"
    assert {row.method for row in report.rows} == {"central", "complex"}
    assert not check_operation(swapped, arrays)


class Bowl(Module):
    """loss = Σ targets · w² + unused · 0, in place of a model."""

    def __init__(self, slope=2.0):
        self.w, self.unused, self.frozen = Parameter(normal(3)), Parameter(normal(2)), Parameter(normal(3), False)
        self.slope = slope

    def loss(self, ids, targets, rng=None):
        def bowl_forward(need, w, c):
            return (targets * c * w * w).sum(), {"w": w, "c": c}

        def bowl_backward(need, dy, saved):
            return dy * self.slope * targets * saved.c * saved.w, None

        return Operation(bowl_forward, bowl_backward)(self.w, self.frozen)


def test_a_model_is_checked_in_its_trainable_parameters():
    report = check_model(Bowl(), None, normal(3, seed=2))
    assert report
    assert {row.array for row in report.rows} == {"w", "unused"}
    assert all("blind spot" in row.advice for row in rows(report, "unused"))
    wrong_slope = check_model(Bowl(slope=1.0), None, normal(3, seed=2))
    assert not wrong_slope
    assert all("factor 0.5:" in row.advice for row in rows(wrong_slope, "w"))


def test_checking_a_model_leaves_it_and_its_optimizer_as_they_were():
    """The optimizer's gradients are views of its flat buffer: a check that replaced them would end all training."""
    config = GPTConfig(vocab_size=5, n_positions=3, n_embd=4, n_layer=1, n_head=2)
    gpt = adapt(GPT(config, dtype=np.float64), "lora", ["q"], verbose=False, r=1)
    optimizer = SGD(gpt.trainable(), lr=0.1)
    buffers = {name: p.grad for name, p in gpt.trainable().items()}
    arrays = {name: p.data for name, p in gpt.named_parameters()}
    copies = {name: a.copy() for name, a in arrays.items()}
    ids = np.array([[0, 1, 2]])
    check_model(gpt, ids, ids)
    assert all(p.grad is buffers[name] for name, p in gpt.trainable().items()) and not optimizer.grad.any()
    for name, p in gpt.named_parameters():
        assert p.data is arrays[name]
        np.testing.assert_array_equal(p.data, copies[name])
