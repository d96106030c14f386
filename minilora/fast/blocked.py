"""Faster forms for NumPy: the operations walk over large arrays in blocks that stay in a core's cache.

Each function computes what its plain form in ops.py computes, and tests hold the two equal. Results go into arrays that
begin at a cache line, and a chain of elementwise steps is done block by block, in place.
"""

import math
from dataclasses import dataclass

import numpy as np

from .. import ops
from ..ops import GELU_CUBIC, GELU_SCALE, split_heads
from ..training.optim import AdamW

BLOCK = 65536  # entries of a block: with float32 a quarter of a MB, so that a few of them stay in a core's cache
QUERIES = 64  # queries of a tile of attention


class Memory(np.ndarray):
    """The bytes that an array of empty() lies in, with room to begin at a cache line."""


def empty(shape, like):
    """An array of ``shape`` and the dtype of ``like``, not yet written, that begins at a cache line.

    With AVX-512, operations write there up to twice as fast as elsewhere.
    """
    size, line = math.prod(shape) * like.itemsize, 64
    if size < 64 * line:
        return np.empty(shape, like.dtype)
    memory = np.ndarray.__new__(Memory, size + line, np.uint8)
    offset = -memory.__array_interface__["data"][0] % line
    return np.ndarray(shape, like.dtype, memory, offset)


def row_blocks(x):
    """Slices over the rows of x, each of about BLOCK entries."""
    step = max(1, BLOCK // max(1, math.prod(x.shape[1:])))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def block_of(x):
    """An array for one of the row_blocks(x), to compute in: used again for each of them, it stays in the cache."""
    first = row_blocks(x)[:1]
    return empty(x[first[0]].shape if first else x.shape, x)


WIDE, BUFFER = 1024, 512  # see rowwise()


def rowwise(operation, x, vector, out):
    """``operation(x, vector, out=out)`` for x (N, d) and a vector (d,).

    NumPy is slow where its inner loop is as short as a row, and copies a broadcast operand where its buffer, 8,192
    entries by default, is longer than that loop. So several rows are taken as one of about WIDE entries.
    """
    N, d = x.shape
    if x.size == 0 or not (x.flags.c_contiguous and out.flags.c_contiguous):
        return operation(x, vector, out=out)
    most = max(1, WIDE // d)
    together = math.gcd(N, 1 << most.bit_length() - 1)  # rows: the largest power of two that fits and divides N
    before = np.setbufsize(BUFFER)
    try:
        wide = (-1, together * d)
        operation(x.reshape(wide), np.tile(vector, together), out=out.reshape(wide))
    finally:
        np.setbufsize(before)
    return out


def row_mean(x):
    """The mean of each row, (N, 1), as a product with a constant vector: several times faster than x.mean(axis=1)."""
    d = x.shape[1]
    return x @ np.full((d, 1), 1.0 / d, x.dtype)


def row_dot(a, b):
    """The inner product of each row of a with the same row of b, (N, 1)."""
    return np.vecdot(a, b)[:, None]


# -------------------------------------------------------------------------------------------- linear and layer norm


def linear_forward(need, x, W, b):
    ops.check_linear(x, W, b)
    y = np.matmul(x, W.T, out=empty((len(x), len(W)), x))
    if b is not None:
        rowwise(np.add, y, b, out=y)  # F1
    return y, {"x": x if need.W else None, "W": W if need.x else None}


def layer_norm_forward(need, x, g, b, *, eps=1e-5):
    ops.check_layer_norm(x, g, b)
    N, d = x.shape
    y, r = empty((N, d), x), empty((N, 1), x)
    x_hat = empty((N, d), x) if any(need) else y
    for rows in row_blocks(x):
        centred = np.subtract(x[rows], row_mean(x[rows]), out=x_hat[rows])
        r[rows] = 1.0 / np.sqrt(row_dot(centred, centred) / d + eps)  # F1
        centred *= r[rows]  # F2
        rowwise(np.multiply, x_hat[rows], g, out=y[rows])
        rowwise(np.add, y[rows], b, out=y[rows])  # F3
    return y, {
        "x_hat": x_hat if need.x or need.g else None,
        "r": r if need.x else None,
        "g": g if need.x else None,
    }


def layer_norm_backward(need, dy, saved):
    dg = (dy * saved.x_hat).sum(axis=0) if need.g else None  # B3
    db = dy.sum(axis=0) if need.b else None  # B4
    if not need.x:
        return None, dg, db
    d, dx, scratch = dy.shape[1], empty(dy.shape, dy), block_of(dy)
    for rows in row_blocks(dy):
        x_hat, dx_hat = saved.x_hat[rows], dx[rows]
        rowwise(np.multiply, dy[rows], saved.g, out=dx_hat)  # B1
        along = np.multiply(x_hat, row_dot(dx_hat, x_hat) / d, out=scratch[: len(x_hat)])
        dx_hat -= row_mean(dx_hat)
        dx_hat -= along
        dx_hat *= saved.r[rows]  # B2
    return dx, dg, db


# ----------------------------------------------------------------------------------------------------------- GELU


def gelu_forward(need, x):
    y, slope = empty(x.shape, x), empty(x.shape, x) if need.x else None
    inner_block, t_block = block_of(x), block_of(x)
    for rows in row_blocks(x):
        xb, yb, n = x[rows], y[rows], len(x[rows])
        inner, t = inner_block[:n], t_block[:n]
        half = t if slope is None else slope[rows]
        np.multiply(xb, xb, out=inner)
        inner *= GELU_SCALE * GELU_CUBIC
        inner += GELU_SCALE  # c (1 + k x²)
        np.multiply(xb, inner, out=t)
        np.tanh(t, out=t)  # F1
        np.multiply(t, 0.5, out=half)
        half += 0.5
        np.multiply(xb, half, out=yb)  # F2
        if slope is not None:
            inner *= 3.0
            inner -= 2.0 * GELU_SCALE  # c (1 + 3 k x²)
            np.subtract(1.0, t, out=t)
            t *= yb  # x/2 (1 + t) (1 − t)
            t *= inner
            half += t  # B1
    return y, {"slope": slope}


def gelu_backward(need, dy, saved):
    dx = np.multiply(dy, saved.slope, out=empty(dy.shape, dy))  # B2
    return (dx,)


# ------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Tile:
    """Some samples, QUERIES of their queries, the keys that the last of them sees, and their place among the scores.

    A tile's scores lie with the keys outermost: a reduction over the keys then runs along long rows.
    """

    samples: slice
    queries: slice
    keys: slice
    place: slice

    @property
    def size(self) -> int:
        return self.place.stop - self.place.start

    def scores(self, flat, heads):
        """Two views of the tile in ``flat``: (keys, samples · heads, queries), and (samples, heads, keys, queries)."""
        S = flat.reshape(self.keys.stop, self.samples.stop - self.samples.start, heads, -1)
        return S.reshape(self.keys.stop, -1, S.shape[-1]), S.transpose(1, 2, 0, 3)


def causal_tiles(batch, T, Tq, heads):
    """All tiles: half of the scores, those of later keys, is never computed. Some BLOCK scores are in a tile."""
    tiles, end, together = [], 0, max(1, BLOCK // (heads * T * min(QUERIES, Tq)))
    for i in range(0, batch, together):
        samples = slice(i, min(i + together, batch))
        for start in range(0, Tq, QUERIES):
            queries = slice(start, min(start + QUERIES, Tq))
            keys = slice(0, T - Tq + queries.stop)
            size = (samples.stop - i) * heads * keys.stop * (queries.stop - start)
            tiles.append(Tile(samples, queries, keys, slice(end, end + size)))
            end += size
    return tiles


def head_columns(a, batch, heads, scale=1.0):
    """scale · a as a (batch, heads, e, T) of its own: BLAS is three times faster on it than on a transposed view."""
    columns = split_heads(a, batch, heads).swapaxes(-1, -2)
    return np.multiply(columns, scale, out=empty(columns.shape, a))


def attention_forward(need, q, k, v, *, batch, heads):
    """Saves P as one flat array, tile by tile."""
    ops.check_attention(q, k, v, batch, heads)
    tiles = causal_tiles(batch, len(k) // batch, len(q) // batch, heads)
    keep = any(need)
    y, P = empty(q.shape, q), empty((tiles[-1].place.stop if keep else max(tile.size for tile in tiles),), q)
    k_, v_, y_ = (split_heads(a, batch, heads) for a in (k, v, y))
    q_columns = head_columns(q, batch, heads, 1.0 / math.sqrt(q.shape[1] // heads))
    later = np.tril(np.full((QUERIES, QUERIES), -math.inf, q.dtype), k=-1)[:, None]  # (keys, 1, queries)
    for tile in tiles:
        S, S_ = tile.scores(P[tile.place] if keep else P[: tile.size], heads)
        np.matmul(k_[tile.samples, :, tile.keys], q_columns[tile.samples, :, :, tile.queries], out=S_)
        n = S.shape[-1]
        S[-n:] += later[:n, :, :n]  # F1
        S -= S.max(axis=0)
        np.exp(S, out=S)
        S *= 1.0 / S.sum(axis=0)  # F2
        np.matmul(S_.swapaxes(-1, -2), v_[tile.samples, :, tile.keys], out=y_[tile.samples, :, tile.queries])  # F3
    return y, {"q": q, "k": k, "v": v, "P": P if keep else None, "batch": batch, "heads": heads}


def attention_backward(need, dy, saved):
    batch, heads = saved.batch, saved.heads
    tiles = causal_tiles(batch, len(saved.k) // batch, len(dy) // batch, heads)
    grads = [empty(a.shape, a) for a in (saved.q, saved.k, saved.v)]
    q_, k_, v_, dy_, dq, dk, dv = (split_heads(a, batch, heads) for a in (saved.q, saved.k, saved.v, dy, *grads))
    dy_columns, scratch = head_columns(dy, batch, heads), empty((max(tile.size for tile in tiles),), dy)
    for tile in reversed(tiles):
        samples, queries, keys = tile.samples, tile.queries, tile.keys
        P, P_ = tile.scores(saved.P[tile.place], heads)
        dS, dS_ = tile.scores(scratch[: tile.size], heads)
        first = queries.stop == dy_.shape[2]  # the last tile sees every key: it writes, the others add
        add_product(P_, dy_[samples, :, queries], dv[samples, :, keys], first)  # B1
        np.matmul(v_[samples, :, keys], dy_columns[samples, :, :, queries], out=dS_)  # B2
        dS -= np.einsum("khq,khq->hq", P, dS)
        dS *= P  # B3
        np.matmul(dS_.swapaxes(-1, -2), k_[samples, :, keys], out=dq[samples, :, queries])  # B4
        add_product(dS_, q_[samples, :, queries], dk[samples, :, keys], first)  # B5
    for grad in grads[:2]:
        grad *= 1.0 / math.sqrt(q_.shape[-1])
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


def add_product(a, b, out, first):
    """out += a @ b, or out = a @ b the first time."""
    if first:
        np.matmul(a, b, out=out)
    else:
        out += a @ b


# --------------------------------------------------------------------------------------------------- cross-entropy


def cross_entropy_forward(need, logits, *, targets, ignore_index=ops.IGNORE_INDEX):
    targets, weight = ops.check_targets(logits, targets, ignore_index)
    p, log_p = empty(logits.shape, logits), empty(targets.shape, logits)
    for rows in row_blocks(logits):
        block, pb, counted = logits[rows], p[rows], weight[rows] != 0.0
        if not counted.all():
            block = np.where(counted[:, None], block, 0.0)  # an ignored row may hold anything, NaN too
        np.subtract(block, block.max(axis=1, keepdims=True), out=pb)
        log_p[rows] = pb[np.arange(len(pb)), targets[rows]]
        np.exp(pb, out=pb)
        total = pb.sum(axis=1, keepdims=True)
        pb /= total  # F1
        log_p[rows] -= np.log(total[:, 0])
    loss = -(log_p * weight).sum()  # F2
    return loss, {"p": p, "targets": targets, "weight": weight}


def cross_entropy_backward(need, dy, saved):
    weight = dy * saved.weight
    dlogits = np.multiply(saved.p, weight[:, None], out=empty(saved.p.shape, saved.p))
    dlogits[np.arange(len(dlogits)), saved.targets] -= weight
    return (dlogits,)  # B1


# ------------------------------------------------------------------------------------------------------------ AdamW


def adamw(optimizer):
    """AdamW.move(), block by block and in place."""
    o, (beta1, beta2), scratch = optimizer, optimizer.betas, block_of(optimizer.data)
    for part in row_blocks(o.data):
        g, m, v, data = (a[part] for a in (o.grad, o.m, o.v, o.data))
        w = scratch[: len(g)]
        m *= beta1
        m += np.multiply(g, 1.0 - beta1, out=w)
        v *= beta2
        np.multiply(g, g, out=w)
        w *= 1.0 - beta2
        v += w
        np.sqrt(v, out=w)
        w *= 1.0 / math.sqrt(1.0 - beta2**o.t)
        w += o.eps
        np.divide(m, w, out=w)
        w *= o.lr / (1.0 - beta1**o.t)
        w *= o.lr_scale[part] if getattr(o.lr_scale, "shape", ()) else o.lr_scale
        data -= w


ops.linear.forms["numpy"] = linear_forward, ops.linear_backward
ops.layer_norm.forms["numpy"] = layer_norm_forward, layer_norm_backward
ops.gelu.forms["numpy"] = gelu_forward, gelu_backward
ops.attention.forms["numpy"] = attention_forward, attention_backward
ops.cross_entropy.forms["numpy"] = cross_entropy_forward, cross_entropy_backward
AdamW.forms["numpy"] = adamw
