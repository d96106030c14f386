"""NumPy or CuPy: the one file that knows which. Everywhere else an array is just an array.

The array decides, there is no global switch: ``array_module(x)`` is the library that ``x`` belongs to.
CuPy is imported only when a GPU is asked for or a CuPy array is met.
"""

import ctypes
import importlib
import math
import sys

import numpy as np

from .errors import InputError


def array_module(*arrays):
    """The library (``numpy`` or ``cupy``) that all ``arrays`` belong to.

    Raises InputError for a mixture of the two, or for something that is no array.
    """
    for array in arrays:
        if not isinstance(array, np.ndarray):
            break
    else:
        return np
    names = {_library(a) for a in arrays}
    if len(names) > 1:
        raise InputError(
            "NumPy and CuPy arrays are mixed in one operation; move all of them to one device "
            'first, with model.to("cuda") or model.to("cpu")'
        )
    return np if names <= {"numpy"} else sys.modules["cupy"]


def _library(array) -> str:
    if isinstance(array, np.ndarray | np.generic):
        return "numpy"
    if type(array).__module__.partition(".")[0] == "cupy":
        return "cupy"
    raise InputError(f"expected a NumPy or CuPy array, got {type(array).__name__}")


def device_module(device: str):
    """The array library behind ``device``, "cpu" or "cuda".

    Raises InputError for another name, and for "cuda" without CuPy or without a usable GPU.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise InputError(f'unknown device "{device}"; use "cpu" or "cuda"')
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise InputError(
            'device "cuda" needs CuPy, which is not installed; '
            "pip install 'minilora[gpu12]' for CUDA 12 or 'minilora[gpu13]' for CUDA 13, or use the device \"cpu\""
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError: no driver, no device, driver too old
        raise InputError(f'device "cuda": CuPy finds no usable GPU ({error}); use the device "cpu"') from error
    if count == 0:
        raise InputError('device "cuda": CuPy finds no GPU; use the device "cpu"')
    return cupy


def to_device(array, xp):
    """``array`` as an array of the library ``xp``; the same object where it already is one."""
    if _library(array) == xp.__name__:
        return array
    return xp.asarray(array) if xp is not np else sys.modules["cupy"].asnumpy(array)


def to_host(array) -> np.ndarray:
    """``array`` as a NumPy array."""
    return to_device(array, np)


def fetch(*numbers) -> list[float]:
    """0-d arrays, or numbers, as floats: those of a GPU, which is waited for, in one transfer."""
    there = [n for n in numbers if not isinstance(n, int | float | np.ndarray | np.generic)]
    if not there:
        return [float(n) for n in numbers]
    xp = array_module(*there)
    fetched = iter(xp.stack([n.astype(np.float64) for n in there]).get().tolist())
    return [next(fetched) if any(n is t for t in there) else float(n) for n in numbers]


class Memory(np.ndarray):
    """The bytes that an array of empty() lies in, with room to begin at a cache line."""


def empty(shape, like):
    """An array of ``shape``, not yet written, of the library and dtype of ``like``.

    NumPy's begin at a cache line: with AVX-512, operations write there up to twice as fast as elsewhere.
    """
    size, line = math.prod(shape) * like.itemsize, 64
    if not isinstance(like, np.ndarray) or size < 64 * line:
        return array_module(like).empty(shape, like.dtype)
    memory = np.ndarray.__new__(Memory, size + line, np.uint8)
    offset = -memory.__array_interface__["data"][0] % line
    return np.ndarray(shape, like.dtype, memory, offset)


def keep_heap() -> bool:
    """Tell glibc to keep freed memory in the process; returns whether that was possible.

    A training step frees and allocates the same large arrays over and over. By default glibc gives them back to
    the system each time, and faulting the pages in again costs a quarter to a third of a step. The setting holds
    for the whole process, so it is made by the training loop and by nothing at import. Harmless without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl and others have no mallopt
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    most, older_most = 2**31 - 1, 32 * 2**20  # an older glibc takes no mmap threshold above 32 MiB
    mapped = mallopt(mmap_threshold, most) or mallopt(mmap_threshold, older_most)
    return bool(mapped and mallopt(trim_threshold, most))
