"""The table, the JSON file and the picture of `benchmark`."""

from pathlib import Path
from typing import Any

from prenorm_jax.base.files import json_bytes, write_results
from prenorm_jax.bench.contenders import BASELINES, BOUND
from prenorm_jax.bench.tasks import TASKS
from prenorm_jax.report.figure import BLUE, FONT, GREY, LIGHT_GREY, ORANGE, new_figure, png
from prenorm_jax.report.table import Rows, to_markdown

Report = dict[str, Any]

LEAST_ROUNDS = 10  # for a verdict: of fewer, resampled, an interval is too narrow; of one it has no width at all


def table(report: Report) -> str:
    """Markdown, with what it shows in words below it."""
    title = f"{_setting(report)}, {TASKS[report['task']]}"
    if "topology" in report:
        rows = _cycle_rows(report)
        devices = "one of its devices" if report["devices"] == 1 else f"{report['devices']} devices, batch per device"
        title += f", for {report['topology']} ({devices}): the compiler's model"
    else:
        rows = _time_rows(report)
        title += f"{_in_a_row(report)}, {report['rounds']} rounds on {report['device']}"
    versions = f"{report['date']}, jax {report['jax']}"
    if "matmul_peak_gflops" in report:
        versions += (
            f"; peak: {report['matmul_peak_gflops']:.0f} GFLOP/s, measured on 2048 × 2048 matrices; "
            f"{report['model_gflop']:.0f} GFLOP of matrix products in the task"
        )
    return "\n".join([title, versions, "", to_markdown(rows), "", *_words(report)])


def _in_a_row(report: Report) -> str:
    return f", {report['in_a_row']} in a row" if report.get("in_a_row", 1) > 1 else ""


def _setting(report: Report) -> str:
    model = report["model"] + (f" with {report['depth']} blocks" if report["depth"] else "")
    size = f"batch {report['batch']}" + (f" × {report['length']}" if report["length"] else "")
    return f"{model}, {size}, {report['dtype']}"


def _time_rows(report: Report) -> Rows:
    head = ["", "median ms", "quartiles", "ratio by rounds [95 %]", "undisturbed ratio [95 %]"]
    head += ["share of the way [95 %]", f"{report['unit']}s/s", "of peak"]
    rows = [[*head, "temporaries MiB", "compiled MiB", "process MiB"]]
    for name, row in report["contenders"].items():
        low, median, high = row["quartiles_ms"]
        cells = [_name(name, report), f"{median:.1f}", f"{low:.1f}–{high:.1f}"]
        cells += [
            _with_interval(row, "ratio", 3),
            _with_interval(row, "quiet_ratio", 3),
            _with_interval(row, "share", 2),
        ]
        cells += [f"{row['units_per_s']:,.0f}", _known(row["flops_share_of_peak"], ".0%")]
        rows.append([*cells, *(_known(row[f"{which}_mib"], ".0f") for which in ("temporaries", "compiled", "process"))])
    return rows


def _cycle_rows(report: Report) -> Rows:
    rows = [["", "estimated cycles", "ratio", "temporaries MiB"]]
    for name, row in report["contenders"].items():
        cells = [f"{row['cycles']:,}", f"{row['ratio']:.4f}", f"{row['temporaries_mib']:.0f}"]
        rows.append([_name(name, report), *cells])
    return rows


def _name(name: str, report: Report) -> str:
    return name + (" (baseline)" if name == report["baseline"] else "")


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_interval(row: Report, key: str, digits: int) -> str:
    interval = row[f"{key.removesuffix('_ratio')}_interval"]
    if row[key] is None:
        return ""
    return f"{row[key]:.{digits}f} [{', '.join(f'{value:.{digits}f}' for value in interval)}]"


def _words(report: Report) -> list[str]:
    if "topology" in report or report["task"] == "h":
        return []
    if report["rounds"] < LEAST_ROUNDS:
        return [f"No verdict: it needs {LEAST_ROUNDS} rounds at least, not {report['rounds']}. More rounds."]
    if report["baseline"] not in BASELINES:
        return [f"No verdict: it needs a LayerNorm among the contenders: {', '.join(BASELINES)}."]
    bound = report["contenders"].get(BOUND)
    if bound is None:
        return ["No verdict: `none`, the bound, is not among the contenders."]
    cost, low, high = 1 - bound["quiet_ratio"], *(1 - value for value in reversed(bound["quiet_interval"]))
    if low <= 0:
        return [
            f"No verdict: the norms of {report['baseline']} cost {cost:.1%} [{low:.1%}, {high:.1%}] of its time, which "
            "is not more than the noise. More rounds, or a quieter machine."
        ]
    words = [f"The norms of {report['baseline']} cost {cost:.1%} [{low:.1%}, {high:.1%}] of its time."]
    for name, row in report["contenders"].items():
        if name.split("-")[0] in ("rmsnorm", "crmsnorm"):
            low, high = row["share_interval"]
            verdict = "at least .9 of it" if low >= 0.9 else "less than .9" if high < 0.9 else "too noisy to say"
            words.append(f"{name} saves {row['share']:.0%} [{low:.0%}, {high:.0%}] of that: {verdict}.")
    return words


def figure(report: Report) -> bytes:
    """The PNG: each contender's ratio to the baseline, undisturbed or of cycles, with its interval."""
    estimated = "topology" in report
    key = "ratio" if estimated else "quiet_ratio"
    rows = list(reversed(report["contenders"].items()))
    drawing, (ax,) = new_figure([0.3 * len(rows)], margin=0.9, grid="x")
    for place, (name, row) in enumerate(rows):
        low, high = row.get("quiet_interval", [row[key]] * 2)
        color = BLUE if "rmsnorm" in name else ORANGE if name == BOUND else GREY
        ax.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="round")
        ax.plot(row[key], place, "o", color=color, markersize=6)
    for value, style in ((1.0, "-"), (report["contenders"].get(BOUND, {}).get(key), (0, (3, 3)))):
        if value is not None:
            ax.axvline(value, color=LIGHT_GREY, linewidth=0.9, linestyle=style, zorder=0)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=FONT)
    what = "estimated cycles" if estimated else "undisturbed time with 95 % intervals"
    ax.set_xlabel(f"{what}, {TASKS[report['task']]}, relative to {report['baseline']}", fontsize=FONT)
    where = report["topology"] if estimated else report["device"]
    ax.set_title(f"{_setting(report)}{_in_a_row(report)}, {where}", fontsize=FONT, loc="left")
    return png(drawing)


def write(report: Report, folder: Path, stem: str) -> list[Path]:
    """Writes `stem`.json and .png into the folder; their paths. Raises PrenormError if it cannot."""
    files = {folder / f"{stem}.json": json_bytes(report), folder / f"{stem}.png": figure(report)}
    write_results(files)
    return list(files)
