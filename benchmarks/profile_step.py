"""Where a LoRA step of minilora goes, in ms and per cent, as a table and a picture.

Functions are wrapped from outside: the forward and backward of each Operation, an adapted linear's call and its vjp,
the optimizer's step. Time is charged to the innermost wrapped function; what is in none of them is "all else": the
engine, the sums of gradients that meet, the embedding, the loop.

NumPy's matmul cannot be wrapped, so the products inside linears and attention are estimated: the same products are
timed alone, in turns with the steps (floor.py says which: in attention the causal half, so a half that is computed in
vain counts as softmax). The rest of a linear is its bias, its merged weight (or, at XL, whose rows are few, h Bᵀ, dh A
and their sums) and what its products cost beyond the estimate. Only the order of magnitude of such a rest is meant.
"""

import json
import time
from collections import Counter

from floor import Products
from shapes import SIZES
from sizes import in_turns, lora, machine, new_file, parser, print_machine  # before NumPy: sets its threads

# isort: split
import numpy as np

from minilora import elementary, ops, plots
from minilora.adapter import AdaptedLinear
from minilora.backend import keep_heap
from minilora.engine import Operation
from minilora.training.loop import training_step

PARTS = {  # part: its colour
    "linears: wide products": "#0072B2",
    "linears: low-rank products": "#3D94C9",
    "linears: the rest": "#9CCBE8",
    "attention: products": "#D55E00",
    "attention: softmax and the rest": "#F2A97E",
    "GELU": "#009E73",
    "layer norm": "#7CCDB3",
    "logits and cross-entropy": "#CC79A7",
    "residual adds": "#E69F00",
    "optimizer": "#F0E442",
    "all else": "#BBBBBB",
}
PRODUCTS = [part for part in PARTS if part.endswith("products")]  # BLAS, and nothing else
OPERATIONS = {  # an operation that is not here is part of all else
    "attention": "attention",
    "gelu": "GELU",
    "layer_norm": "layer norm",
    "linear": "logits and cross-entropy",  # every other linear is adapted
    "cross_entropy": "logits and cross-entropy",
    "add": "residual adds",
}


class Clock:
    """Charges time to one owner at a time: the innermost of the wrapped functions that are running."""

    def __init__(self):
        self.owner, self.last, self.spent = "all else", time.perf_counter(), Counter()

    def switch(self, owner):
        """Charge the time since the last switch, hand over to ``owner``, return who had it."""
        now, before = time.perf_counter(), self.owner
        self.spent[before] += now - self.last
        self.owner, self.last = owner, now
        return before

    def wrap(self, owner, function):
        def wrapped(*args, **kwargs):
            before = self.switch(owner)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(before)

        return wrapped

    def seconds(self, function):
        """The seconds of each owner during one call of ``function``."""
        self.switch("all else")
        self.spent.clear()
        function()
        self.switch("all else")
        return self.spent.copy()


def watch(clock):
    """Wrap all operations and the adapted linears; once, since they are the same for every model."""
    for operation in [*vars(ops).values(), *vars(elementary).values()]:
        if isinstance(operation, Operation):
            owner = OPERATIONS.get(operation.name, "all else")
            operation.forward = clock.wrap(owner, operation.forward)
            operation.backward = clock.wrap(owner, operation.backward)
    call = clock.wrap("linears", AdaptedLinear.__call__)

    def adapted(*args, **kwargs):
        y = call(*args, **kwargs)
        if y.node is not None:
            y.node.vjp = clock.wrap("linears", y.node.vjp)
        return y

    AdaptedLinear.__call__ = adapted


def profile(clock, size, rounds):
    """Milliseconds of each of PARTS in a step at ``size``, a row of SIZES: medians over all steps."""
    keep_heap()  # as train() does
    model, optimizer, ids, targets = lora(*size)
    optimizer.step = clock.wrap("optimizer", optimizer.step)
    optimizer.squared_norm = clock.wrap("optimizer", optimizer.squared_norm)
    products, steps, alone = Products(*size), [], []
    step = lambda: steps.append(clock.seconds(lambda: training_step(model, optimizer, ids, targets)))
    in_turns(rounds, lambda: alone.append(products.run()), step)
    median = lambda runs, key: 1e3 * float(np.median([run[key] for run in runs]))
    ms = {part: median(steps, part) for part in PARTS}
    # A product within a step is now and then faster than alone, its arrays being warmer: no part is below 0.
    wide, low, scores = (median(alone, kind) for kind in ("wide", "low rank", "attention"))
    linears, attention = median(steps, "linears"), median(steps, "attention")
    shrink = min(1.0, linears / (wide + low))
    ms["linears: wide products"], ms["linears: low-rank products"] = shrink * wide, shrink * low
    ms["linears: the rest"] = linears - shrink * (wide + low)
    ms["attention: products"] = min(scores, attention)
    ms["attention: softmax and the rest"] = attention - ms["attention: products"]
    return ms


def print_table(profiles):
    width = max(map(len, PARTS))
    print(f"| {'part of a step':{width}} |", *(f"{size:>4}, ms |   % |" for size in profiles))
    print(f"|-{'-' * width}-|", *("-------:|----:|" for _ in profiles), sep="")
    totals = {size: sum(ms.values()) for size, ms in profiles.items()}
    for part in PARTS:
        cells = ((ms[part], 100 * ms[part] / totals[size]) for size, ms in profiles.items())
        print(f"| {part:{width}} |", *(f"{ms:8.2f} | {share:3.0f} |" for ms, share in cells))
    print(f"| {'together':{width}} |", *(f"{total:8.2f} | 100 |" for total in totals.values()))


def picture(profiles, threads):
    """A stacked bar for each size, in per cent of its step; the products, hatched, come first."""
    from matplotlib import rc_context

    parts = {part: PARTS[part] for part in (*PRODUCTS, *PARTS)}
    look = lambda part: {"color": parts[part], "edgecolor": "white", "hatch": "///" if part in PRODUCTS else None}
    with rc_context({**plots.STYLE, "hatch.linewidth": 0.7}):
        figure = plots.new_figure(8, 2.2 + 0.62 * len(profiles))
        axes = figure.subplots()
        labels = []
        for row, (size, ms) in enumerate(profiles.items()):
            total, left = sum(ms.values()), 0.0
            _, T, d, layers, _, batch = SIZES[size]
            labels.append(f"{size}: {total:.0f} ms\nd {d}, {layers} layers\nT {T}, batch {batch}")
            for part, colour in parts.items():
                share = 100 * ms[part] / total
                axes.barh(row, share, left=left, height=0.74, linewidth=0.8, **look(part))
                if share >= 3.5:
                    ink = "white" if colour in ("#0072B2", "#3D94C9", "#D55E00", "#009E73") else "black"
                    back = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}  # no hatching behind the number
                    axes.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center", color=ink, bbox=back)
                left += share
        axes.set_yticks(range(len(profiles)), labels, fontsize=9)
        axes.set(xlim=(0, 100), ylim=(len(profiles) - 0.5, -0.5), xlabel="% of the step")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"Where a LoRA step goes, {threads} thread{'s' if threads > 1 else ''}")
        handles = [axes.barh(0, 0, **look(part)) for part in parts]
        figure.legend(handles, parts, loc="outside lower center", ncols=3, fontsize=9.5, handlelength=1.2)
        return figure


def main():
    options = parser(__doc__, rounds=7)
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["S", "M", "L"])
    options.add_argument("--png", type=new_file, metavar="FILE", help="draw the table")
    options.add_argument("--json", type=new_file, metavar="FILE", help="write it, in ms")
    args = options.parse_args()
    print_machine()
    clock = Clock()
    watch(clock)
    profiles = {size: profile(clock, SIZES[size], args.rounds) for size in args.sizes}
    print_table(profiles)
    if args.json:
        report = {"machine": machine(), "rounds": args.rounds, "ms": profiles}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.png:
        args.png.write_bytes(plots.png(picture(profiles, args.threads)))


if __name__ == "__main__":
    main()
