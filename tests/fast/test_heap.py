"""Freed memory is kept for a training, and where it cannot be, nothing happens."""

import ctypes
import sys
import types

import pytest

from minilora.fast.heap import keep_heap
from minilora.training import trainer

pytestmark = pytest.mark.quick


def test_train_calls_it_before_the_first_step_and_may_do_so_again():
    assert keep_heap in trainer.PREPARATIONS
    assert keep_heap() is keep_heap()


def no_library(name):
    raise OSError("no such library")


@pytest.mark.parametrize(
    ("platform", "load"),
    [("darwin", ctypes.CDLL), ("linux", lambda name: types.SimpleNamespace()), ("linux", no_library)],
    ids=["elsewhere", "no mallopt", "no library"],
)
def test_keep_heap_does_without_glibc(monkeypatch, platform, load):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert keep_heap() is False


@pytest.mark.parametrize("limit", [2**31 - 1, 32 * 2**20])
def test_keep_heap_raises_the_mmap_threshold_as_far_as_glibc_lets_it(monkeypatch, limit):
    """An older glibc refuses a threshold above 32 MiB. With it refused and the trim threshold set, the threshold
    would stay at 128 KiB for good, which is worse than the default that adapts.
    """
    settings = {}

    def mallopt(parameter, value):
        if parameter == -3 and value > limit:
            return 0
        settings[parameter] = value
        return 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    assert keep_heap() is True
    assert settings == {-1: 2**31 - 1, -3: limit}
