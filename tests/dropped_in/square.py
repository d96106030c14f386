"""Square: one square matrix between inputs and outputs chosen once.   After Jiang et al. 2024, arXiv 2405.12130

The arrays have sizes of their own: M has m rows, where m is neither r nor d_in nor d_out, and the choice is integers.

Forward, x (N, d_in), W (d_out, d_in), M (m, m), columns (m,), rows (d_out,), m = ⌊√(r (d_in + d_out))⌋:
  F1  h  = x[:, columns]         (N, m)
  F2  G  = M[rows]               (d_out, m)
  F3  y  = x Wᵀ + h Gᵀ           (N, d_out)

Backward, dy = dL/dy (N, d_out):
  B1  dG = dyᵀ h                 (d_out, m)    G_ik multiplies h_k in every row
  B2  dM = Σ_i dG_i              (m, m)        over the outputs i that have the row of M
  B3  dh = dy G                  (N, m)        h_k reaches y_i through G_ik
  B4  dx = dy W + Σ_k dh_k       (N, d_in)     over the k that have the input

Kept for backward: h (N, m)
"""

import math
from dataclasses import dataclass

import numpy as np

from ..adapter import Adapter


@dataclass(frozen=True)
class Square(Adapter):
    r: int = 4
    integers = ("columns", "rows", "slots", "inputs")

    claims = {
        "starts as the base model": lambda t: (t.merged == t.W0).all(),
        "trains at most as many numbers as LoRA": lambda t: t.trained_numbers() <= t.method.r * sum(t.W0.shape),
    }

    def shapes(self, d_out, d_in):
        m = math.isqrt(self.r * (d_in + d_out))
        return {"M": (m, m)}, {"columns": (m,), "rows": (d_out,), "slots": (m,), "inputs": (d_in,)}

    def init(self, W, rng, shared):
        d_out, d_in = W.shape
        m = math.isqrt(self.r * (d_in + d_out))
        columns, rows = rng.integers(0, d_in, m), rng.integers(0, m, d_out).astype(np.int32)
        return {"M": np.zeros((m, m))}, {
            "columns": columns,
            "rows": rows,
            "slots": np.arange(m),
            "inputs": np.arange(d_in),
        }

    def forward(self, x, W, p):
        h = x[:, p.columns]  # (N, m) F1
        G = p.M[p.rows]  # (d_out, m) F2
        y = x @ W.T + h @ G.T  # (N, d_out) F3
        return y, {"h": h}

    def backward(self, dy, saved, W, p):
        dG = dy.T @ saved.h  # (d_out, m) B1
        dM = (p.slots[:, None] == p.rows) @ dG  # (m, m) B2
        dh = dy @ p.M[p.rows]  # (N, m) B3
        dx = dy @ W + dh @ (p.columns[:, None] == p.inputs)  # (N, d_in) B4
        return dx, {"M": dM}

    def merge(self, W, p):
        return W + p.M[p.rows] @ (p.columns[:, None] == p.inputs)  # (d_out, d_in)
