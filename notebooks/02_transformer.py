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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/02_transformer.ipynb)
#
# # 02 · The transformer by hand
#
# One block of a GPT, forward in NumPy, and then every line of its backward, derived and written. At the end the whole
# block agrees with minilora's engine to 12 digits, and we break lines to see how wrong is seen.
#
# **After this you can**
#
# - write a transformer block forward with the shape of every array
# - derive the backward of a linear layer, softmax, attention, layer norm and GELU from their index forms
# - say what each backward needs, and so what training must keep
# - recognise a missing term by the report of the gradient check
# - say why a tied embedding receives two gradients
#
# Read before: [01 · The engine](01_engine.ipynb).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora

# %%
import math

import numpy as np

import minilora
from minilora import plots
from minilora.data import CharTokenizer
from minilora.engine import Saved
from minilora.gpt import GPT, Block, GPTConfig
from minilora.tools.exercises import assess
from minilora.tools.gradcheck import gradcheck

batch, T, d, heads = 2, 5, 8, 2
N, e = batch * T, d // heads  # rows are tokens; each head is e wide
rng = np.random.default_rng(0)


def check(forward, backward, title, **arrays):
    """Check what backward(dy, saved) returns, gradients in the order of ``arrays``."""
    y, saved = forward(**arrays)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    grads = dict(zip(arrays, backward(dy, Saved(saved)), strict=True))
    return gradcheck(lambda **a: (forward(**a)[0] * dy).sum(), grads, arrays, title)


# %% [markdown]
# Every operation here is a pair: `forward` returns $y$ and *all* that its backward will need, `backward` takes $dy$ and
# that. The tags F1, B1 … are those of `minilora/ops.py`.
#
# ## Linear
#
# $$y_{ni} = \sum_j x_{nj} W_{ij} + b_i \qquad\text{(F1)}$$
#
# Ask of each input which outputs it reaches, and with what factor.
#
# - $x_{nj}$ reaches $y_{ni}$ for every $i$, through $W_{ij}$: $\;dx_{nj} = \sum_i dy_{ni} W_{ij}$ (B1)
# - $W_{ij}$ reaches $y_{ni}$ for every $n$, through $x_{nj}$: $\;dW_{ij} = \sum_n dy_{ni} x_{nj}$ (B2)
# - $b_i$ reaches $y_{ni}$ for every $n$, with factor 1: $\;db_i = \sum_n dy_{ni}$ (B3)


# %%
def linear(x, W, b):  # x (N, d_in), W (d_out, d_in), b (d_out,)
    return x @ W.T + b, {"x": x, "W": W}  # (N, d_out) F1


def linear_backward(dy, saved):
    dx = dy @ saved.W  # (N, d_in) B1
    dW = dy.T @ saved.x  # (d_out, d_in) B2
    db = dy.sum(axis=0)  # (d_out,) B3
    return dx, dW, db


draw = lambda *shape: rng.standard_normal(shape)
print(check(linear, linear_backward, "linear", x=draw(N, d), W=draw(3, d), b=draw(3)))

# %% [markdown]
# Note who needs what: $x$ is there for $dW$ alone, $W$ for $dx$ alone. Freeze $W$, and $x$ need not be kept. All of
# LoRA's memory hangs on this line.
#
# ## Softmax
#
# For one row, $P_i = \exp(S_i) / Z$ with $Z = \sum_k \exp(S_k)$. Both numerator and $Z$ depend on $S_j$, the numerator for
# $i = j$ alone. With $\delta_{ij} = 1$ for $i = j$ and 0 otherwise:
#
# $$\begin{aligned}
# \frac{\partial P_i}{\partial S_j} &= \frac{\delta_{ij} \exp(S_i)}{Z} - \frac{\exp(S_i)}{Z^2} \exp(S_j) \\
# &= P_i (\delta_{ij} - P_j)
# \end{aligned}$$
#
# Multiply by $dP_i$ and sum over $i$:
#
# $$\begin{aligned}
# dS_j &= \sum_i dP_i\, P_i (\delta_{ij} - P_j) \\
# &= P_j \Big(dP_j - \sum_i P_i\, dP_i\Big) \quad\text{(B3)}
# \end{aligned}$$
#
# A row of $dP$, less its mean under $P$, weighted by $P$. It sums to zero, as it must: adding a number to all of $S$
# changes nothing.


# %%
def softmax(S):
    # shifted, so that exp cannot overflow; the result is the same
    E = np.exp(S - S.max(axis=-1, keepdims=True))
    P = E / E.sum(axis=-1, keepdims=True)
    return P, {"P": P}


def softmax_backward(dP, saved):
    P = saved.P
    return (P * (dP - (P * dP).sum(axis=-1, keepdims=True)),)  # B3


print(check(softmax, softmax_backward, "softmax", S=draw(3, 5)))

# %% [markdown]
# ## Attention
#
# Per sample and head, with $q, k, v$ `(T, e)`, where $e$ is the width of a head, and with query $i$ looking at keys
# $j \le i$:
#
# $$\begin{aligned}
# S_{ij} &= \tfrac{1}{\sqrt e} \sum_c q_{ic} k_{jc} &\text{(F1)} \\
# P_i &= \mathrm{softmax}_{j \le i}\, S_i &\text{(F2)} \\
# y_{ic} &= \sum_j P_{ij} v_{jc} &\text{(F3)}
# \end{aligned}$$
#
# Backwards, from F3 to F1, again by asking who reaches whom:
#
# - $v_{jc}$ reaches $y_{ic}$ through $P_{ij}$: $\;dv_{jc} = \sum_i P_{ij}\, dy_{ic}$ (B1)
# - $P_{ij}$ reaches $y_{ic}$ through $v_{jc}$: $\;dP_{ij} = \sum_c dy_{ic} v_{jc}$ (B2)
# - the softmax: (B3), as above. Where $j > i$, $P_{ij} = 0$, and so $dS_{ij} = 0$: the mask needs no line of its own
# - $q_{ic}$ reaches $S_{ij}$ through $k_{jc}/\sqrt e$: $\;dq_{ic} = \frac{1}{\sqrt e} \sum_j dS_{ij} k_{jc}$ (B4)
# - $k_{jc}$ reaches $S_{ij}$ through $q_{ic}/\sqrt e$: $\;dk_{jc} = \frac{1}{\sqrt e} \sum_i dS_{ij} q_{ic}$ (B5)


# %%
def split(a):  # (N, d) as (batch, heads, T, e)
    return a.reshape(batch, -1, heads, a.shape[1] // heads).transpose(0, 2, 1, 3)


def join(a):  # and back
    return a.transpose(0, 2, 1, 3).reshape(-1, a.shape[1] * a.shape[3])


def attention(q, k, v):  # (N, d) each
    q, k, v = split(q), split(k), split(v)  # (batch, heads, T, e)
    S = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # (batch, heads, T, T) F1
    sees = np.tri(S.shape[-1], dtype=bool)  # query i sees key j ≤ i
    P, _ = softmax(np.where(sees, S, -np.inf))  # (batch, heads, T, T) F2
    return join(P @ v), {"q": q, "k": k, "v": v, "P": P}  # (N, d) F3


def attention_backward(dy, saved):
    q, k, v, P = saved.q, saved.k, saved.v, saved.P
    dy, scale = split(dy), 1 / math.sqrt(q.shape[-1])
    dv = P.swapaxes(-1, -2) @ dy  # (batch, heads, T, e) B1
    dP = dy @ v.swapaxes(-1, -2)  # (batch, heads, T, T) B2
    (dS,) = softmax_backward(dP, saved)  # (batch, heads, T, T) B3
    dq = scale * (dS @ k)  # (batch, heads, T, e) B4
    dk = scale * (dS.swapaxes(-1, -2) @ q)  # (batch, heads, T, e) B5
    return join(dq), join(dk), join(dv)


print(
    check(
        attention, attention_backward, "attention", q=draw(N, d), k=draw(N, d), v=draw(N, d)
    )
)

# %% [markdown]
# `minilora/ops.py` stores $S$ and $P$ transposed and in blocks, and skips the half that the mask hides. The equations
# are these.
#
# ## Layer norm
#
# Per row, $\mu = \frac1d \sum_j x_j$, and
#
# $$\begin{aligned}
# r &= \Big(\tfrac1d \sum_j (x_j - \mu)^2 + \epsilon\Big)^{-1/2} &\text{(F1)} \\
# \hat x_j &= (x_j - \mu)\, r &\text{(F2)} \\
# y_j &= g_j \hat x_j + b_j &\text{(F3)}
# \end{aligned}$$
#
# The easy part first: $d\hat x_j = dy_j\, g_j$ (B1), $dg_j = \sum_n dy_{nj} \hat x_{nj}$ (B3), $db_j = \sum_n dy_{nj}$
# (B4). Then $x_j$ reaches every $\hat x_i$ of its row in three ways: directly, through $\mu$, and through $r$.
#
# - $\partial \mu / \partial x_j = 1/d$
# - $\partial r / \partial x_j = -\tfrac12 r^3 \cdot \tfrac2d (x_j - \mu) = -\tfrac{1}{d} r^2\, \hat x_j$. (The mean
#   square depends on $x_j$ through $\mu$ too, but $\sum_i (x_i - \mu) = 0$ makes that part vanish.)
#
# Together, by the product rule on F2:
#
# $$\begin{aligned}
# \frac{\partial \hat x_i}{\partial x_j}
# &= r\,\delta_{ij} - \frac rd - (x_i - \mu)\, \frac1d r^2\, \hat x_j \\
# &= r \Big(\delta_{ij} - \frac1d - \frac1d \hat x_i \hat x_j\Big)
# \end{aligned}$$
#
# Multiply by $d\hat x_i$, sum over $i$, and the three terms stand there:
#
# $$dx_j = r \Big( d\hat x_j - \tfrac1d \sum_i d\hat x_i - \hat x_j \tfrac1d \sum_i d\hat x_i\, \hat x_i \Big)
# \;\text{(B2)}$$


# %%
def layer_norm(x, g, b, eps=1e-5):  # x (N, d), g and b (d,)
    centred = x - x.mean(axis=1, keepdims=True)  # (N, d)
    r = ((centred * centred).mean(axis=1, keepdims=True) + eps) ** -0.5  # (N, 1) F1
    x_hat = centred * r  # (N, d) F2
    return g * x_hat + b, {"x_hat": x_hat, "r": r, "g": g}  # (N, d) F3


def layer_norm_backward(dy, saved):
    x_hat, r, g = saved.x_hat, saved.r, saved.g
    dx_hat = dy * g  # (N, d) B1
    along = (dx_hat * x_hat).mean(axis=1, keepdims=True)  # (N, 1)
    dx = r * (dx_hat - dx_hat.mean(axis=1, keepdims=True) - x_hat * along)  # (N, d) B2
    dg = (dy * x_hat).sum(axis=0)  # (d,) B3
    db = dy.sum(axis=0)  # (d,) B4
    return dx, dg, db


print(
    check(layer_norm, layer_norm_backward, "layer norm", x=draw(N, d), g=draw(d), b=draw(d))
)

# %% [markdown]
# In words: $\hat x$ has mean 0 and a fixed length, whatever $x$ is. So no change of $x$ moves $\hat x$ along the
# constant vector or along itself, and both parts of $d\hat x$ are removed. Kept: $\hat x$ and one number per row, and
# not $x$.
#
# ## GELU
#
# GPT-2's form, with $c = \sqrt{2/\pi}$ and $k = 0.044715$:
#
# $$\begin{aligned}
# t &= \tanh\big(c\,(x + k x^3)\big) &\text{(F1)} \\
# y &= \tfrac12 x\,(1 + t) &\text{(F2)}
# \end{aligned}$$
#
# An entry of $y$ depends on the same entry of $x$ alone. All that is needed is the slope there, which we call $y'$, so
# that $dy$ is the gradient that arrives, as everywhere.
#
# - $\tanh' = 1 - \tanh^2$, and the inner derivative: $\;t' = (1 - t^2)\, c\,(1 + 3 k x^2)$
# - the product rule on F2: $\;y' = \tfrac12 (1 + t) + \tfrac12 x\, t'$ (B1)
# - entry by entry, $dx = dy \cdot y'$ (B2)


# %%
C, K = math.sqrt(2 / math.pi), 0.044715


def gelu(x):
    t = np.tanh(C * (x + K * x * x * x))  # F1
    slope = (1 + t) / 2 + x / 2 * (1 - t * t) * C * (1 + 3 * K * x * x)  # y' B1
    return x * (1 + t) / 2, {"slope": slope}  # F2


def gelu_backward(dy, saved):
    return (dy * saved.slope,)  # B2


print(check(gelu, gelu_backward, "gelu", x=2 * draw(N, d)))

# %% [markdown]
# The slope is computed in the forward pass, where $t$ is at hand: so one array is kept, and not $x$ and $t$.
#
# ## One block
#
# Now put them together, GPT-2's way: normalise, attend, add; normalise, transform, add.


# %%
def block_forward(x, p):
    s = Saved()  # what each operation saved, by its place
    h, s.norm1 = layer_norm(x, p["norm1.g"], p["norm1.b"])  # (N, d)
    q, s.q = linear(h, p["q.W"], p["q.b"])  # (N, d)
    k, s.k = linear(h, p["k.W"], p["k.b"])  # (N, d)
    v, s.v = linear(h, p["v.W"], p["v.b"])  # (N, d)
    y, s.attention = attention(q, k, v)  # (N, d)
    z, s.o = linear(y, p["o.W"], p["o.b"])  # (N, d)
    x = x + z  # (N, d)
    h, s.norm2 = layer_norm(x, p["norm2.g"], p["norm2.b"])  # (N, d)
    u, s.up = linear(h, p["up.W"], p["up.b"])  # (N, 4 d)
    a, s.gelu = gelu(u)  # (N, 4 d)
    z, s.down = linear(a, p["down.W"], p["down.b"])  # (N, d)
    return x + z, {place: Saved(kept) for place, kept in vars(s).items()}  # (N, d)


# %% [markdown]
# Backward is the same list, read from below. Two rules are new, and both are the sum over users of notebook 01:
#
# - $x + z$ hands $dy$ to both of its inputs. So at each addition the gradient that goes on along the residual is
#   *added* to the one that comes back through the branch
# - $h$ is used by $q$, $k$ and $v$: three gradients are added


# %%
def block_backward(dy, s):
    grads = {}

    def through(place, backward, dy, names="Wb"):
        dx, *of_parameters = backward(dy, s[place])
        grads.update(
            (f"{place}.{name}", grad)
            for name, grad in zip(names, of_parameters, strict=True)
        )
        return dx

    da = through("down", linear_backward, dy)  # (N, 4 d)
    du = through("gelu", gelu_backward, da, "")  # (N, 4 d)
    dh = through("up", linear_backward, du)  # (N, d)
    # along the residual, and through the branch
    dx = dy + through("norm2", layer_norm_backward, dh, "gb")  # (N, d)
    dz = through("o", linear_backward, dx)  # (N, d)
    dq, dk, dv = attention_backward(dz, s["attention"])  # (N, d) each
    dh = through("q", linear_backward, dq)  # (N, d); h has three users
    dh = dh + through("k", linear_backward, dk) + through("v", linear_backward, dv)
    dx = dx + through("norm1", layer_norm_backward, dh, "gb")  # (N, d)
    return dx, grads


# %% [markdown]
# The judge: the same block in minilora, in float64, with weights that are not small.

# %%
block = Block(GPTConfig(n_positions=T, n_embd=d, n_layer=1, n_head=heads), rng, np.float64)
for _, parameter in block.named_parameters():
    parameter.data = 0.7 * rng.standard_normal(parameter.shape)
p = {name: parameter.data for name, parameter in block.named_parameters()}
x, dy = draw(N, d), draw(N, d)

ours, saved = block_forward(x, p)
dx, grads = block_backward(dy, saved)

x_tensor = minilora.Tensor(x, requires_grad=True)
theirs = block(x_tensor, batch)
minilora.backward(theirs, dy)

relative = lambda a, b: np.abs(a - b).max() / np.abs(b).max()
errors = {"dx": relative(dx, x_tensor.grad)}
errors |= {
    name: relative(grads[name], parameter.grad)
    for name, parameter in block.named_parameters()
}
print(f"forward: {relative(ours, theirs.data):.0e}")
print(
    f"{len(errors)} gradients: at worst {max(errors.values()):.0e}, "
    f"in {max(errors, key=errors.get)}"
)

# %% [markdown]
# The forward pass agrees, and one gradient of seventeen is off by its own size? Look at it before you doubt the rest.

# %%
del errors["k.b"]
print(
    "largest entry of dk.b:",
    f"{np.abs(grads['k.b']).max():.0e};",
    "of dq.b:",
    f"{np.abs(grads['q.b']).max():.1f}",
)
print(f"the other {len(errors)}: at worst {max(errors.values()):.0e}")
assert max(errors.values()) < 1e-12

# %% [markdown]
# $d$`k.b` is zero. Adding one vector to all keys adds one number to a whole row of $S$, which the softmax ignores; what
# both engines hold there is rounding, and relative to nothing any rounding is large. The bias of the keys could be left
# out of GPT-2. The other sixteen agree to the last digits.

# %% [markdown]
# And the judge of both, finite differences, on every entry of $x$ and of the other fifteen parameters.

# %%
names = [name for name in p if name != "k.b"]
loss = lambda **a: (
    block_forward(a["x"], {**p, **{n: a[n.replace(".", "_")] for n in names}})[0] * dy
).sum()
arrays = {"x": x, **{name.replace(".", "_"): p[name] for name in names}}
report = gradcheck(
    loss,
    {"x": dx, **{name.replace(".", "_"): grads[name] for name in names}},
    arrays,
    "block",
)
print(
    f"{len(report.rows)} rows, all right: {bool(report)}; worst relative error "
    f"{report.worst_error:.0e}"
)

# %% [markdown]
# ## Broken on purpose
#
# Leave out one term at a time, as one does on a Friday.


# %%
def without_mean(dy, s):
    dx_hat = dy * s.g
    dx = s.r * (dx_hat - s.x_hat * (dx_hat * s.x_hat).mean(axis=1, keepdims=True))
    return dx, (dy * s.x_hat).sum(axis=0), dy.sum(axis=0)


def without_length(dy, s):
    dx_hat = dy * s.g
    return (
        s.r * (dx_hat - dx_hat.mean(axis=1, keepdims=True)),
        (dy * s.x_hat).sum(axis=0),
        dy.sum(axis=0),
    )


def unscaled_attention(dy, s):
    dq, dk, dv = attention_backward(dy, s)
    return math.sqrt(e) * dq, dk, dv


def softmax_without_mean(dP, s):
    return (s.P * dP,)


def gelu_without_product_rule(x):
    t = np.tanh(C * (x + K * x * x * x))
    return x * (1 + t) / 2, {"slope": (1 + t) / 2}


norm, three = (
    {"x": draw(N, d), "g": draw(d), "b": draw(d)},
    {"q": draw(N, d), "k": draw(N, d), "v": draw(N, d)},
)
broken = {
    "layer norm: mean forgotten": check(layer_norm, without_mean, "", **norm),
    "layer norm: x_hat term forgotten": check(layer_norm, without_length, "", **norm),
    "attention: dq without 1/√e": check(attention, unscaled_attention, "", **three),
    "softmax: mean forgotten": check(softmax, softmax_without_mean, "", S=draw(3, 5)),
    "gelu: product rule forgotten": check(
        gelu_without_product_rule, gelu_backward, "", x=2 * draw(N, d)
    ),
}
for name, result in broken.items():
    wrong = next(row for row in result.rows if not row.ok)
    print(f"{name:<34}{wrong.array}  {wrong.advice}")

# %%
plots.show(
    plots.bars(
        {name: result.worst_error for name, result in broken.items()},
        "Five forgotten terms",
        "relative error",
    ),
    "Bars of the relative error for five broken lines, between 0.3 and 1; a right line "
    "would be below 1e-11",
)

# %% [markdown]
# Each is far from right, and none would have crashed: training goes on with such gradients, only worse. A constant
# factor is named exactly; a missing term is given by its size. (The two numbers for one mistake differ. The report
# compares lengths: that of all that is missing with that of the gradient. A bar is about one entry: the largest error,
# relative to the gradient's largest entry.)
#
# ## What the heads look at
#
# The forward above runs the shipped model too. Here are the $P$ of one of its blocks, for words from *Romeo and Juliet*.

# %%
model, tokenizer = minilora.pretrained(), CharTokenizer()
text = "O Romeo, wherefor"
ids = tokenizer.encode(text)
batch, T, heads = 1, len(ids), model.config.n_head  # split() reads these
stream = model.tokens.data[ids] + model.positions.data[:T]  # (T, d)
probabilities = []
for shipped in model.blocks:
    stream, saved = block_forward(
        stream, {name: parameter.data for name, parameter in shipped.named_parameters()}
    )
    probabilities.append(saved["attention"].P[0])  # (heads, T, T)
logits = (
    layer_norm(stream, model.norm.g.data, model.norm.b.data)[0] @ model.tokens.data.T
)  # (T, V)
with minilora.no_grad():
    print(
        "logits against minilora's, in float32: "
        f"{relative(logits, model(ids[None]).data):.0e}"
    )
print(
    "after “wherefor” the likeliest character is",
    repr(tokenizer.decode(logits[-1:].argmax(axis=1))),
)

# %%
plots.show(
    plots.attention(probabilities[0], text, "Block 0 of the shipped model"),
    "Attention of four heads: heads 0, 1 and 3 are dark one to three places below the "
    "diagonal, head 2 not",
)

# %% [markdown]
# Above the diagonal all is zero: nobody sees the future. Three heads look a fixed number of characters back. Head 2
# looks at certain characters, most often at the capitals *O* and *R*. How far back a query looks is the distance to its
# largest $P$:

# %%
for head, P in enumerate(probabilities[0]):
    back = np.arange(T) - P.argmax(axis=1)
    common = np.bincount(back).argmax()
    print(
        f"head {head}: most often {common} back, "
        f"for {(back == common).sum()} of {T} queries"
    )

# %% [markdown]
# So the first block hands each character its three predecessors, each in a head of its own.
#
# ## A weight that is used twice
#
# GPT-2 reads its embedding $E$ `(V, d)` at both ends: at the bottom $x_n = E_{k_n}$ plus the embedding of the position,
# at the top logits $= h E^\top$. By the sum over users, $E$ receives both gradients:
#
# $$dE_{v} = \underbrace{\sum_n d\text{logits}_{nv}\, h_n}_{\text{as output}} +
# \underbrace{\sum_{n:\,k_n = v} dx_n}_{\text{as input}}$$
#
# We take the two apart on a small model, with a copy of $E$ at the top.

# %%
config = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
small = GPT(config, rng=1, dtype=np.float64)
ids = rng.integers(0, 11, (3, 7))
inputs, targets = ids[:, :-1], ids[:, 1:]
minilora.backward(small.loss(inputs, targets))
both = small.tokens.grad.copy()


def untied_gradients():
    """The gradients of E as input and of its copy as output."""
    E, top = (minilora.Tensor(small.tokens.data, requires_grad=True) for _ in range(2))
    where = np.tile(np.arange(6), 3)
    x = minilora.ops.embedding(E, ids=inputs.ravel()) + minilora.ops.embedding(
        small.positions, ids=where
    )
    logits = minilora.ops.linear(small.norm(small.blocks[0](x, 3)), top, None)
    minilora.backward(minilora.ops.cross_entropy(logits, targets=targets.ravel()))
    return E.grad, top.grad


as_input, as_output = untied_gradients()
lengths = {"as input": as_input, "as output": as_output, "tied": both}
print(", ".join(f"{name} {np.linalg.norm(grad):.3f}" for name, grad in lengths.items()))
print(f"their sum against the tied gradient: {relative(as_input + as_output, both):.0e}")
unread = sorted(set(range(11)) - set(inputs.ravel().tolist()))
print(
    "tokens that were not read:",
    unread,
    "their gradient as input:",
    np.abs(as_input[unread]).sum(),
)

# %%
plots.show(
    plots.heat_map(
        (100 * both).round(1),
        "The gradient of the tied embedding, in hundredths",
        "column",
        "token",
        unit="100 dE",
        yticks=range(11),
    ),
    "A matrix of 11 tokens by 8 columns in red and blue, with entries in every row, that "
    "of token 10 included",
)

# %% [markdown]
# Token 10 was never read, and its row has a gradient all the same, from the output side: its logits have to fall, or to
# rise where it was a target. As input alone, its row would be zero.
#
# ## Exercises
#
# The first three answers are checked by finite differences at a random point.


# %%
def right(forward, vjp, **arrays):
    """Whether vjp(dy, *arrays) is the gradient of the sum of forward(*arrays) · dy."""
    dy = np.random.default_rng(1).standard_normal(np.shape(forward(*arrays.values())))
    grads = dict(zip(arrays, vjp(dy, *arrays.values()), strict=True))
    return bool(gradcheck(lambda **a: (forward(*a.values()) * dy).sum(), grads, arrays))


rows, gain = draw(4, 6), draw(6)
ones = np.ones((4, 6))

# %% [markdown]
# **1.** RMS norm, which LLaMA has in place of layer norm: $\hat x = x\, r$ and $y = g \hat x$, with
# $r = (\frac1d \sum_j x_j^2 + \epsilon)^{-1/2}$. One of the three terms goes away. Which?


# %%
def rms_norm(x, g):
    return g * x * ((x * x).mean(axis=1, keepdims=True) + 1e-5) ** -0.5


def rms_norm_vjp(dy, x, g):
    """(dx (N, d), dg (d,))"""
    ...


# %%
assess(
    "rms_norm_vjp",
    rms_norm_vjp,
    (
        "the shapes are those of x and g",
        lambda f: [a.shape for a in f(ones, rows, gain)] == [(4, 6), (6,)],
    ),
    (
        "dg: g_j is used once by every row",
        lambda f: np.allclose(f(ones, rows, gain)[1], rms_norm(rows, 1.0).sum(axis=0)),
    ),
    (
        "a longer x gives the same x_hat, but for ε: so dx must be orthogonal to x",
        lambda f: np.abs((f(ones, rows, gain)[0] * rows).sum(axis=1)).max() < 1e-3,
    ),
    ("not right at a random point", lambda f: right(rms_norm, f, x=rows, g=gain)),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rms_norm_vjp(dy, x, g):
#     r = ((x * x).mean(axis=1, keepdims=True) + 1e-5) ** -0.5
#     x_hat = x * r
#     dx_hat = dy * g
#     dx = r * (dx_hat - x_hat * (dx_hat * x_hat).mean(axis=1, keepdims=True))
#     return dx, (dy * x_hat).sum(axis=0)
# ```
# The mean is not subtracted in the forward pass, so its term goes away.
# </details>
#
# **2.** SiLU, $y = x\, \sigma(x)$ with $\sigma(x) = 1/(1 + \exp(-x))$ and $\sigma' = \sigma (1 - \sigma)$.


# %%
def silu(x):
    return x / (1 + np.exp(-x))


def silu_vjp(dy, x):
    """(dx,)"""
    ...


# %%
assess(
    "silu_vjp",
    silu_vjp,
    ("at x = 0 the slope is 1/2", lambda f: np.allclose(f(ones, 0 * rows)[0], 0.5)),
    ("the product rule has two terms", lambda f: right(silu, f, x=rows)),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def silu_vjp(dy, x):
#     s = 1 / (1 + np.exp(-x))
#     return (dy * (s + x * s * (1 - s)),)
# ```
# </details>
#
# **3.** Cross-entropy, $L = -\frac1N \sum_n \log p_{n, k_n}$ with $p = \mathrm{softmax}(S)$ and $S$ the logits. Derive
# $\partial L / \partial S$: in each row, $\log p_k = S_k - \log Z$.


# %%
def cross_entropy_gradient(logits, targets):
    """dL/dlogits (N, V)"""
    ...


# %%
targets = np.array([2, 0, 5, 2])
cross_entropy = lambda S: -np.log(softmax(S)[0])[np.arange(4), targets].mean()
assess(
    "cross_entropy_gradient",
    cross_entropy_gradient,
    ("each row sums to zero", lambda f: np.abs(f(rows, targets).sum(axis=1)).max() < 1e-12),
    (
        "the target's own entry is negative",
        lambda f: (f(rows, targets)[np.arange(4), targets] < 0).all(),
    ),
    (
        "is the mean over N forgotten?",
        lambda f: right(cross_entropy, lambda dy, S: (dy * f(S, targets),), S=rows),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cross_entropy_gradient(logits, targets):
#     p = softmax(logits)[0]
#     p[np.arange(len(p)), targets] -= 1
#     return p / len(p)
# ```
# </details>
#
# **4.** The tied embedding: from the gradients at both ends, the gradient of $E$.


# %%
def tied_gradient(dlogits, h, dx, ids, V):
    """dE (V, d) from dlogits (N, V), h (N, d), dx (N, d) and the tokens ids (N,)"""
    ...


# %%
ids, dlogits, h, at_input = np.array([1, 3, 1]), draw(3, 5), draw(3, 4), draw(3, 4)
wanted = dlogits.T @ h
np.add.at(wanted, ids, at_input)
assess(
    "tied_gradient",
    tied_gradient,
    (
        "as output alone: dlogitsᵀ h",
        lambda f: np.allclose(f(dlogits, h, 0 * at_input, ids, 5), dlogits.T @ h),
    ),
    (
        "token 1 was read twice and receives twice",
        lambda f: np.allclose(f(dlogits, h, at_input, ids, 5), wanted),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def tied_gradient(dlogits, h, dx, ids, V):
#     dE = dlogits.T @ h
#     np.add.at(dE, ids, dx)
#     return dE
# ```
# </details>
