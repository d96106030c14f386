"""LoRA-FA with the corrected gradient.   Zhang et al. 2026, arXiv 2308.03303, version 2; PEFT's LoRA-FA optimizer

LoRA-FA (A frozen), but the gradient of B is replaced by the step in B that moves the weight best: among all updates
s dB A that A allows, the one nearest to the full gradient dW. With plain gradient descent the weight then moves along
dW P, P = Aᵀ (A Aᵀ)⁻¹ A the projector on the rows of A. Under Adam little of it is left: Adam divides out the factor
1/s², and a random A has A Aᵀ near a multiple of the identity (a test measures how much).

Forward, x (N, d_in), W (d_out, d_in), A (r, d_in) frozen, B (d_out, r), s = alpha / r:
  I1  C  = (A Aᵀ)⁻¹ / s²         (r, r)        once, since A never changes
  F1  h  = x Aᵀ                  (N, r)
  F2  y  = x Wᵀ + h (s B)ᵀ       (N, d_out)

Backward, dy = dL/dy (N, d_out):
  B1  dh = dy (s B)              (N, r)        h_j reaches y_i through s B_ij
  B2  dB = (dyᵀ (s h)) C         (d_out, r)    argmin over D of ‖s D A − dW‖, from s² D A Aᵀ = s dW Aᵀ
  B3  dx = dy W + dh A           (N, d_in)     x reaches y through W, and h through A

Kept for backward: h (N, r)
"""

from dataclasses import dataclass

import numpy as np

from .lora import LoRA


@dataclass(frozen=True)
class LoRAFACorrected(LoRA):
    claims = {
        "keeps no N × d_in array": lambda t: t.kept_numbers() == len(t.x) * t.method.r,
        "with SGD, W moves along the full gradient projected on the rows of A": lambda t: t.same(
            t.after(1, lr=0.1, adam=False).merged - t.W0, -0.1 * t.dW @ t.pinv(t.p.A) @ t.p.A
        ),
    }

    def shapes(self, d_out, d_in):
        return {"B": (d_out, self.r)}, {"A": (self.r, d_in), "C": (self.r, self.r)}

    def init(self, W, rng, shared):
        arrays, _ = super().init(W, rng, shared)
        A = arrays["A"]  # (r, d_in)
        C = np.linalg.inv(A @ A.T) / self.scaling**2  # (r, r) I1
        return {"B": arrays["B"]}, {"A": A, "C": C}

    def forward(self, x, W, p):
        s = self.scaling
        h = x @ p.A.T  # (N, r) F1
        y = x @ W.T + h @ (s * p.B).T  # (N, d_out) F2
        return y, {"h": h}

    def backward(self, dy, saved, W, p):
        s = self.scaling
        dh = dy @ (s * p.B)  # (N, r) B1
        dB = (dy.T @ (s * saved.h)) @ p.C  # (d_out, r) B2
        dx = dy @ W + dh @ p.A  # (N, d_in) B3
        return dx, {"B": dB}

    def surrogate(self, x, W, p, at):
        """B2 is not the loss's gradient. It is the gradient in the coordinates Q of B = B₀ + Q C, at Q = 0."""
        B = at.B + (p.B - at.B) @ at.C  # (d_out, r)
        return x @ W.T + (x @ at.A.T) @ (self.scaling * B).T  # (N, d_out)

    # In PEFT's files: docs/peft.md
    peft = {"peft_type": "LORA"}
