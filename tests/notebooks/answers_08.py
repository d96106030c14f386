"""Right and wrong answers to each exercise of notebooks/08_dora."""

ANSWERS = {
    "row_norms": (
        (
            """
def row_norms(W, A, B, s):
    sB = s * B
    cross = 2 * (W @ A.T) + sB @ (A @ A.T)
    return np.sqrt((W * W).sum(axis=1) + (cross * sB).sum(axis=1))
""",
            """
def row_norms(W, A, B, s):
    WA, AA = np.einsum("ij,kj->ik", W, A), np.einsum("kj,lj->kl", A, A)
    square = np.einsum("ij,ij->i", W, W) + 2 * s * np.einsum("ik,ik->i", WA, B)
    return np.sqrt(square + s * s * np.einsum("ik,kl,il->i", B, AA, B))
""",
            """
def row_norms(W, A, B, s):
    return np.array([np.linalg.norm(w + s * (b @ A)) for w, b in zip(W, B)])  # a row at a time
""",
        ),
        (
            """
def row_norms(W, A, B, s):
    return np.linalg.norm(W + s * (B @ A), axis=1)
""",
            """
def row_norms(W, A, B, s):
    return np.linalg.norm(W + s * np.dot(B, A), axis=1)
""",
            """
def row_norms(W, A, B, s):
    return np.linalg.norm(W + B.dot(s * A), axis=1)
""",
            """
def row_norms(W, A, B, s):
    return np.linalg.norm(W + s * np.einsum("ik,kj->ij", B, A), axis=1)
""",
            """
def row_norms(W, A, B, s):
    return np.linalg.norm(W.T + s * A.T @ B.T, axis=0)  # its transpose
""",
            """
def row_norms(W, A, B, s):
    return np.linalg.norm(W + s * sum(np.outer(B[:, k], A[k]) for k in range(len(A))), axis=1)
""",
            """
def row_norms(W, A, B, s):
    return np.linalg.norm(W + s * (B[:, :, None] * A).sum(axis=1), axis=1)  # even larger
""",
            """
def row_norms(W, A, B, s):
    return np.sqrt((W * W).sum(axis=1) + 2 * s * ((W @ A.T) * B).sum(axis=1))  # no square of s B A
""",
        ),
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
