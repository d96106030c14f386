"""The training loop, the same for every method: gradient, step, and what the method does after a step.

It knows no method by name. Whatever else a run does is a callback; trainer.py puts the usual ones together.
"""

import math
import statistics
import time
from dataclasses import dataclass, field

from ..backend import fetch
from ..errors import InputError, TrainingStopped


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


def loop(model, optimizer, batches, steps, schedule, gradient, callbacks, history) -> None:
    """Go from step ``len(history.loss)`` to ``steps``, and record each in ``history``.

    ``gradient(ids, targets)`` adds up the gradient of a batch and returns its loss; ``schedule(step)`` is the learning
    rate; each callback is called as ``callback(step, history)``, outside the step's time. Raises what train() raises.
    """
    for step in range(len(history.loss), steps):
        ids, targets = next(batches, (None, None))
        if ids is None:
            raise InputError(f"train: the batches ended after {step} of {steps} steps")
        start = time.perf_counter()
        optimizer.lr = schedule(step)
        optimizer.zero()
        try:
            loss, squared = fetch(gradient(ids, targets), optimizer.squared_norm())  # a GPU synchronises here alone
            if not math.isfinite(loss):
                raise TrainingStopped(f"the loss is {loss}; lower the learning rate or look at the data")
            norm = optimizer.step(squared)
        except TrainingStopped as stop:
            where = f"stopped at step {step + 1} of {steps}: {stop} (learning rate {optimizer.lr:.2g})"
            raise TrainingStopped(f"{where}; the weights are those of the last good step") from None
        model.after_step()
        history.seconds.append(time.perf_counter() - start)
        history.loss.append(loss)
        history.lr.append(optimizer.lr)
        history.grad_norm.append(norm)
        history.tokens_per_step = ids.size
        for callback in callbacks:
            callback(step, history)
