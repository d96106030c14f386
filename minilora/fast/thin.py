"""Products with a thin matrix, such as x Aᵀ with r = 8 columns, at two to three times the speed; results are the same.

BLAS packs its operands into blocks that pay for wide matrices. OpenBLAS skips that where M·N·K is at most a million, so
a tall product is handed to it as a stack of short ones. A method file writes ``x @ p.A.T`` and knows nothing of this.
"""

import numpy as np

THIN = 32  # the smallest dimension up to which a product counts as thin
SMALL = 10**6  # the largest M·N·K that is computed without packing
ROWS = 64  # rows of a short product, at most


class Rows(np.ndarray):
    """A NumPy array (N, d) whose ``@`` takes the short way; the same memory, and the same array in all else.

    A product is an ordinary array again: in ``x @ W.T + h @ B.T`` NumPy then adds into the first, as it does not
    for a subclass.
    """

    def __matmul__(self, other):
        return product(self.view(np.ndarray), np.asarray(other))

    def __rmatmul__(self, other):
        return product(np.asarray(other), self.view(np.ndarray))


def rows(array):
    """``array`` as Rows where it is NumPy's; a CuPy array stays as it is."""
    return array.view(Rows) if isinstance(array, np.ndarray) else array


def plain(array, original=None):
    """The array without the class; ``original`` itself where the array is a view of all of it."""
    if not isinstance(array, Rows):
        return array
    whole = original is not None and array.shape == original.shape and np.may_share_memory(array, original)
    return original if whole else array.view(np.ndarray)


def product(a, b):
    """a (M, K) @ b (K, N)."""
    if a.ndim != 2 or b.ndim != 2 or min(*a.shape, b.shape[-1]) > THIN or a.dtype != b.dtype:
        return a @ b
    (M, K), N = a.shape, b.shape[1]
    if M * N * K <= SMALL:
        return a @ b
    if a.flags.c_contiguous and M % (short := rows_for(K * N)) == 0:  # rows of the result, a few at a time
        return (a.reshape(M // short, short, K) @ b).reshape(M, N)
    if a.flags.f_contiguous and b.flags.c_contiguous and K % (short := rows_for(M * N)) == 0:  # a sum, a few terms each
        return (a.T.reshape(K // short, short, M).swapaxes(1, 2) @ b.reshape(K // short, short, N)).sum(axis=0)
    return a @ b


def rows_for(work):
    """Rows of a short product in which each row takes ``work`` multiplications."""
    return ROWS if ROWS * work <= SMALL else ROWS // 2
