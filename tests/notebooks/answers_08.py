"""A right and a wrong answer to each exercise of notebooks/08_dora."""

ANSWERS = {
    "row_norms": (
        """
def row_norms(W, A, B, s):
    sB = s * B
    cross = 2 * (W @ A.T) + sB @ (A @ A.T)
    return np.sqrt((W * W).sum(axis=1) + (cross * sB).sum(axis=1))
""",
        """
def row_norms(W, A, B, s):
    return np.linalg.norm(W + s * (B @ A), axis=1)
""",
    ),
    "full_gradient": (
        """
def full_gradient(D, V):
    return D - (D * V).sum(axis=1, keepdims=True) / (V * V).sum(axis=1, keepdims=True) * V
""",
        """
def full_gradient(D, V):
    return D - (D * V).sum(axis=0) / (V * V).sum(axis=0) * V  # along columns
""",
    ),
    "merge_per_input": (
        """
def merge_per_input(W, A, B, m_in, s):
    V = W + s * B @ A
    return m_in * V / np.linalg.norm(V, axis=0)
""",
        """
def merge_per_input(W, A, B, m_in, s):
    V = W + s * B @ A
    return m_in * V / np.linalg.norm(W, axis=0)  # the norm of W, not of V
""",
    ),
    "dm_from": (
        """
def dm_from(D, V, m):
    return (D * V).sum(axis=1) / m
""",
        """
def dm_from(D, V, m):
    return (D * V).sum(axis=1) / np.linalg.norm(V, axis=1)  # m and n changed over
""",
    ),
}
