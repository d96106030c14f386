"""``minilora trace``: one training step, operation by operation: shapes, bytes kept, and the gradient that arrives.

The steps come in the order of the forward pass, and with their arrays in hand: ``trace(model, ids, targets)[7].dy``.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ..engine import backward, nodes_of
from ..memory import arrays_of, entries_of, owner


@dataclass
class Step:
    """One recorded operation: what it is, the gradient ``dy`` that arrived at its result, and what it kept."""

    operation: str
    layer: str  # the adapted layer's path, where the operation is one
    saved: dict
    kept_bytes: int
    dy: np.ndarray | None = None
    inputs: list = field(default_factory=list)  # shapes of the inputs that received a gradient

    @property
    def gradient_norm(self) -> float:
        return math.sqrt(float((self.dy * self.dy).sum()))


def trace(model, ids, targets) -> list[Step]:
    """Run one forward and backward pass of ``model`` and return its recorded operations; the gradients stay added."""
    loss = model.loss(ids, targets)
    names = {id(p.node): name for name, p in model.named_parameters() if p.requires_grad}
    seen = {id(owner(p.data)) for _, p in model.named_parameters()}
    steps = []
    for node in nodes_of(loss):
        if node.vjp is None:
            continue
        layers = {names[id(p)].partition(".arrays.")[0] for p in node.parents if id(p) in names}
        kept = sum(entry.nbytes for entry in entries_of(node, seen))
        step = Step(node.name, ", ".join(sorted(layers)), dict(arrays_of(node.saved)), kept)
        node.vjp = _watched(node.vjp, step)
        steps.append(step)
    backward(loss)
    return [step for step in steps if step.dy is not None]


def _watched(vjp, step):
    """``vjp``, writing down on ``step`` what comes in and what goes out."""

    def watching(dy, saved):
        step.dy = dy
        grads = vjp(dy, saved)
        step.inputs = [g.shape for g in grads if g is not None]
        return grads

    return watching


def show(steps) -> str:
    """The steps as a table for a terminal."""
    lines = [f"{'':>4} {'operation':<18}{'layer':<16}{'result':<14}{'kept':<34}{'KiB':>9}{'|dy|':>11}"]
    for i, s in enumerate(steps):
        kept = ", ".join(f"{k} {'×'.join(map(str, a.shape))}" for k, a in s.saved.items())
        shape = "×".join(map(str, s.dy.shape)) or "scalar"
        kept = kept if len(kept) < 34 else kept[:31] + "…"
        name = f"{i:>4} {s.operation:<18}{s.layer:<16}"
        lines.append(f"{name}{shape:<14}{kept:<34}{s.kept_bytes / 1024:>9.1f}{s.gradient_norm:>11.2e}")
    lines.append(f"{'':>4} {'total kept':<82}{sum(s.kept_bytes for s in steps) / 1024:>9.1f}")
    return "\n".join(lines)
