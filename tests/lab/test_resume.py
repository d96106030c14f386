"""A run that is stopped or killed at any moment resumes to the state that it would have reached, bit for bit.

These tests exist because a resumed run that differs a little looks like a good one. ``--kills N`` says how often a
training process is killed here: 10 by default, 200 in .ci/run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import assert_same, make_inputs, run_in_a_child, state_of

from minilora import GPT, methods
from minilora.cli import main
from minilora.errors import InputError, Interrupted, TrainingStopped
from minilora.files import saving
from minilora.files.base import load_model, save_model
from minilora.files.checkpoint import load_adapter, open_training, steps_taken
from minilora.files.errors import AdapterFormatError
from minilora.files.tensorfile import TensorFile
from minilora.lab import finetune
from minilora.lab.settings import Settings

STEPS = 7


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), width=16)


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """The text that a run writes before and after takes five times as long as its training here."""
    monkeypatch.setattr(finetune, "write_sample", lambda *_: "")


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """In a job that was started in the background SIGINT is ignored, and stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(name, inputs, out, overwrite=False, **options):
    base, text = inputs
    own = methods.known(name, r=2, start_step=2)
    usual = {"steps": STEPS, "lr": 0.05, "batch": 2, "warmup": 2, "every": 1, "weight_decay": 0.1, "workers": 1}
    settings = Settings(name, own, base=base, data=text, **(usual | options))
    return finetune.finetune(settings, out, overwrite, progress=False, report=lambda *_: None)


def go_on(out):
    return finetune.resume(out, progress=False, report=lambda *_: None)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """state_of() a run that nothing interrupted, by method and options; each is run once."""
    found = {}

    def run(name, **options):
        key = f"{name} {options}"
        if key not in found:
            folder = tmp_path_factory.mktemp(name)
            start(name, inputs, folder, **options)
            found[key] = state_of(folder)
        return found[key]

    return run


@contextlib.contextmanager
def stopped_after(saves):
    """Raise KeyboardInterrupt in a run, right behind its checkpoint number ``saves``."""
    save, count = finetune.save_training, [0]

    def counting(*arguments):
        save(*arguments)
        count[0] += 1
        if count[0] == saves:
            raise KeyboardInterrupt

    finetune.save_training = counting
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        finetune.save_training = save


# ------------------------------------------------------------------------------------------------ bit for bit


def resumed(name, inputs, folder, **options):
    """The model of a run that is stopped after step 1, after step 4, and then ends."""
    with stopped_after(1):
        start(name, inputs, folder, **options)
    assert not (folder / finetune.ADAPTER).exists()
    with stopped_after(3):
        go_on(folder)
    assert steps_taken(open_training(folder / finetune.CHECKPOINT)[0]) == 4
    return go_on(folder)


CASES = [(name, {}) for name in methods.names()]
CASES += [("lora", {"micro_batches": 2, "recompute": True, "targets": ["q", "down"]}), ("delta_lora", {"workers": 2})]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(name, options, inputs, undisturbed, tmp_path):
    model = resumed(name, inputs, tmp_path, **options)
    assert_same(undisturbed(name, **options), state_of(tmp_path))
    loaded = load_adapter(tmp_path / finetune.ADAPTER, load_model(inputs[0]))
    for (path, p), (other, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert path == other
        np.testing.assert_array_equal(p.data, q.data)


OTHER = {
    "steps": 6, "lr": 0.01, "batch": 3, "warmup": 0, "weight_decay": 0.5, "clip": 0.01, "seed": 1, "targets": ["q"],
    "micro_batches": 2, "recompute": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OTHER.items(), ids=OTHER)
def test_each_setting_changes_the_run(name, value, inputs, undisturbed, tmp_path):
    """The last two only change how many bytes are saved for backward, which the checkpoint counts."""
    start("lora", inputs, tmp_path, **{name: value})
    usual, other = dict(undisturbed("lora")), state_of(tmp_path)
    for state in (usual, other):
        del state[f"{finetune.CHECKPOINT} settings"]
    with pytest.raises(AssertionError):
        assert_same(usual, other)


def test_a_finished_run_may_be_gone_on_with(inputs, undisturbed, tmp_path):
    """It may have been killed between its last checkpoint and the adapter."""
    start("lora", inputs, tmp_path)
    (tmp_path / finetune.ADAPTER).unlink()
    (tmp_path / finetune.HISTORY).unlink()
    go_on(tmp_path)
    assert_same(undisturbed("lora"), state_of(tmp_path))


def test_with_other_workers_the_run_says_that_rounding_differs(inputs, undisturbed, tmp_path):
    with stopped_after(3):
        start("lora", inputs, tmp_path)
    said = []
    finetune.resume(tmp_path, workers=2, progress=False, report=said.append)
    assert said[0] == "The run began with workers 1: with 2 it is the same but for rounding."
    for key, value in state_of(tmp_path).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(value, undisturbed("lora")[key], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ killed


class KillInASave:
    """Lets the process kill itself at the ``at``-th call that a save makes of the system, after half a write if it is
    one, and before or after the call otherwise."""

    def __init__(self, at, after):
        self.left, self.after = at, after

    def __getattr__(self, name):
        value = getattr(os, name)
        return (lambda *a: self.call(name, value, *a)) if name in ("open", "write", "fsync", "replace") else value

    def call(self, name, value, *arguments):
        self.left -= 1
        if self.left == 0:
            if name == "write":
                value(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif self.after:
                value(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return value(*arguments)


SAVE_CALLS = 6  # open, write, fsync, replace, open the folder, fsync it


@pytest.fixture
def seconds(inputs, tmp_path_factory):
    """How long a run takes here and now."""
    begin = time.perf_counter()
    assert run_in_a_child(lambda: start("lora", inputs, tmp_path_factory.mktemp("timing"))) == 0
    return time.perf_counter() - begin


def test_killed_at_random_moments_the_newest_checkpoint_is_always_good(inputs, undisturbed, tmp_path, seconds, request):
    kills = request.config.getoption("kills")
    rng, in_saves, others, resumed = np.random.default_rng(0), 0, 0, 0
    for name in methods.names():
        undisturbed(name)
    case = 0
    while in_saves + others < kills:
        name = methods.names()[case % len(methods.names())]
        folder, case, code, lives = tmp_path / str(case), case + 1, None, 0
        while code != 0:
            saved = (folder / finetune.CHECKPOINT).exists()
            job = (lambda f=folder: go_on(f)) if saved else (lambda f=folder, n=name: start(n, inputs, f))
            resumed += saved
            if lives < 2 and in_saves + others < kills:
                if in_saves <= others:
                    at, after = int(rng.integers(1, SAVE_CALLS * (STEPS - 2 * lives))), bool(rng.integers(2))
                    code = run_in_a_child(lambda j=job, a=at, b=after: (setattr(saving, "os", KillInASave(a, b)), j()))
                    in_saves += code == -signal.SIGKILL
                else:
                    code = run_in_a_child(job, rng.uniform(0.0, seconds))
                    others += code == -signal.SIGKILL
                lives += 1
            else:
                code = run_in_a_child(job)
                assert code == 0
            assert code in (0, -signal.SIGKILL)
            if (folder / finetune.CHECKPOINT).exists():
                file, _ = open_training(folder / finetune.CHECKPOINT)
                assert 1 <= steps_taken(file) <= STEPS and file.read()
        assert_same(undisturbed(name), state_of(folder))
        left = {path.name for path in folder.iterdir() if path.suffix != ".minilora"}  # but for what was half written
        assert left == {finetune.ADAPTER, finetune.CHECKPOINT, finetune.HISTORY, finetune.SETTINGS}
    print(f"{in_saves} killed in a save, {others} at other moments, {resumed} resumed")
    assert in_saves >= kills // 4 and others >= kills // 4 and resumed > 0


# ------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_between_two_steps_saves_and_says_how_to_go_on(inputs, tmp_path, signum, code):
    """The command itself, in a process of its own."""
    base, text = inputs
    run = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "minilora", "train", "lora", "--base", base, "--data", text, "--out", run,
               "--steps", "1000000", "--batch", "2", "--workers", "1", "--checkpoint-every", "1000000"]  # fmt: skip
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # the fixture's handler becomes the default there
        assert "layers matched" in process.stdout.readline()  # right before the first step
        time.sleep(0.1)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    steps = steps_taken(open_training(run / finetune.CHECKPOINT)[0])
    assert f"stopped and saved after step {steps} of 1000000; to resume: minilora train --resume {run}\n" in error
    assert "Traceback" not in error


def test_a_signal_within_a_step_lets_the_step_finish(inputs, undisturbed, tmp_path, monkeypatch):
    train = finetune.train

    def training(model, optimizer, batches, *arguments, **options):
        def interrupted(batches):
            for i, batch in enumerate(batches):
                if i == 2:
                    signal.raise_signal(signal.SIGINT)  # in step 3, before its loss
                yield batch

        return train(model, optimizer, interrupted(batches), *arguments, **options)

    monkeypatch.setattr(finetune, "train", training)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped and saved after step 3 of 7; to resume: minilora train --resume"):
        start("dora", inputs, tmp_path, every=100)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    monkeypatch.setattr(finetune, "write_sample", lambda *_: "")
    go_on(tmp_path)
    ours, theirs = undisturbed("dora"), state_of(tmp_path)
    key = f"{finetune.CHECKPOINT} settings"
    assert json.loads(ours.pop(key)) | {"every": 100} == json.loads(theirs.pop(key))
    assert_same(ours, theirs)


def test_the_second_signal_stops_at_once(inputs, tmp_path, monkeypatch):
    def training(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(finetune, "train", training)
    with pytest.raises(KeyboardInterrupt):
        start("lora", inputs, tmp_path)


def test_a_signal_that_is_ignored_stays_ignored(inputs, undisturbed, tmp_path, monkeypatch):
    """Ctrl-C at the terminal is not for a job in the background, nor a hang-up's SIGINT for one under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    train = finetune.train

    def training(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return train(*arguments, **options)

    monkeypatch.setattr(finetune, "train", training)
    start("lora", inputs, tmp_path)
    assert_same(undisturbed("lora"), state_of(tmp_path))


# ------------------------------------------------------------------------------------------------ nothing is lost


def test_an_unfinished_run_is_not_written_over(inputs, tmp_path):
    with stopped_after(3):
        start("lora", inputs, tmp_path)
    before = (tmp_path / finetune.CHECKPOINT).read_bytes()
    with pytest.raises(
        InputError, match=r'holds an unfinished run \("lora", step 3 of 7\): resume it with minilora train'
    ):
        start("vera", inputs, tmp_path)
    assert (tmp_path / finetune.CHECKPOINT).read_bytes() == before
    start("vera", inputs, tmp_path, overwrite=True)
    assert TensorFile(tmp_path / finetune.ADAPTER).metadata["method"] == "vera"
    start("lora", inputs, tmp_path)  # a finished one is
    (tmp_path / finetune.CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"holds a checkpoint that cannot be read \(is not a training checkpoint"):
        start("lora", inputs, tmp_path)


def test_a_loss_that_is_not_finite_leaves_the_last_good_adapter_and_no_checkpoint(inputs, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(TrainingStopped, match=r"saved in .*adapter\.safetensors"):
        start("lora", inputs, tmp_path, lr=1e30, clip=None, steps=30)
    assert all(np.isfinite(a).all() for a in TensorFile(tmp_path / finetune.ADAPTER).read().values())
    assert not (tmp_path / finetune.CHECKPOINT).exists()


def test_another_text_or_base_is_refused(inputs, tmp_path):
    base, text = tmp_path / "base.safetensors", tmp_path / "text.txt"
    base.write_bytes(inputs[0].read_bytes())
    text.write_text(inputs[1].read_text())
    with stopped_after(3):
        start("lora", (base, text), tmp_path / "run")
    text.write_text("the dog sat on the mat. " * 30)
    with pytest.raises(InputError, match=r"the text .*text\.txt is not the one that this run began with"):
        go_on(tmp_path / "run")
    text.write_text(inputs[1].read_text())
    save_model(base, GPT(load_model(base).config, rng=1))
    with pytest.raises(AdapterFormatError, match="was trained on another base model"):
        go_on(tmp_path / "run")


BAD_RESUMES = {
    "no such folder": (["--resume", "nowhere"], "there is no such checkpoint; a run's folder was expected"),
    "a setting too": (["lora", "--resume", "run", "--lr", "0.1"], "leave out lr, method"),
    "neither": ([], "name a method, one of"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_RESUMES.values(), ids=BAD_RESUMES)
def test_a_resume_that_cannot_be_is_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
