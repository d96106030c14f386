"""Whose code is asking? The library is held to CuPy's rules; a test, which is written with NumPy, is served.

The nearest frame of the call stack that lies in minilora/ or in tests/ decides; NumPy's own, this package's and the
standard library's are passed over. A mutant of a method file, compiled from text, counts as the library.
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TESTS, LIBRARY = HERE.parent, HERE.parent.parent / "minilora"
NUMPY = Path(np.__file__).resolve().parent

calls = 0  # how many operations on device arrays the library asked for
syncs = []  # (file, line) of each time the library waited for the device


@cache
def _is_library(file: str):
    """True for code of the library, False for a test's, None for what is passed over."""
    if file.startswith("<mutant of"):
        return True
    path = Path(file)
    if path.is_relative_to(LIBRARY):
        return True
    if path.is_relative_to(TESTS) and not path.is_relative_to(HERE):
        return False
    return None


def caller():
    """The frame that decides, and whether it is the library's."""
    frame = sys._getframe(2)
    while frame is not None:
        library = _is_library(frame.f_code.co_filename)
        if library is not None:
            return frame, library
        frame = frame.f_back
    return None, True


def strict() -> bool:
    """Whether CuPy's rules hold for this call; counts it where they do."""
    global calls
    _, library = caller()
    calls += library
    return library


def synchronise():
    """Note that the library waits here until the device is done."""
    frame, library = caller()
    if library:
        syncs.append((frame.f_code.co_filename, frame.f_lineno) if frame else ("?", 0))
