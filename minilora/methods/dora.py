"""DoRA: Weight-Decomposed Low-Rank Adaptation.   Liu et al. 2024, arXiv 2402.09353, equations 5 and 6

The weight is split into a magnitude m for each output and a direction: W' = m ∘ V / ‖V‖, V = W + s B A, with the norm
taken over each ROW of V (d_out, d_in), one per output, as in the authors' code and PEFT. Taught: the loss's FULL
gradient; the paper's cheaper one, with ‖V‖ held constant, is in dora_detached.py and keeps no less for backward.

Forward, x (N, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), m (d_out,), s = alpha / r:
  F1  h  = x Aᵀ                                     (N, r)
  F2  z  = x Wᵀ + h (s B)ᵀ                          (N, d_out)   = x Vᵀ
  F3  n² = Σ W∘W + 2 Σ (W Aᵀ)∘sB + Σ (sB A Aᵀ)∘sB   (d_out,)     ‖V_i‖², without forming B A
  F4  y  = (m / n) ∘ z                              (N, d_out)

Backward, dy = dL/dy (N, d_out), g = m / n:
  B1  dm = Σ_N dy∘z / n                             (d_out,)     y_i = m_i z_i / n_i in every row
  B2  dz = dy ∘ g                                   (N, d_out)
  B3  dh = dz (s B)                                 (N, r)       h_j reaches z_i through s B_ij
  B4  k  = m ∘ dm / n²                              (d_out,)     what −V_i receives: dn = −m dm / n, and n = ‖V_i‖
  B5  dB = dzᵀ (s h) − s k ∘ (V Aᵀ)                 (d_out, r)   through z, and through n
  B6  dA = dhᵀ x − (s k ∘ B)ᵀ V                     (r, d_in)    through z, and through n
  B7  dx = dz W + dh A                              (N, d_in)    n does not depend on x

Kept for backward: x (N, d_in), h (N, r), z (N, d_out), n (d_out,)
"""

from dataclasses import dataclass

from .lora import LoRA

TINY = 1e-30  # below float32's resolution of any live n²; a row of zeros gives m / n = 0 instead of 0 / 0


@dataclass(frozen=True)
class DoRA(LoRA):
    claims = {
        "starts as the base model": lambda t: t.same(t.merged, t.W0),
        "each row of the merged weight has the length m": lambda t: t.same(
            (t.after(5).merged ** 2).sum(axis=1) ** 0.5, abs(t.after(5).p.m)
        ),
    }

    def shapes(self, d_out, d_in):
        return {"A": (self.r, d_in), "B": (d_out, self.r), "m": (d_out,)}, {}

    def init(self, W, rng, shared):
        arrays, _ = super().init(W, rng, shared)
        m = (W * W).sum(axis=1) ** 0.5  # (d_out,)
        return {**arrays, "m": m}, {}

    def norm(self, W, p):
        sB = self.scaling * p.B  # (d_out, r)
        cross = 2.0 * (W @ p.A.T) + sB @ (p.A @ p.A.T)  # (d_out, r)
        n2 = (W * W).sum(axis=1) + (cross * sB).sum(axis=1)  # (d_out,) F3
        return (n2 + TINY) ** 0.5  # (d_out,)

    def forward(self, x, W, p):
        h = x @ p.A.T  # (N, r) F1
        z = x @ W.T + h @ (self.scaling * p.B).T  # (N, d_out) F2
        n = self.norm(W, p)  # (d_out,)
        y = z * (p.m / n)  # (N, d_out) F4
        return y, {"x": x, "h": h, "z": z, "n": n}

    def backward(self, dy, saved, W, p):
        s, n = self.scaling, saved.n
        dm = (dy * saved.z).sum(axis=0) / n  # (d_out,) B1
        dz = dy * (p.m / n)  # (N, d_out) B2
        dh = dz @ (s * p.B)  # (N, r) B3
        k = p.m * dm / (n * n)  # (d_out,) B4
        skB = (s * k)[:, None] * p.B  # (d_out, r)
        VAt = W @ p.A.T + (s * p.B) @ (p.A @ p.A.T)  # (d_out, r)
        dB = dz.T @ (s * saved.h) - (s * k)[:, None] * VAt  # (d_out, r) B5
        dA = dh.T @ saved.x - (skB.T @ W + (skB.T @ (s * p.B)) @ p.A)  # (r, d_in) B6
        dx = dz @ W + dh @ p.A  # (N, d_in) B7
        return dx, {"A": dA, "B": dB, "m": dm}

    def factors(self, W, p):
        """None: m / n rescales each row of W too, and that is no thin product."""

    def merge(self, W, p):
        return (p.m / self.norm(W, p))[:, None] * (W + (self.scaling * p.B) @ p.A)  # (d_out, d_in)

    # In PEFT's files: docs/peft.md
    peft = {"peft_type": "LORA", "use_dora": True}
    peft_arrays = LoRA.peft_arrays | {"m": ("lora_magnitude_vector", ("d_out",))}
