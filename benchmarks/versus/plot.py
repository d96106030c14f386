"""The figure: ratios of a training step's time, minilora ÷ PyTorch + PEFT, as bars with their quartiles."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {1: ("#3b6fa0", "white"), 2: ("#e09f3e", "black")}  # by threads: of the bar, and of the number in it


def draw(seen, path):
    """A bar for each row, LoRA's by size and then the other methods."""
    rows = sorted(seen["rows"], key=lambda row: row["method"] != "lora")
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for place, row in enumerate(rows):
        (low, middle, high), (colour, ink) = row["ratio_quartiles"], COLOURS[row["threads"]]
        whiskers = {"yerr": [[middle - low], [high - middle]], "ecolor": "#444444", "capsize": 2}
        axis.bar(place, middle, 0.8, color=colour, zorder=2, error_kw={"elinewidth": 0.9}, **whiskers)
        axis.text(place, 0.03, f"{middle:.2f}", ha="center", va="bottom", fontsize=8, color=ink, zorder=4)
    names = [f"LoRA, {row['size']}" if row["method"] == "lora" else f"{row['method']}, {row['size']}" for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=9, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, max(len(rows), 3) - 0.4)
    axis.set_ylim(0, 1.2 * max(1.0, *(row["ratio_quartiles"][2] for row in rows)))
    axis.set_ylabel("time of a step,\nminilora ÷ PyTorch + PEFT")
    axis.axhline(1.0, color="black", linewidth=1, linestyle="--", zorder=3)
    axis.spines[["top", "right"]].set_visible(False)
    for count in sorted({row["threads"] for row in rows}):
        axis.bar(0, 0, color=COLOURS[count][0], label=f"{count} thread" + "s" * (count > 1))
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":  # to draw it again: python benchmarks/versus/plot.py versus_peft.json
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
