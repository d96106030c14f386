"""Parameters, modules and the two layers that own arrays: Linear and LayerNorm.

The parameters and sub-modules of a module are its attributes, found by walking them.
"""

import numpy as np

from .engine import Tensor
from .ops import layer_norm, linear


class Parameter(Tensor):
    """A Tensor to train; ``lr_scale`` multiplies its learning rate. A frozen one may hold integers."""

    __slots__ = ("lr_scale",)

    def __init__(self, data, requires_grad=True, lr_scale=1.0):
        super().__init__(data, requires_grad, integers=not requires_grad)
        self.lr_scale = lr_scale

    def freeze(self):
        self.node = None


class Module:
    """Anything with parameters. Names are attribute paths: ``blocks.0.q.W``."""

    arrays_beside = ()  # names of attributes that are arrays, or None, and no Parameters: to() moves them too

    def children(self):
        """(name, child) for each attribute, or item of a list attribute, that is a Module or a Parameter."""
        for name, value in vars(self).items():
            for key, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, Module | Parameter):
                    yield (name if key is None else f"{name}.{key}"), child

    def named_modules(self, prefix=""):
        """(path, module) for every module below this one, itself excluded, in order of definition."""
        for name, child in self.children():
            if isinstance(child, Module):
                yield prefix + name, child
                yield from child.named_modules(f"{prefix}{name}.")

    def named_parameters(self, prefix=""):
        """(path, Parameter) for every parameter, frozen ones included, in order of definition."""
        for name, child in self.children():
            if isinstance(child, Module):
                yield from child.named_parameters(f"{prefix}{name}.")
            else:
                yield prefix + name, child

    def trainable(self) -> dict[str, Parameter]:
        """The parameters that ask for a gradient, by path."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def freeze(self):
        for _, p in self.named_parameters():
            p.freeze()

    def to(self, device: str):
        """Move every array to "cpu" or "cuda"; returns the module. Raises InputError without CuPy or GPU."""
        from .placement import move_to

        return move_to(self, device)

    def after_step(self):
        """Called after each optimizer step; an adapter method may move more than the optimizer did."""
        for _, child in self.children():
            if isinstance(child, Module):
                child.after_step()


class Linear(Module):
    """y = x Wᵀ + b with W (d_out, d_in) and b (d_out,)."""

    def __init__(self, W, b=None):
        self.W = Parameter(W)
        self.b = None if b is None else Parameter(b)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.W, self.b)


class LayerNorm(Module):
    """Rows normalised, scaled by g (d,) and shifted by b (d,)."""

    def __init__(self, d: int, dtype=np.float32):
        self.g, self.b = Parameter(np.ones(d, dtype)), Parameter(np.zeros(d, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.g, self.b)
