"""The engine's graph as a drawing: what backward will walk, and what it will find kept at each node."""

from statistics import fmean

from ..engine import nodes_of
from ..errors import InputError
from ..memory import arrays_of
from .style import COLOURS, GREY, new_page, styled

MOST = 40  # nodes that can still be read
LINE = 0.19  # inches per line of text


@styled
def graph(result, title="", names=None):
    """The nodes below ``result``, a Tensor: operations as boxes, leaves as ellipses, and beneath each what it keeps.

    ``names`` {name: Tensor} names leaves. Raises InputError for a result without a graph, or with more than 40 nodes.
    """
    nodes = nodes_of(result)
    if result.node is None or len(nodes) > MOST:
        raise InputError(f"graph: the result has {len(nodes)} nodes; between 1 and {MOST} can be drawn")
    called = {id(tensor.node): name for name, tensor in (names or {}).items()}
    rows = _rows(nodes)
    heights = [0.55 + LINE * max(len(_kept(node)) for node in row) for row in rows]
    figure = new_page(0.45 + sum(heights))
    axes = figure.subplots()
    axes.set(title=title, xlim=(0, 1), ylim=(-sum(heights), 0.1))
    axes.axis("off")
    place, depth, boxes = {}, {}, {}
    for k, row in enumerate(rows):
        for i, node in enumerate(row):
            place[node], depth[node] = ((i + 0.5) / len(row), -0.2 - sum(heights[:k])), k
    for node in nodes:
        _draw(axes, node, place, depth, called, boxes)
    return figure


def _rows(nodes):
    """The nodes by layer, the result's last. A node lies just above the first that uses it, so that edges are short."""
    users, layer = {node: [] for node in nodes}, {}
    for node in nodes:
        for parent in node.parents:
            if parent is not None:
                users[parent].append(node)
    for node in reversed(nodes):  # children before parents
        layer[node] = max((layer[user] + 1 for user in users[node]), default=0)
    rows = [[node for node in nodes if layer[node] == depth] for depth in range(max(layer.values()), -1, -1)]
    for row, above in zip(rows[1:], rows, strict=False):  # each node below the middle of its parents
        at = {node: (i + 0.5) / len(above) for i, node in enumerate(above)}
        middle = {node: fmean([at[parent] for parent in node.parents if parent in at] or [0.5]) for node in row}
        row.sort(key=middle.get)
    return rows


def _kept(node) -> list[str]:
    """A line for each array that the node keeps."""
    return [f"{name} {tuple(array.shape)}" for name, array in arrays_of(node.saved)]


def _draw(axes, node, place, depth, called, boxes):
    """The node, what it keeps beneath it, and an arrow from each of its parents, or two from one that it uses twice.

    ``boxes`` {node: its Text} has the parents, and receives the node.
    """
    x, y = place[node]
    color, shape = (COLOURS[2], "ellipse,pad=0.25") if node.vjp is None else (COLOURS[0], "round,pad=0.3")
    box = {"boxstyle": shape, "facecolor": "white", "edgecolor": color, "linewidth": 1.6}
    name = called.get(id(node), node.name)
    boxes[node] = axes.text(x, y, name, ha="center", va="center", fontsize=10, bbox=box, zorder=3)
    if kept := _kept(node):
        back = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.text(x, y - 0.18, "\n".join(kept), ha="center", va="top", fontsize=8.5, color=GREY, bbox=back, zorder=2)
    for i, parent in enumerate(node.parents):
        if parent is not None:
            before, times = node.parents[:i].count(parent), node.parents.count(parent)
            beside = 0.025 * (before - (times - 1) / 2)
            px, py = place[parent]
            start, end = (px + beside, py - 0.17 - LINE * len(_kept(parent))), (x + beside, y + 0.16)
            arrow = {"arrowstyle": "->", "color": GREY, "linewidth": 1.1}
            within = {}
            if depth[node] - depth[parent] > 1:  # from side to side, around what lies between
                start = end = (-4.0, 0.0)  # points from the middle of the name's left edge: where its box begins
                within = {"xycoords": _left_of(boxes[node]), "textcoords": _left_of(boxes[parent])}
                arrow |= {"connectionstyle": "arc3,rad=0.3", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=1, **within)


def _left_of(text):
    """Coordinates in points from the middle of the left edge of a Text, known once it is drawn."""
    from matplotlib.text import OffsetFrom

    return OffsetFrom(text, (0.0, 0.5), unit="points")
