"""Worker processes give the gradient of one process, and end when they should, however the run or its parent ended.
These tests exist because a share that is lost trains on without a word, and a process that is left behind hangs.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from steps import training_step
from threadpoolctl import threadpool_info, threadpool_limits

from minilora import GPT, AdamW, GPTConfig, adapt, methods
from minilora.errors import InputError, TrainingStopped
from minilora.memory import kept_bytes
from minilora.merging import unload
from minilora.training.gradient import accumulate
from minilora.training.history import History
from minilora.training.trainer import train
from minilora.training.workers import Workers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes need Linux")
TINY = GPTConfig(vocab_size=7, n_positions=8, n_embd=16, n_layer=2, n_head=2)
DROPPING = GPTConfig(vocab_size=7, n_positions=8, n_embd=16, n_layer=2, n_head=2, dropout=0.2)
LIMIT = 10  # seconds


@pytest.fixture(autouse=True)
def bounded():
    """No test takes longer than LIMIT, and none leaves a process behind."""
    before = set(multiprocessing.active_children())
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still running after {LIMIT} s"))
    signal.alarm(LIMIT)
    try:
        yield
        assert set(multiprocessing.active_children()) <= before
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def made(name="lora", config=TINY, dtype=np.float64, kind=GPT):
    """(model, optimizer): adapted, every trained array off its start, so that no gradient is zero."""
    options = methods.known(name, r=2, start_step=0)  # Delta-LoRA moves W at every step
    model, rng = adapt(kind(config, dtype=dtype), name, verbose=False, **options), np.random.default_rng(5)
    for p in model.trainable().values():
        p.data += 0.1 * rng.standard_normal(p.shape).astype(dtype)
    return model, AdamW(model.trainable(), lr=0.01)


def batch(size=5, seed=0):
    """(ids, targets): about a third of the targets is ignored, of the last sequence most; no id is a 6."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 6, (size, 9))
    targets = np.where(rng.random((size, 8)) < 0.3, -100, text[:, 1:])
    targets[-1, 1:], targets[-1, 0] = -100, 3
    return text[:, :-1].copy(), targets


def close(actual, expected, tolerance):
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def weights(model):
    return {name: p.data.copy() for name, p in model.named_parameters()}


def assert_same(model, expected):
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.data, expected[name], name)


def stepped(model, optimizer, batches, team=None):
    """(losses, the gradient of each step, History) of full training steps."""
    grads, losses, history, move = [], [], History(), optimizer.move
    optimizer.move = lambda: (grads.append(optimizer.grad.copy()), move())
    for ids, targets in batches:
        losses.append(training_step(model, optimizer, ids, targets, history=history, team=team)[0])
        history.loss.append(losses[-1])
    return losses, grads, history


def gone(pid):
    """Whether no process of this id runs: it is away, or ended and only not yet collected by whose child it is."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("name", methods.names())
def test_workers_take_the_steps_of_one_process(name):
    """Delta-LoRA moves W itself: a worker with a W of its own would compute the gradient of another model."""
    (alone, one), (together, many) = made(name), made(name)
    start, batches = weights(together), [batch(seed=seed) for seed in range(2)]
    losses, grads, history = stepped(alone, one, batches)
    with Workers(together, many, 3) as team:
        assert len(team.processes) == 2
        assert_same(together, start)  # moved to shared memory, and not changed
        losses_many, grads_many, history_many = stepped(together, many, batches, team)
    np.testing.assert_allclose(losses_many, losses, rtol=1e-12)
    for g, expected, tolerance in zip(grads_many, grads, (1e-12, 1e-10), strict=True):
        close(g, expected, tolerance)  # the first at equal weights; Adam then divides, by small entries too
    for (path, p), (_, q) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        np.testing.assert_allclose(p.data, q.data, rtol=1e-10, atol=1e-12, err_msg=path)
        assert not p.requires_grad or not np.array_equal(p.data, start[path]), path
    # DoRA keeps a norm per row of W, and each process keeps its own
    assert history_many.kept_bytes == pytest.approx(history.kept_bytes, rel=0.03) and history.kept_bytes > 0


SHARES = [(2, 1, 1), (1, 3, 1), (2, 3, 2)]  # fewer sequences than workers, one worker, fewer in a share than parts


@pytest.mark.quick
@pytest.mark.parametrize(("n", "size", "parts"), SHARES)
def test_a_batch_of_few_sequences(n, size, parts):
    (alone, one), (together, many) = made(), made()
    expected = accumulate(alone, *batch(size))
    with Workers(together, many, n) as team:
        assert team.accumulate(*batch(size), micro_batches=parts) == pytest.approx(expected, rel=1e-12)
    close(many.grad, one.grad, 1e-12)


def test_a_share_in_which_every_target_is_ignored():
    (alone, one), (together, many) = made(), made()
    ids, targets = batch(4)
    targets[2:] = -100
    expected = accumulate(alone, ids, targets)
    with Workers(together, many, 2) as team:
        assert team.accumulate(ids, targets) == pytest.approx(expected, rel=1e-12)
        close(many.grad, one.grad, 1e-12)
        with pytest.raises(InputError, match="every target is ignore_index"):
            team.accumulate(ids, np.full_like(targets, -100))
        with pytest.raises(InputError, match="micro_batches is 5; it must be an integer in 1 … 4"):
            team.accumulate(ids, targets, micro_batches=5)


def test_workers_micro_batches_and_recomputing_together():
    (alone, one), (together, many) = made(), made()
    together.recompute()
    ids, targets = batch(8)
    accumulate(alone, ids, targets)
    kept = [kept_bytes(alone.loss(ids, targets), alone)]
    with Workers(together, many, 2) as team:
        for parts in (1, 4):
            many.zero()
            history = History()
            team.accumulate(ids, targets, micro_batches=parts, history=history)
            kept.append(history.kept_bytes)
            close(many.grad, one.grad, 1e-12)
    everything, recomputed, in_parts = kept
    assert in_parts == pytest.approx(recomputed / 4, rel=0.05) and recomputed < 0.5 * everything


def test_a_run_end_to_end_has_the_curve_of_one_process():
    def run(workers, **options):
        model, optimizer = made(dtype=np.float32)
        batches = (batch(4, seed) for seed in range(5))
        return train(model, optimizer, batches, 5, warmup=2, workers=workers, **options)

    alone, together = run(1), run(2, micro_batches=2)
    np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-5)
    np.testing.assert_allclose(together.grad_norm, alone.grad_norm, rtol=1e-2)
    assert together.loss[-1] != together.loss[0] and together.kept_bytes > 0


def test_dropout_is_reproducible_from_its_seed_and_drawn_anew_by_each_process():
    ids, targets = (np.repeat(a, 3, axis=0) for a in batch(1))  # three times the same sequence

    def run(seed):
        model, optimizer = made(config=DROPPING)
        with Workers(model, optimizer, 3) as team:
            rng = None if seed is None else np.random.default_rng(seed)
            loss = team.accumulate(ids, targets, rng)
            assert np.array_equal(team.grads[1], team.grads[2]) is (seed is None)
            return loss, optimizer.grad.copy(), team.accumulate(ids, targets, rng)

    (loss, grad, second), (loss_again, grad_again, second_again), (other, *_) = run(1), run(1), run(2)
    assert (loss, second) == (loss_again, second_again)
    np.testing.assert_array_equal(grad, grad_again)
    assert len({loss, second, other, run(None)[0]}) == 4


# -------------------------------------------------------------------------------- what goes wrong in a worker


def kill_itself(loss):
    os.kill(os.getpid(), signal.SIGKILL)


class Poisoned(GPT):
    """What happens to a share depends on whether it holds the id 6: ``act``, in whichever process has it."""

    act = staticmethod(kill_itself)

    def loss(self, ids, targets, rng=None):
        loss = super().loss(ids, targets, rng)
        if (ids == 6).any():
            self.act(loss)
        return loss


def poisoned(where=-1):
    """A batch whose last sequence, the last worker's, holds a 6."""
    ids, targets = batch(4)
    ids[where, 0] = 6
    return ids, targets


@pytest.mark.quick
@pytest.mark.parametrize("moment", ["between two steps", "in the middle of its share"])
def test_a_killed_worker_is_an_error_that_says_so(moment):
    model, optimizer = made(kind=Poisoned)
    with Workers(model, optimizer, 3) as team:
        training_step(model, optimizer, *batch(), team=team)
        before, start = weights(model), time.monotonic()
        next_batch = poisoned()
        if moment == "between two steps":
            os.kill(team.processes[0].pid, signal.SIGKILL)
            next_batch = batch()
        for _ in range(2):  # a team that is closed says the same
            with pytest.raises(RuntimeError, match="a worker process ended; the weights are those of the last good"):
                training_step(model, optimizer, *next_batch, team=team)
        assert time.monotonic() - start < 3.0
        assert not any(process.is_alive() for process in team.processes)
    assert_same(model, before)
    training_step(model, optimizer, *batch())  # alone


FAULTS = {  # an id that the model refuses in this process's own share, or in the last worker's, or a loss there
    "own share": (0, 99, InputError, "to 99; they must lie in 0 … 6"),
    "a worker's share": (-1, 99, InputError, "to 99; they must lie in 0 … 6"),
    "a worker's loss": (-1, 6, TrainingStopped, "the loss is inf"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", FAULTS)
def test_an_error_in_a_share_is_raised_here_and_the_team_goes_on(name):
    where, number, error, message = FAULTS[name]
    model, optimizer = made(kind=Poisoned)
    model.act = lambda loss: setattr(loss, "data", np.asarray(np.inf))
    before, (ids, targets) = weights(model), batch(4)
    ids[where, 0] = number
    with Workers(model, optimizer, 3) as team:
        with pytest.raises(error, match=message):
            training_step(model, optimizer, ids, targets, team=team)
        assert_same(model, before)
        optimizer.zero()  # the next gradient is that of one process
        team.accumulate(*batch(6, seed=9))
        grad = optimizer.grad.copy()
        optimizer.zero()
        accumulate(model, *batch(6, seed=9))
        close(grad, optimizer.grad, 1e-12)


# -------------------------------------------------------------------------------- how they end


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.mark.quick
def test_close_ends_the_processes_and_gives_the_threads_back():
    model, optimizer = made()
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        team = Workers(model, optimizer, 3)
        try:
            assert set(blas_threads()) == {1} != set(before)
            assert len(team.processes) == 2 and all(process.is_alive() for process in team.processes)
            training_step(model, optimizer, *batch(), team=team)
        finally:
            start = time.monotonic()
            team.close()
        assert time.monotonic() - start < 3.0
        assert [process.exitcode for process in team.processes] == [0, 0]  # by themselves, none was killed
        assert all(gone(process.pid) and not process.is_alive() for process in team.processes)
        assert blas_threads() == before


def test_after_close_the_model_trains_on_alone_and_with_another_team():
    (alone, one), (model, optimizer) = made("delta_lora"), made("delta_lora")
    batches, mixed = [batch(seed=seed) for seed in range(4)], []
    losses, *_ = stepped(alone, one, batches)
    for two in (batches[:2], batches[2:]):
        with Workers(model, optimizer, 2) as team:
            mixed += stepped(model, optimizer, two[:1], team)[0]
        mixed += stepped(model, optimizer, two[1:])[0]
    np.testing.assert_allclose(mixed, losses, rtol=1e-12)
    assert_same(unload(model), weights(GPT(TINY, dtype=np.float64)))


def test_ctrl_c_is_for_this_process_alone_and_ends_the_others():
    model, optimizer = made(kind=Poisoned)
    with Workers(model, optimizer, 2) as team:
        (process,) = team.processes
        training_step(model, optimizer, *batch(), team=team)  # once it answers, it has set its signals
        os.kill(process.pid, signal.SIGINT)
        training_step(model, optimizer, *batch(), team=team)
        assert process.is_alive()

        def interrupt(loss):
            raise KeyboardInterrupt

        model.act = interrupt
        with pytest.raises(KeyboardInterrupt):
            training_step(model, optimizer, *poisoned(0), team=team)
        assert not process.is_alive()


def test_a_worker_that_is_left_in_the_middle_of_its_share_ends_in_silence(capfd):
    model, optimizer = made(kind=Poisoned)
    model.act = lambda loss: time.sleep(0.2)
    with Workers(model, optimizer, 2) as team:
        team.connections[0].send((*poisoned(), None, 1, 8, False))
    assert not team.processes[0].is_alive()
    assert capfd.readouterr().err == ""  # no traceback of a broken pipe


def test_a_worker_that_does_not_end_is_killed(monkeypatch):
    model, optimizer = made(kind=Poisoned)
    model.act = lambda loss: time.sleep(60.0)
    team = Workers(model, optimizer, 2)
    (process,) = team.processes
    team.connections[0].send((*poisoned(), None, 1, 8, False))
    join = process.join
    monkeypatch.setattr(process, "join", lambda timeout=None: join(0.1))  # not the whole time that close() gives
    team.close()
    assert within(5.0, lambda: not process.is_alive())
    assert process.exitcode == -signal.SIGKILL


ORPHANS = """
import sys, time
import numpy as np
from minilora import GPT, AdamW, GPTConfig
from minilora.training.workers import Workers
model = GPT(GPTConfig(7, 8, 16, 1, 2))
team = Workers(model, AdamW(model.trainable(), lr=0.01), 3)
ids = np.zeros((3, 4), int)
team.accumulate(ids, ids)
print(*(process.pid for process in team.processes), flush=True)
time.sleep(60)
"""


def test_workers_do_not_outlive_a_parent_that_crashed():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(gone(pid) for pid in pids)
        parent.kill()  # no close(), no exit handler
        assert parent.wait(timeout=5) == -signal.SIGKILL
        assert within(5.0, lambda: all(gone(pid) for pid in pids))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


# -------------------------------------------------------------------------------- what is refused


REFUSED = {  # workers, the system, what is said
    "none": (0, "linux", "workers is 0; it must be an integer of at least 1"),
    "text": ("2", "linux", "workers is '2'; it must be an integer of at least 1"),
    "elsewhere": (2, "darwin", "need Linux, this is darwin; use workers=1"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_has_moved(name, monkeypatch):
    n, platform, message = REFUSED[name]
    model, optimizer = made()
    before = {name: p.data for name, p in model.named_parameters()}
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(InputError, match=message):
        train(model, optimizer, iter([batch()]), 1, workers=n)
    assert all(p.data is before[name] for name, p in model.named_parameters())


@pytest.mark.quick
def test_a_model_on_a_gpu_is_refused():
    with pytest.raises(InputError, match="on a GPU use workers=1"):
        Workers(made()[0], types.SimpleNamespace(data=object()), 2)
