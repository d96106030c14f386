"""A right and a wrong answer to each exercise of notebooks/02_transformer."""

ANSWERS = {
    "rms_norm_vjp": (
        """
def rms_norm_vjp(dy, x, g):
    r = ((x * x).mean(axis=1, keepdims=True) + 1e-5) ** -0.5
    x_hat = x * r
    dx_hat = dy * g
    dx = r * (dx_hat - x_hat * (dx_hat * x_hat).mean(axis=1, keepdims=True))
    return dx, (dy * x_hat).sum(axis=0)
""",
        """
def rms_norm_vjp(dy, x, g):
    r = ((x * x).mean(axis=1, keepdims=True) + 1e-5) ** -0.5
    x_hat = x * r
    dx_hat = dy * g
    along = x_hat * (dx_hat * x_hat).mean(axis=1, keepdims=True)
    dx = r * (dx_hat - dx_hat.mean(axis=1, keepdims=True) - along)  # layer norm's mean
    return dx, (dy * x_hat).sum(axis=0)
""",
    ),
    "silu_vjp": (
        """
def silu_vjp(dy, x):
    s = 1 / (1 + np.exp(-x))
    return (dy * (s + x * s * (1 - s)),)
""",
        """
def silu_vjp(dy, x):
    s = 1 / (1 + np.exp(-x))
    return (dy * s,)  # half of the product rule
""",
    ),
    "cross_entropy_gradient": (
        """
def cross_entropy_gradient(logits, targets):
    p = softmax(logits)[0]
    p[np.arange(len(p)), targets] -= 1
    return p / len(p)
""",
        """
def cross_entropy_gradient(logits, targets):
    p = softmax(logits)[0]
    p[np.arange(len(p)), targets] -= 1
    return p  # of the sum, not of the mean
""",
    ),
    "tied_gradient": (
        """
def tied_gradient(dlogits, h, dx, ids, V):
    dE = dlogits.T @ h
    np.add.at(dE, ids, dx)
    return dE
""",
        """
def tied_gradient(dlogits, h, dx, ids, V):
    dE = dlogits.T @ h
    dE[ids] += dx  # a token that was read twice receives once
    return dE
""",
    ),
}
