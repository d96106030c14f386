"""The gradient of one batch, added up over its micro-batches (gradient accumulation)."""

import numpy as np

from ..backend import array_module
from ..engine import backward
from ..errors import InputError
from ..ops import IGNORE_INDEX


def accumulate(model, ids, targets, rng=None, micro_batches=1, total=None, watch=None):
    """Add the gradient of the mean loss to every trained parameter; returns the loss, a number or a device scalar.

    The sequences are taken in ``micro_batches`` parts, one after another. A mean is a weighted sum of the parts' means,
    so the gradient is the same, and only one part's activations are in memory at a time. ``total``: the number of
    targets that the mean is over, where these are not all of them. ``watch(loss)`` sees each part's loss before
    backward frees its graph. Raises InputError for fewer than 1 or more parts than sequences.
    """
    check_parts(micro_batches, len(ids))
    total, value = count_targets(targets) if total is None else total, 0.0
    for part in split(len(ids), micro_batches):
        share = count_targets(targets[part]) / max(1, total)
        if total and not share:
            continue
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the loop reports what is not finite
            loss = model.loss(ids[part], targets[part], rng)
            if watch is not None:
                watch(loss)
            value = value + share * loss.data.astype(np.float64)
            backward(loss, array_module(loss.data).asarray(share, loss.dtype))
    return value


def check_parts(micro_batches, n):
    if not isinstance(micro_batches, int) or not 1 <= micro_batches <= n:
        raise InputError(f"micro_batches is {micro_batches!r}; it must be an integer in 1 … {n}, a batch's sequences")


def split(n, parts):
    """``parts`` slices of ``n`` sequences, alike in size; some are empty where n < parts."""
    return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def count_targets(targets) -> int:
    return int((targets != IGNORE_INDEX).sum())
