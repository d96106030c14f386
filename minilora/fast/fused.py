"""Fused kernels for CuPy: on a GPU a chain of small operations takes as long as its launches, so here each is one.

Every pair of functions stands for the pair of the same name in ops.py, with its signature and its meaning: that is the
plain form to read, and tests hold these to it. Whatever has no pair here takes the plain one. Nothing in this file
waits for the device, unless targets lie there.
A row is reduced in one launch that reads it once: what is known of a part of a row is a struct, and two parts merge.
The rows' results are (…, 1) and are broadcast by the kernel that uses them, never by a second reduction: CuPy would lay
its threads along such an input, and they would read the rows across.
"""

import math
from functools import cache

from .. import ops
from ..backend import array_module
from ..ops import join_heads, split_heads
from ..training.optim import AdamW

MOMENTS = """
struct Moments {  // of n entries: their mean, and the sum of the squares of their distances from it
  T n, mean, squares;
  __device__ Moments(T n = 0, T mean = 0, T squares = 0) : n(n), mean(mean), squares(squares) {}
};
__device__ Moments merge(const Moments& a, const Moments& b) {  // Chan, Golub & LeVeque 1979
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  T n = a.n + b.n;
  T apart = b.mean - a.mean;
  T mean = a.mean + apart * (b.n / n);
  T squares = a.squares + b.squares + apart * apart * (a.n * b.n / n);
  return Moments(n, mean, squares);
}
"""
SUMS = """
struct Sums {
  T first, second;
  __device__ Sums(T first = 0, T second = 0) : first(first), second(second) {}
};
"""
SOFTMAX = """
struct Softmax {  // of some entries: the largest, and the sum of exp(entry - largest); a sum of 0 is no entry
  T top, total;
  __device__ Softmax() : top(0), total(0) {}
  __device__ Softmax(T top, T total) : top(top), total(total) {}
};
__device__ T shrunk(T total, T from, T to) {  // equal ones apart: two of them may be -inf
  return from == to ? total : total * exp(from - to);
}
__device__ Softmax merge(const Softmax& a, const Softmax& b) {
  if (a.total == 0) return b;
  if (b.total == 0) return a;
  T top = a.top > b.top ? a.top : b.top;
  T total = shrunk(a.total, a.top, top) + shrunk(b.total, b.top, top);
  return Softmax(top, total);
}
"""
GELU = f"""
T cubic = T({ops.GELU_SCALE * ops.GELU_CUBIC}) * x * x;
T t = tanh(x * (T({ops.GELU_SCALE}) + cubic));  // F1
T half = T(0.5) * t + T(0.5);
"""
GELU_SLOPE = f"half + x * half * (1 - t) * (T({ops.GELU_SCALE}) + 3 * cubic)"

# name: (inputs, outputs, what is done for each entry); an output that is read first is changed in place
ELEMENTWISE = {
    "layer_norm": (
        "T x, T mean, T r, T g, T b",
        "T x_hat, T y",
        """
        x_hat = (x - mean) * r;  // F2
        y = g * x_hat + b;  // F3
        """,
    ),
    "layer_norm_dx": (
        "T dy, T x_hat, T g, T r, T mean, T along",
        "T dx",
        "dx = r * (dy * g - mean - x_hat * along);  // B2",
    ),
    "gelu": ("T x", "T y", GELU + "y = x * half;  // F2"),
    "gelu_and_slope": ("T x", "T y, T slope", GELU + f"y = x * half;  // F2\nslope = {GELU_SLOPE};  // B1"),
    "later": ("int64 keys, int64 first", "bool later", "later = i % keys > first + i / keys;"),
    "softmax": ("bool later, T top, T total", "T p", "p = later ? T(0) : exp(p - top) / total;  // F2"),
    "softmax_ds": ("T p, T along, T scale", "T ds", "ds = scale * p * (ds - along);  // B3"),
    "cross_entropy": (
        "T logit, T top, T total, I target, T weight, int64 width",
        "T p, raw T loss",
        """
        p = weight == T(0) ? T(0) : exp(logit - top) / total;  // F1; an ignored row may hold anything
        if (i % width == target)
          loss[i / width] = weight == T(0) ? T(0) : weight * (log(total) - (logit - top));  // F2
        """,
    ),
    "cross_entropy_dlogits": (
        "T p, I target, T weight, T dy, int64 width",
        "T dlogits",
        "dlogits = dy * weight * (p - T(i % width == target));  // B1",
    ),
    "adamw": (
        "T g, T lr_scale, T beta1, T rest1, T beta2, T rest2, T rate, T correction, T eps",
        "T m, T v, T w",
        """
        m = beta1 * m + rest1 * g;
        v = beta2 * v + rest2 * g * g;
        w -= rate * lr_scale * m / (sqrt(v) * correction + eps);
        """,
    ),
}
# name: (inputs, outputs, an entry's part, two parts merged, what is made of the whole, no entry, type of a part, code)
REDUCTION = {
    "layer_norm_moments": (
        "T x, T eps",
        "T mean, T r",
        "Moments(1, x)",
        "merge(a, b)",
        "mean = a.mean, r = 1 / sqrt(a.squares / a.n + eps)",  # F1
        "Moments()",
        "Moments",
        MOMENTS,
    ),
    "layer_norm_means": (
        "T dy, T x_hat, T g, T width",
        "T mean, T along",
        "Sums(dy * g, dy * g * x_hat)",  # B1
        "Sums(a.first + b.first, a.second + b.second)",
        "mean = a.first / width, along = a.second / width",
        "Sums()",
        "Sums",
        SUMS,
    ),
    "softmax_seen": (
        "T s, bool later",
        "T top, T total",
        "later ? Softmax() : Softmax(s, 1)",  # F1
        "merge(a, b)",
        "top = a.top, total = a.total",
        "Softmax()",
        "Softmax",
        SOFTMAX,
    ),
    "softmax_all": (
        "T s",
        "T top, T total",
        "Softmax(s, 1)",
        "merge(a, b)",
        "top = a.top, total = a.total",
        "Softmax()",
        "Softmax",
        SOFTMAX,
    ),
    "softmax_along": ("T p, T dp", "T along", "p * dp", "a + b", "along = a", "0", "T", ""),
}


@cache
def kernel(xp, name):
    """The kernel of that name, made when it is first asked for; CuPy compiles it once for each dtype and layout."""
    if name in ELEMENTWISE:
        return xp.ElementwiseKernel(*ELEMENTWISE[name], f"minilora_{name}")
    *maps, reduce_type, preamble = REDUCTION[name]
    return xp.ReductionKernel(*maps, f"minilora_{name}", reduce_type, preamble=preamble)


def launch(name, *arrays, like, **where):
    """One launch. ``arrays``: inputs, then outputs, already made; ``where``: the axis of a reduction."""
    return kernel(array_module(like), name)(*arrays, **where)


def empty(shape, like):
    return array_module(like).empty(shape, like.dtype)


def per_row(name, *arrays, like):
    """Two numbers for each row of ``like`` (…, d), its last axis reduced: two arrays (…, 1)."""
    first, second = (empty((*like.shape[:-1], 1), like) for _ in range(2))
    launch(name, *arrays, first, second, like=like, axis=like.ndim - 1, keepdims=True)
    return first, second


def layer_norm_forward(need, x, g, b, *, eps=1e-5):
    """F1 in one launch, F2 and F3 in another: y, and x̂ where it is kept, (N, d)."""
    ops.check_layer_norm(x, g, b)
    mean, r = per_row("layer_norm_moments", x, eps, like=x)  # F1
    y = empty(x.shape, x)
    x_hat = empty(x.shape, x) if any(need) else y
    launch("layer_norm", x, mean, r, g, b, x_hat, y, like=x)  # F2, F3
    return y, {
        "x_hat": x_hat if need.x or need.g else None,
        "r": r if need.x else None,
        "g": g if need.x else None,
    }


def layer_norm_backward(need, dy, saved):
    """B1 and the two means of B2 in one launch, dx (N, d) in another."""
    dg = (dy * saved.x_hat).sum(axis=0) if need.g else None  # B3
    db = dy.sum(axis=0) if need.b else None  # B4
    if not need.x:
        return None, dg, db
    dx = empty(dy.shape, dy)
    mean, along = per_row("layer_norm_means", dy, saved.x_hat, saved.g, dy.shape[1], like=dy)  # B1
    launch("layer_norm_dx", dy, saved.x_hat, saved.g, saved.r, mean, along, dx, like=dy)  # B2
    return dx, dg, db


def gelu_forward(need, x):
    """F1, F2 and B1 in one launch: y, and dy/dx where it is saved."""
    y, slope = empty(x.shape, x), empty(x.shape, x) if need.x else None
    if slope is None:
        launch("gelu", x, y, like=x)
    else:
        launch("gelu_and_slope", x, y, slope, like=x)
    return y, {"slope": slope}


def attention_forward(need, q, k, v, *, batch, heads):
    """All heads of all samples at once, with the queries down and the keys across, so that a softmax runs along a row:
    F1  S = q kᵀ / √e   (batch, heads, Tq, T)         F2  P = softmax_T S where a query sees the key, else 0
    F3  y = P v         (batch, heads, Tq, e)
    Three launches from S to P.
    """
    ops.check_attention(q, k, v, batch, heads)
    P = probabilities(q, k, batch, heads)
    y = join_heads(array_module(q).matmul(P, split_heads(v, batch, heads)))  # F3
    return y, {"q": q, "k": k, "v": v, "P": P if any(need) else None, "batch": batch, "heads": heads}


def probabilities(q, k, batch, heads):
    """P (batch, heads, Tq, T), from q (batch · Tq, d) and k (batch · T, d)."""
    xp, (q_, k_) = array_module(q), (split_heads(a, batch, heads) for a in (q, k))
    P = xp.matmul(q_ * (1.0 / math.sqrt(q_.shape[-1])), k_.swapaxes(-1, -2))  # F1
    Tq, T = P.shape[-2:]
    later = xp.empty((Tq, T), dtype=bool)
    launch("later", T, T - Tq, later, like=q)
    top, total = per_row("softmax_seen", P, later, like=P)
    launch("softmax", later, top, total, P, like=P)  # F2
    return P


def attention_backward(need, dy, saved):
    """B1  dv = (dyᵀ P)ᵀ      B2  dP = dy vᵀ            B3  dS = P ∘ (dP − Σ_T P ∘ dP), two launches
    B4  dq = dS k / √e     B5  dk = (qᵀ dS)ᵀ / √e    the √e is taken in B3
    Never Pᵀ or dSᵀ: a batched product copies what is not contiguous, and these are the large ones.
    """
    xp, P = array_module(dy), saved.P
    q_, k_, v_, dy_ = (split_heads(a, saved.batch, saved.heads) for a in (saved.q, saved.k, saved.v, dy))
    dv = join_heads(xp.matmul(dy_.swapaxes(-1, -2), P).swapaxes(-1, -2)) if need.v else None  # B1
    if not (need.q or need.k):
        return None, None, dv
    dS = xp.matmul(dy_, v_.swapaxes(-1, -2))  # B2
    along = empty((*dS.shape[:-1], 1), dS)
    launch("softmax_along", P, dS, along, like=dS, axis=3, keepdims=True)
    launch("softmax_ds", P, along, 1.0 / math.sqrt(q_.shape[-1]), dS, like=dS)  # B3
    dq = join_heads(xp.matmul(dS, k_)) if need.q else None  # B4
    dk = join_heads(xp.matmul(q_.swapaxes(-1, -2), dS).swapaxes(-1, -2)) if need.k else None  # B5
    return dq, dk, dv


def cross_entropy_forward(need, logits, *, targets, ignore_index=ops.IGNORE_INDEX):
    """The rows' largest logits and sums in one launch; p (N, V) and each row's part of the loss in another; their sum.
    The targets are checked and counted on the host, where they had better lie: a device that holds them is waited for.
    """
    targets, weight = ops.check_targets(logits, targets, ignore_index)
    V = logits.shape[1]
    p, loss = empty(logits.shape, logits), empty(targets.shape, logits)
    top, total = per_row("softmax_all", logits, like=logits)
    launch("cross_entropy", logits, top, total, targets[:, None], weight[:, None], V, p, loss, like=logits)  # F1, F2
    return loss.sum(), {"p": p, "targets": targets, "weight": weight}


def cross_entropy_backward(need, dy, saved):
    """B1 in one launch."""
    dlogits = empty(saved.p.shape, saved.p)
    numbers = (saved.targets[:, None], saved.weight[:, None], dy, dlogits.shape[1])
    launch("cross_entropy_dlogits", saved.p, *numbers, dlogits, like=dlogits)  # B1
    return (dlogits,)


def adamw(optimizer):
    """The step of optim.AdamW, its t already counted, in one launch over the flat buffers (P,)."""
    o, (beta1, beta2) = optimizer, optimizer.betas
    rate, correction = o.lr / (1.0 - beta1**o.t), 1.0 / math.sqrt(1.0 - beta2**o.t)
    rest1, rest2 = 1.0 - beta1, 1.0 - beta2  # here, where they are exact: in float32 1 − 0.999 is off by 5e-5 of itself
    numbers = (beta1, rest1, beta2, rest2, rate, correction, o.eps)
    launch("adamw", o.grad, o.lr_scale, *numbers, o.m, o.v, o.data, like=o.data)


ops.layer_norm.forms["cupy"] = layer_norm_forward, layer_norm_backward
ops.gelu.forms["cupy"] = gelu_forward, ops.gelu_backward
ops.attention.forms["cupy"] = attention_forward, attention_backward
ops.cross_entropy.forms["cupy"] = cross_entropy_forward, cross_entropy_backward
AdamW.forms["cupy"] = adamw
