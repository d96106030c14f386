"""VeRA: Vector-based Random Matrix Adaptation.   Kopiczko, Blankevoort & Asano 2024, arXiv 2310.11454, equation 2

A and B are random, frozen, and the same for all layers; a layer trains two vectors, d between them and b behind them.
Taught: the paper's version with its experiments' start, b = 0 and d = 0.1, and A and B uniform (Kaiming). Names,
shapes and numbers are PEFT's: a layer uses the corner of A (r, max d_in) and B (max d_out, r) that fits it, and
projection_prng_key draws the very matrices that PEFT draws from it on a CPU.

Forward, x (N, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), d (r,), b (d_out,):
  F1  h  = x Aᵀ                  (N, r)
  F2  y  = x Wᵀ + h (b ∘ B ∘ d)ᵀ (N, d_out)    b scales rows of B, d its columns: no N × d_out product is formed

Backward, dy = dL/dy (N, d_out):
  B1  G  = dyᵀ h                 (d_out, r)    what b ∘ B ∘ d receives
  B2  db = Σ_r G ∘ B ∘ d         (d_out,)      b_i scales row i
  B3  dd = Σ_out G ∘ b ∘ B       (r,)          d_j scales column j
  B4  dh = dy (b ∘ B ∘ d)        (N, r)        h_j reaches y_i through b_i B_ij d_j
  B5  dx = dy W + dh A           (N, d_in)     x reaches y through W, and h through A

Kept for backward: h (N, r)
"""

import math
from dataclasses import dataclass

import numpy as np

from ..adapter import Adapter


@dataclass(frozen=True)
class VeRA(Adapter):
    r: int = 64
    d_initial: float = 0.1
    projection_prng_key: int = 0

    claims = {
        "trains r + d_out numbers, whatever d_in is": lambda t: (
            t.trained_numbers() == t.resized(d_in=90).trained_numbers() == t.method.r + len(t.W0)
        ),
        "keeps no N × d_in array": lambda t: t.kept_numbers() == len(t.x) * t.method.r,
        "at step 1 dd is exactly 0 and db is not": lambda t: not t.grads.d.any() and t.grads.b.any(),
    }

    def check_layer(self, layer, shape):
        """Any rank will do: a vector of r numbers is cheap, and the paper's r of 256 to 1024 may be above d."""

    def shapes(self, d_out, d_in):
        return {"b": (d_out,), "d": (self.r,)}, {}

    def shared_shapes(self, d_out, d_in):
        return {"A": (self.r, d_in), "B": (d_out, self.r)}

    def init_shared(self, shapes, rng):
        max_out, max_in = (max(sizes) for sizes in zip(*shapes, strict=True))
        stream = np.random.RandomState(self.projection_prng_key)
        return {"A": kaiming_uniform(stream, (self.r, max_in)), "B": kaiming_uniform(stream, (max_out, self.r))}

    def init(self, W, rng, shared):
        b = np.zeros(W.shape[0])  # (d_out,)
        d = np.full(self.r, self.d_initial)  # (r,)
        return {"b": b, "d": d}, {}

    def forward(self, x, W, p):
        h = x @ p.A[:, : W.shape[1]].T  # (N, r) F1
        y = x @ W.T + h @ self.scaled(W, p).T  # (N, d_out) F2
        return y, {"h": h}

    def backward(self, dy, saved, W, p):
        A = p.A[:, : W.shape[1]]  # (r, d_in)
        B = p.B[: W.shape[0]]  # (d_out, r)
        G = dy.T @ saved.h  # (d_out, r) B1
        db = (G * (B * p.d)).sum(axis=1)  # (d_out,) B2
        dd = (G * (p.b[:, None] * B)).sum(axis=0)  # (r,) B3
        dh = dy @ self.scaled(W, p)  # (N, r) B4
        dx = dy @ W + dh @ A  # (N, d_in) B5
        return dx, {"b": db, "d": dd}

    def scaled(self, W, p):
        return p.b[:, None] * p.B[: W.shape[0]] * p.d  # (d_out, r)

    def factors(self, W, p):
        A = p.A[:, : W.shape[1]]  # (r, d_in)
        return self.scaled(W, p), A

    def merge(self, W, p):
        return W + self.scaled(W, p) @ p.A[:, : W.shape[1]]  # (d_out, d_in)

    # In PEFT's files: docs/peft.md
    peft, from_peft, peft_shared_key = {"peft_type": "VERA"}, True, "save_projection"
    peft_names = {"r": "r", "d_initial": "d_initial", "projection_prng_key": "projection_prng_key"}
    peft_arrays = {
        "b": ("vera_lambda_b", ("d_out",)),
        "d": ("vera_lambda_d", ("r",)),
        "A": ("base_model.vera_A", ("r", "d_in")),
        "B": ("base_model.vera_B", ("d_out", "r")),
    }
    peft_ignored = {"vera_dropout": 0.0, "init_weights": True, "fan_in_fan_out": False}


def kaiming_uniform(stream, shape):
    """PEFT's draw: 24 bits of each raw 32-bit number of MT19937, on ± √3 · √2 / √fan_in, rounded to float32."""
    bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1])
    raw = np.frombuffer(stream.bytes(4 * shape[0] * shape[1]), "<u4")
    unit = (raw & 0xFFFFFF) * 2.0**-24
    low, high = np.float32(-bound), np.float32(bound)
    return (unit * float(high - low) + float(low)).astype(np.float32).reshape(shape)
