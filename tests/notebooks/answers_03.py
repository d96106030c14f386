"""A right and a wrong answer to each exercise of notebooks/03_lora."""

ANSWERS = {
    "break_even_rank": (
        """
def break_even_rank(d_out, d_in):
    return -(-d_out * d_in // (d_out + d_in))
""",
        """
def break_even_rank(d_out, d_in):
    return d_out * d_in // (d_out + d_in)  # rounded down: one too small where the division leaves a rest
""",
    ),
    "core_gradient": (
        """
def core_gradient(dy, x, A, B, s):
    return (dy @ (s * B)).T @ (x @ A.T)
""",
        """
def core_gradient(dy, x, A, B, s):
    return (x @ A.T).T @ (dy @ (s * B))  # the transpose
""",
    ),
    "dropout_backward": (
        """
def dropout_backward(dy, x, m, W, A, B, s):
    dropped = m * x
    dh = dy @ (s * B)
    return {"x": dy @ W + m * (dh @ A), "A": dh.T @ dropped, "B": dy.T @ (s * dropped @ A.T)}
""",
        """
def dropout_backward(dy, x, m, W, A, B, s):
    dropped = m * x
    dh = dy @ (s * B)
    dx = m * (dy @ W + dh @ A)  # the mask on the base's way, too
    return {"x": dx, "A": dh.T @ dropped, "B": dy.T @ (s * dropped @ A.T)}
""",
    ),
    "gap": (
        """
def gap(w, bits):
    return 2.0 ** (math.floor(math.log2(w)) - bits)
""",
        """
def gap(w, bits):
    return w * 2.0**-bits  # grows with w within a power of two
""",
    ),
}
