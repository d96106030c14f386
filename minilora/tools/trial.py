"""What a method claims, tried out: each method's class lists short sentences, each with the code that tests it.

A claim is a function of a Trial, one adapted layer with random data, and is true or false. The test suite runs all of
them, and ``minilora methods`` prints them with the verdict.
"""

import numpy as np

from .. import methods
from ..adapter import AdaptedLinear, Adapter, own_array
from ..backend import array_module
from ..engine import Saved, Tensor, backward
from ..nn import Linear, Parameter
from ..training.optim import AdamW
from ..training.sgd import SGD


class Trial:
    """A method on one layer in float64, with x (N, d_in), and W0 (d_out, d_in) as the layer had it before.

    The loss is ‖y − c‖² / 2 for a random target c, so that the gradient that arrives is dy = y − c.
    """

    def __init__(self, method: Adapter, N=5, d_in=12, d_out=9, seed=0):
        self.method, self.sizes, self.seed = method, {"N": N, "d_in": d_in, "d_out": d_out}, seed
        rng = np.random.default_rng(seed)
        self.W0, self.x, self.c = (rng.standard_normal(s) for s in [(d_out, d_in), (N, d_in), (N, d_out)])
        shared = method.init_shared([self.W0.shape], rng)
        shared = {name: Parameter(own_array(a, np, float), requires_grad=False) for name, a in shared.items()}
        self.layer = AdaptedLinear(Linear(self.W0.copy()), method, seed, shared)

    def resized(self, **sizes) -> "Trial":
        """The same method on a layer of other sizes."""
        return type(self)(self.method, **{**self.sizes, **sizes}, seed=self.seed)

    def of(self, name, **options) -> "Trial":
        """Another method on the same data."""
        return Trial(methods.create(name, **options), **self.sizes, seed=self.seed)

    def after(self, steps, lr=0.01, adam=True, eps=1e-8) -> "Trial":
        """A copy, from the start, after ``steps`` optimizer steps."""
        trial = self.resized()
        params = trial.layer.arrays.trainable()
        optimizer = AdamW(params, lr, eps=eps) if adam else SGD(params, lr)
        for _ in range(steps):
            y = trial.layer(Tensor(trial.x))
            backward(y, y.data - trial.c)
            optimizer.step()
            optimizer.zero()
            trial.layer.after_step()
        return trial

    @property
    def W(self):
        """The layer's weight, which some methods move."""
        return self.layer.base.W.data

    @property
    def p(self) -> Saved:
        """The layer's arrays by name."""
        return self.layer.p

    @property
    def merged(self):
        """The weight that does the same."""
        return self.method.merge(self.W, self.p)

    @property
    def dW(self):
        """The full gradient: that of the merged weight, (d_out, d_in)."""
        return (self.x @ self.merged.T - self.c).T @ self.x

    @property
    def grads(self) -> Saved:
        """The gradients of the trainable arrays by name."""
        y, saved = self.method.forward(self.x, self.W, self.p)
        return Saved(self.method.backward(y - self.c, Saved(saved), self.W, self.p)[1])

    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(p.data.size for p in self.layer.arrays.trainable().values())

    def kept_numbers(self) -> int:
        """How many numbers forward keeps for backward."""
        return sum(a.size for a in self.method.forward(self.x, self.W, self.p)[1].values())

    @staticmethod
    def pinv(A):
        """The pseudo-inverse, wherever A is."""
        return array_module(A).linalg.pinv(A)

    @staticmethod
    def same(a, b, tolerance=1e-10) -> bool:
        """Equal up to rounding: within ``tolerance`` of the larger one's largest entry."""
        return bool(abs(a - b).max() <= tolerance * max(abs(a).max(), abs(b).max(), 1e-300))


def verdicts(name: str) -> dict[str, bool]:
    """Each claim of the method ``name``, with whether it holds."""
    method = methods.create(name, **methods.known(name, r=3))
    return {text: bool(holds(Trial(method))) for text, holds in method.claims.items()}
