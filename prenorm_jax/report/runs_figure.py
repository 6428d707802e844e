"""The figure of `compare`: loss curves and, below them, their differences from the reference."""

import math
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from prenorm_jax.report.figure import (
    BLUE,
    FONT,
    GREEN,
    GREY,
    LIGHT_GREY,
    ORANGE,
    PINK,
    diamonds,
    label,
    new_figure,
    png,
)

NORM_NAMES = {"layernorm": "Pre-LN", "rmsnorm": "Pre-RMSNorm", "crmsnorm": "Pre-CRMSNorm"}

# The reference is wide and light, the others are narrow and broken, so that curves that coincide can all be seen.
REFERENCE_STYLE = {"color": LIGHT_GREY, "linewidth": 5.0}
ALONE_STYLE = {"color": BLUE, "linewidth": 1.4}
STYLES = (
    {"color": ORANGE, "linewidth": 1.8, "linestyle": (0, (4, 2.5))},
    {"color": BLUE, "linewidth": 1.4, "linestyle": (0, (1, 1.6))},
    {"color": GREEN, "linewidth": 1.4, "linestyle": (0, (6, 2, 1, 2))},
    {"color": PINK, "linewidth": 1.4, "linestyle": (0, (2, 2))},
)
FEW_STEPS = 20  # up to so many losses are also drawn as points

Report = dict[str, Any]  # what report.json holds


def figure(report: Report) -> bytes:
    """The PNG: loss curves and, below, how far each is from the reference."""
    names = [row["name"] for row in report["runs"] if row["name"] != report["reference"]]
    styles = {name: STYLES[index % len(STYLES)] for index, name in enumerate(names)}
    drawing, axes = new_figure([3.2, 2.4] if styles else [3.2], margin=0.5)
    _draw_losses(axes[0], report, {report["reference"]: REFERENCE_STYLE if styles else ALONE_STYLE} | styles)
    if styles:
        _draw_differences(axes[1], report, styles)
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes[-1].set_xlabel("optimizer step", fontsize=FONT)
    _draw_switches(axes, report["runs"])
    drawing.align_ylabels(axes)
    return png(drawing)


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
        text = label(f"{norms[name]} ({name})") + role
        ax.plot(steps, losses, label=text, zorder=2 + index / 100, **style, **points)
        evals = _columns(report["curves"][name]["eval_loss"])
        ax.plot(*evals, **diamonds(style["color"], max(9 - 2.5 * index, 3), len(evals[0])))
        every.append([loss for loss in losses if math.isfinite(loss)] or [1.0])
    if any(report["curves"][name]["eval_loss"] for name in styles):
        ax.plot([], [], label="evaluation loss", **diamonds(GREY, 6, 1))
    if min(map(min, every)) > 0 and max(map(max, every)) > 10 * min(map(max, every)):
        ax.set_yscale("log")  # a linear axis would flatten the other runs
    ax.set_ylabel(f"training loss\n(nats per {report['unit']})", fontsize=FONT)
    ax.legend(fontsize=FONT, edgecolor="none", framealpha=0.85, handlelength=3.2)


def _draw_differences(ax: Axes, report: Report, styles: dict[str, Report]) -> None:
    curves = {name: _columns(report["curves"][name]["delta_loss"]) for name in styles}
    evals = {name: _columns(report["curves"][name]["delta_eval_loss"]) for name in styles}
    sizes = [abs(delta) for _, deltas in [*curves.values(), *evals.values()] for delta in deltas]
    lowest = math.floor(math.log10(min(filter(None, sizes), default=1e-7)))  # heights are powers of ten
    highest = max(math.log10(max(sizes, default=0) or 1e-7), lowest + 1)
    # Zero has no place on a log axis: there a curve has a gap, and a tick in its run's row below the axis.
    step = (highest - lowest) / 16
    rows = {name: 10 ** (lowest - step * (1.5 + index)) for index, name in enumerate(styles)}
    ends = {}
    for name, style in styles.items():
        color, (steps, deltas), (eval_steps, eval_deltas) = style["color"], curves[name], evals[name]
        values = [abs(delta) or math.nan for delta in deltas]
        ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.85, marker=".", markersize=2)
        zeros = [step for step, delta in zip(steps, deltas, strict=True) if delta == 0]
        ax.plot(zeros, [rows[name]] * len(zeros), linestyle="", marker="|", markersize=5, color=color)
        ax.plot(eval_steps, [abs(delta) or rows[name] for delta in eval_deltas], **diamonds(color, 5, len(eval_steps)))
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
    for name, height in _apart(ends, 2 * step, highest).items():
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        ax.annotate(label(name, 16), (1, 10**height), (4, 0), color=styles[name]["color"], fontsize=FONT, **place)
    ax.set_ylabel(f"|loss − loss of {label(report['reference'], 16)}|\n(nats per {report['unit']})", fontsize=FONT)


def _apart(heights: dict[str, float], gap: float, ceiling: float) -> dict[str, float]:
    """Heights for names in the order of these, so far apart that all can be read, and none above the ceiling."""
    placed, names, floor = {}, sorted(heights, key=heights.__getitem__), -math.inf
    for name in names:
        floor = placed[name] = max(heights[name], floor + gap)
    for name in reversed(names):
        placed[name] = min(placed[name], ceiling)
        ceiling = placed[name] - gap
    return placed


def _draw_switches(axes: list[Axes], rows: list[Report]) -> None:
    """A line where a run went on with another norm; runs that switch at the same step share it."""
    labels: dict[int, list[str]] = {}
    for row in rows:
        for switch in row["switches"]:
            norm = NORM_NAMES.get(switch["to"], switch["to"])
            labels.setdefault(switch["step"], []).append(label(f"{row['name']} → {norm}"))
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
