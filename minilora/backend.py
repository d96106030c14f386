"""NumPy or CuPy: the one file that knows which. Everywhere else an array is just an array.

The array decides, there is no global switch: ``array_module(x)`` is the library that ``x`` belongs to.
"""

import sys

import numpy as np

from .errors import InputError


def array_module(*arrays):
    """The library (``numpy`` or ``cupy``) that all ``arrays`` belong to.

    Raises InputError for a mixture of the two, or for something that is no array.
    """
    if all(isinstance(array, np.ndarray) for array in arrays):
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


def to_device(array, xp):
    """``array`` as an array of the library ``xp``; the same object where it already is one."""
    if _library(array) == xp.__name__:
        return array
    return xp.asarray(array) if xp is not np else sys.modules["cupy"].asnumpy(array)


def to_host(array) -> np.ndarray:
    """``array`` as a NumPy array."""
    return to_device(array, np)


def fetch(*numbers) -> list[float]:
    """Numbers and 0-d arrays as floats; those of a GPU arrive in one device-to-host transfer."""
    there = [n for n in numbers if not isinstance(n, int | float | np.ndarray | np.generic)]
    if not there:
        return [float(n) for n in numbers]
    xp = array_module(*there)
    fetched = iter(xp.stack([n.astype(np.float64) for n in there]).get().tolist())
    return [next(fetched) if any(n is t for t in there) else float(n) for n in numbers]
