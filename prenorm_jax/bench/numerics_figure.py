"""The figures of `numerics`: errors relative to Pre-LN's, the stream at each norm, and streams that are made up."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prenorm_jax.report.figure import (
    AMBER,
    BLACK,
    BLUE,
    FONT,
    GREY,
    LIGHT_GREY,
    NARROW,
    ORANGE,
    PINK,
    SKY,
    WIDTH,
    new_figure,
    new_row,
    png,
)

Report = dict[str, Any]

QUANTITIES = {"logits": (BLUE, "o", 0.14), "gradients": (ORANGE, "D", -0.14)}  # colour, marker, place in its row
PLACE_STYLES = {  # kind, whether p is a large channel: colour, marker, size
    ("drop", False): (ORANGE, "o", 4),
    ("reflect", False): (BLUE, "o", 4),
    ("drop", True): (AMBER, "D", 6),
    ("reflect", True): (SKY, "D", 6),
}
STYLES = {  # of the variants on a stream with a mean: those that coincide are told apart by their dashes and markers
    "layernorm one-pass": {"color": ORANGE, "marker": "s", "markersize": 6},
    "layernorm": {"color": BLACK, "marker": "o", "markersize": 3},
    "rmsnorm": {"color": LIGHT_GREY, "linewidth": 5.0},
    "crmsnorm drop": {"color": PINK, "linestyle": (0, (4, 2.5)), "linewidth": 1.8},
    "crmsnorm reflect": {"color": BLUE, "linestyle": (0, (1, 1.6)), "linewidth": 1.8},
}
_LEGEND = {"fontsize": FONT, "frameon": False, "borderaxespad": 0.2}


def error_figure(report: Report, width: float = WIDTH) -> bytes:
    """The PNG: each variant's error relative to that of Pre-LN in the same dtype, computed, a panel for each dtype."""
    names = report["variants"]
    rows = {(row["dtype"], row["variant"]): row for row in report["errors"] if row["how"] == "computed"}
    drawing, axes = _panels(len(report["dtypes"]), 0.26 * len(names), width, grid="x")
    for ax, dtype in zip(axes, report["dtypes"], strict=True):
        ax.axvline(1, color=LIGHT_GREY, linewidth=0.9, zorder=0)
        for place, name in enumerate(reversed(names)):
            for quantity, (color, marker, shift) in QUANTITIES.items():
                row = rows[dtype, name]
                ratio, label = row[f"{quantity}_ratio"], quantity if place == 0 else None
                if ratio is not None:
                    look = {"color": color, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
                    ax.plot(ratio, place + shift, marker, label=label, **look)
                elif row[quantity] is None:
                    ax.plot([], [], marker, label=label, color=color, markersize=5)
                    where = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": FONT - 2}
                    ax.text(0.02, place + shift, f"{quantity} not finite", color=color, **where)
        ax.set_yticks(range(len(names)), list(reversed(names)), fontsize=FONT)
        ax.set_ylim(-0.6, len(names) - 0.4)
        ax.set_title(dtype, fontsize=FONT, loc="left")
    ratios = [row[f"{quantity}_ratio"] for row in rows.values() for quantity in QUANTITIES]
    _ratio_axis(axes, [ratio for ratio in ratios if ratio is not None])
    _label_x(axes, "error relative to layernorm's", width)
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, **_LEGEND)
    return png(drawing)


def _panels(count: int, height: float, width: float, grid: str = "both") -> tuple[Figure, list[Axes]]:
    """Beside each other; where the page is narrow, above each other."""
    if width == NARROW:
        return new_figure([height] * count, margin=0.9 + 0.22 * count, grid=grid, width=width)
    return new_row(count, height + 1.1, grid=grid, width=width)


def _label_x(axes: list[Axes], text: str, width: float) -> None:
    """One label: under the middle of panels beside each other, or the last of those above each other."""
    axes[-1 if width == NARROW else len(axes) // 2].set_xlabel(text, fontsize=FONT)


def _ratio_axis(axes: list[Axes], ratios: list[float]) -> None:
    """A log axis with plain numbers around 1, which no wide range squeezes to one line."""
    low, high = min([0.8, *ratios]) / 1.1, max([1.6, *ratios]) * 1.15
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        _plain_ticks(ax, "x", low, high)


def _plain_ticks(ax: Axes, axis: str, low: float, high: float) -> None:
    steps = (1, 2, 5) if high / low < 200 else (1,)
    if high / low < 4:
        steps = (1, 1.5, 2, 3, 5, 7)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    getattr(ax, f"set_{axis}ticks")(ticks, [f"{tick:g}" for tick in ticks], fontsize=FONT)
    ax.minorticks_off()


def stream_figure(report: Report, width: float = WIDTH) -> bytes:
    """The PNG: of the stream at each norm how large the mean is, and the largest channel."""
    sites = report["sites"]
    drawing, (above, below) = new_figure([1.5, 1.5], margin=0.9, width=width)
    places = range(1, len(sites) + 1)
    for key, style in {"largest": "o-", "median": "s--"}.items():
        values = [site["mean_over_std"][key] for site in sites]
        label = "largest over tokens" if key == "largest" else "median"
        above.plot(places, values, style, color=BLUE if key == "largest" else GREY, markersize=4, label=label)
    above.set_ylim(bottom=0)
    above.set_ylabel("|mean| / std", fontsize=FONT)
    above.legend(**_LEGEND)
    ratios = [site["channels"][0]["over_median"] for site in sites]
    below.plot(places, ratios, "o-", color=ORANGE, markersize=4)
    below.set_yscale("log")
    low, high = 0.9, max([2.0, *ratios]) * 1.15
    below.set_ylim(low, high)
    _plain_ticks(below, "y", low, high)
    below.set_ylabel("largest channel\nover the median", fontsize=FONT)
    below.set_xlabel("norm, from the first block's to the final one", fontsize=FONT)
    below.xaxis.get_major_locator().set_params(integer=True)
    drawing.align_ylabels([above, below])
    return png(drawing)


def mean_figure(report: Report, width: float = WIDTH) -> bytes:
    """The PNG: the error of each norm by the mean of its stream, a panel for each dtype."""
    drawing, axes = _panels(len(report["dtypes"]), 2.1, width)
    for ax, dtype in zip(axes, report["dtypes"], strict=True):
        for name, style in STYLES.items():
            rows = [row for row in report["means"] if (row["dtype"], row["variant"]) == (dtype, name)]
            finite = [math.nan if row["error"] is None else row["error"] for row in rows]
            ax.plot([row["mean"] for row in rows], finite, label=name, **({"linewidth": 1.4} | style))
        ax.set_xscale("symlog", linthresh=0.1, linscale=0.6)
        ax.set_xticks([0, 0.1, 1, 10, 100, 1000], ["0", ".1", "1", "10", "100", "1000"], fontsize=FONT)
        ax.set_yscale("log")
        ax.minorticks_off()
        ax.set_title(dtype, fontsize=FONT, loc="left")
    for ax in axes if width == NARROW else axes[:1]:
        ax.set_ylabel("relative error", fontsize=FONT)
    _label_x(axes, "mean of the stream, in multiples of its spread", width)
    columns, (handles, names) = 2 if width == NARROW else 3, axes[0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower left", ncols=columns, handlelength=2.2, **_LEGEND)
    return png(drawing)


def outlier_figure(report: Report, width: float = WIDTH) -> bytes:
    """The PNG: crmsnorm's error relative to rmsnorm's, as measured, by the law's figure, for each kind and entry."""
    factors = [row[key] for row in report["outliers"] for key in ("measured", "predicted")]
    low, high = min(0.9, *factors) / 1.1, max(2.0, *factors) * 1.2
    drawing, axes = _panels(len(report["dtypes"]), 2.1, width)
    for ax, dtype in zip(axes, report["dtypes"], strict=True):
        ax.plot([low, high], [low, high], color=GREY, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
        for (kind, large), (color, marker, size) in PLACE_STYLES.items():
            rows = [row for row in report["outliers"] if row["dtype"] == dtype]
            rows = [row for row in rows if (row["kind"], row["large"]) == (kind, large)]
            label = f"{kind}, p {'a large channel' if large else 'any other'}"
            look = {"color": color, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.4}
            ax.plot(*_columns(rows, "predicted", "measured"), marker, label=label, **look)
        for axis in ("x", "y"):
            getattr(ax, f"set_{axis}scale")("log")
            getattr(ax, f"set_{axis}lim")(low, high)
            _plain_ticks(ax, axis, low, high)
        ax.set_title(dtype, fontsize=FONT, loc="left")
    for ax in axes if width == NARROW else axes[:1]:
        ax.set_ylabel("measured", fontsize=FONT)
    _label_x(axes, "error relative to rmsnorm's, by the law", width)
    handles, names = axes[0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower left", ncols=2, **_LEGEND)
    return png(drawing)


def _columns(rows: list[Report], *keys: str) -> list[list[float]]:
    return [[row[key] for row in rows] for key in keys]
