# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/04_memory.ipynb)
#
# # 04 · Where the memory goes
#
# Training takes more memory than the weights, because backward needs arrays that forward has made. Here we find out
# which ones, count them by hand and by two independent counters, and see when LoRA saves memory and when it does not.
#
# **After this you can**
#
# - say for each operation of a transformer what its backward needs, and what it does not
# - predict the bytes that a training step keeps, to the byte, for full fine-tuning, LoRA, LoRA-FA, VeRA and DoRA
# - show why an engine whose nodes hold their inputs takes LoRA-FA's saving away
# - tell memory for activations from memory for gradients and optimizer state
# - say beforehand whether LoRA-FA or recomputation is worth it for a given model and context
#
# Read before: 01 (the engine), 02 (the transformer), 03 (LoRA).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora

# %%
from unittest.mock import patch

import numpy as np

import minilora
from minilora import adapter, engine, ops, plots
from minilora.data import CharTokenizer, load_corpus, random_batches
from minilora.engine import Tensor
from minilora.memory import kept_bytes, ledger
from minilora.nn import Linear
from minilora.tools.audit import audit
from minilora.tools.exercises import assess
from minilora.tools.trace import trace

ids = CharTokenizer().encode(load_corpus("folio").train)
inputs, targets = next(
    random_batches(ids, batch=8, context=128, rng=np.random.default_rng(0))
)
rng = np.random.default_rng(0)

batch, T = inputs.shape
N = batch * T  # tokens in a step
config = minilora.pretrained().config
d, heads, layers, vocab = config.n_embd, config.n_head, config.n_layer, config.vocab_size
print(f"N = {N} tokens, d = {d}, {heads} heads, {layers} layers, {vocab} characters")

# %% [markdown]
# ## One linear layer: x is needed for dW alone
#
# F1: $y_{ni} = \sum_j x_{nj} W_{ij}$. The gradient that arrives is $dy_{ni} = \partial L / \partial y_{ni}$.
#
# $$
# \begin{aligned}
# \text{B1:}\quad dx_{nj} &= \sum_i dy_{ni}\, W_{ij} && \text{$x_{nj}$ reaches $y_{ni}$ through $W_{ij}$} \\
# \text{B2:}\quad dW_{ij} &= \sum_n dy_{ni}\, x_{nj} && \text{$W_{ij}$ meets $x_{nj}$ in every row $n$}
# \end{aligned}
# $$
#
# B1 asks for $W$, which is there anyway. Only B2 asks for $x$. So a layer that is **frozen** keeps nothing, though
# gradients pass through it.


# %%
def show_kept(title, result, model):
    """What the graph below result keeps for backward, parameters of the model left out."""
    kept = [
        f"{e.name} {'×'.join(map(str, e.shape))}: {e.nbytes // 1024} KiB"
        for e in ledger(result, model)
        if e.nbytes
    ]
    print(f"{title:<14}" + (", ".join(kept) or "nothing"))


layer = Linear(rng.standard_normal((512, 128)).astype(np.float32))
x = Tensor(rng.standard_normal((N, 128)).astype(np.float32), requires_grad=True)
show_kept("W is trained:", layer(x), layer)
layer.freeze()
show_kept("W is frozen:", layer(x), layer)

# %% [markdown]
# ## An adapter on it
#
# LoRA's four lines (notebook 03), and what each asks for beside parameters and $dy$:
#
# | line | asks for |
# | --- | --- |
# | B1  $dh = dy\,(sB)$ | nothing |
# | B2  $dB = dy^\top (s h)$ | $h$ (N, r) |
# | B3  $dA = dh^\top x$ | $x$ (N, d_in) |
# | B4  $dx = dy\,W + dh\,A$ | nothing |
#
# LoRA-FA freezes $A$: B3 goes, and with it $x$. It still keeps $h = xA^\top$, since B2 needs it and $x$ is no longer
# there to make it again: N · r numbers. VeRA trains two vectors between frozen matrices, and needs $h$ alone as well.
# DoRA splits $V = W + sBA$ into the lengths $n$ of its rows and their directions, and trains lengths of its own. For
# their gradient it needs $z = xV^\top$ (N, d_out) and $n$ (d_out,) on top (notebook 08).

# %%
for method in ["full", "lora", "lora_fa", "vera", "dora"]:
    model = minilora.adapt(minilora.pretrained(), method, ["up"], verbose=False)
    up = model.blocks[0].up
    show_kept(method, up(Tensor(x.data)), model)

# %% [markdown]
# The first dimension is N but for `n`: all else grows with the number of tokens. $x$ is 128 wide, and $h$ as wide as
# the rank: 8 by default, 64 for VeRA.
#
# ## What the other operations need
#
# A backward formula may be rewritten until it asks for little. Two examples.
#
# **Softmax** $P_j = e^{S_j} / \sum_k e^{S_k}$. From $\partial P_j / \partial S_k = P_j(\delta_{jk} - P_k)$:
#
# $$dS_k = \sum_j dP_j\, P_j (\delta_{jk} - P_k) = P_k \Big(dP_k - \sum_j dP_j P_j\Big) \qquad \text{(attention's B3)}$$
#
# It needs its **result** $P$: neither $S$, nor the exponentials, nor their sum.
#
# **GELU** $y = \tfrac{x}{2}(1 + t)$, $t = \tanh(c(x + kx^3))$: $dx = dy \circ y'(x)$. It needs **one** array, the
# derivative $y'(x)$, which forward computes while $t$ is at hand: not $x$, $x^2$, $x^3$, $t$ and $1 + t$.
#
# | operation | kept | numbers |
# | --- | --- | --- |
# | frozen linear, sum of two branches | nothing | 0 |
# | layer norm | $\hat x$, and 1 / σ of each row | N d + N |
# | attention | q, k, v, P | 3 N d + about N · heads · T / 2 to N · heads · T |
# | GELU | y'(x) | 4 N d |
# | cross-entropy | P, the targets and their weights | N · vocabulary + N + N |
#
# The trace of one real step says the same, operation by operation; here are those of the second block.

# %%
model = minilora.adapt(minilora.pretrained(), "lora", verbose=False)
print(f"{'operation':<12}{'layer':<16}{'KiB':>6}   keeps")
for step in trace(model, inputs, targets)[11:23]:
    kept = ", ".join(step.saved) or "nothing"
    print(f"{step.operation:<12}{step.layer:<16}{step.kept_bytes / 1024:>6,.0f}   {kept}")

# %% [markdown]
# `k` and `v` add 32 KiB each, their h alone: their x is the array that `q` has kept, and counts once. The `g` of a layer
# norm is a parameter, which is there anyway and adds nothing.
#
# ## A naive engine
#
# The textbook builds everything from `+ * @ exp tanh`, one node each. Below are four pieces of a block, as such a tape
# writes them. We count in two versions of the tape: one whose nodes **hold every input**, as those of many small
# engines do, and one that keeps an input only where the other input's gradient needs it.


# %%
def tape_gelu(x):
    return 0.5 * x * (1.0 + (ops.GELU_SCALE * (x + ops.GELU_CUBIC * x**3)).tanh())


def tape_layer_norm(x, g, b):
    centred = x - x.sum(axis=1, keepdims=True) / d
    variance = (centred**2).sum(axis=1, keepdims=True) / d
    return g * centred * (variance + 1e-5) ** -0.5 + b


def tape_attention(q, k, v):
    # to (batch, heads, T, d / heads)
    split = lambda a: a.reshape(batch, T, heads, d // heads).transpose(0, 2, 1, 3)
    mask = np.where(np.tri(T, dtype=bool), 0.0, -np.inf).astype(np.float32)
    S = split(q) @ split(k).transpose(0, 1, 3, 2) / (d // heads) ** 0.5 + Tensor(mask)
    e = (S - Tensor(S.data.max(axis=-1, keepdims=True))).exp()
    P = e / e.sum(axis=-1, keepdims=True)
    return (P @ split(v)).transpose(0, 2, 1, 3).reshape(N, d)


def tape_lora(x, layer):
    A, B = layer.arrays.A, layer.arrays.B
    return x @ layer.base.W.T + (x @ A.T) @ B.T * layer.method.scaling + layer.base.b


# %% [markdown]
# Our engine's nodes hold no inputs, so we break that on purpose: `holding` wraps the one function that makes nodes.


# %%
def holding(record):
    """``record`` whose nodes also hold the arrays of their inputs."""

    def record_and_hold(name, y, saved, vjp, tensors):
        result = record(name, y, saved, vjp, tensors)
        if result.node:
            result.node.saved["inputs"] = tuple(t.data for t in tensors if t is not None)
        return result

    return record_and_hold


def kept_by(function, *tensors, hold=False):
    """Numbers kept, as a multiple of N · d."""
    if hold:
        with patch.object(engine, "record", holding(engine.record)):
            return kept_by(function, *tensors)
    return kept_bytes(function(*tensors), model) / (4 * N * d)


draw = lambda *shape: Tensor(
    rng.standard_normal(shape).astype(np.float32), requires_grad=True
)
block, wide, narrow = model.blocks[1], draw(N, 4 * d), [draw(N, d) for _ in range(3)]
norm = block.norm1
attention = lambda *qkv: ops.attention(*qkv, batch=batch, heads=heads)
pieces = {
    "layer norm": (tape_layer_norm, ops.layer_norm, narrow[0], norm.g, norm.b),
    "attention": (tape_attention, attention, *narrow),
    "GELU": (tape_gelu, ops.gelu, wide),
    "LoRA on q": (lambda x: tape_lora(x, block.q), block.q, narrow[0]),
}
titles = "holds every input", "holds what it needs", "one node"
print(f"{'in units of N · d':<20}" + "".join(f"{title:>21}" for title in titles))
for name, (tape, one_node, *tensors) in pieces.items():
    held, needed = kept_by(tape, *tensors, hold=True), kept_by(tape, *tensors)
    row = [held, needed, kept_by(one_node, *tensors)]
    print(f"{name:<20}" + "".join(f"{multiple:>21.2f}" for multiple in row))

# %% [markdown]
# One node per layer, with a derivation behind it, keeps a fraction. LoRA itself is the exception: it keeps x and h in
# the last two columns alike. Attention's P is 4 in these units (heads · T / d), of which causal blocks keep three
# quarters.
#
# ## Why a node must not hold its inputs
#
# Now the same break on whole models of layer-sized operations. Guess first: how much less does LoRA-FA keep than LoRA?


# %%
def build(method, recompute=False, target_modules="all-linear", **options):
    model = minilora.adapt(
        minilora.pretrained(), method, target_modules, verbose=False, **options
    )
    return model.recompute(recompute)


def kept_MiB(model, hold=False):
    """What one step keeps, in MiB; ``hold``: where nodes hold their inputs."""
    if hold:
        with (
            patch.object(engine, "record", holding(engine.record)),
            patch.object(adapter, "record", holding(adapter.record)),
        ):
            return kept_MiB(model)
    return kept_bytes(model.loss(inputs, targets), model) / 2**20


for hold in (True, False):
    lora, lora_fa = (kept_MiB(build(method), hold) for method in ("lora", "lora_fa"))
    what = "their inputs" if hold else "what backward needs"
    less = 100 * (1 - lora_fa / lora)
    print(f"nodes hold {what:<21}", end="")
    print(f"LoRA {lora:.1f} MiB, LoRA-FA {lora_fa:.1f} MiB: {less:.1f} % less")

# %% [markdown]
# Where nodes hold inputs, every x stays alive whoever needs it, and LoRA-FA saves nothing at all. The saving is no
# property of the method alone, but of the method **and** the engine. Hence the engine's law: *a node is not a value*.
#
# ## The arithmetic of a block
#
# Count in numbers, for one block with adapters on all six linear layers. `x` of q, k, v is one array; then follow x of
# `o`, x of `up`, and x of `down`, which is 4 d wide: 1 + 1 + 1 + 4 = 7.
#
# | kept | full | LoRA | LoRA-FA | VeRA | DoRA | any, recomputed |
# | --- | ---: | ---: | ---: | ---: | ---: | ---: |
# | x of the adapters, N d | 7 | 7 | 0 | 0 | 7 | 0 |
# | z of DoRA (q, k, v, o, down: d each; up: 4 d), N d | 0 | 0 | 0 | 0 | 9 | 0 |
# | q, k, v, N d | 3 | 3 | 3 | 3 | 3 | 0 |
# | GELU, N d | 4 | 4 | 4 | 4 | 4 | 0 |
# | two layer norms, N d | 2 | 2 | 2 | 2 | 2 | 0 |
# | the block's input, N d | 0 | 0 | 0 | 0 | 0 | 1 |
# | **together, N d** | **16** | **16** | **9** | **9** | **25** | **1** |
# | h, N r | 0 | 6 | 6 | 6 | 6 | 0 |
# | attention's P, N · heads · T | ¾ | ¾ | ¾ | ¾ | ¾ | 0 |
#
# The last column is activation checkpointing (`model.recompute()`): each block saves its input, and computes the rest
# again when backward gets there. The ¾ is (1 + 64 / T) / 2 at T = 128, because attention takes 64 queries at a time,
# with only the keys that they see. On top come 1 / σ (2 N), DoRA's n (9 d), and once for the model the loss,
# N · (vocabulary + 1) numbers and N targets of 8 bytes.
#
# Two edge cases cancel out. The first block's first norm keeps nothing, because nothing below it is trained, and the
# norm after the last block, which the table leaves out, keeps the same amount. So two norms per block are right overall.

# %%
X = {"full": 7, "lora": 7, "lora_fa": 0, "vera": 0, "dora": 7}


def by_hand(
    method, recompute=False, r=8, N=N, T=T, d=d, heads=heads, layers=layers, vocab=vocab
):
    """Bytes kept for backward by one step, by part; adapters on q, k, v, o, up, down."""
    loss = N * vocab + N + 2 * N  # a target is 8 bytes, two numbers
    if recompute:  # the norm after the last block is in no block
        numbers = {"input of blocks": layers * N * d, "layer norm": N * d + N, "loss": loss}
        return {part: 4 * size for part, size in numbers.items()}
    seen = (1 + min(1, 64 / T)) / 2
    numbers = {
        "x of adapters": layers * X[method] * N * d,
        "h": layers * 6 * N * r if method != "full" else 0,
        "z and n of DoRA": layers * 9 * (N * d + d) if method == "dora" else 0,
        "q, k, v": layers * 3 * N * d,
        "attention's P": layers * seen * N * heads * T,
        "GELU": layers * 4 * N * d,
        "layer norm": layers * 2 * (N * d + N),
        "loss": loss,
    }
    return {part: int(4 * size) for part, size in numbers.items()}


rows = {
    "full": ("full", False),
    "LoRA": ("lora", False),
    "LoRA + recompute": ("lora", True),
    "LoRA-FA": ("lora_fa", False),
    "LoRA-FA + recompute": ("lora_fa", True),
    "VeRA, r = 64": ("vera", False),
    "DoRA": ("dora", False),
}
print(f"{'bytes':<22}{'by hand':>14}{'the ledger':>14}{'the allocator':>16}")
for name, (method, recompute) in rows.items():
    total = sum(by_hand(method, recompute, r=64 if method == "vera" else 8).values())
    audited = audit(build(method, recompute), inputs, targets)
    assert total == audited["total"]
    print(f"{name:<22}{total:>14,}{audited['total']:>14,}{audited['allocator']:>16,}")

# %% [markdown]
# Three counters. *By hand* is the table above. *The ledger* adds up what the graph's nodes hold. *The allocator* is
# Python's own tracing of NumPy's memory, from before the forward pass to after it, with only the loss alive: it knows
# nothing of nodes. The first two agree to the byte; the third adds a few small arrays that backward does not need.

# %%
per_token = lambda parts: {part: size / N / 1024 for part, size in parts.items() if size}
table = {}
for name, method in [("LoRA, inputs held", "lora"), ("LoRA-FA, inputs held", "lora_fa")]:
    model = build(method)
    held = round((kept_MiB(model, hold=True) - kept_MiB(model)) * 2**20)
    table[name] = per_token(by_hand(method) | {"inputs that nodes hold": held})
for name, (method, recompute) in rows.items():
    table[name] = per_token(by_hand(method, recompute, r=64 if method == "vera" else 8))
plots.show(
    plots.stacked_bars(
        table,
        unit="KiB kept for backward per token",
        title="What one step keeps, by who keeps it",
    ),
    "Stacked bars: full and LoRA are alike, DoRA keeps half as much again, "
    "LoRA-FA two thirds, and with recompute both keep less than a tenth.",
)

# %% [markdown]
# **Notice:** full fine-tuning and LoRA keep the same, except for h. LoRA-FA saves the blue part, x, unless nodes hold
# their inputs. DoRA pays for z. With recompute, the method no longer matters: only each block's input is kept.
#
# ## So what does LoRA save? Gradients and optimizer state
#
# Each **trained** number costs 12 bytes beside itself in float32: its gradient, and AdamW's m and v. Activations cost
# per **token**, these per **parameter**.

# %%
print(f"{'':<10}{'trained':>10}{'g, m, v':>14}{'per number':>12}{'kept for backward':>20}")
for method in ["full", "lora", "lora_fa", "vera"]:
    model = build(method)
    optimizer = minilora.AdamW(model.trainable(), lr=1e-3)
    state = optimizer.grad.nbytes + optimizer.m.nbytes + optimizer.v.nbytes
    trained, _ = minilora.count_parameters(model)
    per_number, kept = f"{state / trained:.0f} B", f"{kept_MiB(model):.1f} MiB"
    print(f"{method:<10}{trained:>10,}{state / 2**20:>10.2f} MiB{per_number:>12}{kept:>20}")

# %% [markdown]
# LoRA needs less than a tenth of full's 9 MiB of state. It saves none of the activations: it keeps all of them, and h as
# well (39.2 MiB against 38.4). Which of the two weighs more depends on the number of tokens: a large model on few tokens
# gains much by LoRA, a small model on many tokens gains next to nothing.
#
# ## When LoRA-FA gains little
#
# **1. Which layers.** LoRA-FA leaves out x. With adapters on q and v alone that is one array for each block, which the
# two share.

# %%
for chosen in ("all-linear", ["q", "v"]):
    kept = {
        m: kept_MiB(build(m, target_modules=chosen)) for m in ("full", "lora", "lora_fa")
    }
    print(f"{chosen!s:<14}", ", ".join(f"{m} {size:.1f} MiB" for m, size in kept.items()))

# %% [markdown]
# For q and v, LoRA-FA keeps 7 % less than LoRA, where it was 36 % for all six.
#
# **2. Long contexts, and large vocabularies.** The P of attention and the probabilities of the loss are kept whatever
# the method. With H heads all of P is $HT/d$ in units of N d. Of that our blocks keep the part $p = (1 + 64/T)/2$, so
# that per block, h left out, LoRA over LoRA-FA is
#
# $$\frac{16 + p\,HT/d}{9 + p\,HT/d}.$$
#
# GPT-2 has d = 768 and 12 heads; at T = 1024 all of its P is 16 N d:

# %%
P = {"no P": 0, "P in causal blocks": 16 * (1 + 64 / 1024) / 2, "all of P": 16}
for kept, size in P.items():
    print(f"LoRA ÷ LoRA-FA, {kept:<20}{(16 + size) / (9 + size):.2f}", end="")
    print(f"; with adapters on q and v alone {(10 + size) / (9 + size):.2f}")

contexts = np.array([64 * 2**i for i in range(9)])
gpt2 = {"d": 768, "heads": 12, "layers": 12}


def ratio(vocab, P):
    """LoRA's kept bytes over LoRA-FA's, by context; ``P``: with attention's P."""
    values = []
    for T in contexts:
        lora, lora_fa = (
            by_hand(m, N=T, T=T, vocab=vocab, **gpt2) for m in ("lora", "lora_fa")
        )
        left_out = 0 if P else lora["attention's P"]
        values.append((sum(lora.values()) - left_out) / (sum(lora_fa.values()) - left_out))
    return np.array(values)


plots.show(
    plots.lines(
        {
            "without P, small vocabulary": (contexts, ratio(96, P=False)),
            "P kept in causal blocks, small vocabulary": (contexts, ratio(96, P=True)),
            "P kept in causal blocks, 50,257 tokens": (contexts, ratio(50257, P=True)),
        },
        title="GPT-2's shape: what LoRA keeps, over what LoRA-FA keeps",
        xlabel="context T, tokens",
        ylabel="LoRA ÷ LoRA-FA",
        logx=True,
    ),
    "A level line at 1.8 without P; where P is kept, two lines that fall "
    "towards 1 at long contexts.",
)

# %% [markdown]
# *To see: the saving is a matter of the rest. Without P it is a factor of 1.77 at any length (h counts here too, hence
# not 1.78). With P it fades as T grows, and is down to 1.40 at T = 1024. The loss's probabilities over 50,257 tokens
# take a third of the saving at short contexts, and next to nothing of the little that is left at long ones.* This is
# arithmetic for a shape, not a run: we train no model of this size here.
#
# ## Activation checkpointing, and LoRA-FA
#
# Why keep what can be computed again? `model.recompute()` saves each block's input, N d numbers, and nothing else. When
# backward reaches a block, the block's forward runs a second time, and its arrays live until backward leaves the block.
# So what is kept no longer depends on the method. At the peak, one block's share of the table above comes on top.

# %%
for method in ("lora", "lora_fa"):
    plain, again = kept_MiB(build(method)), kept_MiB(build(method, recompute=True))
    parts = by_hand(method, layers=1)
    block = (sum(parts.values()) - parts["loss"]) / 2**20
    print(f"{method:<8} plain {plain:.1f} MiB, recomputed {again:.1f} MiB", end="")
    print(f", and {block:.1f} MiB while backward is in a block")


def gradients(recompute):
    model = build("lora", recompute)
    noise = np.random.default_rng(1)
    for p in model.trainable().values():
        # off B = 0, where dA would be 0
        p.data += 0.05 * noise.standard_normal(p.shape, np.float32)
    minilora.backward(model.loss(inputs, targets))
    return [p.grad for p in model.trainable().values()]


same = [
    np.array_equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True)
]
print(f"gradients equal to the last bit: {sum(same)} of {len(same)}")

# %% [markdown]
# LoRA with recompute trains A as well, has exactly LoRA's gradient, and needs less memory than LoRA-FA without it. The
# price is time, one more forward pass per step: [memory](../docs/memory.md) has both measured side by side.
#
# ## Exercises
#
# **1. DoRA on the attention layers alone.** Adapters on q, k, v, o. Return the numbers that **one block** keeps,
# without attention's P: count x, h, z, n, q k v, GELU, the norms' $\hat x$ and 1 / σ. Here $V = W + sBA$ is the adapted
# weight (d_out, d_in), $z = xV^\top$ (N, d_out), and $n$ (d_out,) holds the lengths of V's rows.


# %%
def dora_on_attention(N, d, r):
    """Numbers kept by one block, P left out."""
    ...


# %%
def ledger_says(d, r, T=12):
    """The same by the ledger: what a second block adds to the first, P left out."""
    kept = []
    for n_layer in (1, 2):
        shape = minilora.GPTConfig(
            vocab_size=7, n_positions=T, n_embd=d, n_layer=n_layer, n_head=2
        )
        model = minilora.adapt(
            minilora.GPT(shape), "dora", ["q", "k", "v", "o"], verbose=False, r=r
        )
        ids = np.zeros((3, T), dtype=int)
        kept.append(kept_bytes(model.loss(ids, ids), model) // 4)
    P = 3 * T * 2 * T  # N · heads · T
    return 3 * T, d, r, kept[1] - kept[0] - P


def fits(answer, d, r):
    *sizes, expected = ledger_says(d, r)
    return answer(*sizes) == expected


assess(
    "DoRA on q, k, v, o",
    dora_on_attention,
    (
        "x: q, k, v share one, o has its own. z: one (N, d) for each of the four",
        lambda f: fits(f, 16, 2),
    ),
    (
        "right for d = 16, r = 2 alone: does h grow with r, and n with d?",
        lambda f: fits(f, 24, 3),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def dora_on_attention(N, d, r):
#     x = 2 * N * d  # of q, k, v together, and of o
#     h, z, n = 4 * N * r, 4 * N * d, 4 * d
#     rest = 3 * N * d + 4 * N * d + 2 * (N * d + N)  # q k v, GELU, two norms
#     return x + h + z + n + rest
# ```
#
# </details>
#
# **2. ReLU in one bit.** `x * (x > 0)` on a tape keeps x and the mask. Return `(y, kept, backward)`, with `kept` an
# array of at most one **bit** per number (`np.packbits`, and `np.unpackbits(kept, count=...)`), and
# `backward(dy, kept) -> dx`.


# %%
def relu(x):
    """(y, kept, backward) for x of any shape."""
    ...


# %%
sample, arriving = (
    np.random.default_rng(2).standard_normal((6, 5)).astype(np.float32) for _ in range(2)
)
sample[0, 0], sample[1, 1], arriving[0, 1] = -3.0, 0.0, 7.0
other = -sample


def dx_of(f, x, kept_of=None):
    """dx by the backward of x, with what was kept for another x where one is given."""
    _, kept, backward = f(x)
    return backward(arriving, kept if kept_of is None else f(kept_of)[1])


assess(
    "ReLU in one bit",
    relu,
    ("y is not max(x, 0)", lambda f: np.array_equal(f(sample)[0], np.maximum(sample, 0))),
    (
        "dx must be dy where x > 0 and 0 elsewhere, at x = 0 as well",
        lambda f: np.array_equal(dx_of(f, sample), arriving * (sample > 0)),
    ),
    ("30 numbers fit into 4 bytes", lambda f: f(sample)[1].nbytes <= 4),
    (
        "backward must use what it is given as kept, not what it remembers of x",
        lambda f: np.array_equal(dx_of(f, sample, kept_of=other), arriving * (other > 0)),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def relu(x):
#     kept = np.packbits(x > 0)
#
#     def backward(dy, kept):
#         mask = np.unpackbits(kept, count=dy.size).reshape(dy.shape)
#         return dy * mask.astype(dy.dtype)
#
#     return np.maximum(x, 0), kept, backward
# ```
#
# </details>
#
# **3. The longest context.** LoRA with r = 8 on all six linear layers of a model of GPT-2's shape (`**gpt2`), with a
# vocabulary of 50,257. A batch is one text of T tokens, so N = T. Return the largest T among 64, 128, 192, … for which
# a step keeps at most `budget` bytes for backward, or 0 if 64 are too many. `by_hand` counts the bytes; `recompute`
# says whether the blocks are recomputed.


# %%
def longest_context(budget, recompute):
    """The largest T = 64, 128, … that fits, or 0."""
    ...


# %%
needs = lambda T, recompute: sum(
    by_hand("lora", recompute, N=T, T=T, vocab=50257, **gpt2).values()
)
assess(
    "the longest context",
    longest_context,
    (
        "a budget of just what 256 tokens need must give 256",
        lambda f: f(needs(256, False), False) == 256,
    ),
    (
        "one byte less must give the T before",
        lambda f: f(needs(256, False) - 1, False) == 192,
    ),
    ("with recompute more fits", lambda f: f(2**31, True) > f(2**31, False)),
    ("a budget of 1 byte fits nothing: 0", lambda f: f(1, True) == 0),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def longest_context(budget, recompute):
#     keeps = lambda T: by_hand("lora", recompute, N=T, T=T, vocab=50257, **gpt2)
#     T = 0
#     while sum(keeps(T + 64).values()) <= budget:
#         T += 64
#     return T
# ```
#
# With 2 GiB that is 1,600 tokens without recompute and 8,896 with it: then the loss takes most of the memory.
#
# </details>
