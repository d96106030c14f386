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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/07_delta_lora.ipynb)
#
# # 07 · Delta-LoRA and its telescoping surprise
#
# Delta-LoRA lets the frozen weight move after all: after each step, W takes λ times what the low-rank product has just
# changed by. No gradient of W, no optimizer state for it, and yet, says the title of the paper, high-rank parameters
# are tuned. Three lines of algebra show what this comes to.
#
# **After this you can**
#
# - derive that the changes of W telescope to $\lambda s\,(B_T A_T - B_K A_K)$, and check it to rounding
# - read the rank of an update off its singular values, and tell 2 r from high rank
# - show that from step 0 under Adam, Delta-LoRA **is** LoRA with alpha (1 + λ), and under SGD at another rate
# - name the control that a comparison with Delta-LoRA needs
# - export the result as a plain LoRA of rank 2 r
#
# Read before: 03 (LoRA). The paper: Zi et al. 2023, [arXiv 2309.02411](https://arxiv.org/abs/2309.02411).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora

# %%
import tempfile

import numpy as np
from threadpoolctl import threadpool_limits

import minilora
from minilora import methods, plots
from minilora.data import CharTokenizer, fixed_batches, load_corpus, random_batches
from minilora.files.peft import load_peft, save_peft
from minilora.methods.delta_lora import DeltaLoRA
from minilora.surgery import adapted_layers
from minilora.tools.diff import difference
from minilora.tools.exercises import assess
from minilora.tools.gradcheck import check_method
from minilora.tools.trial import Trial

# %% [markdown]
# ## The rule
#
# Forward and backward are LoRA's, $y = x(W + sBA)^\top$ with $s = \alpha / r$. The rule comes after the optimizer's
# step t, which made $A_t, B_t$ from $A_{t-1}, B_{t-1}$. $A'$ and $B'$ are copies of $A_{t-1}$ and $B_{t-1}$:
#
# $$
# \begin{aligned}
# \text{U1:}\quad W_t &= W_{t-1} + \lambda s\,(B_t A_t - B' A') \\
# \text{U2:}\quad A' &\leftarrow A_t, \quad B' \leftarrow B_t
# \end{aligned}
# $$
#
# U1 is for $t > K$ alone; up to step K, $W_t = W_0$. U2 makes the copies ready for the next step, from the first step on.
# In the code λ is `update_ratio`, K is `start_step`, and the copies are `A_before` and `B_before`. What must change in
# LoRA for that:

# %%
print(difference("lora", "delta_lora"))

# %% [markdown]
# No B-line among the equations: no gradient is new, so there is nothing new to derive, and the check agrees.

# %%
print(check_method(methods.create("delta_lora", r=3)))

# %% [markdown]
# ## Why one might hope
#
# The gradient of W is $G = dy^\top x$, and that of the product $BA$ is $sG$: W and the product want to go the same way.
# So let W go the way that the product went. But which way is that? Under SGD with rate η,
# $\Delta B = -\eta s\,G A^\top$ and $\Delta A = -\eta s\,B^\top G$, so
#
# $$
# \begin{aligned}
# \Delta(BA) &= \Delta B\,A + B\,\Delta A + \Delta B\,\Delta A && \text{product rule, exactly} \\
#            &\approx -\eta s\,\big(G\,A^\top A + B B^\top G\big) && \text{to first order in η}
# \end{aligned}
# $$
#
# the gradient seen through the r rows of A and the r columns of B. How much of the direction of −G is left?
#
# We look at a `Trial`: a method on one small layer with random data, in float64. `after(steps)` is a copy of it after so
# many steps of the optimizer, and `p` are its arrays. `W` is its weight, which this method moves, and `W0` what that was
# at the start. `merged` is the weight that it computes with, $W + sBA$, and `dW` the gradient G of that.

# %%
trial = Trial(
    methods.create("delta_lora", r=3, alpha=6.0, update_ratio=2.0, start_step=5),
    N=40,
    d_in=32,
    d_out=24,
)
s, ratio = trial.method.scaling, trial.method.update_ratio
product = lambda t: s * t.p.B @ t.p.A
cosine = lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)

for step in (5, 20):
    before, after = (trial.after(k, lr=1e-4, adam=False) for k in (step - 1, step))
    moved = product(after) - product(before)
    rank = np.linalg.matrix_rank(moved)
    cos = cosine(moved, -before.dW)
    print(f"step {step}: cos(what s B A moved by, −G) = {cos:.2f}, of rank {rank}")

# %% [markdown]
# About a third, and of a rank of 2 r = 6 at most: G is seen through a small window. One may still hope that over many
# steps, as A and B turn, the windows add up to something larger.
#
# ## They do not: the sum telescopes
#
# Write U1 for each t from K + 1 to T, one below the other, and add:
#
# $$
# \begin{aligned}
# W_{K+1} - W_K &= \lambda s\,(B_{K+1}A_{K+1} - B_K A_K) \\
# W_{K+2} - W_{K+1} &= \lambda s\,(B_{K+2}A_{K+2} - B_{K+1}A_{K+1}) \\
# &\ \ \vdots \\
# W_T - W_{T-1} &= \lambda s\,(B_T A_T - B_{T-1}A_{T-1})
# \end{aligned}
# $$
#
# On the left all but the first and last weight cancel; on the right all but the first and last product. With
# $W_K = W_0$:
#
# $$\boxed{W_T - W_0 = \lambda s\,(B_T A_T - B_K A_K)}$$
#
# Nothing of the path is left. The optimizer did not enter, so it holds for every one.

# %%
K, T = trial.method.start_step, 25
for name, adam, lr in [("Adam", True, 0.01), ("SGD", False, 2e-4)]:
    start, late = (trial.after(t, lr=lr, adam=adam) for t in (K, T))
    telescoped = ratio * (product(late) - product(start))
    moved = late.W - trial.W0
    off = np.abs(moved - telescoped).max()
    assert off < 1e-12
    print(f"{name:<5} W moved by {np.linalg.norm(moved):.3f}, off the formula by {off:.1e}")

# %% [markdown]
# ## The rank
#
# $$B_T A_T - B_K A_K = \begin{pmatrix} B_T & -B_K \end{pmatrix} \begin{pmatrix} A_T \\ A_K \end{pmatrix}$$
#
# is a product through 2 r numbers, so its rank is **at most 2 r**; and at K = 0, where $B_0 = 0$, at most r. Break it
# on purpose: forget U2, so that each step compares with the start instead of with the step before. Nothing cancels
# then.


# %%
class Forgetful(DeltaLoRA):
    def after_step(self, W, p):
        change = self.update(p.A, p.B) - self.update(p.A_before, p.B_before)
        W += self.update_ratio * change  # U1, and no U2


options = {"r": 3, "alpha": 6.0, "update_ratio": 2.0}
of_W = lambda method: Trial(method, **trial.sizes).after(T).W - trial.W0
updates = {
    "W, K = 5": of_W(methods.create("delta_lora", start_step=5, **options)),
    "W, K = 0": of_W(methods.create("delta_lora", start_step=0, **options)),
    "U2 forgotten": of_W(Forgetful(start_step=0, **options)),
    "full": Trial(methods.create("full"), **trial.sizes).after(T).merged - trial.W0,
}
plots.show(
    plots.singular_values(updates, title=f"What {T} steps change in W (24 × 32), r = 3"),
    "Singular values: W moves by rank 3 at K = 0 and rank 6 at K = 5, full fine-tuning and "
    "the broken rule by 24.",
)

# %% [markdown]
# *To see: the lines end at the rank: r = 3, 2 r = 6, and all 24 for full fine-tuning. The rule with U2 forgotten does
# reach high rank, but then W is pushed again and again by what was learnt long ago.*
#
# ## From step 0 under Adam: LoRA with a larger alpha
#
# Let K = 0. The layer computes with
#
# $$M_t = W_t + sB_tA_t = W_0 + \lambda sB_tA_t + sB_tA_t = W_0 + (1 + \lambda)\,s\,B_tA_t ,$$
#
# which is LoRA's weight with $s' = (1+\lambda)s$, that is with $\alpha' = (1+\lambda)\alpha$. Call that LoRA the
# *control*. The same A and B give the same M and so the same $G$. The gradients differ by one factor:
#
# | | Delta-LoRA | control |
# | --- | --- | --- |
# | dB | $s\,G A^\top$ | $(1+\lambda)\,s\,G A^\top$ |
# | dA | $s\,B^\top G$ | $(1+\lambda)\,s\,B^\top G$ |
#
# Adam's step is $\hat m / (\sqrt{\hat v} + \varepsilon)$. A factor c on all gradients puts c on m and c² on v, and
# cancels, but for ε. So both take the same step from the same point, and by induction for ever. Decoupled weight decay
# looks at A and B alone, and changes nothing of it. Clipping does, in a step where the control's gradient, (1 + λ) times
# as long, is over the limit and Delta-LoRA's is not: the two then differ by another factor than in the steps before.
# Under SGD a step keeps the factor, and the control needs the rate $\eta / (1+\lambda)$.

# %%
control = trial.of("delta_lora_control", **options)
delta = trial.of("delta_lora", start_step=0, **options)
apart = lambda a, b: np.abs(a.merged - b.merged).max() / np.abs(a.merged - trial.W0).max()

print("apart, as a part of the whole update:")
for eps in (1e-30, 1e-8, 1e-3, 1.0):
    off = apart(delta.after(T, eps=eps), control.after(T, eps=eps))
    print(f"Adam, eps {eps:<10g} {off:.1e}")
    assert off < 1e-12 or eps > 1e-30
lr = 2e-4
for title, rate in [("the same rate", lr), ("rate / (1 + λ)", lr / (1 + ratio))]:
    off = apart(delta.after(T, lr, adam=False), control.after(T, rate, adam=False))
    print(f"SGD, {title:<15} {off:.1e}")

# %% [markdown]
# Under Adam both are equal up to rounding, and come apart as ε grows beside the gradients, to which it is added. Under
# SGD it takes the smaller rate. A method that moves W, and one that does not, take the same path.
#
# ## From a later step: the same, on a shifted base
#
# For K > 0, put the boxed formula into $M_T = W_T + sB_TA_T$:
#
# $$M_T = \underbrace{(W_0 - \lambda s B_K A_K)}_{\text{fixed from K on}} + (1+\lambda)\,s\,B_TA_T$$
#
# LoRA with alpha (1 + λ) again, on a base that a fixed matrix of rank r was taken from. At t = K it is the weight that
# LoRA had reached, so nothing jumps; from then on the same step of A and B moves the layer (1 + λ) times as far.

# %%
start, late = trial.after(K), trial.after(T)
rebuilt = (trial.W0 - ratio * product(start)) + (1 + ratio) * product(late)
print(f"off by {np.abs(rebuilt - late.merged).max():.1e}")

# %% [markdown]
# ## On real text
#
# The shipped model on the Folio's spelling, 20 steps, three seeds, all at LoRA's rate: LoRA, Delta-LoRA from step 0 and
# from step 10, and the control.

# %%
tokenizer, folio = CharTokenizer(), load_corpus("folio")
train_ids = tokenizer.encode(folio.train)
held_out = fixed_batches(tokenizer.encode(folio.val), 32, 128, limit=32)
STEPS, SEEDS = 20, 3


def tune(method, seed, **options):
    """(model, its losses) after STEPS steps."""
    model = minilora.adapt(
        minilora.pretrained(), method, seed=seed, verbose=False, **options
    )
    batches = random_batches(
        train_ids, batch=4, context=128, rng=np.random.default_rng(seed)
    )
    optimizer = minilora.AdamW(model.trainable(), lr=5e-3)
    # one thread is enough for matrices of this size, and sums are rounded alike
    with threadpool_limits(1):
        return model, minilora.train(model, optimizer, batches, STEPS, warmup=4).loss


runs = {
    "LoRA": ("lora", {}),
    "control: alpha (1 + λ)": ("delta_lora_control", {}),
    "Delta-LoRA, K = 0": ("delta_lora", {"start_step": 0}),
    "Delta-LoRA, K = 10": ("delta_lora", {"start_step": 10}),
}
results = {
    name: [tune(m, seed, **o) for seed in range(SEEDS)] for name, (m, o) in runs.items()
}
losses = {name: np.array([loss for _, loss in found]) for name, found in results.items()}
lora = losses.pop("LoRA")
plots.show(
    plots.loss_curves(
        {name: loss - lora for name, loss in losses.items()},
        title="Three seeds on the Folio, mean and range of the difference",
        ylabel="loss less LoRA's, nats",
        smooth=4,
    ),
    "Training loss less LoRA's: Delta-LoRA from step 0 and the control lie on one another; "
    "from step 10 it is at zero until then.",
)

# %%
zero, same = losses["Delta-LoRA, K = 0"], losses["control: alpha (1 + λ)"]
off = abs(zero - same).max()
print(f"K = 0 and the control: the loss of a step differs by {off:.1e} nats at most")
final = {
    name: [minilora.evaluate(model, held_out) for model, _ in found]
    for name, found in results.items()
}
for name, values in final.items():
    print(f"{name:<24} held out {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")

# %% [markdown]
# *To see: what is drawn is the loss less that of LoRA on the same batches. Delta-LoRA from step 0 and its control are
# one line, in float32 and in a whole network. With K = 10 it is LoRA until step 10, at zero.* Whatever Delta-LoRA gains
# or loses against LoRA here, plain LoRA gains or loses by a larger alpha.
# Three seeds, 20 steps and one learning rate for all are no ranking of the methods; there is a [full
# comparison](../docs/compare.md), each at its own rate.

# %%
model, _ = results["Delta-LoRA, K = 10"][0]
layer = adapted_layers(model)["blocks.3.up"]
full = adapted_layers(tune("full", 0)[0])["blocks.3.up"]
plots.show(
    plots.singular_values(
        {
            "Delta-LoRA, K = 10: what W moved by": layer.base.W.data - layer.original,
            "full": full.p.W - full.original,
        },
        title="blocks.3.up (512 × 128) after 20 steps, r = 8",
        most=64,
    ),
    "Singular values on the real model: Delta-LoRA ends at 2 r = 16, full fine-tuning does "
    "not end before 64.",
)

# %% [markdown]
# *To see: on the real model W moves by rank 16 = 2 r too, and full fine-tuning by the rank of the whole matrix, 128 (64
# of the 128 are drawn).*
#
# ## What this says of the claim, and what it does not
#
# - "High-rank parameters are tuned": W has full rank, but so it had before. The **change** is of rank 2 r at most, and
#   of rank r from step 0. That is algebra, and holds at every size.
# - What changes is how far a step moves the layer, from step K on. A comparison with LoRA at the same alpha and rate
#   credits the moving W with that. The **control** is LoRA with alpha (1 + λ), each at its own tuned rate.
# - The paper's results on its benchmarks are not repeated here, so we cannot say where its gains come from.
#
# ## Exporting: a LoRA of rank 2 r
#
# W has moved, so A and B alone are no longer the whole result. But by the formula above the whole change is a product:
#
# $$
# M_T - W_0 = \begin{pmatrix} (1+\lambda)s B_T & -\lambda s B_K \end{pmatrix}
# \begin{pmatrix} A_T \\ A_K \end{pmatrix}
# $$
#
# a LoRA of rank 2 r, or r at K = 0, that any tool can read. Where $A_K, B_K$ were not written down, the same comes out
# of the singular value decomposition of $M_T - W_0$, cut at 2 r.

# %%
change = late.merged - trial.W0  # (d_out, d_in)
r = trial.method.r
U, sigma, Vt = np.linalg.svd(change)
B2, A2 = U[:, : 2 * r] * sigma[: 2 * r], Vt[: 2 * r]  # (d_out, 2 r), (2 r, d_in)
print(f"rank {2 * r}: off by {np.abs(B2 @ A2 - change).max():.1e}, ", end="")
print(f"σ_{2 * r} = {sigma[2 * r - 1]:.2f}, σ_{2 * r + 1} = {sigma[2 * r]:.0e}")

# %% [markdown]
# `save_peft` does the same for every layer of a model, and writes the files that Hugging Face PEFT reads: an ordinary
# LoRA of rank 16, and of 48 = 3 · 16 where GPT-2 has q, k and v in one matrix. Here it comes back into a fresh model.

# %%
delta_model, _ = results["Delta-LoRA, K = 10"][0]
with tempfile.TemporaryDirectory() as folder:
    written = save_peft(folder, delta_model)
    again = load_peft(folder, minilora.pretrained())
ids = held_out[0][0]
logits, logits_again = (m(ids).data for m in (delta_model, again))
ranks = sorted({layer.method.r for layer in adapted_layers(again).values()})
print(f"{written['peft_type']} of ranks {' and '.join(map(str, ranks))}")
off, largest = np.abs(logits - logits_again).max(), np.abs(logits).max()
print(f"logits off by {off:.1e}, the largest is {largest:.0f}")

# %% [markdown]
# ## Exercises
#
# **1. The rule.** Write U1 and U2. `p` is a dict with A, B, A_before, B_before, as they are after the optimizer's step.
# Return the new W; A_before and B_before in `p` must be ready for the next step. Optimizers move A and B in place.


# %%
def after_step(W, p, s, update_ratio):
    """The new W (d_out, d_in)."""
    ...


# %%
def walk(f, steps, s=0.5, update_ratio=3.0):
    """(W − W_0, λ s (B A − B_0 A_0)) after random moves of A and B, in place."""
    rng = np.random.default_rng(0)
    A, B, W0 = (rng.standard_normal(shape) for shape in [(2, 7), (5, 2), (5, 7)])
    p, W = {"A_before": A.copy(), "B_before": B.copy()}, W0.copy()
    first = B @ A
    for _ in range(steps):
        A += rng.standard_normal(A.shape)
        B += rng.standard_normal(B.shape)
        p["A"], p["B"] = A, B
        W = f(W, p, s, update_ratio)
    return W - W0, update_ratio * s * (B @ A - first)


assess(
    "the rule",
    after_step,
    (
        "after one step W must have moved by λ s (B A − B' A')",
        lambda f: np.allclose(*walk(f, 1)),
    ),
    (
        "after several steps it does not telescope: is U2 there, and a copy?",
        lambda f: np.allclose(*walk(f, 4)),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def after_step(W, p, s, update_ratio):
#     change = s * (p["B"] @ p["A"] - p["B_before"] @ p["A_before"])  # U1
#     p["A_before"], p["B_before"] = p["A"].copy(), p["B"].copy()  # U2
#     return W + update_ratio * change
# ```
#
# </details>
#
# **2. Export without a decomposition.** Return $B'$ (d_out, 2 r) and $A'$ (2 r, d_in) with $B'A' = M_T - W_0$.


# %%
def as_lora(A, B, A_K, B_K, s, update_ratio):
    """(B', A') from the matrices of the last step and of step K."""
    ...


# %%
pair = lambda f: f(late.p.A, late.p.B, start.p.A, start.p.B, s, ratio)
assess(
    "export",
    as_lora,
    (
        "B' must be (d_out, 2 r) and A' (2 r, d_in)",
        lambda f: [a.shape for a in pair(f)] == [(24, 6), (6, 32)],
    ),
    (
        "B' A' is not M − W_0: where do s, λ and 1 + λ stand?",
        lambda f: np.allclose(np.matmul(*pair(f)), change),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def as_lora(A, B, A_K, B_K, s, update_ratio):
#     B2 = np.hstack([(1 + update_ratio) * s * B, -update_ratio * s * B_K])
#     return B2, np.vstack([A, A_K])
# ```
#
# </details>
#
# **3. SGD with momentum.** At which rate does the control follow Delta-LoRA (K = 0, SGD with **momentum** μ) exactly?
# The velocity is $u \leftarrow \mu u + g$, and the step $-\eta u$.


# %%
def control_rate(lr, momentum, update_ratio):
    """The control's rate."""
    ...


# %%
def follow(rate, momentum, lr=2e-4, steps=12):
    """How far apart both are after some steps of SGD with momentum."""
    merged = []
    for t, own in ((delta.resized(), lr), (control.resized(), rate)):
        optimizer = minilora.SGD(t.layer.arrays.trainable(), own, momentum)
        for _ in range(steps):
            y = t.layer(minilora.Tensor(t.x))
            optimizer.zero()
            minilora.backward(y, y.data - t.c)
            optimizer.step()
            t.layer.after_step()
        merged.append(t.merged)
    return np.abs(merged[0] - merged[1]).max()


assess(
    "SGD with momentum",
    control_rate,
    (
        "without momentum it is η / (1 + λ)",
        lambda f: follow(f(2e-4, 0.0, ratio), 0.0) < 1e-12,
    ),
    (
        "u is linear in the gradients: which factor does it carry?",
        lambda f: follow(f(2e-4, 0.8, ratio), 0.8) < 1e-12,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def control_rate(lr, momentum, update_ratio):
#     return lr / (1 + update_ratio)
# ```
#
# u carries the factor 1 + λ, as each g does; μ changes nothing of it.
#
# </details>
#
# **4. How large can the rank get?** The bound on the rank of $W_T - W_0$ for any layer, rank and K, for T > K.


# %%
def rank_bound(r, start_step, d_out, d_in):
    """The largest rank that W_T − W_0 can have."""
    ...


# %%
def rank_of(d_out, d_in, **options):
    """The rank that a run has."""
    method = methods.create("delta_lora", **options)
    t = Trial(method, N=40, d_in=d_in, d_out=d_out).after(9)
    return np.linalg.matrix_rank(t.W - t.W0)


agrees = lambda f, d_out, d_in, r, K: (
    f(r, K, d_out, d_in) == rank_of(d_out, d_in, r=r, start_step=K)
)
assess(
    "the rank",
    rank_bound,
    ("two products of rank r each, for a late K", lambda f: agrees(f, 24, 32, 3, 4)),
    ("which of the two products is zero at K = 0?", lambda f: agrees(f, 24, 32, 3, 0)),
    ("a matrix has no more rank than rows", lambda f: agrees(f, 5, 32, 3, 4)),
    ("a matrix has no more rank than columns", lambda f: agrees(f, 24, 5, 3, 4)),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rank_bound(r, start_step, d_out, d_in):
#     return min(r if start_step == 0 else 2 * r, d_out, d_in)
# ```
#
# </details>
