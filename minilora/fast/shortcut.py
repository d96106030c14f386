"""How the host saves most of an adapter's time without a word in the method file.

By the contract y = x Mᵀ and so dx = dy M, with M = merge(W, p): one product each, where the method's own formulas take
a wide and a thin one and add them. What is left to ask of the method is what it saves, and its gradients. The host
gets them by calling forward with no outputs (every array cut to 0 rows along d_out) and backward with no inputs (cut
to 0 columns along d_in), which skips just the products that M replaces.

Whether that is right for a method is tried, not declared: on a small random layer both ways must give the same.
DoRA, whose norm needs every input and which saves z, fails the trial and runs by its own formulas.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..engine import Saved


@dataclass(frozen=True)
class Shortcut:
    """The arrays of a method that have an axis of length d_out, and those that have one of d_in: name to axis."""

    method: object
    out_axes: dict
    in_axes: dict

    def forward(self, x, W, p):
        """(y, saved), as the method's forward."""
        _, saved = self.method.forward(x, W[:0], cut(p, self.out_axes))
        return x @ self.method.merge(W, p).T, saved

    def backward(self, dy, saved, W, p, need_dx=True):
        """(dx, grads), as the method's backward; dx is None where nobody needs it."""
        _, grads = self.method.backward(dy, saved, W[:, :0], cut(p, self.in_axes))
        return (dy @ self.method.merge(W, p) if need_dx else None), grads


def cut(p, axes) -> Saved:
    """The arrays of ``p``, those in ``axes`` with length 0 along that axis."""
    empty = lambda name, array: array[(slice(None),) * axes[name] + (slice(0),)] if name in axes else array
    return Saved((name, empty(name, array)) for name, array in p.items())


@cache
def shortcut(method) -> Shortcut | None:
    """The method's Shortcut, or None where it would not give the method's own results."""
    r = getattr(method, "r", 0)  # sizes above the rank, so that it is no length of theirs
    sizes, larger = (r + 11, r + 13), (r + 17, r + 19)
    small, large = _layer(method, *sizes), _layer(method, *larger)
    axes = [  # of d_out, and of d_in: the axis that has their length in both layers
        {k: a.shape.index(n) for k, a in small.items() if (n, m) in zip(a.shape, large[k].shape, strict=True)}
        for n, m in zip(sizes, larger, strict=True)
    ]
    candidate = Shortcut(method, *axes)
    try:
        return candidate if _agrees(candidate, small) else None
    except Exception:  # the method's formulas do not run on empty arrays
        return None


def _layer(method, d_out, d_in) -> Saved:
    """A layer's arrays, W among them, filled with random numbers."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((d_out, d_in))
    shared = Saved(method.init_shared([W.shape], rng))
    trainable, buffers = method.init(W.copy(), rng, shared)
    arrays = {**shared, **buffers, **trainable}
    return Saved({k: rng.standard_normal(a.shape) for k, a in arrays.items()}, _W=W)


def _agrees(candidate, layer) -> bool:
    """Both ways on the same layer: equal saved arrays, y, dx and gradients."""
    p, W, rng = Saved(layer), layer["_W"], np.random.default_rng(1)
    x, dy = rng.standard_normal((5, W.shape[1])), rng.standard_normal((5, W.shape[0]))
    y, saved = candidate.method.forward(x, W, p)
    dx, grads = candidate.method.backward(dy, Saved(saved), W, p)
    y2, saved2 = candidate.forward(x, W, p)
    dx2, grads2 = candidate.backward(dy, Saved(saved2), W, p)
    pairs = [(y, y2), (dx, dx2), *((saved[k], saved2[k]) for k in saved), *((grads[k], grads2[k]) for k in grads)]
    return saved.keys() == saved2.keys() and all(a.shape == b.shape and np.allclose(a, b, rtol=1e-9) for a, b in pairs)
