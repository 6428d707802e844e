"""What `compare` says: sentences and a table from its report, as plain text and as an HTML page."""

import itertools
import math
from collections.abc import Callable
from typing import Any

from prenorm_jax.report import page, table

Report = dict[str, Any]  # what report.json holds

# Of one rounding, relative.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}

NBSP = "\N{NO-BREAK SPACE}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

ALT = "Training loss by optimizer step; below, its difference from the reference on a log axis"
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
    "change; “departs from”: more, or not finite where the reference is. Where two runs are trained alike only up to a "
    "step, |Δ| and verdict are of the steps up to it (“step 7 of 50”)."
)


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
                f"In {dtype} (relative rounding {two_digits(ROUNDING[dtype])}) runs whose arithmetic differs only in "
                "rounding drift apart slowly: training amplifies the differences of the first steps."
            )
    return report | words


def _relation(row: Report, base: Report) -> str:
    largest, change, until = row["max_abs_delta"], base["change_per_step"], row["alike_until"]
    if largest is None or until == 0:
        return "cannot be compared with {}"
    ratio = largest / change if change else math.inf
    if row["diverged"] or (largest and ratio > 1):
        relation = "departs from {}"
    else:
        relation = "equals {}" if not largest else "follows {}" if ratio > 0.1 else "follows {} closely"
    return relation + (f" up to step {until:,}" if until else "")


def _verdict(row: Report, base: Report, unit: str) -> str:
    name, largest, change, until = row["name"], row["max_abs_delta"], base["change_per_step"], row["alike_until"]
    claim = f"{name} {row['relation'].format(base['name'])}"
    if largest is None:
        return f"{claim}: at no common step both losses are finite."
    steps = _steps(row["common_steps"], "common ") + (" with finite losses" if row["diverged"] else "")
    if largest == 0:
        differ = "agree in every digit."
    else:
        differ = (
            f"differ by at most {two_digits(largest)} nats per {unit} (at step {row['max_abs_delta_step']:,}; at first "
            f"{two_digits(row['first_abs_delta'])}, in the median {two_digits(row['median_abs_delta'])})"
        )
        if change and until != 0:
            differ += f", {_part(largest / change)} the {two_digits(change)} by which that of {base['name']} typically "
            differ += "changes from one step to the next"
        differ += "."
    if until == 0:
        return f"{claim}, for {row['parted_by']}: whatever the norm, over {steps} the training losses {differ}"
    text = f"{claim}: over {steps} the training losses {differ}"
    if until:
        text += f" After step {until:,} {row['parted_by']}: how the curves part from there is not the norm's doing."
    native = [one["name"] for one in (base, row) if one["parameterization"] == "native" and one["norm"] != "layernorm"]
    if native and (row["norm"], row["parameterization"]) != (base["norm"], base["parameterization"]):
        text += (
            f" {' and '.join(native)} trained the parameters of the variant's own tree (parameterization "
            "native), on which an optimizer step does something else: these curves need not agree."
        )
    return text


def _warnings(report: Report) -> list[str]:
    rows, warnings = report["runs"], []
    if keys := report["parting_keys"]:
        warnings.append(
            f"The configurations differ in {', '.join(keys)}: curves from different seeds, data or settings "
            "are not comparable."
        )
    if len({row["last_step"] for row in rows}) > 1:
        ends = ", ".join(f"{row['name']} at {row['last_step']:,}" for row in rows)
        warnings.append(f"The runs end at different steps ({ends}): their final values do not compare.")
    for row in rows:
        for step, changes in itertools.groupby(row["changes"], lambda change: change["step"]):
            changed = ", ".join(f"{change['key']}={change['to']} instead of {change['from']}" for change in changes)
            warnings.append(
                f"{row['name']} went on after step {step:,} with {changed}: from there its training differs."
            )
        if left_out := row["skipped_updates"] - row["nonfinite_losses"]:
            warnings.append(
                f"{row['name']}: at {_steps(left_out)} the loss is finite, but its gradient or update was not and was "
                f"left out; the first update left out is that of step {row['first_skipped_step']:,}."
            )
        if row["nonfinite_losses"]:
            warnings.append(
                f"{row['name']}: the training loss is not finite at {_steps(row['nonfinite_losses'])}, first "
                f"at step {row['first_nonfinite_step']:,}: gaps in the figure, left out of the differences."
            )
    return warnings


def plain_text(report: Report) -> str:
    """The table's main columns, the verdict and the warnings, for a terminal."""
    warnings = [f"warning: {text}" for text in report["warnings"]]
    return "\n".join([table.to_text(_results(report, for_terminal=True)), *report["verdict"], *warnings])


def html_page(report: Report, wide: bytes, narrow: bytes) -> bytes:
    """The HTML page, with the figure in two widths."""
    names = [row["name"] for row in report["runs"]]
    differences = [[key, *(texts[name] for name in names)] for key, texts in report["config_differences"].items()]
    origins = [["run", "parameterization", "parameters trained / computed", "workdir", "device", "versions"]]
    for row in report["runs"]:
        origin = [row["name"], row["parameterization"], _parameters(row), row["workdir"]]
        device = str(row["device"] or "–").replace(" × ", f"{NBSP}×{NBSP}")
        origins.append([*origin, device, _pairs(row["versions"]) or "–"])
    per_step = "(batch_size · data.seq_len)" if "data.seq_len" in report["setting"] else "batch_size"
    footnote = FOOTNOTE.format(final=report["final_loss_steps"], unit=report["unit"], size=per_step)
    parts = [
        page.paragraphs([_pairs(report["setting"])], "quiet"),
        page.paragraphs((f"Warning: {text}" for text in report["warnings"]), "alert"),
        table.to_html(_results(report)),
        page.picture(wide, narrow, ALT, CAPTION if report["verdict"] else ""),
        page.paragraphs([*report["verdict"], *report["notes"]]),
        page.paragraphs([footnote], "quiet"),
        page.heading("Differences in configuration, other than norm and parameterization"),
        table.to_html([["key", *names], *differences]) if differences else page.paragraphs(["None."]),
        page.heading("Runs"),
        table.to_html(origins),
    ]
    return page.page(report["title"], parts)


def _results(report: Report, for_terminal: bool = False) -> table.Rows:
    """The table of all runs; `for_terminal`: the columns that fit one."""
    reference = report["reference"]
    columns: list[tuple[str, bool, Callable[[Report], str]]] = [  # head, whether it fits a terminal, cell
        ("run", True, lambda row: row["name"]),
        ("norm", True, _norms),
        ("final training loss", True, lambda row: _loss(row["final_loss"])),
        ("final eval loss", True, lambda row: _at_step(row, "final_eval_loss", "final_eval_step", _loss)),
        ("final top-1", True, lambda row: _number(row["final_eval_top1"], ".2%")),
        (f"largest |Δ{NBSP}loss|", True, lambda row: _delta(row, "max_abs_delta", reference)),
        (f"final |Δ{NBSP}eval{NBSP}loss|", False, lambda row: _delta(row, "final_eval_abs_delta", reference)),
        ("best eval loss", False, lambda row: _at_step(row, "best_eval_loss", "best_eval_step", _loss)),
        (
            "steps/s",
            True,
            lambda row: _number(row["steps_per_s"], ".3g" if (row["steps_per_s"] or 0) < 100 else ",.0f"),
        ),
        (f"{report['unit']}s/s", False, lambda row: _number(row["units_per_s"], ",.0f")),
    ]
    if all(row["final_eval_top1"] is None for row in report["runs"]):
        columns = [column for column in columns if column[0] != "final top-1"]
    columns = [column for column in columns if column[1] or not for_terminal]
    return [[head for head, *_ in columns], *([cell(row) for *_, cell in columns] for row in report["runs"])]


def _norms(row: Report) -> str:
    first = [switch["from"] for switch in row["switches"][:1]] or [row["norm"]]
    return ", ".join([*first, *(f"{switch['to']} after step{NBSP}{switch['step']:,}" for switch in row["switches"])])


def _parameters(row: Report) -> str:
    return " / ".join(_number(row[key], ",") for key in ("parameters_trained", "parameters_computed"))


def _delta(row: Report, key: str, reference: str) -> str:
    of = f" of {row['alike_until']:,}" if row["alike_until"] else ""
    return "reference" if row["name"] == reference else _at_step(row, key, f"{key}_step", two_digits, of)


def _at_step(row: Report, key: str, step: str, text: Callable[[Any], str], of: str = "") -> str:
    return "–" if row[step] is None else f"{text(row[key])} (step{NBSP}{row[step]:,}{of})"


def _steps(number: int, what: str = "") -> str:
    return f"{number:,} {what}step{'s' * (number != 1)}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _part(ratio: float) -> str:
    """Such as "2.1 times" or "1/4,700 of", before what it is a part of."""
    return f"{two_digits(ratio)} times" if ratio >= 0.1 else f"1/{float(f'{1 / ratio:.1e}'):,.0f} of"


def two_digits(value: float) -> str:
    """Two digits, such as 0.030 or 2.1×10⁻⁵."""
    if value == 0:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    if -3 <= int(exponent) <= 1:
        return f"{value:.{1 - int(exponent)}f}"
    return f"{digits}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
