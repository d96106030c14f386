"""The training loop lowers the loss, is the same to the bit for the same seed, and stops before it spoils weights.
These tests exist because a long run is worth nothing if it cannot be repeated, or ends in NaN without a word.
"""

import contextlib
import itertools
import math
import types

import numpy as np
import pytest
from steps import training_step

from minilora import methods
from minilora.engine import Tensor, backward, plain, record
from minilora.errors import InputError, TrainingStopped
from minilora.gpt import GPT, GPTConfig
from minilora.memory import kept_bytes
from minilora.nn import Module, Parameter
from minilora.surgery import adapt
from minilora.training import loop, progress
from minilora.training.gradient import accumulate
from minilora.training.loop import History
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


def points(n=1000, batch=3, bad=None, seed=0):
    """``n`` batches of the line y = 2 x₀ − x₁; batch number ``bad`` has a target that is not finite."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        x = rng.standard_normal((batch, 2))
        yield x, x @ [2.0, -1.0] + (math.inf if i == bad else 0.0)


def weights(model):
    return {name: p.data.copy() for name, p in model.named_parameters()}


# -------------------------------------------------------------------------------- what training does


def test_a_tiny_task_is_learnt_and_then_another_by_an_adapter():
    guess, val = math.log(7), lambda by: itertools.islice(counting(seed=1, by=by), 3)
    model = GPT(TINY)
    train(model, AdamW(model.trainable(), lr=0.03), counting(by=1), steps=60, warmup=5)
    assert evaluate(model, val(1)) < 0.2 * guess
    assert evaluate(model, val(2)) > guess  # the other task is not learnt yet
    adapt(model, "lora", verbose=False, r=4)
    train(model, AdamW(model.trainable(), lr=0.03), counting(by=2), steps=60, warmup=5)
    assert evaluate(model, val(2)) < 0.2 * guess


def test_the_line_by_hand():
    model, history = Line(), []
    w = np.zeros(2)
    for step, (x, y) in enumerate(points(5)):  # gradient descent, written out
        error = x @ w - y
        gradient = 2.0 * error @ x / len(y)
        rate = warmup_cosine(step, 5, 0.1, warmup=2, floor=0.2)
        history.append(((error**2).mean(), rate, math.sqrt(gradient @ gradient)))
        w = w - rate * gradient
    recorded = train(model, SGD(model.trainable(), lr=0.1), points(), steps=5, warmup=2, floor=0.2)
    np.testing.assert_allclose(model.w.data, w, rtol=1e-12)
    actual = list(zip(recorded.loss, recorded.lr, recorded.grad_norm, strict=True))
    np.testing.assert_allclose(actual, history, rtol=1e-12)
    assert model.steps_seen == 5  # after_step runs once for each step
    assert len(recorded.seconds) == 5 and recorded.tokens_per_step == 6


def test_the_same_seed_gives_the_same_weights_to_the_bit():
    def run(seed):
        model = adapt(GPT(TINY), "lora", verbose=False, r=2, seed=seed)
        optimizer = AdamW(model.trainable(), lr=0.01)
        history = train(model, optimizer, counting(seed), steps=6, rng=np.random.default_rng(seed))
        return weights(model), history.loss

    (first, loss), (again, loss_again), (other, _) = run(1), run(1), run(2)
    assert loss == loss_again
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["blocks.0.q.arrays.B"], other["blocks.0.q.arrays.B"])


def test_dropout_is_drawn_from_the_generator_that_train_is_given():
    losses = []
    for rng in (None, np.random.default_rng(1), np.random.default_rng(2)):
        model = GPT(TINY)
        losses.append(train(model, SGD(model.trainable(), lr=0.01), counting(), steps=1, rng=rng).loss[0])
    assert len(set(losses)) == 3


def test_two_half_batches_at_half_weight_equal_one_batch():
    ids, targets = next(counting(batch=6))
    grads = []
    for parts in (1, 2):
        model = GPT(TINY, dtype=np.float64)
        AdamW(model.trainable(), lr=0.01)  # gradients go to its flat buffer
        for half in np.split(np.arange(6), parts):
            backward(model.loss(ids[half], targets[half]), np.asarray(1.0 / parts))
        grads.append({name: p.grad.copy() for name, p in model.trainable().items()})
    for name, whole in grads[0].items():
        assert np.abs(whole - grads[1][name]).max() <= 1e-12 * max(np.abs(g).max() for g in grads[0].values()), name


def test_kept_bytes_are_those_of_the_first_step():
    model, batches = GPT(TINY), [next(counting(batch=batch)) for batch in (4, 2, 3)]
    expected = kept_bytes(model.loss(*batches[0]), model)
    history = train(model, SGD(model.trainable(), lr=0.01), batches, steps=3)
    assert history.kept_bytes == expected > kept_bytes(model.loss(*batches[1]), model) > 0


def test_history_gives_the_median_step_and_the_throughput():
    model = Line()
    history = train(model, SGD(model.trainable(), lr=0.1), points(), steps=3)
    history.seconds[:] = [9.0, 0.5, 0.25]
    assert history.seconds_per_step == 0.5
    assert history.tokens_per_second == 6 / 0.5


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
    model = Slow()
    history = train(model, SGD(model.trainable(), lr=0.1), slow_batches, 3, [lambda *_: tick(100.0)])
    assert history.seconds == [2.0, 2.0, 2.0]


def test_the_callback_sees_each_step_and_the_history_so_far():
    model, seen = Line(), []
    callback = lambda step, history: seen.append((step, len(history.loss), model.w.data.copy()))
    train(model, SGD(model.trainable(), lr=0.1), points(), steps=3, callbacks=[callback])
    assert [(step, n) for step, n, _ in seen] == [(0, 1), (1, 2), (2, 3)]
    np.testing.assert_array_equal(seen[-1][2], model.w.data)  # after the step
    assert not np.array_equal(seen[0][2], seen[1][2])


class Cut(Line):
    """A line with ``n`` more arrays that no loss depends on."""

    def __init__(self, n):
        super().__init__()
        self.lost = [Parameter(np.ones(1)) for _ in range(n)]


@pytest.mark.parametrize(("n", "names"), [(1, "lost.0"), (5, "lost.0, lost.1, lost.2, lost.3, lost.4")])
def test_arrays_that_receive_no_gradient_are_named_once(n, names):
    model = Cut(n)
    with pytest.warns(LostGradientWarning, match=f"^{names}: no gradient arrives") as caught:
        train(model, SGD(model.trainable(), lr=0.1), points(), steps=5)
    assert len(caught) == 1


def test_many_arrays_without_a_gradient_are_counted():
    model = Cut(7)
    with pytest.warns(LostGradientWarning, match=r"^lost\.0, .*, lost\.4 and 2 more: no gradient arrives"):
        train(model, SGD(model.trainable(), lr=0.1), points(), steps=3)


def test_a_gradient_may_be_zero_in_the_first_two_steps():
    model = Cut(1)
    train(model, SGD(model.trainable(), lr=0.1), points(), steps=2)  # a warning would be an error here


# -------------------------------------------------------------------------------- what stops it


@pytest.mark.parametrize("bad", [0, 3])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(bad):
    good, model = Line(), Line()
    if bad:
        peak = SGD(good.trainable(), lr=0.1)
        for step, batch in enumerate(points(bad)):
            peak.lr = warmup_cosine(step, 5, 0.1)
            training_step(good, peak, *batch)
    with pytest.raises(TrainingStopped, match=f"stopped at step {bad + 1} of 5: the loss is inf") as caught:
        train(model, SGD(model.trainable(), lr=0.1), points(bad=bad), steps=5)
    np.testing.assert_array_equal(model.w.data, good.w.data)
    assert model.steps_seen == bad
    assert "last good step" in str(caught.value)


class Cliff(Line):
    """A finite loss whose gradient is not, from its third step on."""

    def loss(self, x, y, rng=None):
        loss = super().loss(x, y)
        factor = math.nan if self.steps_seen >= 2 else 1.0
        return record("cliff", loss.data, {}, lambda dy, saved: (dy * factor,), [loss])


def test_a_gradient_that_is_not_finite_stops_with_the_last_good_weights():
    model, after = Cliff(), []
    with pytest.raises(TrainingStopped, match="stopped at step 3 of 9: the gradient's norm is nan"):
        train(model, SGD(model.trainable(), lr=0.1), points(), 9, [lambda *_: after.append(model.w.data.copy())])
    assert len(after) == model.steps_seen == 2
    np.testing.assert_array_equal(model.w.data, after[-1])


@pytest.mark.parametrize("n", [0, 3])
def test_batches_that_end_early_are_an_error(n):
    model = Line()
    with pytest.raises(InputError, match=f"the batches ended after {n} of 5 steps"):
        train(model, SGD(model.trainable(), lr=0.1), points(n), steps=5)
    assert model.steps_seen == n


@pytest.mark.parametrize("steps", [0, -1])
def test_at_least_one_step(steps):
    model = Line()
    with pytest.raises(InputError, match=f"train: steps is {steps}"):
        train(model, SGD(model.trainable(), lr=0.1), points(), steps=steps)


@pytest.mark.parametrize("options", [{"warmup": -1}, {"floor": -0.1}, {"floor": math.nan}])
def test_a_schedule_out_of_range_is_refused(options):
    model, ((name, value),) = Line(), options.items()
    with pytest.raises(InputError, match=f"{name} is {value}"):
        train(model, SGD(model.trainable(), lr=0.1), points(), steps=2, **options)


def test_the_learning_rate_is_the_users_again_after_the_run():
    model = Line()
    optimizer = SGD(model.trainable(), lr=0.1)
    train(model, optimizer, points(), steps=4, warmup=2)
    assert optimizer.lr == 0.1


@pytest.mark.parametrize("stop", [{"n": 2}, {"bad": 2}], ids=["ended early", "not finite"])
def test_the_learning_rate_is_the_users_again_after_a_run_that_stopped(stop):
    """Else the next run would take a rate of the half-finished schedule for its peak."""
    model = Line()
    optimizer = SGD(model.trainable(), lr=0.1)
    with pytest.raises((InputError, TrainingStopped)):
        train(model, optimizer, points(**stop), steps=5, warmup=5)
    assert optimizer.lr == 0.1


def test_training_goes_on_after_a_stop():
    model = Cliff()
    optimizer = SGD(model.trainable(), lr=0.1)
    with pytest.raises(TrainingStopped):
        train(model, optimizer, points(), steps=5)
    model.steps_seen = -100  # back from the cliff
    assert len(train(model, optimizer, points(), steps=5).loss) == 5


# -------------------------------------------------------------------------------- evaluation


def test_evaluation_weights_each_batch_by_its_size():
    model = Line()
    model.w.data[:] = [1.0, 1.0]
    batches = [*points(1, batch=4), *points(2, batch=2, seed=1)]
    errors = np.concatenate([x @ [1.0, 1.0] - y for x, y in batches])
    assert evaluate(model, batches) == pytest.approx((errors**2).mean(), rel=1e-12)


def test_evaluation_records_nothing_and_drops_nothing():
    model, batches = GPT(TINY), list(itertools.islice(counting(), 2))
    before = weights(model)
    assert evaluate(model, batches) == evaluate(model, batches)
    assert all(p.grad is None for p in model.trainable().values())
    assert all(np.array_equal(p.data, before[name]) for name, p in model.named_parameters())
    assert type(evaluate(model, iter(batches))) is float


def test_evaluation_of_nothing_is_an_error():
    with pytest.raises(InputError, match="no batches"):
        evaluate(Line(), [])


# -------------------------------------------------------------------------------- the progress bar


def test_the_bar_is_silent_where_the_output_is_no_terminal(capsys):
    model = Line()
    train(model, SGD(model.trainable(), lr=0.1), points(), steps=3)
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_itself_on_request(capsys):
    model = Line()
    train(model, SGD(model.trainable(), lr=0.1), points(), steps=3, label="a line", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "a line" in err and "/3" in err


def test_the_bar_counts_every_step_and_shows_loss_and_throughput(monkeypatch):
    seen = []

    class Bar(contextlib.nullcontext):
        def __enter__(self):
            return self

        def update(self):
            seen.append("step")

        def set_postfix_str(self, text, refresh):
            assert not refresh  # tqdm draws when its time has come
            seen.append(text)

    def make(*args):
        assert args == (2, "a line", None, 0)
        return Bar()

    monkeypatch.setattr(progress, "progress_bar", make)
    model = Line()
    history = train(model, SGD(model.trainable(), lr=0.1), points(), steps=2, label="a line")
    speeds = [f"{6 / seconds:,.0f}" for seconds in history.seconds]
    texts = [f"loss {loss:.3f}, {speed} tok/s" for loss, speed in zip(history.loss, speeds, strict=True)]
    assert seen == ["step", texts[0], "step", texts[1]]


def test_a_target_that_is_ignored_has_no_weight_in_the_mean():
    """Two batches of unequal counts: the mean is that over all counted targets at once."""
    gpt = GPT(GPTConfig(7, 6, 8, 1, 2), dtype=np.float64)
    ids, targets = np.arange(24).reshape(4, 6) % 7, np.arange(1, 25).reshape(4, 6) % 7
    targets[0, 1:] = -100
    whole = evaluate(gpt, [(ids, targets)])
    assert evaluate(gpt, [(ids[:1], targets[:1]), (ids[1:], targets[1:])]) == pytest.approx(whole, rel=1e-12)


# -------------------------------------------------------------------------------- micro-batches

SMALL = GPTConfig(vocab_size=7, n_positions=6, n_embd=16, n_layer=1, n_head=2)


def lively(name="lora", config=SMALL):
    """(float64 model, optimizer): adapted, or with all of it trained, and off the start, where B = 0 hides dA."""
    model, rng = GPT(config, dtype=np.float64), np.random.default_rng(5)
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
    for k in (1, 2, 3, 5):  # of 5, the last part has nothing to count
        optimizer.grad.fill(0.0)
        parts = accumulate(model, ids, targets, micro_batches=k)
        if k == 1:
            assert parts == value
            np.testing.assert_array_equal(optimizer.grad, whole)
        assert parts == pytest.approx(value, rel=1e-12)
        assert np.abs(optimizer.grad - whole).max() <= 1e-12 * np.abs(whole).max(), k


def test_a_part_counts_by_its_targets_and_not_by_its_sequences():
    """By hand: two parts of one point each, of which one target is ignored, are the mean over the other alone."""
    x, y = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([-100.0, 4.0])
    model = Line()
    value = accumulate(model, x, y, micro_batches=2)
    assert value == 16.0
    np.testing.assert_array_equal(model.w.grad, -8.0 * x[1])


def test_total_is_what_the_mean_is_over():
    ids, targets = uneven()
    model, optimizer = lively()
    value = accumulate(model, ids, targets)
    whole = optimizer.grad.copy()
    optimizer.grad.fill(0.0)
    half = accumulate(model, ids, targets, total=2 * int((targets != -100).sum()))
    assert half == pytest.approx(value / 2, rel=1e-12)
    np.testing.assert_allclose(optimizer.grad, whole / 2, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_a_batch_in_which_every_target_is_ignored_is_an_error(k):
    model, optimizer = lively()
    ids, targets = uneven()
    with pytest.raises(InputError, match="every target is ignore_index"):
        training_step(model, optimizer, ids, np.full_like(targets, -100), micro_batches=k)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_there_are_as_many_parts_as_sequences_at_most(k):
    model, optimizer = lively()
    with pytest.raises(InputError, match=f"micro_batches is {k}; it must be an integer in 1 … 5"):
        train(model, optimizer, iter([uneven()]), 1, micro_batches=k)


@pytest.mark.parametrize("name", ["lora", "all trained"])
def test_kept_bytes_fall_with_the_number_of_parts(name):
    """All that is kept is proportional to the tokens of a part, the largest of which counts; but a part's ids are a
    view of the whole batch."""
    model, optimizer = lively(name)
    batch, kept = uneven(batch=12), {}
    for k in (1, 2, 3, 5, 12):
        history = History()
        training_step(model, optimizer, *batch, history=history, micro_batches=k)
        kept[k] = history.kept_bytes
    for k, largest in {2: 6, 3: 4, 5: 3, 12: 1}.items():
        assert kept[k] == pytest.approx(kept[1] * largest / 12, rel=0.03, abs=batch[0].base.nbytes), k


def test_a_run_in_parts_is_the_same_run():
    runs = []
    for k in (1, 3):
        model, optimizer = lively("delta_lora")
        batches = (uneven(seed=seed) for seed in range(5))
        runs.append((train(model, optimizer, batches, 5, micro_batches=k).loss, weights(model)))
    (loss, whole), (loss_parts, parts) = runs
    np.testing.assert_allclose(loss_parts, loss, rtol=1e-10)
    assert all(np.allclose(whole[name], parts[name], rtol=1e-9, atol=1e-11) for name in whole)


def test_dropout_in_parts_is_reproducible_and_drawn_for_each_part():
    def run(seed, k):
        model, optimizer = lively(config=GPTConfig(7, 6, 16, 1, 2, dropout=0.3))
        value = accumulate(model, *twice, np.random.default_rng(seed), micro_batches=k)
        return value, optimizer.grad

    twice = [np.repeat(a[:1], 2, axis=0) for a in uneven()]  # the same sequence twice: with one mask for both parts,
    (first, grad), (again, grad_again), (other, _) = run(1, 2), run(1, 2), run(2, 2)
    assert first == again != other
    np.testing.assert_array_equal(grad, grad_again)
    model, _ = lively(config=GPTConfig(7, 6, 16, 1, 2, dropout=0.3))
    one_part = float(model.loss(twice[0][:1], twice[1][:1], np.random.default_rng(1)).data)
    assert first != pytest.approx(one_part, rel=1e-6)  # the loss would be that of one part


def test_a_loss_that_is_not_finite_in_a_later_part_moves_nothing():
    model = Line()
    optimizer = SGD(model.trainable(), lr=0.1)
    ((x, y),) = points(1, batch=6)
    y[3] = math.inf
    model.w.data[:] = [1.0, 2.0]
    with pytest.raises(TrainingStopped, match="the loss is inf"):
        training_step(model, optimizer, x, y, micro_batches=3)
    np.testing.assert_array_equal(model.w.data, [1.0, 2.0])
    assert model.steps_seen == 0


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_an_error_in_a_later_part_leaves_no_gradient_for_the_next_step(error):
    (ids, targets), (model, optimizer), (fresh, other) = uneven(), lively(), lively()
    right, before = model.loss, weights(model)

    def fails(ids, targets, rng):
        if (ids == 99).any() and error is KeyboardInterrupt:
            raise error
        return right(ids, targets, rng)

    model.loss = fails
    bad = ids.copy()
    bad[3, 0] = 99  # targets in the last sequence do not count, and such a part is not looked at
    with pytest.raises(error):
        training_step(model, optimizer, bad, targets, micro_batches=4)
    assert all(np.array_equal(p.data, before[name]) for name, p in model.named_parameters())
    assert training_step(model, optimizer, ids, targets) == training_step(fresh, other, ids, targets)


# -------------------------------------------------------------------------------- other buffers for the optimizer


def test_placed_parameters_and_gradients_are_views_of_the_new_buffers():
    (model, optimizer), (fresh, other) = lively(), lively()
    old, old_grad, before = optimizer.data, optimizer.grad, optimizer.data.copy()
    data, grad = old.copy(), 0.0 * old
    optimizer.place(data, grad)
    assert optimizer.data is data and optimizer.grad is grad
    start = 0
    for p in model.trainable().values():
        data[start], grad[start] = 7.0, 8.0  # a write to the buffer is seen in the array, at its place
        assert p.data.flat[0] == 7.0 and p.grad.flat[0] == 8.0 and p.grad.shape == p.shape
        data[start], grad[start] = before[start], 0.0
        assert np.shares_memory(p.data, data) and np.shares_memory(p.grad, grad)
        assert not np.shares_memory(p.data, old) and not np.shares_memory(p.grad, old_grad)
        start += p.data.size
    assert start == data.size
    for seed in range(2):  # backward adds into the new gradient and the step moves the new numbers
        assert training_step(model, optimizer, *uneven(seed=seed)) == training_step(fresh, other, *uneven(seed=seed))
    np.testing.assert_array_equal(data, other.data)
    np.testing.assert_array_equal(old, before)
    assert not old_grad.any()


# -------------------------------------------------------------------------------- what does not fit


def test_an_unknown_option_is_refused_with_the_nearest_name():
    model = Line()
    with pytest.raises(InputError, match=r'train has no option "micro_batch" \(did you mean "micro_batches"\?\)'):
        train(model, SGD(model.trainable(), lr=0.1), points(), 2, micro_batch=2)


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


def test_the_book_s_loop_and_the_plain_forms_learn_the_same():
    def run():
        model, optimizer = lively()
        return train(model, optimizer, (uneven(seed=seed) for seed in range(4)), 4).loss

    default = run()
    with plain():
        np.testing.assert_allclose(run(), default, rtol=1e-10)
