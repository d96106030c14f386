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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/06_vera.ipynb)
#
# # 06 · VeRA
#
# VeRA goes a step further than LoRA: both thin matrices are random, frozen, and the *same for all layers*. A layer
# trains two vectors. We derive their gradients, see what must be kept for backward, draw the very matrices that PEFT
# draws from a key, compare VeRA with LoRA at equal numbers of trained parameters, and try the paper's ablations.
#
# **After this you can**
#
# - derive VeRA's five backward lines, and say why $\partial L / \partial d$ is exactly zero at step 1
# - count what VeRA trains, stores and keeps, and say at which rank it keeps *more* than LoRA
# - regenerate a random projection from its key, to the last bit
# - explain why the start of $d$ is a learning rate in disguise
# - compare two methods at equal trained numbers, each at its own rate
#
# Read before: [03 · LoRA](03_lora.ipynb) and the end of [05 · LoRA+](05_lora_plus.ipynb).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora
import math

import numpy as np
from tqdm import tqdm

import minilora
from minilora import methods, plots
from minilora.data import CharTokenizer, fixed_batches, load_corpus, random_batches
from minilora.engine import Saved
from minilora.memory import ledger
from minilora.tools.exercises import assess
from minilora.tools.gradcheck import check_method, gradcheck
from minilora.tools.trial import Trial

# %% [markdown]
# ## The idea
#
# $$W' = W + \mathrm{diag}(b)\, B\, \mathrm{diag}(d)\, A$$
#
# $A\,(r, d_\text{in})$ and $B\,(d_\text{out}, r)$ are drawn once. $d\,(r)$ says how much of each random direction to
# take, $b\,(d_\text{out})$ how much each output gets. So a layer trains $r + d_\text{out}$ numbers, whatever
# $d_\text{in}$ is, where LoRA trains $r\,(d_\text{in} + d_\text{out})$.

# %%
layers = [(128, 128)] * 4 + [(512, 128), (128, 512)]  # (d_out, d_in): q, k, v, o, up, down
rows = {
    "one block of the shipped model": lambda r: f"r = {r}",
    "LoRA": lambda r: f"{sum(r * (m + n) for m, n in layers):,}",
    "VeRA": lambda r: f"{sum(r + m for m, n in layers):,}",
}
for name, entry in rows.items():
    print(f"{name:<32}" + "".join(f"{entry(r):>10}" for r in (1, 16, 256)))

# %% [markdown]
# VeRA's numbers hardly grow with the rank, which is why its ranks are large: 256 is PEFT's default. Rank costs time
# and memory instead, as we shall see.
#
# ## Forward
#
# | | in matrices | entry by entry | shape |
# | --- | --- | --- | --- |
# | **F1** | $h = x A^\top$ | $h_{nk} = \sum_j x_{nj} A_{kj}$ | $(N, r)$ |
# | **F2** | $y = x W^\top + h\,C^\top$ | $y_{ni} = \sum_j x_{nj} W_{ij} + \sum_k h_{nk} C_{ik}$ | $(N, d_\text{out})$ |
#
# with $C = b \circ B \circ d$, that is $C_{ik} = b_i B_{ik} d_k$: $b$ scales the rows of $B$, $d$ its columns.


# %%
def forward(x, W, A, B, b, d):
    h = x @ A.T  # (N, r) F1
    y = x @ W.T + h @ (b[:, None] * B * d).T  # (N, d_out) F2
    return y, h


# %% [markdown]
# ## Backward, line by line
#
# **B1.** First what $C$ receives, as if it were a weight: $C_{ik}$ stands in output $i$ of each row $n$, beside
# $h_{nk}$.
#
# $$G_{ik} = \sum_n dy_{ni}\, h_{nk} \qquad\Rightarrow\qquad G = dy^\top h$$
#
# **B2.** $b_i$ is in row $i$ of $C$ alone, with the factor $B_{ik} d_k$:
#
# $$db_i = \sum_k G_{ik}\, B_{ik} d_k$$
#
# **B3.** $d_k$ is in column $k$ of $C$ alone, with the factor $b_i B_{ik}$:
#
# $$dd_k = \sum_i G_{ik}\, b_i B_{ik}$$
#
# **B4.** $h_{nk}$ reaches $y_{ni}$ through $C_{ik}$:
#
# $$dh_{nk} = \sum_i dy_{ni}\, C_{ik} \qquad\Rightarrow\qquad dh = dy\,C$$
#
# **B5.** $x$ reaches $y$ through $W$, and $h$ through $A$: $\;dx = dy\,W + dh\,A$.


# %%
def backward(dy, h, W, A, B, b, d):
    G = dy.T @ h  # (d_out, r) B1
    db = (G * (B * d)).sum(axis=1)  # (d_out,) B2
    dd = (G * (b[:, None] * B)).sum(axis=0)  # (r,) B3
    dh = dy @ (b[:, None] * B * d)  # (N, r) B4
    dx = dy @ W + dh @ A  # (N, d_in) B5
    return {"x": dx, "b": db, "d": dd}


# %%
N, d_in, d_out, r = 5, 7, 6, 4
rng = np.random.default_rng(0)
x, W, dy = (rng.standard_normal(shape) for shape in [(N, d_in), (d_out, d_in), (N, d_out)])
A, B, b, d = (rng.standard_normal(shape) for shape in [(r, d_in), (d_out, r), d_out, r])


def loss(x, b, d):
    return (dy * forward(x, W, A, B, b, d)[0]).sum()


def check(b, d, title, wrong=lambda grads: grads):
    _, h = forward(x, W, A, B, b, d)
    return gradcheck(
        loss, wrong(backward(dy, h, W, A, B, b, d)), {"x": x, "b": b, "d": d}, title
    )


print(check(b, d, "VeRA, by hand"))

# %% [markdown]
# And against the library, to the bit:

# %%
vera, p = methods.create("vera", r=r), Saved(A=A, B=B, b=b, d=d)
y, saved = vera.forward(x, W, p)
dx, grads = vera.backward(dy, Saved(saved), W, p)
mine = backward(dy, saved["h"], W, A, B, b, d)
print(
    (mine["x"] == dx).all(),
    (mine["b"] == grads["b"]).all(),
    (mine["d"] == grads["d"]).all(),
)

# %% [markdown]
# ## The first step, and the blind spot once more
#
# At the start $b = 0$ and $d = 0.1$. B3 has the factor $b_i$ in every term: $dd = 0$ *exactly*. B2 has none: $b$
# moves first. So at the initial point a wrong $dd$ passes the check, just as LoRA's $dA$ did:

# %%
doubled = lambda grads: {**grads, "d": 2.0 * grads["d"]}
print(check(np.zeros(d_out), np.full(r, 0.1), "dd twice too large, at b = 0", doubled))
report = check(b, d, "dd twice too large, off the initial point", doubled)
plots.show(
    plots.gradient_report(report),
    "x and b are right to rounding; d is wrong by a relative error of one, by both "
    "methods.",
)

# %% [markdown]
# Off the initial point it is caught. The library's own check moves off by itself: `check_method(vera)` says
# *random point*.
#
# How long does the start stay blind? A `Trial` is a method on one small layer with random data, in float64.
# `after(steps)` is a copy of it after so many steps of Adam, and `grads` are its gradients there:

# %%
print(str(check_method(vera)).splitlines()[0])
start = Trial(methods.create("vera", r=3))
for steps in (0, 1, 2):
    trial = start.after(steps)
    dd, db = (np.linalg.norm(grad) for grad in (trial.grads.d, trial.grads.b))
    print(f"steps taken: {steps}   |dd| = {dd:.3f}, |db| = {db:.3f}")

# %% [markdown]
# ## What is kept for backward
#
# B1 to B5 use $h$, and never $x$: $A$ is frozen, so nobody asks for $dA = dh^\top x$. VeRA keeps $h\,(N, r)$ alone.
#
# That takes the right formulas. Write VeRA from elementary operations, as one would without a thought, and the engine
# keeps more: $b$'s gradient then wants the product $q = (d \circ h) B^\top$ of $N \times d_\text{out}$ numbers.

# %%
rows = 64
tensor = lambda array: minilora.Tensor(array, requires_grad=True)
X, b_, d_ = tensor(rng.standard_normal((rows, d_in))), tensor(b), tensor(d)
z = (X @ minilora.Tensor(A.T)) * d_
q = z @ minilora.Tensor(B.T)
naive = [(e.operation, e.shape) for e in ledger(q * b_) if e.shape[0] == rows]
print("operation by operation:", *naive)
print(
    "methods/vera.py:       ",
    *[("vera", a.shape) for a in vera.forward(X.data, W, p)[1].values()],
)

# %% [markdown]
# B1 sums over the tokens *first*, and so never needs $q$. But $N r$ is small only where $r$ is. The whole model, 8 × 64
# characters:

# %%
folio, tokenizer = load_corpus("folio"), CharTokenizer()
ids = tokenizer.encode(folio.train)
inputs, targets = next(random_batches(ids, 8, 64, np.random.default_rng(0)))


def kept_by(name, **options):
    """MiB kept for backward by the model, with the method on all linear layers."""
    model = minilora.adapt(minilora.pretrained(), name, verbose=False, **options)
    return minilora.kept_bytes(model.loss(inputs, targets), model) / 2**20


kept = {f"lora, r = {r}": kept_by("lora", r=r) for r in (1, 8)}
kept |= {f"vera, r = {r}": kept_by("vera", r=r) for r in (16, 64, 128, 256)}
plots.show(
    plots.bars(kept, title="Kept for backward, whole model", xlabel="MiB"),
    "VeRA at rank 16 and 64 keeps less than LoRA, at rank 128 a little less, at rank 256 "
    "more.",
)

# %% [markdown]
# LoRA keeps $x$ whatever its rank. VeRA keeps $h$, so each further 64 of rank costs 3 MiB here; at 256, PEFT's default,
# it keeps *more* than LoRA. From which rank $r'$ on? Count one block, of width $d$, in numbers for each token. q, k and
# v share one $x$, of `o` and `up` there is one each, and that of `down` is $4d$ wide: $7d$ in all. There are six $h$:
#
# $$6 r' > 7 d + 6 r \qquad\Leftrightarrow\qquad r' > \tfrac{7}{6}\, d + r .$$
#
# For $d = 128$ and LoRA's $r = 8$ that is 157.3:

# %%
for name, rank in [("vera", 157), ("lora", 8), ("vera", 158)]:
    print(f"{name}, r = {rank:<4} keeps {kept_by(name, r=rank):.3f} MiB")

# %% [markdown]
# VeRA saves where $r$ is small beside the width, as in a large model.
#
# The rank is not free in time either: F1 and F2 cost $N r\,(d_\text{in} + d_\text{out})$ multiplications beside the
# layer's own $N d_\text{in} d_\text{out}$. At $r = 128$ on a layer of 128 × 128 that is twice the layer.
#
# ## The matrices of PEFT, from a key
#
# $A$ and $B$ need not be stored: a key, `projection_prng_key`, gives them back, if everybody draws in the same way.
# PEFT lets PyTorch's CPU generator draw, which is the Mersenne Twister MT19937. NumPy has it as well, so the numbers
# can be made without PyTorch:
#
# 1. seed the generator with the key, and take raw numbers of 32 bits;
# 2. the lower 24 bits, times $2^{-24}$, are uniform in $[0, 1)$: as many bits as a float32 holds;
# 3. stretch to $\pm\sqrt{3}\,\sqrt{2} / \sqrt{\text{columns}}$, Kaiming's bound; first $A$, then $B$, from one stream.


# %%
def draw(stream, rows, columns):
    raw = np.frombuffer(stream.bytes(4 * rows * columns), "<u4")
    unit = (raw & 0xFFFFFF) * 2.0**-24
    bound = np.float32(math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(columns))
    return (
        (unit * float(2 * bound) - float(bound)).astype(np.float32).reshape(rows, columns)
    )


stream = np.random.RandomState(7)
A7, B7 = draw(stream, 4, 6), draw(stream, 5, 4)
library = methods.create("vera", r=4, projection_prng_key=7).init_shared([(5, 6)], None)
print(
    "as the library draws:",
    np.array_equal(A7, library["A"]),
    np.array_equal(B7, library["B"]),
)

# PEFT 0.21.2, key 7, r = 4 on Linear(6, 5): vera_A[0]
peft = [0.0698, -0.6024, 0.3184, 0.3138, -0.5345, -0.1499]
print("as PEFT draws:       ", np.allclose(A7[0], peft, atol=5e-5))

# %% [markdown]
# (All digits are compared with PEFT in the project's tests.) The catch: the stream is cut into rows, so one wider
# layer among the targets changes *all* entries. A key alone means nothing without the largest shapes.
#
# ## The start of d is a learning rate in disguise
#
# The paper starts $d$ at 0.1 and finds 1.0 much worse. What does this start do? Only the product of $b$ and $d$
# counts. Let $d = c\,d'$ and $b = b' / c$: the function is the same. Under Adam, which moves each entry by its rate,
# all is as before if $d$ moves $c$ times faster and $b$ $c$ times slower.


# %%
class Larger(methods.get("vera")):
    """VeRA that starts d at ten times the usual, with the rates that make up for it."""

    def lr_scale(self, name):
        return {"d": 10.0, "b": 0.1}[name]


usual = Trial(methods.create("vera", r=3, d_initial=0.1)).after(20, lr=0.02, eps=1e-30)
larger = Trial(Larger(r=3, d_initial=1.0)).after(20, lr=0.02, eps=1e-30)
moved, apart = (abs(usual.merged - other).max() for other in (usual.W0, larger.merged))
print(f"the merged weights moved by {moved:.2f} and differ by {apart:.0e}")

# %% [markdown]
# So with *one* rate $\eta$ for both, $d = 1.0$ at the start is VeRA with $d = 0.1$ where $d$'s rate is $\eta / 10$
# and $b$'s is $10\,\eta$. With $\eta$ ten times smaller, $b$ is as before and $d$ moves a hundred times less,
# relative to its size: it hardly learns. At $d = 0.1$ and $\eta = 0.1$ it can change its sign in the first steps. The
# start says how much $d$ takes part.
#
# ## At equal trained numbers
#
# Now the real task: q and v of the shipped model, 30 steps on the Folio. LoRA with $r = 1$ trains 8 layers × (128 +
# 128) = 2,048 numbers; VeRA with $r = 128$ trains 8 × (128 + 128), just as many. Beside them:
#
# - VeRA at a small rank, with about half the numbers
# - VeRA with $d = 1.0$ at the start
# - VeRA with matrices of its own for each layer, *not* shared: the paper finds no difference
#
# Each gets three rates and two seeds; seeds draw the batches and the matrices.


# %%
VeRA = methods.get("vera")


class Unshared(VeRA):
    """VeRA with its own A and B in each layer."""

    def init_shared(self, shapes, rng):
        return {}

    def init(self, W, rng, shared):
        arrays, _ = super().init(W, rng, shared)
        uniform = lambda rows, columns: (
            rng.uniform(-1, 1, (rows, columns)) * math.sqrt(6 / columns)
        )
        return arrays, {"A": uniform(self.r, W.shape[1]), "B": uniform(W.shape[0], self.r)}


held_out = fixed_batches(tokenizer.encode(folio.val), batch=32, context=64, limit=64)


def tuned(method, lr, seed, steps=30):
    """(held-out loss in nats per character, trained numbers) after ``steps``."""
    model = minilora.adapt(
        minilora.pretrained(), method(seed), ["q", "v"], seed=seed, verbose=False
    )
    optimizer = minilora.AdamW(model.trainable(), lr=lr, clip=1.0)
    batches = random_batches(ids, batch=4, context=64, rng=np.random.default_rng(seed))
    minilora.train(model, optimizer, batches, steps, warmup=5)
    return minilora.evaluate(model, held_out), minilora.count_parameters(model)[0]


variants = {
    "LoRA, r = 1": (lambda seed: methods.create("lora", r=1), [0.005, 0.01, 0.02]),
    "VeRA, r = 128": (lambda seed: VeRA(r=128, projection_prng_key=seed), [0.05, 0.1, 0.2]),
    "VeRA, r = 16": (lambda seed: VeRA(r=16, projection_prng_key=seed), [0.1, 0.2, 0.4]),
    "VeRA, r = 128, d = 1.0": (
        lambda seed: VeRA(128, d_initial=1.0, projection_prng_key=seed),
        [0.05, 0.1, 0.2],
    ),
    "VeRA, r = 128, not shared": (lambda seed: Unshared(r=128), [0.05, 0.1, 0.2]),
}
runs = [
    (name, lr, seed)
    for name, (_, grid) in variants.items()
    for lr in grid
    for seed in (0, 1)
]
results = {run: tuned(variants[run[0]][0], *run[1:]) for run in tqdm(runs, leave=False)}

# %%
model = minilora.pretrained()
print(f"before: {minilora.evaluate(model, held_out):.3f} nats per character")
print(f"{'':<27}{'trained':>8}   mean loss of two seeds at each rate")
best = {}
for name, (_, grid) in variants.items():
    losses = {lr: [results[name, lr, seed][0] for seed in (0, 1)] for lr in grid}
    best[name] = min(losses.values(), key=np.mean)
    table = "   ".join(f"{lr:<6} {np.mean(pair):.3f}" for lr, pair in losses.items())
    print(f"{name:<27}{results[name, grid[0], 0][1]:>8,}   {table}")

# %%
before = minilora.evaluate(model, held_out)
plots.show(
    plots.bars(
        {name: [before - loss for loss in pair] for name, pair in best.items()},
        title="Learnt in 30 steps, mean ± deviation of 2 seeds",
        xlabel="fall of the held-out loss, nats per character",
    ),
    "VeRA at rank 128 learns about as much as LoRA at rank 1 with as many numbers; at rank "
    "16 it learns less.",
)

# %% [markdown]
# What this shows:
#
# - **At equal numbers VeRA equals LoRA here.** They differ by 0.003, less than LoRA's own two seeds do.
# - With about half the numbers VeRA learns a tenth less.
# - $d = 1.0$ at the start is worse also at its own best rate, by an eighth: the paper's direction, not its extent.
# - Matrices of its own for each layer gain nothing: sharing costs nothing. So the paper found.
#
# And what it does not: that VeRA equals a LoRA *with many more numbers*. On the long runs of [the
# comparison](../docs/compare.md) it does not; there LoRA at $r = 8$ trains twelve times its numbers and learns
# clearly more. Also, two seeds are few, and the rates were chosen on the text that the losses are reported on, alike
# for all.
#
# ## Exercises
#
# **1.** How many numbers does VeRA train in a model?


# %%
def trained_numbers(shapes, r):
    """Trained numbers of VeRA at rank r in layers of ``shapes``, [(d_out, d_in), …]."""
    ...


# %%
assess(
    "numbers that VeRA trains",
    trained_numbers,
    ("each layer has its own d (r,) and b (d_out,)", lambda f: f([(6, 7)], 4) == 10),
    (
        "add up the layers; A and B are not trained",
        lambda f: f(layers, 64) == sum(64 + m for m, _ in layers),
    ),
    ("d_in does not matter", lambda f: f([(6, 7)], 4) == f([(6, 70)], 4)),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def trained_numbers(shapes, r):
#     return sum(r + d_out for d_out, d_in in shapes)
# ```
# </details>
#
# **2.** The paper scales $h$ first and multiplies afterwards: $z = d \circ h$, $q = z B^\top$,
# $y = x W^\top + b \circ q$. Derive $dd$ in that order, from $dz$, without $G$.


# %%
def dd_by_tokens(dy, h, B, b):
    """dd (r,) by way of dz (N, r) = the gradient that arrives at z = d ∘ h."""
    ...


# %%
assess(
    "dd in the paper's order",
    dd_by_tokens,
    ("dd has the shape (r,)", lambda f: f(dy, saved["h"], B, b).shape == (r,)),
    ("q receives dy ∘ b, z receives that times B; then d_k multiplies h_nk in every row",
     lambda f: np.allclose(f(dy, saved["h"], B, b), mine["d"])),
)  # fmt: skip

# %% [markdown]
# <details><summary>Solution</summary>
#
# $dq = dy \circ b$, $dz = dq\,B$, and $dd_k = \sum_n dz_{nk} h_{nk}$.
#
# ```python
# def dd_by_tokens(dy, h, B, b):
#     return (((dy * b) @ B) * h).sum(axis=0)
# ```
# </details>
#
# **3.** What if $A$ were trained, too? Give $dA$, and note what would have to be kept.


# %%
def dA_if_trained(dy, x, B, b, d):
    """dA (r, d_in) of VeRA's forward pass."""
    ...


# %%
def dA_error(f):
    loss = lambda A: (dy * forward(x, W, A, B, b, d)[0]).sum()
    return gradcheck(loss, {"A": f(dy, x, B, b, d)}, {"A": A}).worst_error


assess(
    "dA, if A were trained",
    dA_if_trained,
    (
        "A_kj multiplies x_nj and reaches L through h_nk, which receives B4",
        lambda f: dA_error(f) < 1e-7,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# $dA = dh^\top x$, LoRA's B3. It needs $x\,(N, d_\text{in})$, which VeRA does not keep.
#
# ```python
# def dA_if_trained(dy, x, B, b, d):
#     return (dy @ (b[:, None] * B * d)).T @ x
# ```
# </details>
#
# **4.** $d$ shall start $c$ times larger, and training shall stay the same under Adam. By which factors do the rates
# of $d$ and $b$ change?


# %%
def rate_factors(c):
    """(factor on the rate of d, factor on the rate of b)."""
    ...


# %%
def stays_the_same(f, c):
    class Rescaled(VeRA):
        def lr_scale(self, name):
            return float(f(c)[0] if name == "d" else f(c)[1])

    a = Trial(VeRA(r=3, d_initial=0.1)).after(5, lr=0.02, eps=1e-30)
    b = Trial(Rescaled(r=3, d_initial=0.1 * c)).after(5, lr=0.02, eps=1e-30)
    return Trial.same(a.merged, b.merged)


assess(
    "another start of d",
    rate_factors,
    (
        "d is c times larger and must move c times as far",
        lambda f: math.isclose(f(4.0)[0], 4.0),
    ),
    ("b is then c times smaller at the same function", lambda f: stays_the_same(f, 4.0)),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rate_factors(c):
#     return c, 1.0 / c
# ```
# </details>
#
# **Next:** [07 · Delta-LoRA](07_delta_lora.ipynb) moves the frozen weight after all, and finds out what that comes to.
