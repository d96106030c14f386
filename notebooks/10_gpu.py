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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/10_gpu.ipynb)
#
# # 10 · The same on a GPU
#
# The same code runs on an NVIDIA card through CuPy, since an array is just an array. This notebook runs with or without
# a card. **Its outputs here were made without one, and no figure of a GPU has been measured yet**: what is said about
# speed is arithmetic, with its assumptions beside it.
#
# **After this you can**
#
# - move a model to a card and back, and say what moves and what stays on the host
# - write an operation that runs on NumPy and on CuPy, and recognise the error where two devices are mixed
# - say why chains of small operations are fused, and why a step should wait for the card once
# - estimate a step from launches, bytes and multiplications before you measure it
# - judge whether two devices agree
#
# Read before: [00 · The tour](00_tour.ipynb), [02 · The transformer](02_transformer.ipynb).

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora
# With a GPU runtime, if CuPy is not there yet: !pip install -q "cupy-cuda12x[ctk]"

# %%
import inspect
import textwrap

import numpy as np

import minilora
from minilora import plots
from minilora.backend import array_module, fetch
from minilora.data import CharTokenizer, load_corpus, random_batches
from minilora.engine import nodes_of
from minilora.errors import InputError
from minilora.fast import fused as kernels
from minilora.surgery import linear_layers
from minilora.tools.devices import devices
from minilora.tools.exercises import assess

reason = devices()["cuda"]["reason"]
device = "cpu" if reason else "cuda"
print(f"device: {device}")
if reason:
    print(textwrap.fill(f"no GPU: {reason}", 88))

# %% [markdown]
# `minilora devices` prints the same on the command line, with the card, its memory and the versions. Without a card all
# cells below run on the CPU.
#
# ## The array decides
#
# There is no global switch. An operation asks the array that it is given for its library, NumPy or CuPy, and calls
# that. Here is the linear layer, after its check of the shapes:

# %%
lines = inspect.getsource(minilora.ops.linear_forward).splitlines()
first = next(i for i, line in enumerate(lines) if "array_module" in line)
print(textwrap.dedent("\n".join(lines[first:])))

# %% [markdown]
# `array_module(x)` is `numpy` or `cupy`. The operators `@`, `+=` and `.T` need no module at all, which is why the file
# of a method never names one. So moving the model's arrays moves the computation:

# %%
model = minilora.pretrained().to(device)
ids = CharTokenizer().encode("Enter Macbeth")[None]
with minilora.no_grad():
    logits = model(ids)
print(f"logits {logits.shape} are an array of {array_module(logits.data).__name__}")

# %% [markdown]
# The token ids stayed on the host: they are small, and checks of them there cost the card nothing. So did all random
# numbers, which come from NumPy's generators; a seed gives the same draws on both devices.
#
# The way back is the same call:

# %%
model.to("cpu")
print(f"back again: the weights are arrays of {array_module(model.tokens.data).__name__}")

# %% [markdown]
# `to` moves the model's own arrays and gradients, and nothing else: an optimizer that was made before keeps its buffers
# where they were, so it is made after the move.
#
# Asking for a card that is not there is one error that says what to do:

# %%
try:
    minilora.pretrained().to("cuda" if device == "cpu" else "tpu")
except InputError as error:
    print(textwrap.fill(str(error), 88))

# %% [markdown]
# So is handing an operation arrays of two devices. Without a card, a class whose module is called cupy has to do: that
# is what `array_module` goes by.


# %%
class OfCuPy:
    __module__ = "cupy"


try:
    array_module(np.ones(3), OfCuPy())
except InputError as error:
    print(textwrap.fill(str(error), 88))

# %% [markdown]
# On the command line, `minilora compare`, `train`, `generate` and `pretrain` take `--device cuda`, and do just this.
#
# ## Do two devices agree?
#
# Three steps of LoRA, on the CPU and on the card. Without a card, float64 on the CPU plays the other side: like a GPU
# it rounds differently, and gives an idea of the difference to expect.

# %%
train_ids = CharTokenizer().encode(load_corpus("folio").train)


def three_steps(device, dtype=np.float32):
    """(losses, seconds of a step) of three steps of LoRA from one seed."""
    model = minilora.pretrained()
    for _, parameter in model.named_parameters():
        parameter.data = parameter.data.astype(dtype)
    minilora.adapt(model.to(device), "lora", verbose=False)
    optimizer = minilora.AdamW(model.trainable(), lr=5e-3)
    batches = random_batches(train_ids, batch=4, context=128, rng=np.random.default_rng(0))
    history = minilora.train(model, optimizer, batches, steps=3)
    return history.loss, history.seconds_per_step


sides = {"cpu, float32": three_steps("cpu")}
if device == "cuda":
    sides["cuda, float32"] = three_steps("cuda")
else:
    sides["cpu, float64"] = three_steps("cpu", np.float64)
for name, (losses, seconds) in sides.items():
    shown = "  ".join(f"{loss:.7f}" for loss in losses)
    print(f"{name:<15}{shown}  {seconds * 1e3:.0f} ms a step")
one, other = (losses for losses, _ in sides.values())
distances = [abs(a - b) for a, b in zip(one, other, strict=True)]
print(f"largest difference of the losses: {max(distances):.0e}")

# %% [markdown]
# float32 carries 24 bits, about seven digits; float64 keeps more of them, and a card adds in another order. Either way
# the last digits differ, and from step to step the difference may grow. On a machine with a card, `pytest -m gpu`
# compares single passes on both devices, to 1e-5 of an array's largest entry in float32 and to 1e-12 in float64.
#
# ## Three prices
#
# A step on a card pays three prices, and the largest decides.
#
# 1. **Launches.** Each operation on an array is a kernel that is launched, at some microseconds of Python and driver,
#    however little it computes.
# 2. **Bytes.** An elementwise operation reads and writes all of its arrays: bytes divided by the memory's bandwidth.
# 3. **Multiplications.** The matrix products, divided by the card's rate.
#
# Count them for the shipped model with LoRA on all its layers, at 8 · 128 tokens. The launches are a number that the
# suite counts on its stand-in for CuPy, in one training step: operations that compute something, without views and
# without memory that is only taken. The products are those with the frozen weights; those of A, B and attention come on
# top.

# %%
config, N = model.config, 8 * 128
weights = sum(layer.W.data.size for layer in linear_layers(model).values())
weights += model.tokens.data.size  # they make the logits
products = (
    2 * 2 * N * weights
)  # forward and dx, each multiplies and adds; no dW where W is frozen
LAUNCHES = 540
adapted = minilora.adapt(minilora.pretrained(), "lora", verbose=False)
batch = next(random_batches(train_ids, batch=8, context=128, rng=np.random.default_rng(0)))
loss = adapted.loss(*batch)
print(f"nodes in the graph                {len(nodes_of(loss)):>6,}")
print(f"launches                          {LAUNCHES:>6,}")
print(f"frozen weights' products, 10⁹     {products / 1e9:>6.2f}")
print(
    f"kept for backward, MiB            {minilora.kept_bytes(loss, adapted) / 2**20:>6.1f}"
)

# %% [markdown]
# Now a card. These three numbers are **assumptions**, round ones; put in what the data sheet of yours says. The bytes
# are an estimate too: in both passes a block keeps some 20 arrays of `(tokens, width)`, each written once and read
# once, and makes others, in all some 60 that are written or read.

# %%
CARD = {"seconds per launch": 5e-6, "bytes per second": 1e12, "operations per second": 2e13}


def prices(width, layers=4, tokens=N, card=CARD, launches=LAUNCHES):
    """Seconds of a LoRA step by price, for a model of ``layers`` blocks of ``width``."""
    weights = layers * 12 * width * width
    streams = layers * 60 * tokens * width * 4  # 60 float32 arrays (tokens, width) a block
    return {
        "launches": launches * layers / 4 * card["seconds per launch"],
        "bytes": streams / card["bytes per second"],
        "multiplications": 4 * tokens * weights / card["operations per second"],
    }


for price, seconds in prices(config.n_embd).items():
    print(f"{price:<16}{seconds * 1e3:>7.2f} ms")

# %%
widths = np.array([64, 128, 256, 512, 768, 1024, 2048, 4096])
by_width = {name: (widths, [prices(w)[name] * 1e3 for w in widths]) for name in prices(128)}
plots.show(
    plots.lines(
        by_width,
        "Arithmetic, not a measurement: the price of a step",
        "width d",
        "ms",
        logx=True,
        logy=True,
    ),
    "On log axes: launches are flat at 3.45 ms, bytes rise with the width, "
    "multiplications with its square; they cross the launches at a width of about 600.",
)

# %% [markdown]
# With these assumptions the shipped model, at a width of 128, pays 3.45 ms for launches and next to nothing for the rest:
# the card would be idle most of the time. That it would be no faster than a CPU does not follow: above, the CPU takes
# tens of milliseconds for half the tokens. Multiplications overtake the launches at a width of about 590. What holds on a
# real card is what [`benchmarks/gpu.py`](../benchmarks/gpu.py) measures; [GPU](../docs/gpu.md) says how to run it, and
# holds no figure yet.
#
# ## Fused kernels
#
# So the fewer launches, the better. GELU and its slope are 14 operations on arrays in `ops.py`. As a kernel they are
# one launch that reads $x$ once and writes $y$ and the slope:

# %%
inputs, outputs, code = kernels.ELEMENTWISE["gelu_and_slope"]
print(f"({inputs}) → ({outputs})\n{code.strip()}")

# %% [markdown]
# The tags are those of the plain form, which stays the reference. Count what each form reads and writes, in arrays of
# $x$'s size: the plain one 33 (five of its operations have two arrays as input, the others one, and each writes one).

# %%
entries = 1024 * 512
passes = {"plain, 14 launches": 5 * 3 + 9 * 2, "fused, 1 launch": 3}
traffic = {
    name: arrays * entries * 4 / CARD["bytes per second"] * 1e6
    for name, arrays in passes.items()
}
plots.show(
    plots.bars(
        traffic, "GELU: bytes over an assumed 10¹² per second", "µs, without the launches"
    ),
    "Two bars: 69 microseconds for the plain form, 6 for the fused one",
)

# %% [markdown]
# Eleven times fewer bytes, and one launch in place of 14. On a CPU the plain form works through blocks that fit into
# the cache, and so does not pay for memory each time. Layer norm, softmax, cross-entropy and AdamW are fused in the
# same way; matrix products are left to the card's own library.
#
# ## One wait per step
#
# The host only *asks* for operations; the card works through the queue. The host runs ahead until it wants a number:
# then it must wait. `float(loss)` is such a wait. Here is a model of the two, for 700 operations.


# %%
def step(waits, launch=5e-6, work=5e-6, operations=700):
    """Seconds until the card is done, where the host waits so many times."""
    host = card = 0.0
    for i in range(1, operations + 1):
        host += launch
        card = max(card, host) + work  # it begins when it is asked, and when it is free
        if i % (operations // waits) == 0:
            host = card  # the host stands still
    return card


for waits in (1, 10, 100, 700):
    print(f"{waits:>4} waits: {step(waits) * 1e3:.2f} ms")

# %% [markdown]
# With a wait after each operation nothing overlaps, and a step takes twice as long. A training step of minilora waits
# once, between backward and the optimizer's step: the loss and the gradient's squared norm are fetched together, and
# both must be finite before anything moves.

# %%
loss, squared_norm = fetch(np.float32(1.98), np.float32(0.04))
print(f"in one transfer: loss {loss:.2f}, squared norm {squared_norm:.2f}")

# %% [markdown]
# ## Exercises
#
# Each answer is a function whose body is `...`; the cell below it says how far you are.
#
# **1.** How long does a step take, if launches, bytes and multiplications overlap perfectly?


# %%
def step_time(launches, n_bytes, operations, card):
    """Seconds; ``card`` has the keys of CARD."""
    ...


# %%
simple = {
    "seconds per launch": 1e-5,
    "bytes per second": 1e9,
    "operations per second": 1e12,
}
assess(
    "step_time",
    step_time,
    ("100 launches of 10 µs take 1 ms", lambda f: np.isclose(f(100, 0, 0, simple), 1e-3)),
    (
        "10⁹ bytes at 10⁹ per second take 1 s",
        lambda f: np.isclose(f(100, 1e9, 0, simple), 1.0),
    ),
    (
        "what overlaps is not added: the largest decides",
        lambda f: np.isclose(f(100, 1e9, 2e12, simple), 2.0),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def step_time(launches, n_bytes, operations, card):
#     return max(
#         launches * card["seconds per launch"],
#         n_bytes / card["bytes per second"],
#         operations / card["operations per second"],
#     )
# ```
# </details>
#
# **2.** At which width do the multiplications of `layers` blocks (12 d² weights each, 4 operations per token and
# weight) take as long as the `launches`, which are counted in all, not for each block?


# %%
def crossing(layers, tokens, launches, card):
    """The width d."""
    ...


# %%
def holds(f, layers, tokens, launches):
    d = f(layers, tokens, launches, CARD)
    work = 4 * tokens * layers * 12 * d * d / CARD["operations per second"]
    return np.isclose(work, launches * CARD["seconds per launch"])


assess(
    "crossing",
    crossing,
    (
        "solve 4 · tokens · layers · 12 d² / rate = launches · time for d",
        lambda f: holds(f, 4, N, LAUNCHES),
    ),
    (
        "with four times the tokens it lies at half the width",
        lambda f: holds(f, 4, 4 * N, LAUNCHES),
    ),
    (
        "half the layers, with as many launches in all: √2 times the width",
        lambda f: holds(f, 2, N, LAUNCHES),
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def crossing(layers, tokens, launches, card):
#     seconds = launches * card["seconds per launch"]
#     return (seconds * card["operations per second"] / (48 * tokens * layers)) ** 0.5
# ```
# </details>
#
# **3.** Write a softmax over the rows that runs on any library. `x` may not be handed to NumPy's own functions; take
# those of `xp`, which has `exp`, `max` and `sum`, and the array's operators and methods.


# %%
def softmax(x, xp):
    """softmax of each row of x (N, d)"""
    ...


# %%
class Foreign:
    """Another library's array: operators and methods work, NumPy's functions do not."""

    __array_ufunc__ = None
    shape = property(lambda self: self.host.shape)
    T = property(lambda self: Foreign(self.host.T))

    def __init__(self, host):
        self.host = host

    def __array__(self, *_, **__):
        raise TypeError("this array does not lie on the host")

    __array_function__ = __array__


def taken_over(name):
    """The method or operator of NumPy's array, from Foreign to Foreign."""

    def method(self, *args, **options):
        args = [getattr(a, "host", a) for a in args]
        return Foreign(getattr(self.host, name)(*args, **options))

    return method


for name in ["max", "sum", "reshape", "__getitem__", "__neg__", "__pow__"]:
    setattr(Foreign, name, taken_over(name))
for name in ["add", "sub", "mul", "truediv"]:
    setattr(Foreign, f"__{name}__", taken_over(f"__{name}__"))
    setattr(Foreign, f"__r{name}__", taken_over(f"__r{name}__"))


class Library:
    """Its module."""

    exp = staticmethod(lambda a: Foreign(np.exp(a.host)))
    max, sum = Foreign.max, Foreign.sum


def runs_elsewhere(f):
    try:
        return np.allclose(f(Foreign(rows), Library).host, expected)
    except TypeError:  # Foreign refuses NumPy's functions
        return False


small, middle, large = 0.09003057, 0.24472847, 0.66524096
rows = np.array([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [1e3, 1e3, 1e3]])
expected = np.array([[small, middle, large], [large, small, middle], [1 / 3] * 3])
assess(
    "softmax",
    softmax,
    (
        "on NumPy: each row of exp(x), divided by its own sum",
        lambda f: np.allclose(f(rows[:2], np), expected[:2]),
    ),
    (
        "exp(1000) overflows: subtract the row's maximum first",
        lambda f: np.allclose(f(rows, np), expected),
    ),
    (
        "it must run on another library too: call xp's functions, not NumPy's",
        runs_elsewhere,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def softmax(x, xp):
#     e = xp.exp(x - x.max(axis=1, keepdims=True))
#     return e / e.sum(axis=1, keepdims=True)
# ```
# </details>
#
# **4.** The mean of many losses that lie on the card, as a float, with a single wait. An `OnCard` stands for such a loss:
# `+`, `*` and `/` are computed on the card, and `float()` is the wait. (It is no array, so `fetch` does not take it.)


# %%
def mean_loss(losses):
    """The mean of a list of 0-d arrays, as a float."""
    ...


# %%
class OnCard:
    """A number on a card: + * / are asked for, float() waits."""

    waits = 0

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return OnCard(self.value + getattr(other, "value", other))

    def __mul__(self, other):
        return OnCard(self.value * getattr(other, "value", other))

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other):
        return OnCard(self.value / other)

    def __float__(self):
        OnCard.waits += 1
        return self.value


five = [OnCard(float(i)) for i in range(5)]


def waits_once(f):
    OnCard.waits = 0
    f(five)
    return OnCard.waits == 1


assess(
    "mean_loss",
    mean_loss,
    ("the result must be a float", lambda f: isinstance(f(five), float)),
    ("the mean of 0, 1, 2, 3, 4 is 2", lambda f: f(five) == 2.0),
    (
        "it waits more than once: add on the card, and ask for one float at the end",
        waits_once,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mean_loss(losses):
#     return float(sum(losses) / len(losses))
# ```
# </details>
