"""Faster matrix products: thin ones without packing, sums by associativity, results that begin at a cache line.

BLAS packs its operands into blocks, which pays for wide matrices. OpenBLAS skips that where M·N·K is at most a million,
so a tall product with few columns, such as x Aᵀ with r = 8, is computed as a stack of short ones.
"""

import numpy as np

from .blocked import empty

THIN = 32  # the smallest dimension up to which a product counts as thin
SMALL = 10**6  # the largest M·N·K that OpenBLAS computes without packing
ROWS = 64  # rows of a short product, at most


def product(a, b):
    """a @ b."""
    if type(a) is not np.ndarray or type(b) is not np.ndarray or a.ndim != 2 or b.ndim != 2 or a.dtype != b.dtype:
        return a @ b
    (M, K), N = a.shape, b.shape[1]
    if b.shape[0] != K or a.dtype.kind != "f" or M * N * K <= SMALL:
        return a @ b
    if min(M, N, K) > THIN:
        return np.matmul(a, b, out=empty((M, N), a))
    short = rows_for(K * N)
    if a.flags.c_contiguous and M % short == 0:  # rows of the result, a few at a time
        out, b = empty((M, N), a), np.ascontiguousarray(b) if K <= THIN else b
        np.matmul(a.reshape(M // short, short, K), b, out=out.reshape(M // short, short, N))
        return out
    short = rows_for(M * N)
    if a.flags.f_contiguous and b.flags.c_contiguous and K % short == 0:  # a sum over K, a few terms at a time
        return (a.T.reshape(K // short, short, M).swapaxes(1, 2) @ b.reshape(K // short, short, N)).sum(axis=0)
    return a @ b


def chain(x, F, h, G, E):
    """x @ F + h @ E, where h = x @ G: with many rows it is less work to add up the weights, as x @ (F + G @ E)."""
    if type(x) is np.ndarray and x.ndim == F.ndim == 2 and len(x) >= max(F.shape) and x.dtype == F.dtype:
        return product(x, F + G @ E)
    return product(x, F) + product(h, E)


def rows_for(work):
    """Rows of a short product in which each row takes ``work`` multiplications."""
    return ROWS if ROWS * work <= SMALL else ROWS // 2
