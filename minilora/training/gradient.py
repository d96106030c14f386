"""The gradient of one batch: forward and backward over its micro-batches, added up in the parameters."""

import math

import numpy as np

from ..backend import array_module
from ..engine import backward
from ..errors import InputError, TrainingStopped
from ..memory import kept_bytes
from ..ops import IGNORE_INDEX


def accumulate(model, ids, targets, rng=None, micro_batches=1, total=None, measure=False):
    """Add the gradient of the mean loss to every leaf: (loss, bytes kept for backward at most, 0 unless ``measure``).

    The sequences are taken in ``micro_batches`` parts, one after another: a mean is a weighted sum of the parts'
    means, so the gradient is the same, and only one part is in memory at a time. ``total``: the number of targets
    that the mean is over, where these are not all of them. On a GPU the loss stays there, as an array, unchecked.
    Raises InputError for fewer than 1 or more parts than sequences, TrainingStopped at a loss that is not finite.
    """
    check_parts(micro_batches, len(ids))
    total, value, kept = count_targets(targets) if total is None else total, 0.0, 0
    for part in split(len(ids), micro_batches):
        share = count_targets(targets[part]) / max(1, total)
        if total and not share:
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported below, in words
            loss = model.loss(ids[part], targets[part], rng)
        if array_module(loss.data) is np:
            value += share * float(loss.data)
            check_loss(value)
        else:
            value = value + share * loss.data.astype(np.float64)
        kept = max(kept, kept_bytes(loss, model)) if measure else 0
        with np.errstate(over="ignore", invalid="ignore"):
            backward(loss, array_module(loss.data).asarray(share, loss.dtype))
    return value, kept


def check_loss(value):
    if not math.isfinite(value):
        raise TrainingStopped(f"the loss is {value}; lower the learning rate or look at the data")


def check_parts(micro_batches, n):
    if not isinstance(micro_batches, int) or not 1 <= micro_batches <= n:
        raise InputError(f"micro_batches is {micro_batches!r}; it must be an integer in 1 … {n}, a batch's sequences")


def split(n, parts):
    """``parts`` slices of ``n`` sequences, alike in size; some are empty where n < parts."""
    return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def count_targets(targets) -> int:
    return int((targets != IGNORE_INDEX).sum())
