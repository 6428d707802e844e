"""What `numerics` says: sentences, tables, the page and the files, of a run and of streams that are made up."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prenorm_jax.base.files import json_bytes, write_results
from prenorm_jax.bench import numerics_figure
from prenorm_jax.bench.numerics import CHOSEN, PAPERS
from prenorm_jax.report import page, table
from prenorm_jax.report.figure import NARROW
from prenorm_jax.report.runs_words import two_digits

Report = dict[str, Any]

LIMIT = 1.15  # times Pre-LN's error: what is above it is called worse
BASE = "layernorm"
QUANTITIES = ("logits", "gradients")

ALT = "Errors of logits and gradients of each variant relative to layernorm's, a panel for each dtype"
CAPTION = (
    "Computed in each dtype from float32 parameters. Left of the line: nearer to float64 than Pre-LN, whose variance "
    "is taken in two passes."
)
STREAM_ALT = "Mean of the stream over its spread, and its largest channel over the median, at each norm"
STREAM_CAPTION = (
    "Above: |mean|/std of the stream that each LayerNorm is given. Below: the largest channel's root mean square."
)
FOOTNOTE = (
    "Errors are relative, ‖a − b‖/‖b‖ over all logits, and over the whole gradient of the loss by Pre-LN's parameters "
    "(a variant's goes through the derivative of the conversion h, as training with pre_ln does). b is Pre-LN in "
    "float64 of the checkpoint's parameters as they are. Computed: in the dtype, from parameters converted in float64 "
    "and rounded to float32. Stored: parameters rounded to the dtype, and the arithmetic in float64; 0 is of a "
    "checkpoint that is in that dtype already. In brackets: in multiples of layernorm's, of two passes; "
    "one-pass is Flax's E[x²] − E[x]². Dropout is off, losses are not scaled. It is one model on these inputs: a few "
    "per cent more or less are chance."
)
LAW = (
    "The law: rounding of every entry k leaks into all readers' products by way of Wc, so that the squared error is L "
    "times rmsnorm's, L = [Σ_{k≠p} (σ_k² + (c_k/c_p)² σ_p²) ‖W_k − Wc‖² + ρ σ_p² ‖W_p‖²] / Σ_k σ_k² ‖W_k‖², W the "
    "readers' weights times γ, σ the entries' sizes; c = e_p and ρ = 0 where p is dropped, ρ = 1 where it is "
    "reflected. Of a network it takes the mean over norms, and counts what is rounded elsewhere (docs/coordinates.md)."
)


def with_words(report: Report) -> Report:
    """The report of a run with what its numbers mean.

    In each row of errors logits_ratio and gradients_ratio, to layernorm's in the same dtype (None: one is not finite,
    or layernorm's is 0), and "advice", a sentence, and "verdict", a list of them.
    """
    bases = {(row["how"], row["dtype"]): row for row in report["errors"] if row["variant"] == BASE}
    errors = []
    for row in report["errors"]:
        base = bases[row["how"], row["dtype"]]
        known = {name: row[name] is not None and bool(base[name]) for name in QUANTITIES}
        ratios = {f"{name}_ratio": row[name] / base[name] if known[name] else None for name in QUANTITIES}
        errors.append(row | ratios)
    report = report | {"errors": errors}
    verdict = [*_worse(report), *_not_finite(report), _law(report), _mean(report)]
    return report | {"advice": _advice(report), "verdict": verdict}


def _computed(report: Report, variant: str, dtype: str, how: str = "computed") -> Report | None:
    wanted = variant, dtype, how
    return next((row for row in report["errors"] if (row["variant"], row["dtype"], row["how"]) == wanted), None)


def _chosen(report: Report, role: str) -> Report:
    return next(place for place in report["coordinates"] if role in place["roles"])


def _named(report: Report, variant: str) -> str:
    """With what its coordinates are, if it has any."""
    roles = [role for place in report["coordinates"] if place["variant"] == variant for role in place["roles"]]
    return f"{variant} ({', '.join(roles)})" if roles else variant


def _is_finite(row: Report) -> bool:
    return all(row[name] is not None for name in QUANTITIES)


def _advice(report: Report) -> str:
    """Which variant to run in which dtype, in one sentence."""
    dtypes: dict[str, list[str]] = {}
    for dtype in report["dtypes"]:
        base = _computed(report, BASE, dtype)
        good = []
        for name in ("rmsnorm", _chosen(report, CHOSEN)["variant"]):
            row = _computed(report, name, dtype)
            near = [row[f"{each}_ratio"] is None or row[f"{each}_ratio"] <= LIMIT for each in QUANTITIES]
            if _is_finite(row) and all(near):
                good.append(name)
        if not good and _is_finite(base):
            good = [BASE]
        dtypes.setdefault(" or ".join(good) or "none of them", []).append(dtype)
    return "Run " + "; ".join(f"{names} in {_and(where)}" for names, where in dtypes.items()) + "."


def _worse(report: Report) -> list[str]:
    """A sentence for each variant whose error is above the limit anywhere."""
    sentences = []
    for variant in report["variants"]:
        found = []
        for name in QUANTITIES:
            rows = [(dtype, _computed(report, variant, dtype)[f"{name}_ratio"]) for dtype in report["dtypes"]]
            parts = [f"{ratio_text(ratio)} times in {dtype}" for dtype, ratio in rows if ratio and ratio > LIMIT]
            if parts:
                found.append(f"{name} {_and(parts)}")
        if found:
            errors = "; of the ".join(found)
            sentences.append(f"{_named(report, variant)} is worse than layernorm: error of the {errors}.")
    return sentences


def _not_finite(report: Report) -> list[str]:
    """A sentence for each dtype in which something overflows."""
    sentences = []
    for dtype in report["dtypes"]:
        parts = []
        for variant in report["variants"]:
            row = _computed(report, variant, dtype)
            for name in QUANTITIES:
                if row[f"{name}_not_finite"]:
                    share = f"{row[f'{name}_not_finite']:,} of {row[f'{name}_count']:,} {name}"
                    parts.append(f"{share} of {variant}")
        if parts:
            sentences.append(f"In {dtype} not finite: {_and(parts)}.")
    return sentences


def _law(report: Report) -> str:
    """What is predicted of the choice and of the paper's coordinates, and what was measured."""
    texts = []
    for name in dict.fromkeys(_chosen(report, role)["variant"] for role in (PAPERS, CHOSEN)):
        place = next(place for place in report["coordinates"] if place["variant"] == name)
        ratios = [f"{_to_rms(report, name, dtype)} in {dtype}" for dtype in report["dtypes"]]
        texts.append(f"{_named(report, name)} {ratio_text(place['error'])}, measured {_and(ratios)}")
    return f"Error of the logits relative to rmsnorm's: by the law {'; '.join(texts)}."


def _mean(report: Report) -> str:
    site = max(report["sites"], key=lambda site: site["mean_over_std"]["largest"])
    return (
        f"The mean of the stream is at most {two_digits(site['mean_over_std']['largest'])} of its spread, at "
        f"{site['site']}: what one pass over it costs grows with the square of that."
    )


def _to_rms(report: Report, name: str, dtype: str) -> str:
    """The error of the logits in multiples of rmsnorm's."""
    row, of_rms = (_computed(report, each, dtype) for each in (name, "rmsnorm"))
    both = row["logits"] is not None and bool(of_rms["logits"])
    return ratio_text(row["logits"] / of_rms["logits"]) if both else "not finite"


def ratio_text(ratio: float) -> str:
    """Such as 1.02, 5.9, 37."""
    return f"{ratio:.2f}" if ratio < 3 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


def _and(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


# --- Tables. ---


def _error_rows(report: Report, how: str) -> table.Rows:
    rows = [["variant", *(f"{dtype} {name}" for dtype in report["dtypes"] for name in QUANTITIES)]]
    for variant in report["variants"]:
        found = [_computed(report, variant, dtype, how) for dtype in report["dtypes"]]
        if None not in found:
            rows.append([variant, *(_cell(row, name) for row in found for name in QUANTITIES)])
    return rows


def _cell(row: Report, name: str) -> str:
    if row[name] is None:
        return "not finite"
    ratio = row[f"{name}_ratio"]
    return two_digits(row[name]) + (f" ({ratio_text(ratio)})" if ratio is not None and row["variant"] != BASE else "")


def _choice_rows(report: Report) -> table.Rows:
    rows = [["coordinates", "which is", "predicted", *(f"measured in {dtype}" for dtype in report["dtypes"])]]
    for place in report["coordinates"]:
        name = place["variant"]
        measured = [_to_rms(report, name, dtype) if name in report["variants"] else "–" for dtype in report["dtypes"]]
        predicted = "–" if place["error"] is None else ratio_text(place["error"])
        rows.append([name, "; ".join(place["roles"]), predicted, *measured])
    return rows


def _site_rows(report: Report) -> table.Rows:
    rows = [["norm", "|mean|/std, median", "largest", "largest channels over the median", "γ from", "to", "γ there"]]
    for site in report["sites"]:
        channels, scale = site["channels"], site["scale"]
        ratios = ", ".join(f"{channel['entry']}: {ratio_text(channel['over_median'])}" for channel in channels)
        ends = ["none", "", ""]
        if scale is not None:
            there = ", ".join(f"{channel['scale']:.2g}" for channel in channels)
            ends = [f"{scale['least']:.2g}", f"{scale['largest']:.2g}", there]
        means = [two_digits(site["mean_over_std"][key]) for key in ("median", "largest")]
        rows.append([site["site"], *means, ratios, *ends])
    return rows


# --- Of a run. ---


def plain_text(report: Report) -> str:
    """For a terminal."""
    return "\n".join([report["title"], "", table.to_text(_error_rows(report, "computed")), "", *_sentences(report)])


def _sentences(report: Report) -> list[str]:
    return [report["advice"], *report["verdict"]]


def html_page(report: Report) -> bytes:
    """The page, with its figures."""
    parts = [
        page.paragraphs([_setting(report)], "quiet"),
        page.paragraphs(_sentences(report)),
        page.picture(*_widths(numerics_figure.error_figure, report), ALT, CAPTION),
        page.heading("Computed in a dtype"),
        table.to_html(_error_rows(report, "computed")),
        page.heading("Parameters stored in a dtype"),
        table.to_html(_error_rows(report, "stored")),
        page.heading("Coordinates of crmsnorm: the error of the logits, relative to rmsnorm's"),
        table.to_html(_choice_rows(report)),
        page.paragraphs([LAW], "quiet"),
        page.heading("The stream at each norm"),
        page.picture(*_widths(numerics_figure.stream_figure, report), STREAM_ALT, STREAM_CAPTION),
        table.to_html(_site_rows(report)),
        page.paragraphs([FOOTNOTE], "quiet"),
    ]
    return page.page(report["title"], parts)


def _widths(draw: Any, report: Report) -> tuple[bytes, bytes]:
    return draw(report), draw(report, NARROW)


def _setting(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    where = f"{report['date']}, {report['device']}, {versions}"
    if "model" not in report:
        return where
    return f"{report['model']}; on {report['inputs']}. {where}"


def write(report: Report, folder: Path) -> list[Path]:
    """numerics.html, .png and .json of a run, in the folder; their paths. Raises PrenormError if it cannot."""
    figures = {"numerics.png": numerics_figure.error_figure(report)}
    return _write(report, folder, "numerics", html_page(report), figures)


def _write(report: Report, folder: Path, stem: str, html: bytes, figures: dict[str, bytes]) -> list[Path]:
    files = {folder / f"{stem}.html": html} | {folder / name: content for name, content in figures.items()}
    files[folder / f"{stem}.json"] = json_bytes(report)
    write_results(files)
    return list(files)


# --- Of streams that are made up. ---

MEAN_ALT = "Relative error of each norm's output by the mean of its stream, a panel for each dtype"
OUTLIER_ALT = "Error of crmsnorm relative to rmsnorm's, by the entry that is dropped or reflected, and the law's figure"


def synthetic_text(report: Report) -> str:
    """For a terminal."""
    return "\n\n".join([report["title"], table.to_text(_mean_rows(report)), *_synthetic_sentences(report)])


def _mean_rows(report: Report) -> table.Rows:
    means = sorted({row["mean"] for row in report["means"]})
    found = {(row["dtype"], row["variant"], row["mean"]): row["error"] for row in report["means"]}
    rows = [["dtype", "norm", f"mean {means[0]:g}", *(f"{mean:g}" for mean in means[1:])]]
    for dtype, name in dict.fromkeys((row["dtype"], row["variant"]) for row in report["means"]):
        errors = (found[dtype, name, mean] for mean in means)
        rows.append([dtype, name, *("not finite" if error is None else two_digits(error) for error in errors)])
    return rows


def _synthetic_sentences(report: Report) -> list[str]:
    made, last, chosen = report["outlier_setting"], [], []
    for dtype in report["dtypes"]:
        rows = [row for row in report["outliers"] if row["dtype"] == dtype]
        paper, best = _of(rows, "drop", made["width"] - 1), rows[0]
        last.append(f"{ratio_text(paper['measured'])} in {dtype}")
        chosen.append(f"{ratio_text(best['measured'])} in {dtype}")
    return [
        f"{made['channels']} channels are {made['times']:g} times the rest, with γ {made['scale']:g} there. In "
        f"multiples of rmsnorm's error: dropping the last, as in the paper, {_and(last)} (by the law "
        f"{ratio_text(paper['predicted'])}); the law's choice, {best['kind']} {best['entry']}, {_and(chosen)} "
        f"({ratio_text(best['predicted'])})."
    ]


def _of(rows: Iterable[Report], kind: str, entry: int) -> Report:
    return next(row for row in rows if (row["kind"], row["entry"]) == (kind, entry))


def synthetic_page(report: Report) -> bytes:
    """The page, with its figures."""
    setting, made = report["setting"], report["outlier_setting"]
    of_means = (
        f"Relative error of the norm's output, ‖a − b‖/‖b‖, on {setting['rows']} vectors of {setting['width']} normal "
        "numbers around a mean. layernorm is given them as they are, rounded to the dtype; the others centred (and "
        "compressed) first, in float64, as conversion does it to the weights that write the stream. b is LayerNorm in "
        "float64 of the numbers before they are rounded."
    )
    of_outliers = (
        f"What normal readers make of the norm's output, on {made['rows']} vectors of {made['width']}, "
        f"{made['channels']} of whose channels are {made['times']:g} times the rest and have a γ of {made['scale']:g}. "
        "Marks are of kinds and entries p; on the dashed line what is measured is what it predicts."
    )
    parts = [
        page.paragraphs([_setting(report)], "quiet"),
        page.heading("A mean of the stream"),
        page.picture(*_widths(numerics_figure.mean_figure, report), MEAN_ALT, of_means),
        table.to_html(_mean_rows(report)),
        page.heading("Large channels, and the entry that crmsnorm drops or reflects"),
        page.paragraphs(_synthetic_sentences(report)),
        page.picture(*_widths(numerics_figure.outlier_figure, report), OUTLIER_ALT, of_outliers),
        page.paragraphs([LAW], "quiet"),
    ]
    return page.page(report["title"], parts)


def write_synthetic(report: Report, folder: Path) -> list[Path]:
    """synthetic.html, .json, and its figures means.png and outliers.png. Raises PrenormError if it cannot."""
    figures = {"means.png": numerics_figure.mean_figure(report), "outliers.png": numerics_figure.outlier_figure(report)}
    return _write(report, folder, "synthetic", synthetic_page(report), figures)
