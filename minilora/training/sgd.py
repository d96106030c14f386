"""Gradient descent over the same flat buffer, for comparison with AdamW."""

from ..errors import InputError
from .optim import Optimizer


class SGD(Optimizer):
    """Gradient descent, with momentum: u ← momentum u + g,  w ← w − lr u."""

    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0, clip=None):
        super().__init__(params, lr, weight_decay, clip)
        if not 0.0 <= momentum < 1.0:
            raise InputError(f"SGD: momentum is {momentum}; it must be at least 0 and below 1")
        self.momentum, self.velocity = momentum, 0.0 * self.data

    def move(self):
        self.velocity *= self.momentum
        self.velocity += self.grad
        self.data -= self.lr * self.lr_scale * self.velocity

    def state(self):
        return {"velocity": self.velocity}
