"""The figures of ``minilora compare`` and ``minilora sweep``, drawn from what these commands record."""

import numpy as np

from ..plots.style import GREY, look, marker, name_rows, new_figure, styled, write_end
from .results import best, curves
from .task import GLANCE

LEAST_SPAN = 0.02  # nats that an axis of losses has at least: what is nearly equal shall look so


@styled
def comparison(result: dict):
    """The figure of ``minilora compare``: learning curves, learning against forgetting, and three costs in bars."""
    rows, settings = result["rows"], result["settings"]
    names = [r["method"] for r in rows]
    legend, bars = 0.2 + 0.22 * -(-len(rows) // 4), 1.1 + 0.24 * len(rows)
    curves_and_names = max(4.1, 1.3 + 0.19 * len(rows))
    figure = new_figure(10.5, curves_and_names + legend + bars + 0.7)
    top, bottom = figure.subfigures(2, 1, height_ratios=[curves_and_names + legend, bars + 0.7])
    curves, trade = top.subplots(1, 2, width_ratios=[1.1, 1])
    _learning_curves(curves, result)
    _learning_against_forgetting(trade, rows)
    top.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=3)
    costs = bottom.subplots(1, 3, sharey=True)
    _bars(costs[0], names, [r["trainable"] / 1e3 for r in rows], "Trainable parameters", "thousand", log=True)
    _bars(costs[1], names, [r["kept_bytes"] / 2**20 for r in rows], "Saved for backward", "MiB")
    _bars(costs[2], names, [r["seconds_per_step"] * 1e3 for r in rows], "Time of a step", "ms")
    tokens = settings["batch"] * settings["context"]
    figure.supxlabel(
        f"{rows[0]['steps']} steps of {tokens:,} characters with AdamW. The Folio: Shakespeare in the spelling of "
        "1623, learnt here; modern text: in\ntoday's spelling, learnt before. "
        "All losses are measured on Macbeth, which no training text holds.",
        fontsize=10, color=GREY,
    )  # fmt: skip
    return figure


def _mark(i):
    """The i-th method's mark: over a white edge, so that of two marks on each other both are seen."""
    return {"marker": marker(i), "markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.6}


def _learning_curves(axes, result):
    """The curves from their second point on: the first, the loss before tuning, is the same for all and far above."""
    curves = {name: np.array(curve) for name, curve in result["curves"].items()}
    for i, (name, curve) in enumerate(curves.items()):
        # The marks of neighbours in the legend do not lie on the same steps.
        axes.plot(*curve.T, label=name, linewidth=1.8, markevery=slice(1 + i % 3, None, 3), **_mark(i), **look(i))
    start = next(iter(curves.values()))[0, 1]
    later = np.concatenate([curve[1:, 1] for curve in curves.values()])
    low, high = later.min(), min(later.max(), start + 0.3 * abs(start - later.min()))  # one that diverged is cut off
    axes.set_ylim(_limits([low, max(low, high)]))
    axes.set(title="Learning the Folio's spelling", xlabel=f"step (loss before the first: {start:.2f})",
             ylabel=f"loss on {GLANCE} passages of the Folio,\nnats per character")  # fmt: skip


def _learning_against_forgetting(axes, rows):
    learnt, forgot = ([row[key] for row in rows] for key in ("loss_b_after", "loss_a_after"))
    for i, point in enumerate(zip(learnt, forgot, strict=True)):
        axes.plot(*point, linestyle="", color=look(i)["color"], zorder=3, **_mark(i))
    axes.set(xlim=_limits(learnt), ylim=_limits(forgot))
    _names_at_the_edge(axes, [row["method"] for row in rows], learnt, forgot)
    axes.set(title="Learning against forgetting",
             xlabel=f"loss on the Folio (left is better)\nbefore tuning: {rows[0]['loss_b_before']:.3f}",
             ylabel=f"loss on modern text (down is better)\nbefore tuning: {rows[0]['loss_a_before']:.3f}")  # fmt: skip


def _limits(values, margin=0.07):
    """An axis around ``values``."""
    low, high = min(values), max(values)
    wider = max(0.0, LEAST_SPAN - (high - low)) / 2 + margin * max(high - low, LEAST_SPAN)
    return low - wider, high + wider


def _names_at_the_edge(axes, names, x, y, gap=0.062):
    """The names at the right edge, as high as their points or, at least ``gap`` apart, near it; a line leads to each.

    The limits of ``axes`` have to be set; heights and ``gap`` are fractions of it.
    """
    low, high = axes.get_ylim()
    order, steps = np.argsort(y), np.arange(len(y))
    gap = min(gap, 1 / max(1, len(y) - 1))
    wanted = (np.array(y)[order] - low) / (high - low) - gap * steps
    pushed_up, pushed_down = np.maximum.accumulate(wanted), np.minimum.accumulate(wanted[::-1])[::-1]
    heights = np.clip((pushed_up + pushed_down) / 2, 0, 1 - gap * steps[-1]) + gap * steps
    for i, height in zip(order, heights, strict=True):
        line = {"arrowstyle": "-", "color": look(i)["color"], "linewidth": 0.8, "relpos": (0, 0.5), "shrinkB": 2}
        axes.annotate(names[i], (x[i], y[i]), (1.03, height), textcoords="axes fraction", va="center", fontsize=10,
                      arrowprops=line, zorder=2)  # fmt: skip


def _bars(axes, names, values, title, unit, log=False):
    from matplotlib.ticker import NullFormatter

    y = range(len(names))
    axes.barh(y, values, color=[look(i)["color"] for i in y], height=0.65)
    name_rows(axes, names)
    axes.set(title=title, xlabel=unit)
    axes.grid(axis="y", visible=False)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=min(values) / 3)
        axes.xaxis.set(major_formatter="{x:,g}", minor_formatter=NullFormatter())
    axes.set_xlim(right=max(values) * (6 if log else 1.28))
    for i, value in enumerate(values):
        write_end(axes, value, i, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", gap=4)


@styled
def sweep(rows):
    """The figure of ``minilora sweep``: held-out loss against learning rate, the mean and the range over seeds.

    ``rows`` are the lines of a sweep's file. With one rank and alpha, each method has a panel and the others are grey
    behind it; otherwise each rank and alpha has one, with all methods that were swept there.
    """
    found = curves(rows)
    names, panels = list(dict.fromkeys(name for name, *_ in found)), _sweep_panels(found)
    single = list(panels) == names
    top = max((row["loss_b_before"] for row in rows if "loss_b" in row), default=1.0)
    least = min([top, *(row["loss_b"] for row in rows if "loss_b" in row)])
    columns = min(len(panels), 4 if len(panels) > 9 or len(panels) in (7, 8) else 2 if len(panels) == 4 else 3)
    lines = -(-len(panels) // columns)
    figure = new_figure(10.5, 1.2 + lines * (2.1 if single else 3.2))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    grid[0].set(xscale="log", ylim=(least - 0.06 * (top - least) - 1e-3, top))
    for i, (axes, (title, shown)) in enumerate(zip(grid, panels.items(), strict=False)):
        for curve in found.values() if single else ():
            _rate_curve(axes, curve, top, color="#d4d4d4", linewidth=1)
        for name, curve in shown.items():
            _rate_curve(axes, curve, top, name, linewidth=2, **look(names.index(name)))
        axes.set_title(title, fontsize=11)
        if single and max(shown[title][rate := best(shown[title])[1]]) < float("inf"):
            axes.set_title(f"★ {rate:g}", loc="right", fontsize=9.5, fontweight="normal")
        axes.tick_params(labelbottom=i + columns >= len(panels))  # the lowest of each column, in a short row too
    _rate_ticks(grid[0], sorted({row["lr"] for row in rows}))
    for axes in grid[len(panels) :]:
        axes.remove()
    if not single:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper", fontsize=10)
    figure.supylabel("held-out loss, nats per character", fontsize=11)
    figure.supxlabel(
        f"learning rate\nMean over seeds ({len({row['seed'] for row in rows})}) and their range, after "
        f"{rows[0]['steps']} steps; ★ the best rate. The top edge is the loss before tuning;\n"
        "a cross there: a seed diverged or failed, or the mean is worse than that.",
        fontsize=9.5, color=GREY,
    )  # fmt: skip
    return figure


def _sweep_panels(found) -> dict:
    """{title: {method: curve}}, by rank and alpha; None, for a method without that option, goes with every value."""
    settings = dict.fromkeys(of[1:] for of in found)
    settings = [s for s in settings if not any(s != other and _goes_with(s, other) for other in settings)]
    if len(settings) == 1:
        return {of[0]: {of[0]: curve} for of, curve in found.items()}
    panels = {}
    for setting in settings:
        given = zip(("r", "alpha"), setting, strict=True)
        title = ", ".join(f"{name} = {value:g}" for name, value in given if value is not None)
        panels[title] = {of[0]: curve for of, curve in found.items() if _goes_with(of[1:], setting)}
    return panels


def _goes_with(given, setting) -> bool:
    return all(value is None or value == other for value, other in zip(given, setting, strict=True))


def _rate_curve(axes, curve, top, label=None, **style):
    """One method's losses by rate, cut off at ``top``; with a ``label`` also the range, the star and the crosses."""
    rates = list(curve)
    means = [min(top, sum(losses) / len(losses)) for losses in curve.values()]
    axes.plot(rates, means, label=label, **style)
    if label is None:
        return
    low, high = ([min(top, end(losses)) for losses in curve.values()] for end in (min, max))
    axes.fill_between(rates, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(rates, means, color=style["color"], linestyle="", marker="o", markersize=3.5)
    marks = {"color": style["color"], "linestyle": "", "markeredgecolor": "white", "zorder": 4, "clip_on": False}
    out = [rate for rate, mean in zip(rates, means, strict=True) if mean == top]
    if out:  # the layout cannot take an empty line that is not clipped
        axes.plot(out, [top] * len(out), marker="X", markersize=8, **marks)
    star = best(curve)[1]
    if star not in out:
        axes.plot(star, means[rates.index(star)], marker="*", markersize=14, **marks)


def _rate_ticks(axes, rates):
    """A tick at each rate; at most four of them have labels, so that these do not touch."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

    labelled = rates[:: -(-len(rates) // 4)]
    axes.xaxis.set(major_locator=FixedLocator(labelled), minor_locator=FixedLocator(rates))
    axes.xaxis.set(major_formatter=FixedFormatter([f"{rate:g}" for rate in labelled]), minor_formatter=NullFormatter())
