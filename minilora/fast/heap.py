"""Tell glibc to keep freed memory in the process: worth a quarter to a third of a training step."""

import ctypes
import sys

from ..training import trainer


def keep_heap() -> bool:
    """Ask malloc to give no freed memory back to the system; returns whether that was possible.

    A training step frees and allocates the same large arrays over and over. By default glibc returns them to the system
    each time, and faulting the pages in again costs a quarter to a third of a step. The setting holds for the whole
    process, so train() makes it, and importing does not. Harmless without glibc.
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


trainer.PREPARATIONS.append(keep_heap)
