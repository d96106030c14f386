"""Draws the picture of each method's page, and fills the page's table from the recorded comparison.

Run it after a new comparison or for a new method: ``python docs/methods/pictures.py``. Tests hold both up to date.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.patches import Patch, Rectangle

from minilora.plots import COLOURS, new_figure

HERE = Path(__file__).parent
FILL = {"frozen": "#cfcfcf", "trained": COLOURS[0], "moved": COLOURS[4], "computed": "white", "kept": COLOURS[2]}
SIZE = {"d_in": 2.4, "d_out": 1.9, "r": 0.62, "N": 1.4, "": 0.3}  # drawn lengths; "" is the width of a vector
WIDTH = 11.4
LETTER = 0.1  # the width of a small letter below a box


@dataclass(frozen=True)
class Array:
    """A matrix or a vector as drawn: its letter, shape and state, and a word below it."""

    name: str
    shape: tuple
    state: str
    note: str = ""
    row: bool = False  # a vector that lies along columns

    @property
    def box(self):
        """(width, height) as drawn."""
        if len(self.shape) == 2:
            return SIZE[self.shape[1]], SIZE[self.shape[0]]
        return (SIZE[self.shape[0]], SIZE[""]) if self.row else (SIZE[""], SIZE[self.shape[0]])


def W(state="frozen", note="", name="W"):
    return Array(name, ("d_out", "d_in"), state, note)


def A(state="trained", note=""):
    return Array("A", ("r", "d_in"), state, note)


def B(state="trained", note="starts at 0"):
    return Array("B", ("d_out", "r"), state, note)


M = Array("m", ("d_out",), "trained")
NORM = Array("n", ("d_out",), "kept")

# The merged weight of each method, from left to right; then the line below it, and what its forward pass makes.
WEIGHTS = {
    "full": [W("trained")],
    "lora": [W(), "+ s", B(), A()],
    "rslora": [W(), "+ s", B(), A()],
    "lora_plus": [W(), "+ s", B(note="rate λ η"), A(note="rate η")],
    "lora_fa": [W(), "+ s", B(), A("frozen")],
    "lora_fa_corrected": [W(), "+ s", B(), A("frozen"), ";  dB = G", Array("C", ("r", "r"), "frozen")],
    "pissa": [
        W(note="the rest: W − s B A at the start"),
        "+ s",
        B(note="r largest left directions"),
        A(note="r largest right directions"),
    ],
    "delta_lora": [W("moved", "moves with B A"), "+ s", B(), A()],
    "delta_lora_control": [W(), "+ s", B(), A()],
    "dora": [M, "∘ (", W(), "+ s", B(), A(), ") /", NORM],
    "dora_detached": [M, "∘ (", W(), "+ s", B(), A(), ") /", NORM],
    "vera": [
        W(),
        "+",
        Array("b", ("d_out",), "trained", "starts at 0"),
        "∘",
        B("frozen", ""),
        "∘",
        Array("d", ("r",), "trained", row=True),
        "·",
        A("frozen", "A, B: one pair for all layers"),
    ],
}
LINES = {
    "full": "the base's W stays beside it, untouched",
    "lora": "s = alpha / r",
    "rslora": "s = alpha / √r",
    "lora_plus": "s = alpha / r;  λ = lr_ratio",
    "lora_fa": "s = alpha / r",
    "lora_fa_corrected": "C = (A Aᵀ)⁻¹ / s² multiplies the gradient G",
    "pissa": "s = alpha / r;  at the start the sum is W as it was",
    "delta_lora": "s = alpha / r;  after each step W ← W + λ s (B A − B′ A′)",
    "delta_lora_control": "s = alpha (1 + λ) / r",
    "dora": "s = alpha / r;  n holds the row norms of W + s B A",
    "dora_detached": "s = alpha / r;  n is a constant in backward",
    "vera": "b scales the rows of B, d its columns",
}
H, Z, Y = ("h", ("N", "r")), ("z", ("N", "d_out")), ("y", ("N", "d_out"))
X = ("x", ("N", "d_in"))
MADE = {  # by the forward pass, and whether it is kept for backward
    **dict.fromkeys(["lora", "rslora", "lora_plus", "pissa", "delta_lora", "delta_lora_control"], ((X, H), (Y,))),
    **dict.fromkeys(["lora_fa", "lora_fa_corrected", "vera"], ((H,), (X, Y))),
    **dict.fromkeys(["dora", "dora_detached"], ((X, H, Z, ("n", ("d_out",))), (Y,))),
    "full": ((X,), (Y,)),
}
ORDER = "xhzny"
NOTES = {  # what stands on PEFT's side in the table's last column, where that is not plainly the same method
    "full": "`full` is timed against PyTorch alone.",
    "lora_fa": "`lora_fa` is timed against PEFT's LoRA with `lora_A` frozen by hand.",
    "vera": "`vera` is timed at $r = 8$ on both sides; its other figures are at $r = 64$.",
    "dora": "`dora` is timed against PEFT's, whose norm is detached.",
}


def picture(name):
    """The Figure for the method ``name``: its merged weight above, and what its forward pass keeps below."""
    figure = new_figure(7.4, 4.1)
    axes = figure.subplots()
    axes.set(xlim=(-0.1, WIDTH), ylim=(-2.85, 3.4), aspect="equal")
    axes.axis("off")
    axes.text(0, 3.15, f"{name}:  {LINES[name]}", fontsize=11.5, fontweight="bold", va="center")
    draw_line(axes, ["M =", *WEIGHTS[name]], 1.8)
    kept, freed = MADE[name]
    made = [Array(*a, "kept") for a in kept] + [Array(*a, "computed") for a in freed]
    made.sort(key=lambda a: ORDER.index(a.name))
    draw_line(axes, ["forward:", *(part for a in made for part in (a, " "))], -1.05)
    words = {
        "frozen": "frozen", "trained": "trained", "moved": "moved by the method's rule",
        "kept": "kept for backward", "computed": "computed, not kept",
    }  # fmt: skip
    drawn = {a.state for a in [*WEIGHTS[name], *made] if isinstance(a, Array)}
    patches = [Patch(facecolor=FILL[s], edgecolor="#333333", label=words[s]) for s in words if s in drawn]
    axes.legend(handles=patches, loc="lower center", ncols=len(patches), fontsize=10, columnspacing=1.2,
                handlelength=1.3, frameon=False, handletextpad=0.5, borderaxespad=0.0)  # fmt: skip
    return figure


def description(name) -> str:
    """All that the picture of ``name`` says; the file carries it, so that a test can compare."""
    return ascii((LINES[name], WEIGHTS[name], MADE[name]))


def write(name, folder=HERE):
    """Write the picture of ``name`` into ``folder``."""
    metadata = {"Software": None, "Description": description(name)}
    picture(name).savefig(folder / f"{name}.png", dpi=150, metadata=metadata)


def draw_line(axes, parts, middle):
    """Boxes and the signs between them, from left to right, each centred on the height ``middle``."""
    left = 0.0
    for part in parts:
        if isinstance(part, str):
            width = 0.2 + 0.17 * len(part)
            axes.text(left + width / 2, middle, part, ha="center", va="center", fontsize=13)
            left += width
            continue
        width, height = part.box
        style = "--" if part.state == "computed" else "-"
        shape = ", ".join(part.shape) + ("," if len(part.shape) == 1 else "")
        below = f"({shape})" + (f"\n{part.note}" if part.note else "")
        room = max(width, LETTER * max(map(len, below.split("\n"))))
        centre, left = left + room / 2, left + room + 0.16
        axes.add_patch(Rectangle((centre - width / 2, middle - height / 2), width, height, facecolor=FILL[part.state],
                                 edgecolor="#333333", linestyle=style))  # fmt: skip
        colour = "white" if part.state in ("trained", "kept") else "black"
        axes.text(centre, middle, part.name, ha="center", va="center", fontsize=12, fontstyle="italic", color=colour)
        axes.text(centre, middle - height / 2 - 0.1, below, ha="center", va="top", fontsize=9)


def table(names, results: dict, speed: dict) -> str:
    """The table of the methods ``names`` from the recorded comparison (compare.json) and speed (versus_peft.json)."""
    records = {row["method"]: row for row in results["rows"]}
    beside_peft = {
        row["method"]: f"{row['ratio_quartiles'][1]:.2f}"
        for row in speed["rows"]
        if row["size"] == "M" and row["threads"] == 1
    }
    first = results["rows"][0]
    heads = (
        "trained numbers", "loss on the Folio", "loss on modern text", "kept, MiB", "a step, ms", "time ÷&nbsp;PEFT's",
    )  # fmt: skip
    lines = [
        "| | " + " | ".join(heads) + " |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| before | | {first['loss_b_before']:.3f} | {first['loss_a_before']:.3f} | | | |",
    ]
    for r in (records[name] for name in names):
        cells = (
            f"`{r['method']}`", f"{r['trainable']:,}", f"{r['loss_b_after']:.3f}", f"{r['loss_a_after']:.3f}",
            f"{r['kept_bytes'] / 2**20:.1f}", f"{r['seconds_per_step'] * 1e3:.0f}",
            beside_peft.get(r["method"], "–"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Lower is better. {first['steps']} steps on one seed, each method at its own learning rate, on the Folio,",
        "Shakespeare in the spelling of 1623. The loss on the Folio shows what was learnt, that on modern text what",
        "was forgotten ([settings and samples](../compare.md)). Last column: the time of a step divided by that of",
        "PyTorch + PEFT, for a model of [size M](../speed.md) on one thread.",
    ]
    notes = [NOTES[name] for name in names if name in NOTES]
    notes += ["– means not timed."] if not set(names) <= set(beside_peft) else []
    return "\n".join(lines + notes)


def fill(page: str, results: dict, speed: dict) -> str:
    """``page`` with its table, which ``<!-- compared NAMES -->`` opens, as it is recorded."""
    make = lambda m: f"{m[1]}\n{table(m[2].split(), results, speed)}\n{m[3]}"
    return re.sub(r"(<!-- compared ([\w ]+) -->).*?(<!-- /compared -->)", make, page, flags=re.DOTALL)


def recorded() -> tuple[dict, dict]:
    """What ``fill`` takes beside the page."""
    read = lambda path: json.loads((HERE.parent / path).read_text(encoding="utf-8"))
    return read("compare.json"), read("speed/versus_peft.json")


def main():
    for name in WEIGHTS:
        write(name)
        page = HERE / f"{name}.md"
        page.write_text(fill(page.read_text(encoding="utf-8"), *recorded()), encoding="utf-8")


if __name__ == "__main__":
    main()
