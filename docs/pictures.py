"""The picture of a method: the arrays of one layer, trained or frozen, and what its forward pass keeps for backward.

Everything in it comes from the method's file. ``python docs/tables.py`` draws the pictures anew.
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.patches import Patch, Rectangle
from PIL import Image

from minilora.plots import COLOURS, new_figure

WORDS = {
    "frozen": "frozen",
    "trained": "trained",
    "moved": "moved by the method's own rule",
    "kept": "kept for backward",
    "computed": "computed, not kept",
}
FILL = {"frozen": "#cfcfcf", "trained": COLOURS[0], "moved": COLOURS[4], "kept": COLOURS[2], "computed": "white"}
SIZE = {"d_in": 2.4, "d_out": 1.9, "r": 0.62, "N": 1.4, "1": 0.3}  # drawn lengths of the axes
OTHER, VECTOR = 1.2, 0.3  # that of any other axis, and the width of a vector
WIDTH = 11.4
LETTER = 0.1  # the width of a small letter below a box


@dataclass(frozen=True)
class Array:
    """A matrix or a vector as drawn: its name, its shape in letters, its state (one of WORDS), one for all layers?"""

    name: str
    shape: tuple
    state: str
    shared: bool = False

    @property
    def letters(self) -> str:
        """The shape as it is written: (r, d_in), or (r,)."""
        return f"({', '.join(self.shape)}{',' if len(self.shape) == 1 else ''})"

    @property
    def box(self) -> tuple[float, float]:
        """(width, height) as drawn."""
        height, *width = [SIZE.get(axis.removeprefix("max "), OTHER) for axis in self.shape] or [VECTOR]
        return (width[0] if width else VECTOR), height


def description(name: str, layer: list[Array], forward: list[Array]) -> str:
    """All that the picture says. The file carries it, so that a test can compare it with the method's file."""
    return ascii((name, layer, forward))


def described(path: Path) -> str | None:
    """The description in the picture at ``path``; None if there is no picture."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get("Description")


def write(path: Path, name: str, layer: list[Array], forward: list[Array]):
    """Draw the picture of the method ``name`` into the file ``path``."""
    figure = new_figure(7.4, 4.1)
    axes = figure.subplots()
    axes.axis("off")
    axes.text(0, 3.15, name, fontsize=11.5, fontweight="bold", va="center")
    right = max(WIDTH, draw_row(axes, "layer:", layer, 1.6), draw_row(axes, "forward:", forward, -1.15))
    axes.set(xlim=(-0.1, right), ylim=(-2.85, 3.4), aspect="equal")
    drawn = {array.state for array in layer + forward}
    patches = [Patch(facecolor=FILL[s], edgecolor="#333333", label=WORDS[s]) for s in WORDS if s in drawn]
    close = {"columnspacing": 1.2, "handlelength": 1.3, "handletextpad": 0.5, "borderaxespad": 0.0}
    axes.legend(handles=patches, loc="lower center", ncols=len(patches), fontsize=10, frameon=False, **close)
    metadata = {"Software": None, "Description": description(name, layer, forward)}
    figure.savefig(path, dpi=150, metadata=metadata)


def draw_row(axes, title: str, arrays: list[Array], middle: float) -> float:
    """``title`` and a box for each array, centred on the height ``middle``, from left to right; returns the end."""
    axes.text(0, middle, title, ha="left", va="center", fontsize=12)
    left = 1.7
    for array in arrays:
        width, height = array.box
        below = f"{array.letters}\nshared" if array.shared else array.letters
        room = max(width, LETTER * len(array.letters))
        centre, left = left + room / 2, left + room + 0.3
        corner, dashes = (centre - width / 2, middle - height / 2), "--" if array.state == "computed" else "-"
        style = {"facecolor": FILL[array.state], "edgecolor": "#333333", "linestyle": dashes}
        axes.add_patch(Rectangle(corner, width, height, **style))
        fits = len(array.name) * 0.17 <= width
        above = middle if fits else middle + height / 2 + 0.16
        colour = "white" if fits and array.state in ("trained", "kept") else "black"
        axes.text(centre, above, array.name, ha="center", va="center", fontsize=12, fontstyle="italic", color=colour)
        axes.text(centre, middle - height / 2 - 0.1, below, ha="center", va="top", fontsize=9)
    return left
