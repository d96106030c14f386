"""What a run of ``minilora train`` starts from and leaves, for tests that interrupt one and compare."""

import contextlib
import json
import os
import signal
import sys
import time
import warnings

import numpy as np

from minilora import GPT, GPTConfig
from minilora.files import tensorfile as files
from minilora.files.base import save_model
from minilora.files.tensorfile import TensorFile
from minilora.lab import finetune


def make_inputs(folder, width):
    """(base, text): a random tiny model and a short text, in files."""
    save_model(folder / "tiny.safetensors", GPT(GPTConfig(n_positions=width, n_embd=width, n_layer=1, n_head=2)))
    (folder / "text.txt").write_text("the cat sat on the mat. " * 30)
    return folder / "tiny.safetensors", folder / "text.txt"


def opens_to_read(name, arguments) -> bool:
    """Is a call of the system the start of a load, and not a part of a save? Only what is read is opened like this."""
    return name == "open" and bool(arguments[1] & os.O_NONBLOCK)


def state_of(folder):
    """All that a finished run leaves, but for how long its steps took."""
    found = {}
    for name in (finetune.ADAPTER, finetune.CHECKPOINT):
        file = TensorFile(folder / name)
        found |= {f"{name} {k}": a for k, a in file.read().items() if k != "history.seconds"}
        found |= {f"{name} {k}": v for k, v in file.metadata.items() if k != files.DIGEST}
    record = json.loads((folder / finetune.HISTORY).read_text())
    return found | {f"history {k}": v for k, v in record.items() if k != "seconds"}


def assert_same(one, other):
    """The same names with the same values, to the bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == other[key].dtype and value.tobytes() == other[key].tobytes(), key
        else:
            assert value == other[key], key


def run_in_a_child(job, kill_after=None, most=60):
    """The exit code of a forked process that does ``job``; negative where a signal ended it.

    ``kill_after``: seconds after which it is killed; ``most``: those that it may take.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: OpenBLAS's, and it is ready
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nothing:
                sys.stdout = sys.stderr = nothing
                signal.alarm(most)  # kills one that hangs
                job()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
