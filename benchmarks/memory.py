"""What one training step keeps for backward, and the most memory that its process has: LoRA four ways, and more.

The four bars of the figure: a textbook tape, with one node for each primitive operation; minilora's LoRA as it is; the
same with all that GPT.recompute() can leave out; LoRA-FA. For each row are measured:

- the bytes kept for backward: by the ledger, which adds up what the graph holds, and by the allocator, whose growth
  over a forward pass is taken with only the loss alive; with micro-batches, those of one part
- the peak resident memory of a fresh process that builds the model and takes 5 steps, and of one that only imports
- the time of a step, in turns with all the other rows, beside LoRA as it is; one thread unless --threads says 2
- how far the gradient is from LoRA's, for the rows that compute the same; the run stops at more than 1e-4

The textbook tape is the same model with the same arrays. Each layer-sized operation of minilora/ops.py is replaced by
its composition from those of minilora/elementary.py, and the adapter by x @ W.T + (x @ A.T) @ B.T * s.
"""

import json
import math
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shapes import ALPHA, SIZES, TARGETS, R
from sizes import THREADS, in_turns, machine, new_file, parser, print_machine  # before NumPy: sets its threads

# isort: split
import numpy as np

import minilora
from minilora import plots
from minilora.backend import keep_heap
from minilora.engine import Tensor
from minilora.nn import Module
from minilora.tools.audit import audit
from minilora.training.gradient import accumulate
from minilora.training.loop import training_step

TITLES = {"tiny": "The shipped model's shape, batch 8", "M": "Size M, batch 16"}
STEPS, MIB, CLOSE = 5, 2**20, 1e-4


@dataclass(frozen=True)
class Row:
    method: str = "lora"
    recompute: tuple = ()
    micro_batches: int = 1
    naive: bool = False

    @property
    def same_gradient(self):
        """Whether the gradient is LoRA's."""
        return self.method == "lora"


ALL = ("layer_norm", "gelu", "attention")
ROWS = {
    "LoRA on a textbook tape": Row(naive=True),
    "LoRA": Row(),
    "LoRA, recompute layer_norm": Row(recompute=ALL[:1]),
    "LoRA, recompute gelu": Row(recompute=ALL[1:2]),
    "LoRA, recompute attention": Row(recompute=ALL[2:]),
    "LoRA, recompute all three": Row(recompute=ALL),
    "LoRA, 2 micro-batches": Row(micro_batches=2),
    "LoRA, 4 micro-batches": Row(micro_batches=4),
    "LoRA-FA": Row("lora_fa"),
    "LoRA-FA, recompute attention": Row("lora_fa", ALL[2:]),
    "LoRA-FA, recompute all three": Row("lora_fa", ALL),
    "VeRA, r 64": Row("vera"),
    "DoRA": Row("dora"),
    "full": Row("full"),
}
BARS = {
    "LoRA on a textbook tape": "textbook tape",
    "LoRA": "LoRA as it is",
    "LoRA, recompute all three": "with recompute",
    "LoRA-FA": "LoRA-FA",
}
X, GELU, PROBABILITIES, QKV, NORM, LOSS = (
    "adapters: x and h",
    "GELU",
    "attention: probabilities",
    "attention: q, k, v",
    "layer norm",
    "loss",
)
COLOURS = {X: "#0072B2", GELU: "#E69F00", PROBABILITIES: "#D55E00", QKV: "#F2A97E", NORM: "#009E73", LOSS: "#000000"}


# -------------------------------------------------------------------------------- the textbook tape


VALUES = "attention: values"  # the product P v: it keeps P, and v


def tagged(group, y, *inputs):
    """``y``, with ``group`` before the name of each node between it and ``inputs``: who keeps what, by layer."""
    stack, seen = [y.node], {id(t.node) for t in inputs}
    while stack:
        node = stack.pop()
        if node is not None and node.vjp is not None and id(node) not in seen:
            seen.add(id(node))
            node.name = f"{group} / {node.name}"
            stack.extend(node.parents)
    return y


def linear(layer, x):
    """An adapted layer: W and b are frozen, A and B trained."""
    W, b, A, B, s = layer.base.W, layer.base.b, layer.arrays.A, layer.arrays.B, layer.method.scaling
    return tagged(X, x @ W.T + (x @ A.T) @ B.T * s + b, x)


def layer_norm(layer, x, eps=1e-5):
    d = x.shape[1]
    centred = x - x.sum(axis=1, keepdims=True) / d
    variance = (centred**2).sum(axis=1, keepdims=True) / d
    return tagged(NORM, layer.g * centred * (variance + eps) ** -0.5 + layer.b, x)


def gelu(x):
    y = 0.5 * x * (1.0 + (math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)).tanh())
    return tagged(GELU, y, x)


def softmax(s):
    e = (s - Tensor(s.data.max(axis=-1, keepdims=True))).exp()
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v, batch, heads):
    d, e = q.shape[1], q.shape[1] // heads
    split = lambda a: a.reshape(batch, -1, heads, e).transpose(0, 2, 1, 3)  # (batch, heads, T, e)
    T = q.shape[0] // batch
    mask = np.where(np.tri(T, dtype=bool), 0.0, -np.inf).astype(q.dtype)
    S = tagged(QKV, split(q) @ split(k).transpose(0, 1, 3, 2) / math.sqrt(e), q, k)
    P = tagged(PROBABILITIES, softmax(S + Tensor(mask)), S)
    return tagged(VALUES, (P @ split(v)).transpose(0, 2, 1, 3).reshape(-1, d), P, v)


def cross_entropy(logits, targets):
    rows = np.arange(len(targets))
    return tagged(LOSS, -softmax(logits).log()[rows, targets].sum() / len(rows), logits)


class Naive(Module):
    """A GPT with LoRA on all six linears of its blocks, run on a tape of elementary operations."""

    def __init__(self, model):
        self.model = model

    def loss(self, ids, targets, rng=None):
        model, (batch, T) = self.model, ids.shape
        x = model.tokens[ids.ravel()] + model.positions[np.tile(np.arange(T), batch)]
        for block in model.blocks:
            h = layer_norm(block.norm1, x)
            q, k, v = (linear(layer, h) for layer in (block.q, block.k, block.v))
            x = x + linear(block.o, attention(q, k, v, batch, model.config.n_head))
            x = x + linear(block.down, gelu(linear(block.up, layer_norm(block.norm2, x))))
        x = layer_norm(model.norm, x)
        return cross_entropy(tagged(LOSS, x @ model.tokens.T, x), targets.ravel())


# -------------------------------------------------------------------------------- measuring


def build(row, size):
    """(model, ids, targets) of a row at ``size``, as in SIZES: float32, random tokens, alike for all rows."""
    vocab, T, d, layers, heads, batch = size
    rng = np.random.default_rng(0)
    model = minilora.GPT(minilora.GPTConfig(vocab, T, d, layers, heads), rng)
    options = {"r": R, "alpha": ALPHA} if row.method not in ("full", "vera") else {}
    minilora.adapt(model, row.method, TARGETS, verbose=False, **options)
    model.recompute(*row.recompute)
    draws = rng.integers(0, vocab, (batch, T + 1))
    return Naive(model) if row.naive else model, draws[:, :-1].copy(), draws[:, 1:].copy()


def step_of(row, size):
    """One training step, as a function without arguments."""
    keep_heap()  # as train() does
    model, ids, targets = build(row, size)
    optimizer = minilora.AdamW(model.trainable(), lr=1e-4)  # a low rate: every step costs the same
    return lambda: training_step(model, optimizer, ids, targets, micro_batches=row.micro_batches)


def group_of(entry):
    """Which colour an entry of the ledger belongs to."""
    group = entry.operation.rpartition(" / ")[0]
    if group == VALUES:
        return PROBABILITIES if entry.name == "a" else QKV
    if entry.operation == "attention":
        return PROBABILITIES if entry.name == "P" else QKV
    return group or {"gelu": GELU, "layer_norm": NORM, "cross_entropy": LOSS}.get(entry.operation, X)


def kept(row, size):
    """Bytes kept for backward: by the ledger, by the allocator, and by group; of one part, with micro-batches."""
    model, ids, targets = build(row, size)
    part = slice(len(ids) // row.micro_batches)
    audited, groups = audit(model, ids[part], targets[part]), Counter()
    for entry in audited["entries"]:
        groups[group_of(entry)] += entry.nbytes
    groups = {group: groups[group] for group in COLOURS}
    return {"kept_bytes": audited["total"], "allocator_bytes": audited["allocator"], "groups": groups}


def gradient(row, size):
    """(loss, gradients in the parameters' order) off the initial point, where no gradient is zero."""
    model, ids, targets = build(row, size)
    rng = np.random.default_rng(1)
    for p in model.trainable().values():
        p.data += 0.05 * rng.standard_normal(p.shape, np.float32)
    loss, _ = accumulate(model, ids, targets, micro_batches=row.micro_batches)
    return loss, [p.grad for p in model.trainable().values()]


def difference(row, size, expected):
    """How far loss and gradients are from ``expected``; those of an array relative to its largest entry."""
    loss, grads = gradient(row, size)
    off = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(grads, expected[1], strict=True)]
    return {"loss": abs(loss - expected[0]), "gradient": max(off)}


def peak():
    """The most bytes that this process has had resident.

    On Linux not by ru_maxrss, which a process that was started by a larger one begins with that one's.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    high = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    unit = 1 if sys.platform == "darwin" else 1024
    return high[0] if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(name, size):
    """What a fresh process does: its imports are done; 5 steps of a row, or none for "import"."""
    if name != "import":
        step = step_of(ROWS[name], SIZES[size])
        for _ in range(STEPS):
            step()
    print(peak())


def fresh(name, size):
    command = [sys.executable, __file__, "--threads", str(THREADS), "--child", name, size]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(size, rounds):
    """All rows at a size of TITLES."""
    shape, expected = SIZES[size], gradient(ROWS["LoRA"], SIZES[size])
    rows = {name: kept(row, shape) for name, row in ROWS.items()}
    for name, row in ROWS.items():
        rows[name]["difference"] = difference(row, shape, expected) if row.same_gradient else None
        if row.same_gradient and max(rows[name]["difference"].values()) > CLOSE:
            sys.exit(f"{name} at {size}: not LoRA's gradient, {rows[name]['difference']}")
        rows[name]["peak_bytes"] = fresh(name, size)
    seconds = in_turns(rounds, *(step_of(row, shape) for row in ROWS.values()))
    relative = seconds / seconds[:, [list(ROWS).index("LoRA")]]
    for i, row in enumerate(rows.values()):
        row["step_ms"], row["step_ratio"] = 1e3 * float(np.median(seconds[:, i])), float(np.median(relative[:, i]))
    return {"shape": shape, "import_peak_bytes": fresh("import", size), "rows": rows}


# -------------------------------------------------------------------------------- what was seen


def off(row):
    if row["difference"] is None:
        return ""
    value = row["difference"]["gradient"]
    return f"{value:.0e}" if value else "0"


def tables(report):
    """The tables of the page, in Markdown, with what they depend on."""
    lines = []
    for size, result in report["sizes"].items():
        vocabulary, T, d, layers, heads, batch = result["shape"]
        shape = f"{layers} layers, d {d}, {heads} heads, T {T}, {vocabulary} characters: N = {batch * T:,} tokens"
        lines += [f"**{TITLES[size]}** ({shape})", ""]
        lines += [
            "| | kept, MiB | ÷ LoRA | the allocator, MiB | peak, MiB | step ÷ LoRA | gradient off by |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lora = result["rows"]["LoRA"]
        for name, row in result["rows"].items():
            cells = [f"{row['kept_bytes'] / MIB:.1f}", f"{row['kept_bytes'] / lora['kept_bytes']:.2f}"]
            cells += [f"{row['allocator_bytes'] / MIB:.1f}", f"{row['peak_bytes'] / MIB:.0f}"]
            cells += [f"{row['step_ratio']:.2f}", off(row)]
            shown = f"**{name}**" if name in BARS else name
            lines.append(f"| {shown} | {' | '.join(cells)} |".replace("|  |", "| |"))
        lines += [f"| the imports alone | | | | {result['import_peak_bytes'] / MIB:.0f} | | |", ""]
    seen = report["machine"]
    threads = "One thread" if seen["threads"] == 1 else f"{seen['threads']} threads"
    lines.append(
        f"{threads}. {seen['CPU']}, {seen['cores']} cores, Python {seen['Python']}, NumPy {seen['numpy']} with "
        f"{seen['blas']}, {seen['date']}; step times are medians of {report['rounds']} rounds of turns."
    )
    return "\n".join(lines)


def figure(report):
    """The four bars at M, in MiB, each split by who keeps it."""
    from matplotlib import rc_context

    rows = report["sizes"]["M"]["rows"]
    with rc_context({**plots.STYLE, "font.size": 13}):
        made = plots.new_figure(9, 4.6)
        axes = made.subplots()
        for i, name in enumerate(BARS):
            left, total = 0.0, rows[name]["kept_bytes"] / MIB
            for group, colour in COLOURS.items():
                value = rows[name]["groups"][group] / MIB
                axes.barh(i, value, left=left, height=0.7, color=colour, edgecolor="white", linewidth=0.8)
                left += value
            axes.annotate(
                f"{total:.1f} MiB", (total, i), (6, 0), textcoords="offset points", va="center", weight="bold"
            )
        axes.set_yticks(range(len(BARS)), BARS.values())
        most = max(rows[name]["kept_bytes"] for name in BARS) / MIB
        axes.set(xlim=(0, 1.2 * most), ylim=(len(BARS) - 0.5, -0.5), xlabel="MiB")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        _, T, d, layers, _, batch = report["sizes"]["M"]["shape"]
        axes.set_title(f"Kept for backward by one step: {layers} layers, d {d}, {batch} × {T} tokens", fontsize=13.5)
        handles = [axes.barh(0, 0, color=colour) for colour in COLOURS.values()]
        made.legend(handles, COLOURS, loc="outside lower center", ncols=3, fontsize=12, handlelength=1.2)
    return made


def fill(page, text):
    """``page`` with ``text`` between its two marks."""
    before, rest = page.split("<!-- tables -->\n")
    return f"{before}<!-- tables -->\n{text}\n<!-- /tables -->{rest.partition('<!-- /tables -->')[2]}"


def main():
    options = parser(__doc__, rounds=7)
    options.add_argument(
        "--out", type=new_file, metavar="PATH",
        help="write PATH.json and PATH.png, and the tables into PATH.md where there is one",
    )  # fmt: skip
    options.add_argument("--child", nargs=2, metavar=("ROW", "SIZE"), help="what the script starts itself with")
    args = options.parse_args()
    if args.child:
        child(*args.child)
        return
    if args.out is None:
        print_machine()
    report = {"machine": machine(), "rounds": args.rounds}
    report["sizes"] = {size: measure(size, args.rounds) for size in TITLES}
    print(tables(report))
    if args.out:
        path = lambda ending: args.out.with_name(args.out.name + ending)
        path(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path(".png").write_bytes(plots.png(figure(report)))
        if path(".md").exists():
            page = path(".md").read_text(encoding="utf-8")
            path(".md").write_text(fill(page, tables(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
