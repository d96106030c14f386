"""The house style, and what every figure is made with: colours, an empty Figure, and its bytes.

It is apart from the figures so that all of them, those of benchmarks too, look alike.
"""

import io
from dataclasses import dataclass
from functools import wraps

import numpy as np

from ..backend import to_host
from ..errors import InputError

# Okabe & Ito 2008, the colour-blind safe palette, then the same colours with dashes once they run out.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", "-.", ":"]
MARKERS = "osD^v<>dphXP"  # no star, which is the best rate of a sweep
GREY = "#444444"
WIDTH = 7.2  # inches of a notebook's figure; at 110 dots per inch a little below 800 pixels

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
    """Colour and line style of the i-th method; distinct for the first 28."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def styled(draw):
    """``draw``, a function that makes a figure, within the house style."""

    @wraps(draw)
    def drawn(*args, **options):
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **options)

    return drawn


@styled
def new_figure(width, height, **grid):
    """An empty Figure in the house style; no window and no pyplot state, so it works in a server and a thread."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", **grid)


def new_page(height):
    """An empty Figure of a notebook's width, with a margin, so that nothing touches the edge of a dark page."""
    figure = new_figure(WIDTH, height)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    return figure


def png(figure, dpi=150) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class Shown:
    """A figure as a notebook shows it: a PNG of at most 800 pixels' width, and its alt text."""

    figure: object
    alt: str

    def _repr_png_(self):
        return png(self.figure, dpi=110), {"alt": self.alt}


def show(figure, alt: str) -> Shown:
    """``figure`` for the last line of a notebook's cell; ``alt`` says in a sentence what is to be seen in it."""
    if not alt.strip():
        raise InputError("show: alt is empty; say in a sentence what is to be seen")
    return Shown(figure, alt)


def name_rows(axes, names):
    """The names of horizontal bars at the left, the first on top."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)


def write_end(axes, end, i, text, gap=5, **style):
    """``text`` behind the i-th of horizontal bars, which ends at ``end``; ``gap`` in points."""
    axes.annotate(text, (end, i), xytext=(gap, 0), textcoords="offset points", va="center", fontsize=10, **style)


def on_host(values) -> np.ndarray:
    """Numbers, or an array of any device, as a NumPy array."""
    return to_host(values) if hasattr(values, "dtype") else np.asarray(values, dtype=float)
