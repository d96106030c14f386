"""PiSSA: Principal Singular Values and Singular Vectors Adaptation.   Meng, Wang & Zhang 2024, arXiv 2404.02948

LoRA that starts from what matters most in W: A and B are its r largest singular directions, and the frozen weight is
what is left. Nothing is zero at the start, so both learn from step 1. Taught: the exact decomposition (the paper's
fast one is randomised). Forward and backward are LoRA's (lora.py), with the equations F1, F2 and B1 to B4 there.

The start, from W = U Σ Vᵀ, s = alpha / r:
  I1  A  = √(Σ_r / s) V_rᵀ       (r, d_in)
  I2  B  = U_r √(Σ_r / s)        (d_out, r)
  I3  W ← W − s B A              the layer's own copy, so that the sum is the weight it began with

Kept for backward: x (N, d_in), h (N, r)
"""

from dataclasses import dataclass

import numpy as np

from .lora import LoRA


@dataclass(frozen=True)
class PiSSA(LoRA):
    updates_base = True

    claims = {
        "starts as the base model": lambda t: t.same(t.merged, t.W0),
        "both matrices learn from step 1": lambda t: t.grads.A.any() and t.grads.B.any(),
    }

    def init(self, W, rng, shared):
        U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
        root = np.sqrt(sigma[: self.r] / self.scaling)  # (r,)
        A = root[:, None] * Vt[: self.r]  # (r, d_in) I1
        B = U[:, : self.r] * root  # (d_out, r) I2
        W -= (self.scaling * B) @ A  # (d_out, d_in) I3
        return {"A": A, "B": B}, {}

    # In PEFT's files: docs/peft.md
    peft, from_peft = {"peft_type": "LORA", "init_lora_weights": "pissa"}, True
