"""One training step by hand, for tests that look between steps."""

from functools import partial

from minilora.training.loop import History, loop
from minilora.training.trainer import Options, accumulate_and_measure


def training_step(model, optimizer, ids, targets, history=None, micro_batches=1, team=None):
    """One step of the loop at the optimizer's own rate: (loss, gradient norm). ``history`` gets the kept bytes."""
    history, recorded = History() if history is None else history, History()
    if team is None:
        gradient = partial(accumulate_and_measure, model, Options(micro_batches=micro_batches), history)
    else:
        gradient = partial(team.accumulate, micro_batches=micro_batches, history=history)
    rate = optimizer.lr
    loop(model, optimizer, iter([(ids, targets)]), 1, lambda step: rate, gradient, (), recorded)
    return recorded.loss[0], recorded.grad_norm[0]
