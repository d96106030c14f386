"""LoRA: Low-Rank Adaptation of Large Language Models.   Hu et al. 2021, arXiv 2106.09685, equation 3

The update of a frozen weight is the product of two thin matrices: y = x (W + s B A)ᵀ. Taught: the paper's version,
s = alpha / r, B = 0 at the start; A is drawn as in the authors' code and PEFT, uniform in ±1/√d_in.

Forward, x (N, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r):
  F1  h  = x Aᵀ                  (N, r)        to rank r first: x (Aᵀ Bᵀ) would cost as much as W
  F2  y  = x Wᵀ + h (s B)ᵀ       (N, d_out)    s scales the small factor, never the large result

Backward, dy = dL/dy (N, d_out):
  B1  dh = dy (s B)              (N, r)        h_j reaches y_i through s B_ij
  B2  dB = dyᵀ (s h)             (d_out, r)    B_ij multiplies s h_j in every row
  B3  dA = dhᵀ x                 (r, d_in)     A_ij multiplies x_j in every row, and reaches L through h_i
  B4  dx = dy W + dh A           (N, d_in)     x reaches y through W, and h through A

Kept for backward: x (N, d_in), h (N, r)
"""

import math
from dataclasses import dataclass

import numpy as np

from ..adapter import Adapter


@dataclass(frozen=True)
class LoRA(Adapter):
    r: int = 8
    alpha: float = 16.0

    claims = {
        "starts as the base model": lambda t: (t.merged == t.W0).all(),
        "at step 1 dA is exactly 0 and dB is not": lambda t: not t.grads.A.any() and t.grads.B.any(),
        "trains r (d_in + d_out) numbers": lambda t: t.trained_numbers() == t.method.r * sum(t.W0.shape),
    }

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def shapes(self, d_out, d_in):
        return {"A": (self.r, d_in), "B": (d_out, self.r)}, {}

    def init(self, W, rng, shared):
        d_out, d_in = W.shape
        bound = 1.0 / math.sqrt(d_in)
        A = rng.uniform(-bound, bound, (self.r, d_in))  # (r, d_in)
        B = np.zeros((d_out, self.r))  # (d_out, r)
        return {"A": A, "B": B}, {}

    def forward(self, x, W, p):
        s = self.scaling
        h = x @ p.A.T  # (N, r) F1
        y = x @ W.T + h @ (s * p.B).T  # (N, d_out) F2
        return y, {"x": x, "h": h}

    def backward(self, dy, saved, W, p):
        s = self.scaling
        dh = dy @ (s * p.B)  # (N, r) B1
        dB = dy.T @ (s * saved.h)  # (d_out, r) B2
        dA = dh.T @ saved.x  # (r, d_in) B3
        dx = dy @ W + dh @ p.A  # (N, d_in) B4
        return dx, {"A": dA, "B": dB}

    def merge(self, W, p):
        return W + (self.scaling * p.B) @ p.A  # (d_out, d_in)

    def factors(self, W, p):
        """merge(W, p) is W + B A with these two: for other formats, and for adding adapters up."""
        sB = self.scaling * p.B  # (d_out, r)
        return sB, p.A

    # In PEFT's files: docs/peft.md
    peft, from_peft, is_product = {"peft_type": "LORA"}, True, True
    peft_names = {"r": "r", "alpha": "lora_alpha"}
    peft_patterns = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    peft_arrays = {"A": ("lora_A.weight", ("r", "d_in")), "B": ("lora_B.weight", ("d_out", "r"))}
    peft_keys = {"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
    peft_ignored = {"lora_dropout": 0.0, "fan_in_fan_out": False}
    peft_ignored |= dict.fromkeys(("eva_config", "megatron_core", "qalora_group_size"))
