"""How the operations walk over large arrays: in blocks that fit a core's cache, with reductions along long rows.

Nothing here changes what is computed. ops.py says what, this file in which pieces and in which layout.
"""

import math

import numpy as np

from ..backend import array_module, empty


def row_mean(x):
    """The mean of each row, (N, 1), as a product with a constant vector: several times faster than x.mean(axis=1)."""
    xp, d = array_module(x), x.shape[1]
    return x @ xp.full((d, 1), 1.0 / d, x.dtype)


def row_dot(a, b):
    """The inner product of each row of a with the same row of b, (N, 1)."""
    return array_module(a).einsum("nd,nd->n", a, b)[:, None]


BLOCK = 65536  # entries of a block: with float32 a quarter of a MB, so that a few of them stay in a core's cache


def row_blocks(x):
    """Slices over the rows of x, each of about BLOCK entries: the cache keeps what a chain of operations reads again.

    On a GPU it is one slice, since there each operation costs a launch.
    """
    step = max(1, BLOCK // max(1, math.prod(x.shape[1:])), 0 if isinstance(x, np.ndarray) else len(x))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def block_of(x):
    """An array for one of the row_blocks(x), to compute in: used again for each of them, it stays in the cache."""
    first = row_blocks(x)[:1]
    return empty(x[first[0]].shape if first else x.shape, x)


def causal_blocks(batch, T, Tq, heads, block):
    """Slices (samples, queries, keys, entries): ``block`` queries of a few samples, the keys that the last of them
    sees, and their place in P. As many samples together as have about BLOCK scores, so that they stay in the cache."""
    blocks, end, together = [], 0, max(1, BLOCK // (heads * T * min(block, Tq)))
    for i in range(0, batch, together):
        samples = slice(i, min(i + together, batch))
        for start in range(0, Tq, block):
            queries = slice(start, min(start + block, Tq))
            keys = slice(0, T - Tq + queries.stop)
            size = (samples.stop - i) * heads * keys.stop * (queries.stop - start)
            blocks.append((samples, queries, keys, slice(end, end + size)))
            end += size
    return blocks


def largest(blocks):
    """Entries of the largest block."""
    return max(entries.stop - entries.start for *_, entries in blocks)


def place(entries):
    """The place of a block in scratch, of which each block takes the beginning."""
    return slice(0, entries.stop - entries.start)


def scores(flat, samples, heads, keys):
    """Two views of a block of S or P: (keys, samples · heads, queries), in which a reduction over the keys runs along
    long rows, and (samples, heads, keys, queries), for products."""
    S = flat.reshape(keys.stop, samples.stop - samples.start, heads, -1)
    return S.reshape(keys.stop, -1, S.shape[-1]), S.transpose(1, 2, 0, 3)


def split_heads(a, batch, heads):
    """A view (batch, heads, T, e) of a (batch · T, heads · e): the matrix products read and write it in place."""
    return a.reshape(batch, -1, heads, a.shape[1] // heads).transpose(0, 2, 1, 3)


def head_columns(a, batch, heads, scale=1.0):
    """scale · a as a (batch, heads, e, T) of its own: BLAS is three times faster on it than on a transposed view."""
    columns = split_heads(a, batch, heads).swapaxes(-1, -2)
    return array_module(a).multiply(columns, scale, out=empty(columns.shape, a))


def later_positions(xp, n, dtype):
    """(n, 1, n): −∞ where key j is later than query i, and 0 elsewhere."""
    return xp.tril(xp.full((n, n), -math.inf, dtype), k=-1)[:, None]


def add_product(a, b, out, first):
    """out += a @ b, or out = a @ b the first time."""
    if first:
        array_module(out).matmul(a, b, out=out)
    else:
        out += a @ b
