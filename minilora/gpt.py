"""A tiny GPT-2: token ids in, logits out. Every adapter method here is tried on it.

The layout is GPT-2's, but q, k and v are separate linear layers, so that each can be adapted by its name.
"""

import math
from dataclasses import dataclass

import numpy as np

from .engine import Tensor
from .errors import InputError
from .nn import LayerNorm, Linear, Module, Parameter
from .ops import add, attention, check_ids, cross_entropy, dropout, embedding, gelu, linear


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
        d, self.config = config.n_embd, config

        def normal(d_out, d_in, std=0.02):
            return Linear(rng.normal(0.0, std, (d_out, d_in)).astype(dtype), np.zeros(d_out, dtype))

        # As in GPT-2, the two layers that write to the residual stream start smaller the deeper the model is.
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        self.norm1 = LayerNorm(d, dtype)
        self.q, self.k, self.v = normal(d, d), normal(d, d), normal(d, d)
        self.o = normal(d, d, residual_std)
        self.norm2 = LayerNorm(d, dtype)
        self.up, self.down = normal(4 * d, d), normal(d, 4 * d, residual_std)

    def __call__(self, x, batch, rng=None, cache=None):  # x (N, d), N = batch * T
        h = self.norm1(x)  # (N, d)
        q, k, v = self.q(h), self.k(h), self.v(h)  # (N, d) each
        if cache is not None:
            k, v = cache.extend(k, v, batch)  # (batch * (past + T), d) each
        y = attention(q, k, v, batch=batch, heads=self.config.n_head)  # (N, d)
        x = add(x, drop(self.o(y), self.config, rng))
        h = gelu(self.up(self.norm2(x)))  # (N, 4 d)
        return add(x, drop(self.down(h), self.config, rng))


def drop(x, config, rng):
    """Dropout where ``rng`` is given and the model has any."""
    return dropout(x, p=config.dropout, rng=rng) if rng is not None and config.dropout else x


def run(block, x, *args):
    return block(x, *args)


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
        self.run = run

    def __call__(self, ids, rng=None, caches=None) -> Tensor:
        """Logits (B * T, V) for ids (B, T). Dropout is applied where ``rng`` is given; ``caches`` are for sampling.

        Raises InputError for ids that are not a 2-D integer array, out of range, or longer than the context.
        """
        past = caches[0].k.shape[1] if caches and caches[0].k is not None else 0
        if ids.ndim != 2 or 0 in ids.shape:
            raise InputError(f"GPT: ids have shape {ids.shape}; expected (batch, time), neither of them 0")
        batch, time = ids.shape
        if past + time > self.config.n_positions:
            longest = f"the context, {self.config.n_positions}; cut it, or build the model with a larger n_positions"
            raise InputError(f"GPT: a sequence of {past + time} tokens is longer than {longest}")
        check_ids("GPT", ids, self.config.vocab_size)
        where = np.tile(np.arange(past, past + time), batch)  # (N,)
        x = add(embedding(self.tokens, ids=ids.ravel()), embedding(self.positions, ids=where))  # (N, d)
        x = drop(x, self.config, rng)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = self.run(block, x, batch, rng, cache)
        return linear(self.norm(x), self.tokens, None)  # (N, V)

    def recompute(self, on=True):
        """Activation checkpointing, bit for bit the same: see recompute.py. Returns the model."""
        from .recompute import recompute

        self.run = recompute if on else run
        return self

    def loss(self, ids, targets, rng=None) -> Tensor:
        """Mean cross-entropy in nats per token; ids and targets (B, T), a target of -100 does not count."""
        if targets.shape != ids.shape:
            raise InputError(f"GPT: ids have shape {ids.shape}, targets {targets.shape}; they must be the same")
        return cross_entropy(self(ids, rng), targets=targets.ravel())

    def generate(self, ids, n: int, temperature=1.0, top_k=None, rng=None):
        """``n`` tokens after ids (B, T), as (B, n) on the host; see sampling.generate()."""
        from .sampling import generate

        return generate(self, ids, n, temperature, top_k, rng)
