"""The learning-rate schedule: a linear warm-up, then a cosine."""

import math


def warmup_cosine(step: int, steps: int, lr: float, warmup: int = 0, floor: float = 0.1) -> float:
    """The rate of ``step`` (0 … steps − 1): a linear rise over ``warmup`` steps, then a cosine to floor · lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
