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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/08_dora.ipynb)
#
# # 08 · DoRA: magnitude and direction
#
# DoRA splits each row of a weight into its length and its direction, and trains both: the length as one number, the
# direction through LoRA. Its gradient goes through a norm that depends on A and B. We derive it in full, see why the
# paper drops a part of it, and why no memory is saved by that here.
#
# **After this you can**
#
# - write DoRA's forward without ever forming B A, and say along which axis its norm runs
# - derive the full gradient line by line, and the detached one, and say what each is the gradient of
# - show that the full gradient of each row is orthogonal to the row, and costs no array more than the detached one
# - tell five things apart that are all called DoRA
# - measure the paper's magnitude and direction analysis yourself, and judge how much it shows
#
# Read before: [03 · LoRA](03_lora.ipynb). The paper: Liu et al. 2024,
# [arXiv 2402.09353](https://arxiv.org/abs/2402.09353).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora

# %%
import textwrap
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

import minilora
from minilora import methods, plots
from minilora.adapter import Adapter
from minilora.data import CharTokenizer, load_corpus, random_batches
from minilora.engine import Saved, Tensor
from minilora.lab.task import learning_rate
from minilora.memory import kept_bytes
from minilora.methods.dora import DoRA
from minilora.methods.dora_detached import DoRADetached
from minilora.nn import Module, Parameter
from minilora.surgery import adapted_layers
from minilora.tools.exercises import assess
from minilora.tools.gradcheck import check_method, gradcheck
from minilora.tools.trace import trace
from minilora.tools.trial import Trial

# %% [markdown]
# ## A row is a length and a direction
#
# Row i of $W$ (d_out, d_in) makes output i: $y_i = W_i \cdot x$. Write it as length times unit vector, let LoRA turn
# the vector, and train the length by itself:
#
# $$W'_i = m_i \frac{V_i}{\lVert V_i \rVert}, \qquad V = W + sBA.$$
#
# At the start $B = 0$ and $m_i = \lVert W_i \rVert$, so that $W' = W$.
#
# In two dimensions one row can be drawn. Here is a row of a small layer before and after 25 steps of training; a `Trial`
# is one adapted layer with random data.

# %%
flat = Trial(methods.create("dora", r=1, alpha=2.0), N=20, d_in=2, d_out=2, seed=26)
trained = flat.after(25, lr=0.03)
V = trained.W + trained.method.scaling * trained.p.B @ trained.p.A
ray = lambda v: ([0.0, v[0]], [0.0, v[1]])
angle = np.linspace(0, 2 * np.pi, 100)
circle = lambda length: (length * np.cos(angle), length * np.sin(angle))
figure = plots.lines(
    {
        "W: the row before": ray(flat.W0[1]),
        "V = W + s B A": ray(V[1]),
        "W' = m V / ‖V‖": ray(trained.merged[1]),
        "length m before": circle(flat.p.m[1]),
        "length m after": circle(trained.p.m[1]),
    },
    title="One row of the weight, d_in = 2",
    xlabel="first entry of the row",
    ylabel="second entry",
)
figure.axes[0].set_aspect("equal")
figure.set_size_inches(7.2, 5.4)
plots.show(
    figure,
    "A row W, the turned row V, and W' along V with its tip on the circle of radius m.",
)

# %% [markdown]
# *To see: A and B turn the row, and how long V becomes does not matter: the tip of W' lies on the circle of radius m,
# which is trained by itself.*
#
# Each **row** has its norm, one per output. The paper writes *column*, for its W is the transpose. Below, in the five
# DoRAs, is one that takes the other axis.
#
# ## Forward, and a norm without B A
#
# | | | shape |
# | --- | --- | --- |
# | F1 | $h = xA^\top$ | (N, r) |
# | F2 | $z = xW^\top + h\,(sB)^\top = xV^\top$ | (N, d_out) |
# | F3 | $n_i = \lVert V_i \rVert$ | (d_out,) |
# | F4 | $y = (m / n) \circ z$ | (N, d_out) |
#
# F3 looks as if it needed V, as large as W. Expand the square, with k and l over the r directions:
#
# $$
# \begin{aligned}
# n_i^2 &= \sum_j \Big(W_{ij} + s\sum_k B_{ik}A_{kj}\Big)^2 \\
# &= \sum_j W_{ij}^2 + 2\sum_k sB_{ik} \sum_j W_{ij}A_{kj} \\
# &\quad + \sum_{kl} sB_{ik}\Big(\sum_j A_{kj}A_{lj}\Big)sB_{il} \\
# &= \sum_j (W \circ W)_{ij} \\
# &\quad + \sum_k \big[(2\,WA^\top + sB\,AA^\top) \circ sB\big]_{ik}
# \end{aligned}
# $$
#
# So neither B A nor V is formed. What A and B enter has the shapes (d_out, r) and (r, r); the first sum is of W alone,
# which does not change.


# %%
def norm(W, A, B, s):
    sB = s * B  # (d_out, r)
    cross = 2.0 * (W @ A.T) + sB @ (A @ A.T)  # (d_out, r)
    return np.sqrt((W * W).sum(axis=1) + (cross * sB).sum(axis=1))  # (d_out,) F3


def forward(x, W, A, B, m, s):
    h = x @ A.T  # (N, r) F1
    z = x @ W.T + h @ (s * B).T  # (N, d_out) F2
    n = norm(W, A, B, s)  # (d_out,) F3
    return z * (m / n), (h, z, n)  # (N, d_out) F4


rng = np.random.default_rng(0)
N, d_in, d_out, r, s = 7, 6, 5, 2, 4.0
shapes = {
    "x": (N, d_in),
    "W": (d_out, d_in),
    "A": (r, d_in),
    "B": (d_out, r),
    "m": (d_out,),
}
arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
x, W, A, B, m = arrays.values()
dy = rng.standard_normal((N, d_out))
V = W + s * B @ A
difference = np.abs(norm(W, A, B, s) - np.linalg.norm(V, axis=1)).max()
print(f"n against the norm of V's rows: {difference:.1e}")

# %% [markdown]
# ## The gradient, line by line
#
# Write $g_i = m_i / n_i$, so that F4 is $y_{ti} = g_i z_{ti}$ for token t. $dy_{ti}$ arrives. The unknowns hang on $y$
# in three ways: m through g, V through z, **and V through n**.
#
# **m.** $y_{ti} = z_{ti} m_i / n_i$, in every row t:
#
# $$\text{B1:}\quad dm_i = \sum_t dy_{ti}\, z_{ti} / n_i$$
#
# **z.** In one place:
#
# $$\text{B2:}\quad dz_{ti} = dy_{ti}\, g_i$$
#
# **n.** From $\partial y_{ti} / \partial n_i = -m_i z_{ti} / n_i^2$:
#
# $$
# dn_i = -\frac{m_i}{n_i^2} \sum_t dy_{ti} z_{ti} = -\frac{m_i\, dm_i}{n_i},
# $$
#
# for the sum is $n_i\, dm_i$, by B1.
#
# **V.** $z_{ti} = \sum_j x_{tj} V_{ij}$, and $n_i = (\sum_j V_{ij}^2)^{1/2}$ gives
# $\partial n_i / \partial V_{ij} = V_{ij} / n_i$. So V receives a term through z, and one through n:
#
# $$
# \begin{aligned}
# dV_{ij} &= \sum_t dz_{ti}\, x_{tj} + dn_i \frac{V_{ij}}{n_i} \\
# &= (dz^\top x)_{ij} - k_i V_{ij} \\
# \text{B4:}\quad k_i &= m_i\, dm_i / n_i^2
# \end{aligned}
# $$
#
# **A and B.** $V = W + sBA$ gives $dB = s\,dV A^\top$ and $dA = sB^\top dV$. Put dV in, and multiply from the thin
# side, so that dV itself is never formed. With $h = xA^\top$ and B3, $dh = dz\,(sB)$:
#
# $$
# \begin{aligned}
# \text{B5:}\quad dB &= dz^\top (s h) - s\,k \circ (VA^\top) \\
# \text{B6:}\quad dA &= dh^\top x - (s\,k \circ B)^\top V
# \end{aligned}
# $$
#
# **x.** It reaches z alone: B7, $dx = dz\,V = dz\,W + dh\,A$.


# %%
def backward(dy, x, W, A, B, m, s, full=True):
    _, (h, z, n) = forward(x, W, A, B, m, s)
    dm = (dy * z).sum(axis=0) / n  # (d_out,) B1
    dz = dy * (m / n)  # (N, d_out) B2
    dh = dz @ (s * B)  # (N, r) B3
    k = m * dm / n**2 if full else np.zeros_like(m)  # (d_out,) B4
    VAt = W @ A.T + (s * B) @ (A @ A.T)  # (d_out, r)
    skB = (s * k)[:, None] * B  # (d_out, r)
    dB = dz.T @ (s * h) - (s * k)[:, None] * VAt  # (d_out, r) B5
    dA = dh.T @ x - skB.T @ W - (skB.T @ (s * B)) @ A  # (r, d_in) B6
    dx = dz @ W + dh @ A  # (N, d_in) B7
    return {"x": dx, "A": dA, "B": dB, "m": dm}


loss = lambda **arrays: (forward(s=s, **arrays)[0] * dy).sum()
report = gradcheck(loss, backward(dy, s=s, **arrays), arrays, "DoRA, full gradient")
assert report
print(report)

# %% [markdown]
# The library's file has the same lines, and gives the same numbers:

# %%
dora = methods.create("dora", r=r, alpha=s * r)
p = Saved(A=A, B=B, m=m)
_, saved = dora.forward(x, W, p)
_, grads = dora.backward(dy, Saved(saved), W, p)
mine = backward(dy, s=s, **arrays)
differences = [np.abs(grads[name] - mine[name]).max() for name in "ABm"]
print(f"largest difference {max(differences):.1e}")

# %% [markdown]
# ## What the second term does
#
# Let $D = dz^\top x$ be the first term of dV. How much of it lies along the row?
#
# $$
# \begin{aligned}
# c_i = \langle D_i, V_i \rangle &= g_i \sum_t dy_{ti} \sum_j x_{tj} V_{ij} \\
# &= g_i \sum_t dy_{ti} z_{ti} \\
# &= \frac{m_i}{n_i}\, n_i\, dm_i = m_i\, dm_i
# \end{aligned}
# $$
#
# So $k_i = c_i / n_i^2$, and
#
# $$dV_i = D_i - \frac{\langle D_i, V_i\rangle}{\lVert V_i\rVert^2} V_i,$$
#
# the part of D that is **orthogonal to the row**. It must be so: making $V_i$ longer changes nothing, so there is no
# slope in that direction.

# %%
n, g = norm(W, A, B, s), m / norm(W, A, B, s)
D = g[:, None] * (dy.T @ x)
dm = backward(dy, s=s, **arrays)["m"]
c = (D * V).sum(axis=1)
dV = D - (c / n**2)[:, None] * V
print(f"c − m dm     {np.abs(c - m * dm).max():.1e}")
print(f"dV · V       {np.abs((dV * V).sum(axis=1)).max():.1e}, by row")
print(f"D · V        {np.abs(c).max():.1f} at most")
print(f"s dV Aᵀ − dB {np.abs(s * dV @ A.T - grads['B']).max():.1e}")

# %%
row = flat.W0[1]  # the row of the first figure, at the start: V = W and g = 1
Dt = flat.dW[1]
across = Dt - (Dt @ row) / (row @ row) * row
scale = np.linalg.norm(row) / np.linalg.norm(Dt)
from_tip = lambda v: ([row[0], row[0] - scale * v[0]], [row[1], row[1] - scale * v[1]])
figure = plots.lines(
    {
        "the row V": ray(row),
        "a step along −D, detached": from_tip(Dt),
        "a step along −dV, full": from_tip(across),
        "all rows of this length": circle(np.linalg.norm(row)),
    },
    title="Two gradients of one row, as steps of V",
    xlabel="first entry of the row",
    ylabel="second entry",
)
figure.axes[0].set_aspect("equal")
figure.set_size_inches(7.2, 5.4)
plots.show(
    figure,
    "The full step touches the circle like a tangent; "
    "the detached step also has a part along the row.",
)

# %% [markdown]
# *To see: the full gradient steps along the tangent, the detached one off it.*
#
# If V itself were trained, the part of D along the row would not change the output: it would make V longer or shorter,
# and so the next turns smaller or larger. But A and B are trained. A step of gradient descent with the rate η moves
# V, to first order, by
#
# $$\Delta V = -\eta\, s^2 \big(D A^\top A + B B^\top D\big),$$
#
# where $A^\top A$ mixes the entries of a row and $BB^\top$ mixes the rows. A part of D that lies along its row comes
# out in other directions, and turns the rows too. Measure how much the output moves, per unit of η:


# %%
def change_of_output(D, rate=1e-6):
    """‖change of y‖ divided by the rate, where A and B take a step by this D."""
    y = forward(x, W, A, B, m, s)[0]
    moved = forward(x, W, A - rate * s * B.T @ D, B - rate * s * D @ A.T, m, s)[0]
    return np.linalg.norm(moved - y) / rate


print(f"dV, the full gradient      {change_of_output(dV):5.1f}")
print(f"D, the detached one        {change_of_output(D):5.1f}")
print(f"D's part along the rows    {change_of_output(D - dV):5.1f}")

# %% [markdown]
# So detaching changes how the rows are turned, not only how long V becomes.
#
# ## Detached: the gradient of another function
#
# The paper (section 4.3) holds n constant in backward: B4 becomes k = 0. That is no gradient of the loss. It is the
# gradient of $\tilde y = (m / \bar n) \circ z$, where $\bar n$ stands still at today's value; the file's `surrogate`
# says so, and passes the check. Claimed to be the loss's gradient, it fails:


# %%
class Claimed(DoRADetached):
    surrogate = Adapter.surrogate  # as if backward were the gradient of forward


print(check_method(DoRADetached(r=2), N=5, d_in=6, d_out=5))
report = check_method(Claimed(r=2), N=5, d_in=6, d_out=5)
report = replace(report, title="dora_detached, as if it were the gradient of the loss")
print(report)
plots.show(
    plots.gradient_report(report),
    "x and m pass; A and B fail, for the term through the norm is missing.",
)

# %% [markdown]
# *To see: x and m pass, as n does not depend on them. A and B miss a term, and the report says how large it is.*
#
# ### Break a line
#
# Forget the second term of B6 alone. Would you see it at the start, where B = 0?


# %%
class Forgotten(DoRA):
    def backward(self, dy, saved, W, p):
        dx, grads = super().backward(dy, saved, W, p)
        dh = (dy * (p.m / saved.n)) @ (self.scaling * p.B)
        return dx, grads | {"A": dh.T @ saved.x}  # B6 without its second term


for at_init in (True, False):
    rows = check_method(Forgotten(r=2), N=5, d_in=6, d_out=5, at_init=at_init).rows
    row = next(row for row in rows if row.array == "A" and row.method == "central")
    point = "B = 0" if at_init else "random point"
    print(f"{point:<14}{'ok' if row.ok else 'FAIL'}")
    print(textwrap.fill(row.advice, 88, initial_indent="    ", subsequent_indent="    "))

# %% [markdown]
# ## How different are the two?
#
# On random matrices, and then on the shipped model while it learns the Folio's spelling with the full gradient: at four
# moments, from the same dy in each layer, both gradients of A and B, and the cosine between them.

# %%
cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
flatten = lambda grads: np.concatenate([grads["A"].ravel(), grads["B"].ravel()])
full, detached = (flatten(backward(dy, s=s, full=full, **arrays)) for full in (True, False))
print(f"random matrices: {cosine(full, detached):.2f}")

train_ids = CharTokenizer().encode(load_corpus("folio").train)


def batches(seed):
    return random_batches(train_ids, batch=4, context=128, rng=np.random.default_rng(seed))


def both_gradients(model, ids, targets):
    """For each layer the cosine of the full and the detached gradient of A and B."""
    found, layers = [], adapted_layers(model)
    for step in trace(model, ids, targets):
        if step.layer in layers and step.operation == "dora":
            layer, saved = layers[step.layer], Saved(step.saved)
            full, detached = (
                flatten(
                    methods.create(name).backward(
                        step.dy, saved, layer.base.W.data, layer.p
                    )[1]
                )
                for name in ("dora", "dora_detached")
            )
            found.append(cosine(full, detached))
    return found


EVERY, STEPS = 8, 32
model = minilora.adapt(minilora.pretrained(), "dora", verbose=False)
optimizer = minilora.AdamW(model.trainable(), learning_rate("dora"), clip=1.0)
probe, cosines = next(batches(99)), []


def look(step, history):
    if (step + 1) % EVERY == 0:
        cosines.append(both_gradients(model, *probe))


# For matrices of this size one thread is enough, and sums are rounded alike.
with threadpool_limits(1):
    minilora.train(model, optimizer, batches(0), STEPS, [look], warmup=6)
moments = np.arange(EVERY, STEPS + 1, EVERY)
for step, found in zip(moments, cosines, strict=True):
    mean, least = np.mean(found), min(found)
    print(
        f"step {step:>2}, {len(found)} layers: cosine {mean:.3f} on average, {least:.3f} at least"
    )

# %% [markdown]
# A cosine of 0.93 is an angle of 22°, and 0.99 one of 8°. A row of a real layer has 128 or 512 directions, and one of
# them is projected away. [The comparison](../docs/compare.md) has the losses of both methods side by side.
#
# ## Why full costs no memory here
#
# The paper detaches to save memory, and reports 24.4 % less for LLaMA-7B (its Table 7). An autograd engine that
# differentiates the norm must keep what the norm was made of. Written by hand, B4 uses $k = m\,dm/n^2$, and dm is
# computed anyway. Count, on a layer of 128 → 512, with DoRA on a tape of elementary operations in the two ways that one
# may write it:


# %%
def on_output(x, layer, s, full):
    V = layer.W + layer.B @ layer.A * s
    n = (V**2.0).sum(axis=1) ** 0.5
    return x @ V.T * (layer.m / (n if full else Tensor(n.data)))  # y = (m / n) ∘ x Vᵀ


def on_weight(x, layer, s, full):
    V = layer.W + layer.B @ layer.A * s
    n = (V**2.0).sum(axis=1, keepdims=True) ** 0.5
    unit = V / (n if full else Tensor(n.data))
    return x @ (layer.m.reshape(-1, 1) * unit).T  # y = x W'ᵀ, as the paper writes it


print(f"{'numbers kept for backward':<28}{'full':>10}{'detached':>10}")
for tokens in (128, 1024):
    wide = Trial(methods.create("dora", r=8), N=tokens, d_in=128, d_out=512)
    layer = Module()
    layer.W = Parameter(wide.W0, requires_grad=False)
    layer.A, layer.B, layer.m = (Parameter(wide.p[name]) for name in ("A", "B", "m"))
    for name, tape in [("on the output", on_output), ("on the weight", on_weight)]:
        arriving = Tensor(wide.x, requires_grad=True)
        kept = [
            kept_bytes(tape(arriving, layer, 2.0, full), layer) // 8
            for full in (True, False)
        ]
        print(f"N = {tokens}, tape, {name:<13}{kept[0]:>10,}{kept[1]:>10,}")
    kept = wide.kept_numbers(), wide.of("dora_detached", r=8).kept_numbers()
    print(f"N = {tokens}, by hand{'':<12}{kept[0]:>10,}{kept[1]:>10,}")

# %% [markdown]
# Three things to see. Written on the weight, detaching saves an array of W's shape, 512 · 128 = 65,536 numbers, and two
# vectors of d_out; written on the output, the two vectors alone. By hand it saves nothing: both keep x, h, z and n. So
# the saving is a property of how one differentiates, not of DoRA. And z has a price. It is N · d_out numbers, while what
# the tape on the weight keeps beside x is of W's shape, whatever N is: at N = 1,024 that tape keeps less than our file
# does. Exercise 4 takes that up.
#
# ## Five things that are called DoRA
#
# All are the base model at the start, so a test there shows nothing. Away from it they differ. Take the x, W and A from
# above, a tenth of that B, an m that is 1.2 times the norms of W's rows, and a bias: how far is each from `dora`, in the
# output and in the gradient of B? The numbers are relative, ‖difference‖ / ‖dora's‖.

# %%
distance = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
alpha, B = s * r, 0.1 * B
m = 1.2 * np.linalg.norm(W, axis=1)  # (d_out,)
m_in = 1.2 * np.linalg.norm(W, axis=0)  # (d_in,)
p, G, bias = Saved(A=A, B=B, m=m), dy.T @ x, rng.standard_normal(d_out)


def split(V, m, G):
    """(W', full dV, detached dV) with one norm and one magnitude for each row of V."""
    n = np.linalg.norm(V, axis=1, keepdims=True)
    D = (m[:, None] / n) * G
    return m[:, None] * V / n, D - (D * V).sum(axis=1, keepdims=True) / n**2 * V, D


V, V_alpha = W + s * B @ A, W + alpha * B @ A
merged, dV, D = split(V, m, G)
merged_in, dV_in = (a.T for a in split(V.T, m_in, G.T)[:2])
merged_alpha, dV_alpha, _ = split(V_alpha, m, G)
n = np.linalg.norm(V, axis=1)
z_bias = x @ V.T + bias
dV_bias = (
    D - ((m / n**3) * (dy * z_bias).sum(axis=0))[:, None] * V
)  # y = (m / n) ∘ (z + bias)
named = {  # output, gradient of B
    "1 per output, full gradient": (x @ merged.T + bias, s * dV @ A.T),
    "2 per output, norm held constant": (x @ merged.T + bias, s * D @ A.T),
    "3 per input: a norm for each column": (x @ merged_in.T + bias, s * dV_in @ A.T),
    "4 alpha, not alpha / r": (x @ merged_alpha.T + bias, alpha * dV_alpha @ A.T),
    "5 the bias scaled by m / n as well": (m / n * z_bias, s * dV_bias @ A.T),
}
y, saved = dora.forward(x, W, p)
dB = dora.backward(dy, Saved(saved), W, p)[1]["B"]
print("output    dB")
for name, (output, gradient) in named.items():
    print(f"{distance(output, y + bias):>6.2f}{distance(gradient, dB):>6.2f}  {name}")

# %% [markdown]
# 1 is `dora` here and 2 is `dora_detached`, which is also PEFT's. A file written by 3 holds d_in magnitudes, one for each
# input: as 1 it cannot be loaded where d_in and d_out differ, and where they are equal it gives another output. One
# written by 4 needs another alpha. [Conventions](../docs/conventions.md) says which project does which.
#
# ## The paper's analysis: does DoRA learn like full fine-tuning?
#
# The paper looks at how far magnitudes and directions have moved from the pretrained W at step t, averaged over the K
# rows of a matrix:
#
# $$
# \begin{aligned}
# \Delta M &= \frac{1}{K}\sum_i \big|\, \lVert W'_i \rVert - \lVert W_i \rVert \,\big| \\
# \Delta D &= \frac{1}{K}\sum_i \big(1 - \cos(W'_i, W_i)\big)
# \end{aligned}
# $$
#
# For the query matrices of a vision-language model, over layers and checkpoints, it reports a correlation of −0.62 for
# full fine-tuning, +0.83 for LoRA and −0.31 for DoRA: LoRA moves both together, and DoRA, like full fine-tuning, does
# not. We measure the same on the shipped model: 4 layers, 4 checkpoints, 2 seeds, each method at its recorded learning
# rate.


# %%
def moved(W, W0):
    """(ΔD, ΔM) of a matrix (d_out, d_in)."""
    length, length0 = (np.linalg.norm(w, axis=1) for w in (W, W0))
    cosines = (W * W0).sum(axis=1) / (length * length0)
    return (1 - cosines).mean(), np.abs(length - length0).mean()


def points(method, seed, lr=None):
    """{(path, step): (ΔD, ΔM)} of one run; without ``lr`` at the recorded rate."""
    model = minilora.adapt(minilora.pretrained(), method, seed=seed, verbose=False)
    layers, found = adapted_layers(model), {}

    def look(step, history):
        if (step + 1) % EVERY == 0:
            for path, layer in layers.items():
                W = layer.method.merge(layer.base.W.data, layer.p).astype(float)
                found[path, step + 1] = moved(W, layer.original.astype(float))

    optimizer = minilora.AdamW(model.trainable(), lr or learning_rate(method), clip=1.0)
    with threadpool_limits(1):
        minilora.train(model, optimizer, batches(seed), STEPS, [look], warmup=6)
    return found


METHODS = "full", "lora", "dora"
runs = {method: [points(method, seed) for seed in (0, 1)] for method in METHODS}


def chosen(method, kind="q", step=None, seeds=(0, 1)):
    """ΔD and ΔM, (2, points), of a kind of layer; of all checkpoints without ``step``."""
    found = [runs[method][seed] for seed in seeds]
    keep = lambda path, at: path.endswith("." + kind) and step in (None, at)
    return np.array([xy for run in found for key, xy in run.items() if keep(*key)]).T


plots.show(
    plots.scatter(
        {method: chosen(method) for method in METHODS},
        title="Query matrices: 4 layers, 4 checkpoints, 2 seeds",
        xlabel="change of direction ΔD, 1 − cosine",
        ylabel="change of magnitude ΔM",
        fit=True,
    ),
    "Change of magnitude against change of direction, a rising line for each method. "
    "DoRA's points reach furthest in both.",
)

# %%
correlation = lambda xy: np.corrcoef(xy)[0, 1]


def correlations(text, kind, step=None):
    """A line of the table: for each method the correlations of both seeds."""
    pairs = [
        [correlation(chosen(method, kind, step, [seed])) for seed in (0, 1)]
        for method in METHODS
    ]
    print(f"{kind:<5} {text:<15}" + "".join(f"  {a:>+6.2f}, {b:>+6.2f}" for a, b in pairs))


print("correlation of ΔD, ΔM" + "".join(f"{method:>16}" for method in METHODS))
for kind in ("q", "k", "v", "o", "up", "down"):
    correlations("all checkpoints", kind)
correlations("the last alone", "q", STEPS)

# %% [markdown]
# *To see: all three lines rise, and DoRA's points lie furthest out.* Its recorded rate is twice LoRA's. Is that why? Run
# DoRA at LoRA's rate as well, and look at the query matrices after the last step:

# %%
runs["dora at LoRA's rate"] = [
    points("dora", seed, learning_rate("lora")) for seed in (0, 1)
]
for method in ("lora", "dora at LoRA's rate", "dora"):
    dD, dM = chosen(method, step=STEPS).mean(axis=1)
    print(f"{method:<20} ΔD {dD:.4f}  ΔM {dM:.4f}")

# %% [markdown]
# For ΔD it is: at one rate, DoRA turns the rows as far as LoRA does. ΔM is another matter: at one rate DoRA's is more
# than twice LoRA's. LoRA changes the lengths by the way, while DoRA has m for them, and Adam moves each number that is
# trained by about the learning rate, however small its gradient.
#
# What agrees with the paper and what does not, in this small run:
#
# - For q, full fine-tuning has the lowest correlation of the three in both seeds, and LoRA a high one. That is the
#   paper's order for these two.
# - DoRA does not lie between them here: it is as high as LoRA. **The claim about DoRA is not shown.**
# - No correlation over all checkpoints is negative. Time moves both ΔM and ΔD, and that alone correlates them. At the
#   last checkpoint alone, q is negative for full fine-tuning, and near 0 for the others; but that is four points each.
# - In k, v, o, up and down the order of the methods changes from kind to kind.
#
# A correlation of a few dozen points that share layers and runs is a weak witness. It does not say which method learns
# better: that is what [the comparison](../docs/compare.md) is for.
#
# ## Two ends: the start, and a row of zeros
#
# At the start m = ‖W‖ and B = 0, so W' = W. A row of W that is zero has no direction: 0 / 0. Real checkpoints have such
# rows. The file adds 1e-30 to n², far below what float32 resolves of a live row, and gets m / n = 0 there.

# %%
dead = Trial(methods.create("dora", r=3))
print("change of W' at the start:", np.abs(dead.merged - dead.W0).max())

W = dead.W0.copy()
W[0] = 0.0
arrays, _ = dead.method.init(W, np.random.default_rng(0), {})
p = Saved(arrays)
y, saved = dead.method.forward(dead.x, W, p)
_, grads = dead.method.backward(y - dead.c, Saved(saved), W, p)
print("finite:", np.isfinite(y).all() and all(np.isfinite(a).all() for a in grads.values()))
row_0 = np.abs(y[:, 0]).max(), grads["m"][0], np.abs(grads["B"][0]).max()
print("row 0: output {}, dm {}, dB {}".format(*row_0))
with np.errstate(invalid="ignore"):
    print("without it: m / n =", (arrays["m"] / np.linalg.norm(W, axis=1))[0])

# %% [markdown]
# Finite, and honest about the price: such a row gets no gradient, neither for m nor for B. It stays zero for ever.
#
# ## Exercises
#
# Each answer is a function whose body is `...`; the cell below it says how far you are.
#
# **1. The norm, cheaply.** $\lVert V_i \rVert$ without forming B A or V. What is made of W alone may have W's shape.


# %%
def row_norms(W, A, B, s):
    """‖V_i‖ (d_out,) for V = W + s B A."""
    ...


# %%
class Watched(np.ndarray):
    """An array that notes the size of each array that is made of it."""

    sizes = []

    def __array_finalize__(self, source):
        self.sizes.append(self.size)

    def __array_function__(self, function, types, args, options):
        made = super().__array_function__(function, types, args, options)
        self.sizes.append(np.size(made))
        return made


def thin(f):
    """Whether nothing that is made of A and B is as large as W."""
    Watched.sizes.clear()
    f(W5, A5.view(Watched), B5.view(Watched), 0.7)
    return max(Watched.sizes) < W5.size


draw = np.random.default_rng(5).standard_normal
W5, A5, B5 = draw((5, 6)), draw((2, 6)), draw((5, 2))
lengths = lambda B: np.linalg.norm(W5 + 0.7 * B @ A5, axis=1)
length = lambda f, B: np.allclose(f(W5, A5, B, 0.7), lengths(B))
assess(
    "the norm, cheaply",
    row_norms,
    ("with B = 0 it must be the norm of W's rows", lambda f: length(f, 0 * B5)),
    (
        "wrong for B ≠ 0: are both the cross term and the square of s B A there?",
        lambda f: length(f, B5),
    ),
    ("it is right, but forms B A, or another array as large as W", thin),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def row_norms(W, A, B, s):
#     sB = s * B
#     cross = 2 * (W @ A.T) + sB @ (A @ A.T)
#     return np.sqrt((W * W).sum(axis=1) + (cross * sB).sum(axis=1))
# ```
#
# </details>
#
# **2. From detached to full.** Given the detached D (d_out, d_in) and V, return the full dV.


# %%
def full_gradient(D, V):
    """dV (d_out, d_in)."""
    ...


# %%
D5, V5 = draw((5, 6)), draw((5, 6))
assess(
    "from detached to full",
    full_gradient,
    (
        "each row must be orthogonal to V's row",
        lambda f: np.allclose((f(D5, V5) * V5).sum(axis=1), 0),
    ),
    (
        "orthogonal, but not dV: only the part of D along V goes",
        lambda f: np.allclose(f(D, V), dV),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def full_gradient(D, V):
#     return D - (D * V).sum(axis=1, keepdims=True) / (V * V).sum(axis=1, keepdims=True) * V
# ```
#
# </details>
#
# **3. The other axis.** The merged weight of the DoRA that has one norm and one magnitude per **input**.


# %%
def merge_per_input(W, A, B, m_in, s):
    """W' (d_out, d_in), whose column j has the length m_in[j]."""
    ...


# %%
m_5 = np.linspace(0.5, 1.5, 6)
other = lambda f: f(W5, A5, B5, m_5, 0.7)
assess(
    "the other axis",
    merge_per_input,
    (
        "the columns do not have the lengths m_in",
        lambda f: np.allclose(np.linalg.norm(other(f), axis=0), m_5),
    ),
    (
        "each column must point along that of V",
        lambda f: np.allclose(np.ptp(other(f) / (W5 + 0.7 * B5 @ A5), axis=0), 0),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merge_per_input(W, A, B, m_in, s):
#     V = W + s * B @ A
#     return m_in * V / np.linalg.norm(V, axis=0)
# ```
#
# </details>
#
# **4. dm without z.** DoRA keeps z (N, d_out) for dm alone. Suppose you had D, V and m, but not z and dy: what is dm?


# %%
def dm_from(D, V, m):
    """dm (d_out,)."""
    ...


# %%
x4, dy4, m4 = draw((7, 6)), draw((7, 5)), np.abs(draw(5)) + 0.5
n4 = np.linalg.norm(V5, axis=1)
D4 = (dy4 * (m4 / n4)).T @ x4
assess(
    "dm without z",
    dm_from,
    (
        "the identity c = m dm holds row by row: dm has d_out numbers",
        lambda f: f(D4, V5, m4).shape == (5,),
    ),
    (
        "not dm: which inner product is c?",
        lambda f: np.allclose(f(D4, V5, m4), (dy4 * (x4 @ V5.T)).sum(axis=0) / n4),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def dm_from(D, V, m):
#     return (D * V).sum(axis=1) / m  # c / m
# ```
#
# It would save z, but D is of W's shape, (d_out, d_in), and costs a product as large as the layer's own: memory against
# time.
#
# </details>
