"""The layer-sized operations of a transformer, each a forward and a backward on plain arrays, in their plain forms.

Tags (F1, B1 …) stand beside the equations and on the lines that compute them. Rows are tokens: N = batch · time. In
each pair, y is the result and dy = dL/dy the gradient that arrives at it.
"""

import math

from .backend import array_module, to_device
from .engine import Operation
from .errors import InputError

IGNORE_INDEX = -100  # a target that does not count, as in PyTorch


def linear_forward(need, x, W, b):
    """y = x Wᵀ + b, with x (N, d_in), W (d_out, d_in), b (d_out,) or None.

    F1  y = x Wᵀ + b                                   (N, d_out)
    Kept: x only where W is trained; W, which is a parameter and costs nothing.
    """
    check_linear(x, W, b)
    y = x @ W.T if b is None else x @ W.T + b  # F1
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


def add_forward(need, x, y):
    """F1  z = x + y, of one shape: a residual connection. Kept: nothing."""
    if x.shape != y.shape:
        raise InputError(f"add: x {x.shape} and y {y.shape}; they must have one shape")
    return x + y, {}  # F1


def add_backward(need, dz, saved):
    """B1  dx = dz
    B2  dy = dz
    """
    dx = dz if need.x else None  # B1
    dy = dz if need.y else None  # B2
    return dx, dy


def embedding_forward(need, table, *, ids):
    """Row ids[n] of table (V, d) for each token n.

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


def layer_norm_forward(need, x, g, b, *, eps=1e-5):
    """Normalise each row of x (N, d), then scale by g (d,) and shift by b (d,).   Ba et al. 2016, arXiv 1607.06450

    F1  r = 1 / sqrt(mean_d (x − mean_d x)² + eps)     (N, 1)
    F2  x̂ = (x − mean_d x) r                           (N, d)
    F3  y = g ∘ x̂ + b                                  (N, d)
    Kept: x̂, r; g, which is a parameter.
    """
    check_layer_norm(x, g, b)
    centred = x - mean(x)  # (N, d)
    r = 1.0 / array_module(x).sqrt(mean(centred * centred) + eps)  # F1
    x_hat = centred * r  # F2
    y = g * x_hat + b  # F3
    x_hat = x_hat if need.x or need.g else None
    return y, {"x_hat": x_hat, "r": r if need.x else None, "g": g if need.x else None}


def layer_norm_backward(need, dy, saved):
    """B1  dx̂ = dy ∘ g                                    through F3
    B2  dx = r (dx̂ − mean_d dx̂ − x̂ mean_d(dx̂ ∘ x̂))    x̂ has mean 0 and norm √d, so both parts are removed
    B3  dg = Σ_N dy ∘ x̂                               g is used once by every row
    B4  db = Σ_N dy
    """
    dx, x_hat = None, saved.get("x_hat")
    if need.x:
        dx_hat = dy * saved.g  # B1
        dx = saved.r * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat))  # B2
    dg = (dy * x_hat).sum(axis=0) if need.g else None  # B3
    db = dy.sum(axis=0) if need.b else None  # B4
    return dx, dg, db


def mean(x):
    return x.mean(axis=1, keepdims=True)  # (N, 1)


GELU_SCALE = math.sqrt(2.0 / math.pi)  # a Python float: np.sqrt would turn float32 into float64
GELU_CUBIC = 0.044715


def gelu_forward(need, x):
    """The Gaussian error linear unit in its tanh form (GPT-2).   Hendrycks & Gimpel 2016, arXiv 1606.08415

    F1  t = tanh(c (x + k x³)),  c = √(2/π), k = 0.044715
    F2  y = x (1 + t) / 2
    B1  dy/dx = (1 + t) / 2 + x/2 (1 − t²) c (1 + 3 k x²)    the product rule on F2, tanh' = 1 − tanh²
    Kept: dy/dx, because t is known here: one array instead of two, and one tanh instead of two.
    """
    t = array_module(x).tanh(GELU_SCALE * (x + GELU_CUBIC * (x * x * x)))  # F1
    y = 0.5 * x * (1.0 + t)  # F2
    if not need.x:
        return y, {}
    inner = GELU_SCALE * (1.0 + (3.0 * GELU_CUBIC) * (x * x))  # d/dx of tanh's argument
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner  # B1
    return y, {"slope": slope}


def gelu_backward(need, dy, saved):
    """B2  dx = dy ∘ dy/dx"""
    return (dy * saved.slope,)  # B2


def attention_forward(need, q, k, v, *, batch, heads):
    """Causal multi-head attention.   Vaswani et al. 2017, arXiv 1706.03762, equation 1

    q (batch · Tq, d), k and v (batch · T, d), Tq ≤ T: the queries are the last Tq positions. Per head, of width e:
    F1  S = q kᵀ / √e, and −∞ where a query would see a later position    (Tq, T)
    F2  P = softmax_T S                                                   (Tq, T)
    F3  y = P v                                                           (Tq, e)
    Kept: q, k, v, P, whichever gradients are wanted: a network nearly always wants all three, and they share work.
    """
    check_attention(q, k, v, batch, heads)
    q_, k_, v_ = (split_heads(a, batch, heads) for a in (q, k, v))  # (batch, heads, T, e)
    later = later_positions(q_.shape[2], k_.shape[2], q)  # (Tq, T)
    S = q_ @ k_.swapaxes(-1, -2) * (1.0 / math.sqrt(q_.shape[3])) + later  # F1
    P = softmax(S)  # F2
    y = P @ v_  # F3
    return join_heads(y), {"q": q, "k": k, "v": v, "P": P, "batch": batch, "heads": heads}


def attention_backward(need, dy, saved):
    """B1  dv = Pᵀ dy                        v_j reaches y_i through P_ij
    B2  dP = dy vᵀ                        P_ij reaches y_i through v_j
    B3  dS = P ∘ (dP − Σ_T P ∘ dP)        softmax: a row of dP, less its mean under P
    B4  dq = dS k / √e                    through F1
    B5  dk = dSᵀ q / √e
    """
    q, k, v, dy = (split_heads(a, saved.batch, saved.heads) for a in (saved.q, saved.k, saved.v, dy))
    P, scale = saved.P, 1.0 / math.sqrt(q.shape[3])
    dv = P.swapaxes(-1, -2) @ dy  # B1
    dP = dy @ v.swapaxes(-1, -2)  # B2
    dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True))  # B3
    dq = dS @ k * scale  # B4
    dk = dS.swapaxes(-1, -2) @ q * scale  # B5
    return tuple(join_heads(grad) if wanted else None for grad, wanted in zip((dq, dk, dv), need, strict=True))


def split_heads(a, batch, heads):
    """(batch · T, heads · e) as a view (batch, heads, T, e)."""
    return a.reshape(batch, -1, heads, a.shape[1] // heads).transpose(0, 2, 1, 3)


def join_heads(a):
    """(batch, heads, T, e) as (batch · T, heads · e)."""
    batch, heads, T, e = a.shape
    return a.transpose(0, 2, 1, 3).reshape(batch * T, heads * e)


def later_positions(Tq, T, like):
    """(Tq, T): −∞ where key j is later than query i, the queries being the last Tq positions, and 0 elsewhere."""
    xp = array_module(like)
    return xp.triu(xp.full((Tq, T), -math.inf, like.real.dtype), k=T - Tq + 1)


def softmax(S):
    """Along the last axis. It is the same for shifted rows, and exp of what is at most 0 cannot overflow."""
    xp = array_module(S)
    P = xp.exp(S - S.max(axis=-1, keepdims=True))
    return P / P.sum(axis=-1, keepdims=True)


def cross_entropy_forward(need, logits, *, targets, ignore_index=IGNORE_INDEX):
    """Mean negative log-likelihood of targets (N,) under softmax(logits (N, V)); in nats per counted target.

    F1  p = softmax_V logits                               (N, V)
    F2  L = − mean_n log p[n, targets_n]                   over the n with targets_n ≠ ignore_index
    Kept: p, targets.
    """
    targets, weight = check_targets(logits, targets, ignore_index)
    xp = array_module(logits)
    rows = xp.arange(len(logits))
    logits = xp.where(weight[:, None] != 0.0, logits, 0.0)  # an ignored row may hold anything, NaN too
    shifted = logits - logits.max(axis=1, keepdims=True)
    exp = xp.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    p = exp / total  # F1
    log_p = shifted[rows, targets] - xp.log(total[:, 0])
    loss = -(log_p * weight).sum()  # F2
    return loss, {"p": p, "targets": targets, "weight": weight}


def cross_entropy_backward(need, dy, saved):
    """B1  dlogits = (p − onehot(targets)) / count     for the counted rows, 0 for the others"""
    weight = dy * saved.weight
    dlogits = saved.p * weight[:, None]
    dlogits[array_module(dy).arange(len(dlogits)), saved.targets] -= weight
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


# ---------------------------------------------------------------------------- what the operations ask of their inputs


def check_linear(x, W, b):
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1] or (b is not None and b.shape != W.shape[:1]):
        shapes = f"x has shape {x.shape}, W {W.shape}, b {None if b is None else b.shape}"
        raise InputError(f"linear: {shapes}; they must be (N, d_in), (d_out, d_in) and (d_out,)")


def check_layer_norm(x, g, b):
    if x.ndim != 2 or g.shape != x.shape[1:] or b.shape != g.shape:
        raise InputError(f"layer_norm: x {x.shape}, g {g.shape}, b {b.shape}; g and b must be (d,) for x (N, d)")


def check_attention(q, k, v, batch, heads):
    if q.ndim != 2 or k.ndim != 2 or k.shape != v.shape or q.shape[1] != k.shape[1] or len(q) > len(k):
        shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
        raise InputError(f"attention: {shapes}; all need one width, k and v one length, and q at most as many rows")
    if batch < 1 or heads < 1 or len(q) % batch or len(k) % batch or q.shape[1] % heads:
        rows = f"{len(q)} and {len(k)} rows do not divide into a batch of {batch}"
        raise InputError(f"attention: {rows}, or a width of {q.shape[1]} not into {heads} heads")


def check_targets(logits, targets, ignore_index):
    """(targets, weight), both (N,) where the logits are: 0 for an ignored target, 1 / count for a counted one."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise InputError(f"cross_entropy: logits {logits.shape} and targets {targets.shape}; expected (N, V) and (N,)")
    xp, host = array_module(logits), array_module(targets)
    counted = targets != ignore_index
    if (count := int(counted.sum())) == 0:
        raise InputError(f"cross_entropy: every target is ignore_index ({ignore_index}); there is nothing to average")
    targets = host.where(counted, targets, 0)
    check_ids("cross_entropy", targets, logits.shape[1])
    weight = (counted / count).astype(logits.dtype)
    return to_device(targets, xp), to_device(weight, xp)


def check_ids(name, ids, size):
    """Raise InputError unless ``ids`` are integers in 0 … size − 1."""
    if ids.dtype.kind not in "iu":
        raise InputError(f"{name}: ids must be integers, got {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        raise InputError(f"{name}: ids run from {ids.min()} to {ids.max()}; they must lie in 0 … {size - 1}")


linear = Operation(linear_forward, linear_backward)
add = Operation(add_forward, add_backward)
embedding = Operation(embedding_forward, embedding_backward)
layer_norm = Operation(layer_norm_forward, layer_norm_backward)
gelu = Operation(gelu_forward, gelu_backward)
attention = Operation(attention_forward, attention_backward)
cross_entropy = Operation(cross_entropy_forward, cross_entropy_backward)
dropout = Operation(dropout_forward, dropout_backward)
