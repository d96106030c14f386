"""The textbook form of each operation in minilora/ops.py, of AdamW and of a thin product: the plainest NumPy.

Nothing here is meant to be fast. test_operations.py holds the results equal and sets the times side by side. A forward
returns (y, saved); a backward takes (dy, saved) and returns the gradients of the arrays, in the order of forward's.
"""

import numpy as np


def linear_forward(x, W, b):
    return x @ W.T + b, (x, W)


def linear_backward(dy, saved):
    x, W = saved
    return dy @ W, dy.T @ x, dy.sum(axis=0)


def embedding_forward(table, ids):
    return table[ids], (ids, table.shape)


def embedding_backward(dy, saved):
    ids, shape = saved
    dtable = np.zeros(shape, dy.dtype)
    np.add.at(dtable, ids, dy)
    return (dtable,)


def layer_norm_forward(x, g, b, eps=1e-5):
    mean, var = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
    r = 1 / np.sqrt(var + eps)
    x_hat = (x - mean) * r
    return g * x_hat + b, (x_hat, r, g)


def layer_norm_backward(dy, saved):
    x_hat, r, g = saved
    dx_hat = dy * g
    mean = lambda a: a.mean(axis=1, keepdims=True)
    dx = r * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat))
    return dx, (dy * x_hat).sum(axis=0), dy.sum(axis=0)


SCALE = float(np.sqrt(2 / np.pi))


def gelu_forward(x):
    return 0.5 * x * (1 + np.tanh(SCALE * (x + 0.044715 * x**3))), x


def gelu_backward(dy, x):
    t = np.tanh(SCALE * (x + 0.044715 * x**3))
    return (dy * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * SCALE * (1 + 3 * 0.044715 * x**2)),)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def split_heads(a, batch, heads):
    """(batch · T, d) to (batch, heads, T, d / heads)."""
    return a.reshape(batch, -1, heads, a.shape[1] // heads).transpose(0, 2, 1, 3)


def join_heads(a):
    batch, heads, T, e = a.shape
    return a.transpose(0, 2, 1, 3).reshape(batch * T, heads * e)


def attention_forward(q, k, v, batch, heads):
    q, k, v = (split_heads(a, batch, heads) for a in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / float(np.sqrt(q.shape[-1]))
    later = np.triu(np.ones(scores.shape, bool), k=1)
    P = softmax(np.where(later, np.float32(-np.inf), scores))
    return join_heads(P @ v), (q, k, v, P)


def attention_backward(dy, saved):
    q, k, v, P = saved
    dy = split_heads(dy, *q.shape[:2])
    dv, dP = P.transpose(0, 1, 3, 2) @ dy, dy @ v.transpose(0, 1, 3, 2)
    dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True)) / float(np.sqrt(q.shape[-1]))
    return join_heads(dS @ k), join_heads(dS.transpose(0, 1, 3, 2) @ q), join_heads(dv)


def cross_entropy_forward(logits, targets):
    p = softmax(logits)
    return -np.log(p[np.arange(len(targets)), targets]).mean(), (p, targets)


def cross_entropy_backward(dy, saved):
    p, targets = saved
    onehot = np.eye(p.shape[1], dtype=p.dtype)[targets]
    return (dy * (p - onehot) / len(targets),)


def dropout_forward(x, p, rng):
    mask = (rng.random(x.shape) >= p).astype(x.dtype) / (1 - p)
    return x * mask, mask


def dropout_backward(dy, mask):
    return (dy * mask,)


class AdamW:
    """One parameter after the other, each with its own moments."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        self.params, self.lr, self.betas, self.eps, self.t = list(params), lr, betas, eps, 0
        self.m, self.v = [0 * p for p in params], [0 * p for p in params]

    def step(self, grads):
        self.t += 1
        beta1, beta2 = self.betas
        for i, g in enumerate(grads):
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            m_hat, v_hat = self.m[i] / (1 - beta1**self.t), self.v[i] / (1 - beta2**self.t)
            self.params[i] = self.params[i] - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
