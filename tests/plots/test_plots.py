"""The notebooks' figures: they draw what was given, tell nothing by colour alone, and no text covers another."""

import io
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import standin_cupy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from minilora import Tensor, ops, plots
from minilora.errors import InputError
from minilora.lab import figures
from minilora.tools import gradcheck


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


STEPS = np.arange(60)
CURVES = {name: [2.0 + np.exp(-STEPS / (9 + i)) + 0.1 * seed for seed in range(3)] for i, name in enumerate("abcdefgh")}
BYTES = {"full": {"x": 3.0, "attention": 5.0}, "lora": {"x": 2.0, "attention": 5.0, "gelu": 1.5}, "vera": {"h": 0.5}}
LOW_RANK = normal(20, 3) @ normal(3, 30)
GOOD = gradcheck.Row("B", "complex", True, 2e-16, (0, 0), 1.0, 1.0, "")
REPORT = gradcheck.Report("lora", (
    GOOD, gradcheck.Row("A", "central", False, 6.0, (0, 0), 7.0, 1.0, "guess: off by a constant factor 7"),
    gradcheck.Row("x", "shape", False, np.inf, (), np.nan, np.nan, "guess: transposed"),
))  # fmt: skip


COMPARED = json.loads((Path(__file__).parents[2] / "docs" / "compare.json").read_text(encoding="utf-8"))


def compared(*names):
    """What ``minilora compare --methods NAMES`` would have recorded; all methods without names."""
    rows = [row for row in COMPARED["rows"] if not names or row["method"] in names]
    return COMPARED | {"rows": rows, "curves": {row["method"]: COMPARED["curves"][row["method"]] for row in rows}}


def attention_of(heads, T):
    P = np.tril(np.random.default_rng(1).random((heads, T, T)) + 0.1)
    return P / P.sum(axis=2, keepdims=True)


def expression():
    """y · y + tanh y for y = x Wᵀ + b: (result, its leaves by name)."""
    shapes = {"x": (5, 4), "W": (3, 4), "b": (3,)}
    leaves = {name: Tensor(normal(*shape), requires_grad=True) for name, shape in shapes.items()}
    y = ops.linear(*leaves.values())
    return (y * y + y.tanh()).sum(), leaves


def self_attention():
    x = Tensor(normal(6, 4), requires_grad=True)
    return ops.attention(x, x, x, batch=2, heads=2)


EXAMPLES = {
    "loss_curves": lambda: plots.loss_curves(CURVES, "Eight methods, three seeds", smooth=5),
    "lines": lambda: plots.lines({"α / r": ([1, 2, 8], [1.0, 0.5, 0.1])}, "Scale", "r", "s", logx=True,
                                 logy=True, points={"best": ([2], [0.5])}),
    "scatter": lambda: plots.scatter({"lora": (STEPS, STEPS * 2.0)}, "Line", "ΔM", "ΔD", fit=True),
    "stacked_bars": lambda: plots.stacked_bars(BYTES, title="Kept for backward"),
    "bars": lambda: plots.bars({"lora": [1.70, 1.72], "full": 1.66}, "Held-out loss", "nats per character"),
    "bars, large": lambda: plots.bars({"lora": 73_728, "full": 786_432}, "Trained", "numbers"),
    "singular_values": lambda: plots.singular_values({"low": LOW_RANK}, "Updates"),
    "gradient_report": lambda: plots.gradient_report(REPORT),
    "heat_map": lambda: plots.heat_map(normal(3, 4), "W", "column", "row", unit="weight"),
    "attention, as many as are named": lambda: plots.attention(attention_of(4, 32), "O Romeo " * 4, "Heads"),
    "graph": lambda: plots.graph(expression()[0], "y · y + tanh y"),
    "graph, much kept": lambda: plots.graph(self_attention().exp(), "attention keeps four arrays"),
}  # fmt: skip


def texts(figure):
    """(text, where it is in pixels) for all that is drawn."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (axes.axison and low - 1e-9 <= tick.get_loc() <= high + 1e-9):
                    unseen |= {tick.label1, tick.label2}
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    # Text's own extent is without the arrow of an annotation.
    return [(text.get_text(), Text.get_window_extent(text, renderer)) for text in drawn if text not in unseen]


def colliding(figure):
    """Pairs of texts that lie on each other by more than a pixel, and those that stick out of the figure."""
    found, page = texts(figure), figure.bbox
    assert len(found) >= 3
    low, high = (np.array([getattr(box, corner) for _, box in found]) for corner in ("min", "max"))
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # (n, n, 2), width and height
    pairs = np.argwhere(np.triu((shared > 1).all(axis=2), k=1))
    out = np.flatnonzero(((low < page.min) | (high > page.max)).any(axis=1))
    return [(found[i][0], found[j][0]) for i, j in pairs] + [found[i][0] for i in out]


def words(figure) -> set:
    return {text for text, _ in texts(figure)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_figure_has_a_title_and_labels_and_no_text_covers_another_or_is_cut_off(name):
    figure = EXAMPLES[name]()
    assert colliding(figure) == []
    assert any([axes.get_title(loc="left") for axes in figure.axes] + [figure.get_suptitle()])
    if name.partition(",")[0] not in ("graph", "stacked_bars", "bars", "gradient_report"):  # there, rows are named
        assert figure.get_supxlabel() or figure.axes[0].get_xlabel()
        assert figure.get_supylabel() or figure.axes[0].get_ylabel()


def test_texts_that_collide_or_are_cut_off_are_seen():
    figure = plots.new_figure(3, 2)
    axes = figure.subplots()
    for text, x in [("one", 0.5), ("two", 0.52), ("far out", 1.2)]:
        axes.text(x, 0.5, text, clip_on=False)
    figure.set_layout_engine("none")
    assert {("one", "two"), "far out"} <= set(colliding(figure))


def test_a_notebook_shows_a_png_on_white_with_its_alt_text():
    png, metadata = plots.show(EXAMPLES["bars"](), "the loss falls")._repr_png_()
    image = imread(io.BytesIO(png))
    assert metadata == {"alt": "the loss falls"}
    assert 700 <= image.shape[1] <= 800
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 1.0).all()  # the corners: white, and not transparent
    assert png == plots.show(EXAMPLES["bars"](), "again")._repr_png_()[0]
    with pytest.raises(InputError, match="alt is empty"):
        plots.show(EXAMPLES["bars"](), " ")


def test_lines_points_and_scales_are_what_was_given():
    axes = EXAMPLES["lines"]().axes[0]
    line, point = axes.lines
    assert line.get_xydata().tolist() == [[1, 1.0], [2, 0.5], [8, 0.1]]
    assert point.get_marker() == "o" and point.get_xydata().tolist() == [[2, 0.5]]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert plots.lines({"a": ([1], [1])}).axes[0].get_yscale() == "linear"


def test_losses_are_smoothed_and_seeds_become_a_mean_and_a_range():
    axes = plots.loss_curves({"a": [[4.0, 2.0, 0.0], [6.0, 4.0, 2.0]], "b": [1.0, 2.0, 6.0]}, smooth=2).axes[0]
    a, b = axes.lines
    assert a.get_xydata().tolist() == [[2, 4.0], [3, 2.0]] and b.get_xydata().tolist() == [[2, 1.5], [3, 4.0]]
    (longer,) = plots.loss_curves({"a": [1.0, 3.0]}, smooth=9).axes[0].lines  # than the run: its mean
    assert longer.get_xydata().tolist() == [[2, 2.0]]
    (band,) = axes.collections
    assert {(2.0, 3.0), (2.0, 5.0), (3.0, 1.0), (3.0, 3.0)} <= set(map(tuple, band.get_paths()[0].vertices))


def test_curves_that_lie_on_one_another_are_all_seen():
    same = dict.fromkeys("abcd", LOW_RANK)
    losses, values = (draw(same).axes[0].lines for draw in (plots.loss_curves, plots.singular_values))
    for drawn in (losses, values):
        widths = [line.get_linewidth() for line in drawn]
        assert all(below > above + 0.3 for below, above in pairwise(widths))
        assert len({line.get_linestyle() for line in drawn}) == 4
    marks = [line.get_markersize() for line in values]
    assert marks == sorted(set(marks), reverse=True)


def test_a_fit_tells_the_correlation_in_words():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    figure = plots.scatter({"up": (x, 2 * x + 1), "down": (x, np.array([3.0, 1.0, 2.0, 0.0]))}, fit=True)
    assert {"up, correlation +1.00", "down, correlation -0.80"} <= words(figure)
    up, down = figure.axes[0].lines
    assert up.get_ydata().tolist() == pytest.approx([1.0, 7.0])
    assert down.get_ydata().tolist() == pytest.approx([2.7, 0.3])
    marks = {tuple(c.get_paths()[0].vertices.ravel()) for c in figure.axes[0].collections}
    assert len(marks) == 2  # of two shapes
    assert not plots.scatter({"up": (x, x)}).axes[0].lines


def test_the_singular_values_end_at_the_rank():
    full = np.diag(np.arange(1.0, 41.0))
    figure = plots.singular_values({"low": LOW_RANK, "full": full}, most=32)
    low, high = figure.axes[0].lines
    assert low.get_ydata() == pytest.approx(np.linalg.svd(LOW_RANK, compute_uv=False)[:3])
    assert high.get_ydata() == pytest.approx(np.arange(40.0, 8.0, -1.0))
    assert low.get_label() == "low (rank 3)" and high.get_label() == "full (rank 40)"
    assert low.get_marker() != high.get_marker()


def test_stacked_bars_lie_end_to_end_and_totals_stand_behind_them():
    axes = EXAMPLES["stacked_bars"]().axes[0]
    drawn = {c.get_label(): [(p.get_x(), p.get_width()) for p in c] for c in axes.containers}
    assert drawn == {
        "x": [(0.0, 3.0), (0.0, 2.0), (0.0, 0.0)], "attention": [(3.0, 5.0), (2.0, 5.0), (0.0, 0.0)],
        "gelu": [(8.0, 0.0), (7.0, 1.5), (0.0, 0.0)], "h": [(8.0, 0.0), (8.5, 0.0), (0.0, 0.5)],
    }  # fmt: skip
    assert [(t.get_text(), t.xy) for t in axes.texts] == [("8", (8.0, 0)), ("8.5", (8.5, 1)), ("0.5", (0.5, 2))]
    assert axes.get_xlabel() == "MiB"


def test_bars_have_the_length_of_the_mean_and_tell_the_deviation():
    figure = EXAMPLES["bars"]()
    axes = figure.axes[0]
    widths = [patch.get_width() for patch in axes.patches]
    assert widths == pytest.approx([1.71, 1.66])
    assert {"1.710 ± 0.014", "1.66"} <= words(figure)
    (points,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert points.get_xdata().tolist() == [1.70, 1.72]
    (error,) = axes.collections
    assert np.ptp(error.get_segments()[0][:, 0]) == pytest.approx(2 * 0.01 * 2**0.5)
    assert {"73,728", "786,432", "800,000"} <= words(EXAMPLES["bars, large"]())


def test_a_gradient_report_tells_right_from_wrong_in_words():
    figure = EXAMPLES["gradient_report"]()
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts] == ["✓ 2e-16", "✗ 6e+00", "✗ wrong shape"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["B, complex", "A, central", "x, shape"]
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert ends == pytest.approx([2e-16, 6.0, 1e3])
    green, red, also_red = (to_hex(patch.get_facecolor()).upper() for patch in axes.patches)
    assert green == "#009E73" and red == also_red == "#D55E00" and {green, red} <= set(plots.COLOURS)
    (tolerances,) = axes.collections
    assert [(s[0, 0], s[:, 1].mean()) for s in tolerances.get_segments()] == [(1e-12, 0.0), (1e-7, 1.0)]


def test_a_diverging_map_is_white_at_zero_and_small_ones_have_numbers():
    axes = plots.heat_map(np.array([[0.0, -1.0], [0.5, 0.25]]), xticks=["a", "b"], yticks=[1, 2]).axes[0]
    (image,) = axes.images
    assert image.get_clim() == (-1.0, 1.0)
    assert image.to_rgba(0.0)[:3] == pytest.approx([0.97, 0.97, 0.97], abs=0.01)
    assert [t.get_text() for t in axes.texts] == ["0", "-1", "0.5", "0.25"]
    assert [to_hex(t.get_color()) for t in axes.texts] == ["#000000", "#ffffff", "#000000", "#000000"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b"]
    plain = plots.heat_map(np.ones((40, 30)), diverging=False).axes[0]
    assert not plain.texts and plain.images[0].get_cmap().name == "cividis"


def test_attention_has_a_panel_for_each_head_and_names_its_tokens():
    figure = plots.attention(attention_of(4, 12), "Enter Macb\n ", "Heads")
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("head")]
    assert [axes.get_title(loc="left") for axes in panels] == [f"head {i}" for i in range(4)]
    for P, axes in zip(attention_of(4, 12), panels, strict=True):
        assert (axes.images[0].get_array() == P).all()
        assert [t.get_text() for t in axes.get_xticklabels()] == [*"Enter␣Macb↵␣"]
    long = plots.attention(attention_of(3, 33), "x" * 33)
    assert len(long.axes) == 4 and not long.axes[0].get_xticklabels()  # 3 heads and the colours


def test_the_graph_shows_operations_leaves_edges_and_what_is_kept():
    result, leaves = expression()
    axes = plots.graph(result, names=leaves).axes[0]
    boxes = {t.get_text(): type(t.get_bbox_patch().get_boxstyle()).__name__ for t in axes.texts if t.get_bbox_patch()}
    assert {k for k, style in boxes.items() if style == "Ellipse"} == {"x", "W", "b"}
    assert {k for k, style in boxes.items() if style == "Round"} == {"linear", "mul", "tanh", "add", "sum"}
    assert {"x (5, 4)\nW (3, 4)", "a (5, 3)\nb (5, 3)", "y (5, 3)"} <= {t.get_text() for t in axes.texts}
    arrows = {(t.xy, t.xyann) for t in axes.texts if getattr(t, "arrow_patch", None)}
    assert len(arrows) == 9  # three leaves, y twice into its square and once into tanh, two into add, one into sum
    height = {t.get_text(): t.get_position()[1] for t in axes.texts if t.get_text() in boxes}
    assert height["x"] > height["linear"] > height["mul"] == height["tanh"] > height["add"] > height["sum"]


def test_an_edge_that_goes_round_leads_from_box_to_box():
    x = Tensor(np.ones(3), requires_grad=True)
    figure = plots.graph(x.exp().exp().tanh() * x, names={"a leaf of a long name": x})
    figure.draw(FigureCanvasAgg(figure).get_renderer())
    drawn = figure.axes[0].texts
    boxes = {t.get_text(): t.get_bbox_patch().get_window_extent().padded(3) for t in drawn if t.get_bbox_patch()}
    arrows = [t.arrow_patch for t in drawn if getattr(t, "arrow_patch", None)]
    (around,) = [arrow for arrow in arrows if arrow.get_connectionstyle().rad]  # the others are straight
    start, _, end = around.get_path().vertices[:3]  # of the curve; those of the head follow
    assert boxes["a leaf of a long name"].contains(*start)
    assert boxes["mul"].contains(*end)


def test_a_graph_that_is_too_large_or_is_none_is_refused():
    x = Tensor(np.ones(3), requires_grad=True)
    with pytest.raises(InputError, match="has 0 nodes; between 1 and 40"):
        plots.graph(Tensor(np.ones(3)))
    for _ in range(39):
        x = x.tanh()
    plots.graph(x)
    with pytest.raises(InputError, match="has 41 nodes"):
        plots.graph(x.tanh())


# -------------------------------------------------------------------------------- minilora compare


def many(count):
    """What a comparison of ``count`` methods might record: the recorded rows, again and again."""
    recorded = COMPARED["rows"]
    rows = [recorded[i % len(recorded)] | {"method": f"method_{i}_of_{count}"} for i in range(count)]
    curves = {row["method"]: COMPARED["curves"][recorded[i % len(recorded)]["method"]] for i, row in enumerate(rows)}
    return COMPARED | {"rows": rows, "curves": curves}


COMPARISONS = {"1": compared("lora"), "2": compared("dora", "dora_detached"), "36": many(36)}


@pytest.mark.parametrize("result", COMPARISONS.values(), ids=COMPARISONS)
def test_the_comparison_of_any_number_of_methods_can_be_read(result):
    figure = figures.comparison(result)
    assert colliding(figure) == []
    curves, trade = figure.axes[:2]
    assert sorted(text.get_text() for text in trade.texts) == sorted(result["curves"])
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in curves.lines]
    assert [line.get_label() for line in curves.lines] == list(result["curves"])
    assert len(set(looks)) == len(looks)  # no two methods look alike
    (legend,) = [legend for part in figure.subfigs for legend in part.legends]
    assert [text.get_text() for text in legend.get_texts()] == list(result["curves"])
    assert [(h.get_color(), h.get_linestyle(), h.get_marker()) for h in legend.get_lines()] == looks
    assert [(p.get_color(), p.get_marker()) for p in trade.lines] == [(c, m) for c, _, m in looks]


def test_a_comparison_shows_the_recorded_losses_on_axes_that_are_scaled_to_them():
    curves, trade = figures.comparison(compared()).axes[:2]
    for line, point, row in zip(curves.lines, trade.lines, COMPARED["rows"], strict=True):
        assert line.get_xydata().tolist() == COMPARED["curves"][row["method"]]
        assert point.get_xydata().tolist() == [[row["loss_b_after"], row["loss_a_after"]]]
        assert [name.xy for name in trade.texts if name.get_text() == row["method"]] == [
            (row["loss_b_after"], row["loss_a_after"])
        ]
    low, high = trade.get_xlim()
    losses = [row["loss_b_after"] for row in COMPARED["rows"]]
    assert low < min(losses) and high > max(losses) and high - low < 1.2 * (max(losses) - min(losses))
    assert "before tuning: 2.225" in trade.get_xlabel() and "before tuning: 1.785" in trade.get_ylabel()


def test_a_method_that_diverged_does_not_squeeze_the_others():
    result = compared("lora", "dora")
    result["curves"]["dora"] = [[step, loss if step < 60 else 9.0] for step, loss in result["curves"]["dora"]]
    low, high = figures.comparison(result).axes[0].get_ylim()
    assert 1.7 < low < 1.9 and 2.35 < high < 2.7


def test_arrays_of_a_device_are_drawn_too(monkeypatch):
    cupy = standin_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    (line,) = plots.singular_values({"low": cupy.asarray(LOW_RANK)}).axes[0].lines
    assert len(line.get_ydata()) == 3
    for figure in (plots.heat_map(cupy.ones((2, 2))), plots.attention(cupy.asarray(attention_of(2, 5)), "abcde")):
        assert figure.axes[0].images
    assert plots.lines({"a": (cupy.ones(3), cupy.ones(3))}).axes[0].lines
