"""The control for Delta-LoRA: LoRA with alpha (1 + λ).   After Zi et al. 2023, arXiv 2309.02411

Delta-LoRA adds λ times LoRA's update to W, so that from then on the layer carries (1 + λ) times what LoRA would. Under
Adam, whose steps do not depend on the gradient's scale, Delta-LoRA from step 0 IS this plain LoRA. A comparison that
leaves it out credits the moving W with what a larger alpha does. Forward and backward are LoRA's (lora.py), with the
equations F1, F2 and B1 to B4 there.

  F3  s  = alpha (1 + λ) / r

Kept for backward: x (N, d_in), h (N, r)
"""

from dataclasses import dataclass

from .lora import LoRA


@dataclass(frozen=True)
class DeltaLoRAControl(LoRA):
    update_ratio: float = 2.0

    claims = {
        "is what Delta-LoRA from step 0 becomes under Adam": lambda t: t.same(
            t.after(9, eps=1e-30).merged, t.of("delta_lora", r=t.method.r, start_step=0).after(9, eps=1e-30).merged
        ),
    }

    @property
    def scaling(self) -> float:
        return self.alpha * (1.0 + self.update_ratio) / self.r  # () F3

    # In PEFT's files: docs/peft.md
    peft = {"peft_type": "LORA"}
