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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/03_lora.ipynb)
#
# # 03 · LoRA
#
# Fine-tuning moves every weight, but the move itself has few directions that matter. LoRA trains only a product of
# two thin matrices beside each frozen weight. Here you see why that can work, derive its gradient line by line, and
# find a place where a gradient check lets a wrong line pass.
#
# **After this you can**
#
# - derive the six lines of LoRA, F1, F2 and B1 to B4, and write them in NumPy
# - say why a check at $B = 0$ proves nothing about $dA$, and check where it does
# - explain how a matrix of zeros can learn, and when it cannot
# - predict what $\alpha$, $r$ and the draw of $A$ do to the size of a step
# - say how exact a merged weight is in float32, float16 and bfloat16
#
# Read before: [01 · the engine](01_engine.ipynb) and [02 · the transformer](02_transformer.ipynb), or be at home with
# the chain rule for $y = x W^\top$.

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora
import math
import warnings

import numpy as np
from tqdm import tqdm

import minilora
from minilora import methods, plots
from minilora.data import CharTokenizer, fixed_batches, load_corpus, random_batches
from minilora.engine import Saved
from minilora.surgery import adapted_layers
from minilora.tools.exercises import assess
from minilora.tools.gradcheck import gradcheck
from minilora.tools.trial import Trial

# %% [markdown]
# ## What does full fine-tuning learn?
#
# The shipped model has read Shakespeare in modern spelling. We tune *all* numbers of its linear layers on the First
# Folio's spelling of 1623 for 40 steps, and look at what changed: $\Delta W = W_\text{after} - W_\text{before}$.

# %%
folio, tokenizer = load_corpus("folio"), CharTokenizer()
ids = tokenizer.encode(folio.train)
held_out = fixed_batches(tokenizer.encode(folio.val), batch=32, context=64, limit=64)


def tune(model, lr, steps=40, seed=0):
    """Train what ``model`` lets us train on the Folio: the losses, step by step."""
    batches = random_batches(ids, batch=8, context=64, rng=np.random.default_rng(seed))
    optimizer = minilora.AdamW(model.trainable(), lr=lr, clip=1.0)
    return minilora.train(model, optimizer, batches, steps, warmup=5).loss


model = minilora.pretrained()
before = minilora.evaluate(model, held_out)
minilora.adapt(model, "full")
tune(model, lr=0.001)
print(
    f"held-out loss {before:.3f} → {minilora.evaluate(model, held_out):.3f} "
    "nats per character"
)

# %%
layers = adapted_layers(model)
changes = {path: layer.p.W - layer.base.W.data for path, layer in layers.items()}
kinds = ["q", "k", "v", "o", "up", "down"]
length = lambda path: (
    np.linalg.norm(changes[path]) / np.linalg.norm(layers[path].base.W.data)
)
moved = np.array([[length(f"blocks.{i}.{kind}") for kind in kinds] for i in range(4)])
plots.show(
    plots.heat_map(
        100 * moved,
        "How far each weight moved",
        "layer",
        "block",
        diverging=False,
        unit="‖ΔW‖ in % of ‖W‖",
        xticks=kinds,
        yticks=range(4),
    ),
    "A table of 4 blocks by 6 layers: every weight moves, by 6 to 16 % of its length, v "
    "and o of block 0 most.",
)

# %% [markdown]
# Every weight moves, by 6 to 16 % of its length; values and outputs of the first block move most. The change is small.
# Is it also simple? Its singular values answer.

# %%
shown = {path: changes[path] for path in ["blocks.0.q", "blocks.2.v", "blocks.1.o"]}
noise = np.random.default_rng(0).standard_normal((128, 128))
shown["random, as long as q"] = (
    noise * np.linalg.norm(changes["blocks.0.q"]) / np.linalg.norm(noise)
)
plots.show(
    plots.singular_values(shown, title="What full fine-tuning changed, by direction"),
    "Singular values of three weight changes fall fast, those of a random matrix of the "
    "same size hardly fall.",
)

# %% [markdown]
# The first directions carry far more than the later ones. A random matrix of the same length has no such head. But the
# change has full rank, 128 (the figure shows the first 32 values), and "low rank" is an approximation.
#
# How good is it? Keep only the $k$ largest directions of each layer's change, throw the rest away, and measure the
# loss. As a control, keep $k$ *random* directions of the input instead.

# %%
ranks, rng = [1, 2, 4, 8, 16, 32, 64, 128], np.random.default_rng(0)
svd = {path: np.linalg.svd(change, full_matrices=False) for path, change in changes.items()}
best, random = [], []
for k in ranks:
    for path, layer in layers.items():
        U, sigma, Vt = svd[path]
        layer.arrays.W.data = layer.base.W.data + (U[:, :k] * sigma[:k]) @ Vt[:k]
    best.append(minilora.evaluate(model, held_out))
    for path, layer in layers.items():
        Q = np.linalg.qr(rng.standard_normal((changes[path].shape[1], k)))[0].astype(
            np.float32
        )
        layer.arrays.W.data = layer.base.W.data + changes[path] @ Q @ Q.T
    random.append(minilora.evaluate(model, held_out))
share = (before - best[ranks.index(8)]) / (before - best[-1])
print(f"the 8 best directions of each layer hold {100 * share:.0f} % of what was learnt")

# %%
plots.show(
    plots.lines(
        {
            "the k largest directions": (ranks, best),
            "k random directions": (ranks, random),
            "none: before tuning": ([1, 128], [before, before]),
            "all of them": ([1, 128], [best[-1], best[-1]]),
        },
        title="How many directions of the change are needed?",
        xlabel="k, directions kept in each layer",
        ylabel="held-out loss, nats per character",
        logx=True,
    ),
    "With the largest directions the loss falls quickly and is flat from 16 on; with "
    "random ones it falls slowly, and at 128 is still a little above that of all.",
)

# %% [markdown]
# A few *well chosen* directions nearly do; a few random ones do not. (Even 128 random ones fall a little short: `down`
# has 512 inputs, and so 512 directions.) LoRA's bet is that training can find the directions by itself. It is a bet on
# the task: this one is a small change of a model that knows English already.
#
# ## The forward pass
#
# The weight stays frozen, and the change is a product of two thin matrices:
#
# $$W' = W + s\,B A, \qquad s = \alpha / r$$
#
# with $W\,(d_\text{out}, d_\text{in})$, $A\,(r, d_\text{in})$ and $B\,(d_\text{out}, r)$. Rows of
# $x\,(N, d_\text{in})$ are tokens. The formulas go to rank $r$ first, and do not form $BA$:
#
# | | in matrices | entry by entry | shape |
# | --- | --- | --- | --- |
# | **F1** | $h = x A^\top$ | $h_{nk} = \sum_j x_{nj} A_{kj}$ | $(N, r)$ |
# | **F2** | $y = xW^\top + shB^\top$ | $y_{ni} = \sum_j x_{nj} W_{ij} + s\sum_k h_{nk} B_{ik}$ | $(N, d_\text{out})$ |


# %%
def forward(x, W, A, B, s):
    h = x @ A.T  # (N, r) F1
    y = x @ W.T + h @ (s * B).T  # (N, d_out) F2
    return y, h


# %% [markdown]
# That is $N r (d_\text{in} + d_\text{out})$ multiplications, on top of the $N d_\text{in} d_\text{out}$ of the frozen
# weight. Forming $BA$ would take $r\, d_\text{in} d_\text{out}$ of them and a matrix as large as $W$, in every step.
#
# How many numbers are trained? $r\,(d_\text{in} + d_\text{out})$ instead of $d_\text{in} d_\text{out}$. GPT-2 medium has
# 24 blocks of width 1024; with $r = 4$ on q and v that makes:

# %%
r, d = 4, 1024
print(f"GPT-2 medium, r = 4 on q and v: {24 * 2 * r * (d + d):,} numbers")
print(
    f"one 1024 × 1024 weight: {d * d:,}, its LoRA with r = 8: {8 * (d + d):,} "
    f"({100 * 16 / d:.1f} %)"
)
shipped = minilora.adapt(minilora.pretrained(), "lora", r=8)

# %% [markdown]
# (The paper's table prints 0.35 M for the first; the formula gives 0.39 M. Recount what you cite.)
#
# ## The backward pass, line by line
#
# $dy_{ni} = \partial L / \partial y_{ni}$ arrives. Every line asks the same: *which entries of $y$ does this number
# reach, and by what factor?* Then it sums over all that it reaches.
#
# **B1.** $h_{nk}$ occurs in row $n$ of $y$ alone, in each output $i$, with the factor $s B_{ik}$ (see F2):
#
# $$dh_{nk} = \sum_i dy_{ni}\, s B_{ik} \quad\Rightarrow\quad dh = dy\,(sB)$$
#
# **B2.** $B_{ik}$ occurs in output $i$ alone, in each row $n$, with the factor $s\,h_{nk}$:
#
# $$dB_{ik} = \sum_n dy_{ni}\, s\, h_{nk} \quad\Rightarrow\quad dB = dy^\top (s h)$$
#
# **B3.** $A_{kj}$ reaches $L$ only through $h_{nk}$, in each row $n$, with the factor $x_{nj}$ (see F1):
#
# $$dA_{kj} = \sum_n dh_{nk}\, x_{nj} \quad\Rightarrow\quad dA = dh^\top x$$
#
# **B4.** $x_{nj}$ reaches $L$ in two ways, so two gradients are *added*: through $W_{ij}$, and through $h_{nk}$ with
# the factor $A_{kj}$:
#
# $$\begin{aligned}
# dx_{nj} = \sum_i dy_{ni} W_{ij} &+ \sum_k dh_{nk} A_{kj} \\
# \Rightarrow\quad dx = dy\,W &+ dh\,A
# \end{aligned}$$


# %%
def backward(dy, x, h, W, A, B, s):
    dh = dy @ (s * B)  # (N, r) B1
    dB = dy.T @ (s * h)  # (d_out, r) B2
    dA = dh.T @ x  # (r, d_in) B3
    dx = dy @ W + dh @ A  # (N, d_in) B4
    return {"x": dx, "A": dA, "B": dB}


# %% [markdown]
# What must be kept between the two passes? The right sides name it: $x$ for B3 and $h$ for B2. There is no $dW$, and so
# no gradient of $d_\text{out} \times d_\text{in}$ numbers.
#
# Is it right? Compare every entry with finite differences. The loss $L = \sum_{ni} dy_{ni}\, y_{ni}$ has the gradient
# $dy$ for $y$.

# %%
N, d_in, d_out, r, s = 5, 7, 6, 3, 2.0
rng = np.random.default_rng(0)
x, W, dy = (rng.standard_normal(shape) for shape in [(N, d_in), (d_out, d_in), (N, d_out)])
A, B = rng.standard_normal((r, d_in)), rng.standard_normal((d_out, r))


def loss(x, A, B):
    return (dy * forward(x, W, A, B, s)[0]).sum()


def check(A, B, backward=backward, title="LoRA, by hand"):
    _, h = forward(x, W, A, B, s)
    return gradcheck(loss, backward(dy, x, h, W, A, B, s), {"x": x, "A": A, "B": B}, title)


print(check(A, B))

# %% [markdown]
# And it is what `minilora/methods/lora.py` computes, to the bit:

# %%
lora = methods.create("lora", r=r, alpha=s * r)
p = Saved(A=A, B=B)
y, saved = lora.forward(x, W, p)
dx, grads = lora.backward(dy, Saved(saved), W, p)
mine = backward(dy, x, saved["h"], W, A, B, s)
print(
    (mine["x"] == dx).all(),
    (mine["A"] == grads["A"]).all(),
    (mine["B"] == grads["B"]).all(),
)

# %% [markdown]
# One more way to see B2 and B3: the full gradient is $dW' = dy^\top x$, and $dB = s\,dW' A^\top$,
# $dA = s\,B^\top dW'$. So $B$ sees the full gradient through the $r$ directions of $A$, and the other way round.
# True, but not the way to compute it: $dW'$ is the large product that LoRA avoids.

# %%
dW = dy.T @ x
print(np.allclose(mine["B"], s * dW @ A.T), np.allclose(mine["A"], s * B.T @ dW))

# %% [markdown]
# ## Watch the check miss an error
#
# Put a factor 7 into B3. At the start of training, $B = 0$:


# %%
def seven(dy, x, h, W, A, B, s):
    grads = backward(dy, x, h, W, A, B, s)
    return {**grads, "A": 7.0 * grads["A"]}


zero = np.zeros_like(B)
print(check(A, zero, seven, "dA seven times too large, at B = 0"))

# %% [markdown]
# It passes. With $B = 0$ we have $dh = dy\,(sB) = 0$ and $dA = 0$; seven times zero is zero. The report calls it a
# *blind spot*: the numeric gradient is zero everywhere, so nothing could be proved. Move off that point:

# %%
report = check(A, B, seven, "dA seven times too large, off the initial point")
print(report)

# %%
plots.show(
    plots.gradient_report(report),
    "x and B are right to rounding and far left of the tolerance; A is wrong by a relative "
    "error of six.",
)

# %% [markdown]
# The error for $A$ is 6, and the guess names the factor. minilora's own check of a method, `gradcheck.check_method`,
# therefore takes a random point unless told otherwise. Which mistakes does each point catch? Four typical ones:

# %%
mistakes = {
    "s forgotten in dB": lambda g: {**g, "B": g["B"] / s},
    "dA seven times too large": lambda g: {**g, "A": 7.0 * g["A"]},
    "sign of dA flipped": lambda g: {**g, "A": -g["A"]},
    "dh A forgotten in dx": lambda g: {**g, "x": dy @ W},
}
print(f"{'':<28}at B = 0   at random B")
for name, mistake in mistakes.items():
    wrong = lambda *args, mistake=mistake: mistake(backward(*args))
    verdicts = ["missed" if check(A, point, wrong) else "caught" for point in (zero, B)]
    print(f"{name:<28}{verdicts[0]:<11}{verdicts[1]}")

# %% [markdown]
# Three of four pass at $B = 0$: all that goes through $dh$.
#
# ## How can a matrix of zeros learn?
#
# $B = 0$ makes the adapted model *equal* to the base model at step 0. B2 says why it learns all the same:
# $dB = dy^\top (s h)$ does not contain $B$. It contains $h = x A^\top$, and $A$ is random.
#
# `Trial` is a small layer to watch it on: random $x$, $W$ and targets $c$, the loss $\lVert y - c\rVert^2 / 2$, and Adam.
# Printed are the lengths of $B$ and of the two gradients, $|B| = \sqrt{\sum_{ik} B_{ik}^2}$, and the loss.

# %%
start = Trial(methods.create("lora", r=3))
print(f"{'':<14}{'|B|':>8}{'|dA|':>8}{'|dB|':>8}{'loss':>8}")
for steps in range(4):
    trial = start.after(steps)
    sizes = [np.linalg.norm(array) for array in (trial.p.B, trial.grads.A, trial.grads.B)]
    loss_now = ((trial.x @ trial.merged.T - trial.c) ** 2).sum() / 2
    print(
        f"after {steps} steps "
        f"{sizes[0]:>8.2f}{sizes[1]:>8.1f}{sizes[2]:>8.1f}{loss_now:>8.1f}"
    )

# %% [markdown]
# At step 1 only $B$ moves; from step 2 on, both. With *both* at zero, $dA = 0$ and $dB = 0$, for ever. With both
# random, training begins at another model than the base. Four starts on the real task:

# %%
LoRA = methods.get("lora")


def started(scale_A, scale_B):
    """LoRA whose A and B are drawn with entries in ±scale / √columns."""

    class Start(LoRA):
        def init(self, W, rng, shared):
            draw = lambda shape, scale: (
                scale * rng.uniform(-1, 1, shape) / math.sqrt(shape[1])
            )
            return {
                "A": draw((self.r, W.shape[1]), scale_A),
                "B": draw((W.shape[0], self.r), scale_B),
            }, {}

    return Start()


curves = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    starts = {"B = 0": (1, 0), "A = 0": (0, 1), "both random": (1, 1), "both zero": (0, 0)}
    for name, scales in tqdm(starts.items(), leave=False):
        model = minilora.adapt(minilora.pretrained(), started(*scales), verbose=False)
        curves[name] = tune(model, lr=0.005, steps=25)
for name, losses in curves.items():
    print(f"{name:<12} loss, mean of the last three steps: {np.mean(losses[-3:]):.2f}")
for warning in caught:
    print(f"{type(warning.message).__name__}: … {str(warning.message).partition(': ')[2]}")

# %%
plots.show(
    plots.loss_curves(
        curves, title="Four starts of LoRA", ylabel="loss, nats per character", smooth=3
    ),
    "B = 0 and A = 0 begin at the base model and learn; both random begins higher; both "
    "zero only follows the noise.",
)

# %% [markdown]
# *Both zero* learns nothing: its curve is the base model's loss from batch to batch, and the training loop warns of
# it. $A = 0$ with a random $B$ learns too; from step 11 on its loss is a little higher than in the usual order, 1.84
# against 1.80 at the end. That is one run of each, and the two draws differ in size: the entries of $B$ are up to
# $1/\sqrt 8$, those of $A$ up to $1/\sqrt{128}$, or to $1/\sqrt{512}$ in `down`. What that does to a step is seen below.
# *Both random* starts far above the base model and has to repair first.
#
# ## What α / r does as r grows
#
# Adam's first step moves every entry of $B$ by the learning rate $\eta$, whatever the gradient's size:
# $\Delta B_{ik} = -\eta\, \mathrm{sign}(dB_{ik})$. The output then moves by
#
# $$\Delta y_{ni} = s \sum_{k=1}^{r} \Delta B_{ik}\, h_{nk}$$
#
# a sum of $r$ terms. Do they add up like $r$ or like $\sqrt r$? That depends on whether their signs agree. For a
# token that *made* the gradient they do; for a token that had no part in it they are random. Measure both:


# %%
def step_size(r, new_token, factor, d=256, tokens=256, lr=0.001):
    """Deviation of Δy after Adam's first step of B, with s = factor(r)."""
    rng = np.random.default_rng(0)
    A = rng.uniform(-1, 1, (r, d)) / math.sqrt(d)
    x, dy = rng.standard_normal((tokens, d)), rng.standard_normal((tokens, d))
    if not new_token:
        x, dy = x[:1], dy[:1]  # one token makes the gradient, and is asked again
    dB = dy.T @ (x @ A.T)
    asked = rng.standard_normal((tokens, d)) if new_token else x
    return (factor(r) * asked @ A.T @ (-lr * np.sign(dB)).T).std()


ranks, alpha = [1, 4, 16, 64, 256], 16
rules = {"α / r": lambda r: alpha / r, "α / √r": lambda r: alpha / math.sqrt(r)}
sizes = {
    f"{rule}, {token}": (
        ranks,
        [step_size(r, token == "new tokens", factor) for r in ranks],
    )
    for token in ("new tokens", "the same token")
    for rule, factor in rules.items()
}
plots.show(
    plots.lines(
        sizes,
        title="One step of B: how far the output moves",
        xlabel="rank r",
        ylabel="deviation of Δy",
        logx=True,
        logy=True,
    ),
    "For new tokens alpha over root r is flat and alpha over r falls; for the same token "
    "alpha over r is flat.",
)

# %% [markdown]
# Both camps are right about something. For the token that made the gradient, $\alpha / r$ keeps the step's size as
# $r$ grows, which is what the LoRA paper (section 4.1) wants: no new learning rate for a new rank. For new tokens
# $\alpha / r$ shrinks it like $1/\sqrt r$, and rsLoRA's $\alpha / \sqrt r$ keeps it, but lets it grow for the same token.
# Which of the two a text is like, this does not tell. rsLoRA is nothing but LoRA with $\alpha \sqrt r$:

# %%
a = start.of("rslora", r=3, alpha=16.0).after(5)
b = start.of("lora", r=3, alpha=16.0 * math.sqrt(3)).after(5)
print(f"difference of the merged weights: {abs(a.merged - b.merged).max():.0e}")

# %% [markdown]
# What remains of it in training? One rate, a small and a large rank, $\alpha$ chosen so that both rules agree at
# $r = 8$:

# %%
alphas, losses = {"lora": 16.0, "rslora": 16.0 / math.sqrt(8)}, {}
for r, name, seed in tqdm(
    [(r, name, seed) for r in (2, 64) for name in alphas for seed in (0, 1)], leave=False
):
    model = minilora.adapt(
        minilora.pretrained(), name, seed=seed, verbose=False, r=r, alpha=alphas[name]
    )
    tune(model, lr=0.005, steps=25, seed=seed)
    losses[r, name, seed] = minilora.evaluate(model, held_out)
print(f"{'held-out loss':<14}{'α / r':>16}{'α / √r':>16}   two seeds each")
for r in (2, 64):
    print(
        f"r = {r:<10}"
        + "".join(f"{losses[r, name, seed]:>8.3f}" for name in alphas for seed in (0, 1))
    )

# %% [markdown]
# At $r = 64$ the larger factor of rsLoRA learnt more, with both seeds; at $r = 2$, where LoRA's is the larger one,
# the seeds differ by as much as the rules. In so few steps at one rate a larger factor acts like a larger rate; which
# rule is better would need a rate of its own for each rank and rule.
#
# ## The draw of A is a hidden learning rate for B
#
# $dB = dy^\top (s\, x A^\top)$ and $\Delta y = s\,(x A^\top)\,\Delta B^\top$: the entries of $A$ stand in both. Under
# Adam the first does not matter and $\Delta y$ grows with the deviation of $A x$; under plain gradient descent it
# grows with its square. What is in use differs widely:

# %%
d, r = 768, 8
draws = {
    "U(±1/√d_in), here and PEFT": lambda rng: rng.uniform(-1, 1, (r, d)) / math.sqrt(d),
    "N(0, 0.02²)": lambda rng: rng.normal(0, 0.02, (r, d)),
    'N(0, 1/r²), PEFT "gaussian"': lambda rng: rng.normal(0, 1 / r, (r, d)),
    "N(0, 1/r)": lambda rng: rng.normal(0, 1 / math.sqrt(r), (r, d)),
}
x, dy, asked = (np.random.default_rng(i).standard_normal((256, d)) for i in range(3))
first = None
print(
    f"{'A drawn from':<30}{'std(A x)':>9}{'Δy, Adam':>11}{'Δy, SGD':>11}"
    "   relative to the first"
)
for name, draw in draws.items():
    A = draw(np.random.default_rng(3))
    dB = dy.T @ (x @ A.T)
    sizes = [
        (x @ A.T).std(),
        (asked @ A.T @ np.sign(dB).T).std(),
        (asked @ A.T @ dB.T).std(),
    ]
    first = first or sizes
    print(
        f"{name:<30}{sizes[0]:>9.2f}"
        f"{sizes[1] / first[1]:>10.1f}×{sizes[2] / first[2]:>10.1f}×"
    )

# %% [markdown]
# From the smallest draw to the largest, a step grows by a factor of 18 under Adam, and by about its square under plain
# gradient descent. So "LoRA with learning rate $10^{-3}$" says little without the draw of $A$, $\alpha$ and the
# optimizer. [05 · LoRA+](05_lora_plus.ipynb) makes that exact.
#
# ## Merging, and what rounding does to it
#
# For inference, $W' = W + s\,BA$ is one weight again, and the adapter costs nothing. It is a sum in the weight's
# own format, and that rounds to the nearest number, by half a unit at most. (A unit is the gap between neighbouring
# numbers; the table gives half of it for numbers just above 1.) bfloat16 is float32 without its lower 16 bits, so it
# is easily emulated:


# %%
def bfloat16(a):
    """float32 rounded to the nearest bfloat16, ties to even: the upper 16 bits."""
    bits = a.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).view(np.float32)


formats = {
    "float32": (lambda a: a.astype(np.float32), 2.0**-24),
    "float16": (lambda a: a.astype(np.float16).astype(np.float32), 2.0**-11),
    "bfloat16": (bfloat16, 2.0**-8),
}
rng = np.random.default_rng(0)
d, r = 768, 8
W64 = rng.normal(0, 0.02, (d, d))
update = rng.normal(0, 1, (d, r)) @ rng.normal(0, 1, (r, d))
update *= 0.02 * np.linalg.norm(W64) / np.linalg.norm(update)  # a change of 2 %
far = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)

print(
    f"{'':<10}{'half a unit':>12}{'error of W+sBA':>17}{'of the update alone':>22}"
    f"{'entries unmoved':>18}"
)
for name, (rounded, unit) in formats.items():
    W = rounded(W64).astype(np.float64)  # the base is stored in this format
    merged = rounded(W + update).astype(np.float64)
    unmoved = (merged == W).mean()
    print(
        f"{name:<10}{unit:>12.1e}{far(merged, W + update):>17.1e}"
        f"{far(merged - W, update):>22.1e}{unmoved:>17.1%}"
    )

# %% [markdown]
# The merged weight is as exact as its format. The *update*, which is a fiftieth of it, is fifty times less exact: in
# bfloat16 the rounding error is a twelfth of all that was learnt, and one entry in ten does not move at all. An
# adapter beside the weight is no more exact where all is computed in bfloat16, since there the *outputs* are rounded
# ([measured](../docs/why/merge-difference.md)): where it matters, merge in float32. To unmerge by subtracting does not
# give the old bits back either:

# %%
for name, (rounded, _) in formats.items():
    W, small = rounded(W64), rounded(update)
    back = rounded(rounded(W + small) - small)
    differs, most = (back != W).mean(), abs(back - W).max()
    print(
        f"{name:<10} (W + ΔW) − ΔW differs from W in {differs:.0%} of the entries, by "
        f"{most:.0e} at most"
    )

# %% [markdown]
# `minilora.merge` makes a second array and `unmerge` drops it, so the base is the same to the bit. We merge the last
# model that was trained above, rsLoRA with $r = 64$:

# %%
layer = adapted_layers(model)["blocks.0.q"]
W, logits = layer.base.W.data.copy(), model(ids[None, :64]).data
minilora.merge(model)
with minilora.no_grad():
    print(
        f"logits differ by {abs(model(ids[None, :64]).data - logits).max():.0e} when merged"
    )
minilora.unmerge(model)
print("base unchanged:", (layer.base.W.data == W).all())
print("logits as before:", (model(ids[None, :64]).data == logits).all())

# %% [markdown]
# Logits that differ by $10^{-5}$ are float32's rounding through four blocks, no error.
#
# ## Exercises
#
# Replace each `...` by your answer and run the check below it.
#
# **1.** From which rank on does LoRA train at least as many numbers as the weight itself has?


# %%
def break_even_rank(d_out, d_in):
    """The smallest r with r (d_in + d_out) ≥ d_in d_out, an int."""
    ...


# %%
assess(
    "break-even rank",
    break_even_rank,
    ("for 128 × 128 it is 64, half the width", lambda f: f(128, 128) == 64),
    ("for 512 × 128: 65,536 / 640 = 102.4, so 103", lambda f: f(512, 128) == 103),
    ("return an int", lambda f: isinstance(f(5, 7), int)),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def break_even_rank(d_out, d_in):
#     return -(-d_out * d_in // (d_out + d_in))
# ```
# </details>
#
# **2.** Give LoRA a trained square core: $y = x W^\top + s\, h M^\top B^\top$ with $h = x A^\top$ and $M\,(r, r)$.
# Derive $dM$.


# %%
def core_gradient(dy, x, A, B, s):
    """dM (r, r) for y = x Wᵀ + s h Mᵀ Bᵀ, h = x Aᵀ."""
    ...


# %%
def core_error(f):
    rng = np.random.default_rng(1)
    dy, x, A, B, M = (
        rng.standard_normal(shape) for shape in [(5, 6), (5, 7), (3, 7), (6, 3), (3, 3)]
    )
    report = gradcheck(
        lambda M: (dy * (2.0 * x @ A.T @ M.T @ B.T)).sum(),
        {"M": f(dy, x, A, B, 2.0)},
        {"M": M},
    )
    return report.worst_error


assess(
    "gradient of a core",
    core_gradient,
    (
        "M_kl multiplies h_nl and reaches y_ni through s B_ik; mind which index is whose",
        lambda f: core_error(f) < 1e-7,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# $y_{ni}$ contains $s \sum_{kl} B_{ik} M_{kl} h_{nl}$, so
# $dM_{kl} = \sum_n \big(\sum_i dy_{ni}\, s B_{ik}\big) h_{nl}$, which is B1 and then B2's form.
#
# ```python
# def core_gradient(dy, x, A, B, s):
#     return (dy @ (s * B)).T @ (x @ A.T)
# ```
# </details>
#
# **3.** LoRA's code drops entries of the *adapter's* input: $y = x W^\top + s\,(m \circ x) A^\top B^\top$ with a
# fixed mask $m\,(N, d_\text{in})$. Write the three gradients.


# %%
def dropout_backward(dy, x, m, W, A, B, s):
    """{"x": dx, "A": dA, "B": dB} for y = x Wᵀ + s (m ∘ x) Aᵀ Bᵀ."""
    ...


# %%
def dropout_report(f):
    rng = np.random.default_rng(2)
    dy, x, W, A, B = (
        rng.standard_normal(shape) for shape in [(5, 6), (5, 7), (6, 7), (3, 7), (6, 3)]
    )
    m = (rng.random(x.shape) < 0.5) / 0.5
    loss = lambda x, A, B: (dy * (x @ W.T + 2.0 * (m * x) @ A.T @ B.T)).sum()
    rows = gradcheck(loss, f(dy, x, m, W, A, B, 2.0), {"x": x, "A": A, "B": B}).rows
    checked = {row.array for row in rows}
    return {name: all(row.ok for row in rows if row.array == name) for name in checked}


assess(
    "LoRA with dropout",
    dropout_backward,
    (
        "return a dict of three gradients, of x, A and B",
        lambda f: set(dropout_report(f)) == {"x", "A", "B"},
    ),
    ("dB: h is now (m ∘ x) Aᵀ", lambda f: dropout_report(f)["B"]),
    ("dA: A multiplies m ∘ x, not x", lambda f: dropout_report(f)["A"]),
    (
        "dx: the mask stands on the adapter's way only, dy W passes without it",
        lambda f: dropout_report(f)["x"],
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def dropout_backward(dy, x, m, W, A, B, s):
#     dropped = m * x
#     dh = dy @ (s * B)
#     dB = dy.T @ (s * dropped @ A.T)
#     return {"x": dy @ W + m * (dh @ A), "A": dh.T @ dropped, "B": dB}
# ```
#
# `dropped` must be kept for backward as well, or made again from the mask's seed.
# </details>
#
# **4.** A change of $W$ is lost in rounding where it is smaller than half the gap between neighbouring numbers. Write
# that gap for a format with $b$ stored bits of fraction (bfloat16: 7, float16: 10, float32: 23), and check it on
# bfloat16.


# %%
def gap(w, bits):
    """The distance from w > 0 to the next larger number with ``bits`` bits of fraction."""
    ...


# %%
assess(
    "gap between numbers",
    gap,
    (
        "in [1, 2) bfloat16 has 2⁷ numbers: the gap is 2⁻⁷",
        lambda f: f(1.0, 7) == f(1.5, 7) == 2.0**-7,
    ),
    ("the gap doubles at every power of two", lambda f: f(0.02, 7) == 2.0**-6 * 2.0**-7),
    (
        "NumPy's spacing() gives it for float32",
        lambda f: f(0.3, 23) == np.spacing(np.float32(0.3)),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gap(w, bits):
#     return 2.0 ** (math.floor(math.log2(w)) - bits)
# ```
# </details>
#
# **Next:** [04 · where the memory goes](04_memory.ipynb) asks what $x$ and $h$ cost,
# [05 · LoRA+](05_lora_plus.ipynb) gives $A$ and $B$ a rate each.
