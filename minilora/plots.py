"""Every figure of the project, in one style: colour-blind safe, readable at half size, on white for dark pages too.

matplotlib is imported here alone, and only when a figure is drawn.
"""

import io

# Okabe & Ito 2008, the colour-blind safe palette, then the same colours with dashes once they run out.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", ":"]
MARKERS = "osD^vP*XhdpH"

STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def look(i: int) -> dict:
    """Colour and line style of the i-th method; distinct for the first 21."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def new_figure(width, height, **grid):
    """An empty Figure in the house style; no window and no pyplot state, so it works in a server and a thread."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained", **grid)


def png(figure, dpi=150) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def comparison(result: dict):
    """The figure of ``minilora compare``: learning curves, learning against forgetting, and three costs in bars."""
    from matplotlib import rc_context

    rows, settings = result["rows"], result["settings"]
    with rc_context(STYLE):
        height = 6.2 + 0.22 * max(0, len(rows) - 3)
        figure = new_figure(10.5, height)
        top, bottom = figure.subfigures(2, 1, height_ratios=[3.6, height - 4.2])
        curves, trade = top.subplots(1, 2, width_ratios=[1.25, 1])
        _learning_curves(curves, result)
        _learning_against_forgetting(trade, rows)
        costs = bottom.subplots(1, 3, sharey=True)
        names = [r["method"] for r in rows]
        _bars(costs[0], names, [r["trainable"] / 1e3 for r in rows], "Trained numbers", "thousand", log=True)
        _bars(costs[1], names, [r["kept_bytes"] / 2**20 for r in rows], "Kept for backward", "MiB")
        _bars(costs[2], names, [r["seconds_per_step"] * 1e3 for r in rows], "Time of a step", "ms")
        tokens = settings["batch"] * settings["context"]
        figure.supxlabel(
            f"{rows[0]['steps']} steps of {tokens:,} characters, r = {settings['r']}, alpha = {settings['alpha']:g}. "
            "B: Shakespeare in the spelling of 1623; A: in modern spelling. Both losses on Macbeth, held out.",
            fontsize=9.5, color="#444444",
        )  # fmt: skip
    return figure


def _learning_curves(axes, result):
    for i, (name, curve) in enumerate(result["curves"].items()):
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, label=name, linewidth=2, **look(i))
    axes.set(title="Learning the Folio's spelling", xlabel="step", ylabel="held-out loss on B, nats per character")
    axes.legend(ncols=2 if len(result["curves"]) > 5 else 1, fontsize=10)


def _learning_against_forgetting(axes, rows):
    base = rows[0]["loss_b_before"], rows[0]["loss_a_before"]
    axes.scatter(*base, s=110, marker="*", color="#555555", zorder=3, label="before")
    for i, r in enumerate(rows):
        after = r["loss_b_after"], r["loss_a_after"]
        axes.annotate("", after, base, arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.8})
        axes.scatter(
            *after, s=65, marker=MARKERS[i % len(MARKERS)], color=look(i)["color"], zorder=3, label=r["method"]
        )
    axes.margins(0.15)
    axes.set(title="Learning against forgetting", xlabel="loss on B after (left is better)",
             ylabel="loss on A after (down is better)")  # fmt: skip
    axes.legend(ncols=2 if len(rows) > 5 else 1, fontsize=10)


def _bars(axes, names, values, title, unit, log=False):
    y = range(len(names))
    axes.barh(y, values, color=[look(i)["color"] for i in y], height=0.65)
    axes.set_yticks(list(y), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first method on top
    axes.set(title=title, xlabel=unit)
    axes.grid(axis="y", visible=False)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=min(values) / 3)
    axes.set_xlim(right=max(values) * (6 if log else 1.28))
    for i, value in enumerate(values):
        axes.annotate(f"{value:,.4g}", (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)
