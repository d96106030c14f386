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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/11_your_method.ipynb)
#
# # 11 · Your own method
#
# A method is one file. Here we take a published idea from its equation to a method that the command line, the suite and
# the trainer find by themselves: derive its gradient, write it, break it, have it graded, and train with it.
#
# **After this you can**
#
# - derive the gradient of an update that you have not seen before, in index form
# - write it as a method file, with equations, shapes and claims that are checked
# - read what the grader says about a wrong line, and know what it cannot tell
# - train with a method of your own, at a learning rate chosen on text that is not reported on
# - put it into minilora, and know which tests hold it from then on
#
# Read before: [03 · LoRA](03_lora.ipynb).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora
import tempfile
import textwrap
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import minilora
from minilora import methods, plots
from minilora.engine import Saved
from minilora.lab.task import Task, tune
from minilora.surgery import adapted_layers
from minilora.tools.catalogue import trained_shapes
from minilora.tools.diff import difference
from minilora.tools.exercises import assess, grade
from minilora.tools.gradcheck import check_method, gradcheck
from minilora.tools.trial import Trial, verdicts

# %% [markdown]
# ## The idea
#
# LoRA trains $r\,(d_\text{in} + d_\text{out})$ numbers in each layer. LoRA-XS ([Bałazy et al.
# 2024](https://arxiv.org/abs/2405.17604)) trains $r^2$, whatever the size of the layer: $A$ and $B$ hold the $r$
# largest singular directions of $W = U \Sigma V^\top$, $A$ with their singular values, and stay frozen; a small matrix
# $R$ between them learns.
#
# $$
# \begin{aligned}
# y &= x\,(W + s\,B R A)^\top && R\;(r, r) \\
# A &= \Sigma_r V_r^\top && (r, d_\text{in}) \\
# B &= U_r && (d_\text{out}, r)
# \end{aligned}
# $$
#
# How many numbers is that, in the shipped model's layers?

# %%
print("W (d_out, d_in)    full   LoRA of rank 8   LoRA-XS of rank 20")
for d_out, d_in in [(128, 128), (512, 128), (128, 512)]:
    numbers = f"{d_out * d_in:>8,}{8 * (d_out + d_in):>17,}{20 * 20:>21,}"
    print(f"{(d_out, d_in)!s:<15}{numbers}")

# %% [markdown]
# ## Forward, in the cheap order
#
# To rank $r$ first, and stay there for as long as possible:
#
# - **F1** $\;h = x A^\top$, $(N, r)$
# - **F2** $\;y = x W^\top + (h R^\top)(s B)^\top$, $(N, d_\text{out})$
#
# ## Backward, line by line
#
# Name the thing in the middle: $u = h R^\top$, so that $u_{nj} = \sum_k h_{nk} R_{jk}$ and $y_{ni} = \dots + \sum_j
# s\,B_{ij}\,u_{nj}$. The loss $L$ is a function of $y$, and $dy_{ni} = \partial L / \partial y_{ni}$.
#
# **B1** $u_{nj}$ reaches $y_{ni}$ through $s B_{ij}$:
# $\;du_{nj} = \sum_i dy_{ni}\, s B_{ij}$, which is `du = dy @ (s * B)`.
#
# **B2** $R_{jk}$ multiplies $h_{nk}$ in every row $n$, and reaches $L$ through $u_{nj}$:
# $\;dR_{jk} = \sum_n du_{nj}\, h_{nk}$, which is `dR = du.T @ h`.
#
# **B3** $h_{nk}$ reaches $u_{nj}$ through $R_{jk}$:
# $\;dh_{nk} = \sum_j du_{nj}\, R_{jk}$, which is `dh = du @ R`.
#
# **B4** $x$ reaches $y$ through $W$, and $h$ through $A$:
# $\;dx = dy\,W + dh\,A$, which is `dx = dy @ W + dh @ A`.
#
# What does backward need? $du$ and $dx$ need no activation, $dR$ needs $h$. So $h$, $r$ numbers per token, is all that
# forward has to keep: $A$ is frozen, and with it goes the need for $x$, as in LoRA-FA.

# %% [markdown]
# ## In plain NumPy, and checked
#
# Two functions, a random point, and the gradient by finite differences and by the complex step.

# %%
rng = np.random.default_rng(0)
N, d_in, d_out, r, s = 5, 7, 6, 3, 2.0
draw = lambda *shape: rng.standard_normal(shape)
x, W, A = draw(N, d_in), draw(d_out, d_in), draw(r, d_in)
B, R, dy = draw(d_out, r), draw(r, r), draw(N, d_out)


def forward(x, R):
    h = x @ A.T  # (N, r) F1
    y = x @ W.T + (h @ R.T) @ (s * B).T  # (N, d_out) F2
    return y, h


def backward(dy, h, R):
    du = dy @ (s * B)  # (N, r) B1
    dR = du.T @ h  # (r, r) B2
    dh = du @ R  # (N, r) B3
    dx = dy @ W + dh @ A  # (N, d_in) B4
    return dx, dR


loss = lambda x, R: (forward(x, R)[0] * dy).sum()  # its gradient with respect to y is dy
y, h = forward(x, R)
dx, dR = backward(dy, h, R)
report = gradcheck(loss, {"x": dx, "R": dR}, {"x": x, "R": R}, "LoRA-XS, by hand")
plots.show(
    plots.gradient_report(report),
    "Four green bars, all far left of the tolerance: dx and dR are right.",
)

# %% [markdown]
# All bars end far left of their tolerance: what is left is rounding. Now a mistake that shapes cannot show: $R$ is
# square, so $h^\top du$ has the shape of $dR$ too.

# %%
print(gradcheck(loss, {"R": h.T @ (dy @ (s * B))}, {"x": x, "R": R}, "dR = hᵀ du"))

# %% [markdown]
# The check names it: *transposed*. Its guesses are for common mistakes; a wrong line may also fit none of them.
#
# ## Zero, and yet it learns
#
# LoRA with $A = B = 0$ is dead: each gradient has the other matrix as a factor. Here the factors of $dR$ are $B$ and
# $A$, which are frozen and not zero. So $R = 0$ is a good start: the model begins as the base model, exactly. The
# authors draw $R$ with a standard deviation of $10^{-5}$ instead; we take the zero.
#
# ## The file
#
# All of it in one file: what is taught and from where, equations with shapes and reasons, what is kept, the shapes of
# the arrays (the trained ones first), and one to three claims that can be tried out. The tags at the ends of lines are those of the docstring. We write it into a
# temporary folder; yours would be `minilora/methods/lora_xs.py`.

# %%
source = '''\
"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters.   Bałazy et al. 2024, arXiv 2405.17604

A and B are the r largest singular directions of W, frozen; what is trained is the r × r
matrix R between them: y = x (W + s B R A)ᵀ. Taught: the authors' code, with Σ on A's side
and s = alpha / r, but R = 0 at the start, where they draw it from N(0, 10⁻¹⁰).

The start, from W = U Σ Vᵀ:
  I1  A  = Σ_r V_rᵀ              (r, d_in)
  I2  B  = U_r                   (d_out, r)

Forward, x (N, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), R (r, r):
  F1  h  = x Aᵀ                  (N, r)
  F2  y  = x Wᵀ + (h Rᵀ) (s B)ᵀ  (N, d_out)

Backward, dy = dL/dy (N, d_out):
  B1  du = dy (s B)     (N, r)     u = h Rᵀ reaches y through s B
  B2  dR = duᵀ h        (r, r)     R_jk times h_k is a part of u_j, in every row
  B3  dh = du R         (N, r)     h_k reaches u_j through R_jk
  B4  dx = dy W + dh A  (N, d_in)  x reaches y through W, and h through A

Kept for backward: h (N, r)
"""

from dataclasses import dataclass

import numpy as np

from ..adapter import Adapter


@dataclass(frozen=True)
class LoRAXS(Adapter):
    r: int = 16
    alpha: float = 16.0

    claims = {
        "starts as the base model": lambda t: (t.merged == t.W0).all(),
        "trains r² numbers, whatever the layer's size": lambda t: (
            t.trained_numbers() == t.resized(d_in=90).trained_numbers() == t.method.r**2
        ),
        "learns from step 1, although R is 0": lambda t: t.grads.R.any(),
    }

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def shapes(self, d_out, d_in):
        return {"R": (self.r, self.r)}, {"A": (self.r, d_in), "B": (d_out, self.r)}

    def init(self, W, rng, shared):
        U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
        A = sigma[: self.r, None] * Vt[: self.r]  # (r, d_in) I1
        B = U[:, : self.r]  # (d_out, r) I2
        return {"R": np.zeros((self.r, self.r))}, {"A": A, "B": B}

    def forward(self, x, W, p):
        h = x @ p.A.T  # (N, r) F1
        y = x @ W.T + (h @ p.R.T) @ (self.scaling * p.B).T  # (N, d_out) F2
        return y, {"h": h}

    def backward(self, dy, saved, W, p):
        du = dy @ (self.scaling * p.B)  # (N, r) B1
        dR = du.T @ saved.h  # (r, r) B2
        dh = du @ p.R  # (N, r) B3
        dx = dy @ W + dh @ p.A  # (N, d_in) B4
        return dx, {"R": dR}

    def factors(self, W, p):
        sBR = (self.scaling * p.B) @ p.R  # (d_out, r)
        return sBR, p.A

    def merge(self, W, p):
        return W + (self.scaling * p.B) @ p.R @ p.A  # (d_out, d_in)
'''

folder = Path(tempfile.mkdtemp())
file = folder / "lora_xs.py"
_ = file.write_text(source, encoding="utf-8")

# %% [markdown]
# ## Graded
#
# `minilora check --file lora_xs.py` on the command line, `grade()` here. Gradients are compared with finite
# differences at a random point, then comes what else [the contract](../docs/contract.md) asks for: `merge` is
# `forward`, nothing that backward is given is changed, float32 stays float32, what is kept is what the docstring says,
# the claims hold.


# %%
def show(path):
    title, *lines = str(grade(path)).split("\n")
    print(textwrap.fill(title.replace(str(folder), "…"), 88), *lines, sep="\n")


show(file)

# %% [markdown]
# `du` and `dh` have no line of their own there: they are no gradients of an array that can be moved, and no shipped
# method has them to compare with. A mistake in them shows in `dR` and `dx`.
#
# Let us break it in five ways, and read what is said.

# %%
mistakes = {
    "s forgotten in B1": (
        "dy @ (self.scaling * p.B)  # (N, r) B1",
        "dy @ p.B  # (N, r) B1",
    ),
    "B2 transposed": ("du.T @ saved.h", "saved.h.T @ du"),
    "B4 without its second term": ("dy @ W + dh @ p.A", "dy @ W"),
    "x kept, and not said": ('{"h": h}', '{"h": h, "x": x}'),
    "merge without s": (
        "return W + (self.scaling * p.B) @ p.R @ p.A",
        "return W + p.B @ p.R @ p.A",
    ),
}
for mistake, (line, wrong) in mistakes.items():
    broken = folder / "broken.py"
    assert line in source
    broken.write_text(source.replace(line, wrong), encoding="utf-8")
    print(f"{mistake}:")
    for mark in grade(broken).marks:
        if mark.verdict != "right":
            print(textwrap.fill(f"    {mark}", 88, subsequent_indent="        "))

# %% [markdown]
# The forgotten $s$ shows as a constant factor in $dR$, and as a missing part in $dx$, where only one of two terms has
# it. The last two have right gradients: they break what the file states about itself.
#
# ## A file in the folder is a method
#
# minilora finds its methods by looking into the folder `methods/`. We let it look into ours as well, so that the
# package stays as it is. From here on nothing knows that the method is new.

# %%
broken.unlink()
methods.__path__.append(str(folder))
print("found:", "lora_xs" in methods.names())
print("trained:", trained_shapes("lora_xs"))
print("options:", methods.options("lora_xs"))
for claim, holds in verdicts("lora_xs").items():
    print("✓" if holds else "✗", claim)

# %% [markdown]
# What does it change in LoRA-FA, which freezes $A$ too?

# %%
equations, _, lines_of_code = difference("lora_fa", "lora_xs").partition("\n\ncode")
print(equations)

# %% [markdown]
# ## At the initial point
#
# `grade` looked at a random point. Here is the check again where training begins, at $R = 0$; and again for a B3 that is
# wrong, with $R$ transposed.

# %%
print(check_method(methods.create("lora_xs", r=3), at_init=True))


class Transposed(methods.get("lora_xs")):
    def backward(self, dy, saved, W, p):
        dx, grads = super().backward(dy, saved, W, p)
        du = dy @ (self.scaling * p.B)
        return dx + du @ (p.R.T - p.R) @ p.A, grads  # dh = du Rᵀ


print()
for at_init, point in [(True, "R = 0"), (False, "random point")]:
    right = check_method(Transposed(r=3), at_init=at_init)
    print(f"R transposed in B3, {point:<14}{'ok' if right else 'FAIL'}")

# %% [markdown]
# At $R = 0$ the mistake passes: $du\,R$ and $du\,R^\top$ are both zero. That is why the checks leave the initial point,
# here as in LoRA at $B = 0$.
#
# ## In a model
#
# Now adapt the shipped model. The end of the training text is held out, to choose by and not to report on.

# %%
task = Task(selection=True)
model = minilora.adapt(task.load(), "lora_xs", r=20)
layer = adapted_layers(model)["blocks.0.q"]
print("blocks.0.q:", {name: a.shape for name, a in layer.p.items()})
print("trained:", *layer.arrays.trainable())

# %% [markdown]
# ## Its learning rate
#
# A new method has a rate of its own; with another's it can only look bad. So we try three, for LoRA with $r = 1$ as
# well, which trains about as many numbers. The losses are on text that is held out from the *training* text: Macbeth,
# on which we report, must not be looked at to choose.

# %%
steps, batch, rates = 30, 4, [5e-3, 2e-2, 5e-2]
rivals = {
    "LoRA-XS, r = 20": methods.create("lora_xs", r=20),
    "LoRA, r = 1": methods.create("lora", r=1, alpha=2.0),
}


def loss_after(task, method, lr, seed):
    # For matrices of this size one thread is enough, and sums are rounded alike.
    with threadpool_limits(1):
        model, _, _ = tune(task, method, steps, lr, batch, seed)
        return minilora.evaluate(model, task.held_out_b)


grid = {
    name: (rates, [loss_after(task, method, lr, seed=0) for lr in rates])
    for name, method in rivals.items()
}
figure = plots.lines(
    grid,
    "Three rates for each",
    "learning rate",
    "held-out loss, nats per character",
    logx=True,
)
plots.show(
    figure, "Two curves over the learning rate; both are lowest at the middle rate, 0.02."
)

# %% [markdown]
# Both are lowest at 0.02, between a smaller and a larger rate that are worse: that is what one has to see before a
# comparison means something. Had the lowest point been at an end, the grid would have been too short.
#
# ## Against LoRA, at equal numbers
#
# Three seeds, each method at its best rate, now on Macbeth. For one seed, both see the same batches.

# %%
final = Task()
best = {name: rates[int(np.argmin(losses))] for name, (_, losses) in grid.items()}
runs = {
    name: [loss_after(final, method, best[name], seed) for seed in range(3)]
    for name, method in rivals.items()
}
before = minilora.evaluate(final.model, final.held_out_b)
for name, losses in runs.items():
    adapted = minilora.adapt(final.load(), rivals[name], verbose=False)
    numbers, after = (
        minilora.count_parameters(adapted)[0],
        ", ".join(f"{x:.3f}" for x in losses),
    )
    print(f"{name:<16} {numbers:,} numbers: {before:.3f} → {after}")
learnt = {name: before - np.array(losses) for name, losses in runs.items()}
figure = plots.bars(
    learnt,
    f"What {steps} steps teach, 3 seeds",
    "fall of the loss on the Folio, nats per character",
)
plots.show(
    figure, "LoRA's bar is longer by more than the three points of either method spread."
)

# %% [markdown]
# LoRA of rank 1 learns more than LoRA-XS here, with fewer numbers, in all three seeds, and by more than the seeds
# differ. The paper claims the opposite and more, that LoRA-XS matches LoRA with *far fewer* numbers; in this toy it does
# not even with as many. The paper's models are much larger, their layers wider, so that $r^2$ is a smaller part of
# LoRA's numbers, and they are trained for longer; the singular directions of a model of 0.8 million parameters may be
# worth less. What is shown: the gradients are right, and the method learns.
#
# ## Into the package
#
# 1. Copy the file to `minilora/methods/lora_xs.py`. No other file is edited.
# 2. `minilora check lora_xs` runs the gradient check at and off the initial point, for several ranks.
# 3. `pytest tests/test_contract.py -k lora_xs` holds it to the whole contract: every entry of the gradient for shapes
#    that Hypothesis draws, each tagged line broken on purpose, the shape comments read while the code runs, bytes
#    kept, exact unmerging, one run to the bit for one seed.
# 4. `minilora sweep --methods lora_xs` finds its learning rate, as above but with more rates and steps;
#    [CONTRIBUTING.md](../CONTRIBUTING.md) says how it is recorded. Until it is, a comparison takes a default rate.
# 5. `minilora compare --methods lora_xs lora` puts it into the table and the figure.
# 6. [CONTRIBUTING.md](../CONTRIBUTING.md) has the rest, such as its names beside the paper's.
#
# ## Exercises
#
# Each answer is a function whose body is `...`; the cell below it says how far you are.
#
# **1 · A diagonal in the middle.** Train a vector $d$ $(r,)$ instead of the matrix $R$:
# $y = x W^\top + (h \circ d)(s B)^\top$. Write its gradient.


# %%
def diagonal_gradient(dy, h, B, s): ...


# %%
d = draw(r)
diagonal_loss = lambda d: ((x @ W.T + (h * d) @ (s * B).T) * dy).sum()
assess(
    "diagonal_gradient",
    diagonal_gradient,
    ("it has one number for each direction", lambda f: f(dy, h, B, s).shape == (r,)),
    ("it is not the derivative by differences: s, or the sum over rows?",
     lambda f: gradcheck(diagonal_loss, {"d": f(dy, h, B, s)}, {"d": d})),
)  # fmt: skip

# %% [markdown]
# <details><summary>Solution</summary>
#
# $d_j$ multiplies $h_{nj}$ in every row, and $h_{nj} d_j$ reaches $y_{ni}$ through $s B_{ij}$:
# $\;dd_j = \sum_n h_{nj} \sum_i dy_{ni}\, s B_{ij}$.
#
# ```python
# def diagonal_gradient(dy, h, B, s):
#     return (h * (dy @ (s * B))).sum(axis=0)
# ```
#
# </details>
#
# **2 · Through the full gradient.** Somebody gives you $dW = dy^\top x$, the gradient of the merged weight, and
# neither $x$ nor $dy$. Write $dR$. (This is why LoRA-XS can be read as gradient descent on $W$ seen through $r \times
# r$ numbers.)


# %%
def dR_from_dW(dW, A, B, s): ...


# %%
assess(
    "dR_from_dW",
    dR_from_dW,
    ("R is r × r", lambda f: f(dy.T @ x, A, B, s).shape == (r, r)),
    (
        "it is not the dR of B2: s, or a transpose?",
        lambda f: Trial.same(f(dy.T @ x, A, B, s), dR),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# $dR = du^\top h = (dy\, s B)^\top (x A^\top) = s\,B^\top (dy^\top x)\, A^\top$.
#
# ```python
# def dR_from_dW(dW, A, B, s):
#     return (s * B).T @ dW @ A.T
# ```
#
# </details>
#
# **3 · The rank for a budget.** The largest rank for which LoRA-XS trains no more numbers in a layer than LoRA of rank
# `r`. Mind that there is a largest rank that a layer has.


# %%
def rank_for_budget(r, d_in, d_out): ...


# %%
assess(
    "rank_for_budget",
    rank_for_budget,
    (
        "for r = 1 and a layer of 128 × 128 it is 16, since 16² = 256",
        lambda f: f(1, 128, 128) == 16,
    ),
    ("it must be a whole number, rounded down", lambda f: f(1, 128, 512) == 25),
    (
        "W of 128 × 512 or 512 × 128 has 128 singular directions, not more",
        lambda f: f(64, 128, 512) == 128 and f(64, 512, 128) == 128,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rank_for_budget(r, d_in, d_out):
#     return min(int(np.sqrt(r * (d_in + d_out))), d_in, d_out)
# ```
#
# </details>
#
# **4 · Another method.** (IA)³ ([Liu et al. 2022](https://arxiv.org/abs/2205.05638)) trains one factor for each output:
# $y = (x W^\top) \circ l$. Forward keeps $z = x W^\top$, as `saved.z`; `p.l` is $l$. Write backward: it returns
# `dx, {"l": dl}`.


# %%
def ia3_backward(dy, saved, W, p): ...


# %%
l = draw(d_out)
given = dy, Saved(z=x @ W.T), W, Saved(l=l)
ia3_loss = lambda x, l: ((x @ W.T * l) * dy).sum()
assess(
    "ia3_backward",
    ia3_backward,
    ("dl has one number for each output", lambda f: f(*given)[1]["l"].shape == (d_out,)),
    (
        "dl is not the derivative by differences",
        lambda f: gradcheck(ia3_loss, {"l": f(*given)[1]["l"]}, {"x": x, "l": l}),
    ),
    (
        "dx is not: x reaches y through W and l",
        lambda f: gradcheck(ia3_loss, {"x": f(*given)[0]}, {"x": x, "l": l}),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def ia3_backward(dy, saved, W, p):
#     dl = (dy * saved.z).sum(axis=0)  # l_i multiplies z_i in every row
#     dx = (dy * p.l) @ W  # z reaches y through l, x reaches z through W
#     return dx, {"l": dl}
# ```
#
# </details>
#
# **5 · The ones that are there.** `minilora exercise dora` writes DoRA's file without its backward, with the equations
# at its top. Fill in the seven lines, and let `minilora check --file dora_exercise.py` grade them, as often as you
# like.
