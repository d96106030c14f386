"""Every figure of the project, in one style: colour-blind safe, readable at half size, on white for dark pages too.

matplotlib is imported here alone, and only when a figure is drawn. Each function returns a matplotlib Figure.
"""

# ruff: noqa: F401  (the names that the package offers)

from .drawing import graph
from .lessons import (
    attention,
    bars,
    gradient_report,
    heat_map,
    lines,
    loss_curves,
    scatter,
    singular_values,
    stacked_bars,
)
from .style import COLOURS, DASHES, MARKERS, STYLE, Shown, look, new_figure, png, show
