"""The training loop, the same for every method: loss, backward, step, and what the method does after a step.

It knows no method by name, shows its progress, and stops before a step that would spoil the weights.
"""

import statistics
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from ..backend import fetch, keep_heap
from ..engine import no_grad
from ..errors import InputError, TrainingStopped
from ..nn import Module
from .gradient import accumulate, check_loss, count_targets
from .optim import Optimizer, check_positive, warmup_cosine
from .progress import progress_bar


class LostGradientWarning(UserWarning):
    """A trained array receives no gradient: the graph is cut above it, or its backward returns zeros."""


@dataclass
class History:
    """What a run recorded, step by step: losses in nats per token, learning rates, gradient norms, seconds."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    kept_bytes: int = 0  # for backward, measured at the first step

    @property
    def seconds_per_step(self) -> float:
        """The median, which a first slow step or a busy moment does not move."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of a step that takes the median time."""
        return self.tokens_per_step / self.seconds_per_step


def train(
    model: Module,
    optimizer: Optimizer,
    batches,
    steps: int,
    warmup=0,
    floor=0.1,
    rng=None,
    callback=None,
    label="train",
    progress=None,
    micro_batches=1,
    workers=1,
    history=None,
) -> History:
    """Train ``model`` for ``steps`` steps on ``batches``, an iterator of (ids, targets), each (B, T).

    The rate rises over ``warmup`` steps to ``optimizer.lr`` and falls along a cosine to ``floor`` times it.
    ``rng`` draws dropout; ``callback(step, history)`` runs after each step, outside its time. ``progress``: a bar
    with loss, tokens per second and the time that is left; by default where the output is a terminal.
    ``micro_batches``: each batch is taken in so many parts, one after another, at a fraction of the memory;
    ``workers``: so many processes share it out, each on one core. Neither changes the step, but for rounding and for
    the draws of dropout. ``history``: of a run that goes on; its steps count among the ``steps``, and are not repeated.
    Raises InputError for steps < 1 or batches that end early, and TrainingStopped, with the weights of the last
    good step in place, at a loss or gradient that is not finite.
    """
    if steps < 1:
        raise InputError(f"train: steps is {steps}; ask for at least one")
    check_positive(zero_allowed=True, warmup=warmup, floor=floor)
    keep_heap()
    history = History() if history is None else history
    peak, batches, sharing = optimizer.lr, iter(batches), nullcontext()
    if workers != 1:
        from .workers import Workers

        sharing = Workers(model, optimizer, workers)
    with (
        sharing as team,
        progress_bar(steps, label, progress, len(history.loss)) as bar,
        restored_rate(optimizer),
    ):
        for step in range(len(history.loss), steps):
            ids, targets = next(batches, (None, None))
            if ids is None:
                raise InputError(f"train: the batches ended after {step} of {steps} steps")
            start = time.perf_counter()
            optimizer.lr = warmup_cosine(step, steps, peak, warmup, floor)
            try:
                loss, norm = training_step(model, optimizer, ids, targets, rng, history, micro_batches, team)
            except TrainingStopped as stop:
                raise TrainingStopped(
                    f"stopped at step {step + 1} of {steps}: {stop} (learning rate {optimizer.lr:.2g}); "
                    "the weights are those of the last good step"
                ) from None
            history.seconds.append(time.perf_counter() - start)
            history.loss.append(loss)
            history.lr.append(optimizer.lr)
            history.grad_norm.append(norm)
            history.tokens_per_step = ids.size
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {ids.size / history.seconds[-1]:,.0f} tok/s", refresh=False)
            if callback is not None:
                callback(step, history)
    return history


@contextmanager
def restored_rate(optimizer):
    """The schedule changes ``optimizer.lr``; afterwards it is the caller's again, however the run ended."""
    peak = optimizer.lr
    try:
        yield
    finally:
        optimizer.lr = peak


def training_step(model, optimizer, ids, targets, rng=None, history=None, micro_batches=1, team=None):
    """One step: (loss, gradient norm). Raises TrainingStopped before anything has moved.

    ``micro_batches`` as for accumulate; ``team``: parallel.Workers that compute the gradient together.
    """
    first = history is not None and not history.loss
    try:
        if team is None:
            loss, kept = accumulate(model, ids, targets, rng, micro_batches, measure=first)
        else:
            loss, kept = team.accumulate(ids, targets, rng, micro_batches, measure=first)
        loss, squared = fetch(loss, optimizer.squared_norm())  # the one time in a step that a GPU is waited for
        check_loss(loss)
    except BaseException:
        optimizer.grad.fill(0.0)  # a part of a gradient is none
        raise
    if first:
        history.kept_bytes = kept
    if history is not None and len(history.loss) == 2:  # in step 1 a zero is right: dA = 0 where B = 0
        warn_of_lost_gradients(model)
    norm = optimizer.step(squared)
    model.after_step()
    return loss, norm


def warn_of_lost_gradients(model) -> None:
    """Warn once, with all their names, of trained arrays whose gradient is exactly zero."""
    lost = [name for name, p in model.trainable().items() if p.grad is None or not p.grad.any()]
    if lost:
        names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        warnings.warn(f"{names}: no gradient arrives, so training changes nothing there", LostGradientWarning, 3)


def evaluate(model: Module, batches) -> float:
    """Mean loss in nats per counted target over ``batches``, a list of (ids, targets); nothing is recorded."""
    total = count = 0
    with no_grad():
        for ids, targets in batches:
            counted = count_targets(targets)
            total += float(model.loss(ids, targets).data) * counted
            count += counted
    if not count:
        raise InputError("evaluate: there are no batches to evaluate on")
    return total / count
