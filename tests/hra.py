"""A method file that is not in the folder of methods, with a kind of file in PEFT that no other method has."""

HRA = '''"""Householder reflections of the input, one after the other."""

from dataclasses import dataclass

from ..adapter import Adapter


@dataclass(frozen=True)
class HRA(Adapter):
    r: int = 4

    def shapes(self, d_out, d_in):
        return {"u": (d_in, self.r)}, {}

    def init(self, W, rng, shared):
        return {"u": rng.normal(size=(W.shape[1], self.r))}, {}

    def forward(self, x, W, p):
        return x @ self.merge(W, p).T, {}

    def merge(self, W, p):
        for u in p.u.T:
            W = W - (2.0 * (W @ u) / (u @ u))[:, None] * u
        return W

    peft, from_peft = {"peft_type": "HRA"}, True
    peft_names = {"r": "r"}
    peft_arrays = {"u": ("hra_u", ("d_in", "r"))}
    peft_keys = {"apply_GS": (False,)}
    peft_ignored = {"init_weights": True}
'''
