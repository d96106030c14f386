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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/00_tour.ipynb)
#
# # 00 · The tour
#
# A tiny GPT that has read Shakespeare in modern spelling learns the spelling of 1623, by training 2 % as many numbers
# as it has. We adapt it, train it, look at what changed, fold the change into the weights and take it out again.
#
# **After this you can**
#
# - adapt the shipped model with any method, train it, and read the loss in nats per character
# - say which numbers were trained, and how many
# - merge an adapter for inference, and unmerge it without a trace
# - compare methods by loss, trained numbers and bytes kept for backward
# - check a method's hand-written gradient in one line
#
# Read before: nothing. You need NumPy and the chain rule.

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora

# %%
import math

import numpy as np

import minilora
from minilora import methods, plots
from minilora.data import CharTokenizer, fixed_batches, load_corpus, random_batches
from minilora.lab.task import learning_rate, write_sample
from minilora.surgery import adapted_layers
from minilora.tools import gradcheck
from minilora.tools.exercises import assess

tokenizer, folio = CharTokenizer(), load_corpus("folio")
train_ids = tokenizer.encode(folio.train)
held_out = fixed_batches(
    tokenizer.encode(folio.val), batch=32, context=128, limit=64
)  # from Macbeth, never trained on
print(folio.train[1000:1180])

# %% [markdown]
# That is the First Folio of 1623: *vpon*, *haue*, *loue*. Now the model. It is a GPT-2 with 4 layers of width 128, and
# its tokens are single characters.

# %%
model = minilora.pretrained()
trainable, total = minilora.count_parameters(model)
before = minilora.evaluate(model, held_out)
sample_before = write_sample(model, tokenizer, seed=0)
print(f"{total:,} numbers; loss on the Folio {before:.3f} nats per character")

# %% [markdown]
# A loss of $L$ nats per character means: the model gives the right character the probability $e^{-L}$, in the geometric
# mean over all characters. Here that is $e^{-2.25}$, one in ten.
#
# ## Adapt
#
# LoRA freezes every weight $W$ and adds a product of two thin matrices, $W + \frac{\alpha}{r} B A$ with $A$ `(r, d_in)`
# and $B$ `(d_out, r)`. Only $A$ and $B$ are trained. Here it goes beside the query and value layers of every block.

# %%
model = minilora.adapt(model, "lora", target_modules=["q", "v"], r=8, alpha=16)

# %% [markdown]
# $B$ starts at zero, so nothing has changed yet: the adapted model has the same loss, to the last bit.

# %%
print(minilora.evaluate(model, held_out) == before)

# %% [markdown]
# ## Train
#
# 60 steps of 8 sequences of 128 characters.


# %%
def batches(seed=0):
    return random_batches(train_ids, batch=8, context=128, rng=np.random.default_rng(seed))


optimizer = minilora.AdamW(model.trainable(), lr=5e-3)
history = minilora.train(model, optimizer, batches(), steps=60, warmup=10)
after = minilora.evaluate(model, held_out)
print(f"on the Folio, held out: {before:.3f} before, {after:.3f} after")

# %%
plots.show(
    plots.loss_curves(
        {"each step": history.loss},
        "LoRA learns the Folio's spelling",
        ylabel="loss, nats per character",
    ),
    "The loss of single steps: from 2.2 to about 1.8 nats per character in 60 steps, with "
    "ups and downs of 0.1",
)

# %% [markdown]
# The loss falls from 2.2 to about 1.8. The ups and downs of 0.1 are not training: they are which lines a batch holds.

# %%
sample_after = write_sample(model, tokenizer, seed=0)
for title, sample in {"before": sample_before, "after 60 steps": sample_after}.items():
    print(f"{title}\n{'-' * len(title)}\n{sample}\n")

# %% [markdown]
# Same prompt, same random numbers. Look for the final *e* of *speake* and for speakers' names cut short with a full
# stop, as the Folio has them. It makes no sense before or after: a model of this size spells before it thinks.
#
# ## What was trained
#
# Each adapted layer has an $A$ and a $B$, and the whole base is frozen: `trainable()` is the list of what moved.

# %%
for name, parameter in list(model.trainable().items())[:4]:
    print(f"{name:<24}{parameter.shape!s:<12}{parameter.data.size:>6}")
trainable, total = minilora.count_parameters(model)
print(f"… in all {trainable:,} of {total:,}, {100 * trainable / total:.1f} %")

# %% [markdown]
# The update of one layer is the matrix $\frac{\alpha}{r} B A$. It has 128 · 128 entries, yet rank 8 at most. Its
# singular values say how much of that was used.

# %%
updates = {
    path: layer.method.scaling * layer.p.B @ layer.p.A
    for path, layer in adapted_layers(model).items()
}
shown = {path: updates[path] for path in ("blocks.0.q", "blocks.0.v", "blocks.3.v")}
plots.show(
    plots.singular_values(shown, "Three of the eight updates"),
    "Singular values of three updates on a log axis: each has eight, falling from between "
    "1 and 2 to about 0.2",
)

# %% [markdown]
# Eight values and not one more. That LoRA has the rank we gave it is no discovery; that eight are enough is one, and
# notebook 03 looks at it.
#
# ## Merge, and unmerge
#
# For inference, $W + \frac{\alpha}{r} BA$ is one matrix: no extra product per token. The result is the same except for
# rounding, and taking it apart again is exact, because the base was never touched.

# %%
ids = held_out[0][0][:1, :64]
with minilora.no_grad():
    apart = model(ids).data
    minilora.merge(model)
    merged = model(ids).data
    minilora.unmerge(model)
    again = model(ids).data
difference = np.abs(merged - apart).max()
print(
    f"merged against unmerged: largest difference {difference:.0e} at logits up to "
    f"{np.abs(apart).max():.0f}"
)
print("after unmerge, equal to the bit:", np.array_equal(again, apart))

# %% [markdown]
# The difference is float32's rounding: 24 bits, a few hundred sums.
#
# ## Three methods in one loop
#
# Every method is called the same way, so a comparison is a loop. LoRA-FA freezes $A$ too, and so need not keep a layer's
# input for backward. VeRA shares random $A$ and $B$ between all layers and trains two vectors.

# %%
rows, curves = [], {}
for name in ("lora", "lora_fa", "vera"):
    model = minilora.adapt(
        minilora.pretrained(), name, target_modules=["q", "v"], verbose=False
    )
    optimizer = minilora.AdamW(model.trainable(), lr=learning_rate(name))
    history = minilora.train(model, optimizer, batches(), steps=40, warmup=10)
    trained, _ = minilora.count_parameters(model)
    rows.append(
        (name, minilora.evaluate(model, held_out), trained, history.kept_bytes / 2**20)
    )
    curves[name] = history.loss

print(f"{'method':<10}{'loss':>8}{'trained':>10}{'kept, MiB':>12}")
for name, loss, trained, kept in rows:
    print(f"{name:<10}{loss:>8.3f}{trained:>10,}{kept:>12.1f}")

# %%
plots.show(
    plots.loss_curves(
        curves,
        "Three methods on the same batches",
        ylabel="loss, nats per character",
        smooth=5,
    ),
    "Three loss curves that rise and fall together; from step 20 on LoRA's is lowest",
)

# %% [markdown]
# VeRA trains a tenth of LoRA's numbers, but keeps about as many bytes. For each token and layer it keeps
# $h = x A^\top$, 64 numbers at its rank of 64; LoRA keeps 8 such numbers, and the 128 of $x$, once for q and v. Each
# method ran once, at its recorded learning rate, for 40 steps: whether 0.03 between two of them means anything needs
# several seeds, which notebook 09 takes.
#
# ## Is the gradient right?
#
# Every gradient here was written by hand. One line compares it, entry by entry in float64, with two numeric gradients:
# finite differences and the complex step. [Notebook 01](01_engine.ipynb) says what they are, the
# [glossary](../docs/glossary.md) in a line each.

# %%
report = gradcheck.check_method(methods.create("lora", r=3))
print(report)

# %%
plots.show(
    plots.gradient_report(report),
    "Relative errors of the gradients of x, A and B: all bars end far left of their "
    "tolerance and are marked right",
)

# %% [markdown]
# Every bar ends well to the left of its black line, the tolerance. With a mistake in one line of backward a bar crosses
# it: [notebook 03](03_lora.ipynb) makes such mistakes.
#
# ## Where to go next
#
# | notebook | what you will be able to do |
# | --- | --- |
# | [01 · The engine](01_engine.ipynb) | build reverse-mode differentiation from nothing, break it, mend it |
# | [02 · The transformer](02_transformer.ipynb) | derive every backward line of a transformer block |
# | [03 · LoRA](03_lora.ipynb) | derive LoRA, and say why a zero $B$ learns |
# | [04 · Memory](04_memory.ipynb) | say where the bytes go, and when LoRA saves none |
# | [05 · LoRA+](05_lora_plus.ipynb) | judge a claim about learning rates |
# | [06 · VeRA](06_vera.ipynb) | train two vectors per layer |
# | [07 · Delta-LoRA](07_delta_lora.ipynb) | see an update telescope |
# | [08 · DoRA](08_dora.ipynb) | differentiate a norm, with and without it held constant |
# | [09 · The family](09_family.ipynb) | compare methods, forgetting included |
# | [10 · On a GPU](10_gpu.ipynb) | run the same on a card, and say what to expect |
# | [11 · Your method](11_your_method.ipynb) | write a method in one file |
#
# ## Exercises
#
# Write each answer in place of `...` and run the cell below it.
#
# **1.** How many numbers does LoRA train on layers of these shapes `(d_out, d_in)`?


# %%
def trained_numbers(r, shapes):
    """``shapes``: a list of (d_out, d_in)."""
    ...


# %%
assess(
    "trained_numbers",
    trained_numbers,
    (
        "one layer (5, 7) at r = 1 has 5 + 7 numbers: B (5, 1) and A (1, 7)",
        lambda f: f(1, [(5, 7)]) == 12,
    ),
    ("both grow with r", lambda f: f(3, [(5, 7)]) == 36),
    (
        "add up the layers: our model has eight of (128, 128)",
        lambda f: f(8, [(128, 128)] * 8) == 16384,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def trained_numbers(r, shapes):
#     return sum(r * (d_out + d_in) for d_out, d_in in shapes)
# ```
# </details>
#
# **2.** LoRA's forward for rows `x (N, d_in)`: the base, and what goes through $A$ and then $B$. Do not form $BA$.


# %%
def lora_forward(x, W, A, B, s):
    """y (N, d_out) of x (N, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), s = α/r."""
    ...


# %%
rng = np.random.default_rng(0)
x, W, A, B = (rng.standard_normal(shape) for shape in [(4, 6), (5, 6), (2, 6), (5, 2)])
y = x @ W.T + 2.0 * x @ A.T @ B.T
assess(
    "lora_forward",
    lora_forward,
    ("the result has shape (N, d_out)", lambda f: f(x, W, A, B, 2.0).shape == (4, 5)),
    ("with B = 0 it is x Wᵀ alone", lambda f: np.allclose(f(x, W, A, 0 * B, 2.0), x @ W.T)),
    (
        "with W = 0 it is s (x Aᵀ) Bᵀ",
        lambda f: np.allclose(f(x, 0 * W, A, B, 2.0), 2.0 * x @ A.T @ B.T),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def lora_forward(x, W, A, B, s):
#     return x @ W.T + (x @ A.T) @ (s * B).T
# ```
# </details>
#
# **3.** The one matrix that does the same.


# %%
def merged_weight(W, A, B, s):
    """W (d_out, d_in) with the adapter folded in."""
    ...


# %%
def leaves_W_alone(f):
    given = W.copy()
    f(given, A, B, 2.0)
    return (given == W).all()


assess(
    "merged_weight",
    merged_weight,
    ("it has the shape of W", lambda f: f(W.copy(), A, B, 2.0).shape == W.shape),
    (
        "x @ merged.T must be LoRA's forward",
        lambda f: np.allclose(x @ f(W.copy(), A, B, 2.0).T, y),
    ),
    ("W itself must not change, or unmerging is not exact", leaves_W_alone),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merged_weight(W, A, B, s):
#     return W + (s * B) @ A
# ```
# </details>
#
# **4.** Papers also give bits per character. Convert.


# %%
def bits_per_character(nats):
    """The loss in bits, from the loss in nats."""
    ...


# %%
assess(
    "bits_per_character",
    bits_per_character,
    ("a fair coin has ln 2 nats and 1 bit", lambda f: math.isclose(f(math.log(2)), 1.0)),
    (
        "96 equally likely characters have log₂ 96 bits",
        lambda f: math.isclose(f(math.log(96)), math.log2(96)),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bits_per_character(nats):
#     return nats / math.log(2)
# ```
# </details>
