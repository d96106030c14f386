"""AdamW over one flat buffer: all trained arrays become views of one vector, so a step is a few array operations."""

import math

import numpy as np

from ..backend import array_module
from ..engine import form
from ..errors import InputError, TrainingStopped


class Optimizer:
    """The flat buffers ``data`` and ``grad`` (P,) of all trained numbers; a subclass says how one step moves them.

    ``params``: Parameters by name, as ``model.trainable()`` gives them, each with an ``lr_scale``. ``weight_decay`` is
    decoupled and acts on matrices only. ``clip``: the largest norm of the gradient, which is scaled down to it.
    Raises InputError for no parameters, several dtypes, or a hyper-parameter that is not finite and positive.
    """

    def __init__(self, params: dict, lr: float, weight_decay=0.0, clip=None):
        if not params:
            raise InputError("optimizer: there is nothing to train; every parameter is frozen")
        check_positive(lr=lr, clip=clip)
        check_positive(zero_allowed=True, weight_decay=weight_decay)
        tensors = list(params.values())
        if len(dtypes := sorted({str(t.dtype) for t in tensors})) > 1:
            raise InputError(f"optimizer: all parameters need one dtype, got {dtypes}")
        xp = array_module(*(t.data for t in tensors))
        self.lr, self.weight_decay, self.clip = lr, weight_decay, clip
        self.tensors, data = tensors, xp.concatenate([t.data.ravel() for t in tensors])
        self.place(data, xp.zeros_like(data))
        self.lr_scale = self.spread([t.lr_scale for t in tensors])
        self.decayed = self.spread([float(t.data.ndim >= 2) for t in tensors])

    def place(self, data, grad):
        """Let every trained array be a view of ``data`` (P,), and its gradient one of ``grad`` (P,)."""
        self.data, self.grad, self.views, start = data, grad, [], 0
        for t in self.tensors:
            end = start + t.data.size
            t.data = data[start:end].reshape(t.shape)
            t.node.grad = grad[start:end].reshape(t.shape)  # backward adds into the flat buffer
            self.views.append((t.data, t.node, t.node.grad))
            start = end

    def check_placed(self) -> None:
        """Raises InputError where a parameter's array or gradient has been replaced since the optimizer was made."""
        for t, (data, node, grad) in zip(self.tensors, self.views, strict=True):
            if t.data is not data or t.node is not node or node.grad is not grad:
                what = "a parameter has been moved, frozen or replaced since this optimizer was made"
                raise InputError(f"{what}; make the optimizer after model.to(), adapt() and loading")

    def spread(self, values):
        """One number per entry of ``data`` from one number per Parameter; a Python float where all are the same."""
        if len(set(values)) == 1:
            return values[0]
        xp, dtype = array_module(self.data), self.data.dtype
        return xp.concatenate([xp.full(t.data.size, v, dtype) for v, t in zip(values, self.tensors, strict=True)])

    def squared_norm(self):
        """The gradient's squared norm; on a GPU a device scalar, which does not synchronise."""
        with np.errstate(over="ignore"):  # an overflow is reported by step(), in words
            return self.grad @ self.grad

    def step(self, squared=None) -> float:
        """Move the parameters against their gradients, which zero() clears afterwards; returns the gradient's norm.

        ``squared``: its square, where it is known. Raises TrainingStopped, with nothing moved, if it is not finite.
        """
        self.check_placed()
        norm = math.sqrt(float(self.squared_norm() if squared is None else squared))
        if not math.isfinite(norm):
            raise TrainingStopped(f"the gradient's norm is {norm}; lower the learning rate")
        if self.clip is not None and norm > self.clip:
            self.grad *= self.clip / norm
        if self.weight_decay:
            self.data *= 1.0 - self.lr * self.weight_decay * self.lr_scale * self.decayed
        self.move()
        return norm

    def zero(self) -> None:
        self.grad.fill(0.0)

    def move(self) -> None:
        """Change ``self.data`` in place from ``self.grad``, at the rate ``self.lr * self.lr_scale``."""
        raise NotImplementedError

    def state(self) -> dict:
        """The arrays besides the parameters that the next step depends on; restore() takes them back."""
        return {}

    def restore(self, state: dict) -> None:
        for name, array in self.state().items():
            array[...] = array_module(array).asarray(state[name], array.dtype)


class AdamW(Optimizer):
    """Adam with decoupled weight decay.   Kingma & Ba 2014, arXiv 1412.6980; Loshchilov & Hutter 2017, 1711.05101

    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    w ← (1 − lr · weight_decay) w − lr · m̂ / (√v̂ + eps)

    with m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ) in step t. ``weight_decay`` acts on matrices, not on vectors.
    """

    forms = {}  # {"numpy" or "cupy": function of the optimizer}: faster forms of equations(), registered by fast/

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=None):
        super().__init__(params, lr, weight_decay, clip)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise InputError(f"AdamW: betas are {betas}; both must be at least 0 and below 1")
        check_positive(eps=eps)
        self.betas, self.eps, self.t = betas, eps, 0  # t: steps taken
        self.m, self.v = 0.0 * self.data, 0.0 * self.data

    def move(self):
        self.t += 1
        form(self.forms, self.data, AdamW.equations)(self)

    def equations(self):
        xp, g, (beta1, beta2) = array_module(self.data), self.grad, self.betas
        self.m[:] = beta1 * self.m + (1.0 - beta1) * g
        self.v[:] = beta2 * self.v + (1.0 - beta2) * g * g
        m_hat, v_hat = self.m / (1.0 - beta1**self.t), self.v / (1.0 - beta2**self.t)
        self.data -= self.lr * self.lr_scale * m_hat / (xp.sqrt(v_hat) + self.eps)

    def state(self):
        return {"m": self.m, "v": self.v, "t": np.array([float(self.t)])}

    def restore(self, state):
        super().restore(state)
        self.t = int(state["t"][0])


def check_positive(zero_allowed=False, **values):
    """Raise InputError for a named value that is not a finite number above 0 (or at least 0); None is not given."""
    for name, value in values.items():
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            raise InputError(f"{name} is {value}; it must be finite and {'at least' if zero_allowed else 'above'} 0")
