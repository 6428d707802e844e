"""The common look of figures: size, type, colours, and how they become a PNG. No window is opened (no pyplot)."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH, NARROW, DPI = 7.2, 3.6, 200  # inches; pages show a PNG at half its resolution: sharp on dense displays
FONT = 9  # points

# Colours that colour-blind readers tell apart (Okabe and Ito).
ORANGE, BLUE, GREEN, PINK = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#222222"
GREY, LIGHT_GREY, GRID = "#666666", "#C4C4C4", "#e6e6e6"


def new_figure(
    heights: Sequence[float], margin: float, grid: str = "both", width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    """A figure of axes above each other, of these heights in inches and with one x axis. `grid`: both, x or y."""
    drawing = _new(width, sum(heights) + margin)
    axes = drawing.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    return drawing, _dressed(axes, grid)


def new_row(count: int, height: float, grid: str = "both", width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of this height in inches, of so many axes beside each other with one y axis."""
    drawing = _new(width, height)
    return drawing, _dressed(drawing.subplots(1, count, sharey=True, squeeze=False)[0], grid)


def _new(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def _dressed(axes: Iterable[Axes], grid: str) -> list[Axes]:
    axes = list(axes)
    for ax in axes:
        ax.tick_params(labelsize=FONT, color=GREY)
        ax.grid(axis=grid, color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def png(drawing: Figure) -> bytes:
    """The figure as a file's content."""
    file = io.BytesIO()
    FigureCanvasAgg(drawing).print_png(file)
    return file.getvalue()


def label(text: str, length: int = 44) -> str:
    """The text, cut to so many characters, for matplotlib, which reads what is between dollars as mathematics."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def diamonds(color: str, size: float, count: int) -> dict[str, Any]:
    """How so many single values on a curve are drawn: smaller where they are many, or they would hide it."""
    size = max(size * min(1, (16 / max(count, 1)) ** 0.5), 3)
    look = {"color": color, "markeredgecolor": "white", "markeredgewidth": 0.6}
    return look | {"linestyle": "", "marker": "D", "markersize": size, "zorder": 4}
