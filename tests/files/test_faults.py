"""A disk that fails at any moment of a run: the newest checkpoint is whole, and the run goes on from it to the bit.

These tests exist because a full disk is the commonest end of a long run, and comes in the middle of a save.
"""

import errno
import os

import pytest
from runs import assert_same, make_inputs, opens_to_read, state_of

from minilora import methods
from minilora.errors import InputError
from minilora.files import tensorfile as files
from minilora.files.checkpoint import open_training, steps_taken
from minilora.files.tensorfile import TensorFile
from minilora.lab import finetune

STEPS, SAVES = 4, 6  # a checkpoint at each step, then the adapter and the history
CALLS = ("open", "write", "fsync", "replace", "open", "fsync")  # what a save asks of the disk: the last two a folder's
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}


class Disk:
    """The module os as files.py sees it: it counts the calls of CALLS, and the one of number ``at`` fails.

    What fsync asks for takes most of a run's time here, and only a power cut would show it: it is counted alone.
    """

    def __init__(self, at=None, code=None, short=None, lasting=False):
        self.at, self.code, self.short, self.lasting, self.calls = at, code, short, lasting, []

    def __getattr__(self, name):
        real = getattr(os, name)
        return real if name not in CALLS else lambda *args: self.call(name, real, args)

    def call(self, name, real, args):
        if opens_to_read(name, args):
            return real(*args)
        number = len(self.calls)
        self.calls.append(name)
        if name == "write" and self.short is not None and (self.at is None or number <= self.at):
            file, data = args
            return real(file, data[: self.short])
        if number == self.at or (self.lasting and self.at is not None and number > self.at):
            raise OSError(self.code, os.strerror(self.code))
        return None if name == "fsync" else real(*args)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), width=8)


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """The text that a run writes before and after takes longer than its training here."""
    monkeypatch.setattr(finetune, "write_sample", lambda *_: "")


def start(name, inputs, out):
    method = methods.create(name, **methods.known(name, r=2, start_step=1))
    base, text = inputs
    return finetune.finetune(
        method, ["q", "up"], data=text, steps=STEPS, lr=0.05, batch=2, warmup=1, weight_decay=0.1, out=out,
        base=base, every=1, progress=False, report=lambda *_: None,
    )  # fmt: skip


def on(disk, monkeypatch, run):
    """``run()`` with the disk in the place of the true one."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", disk)
        return run()


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """By method, (the state after a run that nothing disturbed, the calls that it made of the disk)."""
    found = {}

    def run(name):
        if name not in found:
            folder, disk = tmp_path_factory.mktemp("undisturbed"), Disk()
            with pytest.MonkeyPatch.context() as patch:
                on(disk, patch, lambda: start(name, inputs, folder))
            found[name] = state_of(folder), disk.calls
        return found[name]

    return run


def litter(folder):
    return [path.name for path in folder.iterdir() if path.suffix == ".minilora"]


def go_on(name, inputs, folder, monkeypatch, disk=None):
    """As a user would: from the checkpoint, if there is one."""
    if (folder / finetune.CHECKPOINT).exists():
        run = lambda: finetune.resume(folder, progress=False, report=lambda *_: None)
    else:
        run = lambda: start(name, inputs, folder)
    on(disk or Disk(), monkeypatch, run)


FAULTS = [
    (save, call, kind, lasting)
    for save in range(SAVES)
    for call in range(len(CALLS))
    for kind, lasting in [("full", False), ("broken", False), ("full", True)]
]


def test_a_save_makes_the_calls_that_the_faults_are_put_in(undisturbed):
    for name in ("lora", "delta_lora"):
        assert tuple(undisturbed(name)[1]) == CALLS * SAVES
    assert len(FAULTS) >= 100


@pytest.mark.parametrize(("save", "call", "kind", "lasting"), FAULTS)
def test_a_run_goes_on_to_the_bit_after_a_fault_at_any_call(
    save, call, kind, lasting, inputs, undisturbed, tmp_path, monkeypatch
):
    name = "delta_lora" if (save + call) % 2 else "lora"  # the one that moves base weights, and the plain one
    expected, _ = undisturbed(name)
    disk = Disk(save * len(CALLS) + call, ERRORS[kind], lasting=lasting)
    with pytest.raises(InputError) as caught:
        on(disk, monkeypatch, lambda: start(name, inputs, tmp_path))
    text, steps = str(caught.value), min(save, STEPS)
    assert "cannot write" in text and os.strerror(ERRORS[kind]) in text and "\n" not in text
    if save < STEPS:
        said = f"the checkpoint of step {steps} is good" if steps else "no step is saved yet"
        assert f"stopped after step {save + 1}" in text and said in text
    assert litter(tmp_path) == []

    renamed = call >= CALLS.index("replace") + 1 and save < STEPS  # the new checkpoint has its name, and is whole
    checkpoint = tmp_path / finetune.CHECKPOINT
    assert checkpoint.exists() == (steps + renamed > 0)
    if checkpoint.exists():
        file, _ = open_training(checkpoint)
        assert steps_taken(file) == steps + renamed and len(file.read()["history.loss"]) == steps + renamed
    for written in tmp_path.glob("*.safetensors"):
        TensorFile(written).read()

    go_on(name, inputs, tmp_path, monkeypatch)
    assert_same(state_of(tmp_path), expected)
    assert litter(tmp_path) == []


@pytest.mark.parametrize("short", [100, 2000])
def test_a_disk_that_takes_a_part_at_a_time_changes_nothing(short, inputs, undisturbed, tmp_path, monkeypatch):
    expected, calls = undisturbed("lora")
    disk = Disk(short=short)
    on(disk, monkeypatch, lambda: start("lora", inputs, tmp_path))
    assert_same(state_of(tmp_path), expected)
    assert len(disk.calls) > len(calls)


@pytest.mark.parametrize("save", range(SAVES))
def test_a_disk_that_is_full_after_a_part(save, inputs, undisturbed, tmp_path, monkeypatch):
    """As full disks are: a write takes what there is room for, and the next one fails."""
    expected, _ = undisturbed("lora")

    class Filling(Disk):
        def call(self, name, real, args):
            if name == "write" and self.calls.count("replace") == save:
                if self.calls[-1] == "write":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.calls.append(name)
                return real(args[0], args[1][:100])
            return super().call(name, real, args)

    disk = Filling()
    with pytest.raises(InputError, match="No space left on device"):
        on(disk, monkeypatch, lambda: start("lora", inputs, tmp_path))
    assert disk.calls[-1] == "write" and litter(tmp_path) == []
    go_on("lora", inputs, tmp_path, monkeypatch)
    assert_same(state_of(tmp_path), expected)


def test_a_fault_while_a_run_goes_on(inputs, undisturbed, tmp_path, monkeypatch):
    """Twice: in the run, and in the run that goes on."""
    expected, _ = undisturbed("lora")
    with pytest.raises(InputError):
        on(Disk(2 * len(CALLS) + 2, errno.EIO), monkeypatch, lambda: start("lora", inputs, tmp_path))
    disk = Disk(2 + 3, errno.ENOSPC)  # two calls open the checkpoint and are no save's
    with pytest.raises(InputError, match="No space left"):
        go_on("lora", inputs, tmp_path, monkeypatch, disk)
    assert "write" in disk.calls and litter(tmp_path) == []
    go_on("lora", inputs, tmp_path, monkeypatch)
    assert_same(state_of(tmp_path), expected)
