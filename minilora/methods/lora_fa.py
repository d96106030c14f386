"""LoRA-FA: Memory-efficient Low-rank Adaptation, A frozen.   Zhang et al. 2023, arXiv 2308.03303, version 1

LoRA with A left at its random start: only B is trained, so backward never needs x (N, d_in) and keeps the r numbers
of h per token alone. Taught: version 1. The corrected gradient of version 2 is in lora_fa_corrected.py.

Forward, x (N, d_in), W (d_out, d_in), A (r, d_in) frozen, B (d_out, r), s = alpha / r:
  F1  h  = x Aᵀ                  (N, r)
  F2  y  = x Wᵀ + h (s B)ᵀ       (N, d_out)

Backward, dy = dL/dy (N, d_out):
  B1  dh = dy (s B)              (N, r)        h_j reaches y_i through s B_ij
  B2  dB = dyᵀ (s h)             (d_out, r)    B_ij multiplies s h_j in every row
  B3  dx = dy W + dh A           (N, d_in)     x reaches y through W, and h through A

Kept for backward: h (N, r)
"""

from dataclasses import dataclass

from .lora import LoRA


@dataclass(frozen=True)
class LoRAFA(LoRA):
    claims = {
        "keeps no N × d_in array": lambda t: t.kept_numbers() == len(t.x) * t.method.r,
        "what it keeps does not grow with d_in": lambda t: t.resized(d_in=90).kept_numbers() == t.kept_numbers(),
        "A never moves": lambda t: (t.after(5).p.A == t.p.A).all(),
    }

    def shapes(self, d_out, d_in):
        return {"B": (d_out, self.r)}, {"A": (self.r, d_in)}

    def init(self, W, rng, shared):
        arrays, _ = super().init(W, rng, shared)
        return {"B": arrays["B"]}, {"A": arrays["A"]}

    def forward(self, x, W, p):
        s = self.scaling
        h = x @ p.A.T  # (N, r) F1
        y = x @ W.T + h @ (s * p.B).T  # (N, d_out) F2
        return y, {"h": h}

    def backward(self, dy, saved, W, p):
        s = self.scaling
        dh = dy @ (s * p.B)  # (N, r) B1
        dB = dy.T @ (s * saved.h)  # (d_out, r) B2
        dx = dy @ W + dh @ p.A  # (N, d_in) B3
        return dx, {"B": dB}

    # In PEFT's files: docs/peft.md
    peft = {"peft_type": "LORA"}
