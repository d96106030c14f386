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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/05_lora_plus.ipynb)
#
# # 05 · LoRA+ and learning rates
#
# LoRA+ changes one thing: $B$ moves faster than $A$. We derive why it should, then look for the gain where each ratio
# of the two rates gets *its own best rate*. Here it gains nothing, and you will see why it so easily seems to. On the
# way, four knobs of LoRA turn out to be two.
#
# **After this you can**
#
# - write LoRA+ as a rule of the optimizer, and say what the width of the model has to do with it
# - read a map of the loss over two learning rates, and compare methods along it fairly
# - show that under Adam LoRA+ *is* LoRA with a larger $\alpha$, to the last digits
# - say which of $\alpha$, the draw of $A$, $\eta_A$ and $\eta_B$ are the same knob
#
# Read before: [03 · LoRA](03_lora.ipynb).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora
import math

import numpy as np
from tqdm import tqdm

import minilora
from minilora import methods, plots
from minilora.data import CharTokenizer, fixed_batches, load_corpus, random_batches
from minilora.tools.diff import difference
from minilora.tools.exercises import assess
from minilora.tools.trial import Trial

# %% [markdown]
# ## The whole method
#
# Forward and backward are LoRA's. What differs is one number in the optimizer:
#
# **U1.** $A$ moves at the rate $\eta$, $B$ at $\lambda\,\eta$, with a ratio $\lambda$ of 16 by default.

# %%
print(difference("lora", "lora_plus"))

# %% [markdown]
# `lr_scale` multiplies the optimizer's rate, entry by entry. Adam's first step is the rate times the gradient's sign,
# so it shows the ratio. A `Trial` is a method on one small layer with random data, in float64: `after(steps)` is a copy
# of it after so many steps of the optimizer, `p` are its arrays, `W0` is the layer's weight before and `merged` the one
# that it computes with, $W + sBA$.

# %%
start = Trial(methods.create("lora_plus", r=3))
one_step = start.after(1, lr=0.01, eps=1e-30)
print("entries of B moved by", np.unique(abs(one_step.p.B).round(12)), "at a rate of 0.01")

# %% [markdown]
# ## Why B should be faster: the width argument
#
# Let the model's width $n = d_\text{in}$ grow, with entries of $x$ of size 1. $A$ is drawn so that
# $h_k = \sum_j A_{kj} x_j$ is of size 1 too. Adam moves each entry by its rate, with the sign of the gradient. What
# does one step change?
#
# - $B$ moves: $\;\Delta y_i = s \sum_{k=1}^{r} \Delta B_{ik} h_k$, a sum of $r$ terms of size $\eta_B$. It does not
#   know $n$.
# - $A$ moves: $\;\Delta h_k = \sum_{j=1}^{n} \Delta A_{kj} x_j$, a sum of $n$ terms of size $\eta_A$. For a token
#   that made the gradient, $\Delta A_{kj} = -\eta_A\,\mathrm{sign}(dh_k)\,\mathrm{sign}(x_j)$, all terms have one
#   sign, and the sum is of size $\eta_A\, n$.
#
# So that neither explodes nor vanishes as $n \to \infty$: $\eta_A = \Theta(1/n)$ and $\eta_B = \Theta(1)$. One rate
# for both cannot do it. (For a token that had no part in the gradient the signs are random, and $n$ terms add up like
# $\sqrt n$.)


# %%
def moved(n, new_token, seed, r=4, tokens=64, lr=0.001):
    """Sizes of Δh from a step of A, and of Δy from a step of B, at width n."""
    rng = np.random.default_rng(seed)
    A, B = rng.uniform(-1, 1, (r, n)) / math.sqrt(n), rng.standard_normal((n, r))
    x, dy = rng.standard_normal((tokens, n)), rng.standard_normal((tokens, n)) / n
    if not new_token:
        x, dy = x[:1], dy[:1]
    asked = rng.standard_normal((tokens, n)) if new_token else x
    dA, dB = (dy @ B).T @ x, dy.T @ (x @ A.T)
    dh, dy = asked @ (lr * np.sign(dA)).T, asked @ A.T @ (lr * np.sign(dB)).T
    return [math.sqrt((a * a).mean()) for a in (dh, dy)]


widths = [16, 64, 256, 1024, 4096]
draws = lambda new: [[moved(n, new, seed) for n in widths] for seed in range(12)]
same, new = (np.mean(draws(is_new), axis=0) for is_new in (False, True))  # (widths, 2)
plots.show(
    plots.lines(
        {
            "Δh of a step of A, the same token": (widths, same[:, 0]),
            "Δh of a step of A, new tokens": (widths, new[:, 0]),
            "Δy of a step of B, the same token": (widths, same[:, 1]),
            "Δy of a step of B, new tokens": (widths, new[:, 1]),
        },
        title="One Adam step at a rate of 0.001, mean of 12 draws",
        xlabel="width n",
        ylabel="how far it moves",
        logx=True,
        logy=True,
    ),
    "What a step of A does grows with the width, by its first or half power; "
    "what a step of B does is level.",
)

# %% [markdown]
# The two upper lines rise with slopes 1 and ½, the lines of $B$ are level. The argument holds. But notice what it
# does *not* say: it has no constants. It tells how the best ratio should change from one width to the next, not that
# it is 16, or above 1, at the width you have.
#
# ## A fair comparison: the map of both rates
#
# The smallest task with the same structure is to learn a change $D$ of rank 4. Where the entries of $x$ are
# uncorrelated, of mean 0 and variance 1, the mean of $\lVert (s B A - D)\,x \rVert^2$ is the squared length of the
# matrix, and no $x$ needs to be drawn:
#
# $$
# \begin{aligned}
# E &= s B A - D \\
# L(A, B) &= \lVert E \rVert^2 / \lVert D \rVert^2 \\
# dB &= 2 s\, E A^\top / \lVert D \rVert^2 \\
# dA &= 2 s\, B^\top E / \lVert D \rVert^2
# \end{aligned}
# $$
#
# $L$ is the share that is not yet learnt. The code leaves out the factor $2 / \lVert D \rVert^2$ of all gradients,
# which Adam cancels. We run it for 30 steps from each point of a grid of 13 rates of $A$ and 15 of $B$, all at once: the
# first axis of `A` and `B` is the grid.


# %%
def map_of_rates(n, rates_A, rates_B, seed, steps=30, r=4, s=2.0):
    """L after ``steps`` for each pair of rates: (rates of A, rates of B)."""
    rng, T = np.random.default_rng(seed), lambda a: a.transpose(0, 2, 1)
    P = rng.standard_normal((n, r))
    Q = rng.standard_normal((r, n)) / math.sqrt(n * r)  # D = P Q
    pairs = np.meshgrid(rates_A, rates_B, indexing="ij")
    eta_A, eta_B = (eta.reshape(-1, 1, 1) for eta in pairs)
    A = np.repeat(rng.uniform(-1, 1, (1, r, n)) / math.sqrt(n), len(eta_A), axis=0)
    B = np.zeros((len(eta_A), n, r))
    length = ((P.T @ P) * (Q @ Q.T)).sum()  # ‖D‖²
    moments = {"A": [0.0, 0.0], "B": [0.0, 0.0]}
    for t in range(1, steps + 1):
        # E itself, n × n, is never formed
        dB = s * (s * B @ (A @ T(A)) - P @ (Q @ T(A)))  # s E Aᵀ
        dA = s * (s * (T(B) @ B) @ A - (T(B) @ P) @ Q)  # s Bᵀ E
        for name, w, g, eta in (("A", A, dA, eta_A), ("B", B, dB, eta_B)):
            m, v = moments[name]
            m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w -= eta * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-12)
    squares = s * s * ((T(B) @ B) * (A @ T(A))).sum((1, 2))
    products = s * ((T(B) @ P) * (A @ Q.T)).sum((1, 2))
    return ((squares - 2 * products + length) / length).reshape(pairs[0].shape)


of_A, of_B = np.arange(-12, 1), np.arange(-12, 3)  # exponents of 2
rates_A, rates_B = 2.0**of_A, 2.0**of_B
maps = {
    n: np.array([map_of_rates(n, rates_A, rates_B, seed) for seed in range(3)])
    for n in (16, 64, 256, 1024)
}
# over the three seeds, the geometric mean
mean = {n: np.exp(np.log(runs).mean(axis=0)) for n, runs in maps.items()}

plots.show(
    plots.heat_map(
        np.log10(np.minimum(mean[256], 1.0)),  # beyond 1 it has got worse
        title="What is left to learn after 30 steps, width 256",
        xlabel="log₂ of the rate of B",
        ylabel="log₂ of the rate of A",
        diverging=False,
        unit="log₁₀ of the loss, at most 0",
        xticks=of_B,
        yticks=of_A,
    ),
    "A dark valley runs from fast A and slow B to slow A and fast B, at one depth nearly "
    "all along it.",
)

# %% [markdown]
# One ratio is one diagonal of the map; that of ratio 1 starts in the upper left corner. The valley lies *across* these
# diagonals: for nearly every ratio there is a rate that reaches the bottom. It ends where $A$ is so slow that it hardly
# moves.
#
# Along each diagonal we take the best, which is "each ratio at its own tuned rate". The figure does so for each seed,
# and shows the mean and the range; the table does so in the map that is averaged over the seeds.

# %%
ratios = 2.0 ** np.arange(-4, 9)


def best_along(losses):
    """The best of losses (rates of A, rates of B) for each of ``ratios``, B over A."""
    diagonals = [np.diagonal(losses, int(math.log2(ratio))) for ratio in ratios]
    assert all(0 < d.argmin() < len(d) - 1 for d in diagonals)  # none at the grid's edge
    return [d.min() for d in diagonals]


plots.show(
    plots.lines(
        {
            f"width {n}": (ratios, [best_along(run) for run in runs])
            for n, runs in maps.items()
        },
        title="Each ratio at its own best rate, mean and range of 3 seeds",
        xlabel="ratio of the rates, B over A",
        ylabel="share not learnt",
        logx=True,
        logy=True,
    ),
    "Level from 1/16 to about 8 at each width, then rising; at width 1024 it rises last.",
)

# %%
columns = [0.25, 1, 4, 16, 64]
print("width   " + "".join(f"{f'ratio {ratio:g}':>12}" for ratio in columns))
for n, losses in mean.items():
    best = dict(zip(ratios, best_along(losses), strict=True))
    print(f"{n:<8}" + "".join(f"{best[ratio]:>12.4f}" for ratio in columns))

# %% [markdown]
# What this shows, and what it does not:
#
# - **No ratio wins.** From 1/4 to 4 the best losses are alike, but for the scatter of the grid and the seeds. Ratio 16
#   is *worse* up to width 256, and level with ratio 1 at width 1024.
# - **The width argument leaves its trace:** ratio 16 costs less, the wider the model. That is the direction that the
#   theory predicts.
# - LoRA+'s claim of better and faster training is **not shown** by this toy. It cannot refute it either: the paper's
#   models are far wider, and their tasks harder.
#
# No best pair lies at the edge of the grid (the code makes sure of it), so that it is not the grid that makes the curves
# rise.
#
# ## Why a ratio above 1 seems to win
#
# Now compare as is often done: fix one learning rate, and switch the ratio on.

# %%
along = {ratio: np.diagonal(mean[256], int(math.log2(ratio))) for ratio in (1, 4, 16)}
rate_of_A = {ratio: rates_A[: len(losses)] for ratio, losses in along.items()}
at = list(rates_A).index(2.0**-9)
print(
    "at η = 2^-9:",
    ", ".join(f"ratio {ratio} leaves {losses[at]:.2f}" for ratio, losses in along.items()),
)
plots.show(
    plots.lines(
        {f"ratio {ratio}": (rate_of_A[ratio], losses) for ratio, losses in along.items()},
        title="The same runs over the learning rate η of A, width 256",
        xlabel="learning rate η",
        ylabel="share not learnt",
        logx=True,
        logy=True,
    ),
    "Three curves of one shape, shifted to the left as the ratio grows; their lowest "
    "points are nearly alike.",
)

# %% [markdown]
# At a rate that is too small for ratio 1, ratio 16 "wins" by far, because it raises the rate of $B$. The curves are
# *shifted*, not lowered. Over the geometric mean of both rates, $\sqrt{\eta_A \eta_B}$, ratios 1 and 4 lie on each
# other. Ratio 16 comes nearly as low, and lies above them on either side:

# %%
middle = {ratio: rate_of_A[ratio] * math.sqrt(ratio) for ratio in along}
plots.show(
    plots.lines(
        {f"ratio {ratio}": (middle[ratio], losses) for ratio, losses in along.items()},
        title="The same runs over the mean of both rates",
        xlabel="√(rate of A · rate of B)",
        ylabel="share not learnt",
        logx=True,
        logy=True,
    ),
    "The curves of ratios 1 and 4 lie on each other, that of ratio 16 above them on either "
    "side of the lowest point.",
)

# %% [markdown]
# ## The same on real text
#
# The shipped model, the Folio's spelling, 30 steps, two seeds. Each ratio gets four rates, chosen so that the best is
# not at the edge:

# %%
folio, tokenizer = load_corpus("folio"), CharTokenizer()
ids = tokenizer.encode(folio.train)
held_out = fixed_batches(tokenizer.encode(folio.val), batch=32, context=64, limit=64)


def tuned(lr, ratio, seed, steps=30):
    """Held-out loss in nats per character after ``steps`` with LoRA+; ratio 1 is LoRA."""
    model = minilora.adapt(
        minilora.pretrained(), "lora_plus", seed=seed, verbose=False, lr_ratio=float(ratio)
    )
    optimizer = minilora.AdamW(model.trainable(), lr=lr, clip=1.0)
    batches = random_batches(ids, batch=4, context=64, rng=np.random.default_rng(seed))
    minilora.train(model, optimizer, batches, steps, warmup=5)
    return minilora.evaluate(model, held_out)


grids = {1: [0.0025, 0.005, 0.01, 0.02], 16: [0.0003, 0.0006, 0.0012, 0.0024]}
runs = [
    (ratio, lr, seed) for ratio, grid in grids.items() for lr in grid for seed in (0, 1)
]
losses = {
    (ratio, lr, seed): tuned(lr, ratio, seed) for ratio, lr, seed in tqdm(runs, leave=False)
}
for ratio, grid in grids.items():
    pairs = {lr: [losses[ratio, lr, seed] for seed in (0, 1)] for lr in grid}
    best = min(pairs, key=lambda lr: np.mean(pairs[lr]))
    for lr, (first, second) in pairs.items():
        print(
            f"ratio {ratio:<3} η = {lr:<7} {first:.3f}  {second:.3f}"
            + ("   best" if lr == best else "")
        )

# %% [markdown]
# At its best rate, ratio 16 is a little *worse* than ratio 1 with both seeds. It is no gain, and with two seeds no
# proof of a loss.
#
# The [comparison of all methods](../docs/compare.md), over longer runs, comes to the same: LoRA+ does not beat LoRA
# once each has its own rate.
#
# ## Under Adam, LoRA+ is LoRA with a larger α
#
# Substitute $B = \lambda B'$ in LoRA+. The product $s B A = (\lambda s)\, B' A$ is LoRA's with
# $\alpha' = \lambda \alpha$. How does $B'$ move?
#
# - Its gradient is $dB' = \lambda\, dB$, by the chain rule. Adam divides by the gradient's size, so the factor
#   $\lambda$ is gone.
# - LoRA+ moves $B$ at the rate $\lambda \eta$, so $B' = B / \lambda$ moves at the rate $\eta$: that of $A$.
# - $B$ starts at 0, and so does $B'$.
#
# So LoRA+ with the ratio $\lambda$ *is* LoRA at one rate with $\alpha' = \lambda \alpha$. Not nearly; exactly, but
# for Adam's tiny `eps`:

# %%
plus = start.of("lora_plus", r=3, alpha=16.0, lr_ratio=16.0)
scaled = start.of("lora", r=3, alpha=16.0 * 16.0)
for eps in (1e-30, 1e-8):
    a, b = (trial.after(20, lr=0.002, eps=eps).merged for trial in (plus, scaled))
    moved_by = abs(a - start.W0).max()
    print(f"eps = {eps:.0e}: the merged weights moved by {moved_by:.2f}", end="")
    print(f" and differ by {abs(a - b).max():.0e}")

# %% [markdown]
# A scale of 20 instead of 2, an $\alpha$ of 160 at $r = 8$, a ratio of 10: under Adam these are one knob. Two habits
# break the identity. Decoupled weight decay shrinks each array in proportion to its rate, and so $B$ by $\lambda$ times
# as much as $B'$. Clipping looks at the length of both gradients together, where $dB'$ counts $\lambda$ times as much
# as $dB$; the factor by which it shortens them then varies from step to step in another way.
#
# Under plain gradient descent nothing divides by the gradient's size. $B'$ moves by $\eta\, dB' = \eta \lambda\, dB$,
# so $B = \lambda B'$ moves at $\lambda^2 \eta$: LoRA with $\alpha' = c\,\alpha$ is LoRA+ with the ratio $c^2$.

# %%
plus = start.of("lora_plus", r=3, alpha=16.0, lr_ratio=9.0)
scaled = start.of("lora", r=3, alpha=3 * 16.0)
a, b = (trial.after(20, lr=1e-5, adam=False).merged for trial in (plus, scaled))
moved_by = abs(a - start.W0).max()
print(f"gradient descent: moved by {moved_by:.3f}, differ by {abs(a - b).max():.0e}")

# %% [markdown]
# The same holds for $A$: drawn $c$ times larger, with $\eta_A$ times $c$ and $\alpha$ divided by $c$, all is as
# before under Adam. Four knobs, $\alpha$, the draw of $A$, $\eta_A$ and $\eta_B$, and two symmetries: *two* knobs are
# left. The map above, at one $\alpha$ and one draw, has them both.


# %%
class Drawn(methods.get("lora")):
    """LoRA with A drawn ten times larger, and moving ten times faster."""

    def init(self, W, rng, shared):
        arrays, buffers = super().init(W, rng, shared)
        return {**arrays, "A": 10.0 * arrays["A"]}, buffers

    def lr_scale(self, name):
        return 10.0 if name == "A" else 1.0


a = Trial(Drawn(r=3, alpha=1.6)).after(20, lr=0.002, eps=1e-30).merged
b = start.of("lora", r=3, alpha=16.0).after(20, lr=0.002, eps=1e-30).merged
print(f"difference of the merged weights: {abs(a - b).max():.0e}")

# %% [markdown]
# ## What to take home
#
# - Compare a method that changes a scale with the old one *each at its own best rate*. Anything else measures the rate.
# - LoRA+ sets $\eta_A$ and $\eta_B$ apart, and theory wants that in wide models. The shipped model is 128 wide, and here
#   it gained nothing.
# - Copy $\alpha$, the draw of $A$, the optimizer and the rates *together* from a recipe, or none of them.
#
# ## Exercises
#
# **1.** A variant of LoRA+ that leaves $\sqrt{\eta_A \eta_B}$ as it was: by which factor does each array's rate change?


# %%
def centred_lr_scale(name, ratio):
    """The factor on the rate of the array ``name``, "A" or "B".

    B's over A's is ``ratio``, their product is 1.
    """
    ...


# %%
assess(
    "centred LoRA+",
    centred_lr_scale,
    (
        "B's factor over A's must be the ratio",
        lambda f: math.isclose(f("B", 16.0) / f("A", 16.0), 16.0),
    ),
    (
        "the two factors' product must be 1",
        lambda f: math.isclose(f("B", 9.0) * f("A", 9.0), 1.0),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def centred_lr_scale(name, ratio):
#     return math.sqrt(ratio) if name == "B" else 1.0 / math.sqrt(ratio)
# ```
# </details>
#
# **2.** Which LoRA, with one rate, does the same as LoRA+? Give its $\alpha$ for both optimizers.


# %%
def equal_alpha(alpha, ratio, optimizer):
    """The alpha of the LoRA that equals LoRA+ with ``alpha`` and ``ratio``.

    optimizer: "adam" or "sgd"
    """
    ...


# %%
def as_plus(f, ratio, optimizer, lr):
    plus = start.of("lora_plus", r=3, alpha=8.0, lr_ratio=ratio)
    plain = start.of("lora", r=3, alpha=f(8.0, ratio, optimizer))
    a, b = (
        trial.after(5, lr, adam=optimizer == "adam", eps=1e-30).merged
        for trial in (plus, plain)
    )
    return start.same(a, b)


assess(
    "LoRA that is LoRA+",
    equal_alpha,
    (
        "Adam: B' = B / ratio moves at the rate of A",
        lambda f: as_plus(f, 5.0, "adam", 0.002),
    ),
    (
        "gradient descent: the gradient of B' carries the factor once more",
        lambda f: as_plus(f, 9.0, "sgd", 1e-5),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def equal_alpha(alpha, ratio, optimizer):
#     return alpha * (ratio if optimizer == "adam" else math.sqrt(ratio))
# ```
# </details>
#
# **3.** From a map of losses, as above, find the best ratio *fairly*, and the one that a fixed rate of $A$ would
# choose.


# %%
def best_ratios(losses, rates, fixed):
    """(best ratio of all, best ratio with the rate of A held at rates[fixed])."""
    ...


# %%
example = np.array([[9.0, 5.0, 8.0], [7.0, 2.0, 4.0], [1.0, 3.0, 6.0]])
another = np.array([[9.0, 5.0, 8.0], [1.0, 7.0, 4.0], [2.0, 6.0, 3.0]])
three = np.array([0.25, 0.5, 1.0])
assess(
    "two ways to choose a ratio",
    best_ratios,
    ("the ratio is the rate of B over that of A; rows of the map are rates of A",
     lambda f: f(example, three, 0)[0] == 0.25),
    ("the best pair of all, not the best mean of a diagonal",
     lambda f: f(another, three, 0)[0] == 0.5),
    ("with A's rate held, look along one row", lambda f: f(example, three, 0)[1] == 2.0),
    ("the fixed rate may be another row",
     lambda f: [f(m, three, k)[1] for m, k in ((example, 1), (another, 1), (another, 2))]
     == [1.0, 0.5, 0.25]),
)  # fmt: skip

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def best_ratios(losses, rates, fixed):
#     a, b = np.unravel_index(losses.argmin(), losses.shape)
#     return rates[b] / rates[a], rates[losses[fixed].argmin()] / rates[fixed]
# ```
# </details>
#
# **4.** Adam's first step of $A$, for one token with normal entries of $x$: how large is $|\Delta h_k|$ on average,
# as a formula?


# %%
def first_move(n, lr):
    """The mean of |Δh_k| = lr Σ_j |x_j| over x with n independent entries from N(0, 1)."""
    ...


# %%
def sampled(n, lr):
    return lr * abs(np.random.default_rng(3).standard_normal((4000, n))).sum(axis=1).mean()


assess(
    "how far A's first step moves h",
    first_move,
    ("it must grow like n", lambda f: math.isclose(f(400, 0.01), 4 * f(100, 0.01))),
    (
        "the mean of |x_j| is not 1",
        lambda f: math.isclose(f(100, 0.01), sampled(100, 0.01), rel_tol=0.01),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The mean of $|x_j|$ is $\sqrt{2/\pi} \approx 0.8$.
#
# ```python
# def first_move(n, lr):
#     return lr * n * math.sqrt(2 / math.pi)
# ```
# </details>
#
# **Next:** [06 · VeRA](06_vera.ipynb) freezes $A$ and $B$ and trains two vectors.
