"""A right and a wrong answer to each exercise of notebooks/07_delta_lora."""

ANSWERS = {
    "after_step": (
        """
def after_step(W, p, s, update_ratio):
    change = s * (p["B"] @ p["A"] - p["B_before"] @ p["A_before"])  # U1
    p["A_before"], p["B_before"] = p["A"].copy(), p["B"].copy()  # U2
    return W + update_ratio * change
""",
        """
def after_step(W, p, s, update_ratio):
    return W + update_ratio * s * (p["B"] @ p["A"] - p["B_before"] @ p["A_before"])  # U2 is missing
""",
    ),
    "as_lora": (
        """
def as_lora(A, B, A_K, B_K, s, update_ratio):
    B2 = np.hstack([(1 + update_ratio) * s * B, -update_ratio * s * B_K])
    return B2, np.vstack([A, A_K])
""",
        """
def as_lora(A, B, A_K, B_K, s, update_ratio):
    B2 = np.hstack([update_ratio * s * B, -update_ratio * s * B_K])  # W's own change alone
    return B2, np.vstack([A, A_K])
""",
    ),
    "control_rate": (
        """
def control_rate(lr, momentum, update_ratio):
    return lr / (1 + update_ratio)
""",
        """
def control_rate(lr, momentum, update_ratio):
    return lr / (1 + update_ratio * (1 - momentum))
""",
    ),
    "rank_bound": (
        """
def rank_bound(r, start_step, d_out, d_in):
    return min(r if start_step == 0 else 2 * r, d_out, d_in)
""",
        """
def rank_bound(r, start_step, d_out, d_in):
    return min(2 * r, d_out, d_in)
""",
    ),
}
