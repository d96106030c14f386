"""A bar where somebody looks, and where nobody does nothing that another process could hold."""

import io
import multiprocessing
import os
import signal
import sys

import pytest
from runs import run_in_a_child
from tqdm import tqdm

from minilora.training.progress import progress_bar

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_itself_on_a_terminal_alone(terminal, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(5, "a label", done=2) as bar:
        bar.update(2)
        bar.set_postfix_str("loss 1.000", refresh=True)
        bar.update()
    assert ("a label" in screen.getvalue() and "loss 1.000" in screen.getvalue()) is terminal
    assert ("2/5" in screen.getvalue()) is terminal


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_bar_that_is_not_shown_waits_for_no_process_that_was_killed(monkeypatch):
    lock = multiprocessing.RLock()  # as tqdm's is: forked processes share it
    monkeypatch.setattr(tqdm, "_lock", lock, raising=False)

    def killed():
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    def trains():
        with progress_bar(3, "label", False) as bar:
            bar.update()

    assert run_in_a_child(killed) == -signal.SIGKILL
    assert run_in_a_child(trains, most=5) == 0
