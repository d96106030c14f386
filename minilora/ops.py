"""The layer-sized operations of a transformer, each a forward and a backward on plain arrays.

One node per layer instead of one per multiplication: that is what makes NumPy fast enough, and what lets each
backward be read as one derivation. Tags (F1, B1 …) stand beside the equations and on the lines that compute them.
Rows are tokens: N = batch · time. In each pair, y is the result and dy = dL/dy the gradient that arrives at it.
"""

import math

from .backend import array_module, empty, to_device
from .engine import Operation
from .errors import InputError
from .fast.blocked import (
    add_product,
    block_of,
    causal_blocks,
    head_columns,
    largest,
    later_positions,
    place,
    row_blocks,
    row_dot,
    row_mean,
    scores,
    split_heads,
)

IGNORE_INDEX = -100  # a target that does not count, as in PyTorch


def linear_forward(need, x, W, b):
    """y = x Wᵀ + b, with x (N, d_in), W (d_out, d_in), b (d_out,) or None.

    F1  y = x Wᵀ + b                                   (N, d_out)
    Kept: x only where W is trained; W, which is a parameter and costs nothing.
    """
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1] or (b is not None and b.shape != W.shape[:1]):
        shapes = f"x has shape {x.shape}, W {W.shape}, b {None if b is None else b.shape}"
        raise InputError(f"linear: {shapes}; they must be (N, d_in), (d_out, d_in) and (d_out,)")
    y = array_module(x).matmul(x, W.T, out=empty((len(x), len(W)), x))
    if b is not None:
        y += b  # F1
    return y, {"x": x if need.W else None, "W": W if need.x else None}


def linear_backward(need, dy, saved):
    """B1  dx = dy W             x_j reaches y_i through W_ij
    B2  dW = dyᵀ x            W_ij is used once by every row
    B3  db = Σ_N dy           b_i is added to every row
    """
    dx = dy @ saved.W if need.x else None  # B1
    dW = dy.T @ saved.x if need.W else None  # B2
    db = dy.sum(axis=0) if need.b else None  # B3
    return dx, dW, db


def embedding_forward(need, table, *, ids):
    """Row ids[n] of table (V, d) for each token n. Ids on the host are checked there, so that no GPU is waited for.

    F1  y_n = table[ids_n]                             (N, d)
    Kept: ids.
    """
    check_ids("embedding", ids, len(table))
    ids = to_device(ids, array_module(table))
    y = table[ids]  # F1
    return y, {"ids": ids, "shape": table.shape}


def embedding_backward(need, dy, saved):
    """B1  dtable_v = Σ_{n: ids_n = v} dy_n      a row that was looked up twice receives twice"""
    xp = array_module(dy)
    dtable = xp.zeros(saved.shape, dy.dtype)
    xp.add.at(dtable, saved.ids, dy)  # B1
    return (dtable,)


def layer_norm_forward(need, x, g, b, *, eps=1e-5, recompute=False):
    """Normalise each row of x (N, d), then scale by g (d,) and shift by b (d,).   Ba et al. 2016, arXiv 1607.06450

    F1  r = 1 / sqrt(mean_d (x − mean_d x)² + eps)     (N, 1)
    F2  x̂ = (x − mean_d x) r                           (N, d)
    F3  y = g ∘ x̂ + b                                  (N, d)
    Kept: x̂, r; g, which is a parameter, and so is b, kept to ``recompute`` y.
    """
    if x.ndim != 2 or g.shape != x.shape[1:] or b.shape != g.shape:
        raise InputError(f"layer_norm: x {x.shape}, g {g.shape}, b {b.shape}; g and b must be (d,) for x (N, d)")
    xp, (N, d) = array_module(x), x.shape
    y, r = empty((N, d), x), empty((N, 1), x)
    x_hat = empty((N, d), x) if any(need) else y
    for rows in row_blocks(x):
        centred = xp.subtract(x[rows], row_mean(x[rows]), out=x_hat[rows])
        r[rows] = 1.0 / xp.sqrt(row_dot(centred, centred) / d + eps)  # F1
        centred *= r[rows]  # F2
        xp.multiply(x_hat[rows], g, out=y[rows])
        y[rows] += b  # F3
    kept = {"x_hat": x_hat if need.x or need.g else None, "r": r if need.x else None, "g": g if need.x else None}
    return y, kept | ({"x_hat": x_hat, "g": g, "b": b} if recompute else {})


def layer_norm_backward(need, dy, saved):
    """B1  dx̂ = dy ∘ g                                    through F3
    B2  dx = r (dx̂ − mean_d dx̂ − x̂ mean_d(dx̂ ∘ x̂))    x̂ has mean 0 and length √d, so both parts are removed
    B3  dg = Σ_N dy ∘ x̂                               g is used once by every row
    B4  db = Σ_N dy
    """
    dg = (dy * saved.x_hat).sum(axis=0) if need.g else None  # B3
    db = dy.sum(axis=0) if need.b else None  # B4
    if not need.x:
        return None, dg, db
    xp, d, dx, scratch = array_module(dy), dy.shape[1], empty(dy.shape, dy), block_of(dy)
    for rows in row_blocks(dy):
        x_hat, dx_hat = saved.x_hat[rows], dx[rows]
        xp.multiply(dy[rows], saved.g, out=dx_hat)  # B1
        along = xp.multiply(x_hat, row_dot(dx_hat, x_hat) / d, out=scratch[: len(x_hat)])
        dx_hat -= row_mean(dx_hat)
        dx_hat -= along
        dx_hat *= saved.r[rows]  # B2
    return dx, dg, db


def layer_norm_again(saved):
    """y from what is kept: F3."""
    y = saved.x_hat * saved.g
    y += saved.b
    return y


GELU_SCALE = math.sqrt(2.0 / math.pi)  # a Python float: np.sqrt would turn float32 into float64
GELU_CUBIC = 0.044715


def gelu_forward(need, x, *, recompute=False):
    """The Gaussian error linear unit in its tanh form (GPT-2).   Hendrycks & Gimpel 2016, arXiv 1606.08415

    F1  t = tanh(c (x + k x³)),  c = √(2/π), k = 0.044715
    F2  y = x (1 + t) / 2
    B1  dy/dx = (1 + t) / 2 + x/2 (1 − t²) c (1 + 3 k x²)    the product rule on F2, tanh' = 1 − tanh²
    Kept: dy/dx, since t is at hand here: one array instead of two, and one tanh instead of two. To ``recompute``: x.
    """
    xp = array_module(x)
    y, slope = empty(x.shape, x), empty(x.shape, x) if need.x and not recompute else None
    scratch = block_of(x), block_of(x)
    for rows in row_blocks(x):
        xb, yb, (inner, t) = x[rows], y[rows], (a[: len(x[rows])] for a in scratch)
        half = t if slope is None else slope[rows]
        xp.multiply(xb, xb, out=inner)
        inner *= GELU_SCALE * GELU_CUBIC
        inner += GELU_SCALE  # c (1 + k x²)
        xp.multiply(xb, inner, out=t)
        xp.tanh(t, out=t)  # F1
        xp.multiply(t, 0.5, out=half)
        half += 0.5
        xp.multiply(xb, half, out=yb)  # F2
        if slope is not None:
            inner *= 3.0
            inner -= 2.0 * GELU_SCALE  # c (1 + 3 k x²)
            xp.subtract(1.0, t, out=t)
            t *= yb  # x/2 (1 + t) (1 − t)
            t *= inner
            half += t  # B1
    return y, {"slope": slope, "x": x if need.x and recompute else None}


def gelu_backward(need, dy, saved):
    """B2  dx = dy ∘ dy/dx"""
    if "x" in saved and "slope" not in saved:
        gelu_again(saved)
    return (dy * saved.slope,)  # B2


def gelu_again(saved):
    """y from x; and dy/dx, which backward asks for next."""
    y, kept = gelu_forward(gelu.Need(x=True), saved.x)
    saved["slope"] = kept["slope"]
    return y


def attention_forward(need, q, k, v, *, batch, heads, block=64, recompute=False):
    """Causal multi-head attention.   Vaswani et al. 2017, arXiv 1706.03762, equation 1

    q (batch · Tq, d), k and v (batch · T, d), Tq ≤ T: the queries are the last Tq positions. Per head, of width e, with
    the keys down and the queries across, so that a softmax runs down a column, which NumPy reduces fastest:
    F1  S = k qᵀ / √e, and −∞ where a query would see a later position    (T, Tq)
    F2  P = softmax_T S                                                   (T, Tq)
    F3  y = Pᵀ v                                                          (Tq, e)
    ``block`` queries at a time, each time with the keys alone that the last of them sees: half of S is never computed.
    Kept: q, k, v, P, whichever gradients are wanted: a network nearly always wants all three, and they share work. Not
    P where it is to ``recompute``.
    """
    xp = array_module(q)
    if q.ndim != 2 or k.ndim != 2 or k.shape != v.shape or q.shape[1] != k.shape[1] or len(q) > len(k):
        shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
        raise InputError(f"attention: {shapes}; all need one width, k and v one length, and q no more rows than they")
    if batch < 1 or heads < 1 or len(q) % batch or len(k) % batch or q.shape[1] % heads:
        rows = f"{len(q)} and {len(k)} rows do not divide into a batch of {batch}"
        raise InputError(f"attention: {rows}, or a width of {q.shape[1]} not into {heads} heads")
    blocks = causal_blocks(batch, len(k) // batch, len(q) // batch, heads, block)
    keep = any(need) and not recompute
    y, P = empty(q.shape, q), empty((blocks[-1][-1].stop if keep else largest(blocks),), q)
    k_, v_, y_ = (split_heads(a, batch, heads) for a in (k, v, y))
    q_columns = head_columns(q, batch, heads, 1.0 / math.sqrt(q.shape[1] // heads))
    later = later_positions(xp, block, q.real.dtype)
    for samples, queries, keys, entries in blocks:
        S, S_ = scores(P[entries if keep else place(entries)], samples, heads, keys)
        xp.matmul(k_[samples, :, keys], q_columns[samples, :, :, queries], out=S_)
        S[queries.start - queries.stop :] += later[: S.shape[-1], :, : S.shape[-1]]  # F1
        S -= S.max(axis=0)  # softmax is the same for a shifted column, and exp cannot overflow
        xp.exp(S, out=S)
        S *= 1.0 / S.sum(axis=0)  # F2
        xp.matmul(S_.swapaxes(-1, -2), v_[samples, :, keys], out=y_[samples, :, queries])  # F3
    return y, {"q": q, "k": k, "v": v, "P": P if keep else None, "how": (batch, heads, block, recompute)}


def attention_backward(need, dy, saved):
    """B1  dv = P dy                         v_j reaches y_i through P_ji
    B2  dP = v dyᵀ                        P_ji reaches y_i through v_j
    B3  dS = P ∘ (dP − Σ_T P ∘ dP)        softmax: a column of dP, less its mean under P
    B4  dq = dSᵀ k / √e                   through F1
    B5  dk = dS q / √e
    """
    xp, (batch, heads, block, recompute) = array_module(dy), saved.how
    blocks = causal_blocks(batch, len(saved.k) // batch, len(dy) // batch, heads, block)
    grads = [empty(a.shape, a) for a in (saved.q, saved.k, saved.v)]
    q_, k_, v_, dy_, dq, dk, dv = (split_heads(a, batch, heads) for a in (saved.q, saved.k, saved.v, dy, *grads))
    if recompute:
        again = attention_forward(need, saved.q, saved.k, saved.v, batch=batch, heads=heads, block=block)[1]
    kept = again["P"] if recompute else saved.P
    dy_columns, scratch = head_columns(dy, batch, heads), empty((largest(blocks),), dy)
    for samples, queries, keys, entries in reversed(blocks):
        P, P_ = scores(kept[entries], samples, heads, keys)
        dS, dS_ = scores(scratch[place(entries)], samples, heads, keys)
        first = queries.stop == dy_.shape[2]  # the last block sees every key: it writes, the others add
        add_product(P_, dy_[samples, :, queries], dv[samples, :, keys], first)  # B1
        xp.matmul(v_[samples, :, keys], dy_columns[samples, :, :, queries], out=dS_)  # B2
        dS -= xp.einsum("khq,khq->hq", P, dS)
        dS *= P  # B3
        xp.matmul(dS_.swapaxes(-1, -2), k_[samples, :, keys], out=dq[samples, :, queries])  # B4
        add_product(dS_, q_[samples, :, queries], dk[samples, :, keys], first)  # B5
    for grad in grads[:2]:
        grad *= 1.0 / math.sqrt(q_.shape[-1])
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


def cross_entropy_forward(need, logits, *, targets, ignore_index=IGNORE_INDEX):
    """Mean negative log-likelihood of targets (N,) under softmax(logits (N, V)); in nats per counted target. Targets on
    the host are checked and counted there, so that no GPU is waited for.

    F1  p = softmax_V logits                               (N, V)
    F2  L = − mean_n log p[n, targets_n]                   over the n with targets_n ≠ ignore_index
    Kept: p, targets.
    """
    xp = array_module(logits)
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise InputError(f"cross_entropy: logits {logits.shape} and targets {targets.shape}; expected (N, V) and (N,)")
    counted = targets != ignore_index
    count = int(counted.sum())
    if count == 0:
        raise InputError(f"cross_entropy: every target is ignore_index ({ignore_index}); there is nothing to average")
    targets = array_module(targets).where(counted, targets, 0)
    check_ids("cross_entropy", targets, logits.shape[1])
    counted, targets = to_device(counted, xp), to_device(targets, xp)
    p, log_p = empty(logits.shape, logits), empty(targets.shape, logits)
    for rows in row_blocks(logits):
        pb, target = p[rows], (xp.arange(len(p[rows])), targets[rows])
        xp.subtract(logits[rows], logits[rows].max(axis=1, keepdims=True), out=pb)
        log_p[rows] = pb[target]
        xp.exp(pb, out=pb)
        total = pb.sum(axis=1, keepdims=True)
        pb /= total  # F1
        log_p[rows] -= xp.log(total[:, 0])
    loss = -(log_p * counted).sum() / count  # F2
    return loss.astype(logits.dtype), {"p": p, "targets": targets, "weight": counted.astype(logits.dtype) / count}


def cross_entropy_backward(need, dy, saved):
    """B1  dlogits = (p − onehot(targets)) / count     for the counted rows, 0 for the others"""
    xp, weight = array_module(dy), dy * saved.weight
    dlogits = xp.multiply(saved.p, weight[:, None], out=empty(saved.p.shape, saved.p))
    dlogits[xp.arange(len(dlogits)), saved.targets] -= weight
    return (dlogits,)  # B1


def dropout_forward(need, x, *, p, rng):
    """Zero each entry with probability p and scale the rest by 1 / (1 − p).   Srivastava et al. 2014

    F1  y = x ∘ M,  M = 0 with probability p, else 1 / (1 − p), drawn from rng, a host NumPy Generator
    Kept: M.
    """
    if not 0.0 <= p < 1.0:
        raise InputError(f"dropout: p is {p}; it must be at least 0 and below 1")
    keep = rng.random(x.shape) >= p  # on the host, so that a seed gives one run on CPU and GPU
    mask = array_module(x).asarray(keep / (1.0 - p), dtype=x.dtype)
    return x * mask, {"mask": mask}  # F1


def dropout_backward(need, dy, saved):
    """B1  dx = dy ∘ M"""
    return (dy * saved.mask,)  # B1


def check_ids(name, ids, size):
    """Raise InputError unless ``ids`` are integers in 0 … size − 1."""
    if ids.dtype.kind not in "iu":
        raise InputError(f"{name}: ids must be integers, got {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        raise InputError(f"{name}: ids run from {ids.min()} to {ids.max()}; they must lie in 0 … {size - 1}")


linear = Operation(linear_forward, linear_backward)
embedding = Operation(embedding_forward, embedding_backward)
layer_norm = Operation(layer_norm_forward, layer_norm_backward, layer_norm_again)
gelu = Operation(gelu_forward, gelu_backward, gelu_again)
attention = Operation(attention_forward, attention_backward)
cross_entropy = Operation(cross_entropy_forward, cross_entropy_backward)
dropout = Operation(dropout_forward, dropout_backward)
