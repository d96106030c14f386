"""Activation checkpointing: a module that saves its input alone, and computes the rest again in backward."""

import copy

from .backend import array_module
from .engine import Tensor, gradients, is_recording, no_grad, record
from .nn import Module


def recompute(module: Module, x: Tensor, *args) -> Tensor:
    """``module(x, *args)`` of which x alone is saved: less memory for one more forward pass.

    Source: Chen et al. 2016, arXiv 1604.06174.
    """
    if not is_recording():
        return module(x, *args)
    again = copy.deepcopy(args)  # a Generator among them draws the same numbers the second time
    need_dx = x.requires_grad
    with no_grad():
        y = module(x, *args).data

    def vjp(dy, saved):
        inside = Tensor(saved.x, requires_grad=need_dx)
        found = gradients(module(inside, *again), dy)
        xp, trained = array_module(dy), module.trainable().values()
        dp = [found[p.node] if p.node in found else xp.zeros_like(p.data) for p in trained]
        return found.get(inside.node), *dp

    return record("recompute", y, {"x": x.data}, vjp, [x, *module.trainable().values()])
