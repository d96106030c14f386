"""The training loop lowers the loss, is the same to the bit for the same seed, and stops before it spoils weights.
These tests exist because a long run is worth nothing if it cannot be repeated, or ends in NaN without a word.
"""

import itertools
import math
import types
from unittest.mock import MagicMock, call

import numpy as np
import pytest
from steps import training_step

from minilora import methods
from minilora.engine import Tensor, backward, is_recording, plain, record
from minilora.errors import InputError, TrainingStopped
from minilora.gpt import GPT, GPTConfig
from minilora.memory import kept_bytes
from minilora.nn import Module, Parameter
from minilora.surgery import adapt
from minilora.training import loop, progress
from minilora.training.gradient import accumulate
from minilora.training.history import History
from minilora.training.optim import AdamW
from minilora.training.schedule import warmup_cosine
from minilora.training.sgd import SGD
from minilora.training.trainer import LostGradientWarning, evaluate, train

pytestmark = pytest.mark.quick

TINY = GPTConfig(vocab_size=7, n_positions=8, n_embd=16, n_layer=1, n_head=2, dropout=0.1)


def counting(seed=0, batch=4, time=8, by=1):
    """Endless batches of a task that can be learnt exactly: each token is the one before plus ``by``, modulo 7."""
    rng = np.random.default_rng(seed)
    while True:
        text = (rng.integers(0, 7, (batch, 1)) + by * np.arange(time + 1)) % 7
        yield text[:, :-1], text[:, 1:]


class Line(Module):
    """y = w · x, with the mean squared error: small enough to follow by hand. Its batches are (x (B, 2), y (B,))."""

    def __init__(self):
        self.w = Parameter(np.zeros(2))
        self.steps_seen = 0

    def loss(self, x, y, rng=None):
        error = (Tensor(x) * self.w).sum(axis=1) - Tensor(y)
        return (error * error).sum() / len(y)

    def after_step(self):
        self.steps_seen += 1


def points(n=1000, batch=3, bad=None):
    """``n`` batches of the line y = 2 x₀ − x₁; the last target of batch number ``bad`` is not finite."""
    rng = np.random.default_rng(0)
    for i in range(n):
        x = rng.standard_normal((batch, 2))
        y = x @ [2.0, -1.0]
        y[-1] += math.inf if i == bad else 0.0
        yield x, y


def trained(model, steps=3, callbacks=(), batches=None, **options):
    """(History, optimizer) of gradient descent at a rate of 0.1 on points of the line."""
    optimizer = SGD(model.trainable(), lr=0.1)
    return train(model, optimizer, batches or points(), steps, callbacks, **options), optimizer


def weights(model):
    return {name: p.data.copy() for name, p in model.named_parameters()}


# -------------------------------------------------------------------------------- what training does


def test_a_tiny_task_is_learnt_and_then_another_by_an_adapter():
    guess, model = math.log(7), GPT(TINY)

    def loss_on(by):
        return evaluate(model, itertools.islice(counting(seed=1, by=by), 3))

    train(model, AdamW(model.trainable(), lr=0.03), counting(by=1), steps=60, warmup=5)
    assert loss_on(1) < 0.2 * guess
    assert loss_on(2) > guess  # the other task is not learnt yet
    adapt(model, "lora", verbose=False, r=4)
    train(model, AdamW(model.trainable(), lr=0.03), counting(by=2), steps=60, warmup=5)
    assert loss_on(2) < 0.2 * guess


def test_the_line_by_hand():
    model, expected, seen, w = Line(), [], [], np.zeros(2)
    for step, (x, y) in enumerate(points(5)):  # gradient descent, written out
        error = x @ w - y
        gradient = 2.0 * error @ x / len(y)
        rate = warmup_cosine(step, 5, 0.1, warmup=2, floor=0.2)
        w = w - rate * gradient
        expected.append([step, step + 1, (error**2).mean(), rate, math.sqrt(gradient @ gradient), *w])

    def callback(step, history):  # it sees each step, the history so far, and the weights after the step
        recorded = history.loss[-1], history.lr[-1], history.grad_norm[-1]
        seen.append([step, len(history.loss), *recorded, *model.w.data])

    history, optimizer = trained(model, 5, [callback], warmup=2, floor=0.2)
    np.testing.assert_allclose(seen, expected, rtol=1e-12)
    assert model.steps_seen == 5  # after_step runs once for each step
    assert optimizer.lr == 0.1  # the user's again
    assert len(history.seconds) == 5 and history.tokens_per_step == 6
    history.seconds[:] = [9.0, 0.5, 0.25, 0.5, 0.5]
    assert history.seconds_per_step == 0.5 and history.tokens_per_second == 6 / 0.5


def test_dropout_is_drawn_from_the_generator_that_train_is_given():
    losses = []
    for rng in (None, np.random.default_rng(1), np.random.default_rng(2)):
        model = GPT(TINY)
        losses.append(train(model, SGD(model.trainable(), lr=0.01), counting(), steps=1, rng=rng).loss[0])
    assert len(set(losses)) == 3


def test_kept_bytes_are_those_of_the_first_step():
    model, batches = GPT(TINY), [next(counting(batch=batch)) for batch in (2, 4)]
    expected = kept_bytes(model.loss(*batches[0]), model)
    assert trained(model, 2, batches=iter(batches))[0].kept_bytes == expected > 0


def test_the_clock_runs_from_the_batch_to_the_step_and_not_in_the_callback(monkeypatch):
    now = [0.0]

    def tick(seconds):
        now[0] += seconds

    class Slow(Line):
        def loss(self, x, y, rng=None):
            tick(2.0)
            return super().loss(x, y)

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    slow_batches = ((tick(50.0), batch)[1] for batch in points())
    assert trained(Slow(), 3, [lambda *_: tick(100.0)], slow_batches)[0].seconds == [2.0, 2.0, 2.0]


class Cut(Line):
    """A line with ``n`` more arrays that no loss depends on."""

    def __init__(self, n):
        super().__init__()
        self.lost = [Parameter(np.ones(1)) for _ in range(n)]


@pytest.mark.parametrize(
    ("n", "names"), [(5, r"lost\.0, lost\.1, .*, lost\.4"), (7, r"lost\.0, .*, lost\.4 and 2 more")]
)
def test_arrays_that_receive_no_gradient_are_named_once(n, names):
    trained(Cut(n), 2)  # a gradient may be zero in the first two steps: a warning would be an error here
    with pytest.warns(LostGradientWarning, match=f"^{names}: no gradient arrives") as caught:
        trained(Cut(n), 5)
    assert len(caught) == 1


# -------------------------------------------------------------------------------- what stops it


class Cliff(Line):
    """A finite loss whose gradient is not, in its third step."""

    def loss(self, x, y, rng=None):
        loss = super().loss(x, y)
        factor = math.nan if self.steps_seen == 2 else 1.0
        return record("cliff", loss.data, {}, lambda dy, saved: (dy * factor,), [loss])


STOPS = {  # model, its points, options, what is raised, steps that were taken
    "loss, at once": (Line, {"bad": 0}, {}, "stopped at step 1 of 5: the loss is inf", 0),
    "loss": (Line, {"bad": 3}, {}, "stopped at step 4 of 5: the loss is inf", 3),
    "loss of a later part": (Line, {"bad": 3}, {"micro_batches": 3}, "stopped at step 4 of 5: the loss is inf", 3),
    "gradient": (Cliff, {}, {}, "stopped at step 3 of 5: the gradient's norm is nan", 2),
    "no batch": (Line, {"n": 0}, {}, "the batches ended after 0 of 5 steps", 0),
    "no more batches": (Line, {"n": 3}, {}, "the batches ended after 3 of 5 steps", 3),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_run_that_stops_has_the_weights_of_its_last_good_step_and_the_users_rate(name):
    kind, given, options, message, steps = STOPS[name]
    model, after = kind(), [np.zeros(2)]
    optimizer = SGD(model.trainable(), lr=0.1)
    with pytest.raises((InputError, TrainingStopped), match=message) as caught:
        train(model, optimizer, points(**given), 5, [lambda *_: after.append(model.w.data.copy())], warmup=5, **options)
    assert len(after) - 1 == model.steps_seen == steps
    np.testing.assert_array_equal(model.w.data, after[-1])
    assert optimizer.lr == 0.1  # else the next run would take a rate of the half-finished schedule for its peak
    assert caught.type is InputError or "last good step" in str(caught.value)
    model.steps_seen = 3
    assert len(train(model, optimizer, points(), steps=5).loss) == 5  # and it goes on


REFUSED = {
    "no step": ({"steps": 0}, "train: steps is 0"),
    "warmup": ({"warmup": -1}, "warmup is -1"),
    "floor": ({"floor": math.nan}, "floor is nan"),
    "an unknown option": ({"micro_batch": 2}, r'no option "micro_batch" \(did you mean "micro_batches"\?\)'),
    "no part": ({"micro_batches": 0}, "micro_batches is 0; it must be an integer in 1 … 3"),
    "more parts than sequences": ({"micro_batches": 4}, "micro_batches is 4; it must be an integer in 1 … 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_out_of_range_is_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        trained(Line(), **options)


@pytest.mark.parametrize("what", ["another model's", "made before adapt()", "some are frozen"])
def test_an_optimizer_of_other_parameters_is_refused_before_anything_moves(what):
    model = GPT(TINY)
    optimizer = AdamW((GPT(TINY) if what == "another model's" else model).trainable(), lr=0.1, weight_decay=0.1)
    if what == "made before adapt()":
        adapt(model, "lora", r=2, verbose=False)
    if what == "some are frozen":
        model.blocks[0].q.freeze()
    before = weights(model)
    with pytest.raises(InputError, match="this optimizer holds other parameters than the model trains"):
        train(model, optimizer, counting(), 2)
    assert all(np.array_equal(p.data, before[name]) for name, p in model.named_parameters())


# -------------------------------------------------------------------------------- evaluation and the progress bar


def test_evaluation_is_the_mean_over_all_counted_targets_and_changes_nothing():
    gpt = GPT(GPTConfig(7, 6, 8, 1, 2, dropout=0.1), dtype=np.float64)
    ids, targets = np.arange(24).reshape(4, 6) % 7, np.arange(1, 25).reshape(4, 6) % 7
    targets[0, 1:] = -100
    before, whole, right, recorded = weights(gpt), float(gpt.loss(ids, targets).data), gpt.loss, []
    gpt.loss = lambda *args: recorded.append(is_recording()) or right(*args)
    found = evaluate(gpt, iter([(ids[:1], targets[:1]), (ids[1:], targets[1:])]))
    assert recorded == [False, False]
    assert type(found) is float and found == pytest.approx(whole, rel=1e-12)
    assert all(np.array_equal(p.data, before[name]) for name, p in gpt.named_parameters())
    with pytest.raises(InputError, match="no batches"):
        evaluate(gpt, [])


def test_the_bar_counts_every_step_and_shows_loss_and_throughput(monkeypatch):
    bar, made = MagicMock(), []
    monkeypatch.setattr(progress, "progress_bar", lambda *args: made.append(args) or bar)
    history, _ = trained(Line(), 2, label="a line", progress=True)
    assert made == [(2, "a line", True, 0)]
    texts = [f"loss {x:.3f}, {6 / s:,.0f} tok/s" for x, s in zip(history.loss, history.seconds, strict=True)]
    shown = [call.set_postfix_str(text, refresh=False) for text in texts]  # tqdm draws when its time has come
    assert bar.method_calls == [call.update(), shown[0], call.update(), shown[1]]


# -------------------------------------------------------------------------------- micro-batches

SMALL = GPTConfig(vocab_size=7, n_positions=6, n_embd=16, n_layer=1, n_head=2)


def lively(name="lora"):
    """(float64 model, optimizer): adapted, or with all of it trained, and off the start, where B = 0 hides dA."""
    model, rng = GPT(SMALL, dtype=np.float64), np.random.default_rng(5)
    if name != "all trained":
        adapt(model, name, verbose=False, **methods.known(name, r=2))
    for p in model.trainable().values():
        p.data += 0.1 * rng.standard_normal(p.shape)
    return model, AdamW(model.trainable(), lr=0.01)


def uneven(batch=5, seed=3):
    """(ids, targets) with targets ignored in the first sequence, nearly all of the second, and all of the last."""
    ids, targets = np.random.default_rng(seed).integers(0, 7, (2, batch, 6))
    targets[0, ::2], targets[1, 1:], targets[-1] = -100, -100, -100
    return ids, targets


@pytest.mark.parametrize("name", [*methods.names(), "all trained"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(name):
    ids, targets = uneven()
    model, optimizer = lively(name)
    loss = model.loss(ids, targets)
    backward(loss)
    value, whole = float(loss.data), optimizer.grad.copy()
    assert all(p.grad.any() for p in model.trainable().values())
    for k in (1, 2, 5):  # of 5, the last part has nothing to count
        optimizer.zero()
        parts = accumulate(model, ids, targets, micro_batches=k)
        if k == 1:
            assert parts == value
            np.testing.assert_array_equal(optimizer.grad, whole)
        assert parts == pytest.approx(value, rel=1e-12)
        assert np.abs(optimizer.grad - whole).max() <= 1e-12 * np.abs(whole).max(), k


def test_a_batch_in_which_every_target_is_ignored_is_an_error():
    model, optimizer = lively()
    ids, targets = uneven()
    with pytest.raises(InputError, match="every target is ignore_index"):
        training_step(model, optimizer, ids, np.full_like(targets, -100), micro_batches=3)


def test_kept_bytes_fall_with_the_number_of_parts():
    """All that is kept is proportional to the tokens of a part, the largest of which counts; but a part's ids are a
    view of the whole batch."""
    model, optimizer = lively()
    batch, kept = uneven(batch=12), {}
    for k in (1, 3, 5):
        history = History()
        training_step(model, optimizer, *batch, history=history, micro_batches=k)
        kept[k] = history.kept_bytes
    for k, largest in {3: 4, 5: 3}.items():
        assert kept[k] == pytest.approx(kept[1] * largest / 12, rel=0.03, abs=batch[0].base.nbytes), k


def test_a_run_in_parts_or_with_the_plain_forms_is_the_same_run():
    def run(k=1):
        model, optimizer = lively("delta_lora")
        batches = (uneven(seed=seed) for seed in range(5))
        return train(model, optimizer, batches, 5, micro_batches=k).loss, weights(model)

    loss, whole = run()
    loss_parts, parts = run(3)
    np.testing.assert_allclose(loss_parts, loss, rtol=1e-10)
    assert all(np.allclose(whole[name], parts[name], rtol=1e-9, atol=1e-11) for name in whole)
    with plain():
        np.testing.assert_allclose(run()[0], loss, rtol=1e-10)


def test_an_error_in_a_later_part_leaves_no_gradient_for_the_next_step():
    (ids, targets), (model, optimizer), (fresh, other) = uneven(), lively(), lively()
    before, bad = weights(model), ids.copy()
    bad[3, 0] = 99  # targets in the last sequence do not count, and such a part is not looked at
    with pytest.raises(InputError):
        training_step(model, optimizer, bad, targets, micro_batches=4)
    assert all(np.array_equal(p.data, before[name]) for name, p in model.named_parameters())
    assert training_step(model, optimizer, ids, targets) == training_step(fresh, other, ids, targets)
