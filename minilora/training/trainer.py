"""``minilora.train``: the loop with its usual extras, each a callback or a way to compute the gradient."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

from ..engine import no_grad
from ..errors import InputError, nearest
from ..memory import kept_bytes
from ..nn import Module
from .gradient import accumulate, count_targets
from .loop import History, loop
from .optim import Optimizer, check_positive
from .progress import Progress
from .schedule import warmup_cosine

PREPARATIONS = []  # functions that train() calls before the first step; fast/ puts one here


@dataclass(frozen=True)
class Options:
    """How train() runs, and the defaults.

    The learning rate rises over ``warmup`` steps to the optimizer's and falls along a cosine to ``floor`` times it.
    ``rng`` draws dropout. ``micro_batches``: gradient accumulation over so many parts of each batch, at a fraction of
    the memory; ``workers``: data-parallel over so many processes, each on one core. Neither changes the step, except
    for rounding and the draws of dropout. ``progress``: a bar called ``label``, by default if the output is a terminal.
    """

    warmup: int = 0
    floor: float = 0.1
    rng: object = None
    micro_batches: int = 1
    workers: int = 1
    progress: bool | None = None
    label: str = "train"


def train(model: Module, optimizer: Optimizer, batches, steps, callbacks=(), history=None, **options) -> History:
    """Train ``model`` for ``steps`` steps on ``batches``, an iterator of (ids, targets), each (B, T).

    Each of ``callbacks`` is called as ``callback(step, history)`` after a step, outside its time. ``history``: that of
    an interrupted run, which resumes: its steps count among the ``steps``. ``options``: see Options.
    Raises InputError for steps < 1, an unknown option, an optimizer of other parameters, or batches that end early, and
    TrainingStopped, with the weights of the last good step in place, at a loss or gradient that is not finite.
    """
    how = read_options(steps, options)
    optimizer.check_belongs_to(model)
    history = History() if history is None else history
    schedule = partial(warmup_cosine, steps=steps, lr=optimizer.lr, warmup=how.warmup, floor=how.floor)
    bar = Progress(steps, how.label, how.progress, done=len(history.loss))
    callbacks = (bar, LostGradients(model), *callbacks)
    for prepare in PREPARATIONS:
        prepare()
    with gradient_of(model, optimizer, how, history) as gradient, bar, restored_rate(optimizer):
        loop(model, optimizer, iter(batches), steps, schedule, gradient, callbacks, history)
    return history


def read_options(steps, options) -> Options:
    """Raises InputError for an option that train() does not have, or a number out of range."""
    if steps < 1:
        raise InputError(f"train: steps is {steps}; ask for at least one")
    known = [f.name for f in fields(Options)]
    for name in options:
        if name not in known:
            raise InputError(f'train has no option "{name}"{nearest(name, known)}; its options: {", ".join(known)}')
    how = Options(**options)
    check_positive(zero_allowed=True, warmup=how.warmup, floor=how.floor)
    return how


@contextmanager
def gradient_of(model, optimizer, how: Options, history):
    """The function of (ids, targets) that adds up a batch's gradient, in this process or in several."""
    if how.workers == 1:
        yield partial(accumulate_and_measure, model, how, history)
    else:
        from .workers import Workers

        with Workers(model, optimizer, how.workers) as team:
            yield partial(team.accumulate, rng=how.rng, micro_batches=how.micro_batches, history=history)


def accumulate_and_measure(model, how: Options, history, ids, targets):
    """accumulate(); in the first step, ``history`` gets the bytes that are saved for backward."""

    def watch(loss):
        history.kept_bytes = max(history.kept_bytes, kept_bytes(loss, model))

    first = not history.loss
    return accumulate(model, ids, targets, how.rng, how.micro_batches, watch=watch if first else None)


@contextmanager
def restored_rate(optimizer):
    """The schedule changes ``optimizer.lr``; afterwards it is the caller's again, however the run ended."""
    peak = optimizer.lr
    try:
        yield
    finally:
        optimizer.lr = peak


class LostGradientWarning(UserWarning):
    """A trained array receives no gradient: the graph is cut above it, or its backward returns zeros."""


@dataclass
class LostGradients:
    """A callback: warn in the third step of trained arrays whose gradient is exactly zero.

    In the first step a zero can be right: dA = 0 where B = 0.
    """

    model: Module

    def __call__(self, step, history):
        if step != 2:
            return
        lost = [name for name, p in self.model.trainable().items() if p.grad is None or not p.grad.any()]
        if lost:
            names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            warnings.warn(f"{names}: no gradient arrives, so training changes nothing there", LostGradientWarning, 4)


def evaluate(model: Module, batches) -> float:
    """Mean loss in nats per counted target over ``batches``, a list of (ids, targets); nothing is recorded."""
    total = count = 0
    with no_grad():
        for ids, targets in batches:
            counted = count_targets(targets)
            if counted:
                total += float(model.loss(ids, targets).data) * counted
                count += counted
    if not count:
        raise InputError("evaluate: there are no batches to evaluate on")
    return total / count
