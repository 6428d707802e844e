"""The figure of `compare`: loss curves and, below them, their differences from the reference."""

from __future__ import annotations

import io
import math
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NORM_NAMES = {"layernorm": "Pre-LN", "rmsnorm": "Pre-RMSNorm", "crmsnorm": "Pre-CRMSNorm"}


# Colours that colour-blind readers tell apart (Okabe and Ito). The reference is wide and light, the others
# are narrow and broken, so that curves that coincide can all be seen.
REFERENCE_STYLE = {"color": "#C4C4C4", "linewidth": 5.0}


STYLES = (
    {"color": "#D55E00", "linewidth": 1.8, "linestyle": (0, (4, 2.5))},
    {"color": "#0072B2", "linewidth": 1.4, "linestyle": (0, (1, 1.6))},
    {"color": "#009E73", "linewidth": 1.4, "linestyle": (0, (6, 2, 1, 2))},
    {"color": "#CC79A7", "linewidth": 1.4, "linestyle": (0, (2, 2))},
)


FONT, GREY, DPI = 9, "#666666", 200  # the page shows the PNG at half its resolution: sharp on dense displays


FEW_STEPS = 20  # up to so many losses are also drawn as points


Report = dict[str, Any]  # what report.json holds


def figure(report: Report) -> bytes:
    """The PNG: loss curves and, below, how far each is from the reference."""
    names = [row["name"] for row in report["runs"] if row["name"] != report["reference"]]
    styles = {name: STYLES[index % len(STYLES)] for index, name in enumerate(names)}
    heights = [3.2, 2.4] if styles else [3.2]
    base_style = REFERENCE_STYLE if styles else {"color": "#0072B2", "linewidth": 1.4}
    drawing = Figure(figsize=(7.2, sum(heights) + 0.5), dpi=DPI, facecolor="white", layout="constrained")
    axes = drawing.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax in axes:
        ax.tick_params(labelsize=FONT, color=GREY)
        ax.grid(color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    _draw_losses(axes[0], report, {report["reference"]: base_style} | styles)
    if styles:
        _draw_differences(axes[1], report, styles)
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes[-1].set_xlabel("optimizer step", fontsize=FONT)
    _draw_switches(list(axes), report["runs"])
    drawing.align_ylabels(axes)
    file = io.BytesIO()
    FigureCanvasAgg(drawing).print_png(file)
    return file.getvalue()


def _draw_losses(ax: Axes, report: Report, styles: dict[str, Report]) -> None:
    norms = {
        row["name"]: "norm switched" if row["switches"] else NORM_NAMES.get(row["norm"], row["norm"])
        for row in report["runs"]
    }
    every = []
    for index, (name, style) in enumerate(styles.items()):
        steps, losses = _columns(report["curves"][name]["loss"])
        points = {"marker": "o", "markersize": style["linewidth"] + 1} if len(steps) <= FEW_STEPS else {}
        role = ", the reference" if index == 0 and len(styles) > 1 else ""
        label = _label(f"{norms[name]} ({name})") + role
        ax.plot(steps, losses, label=label, zorder=2 + index / 100, **style, **points)
        eval_points = _columns(report["curves"][name]["eval_loss"])
        ax.plot(*eval_points, **_markers(style, max(9 - 2.5 * index, 3), len(eval_points[0])))
        every.append([loss for loss in losses if math.isfinite(loss)] or [1.0])
    if any(report["curves"][name]["eval_loss"] for name in styles):
        ax.plot([], [], label="evaluation loss", **_markers({"color": GREY}, 6, 1))
    if min(map(min, every)) > 0 and max(map(max, every)) > 10 * min(map(max, every)):
        ax.set_yscale("log")  # a linear axis would flatten the other runs
    ax.set_ylabel(f"training loss\n(nats per {report['unit']})", fontsize=FONT)
    ax.legend(fontsize=FONT, edgecolor="none", framealpha=0.85, handlelength=3.2)


def _draw_differences(ax: Axes, report: Report, styles: dict[str, Report]) -> None:
    curves = {name: _columns(report["curves"][name]["delta_loss"]) for name in styles}
    evals = {name: _columns(report["curves"][name]["delta_eval_loss"]) for name in styles}
    sizes = [abs(delta) for _, deltas in [*curves.values(), *evals.values()] for delta in deltas]
    lowest = math.floor(math.log10(min(filter(None, sizes), default=1e-7)))
    highest = max(math.log10(max(sizes, default=0) or 1e-7), lowest + 1)
    # Zero has no place on a log axis: there a curve has a gap, and a tick in its run's row below the axis.
    step = (highest - lowest) / 16
    rows = {name: 10 ** (lowest - step * (1.5 + index)) for index, name in enumerate(styles)}
    ends = {}
    for name, style in styles.items():
        steps, deltas = curves[name]
        values = [abs(delta) or math.nan for delta in deltas]
        ax.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.85, marker=".", markersize=2)
        zeros = [step for step, delta in zip(steps, deltas, strict=True) if delta == 0]
        ticks = {"linestyle": "", "marker": "|", "markersize": 5, "color": style["color"]}
        ax.plot(zeros, [rows[name]] * len(zeros), **ticks)
        eval_steps, eval_deltas = evals[name]
        eval_values = [abs(delta) or rows[name] for delta in eval_deltas]
        ax.plot(eval_steps, eval_values, **_markers(style, 5, len(eval_steps)))
        last = [value for value in values[-20:] if value > 0]
        if values:
            ends[name] = math.log10(statistics.median(last) if last else rows[name])
    bottom = lowest - step * (1 + len(styles)) if 0 in sizes else lowest
    ax.set_yscale("log")
    ax.set_ylim(10 ** (bottom - step / 4), 10 ** (highest + step / 2))
    decades = range(lowest, math.floor(highest) + 1, 1 + int(highest - lowest) // 8) if any(sizes) else ()
    ticks = {10.0**decade: f"$10^{{{decade}}}$" for decade in decades}
    if 0 in sizes:
        ax.axhline(10 ** (lowest - step * 0.75), color=GREY, linewidth=0.8)
        ticks[10 ** (lowest - step * (1 + len(styles) / 2))] = "exactly 0"
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()
    if sizes and not any(sizes):
        note = {"transform": ax.transAxes, "ha": "center", "color": GREY, "fontsize": FONT}
        ax.text(0.5, 0.5, "no difference at any common step", **note)
    # The names at the right end, in the order of the curves and far enough apart to be read.
    position = -math.inf
    for name in sorted(ends, key=ends.__getitem__):
        position = max(ends[name], position + 2 * step)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        text = _label(name, 16)
        ax.annotate(text, (1, 10**position), (4, 0), color=styles[name]["color"], fontsize=FONT, **place)
    ax.set_ylabel(f"|loss − loss of {_label(report['reference'], 16)}|\n(nats per {report['unit']})", fontsize=FONT)


def _markers(style: Report, size: float, count: int) -> Report:
    size = max(size * min(1, (16 / max(count, 1)) ** 0.5), 3)  # many large ones would hide the curves
    look = {"color": style["color"], "markeredgecolor": "white", "markeredgewidth": 0.6}
    return look | {"linestyle": "", "marker": "D", "markersize": size, "zorder": 4}


def _draw_switches(axes: list[Axes], rows: list[Report]) -> None:
    """A line where a run went on with another norm; runs that switch at the same step share it."""
    labels: dict[int, list[str]] = {}
    for row in rows:
        for switch in row["switches"]:
            norm = NORM_NAMES.get(switch["to"], switch["to"])
            labels.setdefault(switch["step"], []).append(_label(f"{row['name']} → {norm}"))
    for index, step in enumerate(sorted(labels)):
        for ax in axes:
            ax.axvline(step, color=GREY, linewidth=0.9, zorder=1.5)
        # Every other one is a line higher: neighbours would overlap.
        text = "\n".join(labels[step] + [""] * (index % 2))
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        look = {"ha": "center", "va": "bottom", "fontsize": FONT - 1, "color": "#333333"}
        axes[0].annotate(text, (step, 1), (0, 2), **place, **look)


def _columns(pairs: list[list[Any]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [math.nan if value is None else value for _, value in pairs]


def _label(text: str, length: int = 44) -> str:
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")  # or matplotlib reads it as mathematics
