"""The page of a certificate, its figure, and what it says in a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prenorm_jax.report import page, table
from prenorm_jax.report.figure import BLUE, FONT, GREY, LIGHT_GREY, NARROW, ORANGE, WIDTH, new_figure, png
from prenorm_jax.report.runs_figure import NORM_NAMES
from prenorm_jax.report.runs_words import NBSP, two_digits

Report = Mapping[str, Any]  # what certificate.json holds

FLOOR = 1e-17  # where a difference of exactly 0 is drawn, on an axis that has no 0
ALT = "The largest difference of each form from the reference, on a log axis, with its bound, and the control"
CAPTION = (
    "The largest |Δ| of the {output}, relative to the largest of the reference. Blue: the checkpoint and its "
    "conversion; grey: Pre-LN itself, whose rounding the source has too; orange: the control, the norms swapped and "
    "nothing recentred. A bar is the bound."
)


def plain_text(report: Report) -> str:
    """For a terminal: the table's main columns and the verdict."""
    words = [f"{report['verdict']}: {sentence}" if i == 0 else sentence for i, sentence in enumerate(_verdict(report))]
    return "\n".join([table.to_text(_errors(report, narrow=True)), *words])


def html_page(report: Report) -> tuple[bytes, bytes]:
    """The HTML page, and its figure as a PNG."""
    wide, narrow = (_figure(report, width) for width in (WIDTH, NARROW))
    kind = "alert" if report["verdict"] == "FAIL" else ""
    sentences = _verdict(report)
    parts = [
        page.paragraphs([_setting(report)], "quiet"),
        page.paragraphs(sentences[:1], kind),
        page.paragraphs(sentences[1:]),
        table.to_html(_errors(report)),
        page.paragraphs([_about_errors(report)], "quiet"),
        page.picture(wide, narrow, ALT, CAPTION.format(output=report["output"])),
        page.heading("What is left of the mean, norm by norm"),
        table.to_html(_norm_rows(report)),
        page.paragraphs([_about_norms(report)], "quiet"),
        page.heading("Before and after"),
        table.to_html(_size_rows(report)),
        page.paragraphs([_about_sizes()], "quiet"),
        page.heading("What both were given"),
        table.to_html([["probe", "what it tells apart"], *([one["name"], one["for"]] for one in report["probes"])]),
        page.paragraphs([_about_probes(report)], "quiet"),
        page.heading("What was compared"),
        table.to_html(_file_rows(report)),
    ]
    return page.page(f"{report['verdict']}: {report['title']}", parts), wide


def _setting(report: Report) -> str:
    after = report["sizes"]["result"]
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    return f"{NORM_NAMES[after['norm']]}, stored in {after['dtype']}; {report['date']}, {report['device']}, {versions}"


def _verdict(report: Report) -> list[str]:
    """Sentences: what holds or does not; the rounding; the control; who computed the reference."""
    rows, control = report["rows"], report["control"]
    exact = next((row for row in rows if row["what"] == "conversion"), None)
    last = next(row for row in rows if row["what"] == "checkpoint" and row["dtype"] == report["stored_dtype"])
    said = list(report["failures"])
    if not said:
        words = f"The {report['output']} of {report['workdir']} are those of {report['source']}"
        exactly = f" to {_relative(exact)} of the largest before any rounding, and" if exact else ""
        said = [f"{words}:{exactly} to {_relative(last)} as it is stored and computed, in {last['dtype']}."]
    else:
        said = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in said]
    none = "The source has no mean that could be missed; with one given to what writes, the norms"
    first = none if control["mean_given_first"] else "The norms"
    changed = "" if control["argmax_changed"] is None else f", with {_share(control)} of the argmaxes changed"
    said.append(f"{first} swapped alone, without recentring, are off by {_relative(control)}{changed}.")
    if not control["power"]:
        said.append("That is too little to tell a wrong conversion from a right one: the test has no power.")
    reference = report["reference"]
    why = f" ({reference['note']})" if reference["note"] else ""
    if reference["of_library"]:
        said.append(f"The reference is {reference['by']}{why}.")
    else:
        what = "of the conversion, not of the import" if "files" in report["files"]["source"] else "of the conversion"
        said.append(f"The reference is {reference['by']}{why}: this is evidence {what}.")
    return said


def _errors(report: Report, narrow: bool = False) -> table.Rows:
    head = ["form", "arithmetic", "relative", "bound", "", "argmax changed", f"largest{NBSP}|Δ|", f"mean{NBSP}|Δ|"]
    rows = [[*head, "mean relative", "norm"]]
    for row in [*report["rows"], _control_row(report)]:
        bound = "–" if row["bound"] is None else two_digits(row["bound"])
        held = {None: "", True: "holds", False: "exceeded"}[row["holds"]]
        cells = [row["what"], row["dtype"], _number(row["relative"]), bound, held, _share(row)]
        rows.append([*cells, *(_number(row[key]) for key in ("max", "mean", "mean_relative")), row["norm"]])
    return [row[:6] for row in rows] if narrow else rows


def _control_row(report: Report) -> dict[str, Any]:
    labels = {"what": "control: norms swapped alone", "norm": "rmsnorm", "dtype": "float64"}
    return {**labels, **report["control"], "bound": None, "holds": None}


def _about_errors(report: Report) -> str:
    bounds, leaves = report["bounds"], report["leaves"]
    same = ""
    if leaves:
        same = (
            f" {leaves['as_converted']} of the checkpoint's {leaves['of']} leaves are the conversion's, rounded once, "
            "bit for bit."
        )
    return (
        "Conversion: the source's, in float64, nothing rounded. Checkpoint: as it is stored. Δ: the difference from "
        "the reference. Relative: the largest |Δ| over the largest number of the reference; mean relative: the means' "
        f"ratio. Bounds: {two_digits(bounds['exact'])} where nothing was rounded to less than float64; elsewhere "
        f"{bounds['multiple']:g} times what the source's own Pre-LN form errs in the coarser of the "
        f"arithmetic's and the storage's dtype.{same}"
    )


def _norm_rows(report: Report) -> table.Rows:
    stored = report["stored_dtype"]
    head = ["norm", "ε", "the stream's size", "mean in the source", "left, in float64"]
    rows = [[*head, *([f"left, in {stored}"] if stored != "float64" else [])]]
    for one in report["norms"]:
        cells = [
            _site(one["norm"]),
            two_digits(one["epsilon"]),
            two_digits(one["size"]),
            _number(one["mean_in_source"]),
        ]
        left = [one["mean_float64"], *([one["mean_stored_dtype"]] if stored != "float64" else [])]
        rows.append([*cells, *(_number(mean) for mean in left)])
    return rows


def _site(path: str) -> str:
    """Such as "block 0, attention", which a narrow column can break."""
    return path.replace("block_", "block ").replace("/", ", ").replace("head_norm", "final").replace("_norm", "")


def _about_norms(report: Report) -> str:
    crms = " A crmsnorm stream has none by its coordinates." if report["sizes"]["result"]["norm"] == "crmsnorm" else ""
    return (
        "Means: the largest |mean| over the stream's d entries, of all tokens of all probes, where each norm takes it. "
        f"Size: the root mean square of its entries under the result, in float64.{crms}"
    )


def _size_rows(report: Report) -> table.Rows:
    before, after = report["sizes"]["source"], report["sizes"]["result"]

    def row(name: str, key: str) -> list[str]:
        change = after[key] - before[key]
        return [name, f"{before[key]:,.0f}", f"{after[key]:,.0f}", f"{change:+,.0f}" if change else "–"]

    return [
        ["", "source", "result", "change"],
        ["norm", before["norm"], after["norm"], ""],
        ["stored in", before["dtype"], after["dtype"], ""],
        row("numbers of the stream, a token", "width"),
        row("parameters", "parameters"),
        row(f"FLOPs of matrix products, {after['tokens']:,} tokens", "flops"),
        row(f"operations of norms, {after['tokens']:,} tokens", "norm_operations"),
    ]


def _about_sizes() -> str:
    return (
        "FLOPs of matrix products are counted at the width d for every norm; under crmsnorm readers and writers are "
        "d-1 wide. Operations of norms: each addition and multiplication, γ and β included where they are."
    )


def _about_probes(report: Report) -> str:
    compared, shape = report["compared"], report["probes"][0]["shape"]
    if len(shape) != 2:
        return f"Images of {shape[1]} × {shape[2]} × {shape[3]} numbers, one output each."
    return (
        f"{len(report['probes'])} sequences of {shape[1]:,} tokens; outputs are compared at {compared['positions']:,} "
        "positions of each, the first and the last among them. The first position sees itself alone."
    )


def _file_rows(report: Report) -> table.Rows:
    rows = [["", "sha256"]]
    for side in ("source", "result"):
        about = report["files"][side]
        if "files" in about:
            rows += [[f"{about['what']}: {name}", digest] for name, digest in about["files"].items()]
        else:
            rows.append([f"{about['what']}: every leaf's name, dtype, shape and bytes", about["sha256"]])
    rows.append(["certificate.npz: the probes and the reference's outputs", report["reference"]["sha256"]])
    return rows


def _relative(row: Report) -> str:
    return "what is not finite" if row["relative"] is None else two_digits(row["relative"])


def _number(value: float | None) -> str:
    return "not finite" if value is None else two_digits(value)


def _share(row: Report) -> str:
    return "–" if row["argmax_changed"] is None else f"{row['argmax_changed']:.2%}".replace(".00%", "%")


def _figure(report: Report, width: float) -> bytes:
    """The PNG: a point for each row, its bound, and the control."""
    rows: Sequence[Report] = [_control_row(report), *reversed(report["rows"])]
    drawing, (ax,) = new_figure([0.32 * len(rows)], margin=0.7, grid="x", width=width)
    for place, row in enumerate(rows):
        color = ORANGE if row["what"].startswith("control") else GREY if "Pre-LN" in row["what"] else BLUE
        if row["bound"] is not None:
            ends = [max(row["relative"] or 0, FLOOR), row["bound"]]
            ax.plot(ends, [place] * 2, color=LIGHT_GREY, linewidth=0.9, zorder=0)
            ax.plot([row["bound"]] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2)
        if row["relative"] is not None:
            ax.plot(max(row["relative"], FLOOR), place, "o", color=color, markersize=6, clip_on=False)
    sizes = [row[key] for row in rows for key in ("relative", "bound") if row[key]]
    ax.set_xscale("log")
    ax.set_xlim(10.0 ** math.floor(math.log10(min(sizes))), 10.0 ** math.ceil(math.log10(max(sizes))))
    if any(row["relative"] == 0 for row in rows):
        powers = range(-14, math.ceil(math.log10(max(sizes))) + 1, 4)
        ax.set_xlim(left=FLOOR)
        ax.set_xticks([FLOOR, *(10.0**power for power in powers)], ["0", *(f"$10^{{{power}}}$" for power in powers)])
    ax.minorticks_off()
    ax.set_yticks(range(len(rows)), [_label(row, width) for row in rows], fontsize=FONT)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel(f"largest |Δ| of the {report['output']}, relative", fontsize=FONT)
    return png(drawing)


def _label(row: Report, width: float) -> str:
    short = row["what"].partition(":")[0]
    return f"{short.removeprefix('source, ') if width == NARROW else short}, {row['dtype']}"
