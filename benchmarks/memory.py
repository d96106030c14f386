"""What one training step keeps for backward, and the most memory that its process has: LoRA four ways, and more.

The four bars of the figure: a textbook tape, with one node for each primitive operation; minilora's LoRA; the same with
model.recompute(), which is activation checkpointing; LoRA-FA. For each row are measured:

- the bytes kept for backward: by the ledger, which adds up what the graph holds, and by the allocator, whose growth
  over a forward pass is taken with only the loss alive; with micro-batches, those of one part
- with recompute, the bytes that one block keeps while its own backward runs, in addition
- the peak resident memory (Linux) of a fresh process that builds the model and takes 5 steps, and of one that imports
- the time of a step, in turns with all the other rows, relative to LoRA's; one thread unless --threads says 2
- the distance of the gradient from LoRA's, for the rows that compute the same; the run stops at more than 1e-4

The textbook tape is the same model with the same arrays. Each layer-sized operation of minilora/ops.py is replaced by
its composition from those of minilora/elementary.py, and the adapter by x @ W.T + (x @ A.T) @ B.T * s.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shapes import SIZES
from sizes import THREADS, adapted, in_turns, machine, parser, print_machine, step_of  # before NumPy: sets its threads
from speed_page import activations
from versus.side import peak_bytes

# isort: split
import numpy as np

import minilora
from minilora import plots
from minilora.engine import Tensor
from minilora.nn import Module
from minilora.tools.audit import audit

STEPS, MIB, CLOSE = 5, 2**20, 1e-4


@dataclass(frozen=True)
class Row:
    method: str = "lora"
    recompute: bool = False
    micro_batches: int = 1
    naive: bool = False


ROWS = {
    "LoRA on a textbook tape": Row(naive=True),
    "LoRA": Row(),
    "LoRA, recompute": Row(recompute=True),
    "LoRA, 2 micro-batches": Row(micro_batches=2),
    "LoRA, 4 micro-batches": Row(micro_batches=4),
    "LoRA-FA": Row("lora_fa"),
    "LoRA-FA, recompute": Row("lora_fa", recompute=True),
    "VeRA, r 64": Row("vera"),
    "DoRA": Row("dora"),
    "full": Row("full"),
}
BARS = {  # of the figure: row, label
    "LoRA on a textbook tape": "textbook tape",
    "LoRA": "LoRA",
    "LoRA, recompute": "with recompute",
    "LoRA-FA": "LoRA-FA",
}
X, GELU, PROBABILITIES, QKV = "adapters: x and h", "GELU", "attention: probabilities", "attention: q, k, v"
NORM, LOSS, BLOCK, AGAIN = "layer norm", "loss", "each block's input", "one block, in backward"
COLOURS = {
    X: "#0072B2", GELU: "#E69F00", PROBABILITIES: "#D55E00", QKV: "#F2A97E", NORM: "#009E73", LOSS: "#000000",
    BLOCK: "#CC79A7",
}  # fmt: skip


# -------------------------------------------------------------------------------- the textbook tape


VALUES = "attention: values"  # the product P v, which keeps P and v


def tagged(group, y, *inputs):
    """``y``, with ``group`` before the name of each node between it and ``inputs``, to tell the layers apart."""
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
    d, e, T = q.shape[1], q.shape[1] // heads, q.shape[0] // batch
    q_, k_, v_ = (a.reshape(batch, T, heads, e).transpose(0, 2, 1, 3) for a in (q, k, v))  # (batch, heads, T, e)
    mask = np.where(np.tri(T, dtype=bool), 0.0, -np.inf).astype(q.dtype)
    S = tagged(QKV, q_ @ k_.transpose(0, 1, 3, 2) / math.sqrt(e), q, k)
    P = tagged(PROBABILITIES, softmax(S + Tensor(mask)), S)
    return tagged(VALUES, (P @ v_).transpose(0, 2, 1, 3).reshape(-1, d), P, v)


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
    """(model, ids, targets) of a row at ``size``, as in SIZES."""
    model, ids, targets = adapted(size, row.method)
    model.recompute(row.recompute)
    return Naive(model) if row.naive else model, ids, targets


def group_of(entry):
    """The colour that an entry of the ledger belongs to."""
    group = entry.operation.rpartition(" / ")[0]
    if group == VALUES:
        return PROBABILITIES if entry.name == "a" else QKV
    if entry.operation == "attention":
        return PROBABILITIES if entry.name == "P" else QKV
    return group or {"gelu": GELU, "layer_norm": NORM, "cross_entropy": LOSS, "recompute": BLOCK}.get(
        entry.operation, X
    )


def kept(row, size):
    """Bytes kept for backward: by the ledger, by the allocator, and by group; of one part, with micro-batches."""
    model, ids, targets = build(row, size)
    part = slice(len(ids) // row.micro_batches)
    audited, groups = audit(model, ids[part], targets[part]), Counter()
    for entry in audited["entries"]:
        groups[group_of(entry)] += entry.nbytes
    groups = {group: groups[group] for group in COLOURS}
    again = one_block(model, len(ids)) if row.recompute else 0
    return {
        "kept_bytes": audited["total"], "allocator_bytes": audited["allocator"], "again_bytes": again, "groups": groups,
    }  # fmt: skip


def one_block(model, batch):
    """Bytes that one block keeps from its forward pass to its backward pass, once recompute runs it again."""
    T, d = model.positions.shape
    x = Tensor(np.ones((batch * T, d), np.float32), requires_grad=True)
    return minilora.kept_bytes(model.blocks[-1](x, batch), model)


def gradient(row, size):
    """(loss, gradients in the parameters' order) off the initial point, where no gradient is zero."""
    model, ids, targets = build(row, size)
    rng = np.random.default_rng(1)
    for p in model.trainable().values():
        p.data += 0.05 * rng.standard_normal(p.shape, np.float32)
    optimizer = minilora.SGD(model.trainable(), lr=1e-6)  # train() leaves the step's gradient in place
    history = minilora.train(model, optimizer, [(ids, targets)], 1, progress=False, micro_batches=row.micro_batches)
    return history.loss[0], [p.grad for p in model.trainable().values()]


def difference(row, size, expected):
    """The distance of loss and gradients from ``expected``; of an array, relative to its largest entry."""
    loss, grads = gradient(row, size)
    off = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(grads, expected[1], strict=True)]
    return {"loss": abs(loss - expected[0]), "gradient": max(off)}


def child(name, size):
    """What a fresh process does: its imports are done; 5 steps of a row, or none for "import"."""
    if name != "import":
        row = ROWS[name]
        step = step_of(*build(row, SIZES[size]), micro_batches=row.micro_batches)
        for _ in range(STEPS - 1):
            step()
    print(peak_bytes())


def fresh(name, size):
    command = [sys.executable, __file__, "--threads", str(THREADS), "--child", name, size]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(size, rounds):
    """All rows at a size."""
    shape, expected = SIZES[size], gradient(ROWS["LoRA"], SIZES[size])
    rows = {name: kept(row, shape) for name, row in ROWS.items()}
    for name, row in ROWS.items():
        rows[name]["difference"] = difference(row, shape, expected) if row.method == "lora" else None
        if row.method == "lora" and max(rows[name]["difference"].values()) > CLOSE:
            sys.exit(f"{name} at {size}: this is not LoRA's gradient, {rows[name]['difference']}")
        rows[name]["peak_bytes"] = fresh(name, size)
    steps = [step_of(*build(row, shape), micro_batches=row.micro_batches) for row in ROWS.values()]
    seconds = in_turns(rounds, *steps)
    relative = seconds / seconds[:, [list(ROWS).index("LoRA")]]
    for i, row in enumerate(rows.values()):
        row["step_ms"], row["step_ratio"] = 1e3 * float(np.median(seconds[:, i])), float(np.median(relative[:, i]))
    return {"shape": shape, "import_peak_bytes": fresh("import", size), "rows": rows}


# -------------------------------------------------------------------------------- the page


def figure(report):
    """The four bars at M, in MiB, each split by who keeps it; hatched, what recompute adds while backward runs."""
    from matplotlib import rc_context

    rows = report["sizes"]["M"]["rows"]
    with rc_context({**plots.STYLE, "font.size": 13}):
        made = plots.new_figure(9, 4.8)
        axes = made.subplots()
        looks = {group: {"color": colour, "edgecolor": "white"} for group, colour in COLOURS.items()}
        looks[AGAIN] = {"color": "white", "edgecolor": "#666666", "hatch": "///"}
        for i, name in enumerate(BARS):
            left, row = 0.0, rows[name]
            for group, look in looks.items():
                value = (row["again_bytes"] if group == AGAIN else row["groups"][group]) / MIB
                if value:
                    axes.barh(i, value, left=left, height=0.7, linewidth=0.8, **look)
                left += value
            text = f"{row['kept_bytes'] / MIB:.1f}" + (
                f" + {row['again_bytes'] / MIB:.1f}" if row["again_bytes"] else ""
            )
            axes.annotate(f"{text} MiB", (left, i), (6, 0), textcoords="offset points", va="center", weight="bold")
        axes.set_yticks(range(len(BARS)), BARS.values())
        most = max(rows[name]["kept_bytes"] for name in BARS) / MIB
        axes.set(xlim=(0, 1.2 * most), ylim=(len(BARS) - 0.5, -0.5), xlabel="MiB")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        _, T, d, layers, _, batch = report["sizes"]["M"]["shape"]
        axes.set_title(f"Kept for backward by one step: {layers} layers, d {d}, {batch} × {T} tokens", fontsize=13.5)
        handles = [axes.barh(0, 0, **look) for look in looks.values()]
        made.legend(handles, looks, loc="outside lower center", ncols=3, fontsize=12, handlelength=1.2)
    return made


def main():
    options = parser(__doc__, rounds=7)
    options.add_argument(
        "--out", type=Path, metavar="PATH", help="PATH.json and PATH.png; speed_page.py fills the page"
    )
    options.add_argument("--child", nargs=2, metavar=("ROW", "SIZE"), help="what the script starts itself with")
    args = options.parse_args()
    if args.child:
        child(*args.child)
        return
    print_machine()
    report = {"machine": machine(), "rounds": args.rounds}
    report["sizes"] = {size: measure(size, args.rounds) for size in ("tiny", "M")}
    print(activations(report))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".png").write_bytes(plots.png(figure(report)))


if __name__ == "__main__":
    main()
