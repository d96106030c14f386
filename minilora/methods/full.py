"""Full fine-tuning of the adapted layers: the yardstick that every adapter method is measured against.

Each target weight is trained itself, all d_out · d_in numbers of it; biases, norms and embeddings stay frozen as
for the other methods, so that the methods differ in the update alone. The trained W is the adapter's own copy
(p.W, beside the base's W), which is why the base model can be had back.

Forward, x (N, d_in), W (d_out, d_in):
  F1  y  = x Wᵀ                  (N, d_out)

Backward, dy = dL/dy (N, d_out):
  B1  dW = dyᵀ x                 (d_out, d_in)    W_ij multiplies x_j in every row
  B2  dx = dy W                  (N, d_in)        x_j reaches y_i through W_ij

Kept for backward: x (N, d_in)
"""

from dataclasses import dataclass

from ..adapter import Adapter


@dataclass(frozen=True)
class Full(Adapter):
    note = "adds a trained copy of each weight"
    claims = {
        "trains every number of W": lambda t: t.trained_numbers() == t.W0.size,
        "keeps x alone": lambda t: t.kept_numbers() == t.x.size,
    }

    def shapes(self, d_out, d_in):
        return {"W": (d_out, d_in)}, {}

    def init(self, W, rng, shared):
        return {"W": W.copy()}, {}

    def forward(self, x, W, p):
        y = x @ p.W.T  # (N, d_out) F1
        return y, {"x": x}

    def backward(self, dy, saved, W, p):
        dW = dy.T @ saved.x  # (d_out, d_in) B1
        dx = dy @ p.W  # (N, d_in) B2
        return dx, {"W": dW}

    def merge(self, W, p):
        return p.W.copy()
