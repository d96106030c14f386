"""Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices.   Zi et al. 2023, arXiv 2309.02411

LoRA in which the frozen weight moves too, without gradient or optimizer state of its own: after each step W takes
update_ratio (λ) times the change of s B A. Taught: the paper's algorithm, from start_step (K) on; the low-rank branch
has no dropout. Forward and backward are LoRA's (lora.py), with the equations F1, F2 and B1 to B4 there.

After optimizer step t, which made A, B from A', B', s = alpha / r:
  U1  W ← W + λ s (B A − B' A')        for t > K       (d_out, d_in)
  U2  A' ← A, B' ← B

The changes telescope: W_T − W_0 = λ s (B_T A_T − B_K A_K), of rank 2 r at most. So W does not become high-rank, and
from K = 0 under Adam this is exactly LoRA with alpha · (1 + λ); tests hold both.

Kept for backward: x (N, d_in), h (N, r)
"""

from dataclasses import dataclass

import numpy as np

from .lora import LoRA


@dataclass(frozen=True)
class DeltaLoRA(LoRA):
    update_ratio: float = 2.0
    start_step: int = 50
    updates_base = True
    note = "adds a second A and B, as they were a step ago"

    claims = {
        "W moves by λ s times the change of B A since step K": lambda t: t.same(
            (late := t.after(t.method.start_step + 9)).W - (start := t.after(t.method.start_step)).W,
            t.method.update_ratio * (t.method.update(late.p.A, late.p.B) - t.method.update(start.p.A, start.p.B)),
        ),
    }

    def shapes(self, d_out, d_in):
        arrays, _ = super().shapes(d_out, d_in)
        return arrays, {"A_before": arrays["A"], "B_before": arrays["B"], "t": (1,)}

    def init(self, W, rng, shared):
        arrays, _ = super().init(W, rng, shared)
        return arrays, {"A_before": arrays["A"], "B_before": arrays["B"], "t": np.zeros(1)}

    def update(self, A, B):
        return (self.scaling * B) @ A  # (d_out, d_in)

    def after_step(self, W, p):
        p.t[:] += 1.0
        started = (p.t > self.start_step).astype(W.dtype)  # (1,) no branch, so that a GPU need not be asked
        change = self.update(p.A, p.B) - self.update(p.A_before, p.B_before)  # (d_out, d_in)
        W += (self.update_ratio * started) * change  # (d_out, d_in) U1
        p.A_before[:], p.B_before[:] = p.A, p.B  # U2
