"""A right and a wrong answer to each exercise of notebooks/11_your_method."""

ANSWERS = {
    "diagonal_gradient": (
        """
def diagonal_gradient(dy, h, B, s):
    return (h * (dy @ (s * B))).sum(axis=0)
""",
        """
def diagonal_gradient(dy, h, B, s):
    return (h * (dy @ B)).sum(axis=0)  # s forgotten
""",
    ),
    "dR_from_dW": (
        """
def dR_from_dW(dW, A, B, s):
    return (s * B).T @ dW @ A.T
""",
        """
def dR_from_dW(dW, A, B, s):
    return A @ dW.T @ (s * B)  # the transpose, which has the same shape
""",
    ),
    "rank_for_budget": (
        """
def rank_for_budget(r, d_in, d_out):
    return min(int((r * (d_in + d_out)) ** 0.5), d_in, d_out)
""",
        """
def rank_for_budget(r, d_in, d_out):
    return int((r * (d_in + d_out)) ** 0.5)  # more directions than the layer has
""",
    ),
    "ia3_backward": (
        """
def ia3_backward(dy, saved, W, p):
    dl = (dy * saved["z"]).sum(axis=0)
    dx = (dy * p["l"]) @ W
    return dx, {"l": dl}
""",
        """
def ia3_backward(dy, saved, W, p):
    dl = (dy * saved["z"]).sum(axis=0)
    return dy @ W, {"l": dl}  # l forgotten
""",
    ),
}
