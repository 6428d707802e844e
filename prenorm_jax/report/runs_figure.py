"""The figure of `compare`: loss curves and, below them, their differences from the reference."""

import math
import statistics
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from prenorm_jax.report.figure import (
    AMBER,
    BLACK,
    BLUE,
    FONT,
    GREEN,
    GREY,
    LIGHT_GREY,
    NARROW,
    ORANGE,
    PINK,
    SKY,
    WIDTH,
    diamonds,
    label,
    new_figure,
    png,
)

NORM_NAMES = {"layernorm": "Pre-LN", "rmsnorm": "Pre-RMSNorm", "crmsnorm": "Pre-CRMSNorm"}

# The reference is wide and light, the others are narrow and broken, so that curves that coincide can all be seen.
REFERENCE_STYLE = {"color": LIGHT_GREY, "linewidth": 5.0}
ALONE_STYLE = {"color": BLUE, "linewidth": 1.4}
COLORS = (ORANGE, BLUE, GREEN, PINK, AMBER, SKY, BLACK)
DASHES = ((4, 2.5), (1, 1.6), (6, 2, 1, 2), (2, 2), (8, 2))
FEW_STEPS = 20  # up to so many losses are also drawn as points

Report = dict[str, Any]  # what report.json holds


def figure(report: Report, width: float = WIDTH) -> bytes:
    """The PNG: loss curves and, below, how far each is from the reference. `width`: in inches, WIDTH or NARROW."""
    names = [row["name"] for row in report["runs"] if row["name"] != report["reference"]]
    styles = {name: _style(index) for index, name in enumerate(names)}
    columns = 1 if width == NARROW or not names else 2
    changes = _changes(report["runs"])
    legend_rows = math.ceil((len(names) + 2) / columns) + len(changes)
    drawing, axes = new_figure([3.2, 2.4] if styles else [3.2], margin=0.7 + 0.19 * legend_rows, width=width)
    _draw_losses(axes[0], report, {report["reference"]: REFERENCE_STYLE if styles else ALONE_STYLE} | styles)
    if styles:
        _draw_differences(axes[1], report, styles)
    axes[-1].xaxis.set_major_locator(MaxNLocator(2 if width == NARROW else "auto", integer=True, steps=[1, 2, 5, 10]))
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    axes[-1].set_xlabel("optimizer step", fontsize=FONT)
    drawing.align_ylabels(axes)
    # What is what stands beside the axes, where it covers no curve.
    look = {"fontsize": FONT, "frameon": False, "borderaxespad": 0.2}
    drawing.legend(loc="outside lower left", ncols=columns, handlelength=3.2, **look)
    if changes:
        numbers = _draw_changes(axes, changes)
        texts = [label(text, 90 if width == WIDTH else 46) for text in changes.values()]
        drawing.legend(numbers, texts, loc="outside upper left", handlelength=1, **look)
    return png(drawing)


def _style(index: int) -> dict[str, Any]:
    """Of the so many-th run that is not the reference: 35 are told apart."""
    dashes = DASHES[(index + index // len(COLORS)) % len(DASHES)]
    return {"color": COLORS[index % len(COLORS)], "linewidth": 1.4 if index else 1.8, "linestyle": (0, dashes)}


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
        text = label(f"{norms[name]} ({name})", 44 - len(role)) + role
        ax.plot(steps, losses, label=text, zorder=2 + index / 100, **style, **points)
        evals = _columns(report["curves"][name]["eval_loss"])
        ax.plot(*evals, **diamonds(style["color"], max(9 - 2.5 * index, 3), len(evals[0])))
        every.append([loss for loss in losses if math.isfinite(loss)] or [1.0])
    if any(report["curves"][name]["eval_loss"] for name in styles):
        ax.plot([], [], label="evaluation loss", **diamonds(GREY, 6, 1))
    if min(map(min, every)) > 0 and max(map(max, every)) > 10 * min(map(max, every)):
        ax.set_yscale("log")  # a linear axis would flatten the other runs
    ax.set_ylabel(f"training loss\n(nats per {report['unit']})", fontsize=FONT)


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


def _changes(rows: list[Report]) -> dict[int, str]:
    """Step -> which runs went on from it with another norm or settings, or left out its update, as their first."""
    found: dict[int, list[str]] = {}
    for row in rows:
        steps: dict[int, list[str]] = {}
        for switch in row["switches"]:
            steps.setdefault(switch["step"], []).append(NORM_NAMES.get(switch["to"], switch["to"]))
        for change in row["changes"]:
            steps.setdefault(change["step"], []).append(f"{change['key']} {change['to']}")
        if row["skipped_updates"]:
            steps.setdefault(row["first_skipped_step"], []).append("first update left out")
        for step, what in steps.items():
            found.setdefault(step, []).append(f"{row['name']}: {', '.join(what)}")
    return {step: f"step {step:,}, {'; '.join(found[step])}" for step in sorted(found)}


def _draw_changes(axes: list[Axes], changes: dict[int, str]) -> list[Artist]:
    """A numbered line at each; the numbers, for a legend."""
    look = {"color": "#333333", "linestyle": ""}
    for number, step in enumerate(changes, 1):
        for ax in axes:
            ax.axvline(step, color=GREY, linewidth=0.9, zorder=1.5)
        # Every other one is a line higher: neighbours would overlap.
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        place |= {"ha": "center", "va": "bottom", "fontsize": FONT - 1}
        axes[0].annotate(f"{number}" + "\n" * (number % 2 == 0), (step, 1), (0, 2), color=look["color"], **place)
    return [Line2D([], [], marker=f"${number}$", markersize=5, **look) for number in range(1, len(changes) + 1)]


def _columns(pairs: list[list[Any]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [math.nan if value is None else value for _, value in pairs]
