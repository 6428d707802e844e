"""What `compare` says: sentences and a table from its report, as plain text and as an HTML page."""

from __future__ import annotations

import base64
import html
import math
import string
from typing import Any

# Of one rounding, relative.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


# Keys that leave the losses as they are: no warning when they differ.
BOOKKEEPING_KEYS = {"eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard"}


Report = dict[str, Any]  # what report.json holds


def with_words(report: Report) -> Report:
    """The report with what its numbers mean: "relation" (to the reference: "follows {} closely", ...) in
    each run's row, and "verdict", "notes" and "warnings", lists of sentences.
    """
    base = next(row for row in report["runs"] if row["name"] == report["reference"])
    others = [row for row in report["runs"] if row is not base]
    for row in others:
        row["relation"] = _relation(row, base)
    words = {
        "verdict": [_verdict(row, base, report["unit"]) for row in others],
        "notes": [],
        "warnings": _warnings(report),
    }
    for dtype in dict.fromkeys(row["dtype"] for row in report["runs"]):
        if others and dtype in ROUNDING:
            words["notes"].append(
                f"In {dtype} (relative rounding {ROUNDING[dtype]:.0e}) runs whose arithmetic differs only in "
                "rounding drift apart slowly: training amplifies the differences of the first steps."
            )
    return report | words


def _relation(row: Report, base: Report) -> str:
    largest, change = row["max_abs_delta"], base["change_per_step"]
    diverged = row["nonfinite_losses"] != base["nonfinite_losses"]
    if largest is None:
        return "cannot be compared with {}"
    if largest == 0 and not diverged:
        return "equals {}"
    ratio = largest / change if change else math.inf
    return "departs from {}" if diverged or ratio > 1 else "follows {}" if ratio > 0.1 else "follows {} closely"


def _verdict(row: Report, base: Report, unit: str) -> str:
    name, largest, change = row["name"], row["max_abs_delta"], base["change_per_step"]
    claim = f"{name} {row['relation'].format(base['name'])}"
    if largest is None:
        return f"{claim}: at no common step both losses are finite."
    diverged = row["nonfinite_losses"] != base["nonfinite_losses"]
    steps = f"{row['common_steps']:,} common steps" + (" with finite losses" if diverged else "")
    if largest == 0 and not diverged:
        text = f"{claim}: over {steps} the training losses agree in every digit."
    else:
        text = (
            f"{claim}: over {steps} the training losses differ by at most "
            f"{_small(largest)} nats per {unit} (at step {row['max_abs_delta_step']:,}; at first "
            f"{_small(row['first_abs_delta'])}, in the median {_small(row['median_abs_delta'])})."
        )
        if change:
            text += (
                f" The largest is {largest / change:.2g} times the {_small(change)} by which the loss of "
                f"{base['name']} itself typically changes from one step to the next."
            )
    native = [one["name"] for one in (base, row) if one["parameterization"] == "native" and one["norm"] != "layernorm"]
    if native and (row["norm"], row["parameterization"]) != (base["norm"], base["parameterization"]):
        text += (
            f" {' and '.join(native)} trained the parameters of the variant's own tree (parameterization "
            "native), on which an optimizer step does something else: these curves need not agree."
        )
    return text


def _warnings(report: Report) -> list[str]:
    rows, warnings = report["runs"], []
    keys = [key for key in report["config_differences"] if key not in BOOKKEEPING_KEYS]
    if keys:
        warnings.append(
            f"The configurations differ in {', '.join(keys)}: curves from different seeds, data or settings "
            "are not comparable."
        )
    if len({row["last_step"] for row in rows}) > 1:
        ends = ", ".join(f"{row['name']} at {row['last_step']:,}" for row in rows)
        warnings.append(f"The runs end at different steps ({ends}): their final values do not compare.")
    for row in rows:
        if row["nonfinite_losses"]:
            warnings.append(
                f"{row['name']}: the training loss is not finite at {row['nonfinite_losses']:,} steps, first "
                f"at step {row['first_nonfinite_step']:,}: gaps in the figure, left out of the differences."
            )
    return warnings


def plain_text(report: Report) -> str:
    """The table's main columns, the verdict and the warnings, for a terminal."""
    columns = [i for i, head in enumerate(_table(report)[0]) if head in IN_TERMINAL]
    table = [[cells[i] for i in columns] for cells in _table(report)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    return "\n".join([*lines, *report["verdict"], *(f"warning: {text}" for text in report["warnings"])])


def page(report: Report, png: bytes) -> str:
    """The HTML page: no scripts, nothing to fetch; every text from a file is escaped."""
    names = [row["name"] for row in report["runs"]]
    differences = [[key, *(texts[name] for name in names)] for key, texts in report["config_differences"].items()]
    origins = [
        [row["name"], row["workdir"], str(row["device"] or "–"), _pairs(row["versions"]) or "–"]
        for row in report["runs"]
    ]
    warnings = [f"Warning: {text}" for text in report["warnings"]]
    size = "batch_size" if report["unit"] == "image" else "(batch_size · data.seq_len)"
    return PAGE.substitute(
        title=html.escape(report["title"]),
        setting=html.escape(_pairs(report["setting"])),
        warnings=_paragraphs(warnings),
        png=base64.b64encode(png).decode(),
        caption=CAPTION if report["verdict"] else "",
        verdict=_paragraphs(report["verdict"]),
        table=_html_table(_table(report)),
        notes=_paragraphs(report["notes"]),
        footnote=html.escape(FOOTNOTE.format(final=report["final_loss_steps"], unit=report["unit"], size=size)),
        differences=_html_table([["key", *names], *differences]) if differences else "<p>None.</p>",
        origins=_html_table([["run", "workdir", "device", "versions"], *origins]),
    )


def _table(report: Report) -> list[list[str]]:
    with_top1 = any(row["final_eval_top1"] is not None for row in report["runs"])
    table = [[head for head in TABLE_HEAD if with_top1 or head != TOP1] + [f"{report['unit']}s/s"]]
    for row in report["runs"]:
        norms = [switch["from"] for switch in row["switches"][:1]] or [row["norm"]]
        norms += [f"{switch['to']} after step {switch['step']:,}" for switch in row["switches"]]
        counts = [_number(row[key], ",") for key in ("parameters_trained", "parameters_computed")]
        deltas = [_small_at_step(row, "max_abs_delta"), _small_at_step(row, "final_eval_abs_delta")]
        table.append(
            [
                row["name"],
                ", ".join(norms),
                row["parameterization"],
                " / ".join(counts),
                "not finite" if row["final_loss"] is None else f"{row['final_loss']:.4f}",
                _eval_loss(row, "final_eval"),
                _eval_loss(row, "best_eval"),
                *([_number(row["final_eval_top1"], ".2%")] if with_top1 else []),
                *(["reference"] * 2 if row["name"] == report["reference"] else deltas),
                _number(row["steps_per_s"], ".3g"),
                _number(row["units_per_s"], ",.0f"),
            ]
        )
    return table


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _small_at_step(row: Report, key: str) -> str:
    return "–" if row[key] is None else f"{_small(row[key])} {_step(row[f'{key}_step'])}"


def _eval_loss(row: Report, which: str) -> str:
    loss, step = row[f"{which}_loss"], row[f"{which}_step"]
    if step is None:
        return "–"
    return f"{'not finite' if loss is None else f'{loss:.4f}'} {_step(step)}"


def _step(step: int) -> str:
    return f"(step\N{NO-BREAK SPACE}{step:,})"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _paragraphs(texts: list[str]) -> str:
    return "\n".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _html_table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return '<div class="table"><table>\n' + "\n".join(lines) + "\n</table></div>"


TOP1 = "final top-1"


TABLE_HEAD = [
    "run",
    "norm",
    "parameterization",
    "parameters trained / in the variant's tree",
    "final training loss",
    "final eval loss",
    "best eval loss",
    TOP1,
    "largest |Δ\N{NO-BREAK SPACE}loss|",
    "final |Δ\N{NO-BREAK SPACE}eval\N{NO-BREAK SPACE}loss|",
    "steps/s",
]


# What fits a terminal.
IN_TERMINAL = {
    "run",
    "norm",
    "final training loss",
    "final eval loss",
    TOP1,
    "largest |Δ\N{NO-BREAK SPACE}loss|",
    "steps/s",
}


CAPTION = (
    "Above: training losses (lines) and evaluation losses (diamonds). Below: the size of their differences "
    "from the reference, nothing smoothed; a tick beside “exactly 0” is a step at which the losses are equal."
)


FOOTNOTE = (
    "Losses are in nats per {unit}. Final training loss: the mean over the last {final} steps, or over all if "
    "there are fewer. Δ: the difference from the reference, at steps that both have. {unit}s/s: the median "
    "over the steps, the first 10 % left out; steps/s = {unit}s/s ÷ {size}. Runs made "
    "one after the other on a shared machine are no benchmark. “Follows closely”: the largest |Δ loss| is "
    "at most a tenth of the reference's median change from one step to the next; “follows”: at most that "
    "change; “departs from”: more, or not finite where the reference is."
)


PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --text: #1c1c1c; --quiet: #5c5c5c; --rule: #d9d9d9; --back: #fff; --alert: #fff1e3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --quiet: #a8a8a8; --rule: #444; --back: #17181a; --alert: #4a2c12; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { max-width: 50rem; margin: .5rem 0; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .875rem; }
.warnings p { background: var(--alert); border-left: 4px solid #d55e00; padding: .5rem .75rem; }
figure { margin: 1.5rem 0; }
figcaption { max-width: 720px; margin-top: .5rem; }
figure img { display: block; width: 720px; max-width: 100%; background: #fff; border-radius: 4px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1rem .35rem 0;
         border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; }
th:nth-last-child(-n+2) { white-space: nowrap; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="quiet">$setting</p>
<div class="warnings">$warnings</div>
<figure><img alt="Training loss by optimizer step; below, its difference from the reference on a log axis"
src="data:image/png;base64,$png">
<figcaption class="quiet">$caption</figcaption></figure>
$verdict
$notes
<h2>Results</h2>
$table
<p class="quiet">$footnote</p>
<h2>Differences in configuration, other than norm and parameterization</h2>
$differences
<h2>Runs</h2>
$origins
</body>
</html>
""")
