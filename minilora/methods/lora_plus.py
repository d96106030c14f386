"""LoRA+: Efficient Low Rank Adaptation of Large Models.   Hayou, Ghosh & Yu 2024, arXiv 2402.12354

LoRA with two learning rates. As the width n grows, features are learned efficiently only where B moves faster than A:
the rate of A must shrink like 1/n, that of B must not. Taught: the paper's rule, one ratio for all layers; forward
and backward are LoRA's (lora.py), with the equations F1, F2 and B1 to B4 there.

The update, for the optimizer's rate η and lr_ratio λ:
  U1  A moves at η, B at λ η

Kept for backward: x (N, d_in), h (N, r)
"""

from dataclasses import dataclass

from .lora import LoRA


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    lr_ratio: float = 16.0

    claims = {
        "B's first Adam step is lr_ratio times that of LoRA": lambda t: t.same(
            t.after(1, eps=1e-30).p.B, t.method.lr_ratio * t.of("lora", r=t.method.r).after(1, eps=1e-30).p.B
        ),
    }

    def lr_scale(self, name):
        return self.lr_ratio if name == "B" else 1.0  # U1

    # In PEFT's files: docs/peft.md
    peft = {"peft_type": "LORA"}
