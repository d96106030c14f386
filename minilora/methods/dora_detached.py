"""DoRA with a detached norm.   Liu et al. 2024, arXiv 2402.09353, section 4.3, equation 11; PEFT's use_dora=True

DoRA (dora.py: W' = m ∘ V / ‖V‖, V = W + s B A, one norm per output), but ‖V‖ counts as a constant in backward. The
paper does so to save memory, which an autograd framework needs to differentiate the norm; written by hand the full
gradient keeps the same arrays (a test). What backward returns is therefore not the loss's gradient: it is the gradient
of the function in which n stands still, and that is what it is checked against.

Forward, x (N, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), m (d_out,), s = alpha / r:
  F1  h  = x Aᵀ                                     (N, r)
  F2  z  = x Wᵀ + h (s B)ᵀ                          (N, d_out)   = x Vᵀ
  F3  n² = Σ W∘W + 2 Σ (W Aᵀ)∘sB + Σ (sB A Aᵀ)∘sB   (d_out,)     ‖V_i‖², without forming B A
  F4  y  = (m / n) ∘ z                              (N, d_out)

Backward, dy = dL/dy (N, d_out), n held constant:
  B1  dm = Σ_N dy∘z / n                             (d_out,)     y_i = m_i z_i / n_i in every row
  B2  dz = dy ∘ (m / n)                             (N, d_out)
  B3  dh = dz (s B)                                 (N, r)       h_j reaches z_i through s B_ij
  B4  dB = dzᵀ (s h)                                (d_out, r)   B_ij multiplies s h_j in every row
  B5  dA = dhᵀ x                                    (r, d_in)    A_ij multiplies x_j in every row
  B6  dx = dz W + dh A                              (N, d_in)

Kept for backward: x (N, d_in), h (N, r), z (N, d_out), n (d_out,)
"""

from dataclasses import dataclass

from .lora import LoRA

TINY = 1e-30  # below float32's resolution of any live n²; a row of zeros gives m / n = 0 instead of 0 / 0


@dataclass(frozen=True)
class DoRADetached(LoRA):
    claims = {
        "keeps no less than the full gradient does": lambda t: (
            t.kept_numbers() == t.of("dora", r=t.method.r).kept_numbers()
        ),
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
        dB = dz.T @ (s * saved.h)  # (d_out, r) B4
        dA = dh.T @ saved.x  # (r, d_in) B5
        dx = dz @ W + dh @ p.A  # (N, d_in) B6
        return dx, {"A": dA, "B": dB, "m": dm}

    def surrogate(self, x, W, p, at):
        """The function that backward differentiates: the same layer with n = ‖V‖ taken at the point ``at``."""
        return (x @ W.T + (x @ p.A.T) @ (self.scaling * p.B).T) * (p.m / self.norm(W, at))  # (N, d_out)

    def factors(self, W, p):
        """None: m / n rescales each row of W too, and that is no thin product."""

    def merge(self, W, p):
        return (p.m / self.norm(W, p))[:, None] * (W + (self.scaling * p.B) @ p.A)  # (d_out, d_in)

    # In PEFT's files: docs/peft.md
    peft, from_peft = {"peft_type": "LORA", "use_dora": True}, True
    peft_arrays = LoRA.peft_arrays | {"m": ("lora_magnitude_vector", ("d_out",))}
