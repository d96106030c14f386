"""The figure: ratios of a training step's time, minilora by PyTorch + PEFT, as bars with their quartiles."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {1: "#3b6fa0", 2: "#e09f3e"}
INK = {"#3b6fa0": "white", "#e09f3e": "black"}


def draw(seen, path):
    """LoRA by size and threads on the left, the methods at size M on the right; a panel without rows is left out."""
    rows = seen["rows"]
    lora = [row for row in rows if row["method"] == "lora"]
    size, threads = methods_at(rows)
    methods = [row for row in rows if (row["size"], row["threads"]) == (size, threads)]
    panels = [lora] * bool(lora) + [methods] * (len(methods) > 1 or not lora)
    widths = [max(2, len(panel)) for panel in panels]
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 3.4), sharey=True, squeeze=False, width_ratios=widths)
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel is lora:
            sizes, counts = list(dict.fromkeys(r["size"] for r in lora)), sorted({r["threads"] for r in lora})
            width = 0.8 / len(counts)
            for i, count in enumerate(counts):
                shown = [row for row in lora if row["threads"] == count]
                places = [sizes.index(row["size"]) + (i - (len(counts) - 1) / 2) * width for row in shown]
                bars(axis, places, shown, width, COLOURS[count], f"{count} thread" + "s" * (count > 1))
            label(axis, sizes, "LoRA, by size of the model")
            axis.legend(frameon=False, fontsize=9, loc="upper right", ncols=2, borderaxespad=0.1)
        else:
            bars(axis, range(len(panel)), panel, 0.7, COLOURS[threads], None)
            label(
                axis, [row["method"] for row in panel], f"methods, size {size}, {threads} thread" + "s" * (threads > 1)
            )
            plt.setp(axis.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
    top = max(row["ratio_quartiles"][2] for panel in panels for row in panel)
    axes[0][0].set_ylim(0, 1.2 * max(1.0, top))
    axes[0][0].set_ylabel("time of a step,\nminilora ÷ PyTorch + PEFT")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def methods_at(rows):
    """The (size, threads) that most methods were timed at."""
    places = [(row["size"], row["threads"]) for row in rows]
    return max(places, key=places.count)


def bars(axis, places, rows, width, colour, label):
    quartiles = [row["ratio_quartiles"] for row in rows]
    heights = [q[1] for q in quartiles]
    whiskers = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
    style = {"ecolor": "#444444", "elinewidth": 0.9, "capsize": 2}
    axis.bar(places, heights, width * 0.94, color=colour, label=label, yerr=whiskers, error_kw=style, zorder=2)
    for place, middle in zip(places, heights, strict=True):  # at the foot, where neither the line at 1 nor a whisker is
        axis.text(place, 0.03, f"{middle:.2f}", ha="center", va="bottom", fontsize=8, color=INK[colour], zorder=4)


def label(axis, ticks, text):
    axis.axhline(1.0, color="black", linewidth=1, linestyle="--", zorder=3)
    axis.set_xticks(range(len(ticks)), ticks, fontsize=9)
    axis.set_xlim(-0.6, max(len(ticks), 3) - 0.4)
    axis.set_xlabel(text, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":  # draw again: python benchmarks/versus/plot.py versus_peft.json
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
