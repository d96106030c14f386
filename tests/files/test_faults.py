"""A disk that fails in a run: the newest checkpoint is whole, and the run resumes from it to the same bits.

These tests exist because a full disk is the commonest end of a long run, and comes in the middle of a save.
"""

import errno
import os

import pytest
from runs import assert_same, make_inputs, state_of

from minilora.cli import main
from minilora.files import saving
from minilora.files.checkpoint import open_training, steps_taken
from minilora.files.tensorfile import TensorFile
from minilora.lab import finetune

CALLS = ("open", "write", "fsync", "replace", "open", "fsync")  # of a save; the last two are about the folder
MIDDLE, LAST = 2, -1  # saves that a fault is put into: a checkpoint, and the record of the finished run
OPTIONS = {"lora": [], "delta_lora": ["--start-step", "1"]}


class Disk:
    """The module os as saving.py sees it: the calls of CALLS are counted, and the one of number ``at`` fails.

    ``lasting``: all later calls fail too. What fsync asks for takes most of a run's time here, and only a power cut
    would show it, so it is only counted.
    """

    def __init__(self, at=None, code=errno.ENOSPC, lasting=False):
        self.at, self.code, self.lasting, self.calls = at, code, lasting, []

    def __getattr__(self, name):
        real = getattr(os, name)
        return real if name not in CALLS else lambda *args: self.call(name, real, args)

    def call(self, name, real, args):
        number = len(self.calls)
        self.calls.append(name)
        if number == self.at or (self.lasting and number > self.at):
            raise OSError(self.code, os.strerror(self.code))
        return None if name == "fsync" else real(*args)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), width=8)


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """The text that a run writes before and after takes longer than its training here."""
    monkeypatch.setattr(finetune, "write_sample", lambda *_: "")


def run(folder, method, inputs, disk):
    """Start the run, or resume it if it has a checkpoint; the exit code."""
    words = ["train", method, "--base", inputs[0], "--data", inputs[1], "--out", folder, "--steps", 4, "--batch", 2,
             "--r", 2, "--checkpoint-every", 1, "--workers", 1, *OPTIONS[method]]  # fmt: skip
    if (folder / finetune.CHECKPOINT).exists():
        words = ["train", "--resume", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "os", disk)
        return main([str(word) for word in words])


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """By method, (the state after a run that nothing disturbed, how many saves it made)."""
    found = {}
    for method in OPTIONS:
        folder, disk = tmp_path_factory.mktemp("undisturbed"), Disk()
        assert run(folder, method, inputs, disk) == 0
        saves = disk.calls.count("replace")
        assert tuple(disk.calls) == CALLS * saves and saves >= 6
        found[method] = state_of(folder), saves
    return found


FAULTS = [(save, call) for save in (MIDDLE, LAST) for call in range(len(CALLS))]


@pytest.mark.parametrize(("save", "call"), FAULTS)
def test_a_run_resumes_to_the_same_bits_after_a_fault(save, call, inputs, undisturbed, tmp_path, capsys):
    method = ("lora", "delta_lora")[call % 2]  # the plain one, and one that moves base weights
    expected, saves = undisturbed[method]
    code = (errno.ENOSPC, errno.EIO)[(save + call) // 2 % 2]
    assert run(tmp_path, method, inputs, Disk(save % saves * len(CALLS) + call, code, lasting=call % 3 == 0)) == 2
    said = capsys.readouterr().err
    assert "cannot write" in said and os.strerror(code) in said and said.count("\n") == 1
    assert not list(tmp_path.glob(".*"))
    for path in tmp_path.glob("*.safetensors"):
        TensorFile(path).read()
    taken = steps_taken(open_training(tmp_path / finetune.CHECKPOINT)[0])
    renamed = call > CALLS.index("replace")
    if save == LAST:
        assert taken == 4
    else:
        assert f"the checkpoint of step {taken - renamed} is good" in said
    assert run(tmp_path, method, inputs, Disk()) == 0
    assert_same(state_of(tmp_path), expected)
