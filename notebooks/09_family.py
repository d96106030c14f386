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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/09_family.ipynb)
#
# # 09 · The family on real text
#
# Twelve methods, one model, one text: what does each learn, and what does it forget? Here we measure both, with several
# seeds, and find out which differences between methods are larger than chance.
#
# **After this you can**
#
# - set up a comparison in which methods differ in nothing but the method
# - draw learning against forgetting, and read it
# - tell a difference from noise with three seeds, and say why seeds should be paired
# - say what "LoRA forgets less" means, and what a learning rate has to do with it
# - name what this toy shows of the papers' claims, and what it does not
#
# Read before: [03 · LoRA](03_lora.ipynb), and of 04 to 08 what you are curious about.

# %%
# On Colab: !pip install -q git+https://github.com/minilora/minilora
import numpy as np
from threadpoolctl import threadpool_limits

from minilora import methods, plots
from minilora.data import load_corpus
from minilora.lab.task import Task, learning_rate, tune
from minilora.tools.exercises import assess

# %% [markdown]
# ## The task
#
# The base model has read Shakespeare in modern spelling: text A. It is tuned on the First Folio's spelling of 1623:
# text B. *Macbeth* is in neither, and both losses are measured on it: lower on B is learning, higher on A is
# forgetting.

# %%
task = Task()
a0, b0 = task.losses(task.model)
for name, corpus in [("A", "modern"), ("B", "folio")]:
    text = load_corpus(corpus).val
    passage = text[text.index("Assisted by that most") :].splitlines()[:3]
    print(f"{name}:", *passage, sep="\n    ")
print(f"before tuning: {a0:.3f} nats per character on A, {b0:.3f} on B")

# %% [markdown]
# ## What is held equal
#
# - the base model, the 24 adapted layers, the optimizer (AdamW), warm-up and cosine, the number of steps
# - for one seed, the batches, and where a method draws an $A$ as LoRA does, that $A$ too
#
# What is *not* equal is the learning rate: each method has its own best one, from a sweep on text held out from B's
# training text. With one rate for all, the comparison would be about that rate.

# %%
for name in methods.names():
    print(f"{name:<20}{learning_rate(name):>6}")

# %% [markdown]
# ## A small part of it, live
#
# Three methods, three seeds, 40 steps of 4 × 128 characters. The recorded rates were chosen for
# longer runs, but they will do to see the picture appear.

# %%
live = {"full": [], "lora": [], "lora_fa": []}
histories = {name: [] for name in live}
for name in live:
    for seed in range(3):
        # For matrices of this size one thread is enough, and sums are rounded alike.
        with threadpool_limits(1):
            model, history, _ = tune(
                task, methods.create(name), 40, learning_rate(name), batch=4, seed=seed
            )
            live[name].append(task.losses(model))
        histories[name].append(history.loss)
plots.show(
    plots.loss_curves(
        histories,
        "Learning the Folio's spelling, 3 seeds",
        ylabel="loss, nats per character",
        smooth=5,
    ),
    "Three falling curves whose bands overlap, with bumps at the same steps.",
)

# %% [markdown]
# Each point is the mean of five steps, the line is the mean of three seeds, and the band their range. The curves have
# their bumps at the same steps: for one seed, all methods see the same batches. Keep that in mind for later.

# %%
trade = {
    name: (np.array(losses)[:, 1], np.array(losses)[:, 0]) for name, losses in live.items()
}
LEARNING = "loss on B after, nats per character (left is better)"
FORGETTING = "loss on A, nats per character\n(down is better)"
figure = plots.scatter(
    {"before": ([b0], [a0]), **trade},
    "Learning against forgetting, 40 steps",
    LEARNING,
    FORGETTING,
)
plots.show(
    figure,
    "The base model at the lower right; each method's points further left and higher.",
)

# %% [markdown]
# All start at the lower right and move left, which is learning, and up, which is forgetting. After 40 steps LoRA has
# learnt as much as full fine-tuning or more, LoRA-FA nearly as much, and full fine-tuning has forgotten most by far.
#
# ## All of it, recorded
#
# The whole comparison takes minutes, so its results stand here. They are what `minilora compare` gives with `--seed`
# 0, 1 and 2: 120 steps of 8 × 128 characters, each method at its recorded rate.

# %%
# fmt: off
recorded = {  # method: (loss on the Folio, loss on modern spelling), each for seeds 0, 1, 2
    "delta_lora": ([1.7719, 1.7699, 1.7771], [2.0184, 2.0094, 1.9698]),
    "delta_lora_control": ([1.7573, 1.7565, 1.7655], [1.9801, 1.949, 1.9535]),
    "dora": ([1.7548, 1.7552, 1.763], [2.0029, 1.9463, 1.9475]),
    "dora_detached": ([1.7529, 1.756, 1.7601], [2.0014, 1.9476, 1.9547]),
    "full": ([1.742, 1.7499, 1.7518], [2.0224, 1.9711, 2.0115]),
    "lora": ([1.7617, 1.7604, 1.7648], [1.9579, 1.9142, 1.9211]),
    "lora_fa": ([1.8049, 1.8085, 1.7982], [1.9084, 1.9015, 1.8945]),
    "lora_fa_corrected": ([1.8022, 1.8019, 1.7979], [1.9549, 1.9448, 1.9426]),
    "lora_plus": ([1.7619, 1.7697, 1.7798], [1.987, 1.9715, 1.9786]),
    "pissa": ([1.7768, 1.7856, 1.7776], [1.9996, 1.9867, 2.0046]),
    "rslora": ([1.7561, 1.7565, 1.7645], [1.9766, 1.9516, 1.9543]),
    "vera": ([1.853, 1.8696, 1.8718], [1.9053, 1.9124, 1.9294]),
}
# fmt: on
print(f"{'method':<20}{'B after':>18}{'A after':>18}")
for name, (b, a) in sorted(recorded.items(), key=lambda item: np.mean(item[1][0])):
    shown = (f"{np.mean(loss):>10.3f} ± {np.std(loss, ddof=1):.3f}" for loss in (b, a))
    print(f"{name:<20}" + "".join(shown))

# %%
title = "Learning against forgetting, 120 steps"
figure = plots.scatter(recorded, title, LEARNING, FORGETTING)
plots.show(
    figure,
    "Twelve clusters of three points; most overlap, "
    "VeRA and the two LoRA-FA stand apart to the right.",
)

# %% [markdown]
# The ends are clear: full fine-tuning is furthest to the left, VeRA, with a twelfth of LoRA's numbers, furthest to the
# right, and the two methods with a frozen $A$ stand between. In the cloud from 1.75 to 1.77 the colours mix.
#
# ## Noise
#
# The table says `dora` 1.758 ± 0.005 and `lora` 1.762 ± 0.002. Is DoRA better? The ± of each is the spread over seeds,
# and a good part of it is the same batches for both. The honest question is about the *difference for the same seed*:
#
# $$\delta_i = L_{\text{method}, i} - L_{\text{lora}, i}$$
#
# Its mean over $n$ seeds has the 95 % interval
#
# $$\bar\delta \pm t\, \frac{\operatorname{std}(\delta)}{\sqrt{n}}, \qquad t = 4.30 \text{ for } n = 3,$$
#
# where $t$ is Student's, for $n - 1 = 2$ degrees of freedom. It is that large because three differences say little about
# their own spread: three seeds are very few.

# %%
T95 = {3: 4.303, 5: 2.776, 10: 2.262}  # two-sided, by the number of seeds


def interval(delta):
    """Mean difference and the half width of its 95 % interval."""
    delta = np.asarray(delta)
    return delta.mean(), T95[len(delta)] * delta.std(ddof=1) / np.sqrt(len(delta))


lora = np.array(recorded["lora"][0])
deltas = {name: np.array(b) - lora for name, (b, _) in recorded.items() if name != "lora"}


def verdict(name, delta):
    mean, half = interval(1e3 * delta)
    word = "noise" if abs(mean) < half else "better" if mean < 0 else "worse"
    print(f"{name:<20}{mean:>+7.1f} ± {half:>4.1f}   {word}")


print("against LoRA on B, in thousandths of a nat:")
for name, delta in sorted(deltas.items(), key=lambda item: item[1].mean()):
    verdict(name, delta)
print("\nagainst its control, LoRA with alpha (1 + λ):")
verdict("delta_lora", deltas["delta_lora"] - deltas["delta_lora_control"])

# %% [markdown]
# With three seeds this much holds on B: full fine-tuning is better than LoRA by about 14 thousandths of a nat, and
# Delta-LoRA, PiSSA, the methods with a frozen $A$ and VeRA are worse. Delta-LoRA is worse than its control as well, by
# 13 ± 4 thousandths ([07 · Delta-LoRA](07_delta_lora.ipynb) says why that is its control). What DoRA and rsLoRA seem to
# gain and LoRA+ to lose cannot be told from chance. That does not say that they are equal: it says that three seeds do
# not show a difference of this size. Nor is a verdict certain: among eleven intervals of 95 % one may well be wrong
# (exercise 4), and two of these, for full fine-tuning and PiSSA, are won by little.
#
# How much does pairing help? Compare the spread of the differences, their standard deviation, with what independent
# seeds would give. There the variances add up, and the spread is the root of their sum:

# %%
print("spread of the difference from LoRA, in thousandths of a nat:")
for name in ("full", "dora", "rslora", "lora_fa"):
    b = np.array(recorded[name][0])
    paired, unpaired = (b - lora).std(ddof=1), np.hypot(b.std(ddof=1), lora.std(ddof=1))
    print(f"{name:<8} paired {1e3 * paired:4.1f}, if they were not {1e3 * unpaired:4.1f}")

# %% [markdown]
# For DoRA and rsLoRA, whose updates are much like LoRA's, pairing halves the spread, which is worth four times as many
# seeds. For full fine-tuning it helps little, and for LoRA-FA not at all; but a spread from three numbers is itself a
# rough figure.
#
# ## Does LoRA forget less?
#
# At its best rate, full fine-tuning learns more than LoRA and forgets more. But a rate is a choice, and a smaller one
# mostly forgets less (VeRA is the other way from 0.05 on: its three largest rates forget less than that one). So draw
# the whole line that a method can reach by its learning rate. These are the recorded runs of `minilora sweep` (B is here
# the end of the training text, so that losses on B are lower than above).

# %%
# fmt: off
# method: (rates, losses on the Folio, losses on modern spelling), means of two seeds after 150 steps
by_rate = {
    "full": ([0.0002, 0.0005, 0.001, 0.002, 0.005],
        [1.652, 1.588, 1.567, 1.561, 1.613], [1.898, 1.945, 2.001, 2.065, 2.222]),
    "lora": ([0.0005, 0.001, 0.002, 0.005, 0.01, 0.02],
        [1.75, 1.672, 1.624, 1.589, 1.59, 1.62],
        [1.912, 1.942, 1.958, 1.993, 2.022, 2.051]),
    "lora_fa": ([0.002, 0.005, 0.01, 0.02, 0.05],
        [1.733, 1.661, 1.637, 1.638, 1.686], [1.902, 1.934, 1.955, 1.993, 2.079]),
    "vera": ([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
        [1.962, 1.836, 1.765, 1.716, 1.708, 1.706, 1.749],
        [1.835, 1.9, 1.934, 1.961, 1.957, 1.945, 1.948]),
}
# fmt: on
curves = {name: (b, a) for name, (_, b, a) in by_rate.items()}
lowest = {name: int(np.argmin(b)) for name, (b, _) in curves.items()}
best = [[curves[name][part][i] for name, i in lowest.items()] for part in (0, 1)]
figure = plots.lines(
    curves,
    "What each method reaches with its learning rate",
    LEARNING,
    FORGETTING,
    points={"best rate": best},
)
plots.show(
    figure,
    "Four lines. Full fine-tuning's two smallest rates give points below LoRA's line, "
    "the next two lie left of all that LoRA reaches, the largest far above LoRA's line.",
)

# %% [markdown]
# Which of full fine-tuning's five points can be compared with LoRA at equal learning? Two:
#
# - With a rate of 0.0005, a quarter of its best, it learns as much as LoRA at its best (1.588 and 1.589 on B) and has
#   forgotten *less* (1.945 and 1.993 on A).
# - With 0.0002 it comes to 1.652 on B and 1.898 on A. LoRA's points on both sides of it, 1.672 and 1.624 on B, have
#   1.942 and 1.958 on A: it has forgotten less here, too.
#
# The next two learn more than LoRA does at any rate, so that there is nothing to compare them with. The fifth, 0.005, is
# a rate that is too large: it learns less than the three before it, and lies far above LoRA's line.
#
# So "LoRA forgets less" is true here of the best rates, and not of the two comparisons at equal learning: there the
# smaller step forgets less. It is not much to go by. These are means of two seeds, and one run's loss on A differs by
# about 0.03 from the next.
#
# ## What is shown, and what is not
#
# - Shown: LoRA comes within 0.02 nats of full fine-tuning while it trains 9.4 % as many numbers (73,728 of 786,432).
#   Frozen matrices and vectors cost learning.
# - Not shown: that DoRA, rsLoRA or LoRA+ gain anything over LoRA at its own rate. The papers claim it for large models,
#   many layers, other tasks and longer runs.
# - The contrary came out, in this toy: Delta-LoRA learns less than its control, and PiSSA, by little more than noise,
#   less than LoRA.
# - Not shown, though often said: that LoRA forgets less than full fine-tuning that has learnt as much
#   ([Biderman et al. 2024](https://arxiv.org/abs/2405.09673) find it in large models).
# - A model of 0.8 million parameters, one text and 120 steps are a place to try an idea out, not to settle it.
#
# ## Exercises
#
# Each answer is a function whose body is `...`; the cell below it says how far you are.
#
# **1 · How many seeds?** A difference of the size $|\bar\delta|$, with a spread of `spread` over seeds, is larger than the
# half width of its interval once $|\bar\delta| > t \cdot \text{spread} / \sqrt n$. Take $t = 2$, which is right for many
# seeds, and give the smallest whole $n$ (at least 3). `size` is $|\bar\delta|$, a positive number.


# %%
def seeds_needed(size, spread): ...


# %%
assess(
    "seeds_needed",
    seeds_needed,
    (
        "for a size of 0.6 and a spread of 1, √n must be more than 2 / 0.6: n is 12",
        lambda f: f(0.6, 1.0) == 12,
    ),
    (
        "for half the spread 16 seeds just reach the half width, and it is to be larger",
        lambda f: f(0.5, 1.0) == 17,
    ),
    ("fewer than 3 are too few to know a spread", lambda f: f(9.0, 1.0) == 3),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# $\sqrt n > 2\,\text{spread} / |\bar\delta|$, and "larger" means the next whole number where it is met exactly.
#
# ```python
# def seeds_needed(size, spread):
#     return max(3, int((2 * spread / size) ** 2) + 1)
# ```
#
# </details>
#
# **2 · Not beaten.** Of `{name: (loss on B, loss on A)}` give the set of names that no other method beats, where a
# method beats another that is worse in both.


# %%
def not_beaten(losses): ...


# %%
toy = {"left": (1.0, 3.0), "middle": (2.0, 2.0), "beaten": (2.5, 2.5), "right": (3.0, 1.0)}
assess(
    "not_beaten",
    not_beaten,
    (
        "the answer is a set of names",
        lambda f: isinstance(f(toy), set) and f(toy) <= set(toy),
    ),
    ("one that is beaten in both is in it", lambda f: "beaten" not in f(toy)),
    (
        "one is missing: it is beaten only by a method that is better in both",
        lambda f: f(toy) == {"left", "middle", "right"},
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def not_beaten(losses):
#     beats = lambda one, other: one[0] < other[0] and one[1] < other[1]
#     beaten = lambda own: any(beats(other, own) for other in losses.values())
#     return {name for name, own in losses.items() if not beaten(own)}
# ```
#
# With the means of `recorded` that leaves dora, dora_detached, full, lora, lora_fa, rslora.
#
# </details>
#
# **3 · Forgetting at equal learning.** From a method's line in `by_rate`, the losses `b` and `a` for rising rates,
# give the loss on A where the loss on B is `target`. Use the falling part alone, up to the lowest loss on B, and
# straight lines between the points (`np.interp` wants its x rising).


# %%
def forgetting_at(b, a, target): ...


# %%
assess(
    "forgetting_at",
    forgetting_at,
    (
        "on a point of the line it is that point's loss on A",
        lambda f: abs(f([3, 2, 1], [5, 6, 7], 2) - 6) < 1e-9,
    ),
    (
        "between two points it is between theirs",
        lambda f: abs(f([3, 2, 1], [5, 6, 7], 1.5) - 6.5) < 1e-9,
    ),
    (
        "what lies behind the lowest loss does not count",
        lambda f: abs(f([3, 1, 2], [5, 7, 9], 2) - 6) < 1e-9,
    ),
    (
        "what lies behind the lowest loss must not come between the others",
        lambda f: abs(f([3, 2, 1, 2.5], [5, 6, 7, 9], 2) - 6) < 1e-9,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def forgetting_at(b, a, target):
#     end = int(np.argmin(b)) + 1
#     return float(np.interp(target, b[:end][::-1], a[:end][::-1]))
# ```
#
# At a loss of 1.60 on B that gives 1.94 for full fine-tuning and 1.98 for LoRA.
#
# </details>
#
# **4 · Eleven comparisons.** If no method differed from LoRA at all, how likely would at least one of `comparisons`
# intervals of 95 % still leave out zero? Take them as independent, which with a common LoRA they are not quite.


# %%
def at_least_one(comparisons, confidence=0.95): ...


# %%
assess(
    "at_least_one",
    at_least_one,
    ("for one comparison it is 1 − confidence", lambda f: abs(f(1) - 0.05) < 1e-12),
    (
        "it is one minus the chance that all are right",
        lambda f: abs(f(2, 0.9) - 0.19) < 1e-12,
    ),
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def at_least_one(comparisons, confidence=0.95):
#     return 1 - confidence**comparisons
# ```
#
# For eleven it is 0.43: with as many methods, one that only looks different is to be expected.
#
# </details>
