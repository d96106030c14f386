"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.   Kalajdzievski 2023, arXiv 2312.03732

LoRA with s = alpha / √r. The r terms of B A add up like √r, not like r, so that alpha / r makes the update shrink as
the rank grows and alpha / √r does not. Forward and backward are LoRA's (lora.py), with the equations F1, F2 and
B1 to B4 there: this is LoRA with alpha · √r in place of alpha.

  F3  s  = alpha / √r

Kept for backward: x (N, d_in), h (N, r)
"""

import math
from dataclasses import dataclass

from .lora import LoRA


@dataclass(frozen=True)
class RsLoRA(LoRA):
    claims = {
        "is LoRA with alpha · √r": lambda t: t.same(
            t.after(5).merged, t.of("lora", r=t.method.r, alpha=t.method.alpha * math.sqrt(t.method.r)).after(5).merged
        ),
    }

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.r)  # () F3

    # In PEFT's files: docs/peft.md
    peft, from_peft, peft_rescales = {"peft_type": "LORA", "use_rslora": True}, True, True
