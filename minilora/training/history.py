"""What a training run records, step by step."""

import statistics
from dataclasses import dataclass, field


@dataclass
class History:
    """What a run recorded, step by step: losses in nats per token, learning rates, gradient norms, seconds."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    kept_bytes: int = 0  # saved for backward, measured at the first step

    @property
    def seconds_per_step(self) -> float:
        """The median, which a first slow step or a busy moment does not move."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of a step that takes the median time."""
        return self.tokens_per_step / self.seconds_per_step
