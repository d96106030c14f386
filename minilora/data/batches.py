"""Batches are the blocks of token ids that a training step or an evaluation takes at once.
They live apart from the texts so that both kinds, random and fixed, can be read side by side.
"""

from collections.abc import Iterator

import numpy as np

from ..errors import InputError

Batch = tuple[np.ndarray, np.ndarray]


def random_batches(ids, batch: int, context: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Endless (inputs, targets) for training, both int64 of shape (batch, context), at offsets drawn from ``rng``.

    ``ids`` are token ids of shape (N,). targets[b, t] is the token that follows inputs[b, t].
    Raises InputError at the call when ``ids`` is too short or not a row of whole numbers, or a size is below 1.
    """
    windows = _windows(ids, batch, context)
    if not isinstance(rng, np.random.Generator):
        raise InputError(f"rng must be a NumPy Generator, such as np.random.default_rng(0), not {type(rng).__name__}")

    def draw() -> Iterator[Batch]:
        while True:
            yield _shifted(windows[rng.integers(len(windows), size=batch)])

    return draw()


def fixed_batches(ids, batch: int, context: int, limit: int | None = None) -> list[Batch]:
    """The same (inputs, targets) at every call, for evaluation: back-to-back windows of ``context`` tokens.

    Each pair is int64 of shape (batch, context); the last may have fewer rows. ``limit`` keeps at most that many
    windows, spread evenly over ``ids`` (N,). A tail shorter than context + 1 tokens is left out.
    Raises InputError as random_batches() does, and for a limit below 1.
    """
    windows = _windows(ids, batch, context)[::context]
    if limit is not None:
        if limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}; None keeps every window")
        keep = min(limit, len(windows))
        windows = windows[np.arange(keep) * len(windows) // keep]
    return [_shifted(windows[i : i + batch]) for i in range(0, len(windows), batch)]


def _windows(ids, batch: int, context: int) -> np.ndarray:
    """Every run of context + 1 neighbouring tokens as a view: (N - context, context + 1) int64."""
    ids = np.asarray(ids)
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if ids.ndim != 1:
        raise InputError(f"ids must be one row of token ids, not of shape {ids.shape}")
    if len(ids) < context + 1:
        least = f"a context of {context}, which needs at least {context + 1}"
        raise InputError(f"{len(ids)} tokens are too few for {least}; give a longer text or a shorter context")
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"ids must be whole numbers, not {ids.dtype}")
    return np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), context + 1)


def _shifted(windows: np.ndarray) -> Batch:
    """(B, T + 1) windows as inputs (B, T) and targets (B, T): copies, so a caller may change them."""
    return windows[:, :-1].copy(), windows[:, 1:].copy()
