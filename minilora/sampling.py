"""Writing text with a model: one token at a time, each drawn from the softmax of its logits."""

import math

import numpy as np

from .backend import array_module, to_host
from .engine import Tensor, no_grad
from .errors import InputError


class KeyValueCache:
    """The keys and values of the tokens seen so far, of one block: arrays (batch, past, d)."""

    def __init__(self):
        self.k = self.v = None

    def extend(self, k: Tensor, v: Tensor, batch):
        xp, d = array_module(k.data), k.shape[1]
        k, v = (a.data.reshape(batch, -1, d) for a in (k, v))
        if self.k is not None:
            k, v = xp.concatenate([self.k, k], axis=1), xp.concatenate([self.v, v], axis=1)
        self.k, self.v = k, v
        return Tensor(k.reshape(-1, d)), Tensor(v.reshape(-1, d))


def generate(model, ids, n: int, temperature=1.0, top_k=None, rng=None):
    """``n`` tokens after ids (B, T): returns (B, n) on the host. Greedy at temperature 0.

    Keys and values are kept, so a new token costs one row. Where the context is full, the later half of it is
    read again and sampling goes on. ``rng``: a NumPy Generator or a seed.
    Raises InputError for n < 1, a negative temperature, or top_k outside 1 … vocab_size.
    """
    if ids.ndim != 2:
        raise InputError(f"generate: ids have shape {ids.shape}; expected (batch, time)")
    if ids.size == 0:
        raise InputError("generate: the prompt is empty; give at least one token to go on from")
    if n < 1:
        raise InputError(f"generate: n is {n}; ask for at least one token")
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise InputError(f"generate: temperature is {temperature}; it must be finite, 0 (greedy) or above")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise InputError(f"generate: top_k is {top_k}; it must lie in 1 … {model.config.vocab_size}")
    rng = np.random.default_rng(rng)
    ids, context = to_host(ids), model.config.n_positions
    new, caches = ids[:, -context:], [KeyValueCache() for _ in model.blocks]
    with no_grad():
        for _ in range(n):
            logits = model(new, caches=caches).data.reshape(*new.shape, -1)[:, -1]
            token = sample(to_host(logits), temperature, top_k, rng)
            ids, new = np.concatenate([ids, token[:, None]], axis=1), token[:, None]
            if caches[0].k.shape[1] == context:
                new, caches = ids[:, -max(1, context // 2) :], [KeyValueCache() for _ in model.blocks]
    return ids[:, -n:]


def sample(logits, temperature, top_k, rng):
    """One token for each row of host logits (B, V): the best at temperature 0, else drawn among the top_k."""
    if temperature == 0.0:
        return logits.argmax(axis=1)
    if top_k is not None:
        kth = np.partition(logits, -top_k, axis=1)[:, -top_k, None]
        logits = np.where(logits < kth, -np.inf, logits)
    # Gumbel-max: the largest of logits / temperature + Gumbel noise is a draw from their softmax.
    with np.errstate(over="ignore"):  # at a temperature near 0 all but the best become −∞, which is right
        scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    return (scaled + rng.gumbel(size=logits.shape)).argmax(axis=1)
