"""A tiny GPT-2: token ids in, logits out. It is what every adapter method here is tried on.

The layout is GPT-2's (layer norm first, learned positions, tanh GELU, output tied to the token embedding), with
q, k and v as separate linear layers, so that each can be adapted by its name.
"""

import math
from dataclasses import dataclass

import numpy as np

from .backend import array_module, to_host
from .elementary import add
from .engine import Tensor, no_grad
from .errors import InputError, nearest
from .nn import LayerNorm, Linear, Module, Parameter
from .ops import attention, check_ids, cross_entropy, dropout, embedding, gelu, linear

RECOMPUTED = ("layer_norm", "gelu", "attention")  # what GPT.recompute() can leave out of memory


@dataclass(frozen=True)
class GPTConfig:
    """Sizes, by GPT-2's names. Raises InputError for one that is not a positive integer, or heads that do not fit."""

    vocab_size: int = 96
    n_positions: int = 128  # the context: the longest sequence, in tokens
    n_embd: int = 128
    n_layer: int = 4
    n_head: int = 4
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"GPTConfig: {name} is {value!r}; it must be a positive integer")
        if self.n_embd % self.n_head:
            raise InputError(f"GPTConfig: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"GPTConfig: dropout is {self.dropout}; it must be at least 0 and below 1")


class Block(Module):
    """x + o(attention(q, k, v of norm(x))), then x + down(gelu(up(norm(x))))."""

    def __init__(self, config: GPTConfig, rng, dtype):
        d, self.config, self.recompute = config.n_embd, config, frozenset()
        # GPT-2: normal of deviation 0.02; the two layers that write to the residual stream are scaled down by depth.
        normal = lambda d_out, d_in, std=0.02: Linear(
            rng.normal(0.0, std, (d_out, d_in)).astype(dtype), np.zeros(d_out, dtype)
        )
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        self.norm1 = LayerNorm(d, dtype)
        self.q, self.k, self.v = normal(d, d), normal(d, d), normal(d, d)
        self.o = normal(d, d, residual_std)
        self.norm2 = LayerNorm(d, dtype)
        self.up, self.down = normal(4 * d, d), normal(d, 4 * d, residual_std)

    def __call__(self, x, batch, rng=None, cache=None):  # x (N, d), N = batch * T
        p = self.config.dropout if rng is not None else 0.0
        drop = (lambda y: dropout(y, p=p, rng=rng)) if p else (lambda y: y)
        again = self.recompute
        h = self.norm1(x, "layer_norm" in again)  # (N, d)
        q, k, v = self.q(h), self.k(h), self.v(h)  # (N, d) each
        if cache is not None:
            k, v = cache.extend(k, v, batch)  # (batch * (past + T), d) each
        y = attention(q, k, v, batch=batch, heads=self.config.n_head, recompute="attention" in again)
        x = add(x, drop(self.o(y)))
        h = self.norm2(x, "layer_norm" in again)
        return add(x, drop(self.down(gelu(self.up(h), recompute="gelu" in again))))  # up: (N, 4 d)


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


class GPT(Module):
    """ids (B, T) to logits (B * T, vocab_size); rows of every 2-D array are tokens."""

    def __init__(self, config: GPTConfig, rng=None, dtype=np.float32):
        """``rng`` draws the weights: a NumPy Generator, or a seed for one; 0 by default."""
        rng = np.random.default_rng(0 if rng is None else rng)
        self.config = config
        self.tokens = Parameter(rng.normal(0.0, 0.02, (config.vocab_size, config.n_embd)).astype(dtype))
        self.positions = Parameter(rng.normal(0.0, 0.02, (config.n_positions, config.n_embd)).astype(dtype))
        self.blocks = [Block(config, rng, dtype) for _ in range(config.n_layer)]
        self.norm = LayerNorm(config.n_embd, dtype)

    def __call__(self, ids, rng=None, caches=None) -> Tensor:
        """Logits (B * T, V) for ids (B, T). Dropout is applied where ``rng`` is given; ``caches`` are for sampling.

        Raises InputError for ids that are not a 2-D integer array, out of range, or longer than the context.
        """
        past = caches[0].k.shape[1] if caches and caches[0].k is not None else 0
        if ids.ndim != 2 or 0 in ids.shape:
            raise InputError(f"GPT: ids have shape {ids.shape}; expected (batch, time), neither of them 0")
        batch, time = ids.shape
        if past + time > self.config.n_positions:
            raise InputError(
                f"GPT: a sequence of {past + time} tokens is longer than the context, {self.config.n_positions}; "
                "cut it, or build the model with a larger n_positions"
            )
        check_ids("GPT", ids, self.config.vocab_size)
        where = np.tile(np.arange(past, past + time), batch)  # (N,)
        x = add(embedding(self.tokens, ids=ids.ravel()), embedding(self.positions, ids=where))  # (N, d)
        if rng is not None and self.config.dropout:
            x = dropout(x, p=self.config.dropout, rng=rng)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, batch, rng, cache)
        return linear(self.norm(x), self.tokens, None)  # (N, V)

    def recompute(self, *names):
        """Compute these again in backward instead of keeping them; without names, keep everything. Returns the model.

        ``"layer_norm"`` and ``"gelu"``: their outputs; ``"attention"``: its probabilities. The gradients are the same,
        on the CPU to the last bit; memory is less and a step takes longer. Raises InputError for another name.
        """
        for name in names:
            if name not in RECOMPUTED:
                known = ", ".join(RECOMPUTED)
                raise InputError(f'recompute: unknown "{name}"{nearest(name, RECOMPUTED)}; there are {known}')
        for block in self.blocks:
            block.recompute = frozenset(names)
        return self

    def loss(self, ids, targets, rng=None) -> Tensor:
        """Mean cross-entropy in nats per token; ids and targets (B, T), a target of -100 does not count."""
        if targets.shape != ids.shape:
            raise InputError(
                f"GPT: ids have shape {ids.shape}, targets {targets.shape}; a target for each id is wanted"
            )
        return cross_entropy(self(ids, rng), targets=targets.ravel())

    def generate(self, ids, n: int, temperature=1.0, top_k=None, rng=None):
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
        if top_k is not None and not 1 <= top_k <= self.config.vocab_size:
            raise InputError(f"generate: top_k is {top_k}; it must lie in 1 … {self.config.vocab_size}")
        rng = np.random.default_rng(rng)
        ids, context = to_host(ids), self.config.n_positions
        new, caches = ids[:, -context:], [KeyValueCache() for _ in self.blocks]
        with no_grad():
            for _ in range(n):
                logits = self(new, caches=caches).data.reshape(*new.shape, -1)[:, -1]
                token = sample(to_host(logits), temperature, top_k, rng)
                ids, new = np.concatenate([ids, token[:, None]], axis=1), token[:, None]
                if caches[0].k.shape[1] == context:
                    new, caches = ids[:, -max(1, context // 2) :], [KeyValueCache() for _ in self.blocks]
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
