"""A right and a wrong answer to each exercise of notebooks/06_vera."""

ANSWERS = {
    "trained_numbers": (
        """
def trained_numbers(shapes, r):
    return sum(r + d_out for d_out, d_in in shapes)
""",
        """
def trained_numbers(shapes, r):
    return r + sum(d_out for d_out, d_in in shapes)  # as if all layers shared one d
""",
    ),
    "dd_by_tokens": (
        """
def dd_by_tokens(dy, h, B, b):
    return (((dy * b) @ B) * h).sum(axis=0)
""",
        """
def dd_by_tokens(dy, h, B, b):
    return ((dy @ B) * h).sum(axis=0)  # b forgotten
""",
    ),
    "dA_if_trained": (
        """
def dA_if_trained(dy, x, B, b, d):
    return (dy @ (b[:, None] * B * d)).T @ x
""",
        """
def dA_if_trained(dy, x, B, b, d):
    return (dy @ (b[:, None] * B)).T @ x  # d forgotten
""",
    ),
    "rate_factors": (
        """
def rate_factors(c):
    return c, 1.0 / c
""",
        """
def rate_factors(c):
    return c, 1.0  # b as before
""",
    ),
}
