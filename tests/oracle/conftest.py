"""The other side of the oracle lane: the same two hosts in torch, and how arrays, names and batches cross over.

``ours`` is always minilora, ``theirs`` torch or PEFT. Nothing here computes a gradient of minilora's.
"""

import numpy as np
import pytest

from minilora import GPT, GPTConfig, Tensor
from minilora.nn import Linear, Module
from minilora.ops import cross_entropy, gelu

try:
    import torch
    from torch import nn

    F, TorchModule = nn.functional, nn.Module
    torch.set_num_threads(1)  # the arrays are tiny, and threads that wait for each other cost minutes
except ImportError:  # then the test modules skip themselves, and say what to install
    torch, TorchModule = None, object

STEPS = 20


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)  # PEFT draws lora_A from torch's global stream


# ------------------------------------------------------------------------------------------------------ comparison


def to_numpy(a):
    return a.detach().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)


def to_torch(a, requires_grad=False):
    return torch.tensor(a).requires_grad_(requires_grad)  # a copy: neither side can write into the other's array


def assert_close(ours, theirs, tolerance, what, scale=None):
    """Same shape and dtype, and no entry further apart than ``tolerance`` times ``scale``, by default theirs' largest.

    An array of zeros has to be met to within ``tolerance`` itself.
    """
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), what
    scale = scale or np.abs(theirs).max() or 1.0
    difference = np.abs(ours - theirs).max() / scale
    assert difference <= tolerance, f"{what}: {difference:.1e} of {scale:.1e}, allowed {tolerance:.0e}"


# ------------------------------------------------------------------------------------------------------- the hosts


class MLP(Module):
    """Two linear layers, the first with a bias: the smallest host in which a gradient passes through an adapter."""

    def __init__(self, rng, dtype):
        draw = lambda *shape: rng.normal(0.0, 0.3, shape).astype(dtype)
        self.up, self.down = Linear(draw(12, 8), draw(12)), Linear(draw(5, 12))

    def __call__(self, x):
        return self.down(gelu(self.up(Tensor(x))))

    def loss(self, x, targets, rng=None):
        return cross_entropy(self(x), targets=targets)


class TorchMLP(TorchModule):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class TorchBlock(TorchModule):
    def __init__(self, config):
        super().__init__()
        d, self.heads = config.n_embd, config.n_head
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):  # (B, T, d)
        heads = lambda a: a.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, d / heads)
        h = self.norm1(x)
        y = F.scaled_dot_product_attention(heads(self.q(h)), heads(self.k(h)), heads(self.v(h)), is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TorchGPT(TorchModule):
    """GPT-2 with q, k and v apart and the head tied to the token embedding; ids (B, T) to logits (B T, V)."""

    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(TorchBlock(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight).flatten(0, 1)


def make_hosts(host, dtype, seed=0):
    """(ours, theirs) of one architecture, ours with every array random, so that no bias is 0 and no gain is 1.

    The weights are not the same yet; see copy_to_torch.
    """
    rng = np.random.default_rng(seed)
    if host == "mlp":
        return MLP(rng, dtype), TorchMLP()
    config = GPTConfig(vocab_size=17, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    ours = GPT(config, rng=rng, dtype=dtype)
    for _, p in ours.named_parameters():
        p.data += rng.normal(0.0, 0.2, p.shape).astype(dtype)
    return ours, TorchGPT(config)


def make_batches(host, dtype, steps=STEPS, seed=1):
    """(inputs, targets) for each step: tokens for the GPT, vectors and classes for the MLP.

    The MLP gets 6 and 64 rows by turns: minilora computes with few and with many rows in different ways.
    """
    rng = np.random.default_rng(seed)
    if host == "mlp":
        sizes = [6, 64] * (steps // 2)
        return [(rng.standard_normal((n, 8)).astype(dtype), rng.integers(0, 5, n)) for n in sizes]
    ids = rng.integers(0, 17, (steps, 3, 9))
    return [(a[:, :-1], a[:, 1:]) for a in ids]


def torch_loss(theirs, inputs, targets):
    """Mean cross-entropy in nats per target; -100 does not count, as in minilora."""
    return F.cross_entropy(theirs(to_torch(inputs)), to_torch(targets).flatten())


def torch_train(theirs, optimizer, batches, after_step=lambda: None):
    for inputs, targets in batches:
        optimizer.zero_grad()
        torch_loss(theirs, inputs, targets).backward()
        optimizer.step()
        after_step()


# ----------------------------------------------------------------------------------------------- names and weights

NAMES = {  # the end of a name in minilora, and in torch and PEFT; the first that fits counts
    ".arrays.A": ".lora_A.default.weight",
    ".arrays.B": ".lora_B.default.weight",
    ".arrays.m": ".lora_magnitude_vector.default.weight",
    ".arrays.b": ".vera_lambda_b.default",
    ".arrays.d": ".vera_lambda_d.default",
    ".base.W": ".base_layer.weight",
    ".base.b": ".base_layer.bias",
    ".W": ".weight",
    ".g": ".weight",
    ".b": ".bias",
    "tokens": "tokens.weight",
    "positions": "positions.weight",
}


def torch_name(name):
    """``blocks.0.q.arrays.A`` to ``blocks.0.q.lora_A.default.weight``; None for what PEFT has no parameter for."""
    return next((name.removesuffix(end) + other for end, other in NAMES.items() if name.endswith(end)), None)


def parameters_in_both(ours, theirs):
    """(name, ours, theirs) for every parameter that both have; ``theirs`` may be wrapped by PEFT."""
    in_torch = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    found = [(name, p, in_torch.pop(torch_name(name), None)) for name, p in ours.named_parameters()]
    assert not in_torch, f"minilora has no {sorted(in_torch)}"
    return [row for row in found if row[2] is not None]


def copy_to_torch(ours, theirs):
    with torch.no_grad():
        for name, p, other in parameters_in_both(ours, theirs):
            assert p.shape == tuple(other.shape), name
            other.copy_(to_torch(p.data))
