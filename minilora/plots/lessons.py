"""The figures of the notebooks: each says one thing, at the width of a notebook's page.

What is told by colour is told in words or by shape as well.
"""

import math

import numpy as np

from ..tools.gradcheck import CENTRAL_TOLERANCE, COMPLEX_TOLERANCE
from .style import DASHES, GREY, look, marker, name_rows, new_page, on_host, styled, write_end

RIGHT, WRONG = "#009E73", "#D55E00"
DASHED = 3.2  # in letters: long enough for a legend's line to show its dashes
TOLERANCES = {"central": CENTRAL_TOLERANCE, "complex": COMPLEX_TOLERANCE}  # a wrong shape has none


@styled
def lines(curves, title="", xlabel="", ylabel="", logx=False, logy=False, points=None):
    """``curves`` {name: (x, y)} as lines. A y of two dimensions holds one run per row: their mean, and their range.

    ``points`` {name: (x, y)} are drawn as marks on top.
    """
    figure, axes = _axes(4.0, title, xlabel, ylabel, grid="both")
    for i, (name, (x, y)) in enumerate(curves.items()):
        x, y = on_host(x), np.atleast_2d(on_host(y))
        axes.plot(x, y.mean(axis=0), label=name, **_curve(i, len(curves)))
        if len(y) > 1:
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=look(i)["color"], alpha=0.18, linewidth=0)
    for i, (name, (x, y)) in enumerate((points or {}).items()):
        color = look(len(curves) + i)["color"]
        axes.plot(x, y, label=name, color=color, linestyle="", marker=marker(i), markersize=8, zorder=3)
    _log(axes, "x" * logx + "y" * logy)
    _legend(figure, axes, handlelength=DASHED)
    return figure


def loss_curves(curves, title="", xlabel="step", ylabel="loss, nats per token", smooth=1):
    """``curves`` {name: losses}, or {name: a list of losses for each seed}: then their mean, and their range.

    ``smooth``: each point is the mean of so many steps up to it.
    """
    drawn = {}
    for name, losses in curves.items():
        y = np.atleast_2d(on_host(losses))
        width = min(smooth, y.shape[1])
        y = np.lib.stride_tricks.sliding_window_view(y, width, axis=1).mean(axis=2)
        drawn[name] = np.arange(width, width + y.shape[1]), y
    return lines(drawn, title, xlabel, ylabel)


@styled
def scatter(groups, title="", xlabel="", ylabel="", fit=False):
    """``groups`` {name: (x, y)} as points; with ``fit`` the line through each, and its correlation in words."""
    figure, axes = _axes(4.2, title, xlabel, ylabel, grid="both")
    for i, (name, (x, y)) in enumerate(groups.items()):
        x, y = on_host(x), on_host(y)
        label = f"{name}, correlation {np.corrcoef(x, y)[0, 1]:+.2f}" if fit else name
        axes.scatter(x, y, s=28, alpha=0.8, label=label, color=look(i)["color"], marker=marker(i), linewidth=0)
        if fit:
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), linewidth=1.6, **look(i))
    _legend(figure, axes)
    return figure


@styled
def singular_values(updates, title="", most=32):
    """The largest singular values of ``updates`` {name: matrix}, on a log axis.

    Values that are rounding alone, by the rule of numpy.linalg.matrix_rank, are left out: the line ends at the rank.
    """
    figure, axes = _axes(4.0, title, "i", "singular value σᵢ", grid="both")
    for i, (name, matrix) in enumerate(updates.items()):
        matrix = on_host(matrix)
        values = np.linalg.svd(matrix, compute_uv=False)
        values = values[values > values[0] * max(matrix.shape) * np.finfo(matrix.dtype).eps]
        label, shown = f"{name} (rank {len(values)})", values[:most]
        shape = {"marker": marker(i), "markersize": 4 + len(updates) - i}
        axes.plot(np.arange(1, len(shown) + 1), shown, label=label, **shape, **_curve(i, len(updates)))
    _log(axes, "y")
    _legend(figure, axes, handlelength=DASHED)
    return figure


@styled
def stacked_bars(rows, unit="MiB", title=""):
    """``rows`` {name: {part: size}} as horizontal bars, the parts of each end to end and its total behind them."""
    parts = list(dict.fromkeys(part for sizes in rows.values() for part in sizes))
    figure, axes = _axes(1.5 + 0.42 * len(rows) + 0.2 * -(-len(parts) // 4), title, unit, "", grid="x")
    left = np.zeros(len(rows))
    for i, part in enumerate(parts):
        sizes = np.array([sizes.get(part, 0.0) for sizes in rows.values()])
        hatch = ["", "//", ".."][i // 7 % 3]  # once the colours run out
        axes.barh(range(len(rows)), sizes, left=left, height=0.65, label=part, color=look(i)["color"], hatch=hatch)
        left += sizes
    name_rows(axes, rows)
    _write_ends(axes, left, [number(total) for total in left])
    _legend(figure, axes)
    return figure


@styled
def bars(values, title="", xlabel=""):
    """``values`` {name: number or several} as horizontal bars; of several their mean, deviation and single points."""
    figure, axes = _axes(1.1 + 0.42 * len(values), title, xlabel, "", grid="x")
    ends, texts = [], []
    for i, value in enumerate(values.values()):
        value = np.atleast_1d(on_host(value))
        mean, deviation = value.mean(), value.std(ddof=1) if len(value) > 1 else 0.0
        axes.barh(i, mean, height=0.65, color=look(i)["color"], xerr=deviation or None, capsize=3)
        if len(value) > 1:
            axes.plot(value, [i] * len(value), "o", color="white", markeredgecolor="black", markersize=4.5, zorder=4)
        ends.append(max(value.max(), mean + deviation))
        texts.append(with_deviation(mean, deviation))
    name_rows(axes, values)
    _write_ends(axes, ends, texts)
    return figure


@styled
def gradient_report(report):
    """A gradcheck.Report: each row's relative error as a bar on a log axis, its tolerance as a black line, ✓ or ✗."""
    figure, axes = _axes(1.3 + 0.38 * len(report.rows), report.title, "relative error", "", grid="x")
    least, most = 1e-18, 1e3  # what lies beyond is drawn there
    for i, row in enumerate(report.rows):
        error, color = np.clip(row.error, 2 * least, most), RIGHT if row.ok else WRONG
        axes.barh(i, error - least, left=least, height=0.6, color=color)
        text = f"{'✓' if row.ok else '✗'} {row.error:.0e}" if np.isfinite(row.error) else "✗ wrong shape"
        write_end(axes, error, i, text, color=color, weight="bold")
    marked = [(TOLERANCES[row.method], i) for i, row in enumerate(report.rows) if row.method in TOLERANCES]
    x, y = np.array(marked).reshape(-1, 2).T
    axes.vlines(x, y - 0.42, y + 0.42, color="black", linewidth=2, label="tolerance")
    axes.set(xscale="log", xlim=(least, 1e5 * max(CENTRAL_TOLERANCE, min(report.worst_error, most))))
    name_rows(axes, [f"{row.array}, {row.method}" for row in report.rows])
    _legend(figure, axes, least=1)
    return figure


@styled
def heat_map(matrix, title="", xlabel="", ylabel="", diverging=True, unit="", xticks=None, yticks=None):
    """A matrix as colours, its first row on top: red and blue about 0 where ``diverging``, else from dark to light.

    ``xticks`` and ``yticks`` name columns and rows. Up to 12 by 8 entries are written into their cells.
    """
    matrix = on_host(matrix)
    rows, columns = matrix.shape
    height = float(np.clip(5.6 * rows / columns, 1.6, 5.2)) + 0.9
    figure, axes = _axes(height, title, xlabel, ylabel)
    end = np.abs(matrix[np.isfinite(matrix)]).max(initial=0.0)
    limits = {"vmin": -end, "vmax": end} if diverging else {}
    image = axes.imshow(matrix, cmap="RdBu_r" if diverging else "cividis", aspect="auto", **limits)
    figure.colorbar(image, label=unit)
    for axis, names in ((axes.xaxis, xticks), (axes.yaxis, yticks)):
        if names is not None:
            axis.set_ticks(range(len(names)), names)
    if rows <= 12 and columns <= 8:
        for (i, j), value in np.ndenumerate(matrix):
            dark = np.dot(image.to_rgba(value)[:3], [0.3, 0.59, 0.11]) < 0.5
            axes.text(j, i, number(value), ha="center", va="center", fontsize=9, color="white" if dark else "black")
    return figure


@styled
def attention(probabilities, tokens, title=""):
    """Attention (heads, T, T) as one small panel per head: a row is a query, and sums to 1 over the keys it sees.

    ``tokens``: T characters or words for the ticks, which are left out where there are more than 32.
    """
    probabilities = on_host(probabilities)
    heads, T, _ = probabilities.shape
    columns = min(heads, 2)
    down = -(-heads // columns)
    figure = new_page(0.8 + 3.3 * down)
    grid = figure.subplots(down, columns, squeeze=False).flatten()
    names = [{"\n": "↵", " ": "␣"}.get(token, token) for token in tokens]
    for head, axes in enumerate(grid[:heads]):
        image = axes.imshow(probabilities[head], cmap="Blues", vmin=0.0, vmax=1.0)
        axes.grid(visible=False)
        axes.set_title(f"head {head}", fontsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(*((range(T), names) if T <= 32 else ([], [])), fontsize=min(9, 160 / T))
        axes.tick_params(length=0, pad=2)
    for axes in grid[heads:]:
        axes.remove()
    figure.colorbar(image, ax=grid[:heads].tolist(), label="probability", shrink=0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel("key: the token that is looked at", fontsize=10)
    figure.supylabel("query: the token that looks", fontsize=10)
    return figure


def number(value) -> str:
    """Three figures, as people write them: 0.0123, 45.6, 73,728, and powers of ten beyond that."""
    if value == 0.0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e8 else f"{value:.1e}"


def with_deviation(mean, deviation) -> str:
    """Both to the second figure of the deviation: 1.843 ± 0.051."""
    if not deviation > 0.0:
        return number(mean)
    places = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:,.{places}f} ± {deviation:,.{places}f}"


def _axes(height, title, xlabel, ylabel, grid=None):
    """A figure of a notebook's width with one pair of axes; ``grid``: "x", "y", "both", or None for no lines."""
    figure = new_page(height)
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=False)
    if grid:
        axes.grid(visible=True, axis=grid)
    return figure, axes


def _curve(i, count):
    """How the i-th of ``count`` curves looks: thinner than those before it, and dashed in another way.

    So those are seen that lie on one another.
    """
    return {**look(i), "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.8 + 1.4 * (count - 1 - i) / count}


def _legend(figure, axes, least=2, handlelength=2.0):
    """The legend below, where nothing can lie under it; none for fewer than ``least`` names."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) >= least:
        letters = max(map(len, labels)) + 4 + 2 * handlelength
        columns = max(1, min(len(labels), int(88 / letters)))
        place = {"loc": "outside lower center", "borderaxespad": 0.2}
        figure.legend(handles, labels, ncols=columns, handlelength=handlelength, **place)


def _log(axes, which):
    """Log scales for ``which``, "x", "y" or both, with plain numbers; more of them where an axis is short."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for letter in which:
        axes.set(**{f"{letter}scale": "log"})
        axis, (low, high) = getattr(axes, f"{letter}axis"), getattr(axes, f"get_{letter}lim")()
        plain = StrMethodFormatter("{x:g}")
        axis.set(major_formatter=plain, minor_formatter=plain if high < 30 * low else NullFormatter())
        axis.set_minor_locator(LogLocator(subs=(2, 3, 5)))


def _write_ends(axes, ends, texts):
    """``texts`` behind the bars, with room for the longest of them."""
    most = max(*ends, 0.0)
    axes.set_xlim(right=(most or 1.0) * (1.06 + 0.022 * max(map(len, texts))))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    for i, (end, text) in enumerate(zip(ends, texts, strict=True)):
        write_end(axes, end, i, text, color=GREY)
