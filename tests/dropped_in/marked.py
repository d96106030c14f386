"""Marked LoRA: LoRA with fields of every type and buffers that count nothing.   After Hu et al. 2021, arXiv 2106.09685

A buffer of 3 numbers and one of 10, whatever r is. Forward and backward are LoRA's, with the equations F1, F2 and B1 to
B4 there.

  I1  B  = start                 (d_out, r)    so that the layer does not start as the base model

Kept for backward: x (N, d_in), h (N, r)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .lora import LoRA


@dataclass(frozen=True)
class Marked(LoRA):
    start: float = 0.5
    shift: float = 0.0
    flipped: bool = False
    wording: str = "none"
    cuts: list[int] = field(default_factory=list)
    cap: int | None = None
    table: dict = field(default_factory=dict)  # cannot be hashed
    starts_elsewhere = "B is not zero at the start, so that A learns from step 1"

    claims = {"A learns from step 1": lambda t: t.grads.A.any()}

    @property
    def scaling(self) -> float:
        return (-self.alpha if self.flipped else self.alpha) / self.r

    def shapes(self, d_out, d_in):
        return super().shapes(d_out, d_in)[0], {"three": (3,), "ten": (10,)}

    def init(self, W, rng, shared):
        arrays, _ = super().init(W, rng, shared)
        B = np.full_like(arrays["B"], self.start + self.shift)  # (d_out, r) I1
        return {**arrays, "B": B}, {"three": np.ones(3), "ten": np.ones(10)}
