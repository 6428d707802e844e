"""What `compare` reads of finished runs, and the numbers of its report."""

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import flatten, json_bytes, read_json, write_results
from prenorm_jax.report import runs_figure, runs_words
from prenorm_jax.report.figure import NARROW
from prenorm_jax.report.run import COMPARED_KEYS, Run, alike_until, parting_keys

SETTING_KEYS = ("model.depth", "model.d_model", "batch_size", "data.seq_len", "seed", "model.dtype")
FINAL_STEPS = 20  # the final training loss is the mean over the last so many steps

_RATE = re.compile(r"(?!model_flops)(\w+)s_per_s")  # a key of metrics.jsonl, such as tokens_per_s: names the unit


def compare(
    workdirs: Sequence[str | Path],
    out: str | Path,
    title: str | None = None,
    reference: str | Path | None = None,
) -> dict[str, Any]:
    """Writes report.html, report.png and report.json into the folder `out` (X.html, ... for out="X.html"), or none.

    `reference` is one of `workdirs`; by default the first run with LayerNorm, else the first run. Returns
    what report.json holds and, under "files", the paths written. Raises PrenormError for a workdir that is
    missing, named twice or holds no readable training, for a reference that is not among them or shares no
    step with one of them, and where the report cannot be written.
    """
    runs = _read_runs([Path(workdir) for workdir in workdirs])
    base = _reference(runs, reference)
    report = {
        "title": title or "Training loss of " + _names(runs),
        "reference": base.name,
        "unit": base.unit,
        "final_loss_steps": FINAL_STEPS,
        "runs": [_row(run, base) for run in runs],
        "setting": {key: _text(base.config[key]) for key in SETTING_KEYS if key in base.config},
        "config_differences": _config_differences(runs),
        "parting_keys": sorted({key for run in runs for key in parting_keys(run, base)}),
        "curves": {run.name: _curves(run, base) for run in runs},
    }
    report = runs_words.with_words(report)
    wide, narrow = runs_figure.figure(report), runs_figure.figure(report, NARROW)
    contents = {"json": json_bytes(report), "png": wide, "html": runs_words.html_page(report, wide, narrow)}
    out = Path(out)
    folder, stem = (out.parent, out.stem) if out.suffix == ".html" else (out, "report")
    files = {suffix: folder / f"{stem}.{suffix}" for suffix in contents}
    write_results({files[suffix]: content for suffix, content in contents.items()})
    return {**report, "files": {suffix: str(path) for suffix, path in files.items()}}


def _names(runs: list[Run]) -> str:
    return ", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"


def _read_runs(workdirs: list[Path]) -> list[Run]:
    if not workdirs:
        raise PrenormError("no run to compare: name at least one workdir")
    for index, workdir in enumerate(workdirs):
        if workdir.resolve() in [earlier.resolve() for earlier in workdirs[:index]]:
            raise PrenormError(f"{workdir} is named twice: name each workdir once")
    names = [Path(os.path.abspath(workdir)).name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in workdirs]
    return [_read_run(workdir, name) for workdir, name in zip(workdirs, names, strict=True)]


def _read_run(workdir: Path, name: str) -> Run:
    if not workdir.is_dir():
        raise PrenormError(f"{workdir} is not a folder: name the workdir of a run")
    if not (workdir / "config.json").is_file():
        raise PrenormError(f"{workdir} has no config.json: name the workdir of a run")
    config = _read_flat(workdir / "config.json")
    for key in ("batch_size", "data.seq_len"):
        _check(workdir / "config.json", key, config.get(key, 0) or 0, int)
    info = _read_flat(workdir / "run.json") if (workdir / "run.json").is_file() else {}
    sessions = info.get("sessions") or []
    _check(workdir / "run.json", "sessions", sessions, list)
    for session in sessions:
        _check(workdir / "run.json", "a session", session or 0, dict)
        for key, kind in {"step": int, "norm": str, "settings": dict}.items():
            _check(
                workdir / "run.json",
                f"a session's {key}",
                session.get(key, kind() if key == "settings" else None),
                kind,
            )
    if not (workdir / "metrics.jsonl").is_file():
        raise PrenormError(f"{workdir} holds no training (no metrics.jsonl): train in it, or leave it out")
    return Run(name, workdir, config, info, sessions, *_read_metrics(workdir / "metrics.jsonl"))


def _read_flat(path: Path) -> dict[str, Any]:
    try:
        return flatten(read_json(path))
    except PrenormError as error:
        raise PrenormError(f"{error}, or leave this run out") from error


def _check(path: Path, what: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        text = f"{path} is damaged: {what} is {_text(value)[:40]}, no {kind.__name__}"
        raise PrenormError(f"{text}; restore it from a copy, or leave this run out")


def _read_metrics(path: Path) -> tuple[Any, ...]:
    """The unit, then the series that `Run` lists, by step; a resumed run's last line of a step wins."""
    keys = ("loss", "eval_loss", "eval_top1", "units_per_s", "learning_rate", "skipped")
    unit, series = "unit", {key: {} for key in keys}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode())
            if not isinstance(entry, dict) or type(entry.get("step")) is not int or not 0 <= entry["step"] < 2**53:
                raise ValueError("not an object with a whole number as step")
            if "loss" in entry:
                numbers = (_number(entry.get(key, 0)) for key in ("loss", "grad_norm", "param_norm"))
                series["skipped"][entry["step"]] = not all(map(math.isfinite, numbers))
            for key, value in entry.items():
                if rate := _RATE.fullmatch(key):
                    unit, key = rate[1], "units_per_s"
                if key in series:
                    series[key][entry["step"]] = _number(value)
        except (ValueError, OverflowError, RecursionError) as error:
            if number == len(lines):  # no newline follows: a crash cut this line short
                break
            raise PrenormError(f"{path}, line {number}: {error}; repair or delete this line") from error
    if not series["loss"]:
        raise PrenormError(f"{path} holds no training line: train in {path.parent}, or leave it out")
    return unit, *(dict(sorted(values.items())) for values in series.values())


def _number(value: Any) -> float:
    if value is None:  # how strict JSON writes NaN
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _reference(runs: list[Run], reference: str | Path | None) -> Run:
    if reference is None:
        return next((run for run in runs if run.config.get("model.norm") == "layernorm"), runs[0])
    for run in runs:
        if run.workdir.resolve() == Path(reference).resolve():
            return run
    raise PrenormError(f"the reference {reference} is not among the runs: name its workdir with the others too")


def _row(run: Run, base: Run) -> dict[str, Any]:
    """A run's numbers. None: unknown, not finite, or a difference of the reference from itself."""
    last = list(run.losses.values())[-FINAL_STEPS:]
    skipped = [step for step, left_out in run.skipped.items() if left_out]
    nonfinite = [step for step, loss in run.losses.items() if not math.isfinite(loss)]
    changes = [abs(after - before) for before, after in itertools.pairwise(run.losses.values())]
    final_eval = max(run.evals, default=None)
    best_eval = min((step for step in run.evals if math.isfinite(run.evals[step])), key=run.evals.get, default=None)
    rates = list(run.rates.values())[len(run.rates) // 10 :]  # warming up slows the first ones
    units_per_s = _median(filter(math.isfinite, rates))
    units_per_step = (run.config.get("batch_size") or 0) * (run.config.get("data.seq_len", 1) or 0)  # images: one each
    return {
        "name": run.name,
        "workdir": str(run.workdir),
        "norm": str(run.config.get("model.norm", "–")),
        "switches": _switches(run),
        "changes": run.changes(),
        "parameterization": str(run.config.get("parameterization", "–")),
        "dtype": str(run.config.get("model.dtype", "–")),
        "parameters_trained": run.info.get("parameters.trained"),
        "parameters_computed": run.info.get("parameters.computed"),
        "device": run.info.get("device"),
        "versions": {key[9:]: version for key, version in run.info.items() if key.startswith("versions.")},
        "last_step": max(run.losses),
        "final_loss": _finite(math.fsum(last) / len(last)) if all(map(math.isfinite, last)) else None,
        "final_eval_loss": None if final_eval is None else _finite(run.evals[final_eval]),
        "final_eval_step": final_eval,
        "best_eval_loss": None if best_eval is None else run.evals[best_eval],
        "best_eval_step": best_eval,
        "nonfinite_losses": len(nonfinite),
        "first_nonfinite_step": nonfinite[0] if nonfinite else None,
        "skipped_updates": len(skipped),
        "first_skipped_step": skipped[0] if skipped else None,
        "change_per_step": _median(filter(math.isfinite, changes)),
        **_differences(run, base),
        "final_eval_top1": _finite(run.top1s[max(run.top1s)]) if run.top1s else None,
        "units_per_s": units_per_s,
        "steps_per_s": units_per_s / units_per_step if units_per_s and units_per_step else None,
    }


def _differences(run: Run, base: Run) -> dict[str, Any]:
    """The sizes of a run's differences from the reference; none of the reference from itself.

    They are of the steps up to which both are trained alike ("alike_until"; None: all); if these are none, of all.
    """
    if not run.losses.keys() & base.losses.keys():
        raise PrenormError(f"{run.workdir} has no step in common with the reference {base.workdir}: leave it out")
    if run.unit != base.unit and "unit" not in (run.unit, base.unit):
        raise PrenormError(
            f"the losses of {run.workdir} are per {run.unit}, those of the reference {base.workdir} per {base.unit}: "
            "compare runs of one kind of data, or leave it out"
        )
    until, parted_by = alike_until(run, base)
    finite = {step: math.isfinite(run.losses[step]) for step in run.losses.keys() & base.losses.keys()}
    deltas, evals = ({}, {}) if run is base else (_deltas(run.losses, base.losses), _deltas(run.evals, base.evals))
    if until:
        deltas, evals, finite = ({s: one[s] for s in one if s <= until} for one in (deltas, evals, finite))
    largest, final_eval = max(deltas, key=lambda step: abs(deltas[step]), default=None), max(evals, default=None)
    return {
        "alike_until": until,
        "parted_by": parted_by,
        "diverged": any(finite[step] != math.isfinite(base.losses[step]) for step in finite),
        "common_steps": len(deltas),
        "first_abs_delta": abs(next(iter(deltas.values()))) if deltas else None,
        "median_abs_delta": _median(map(abs, deltas.values())),
        "max_abs_delta": None if largest is None else abs(deltas[largest]),
        "max_abs_delta_step": largest,
        "final_eval_abs_delta": None if final_eval is None else abs(evals[final_eval]),
        "final_eval_abs_delta_step": final_eval,
    }


def _switches(run: Run) -> list[dict[str, Any]]:
    """The steps at which training went on with another norm."""
    return [
        {"step": after["step"], "from": before["norm"], "to": after["norm"]}
        for before, after in itertools.pairwise(run.starts)
        if after["norm"] != before["norm"]
    ]


def _deltas(values: dict[int, float], reference: dict[int, float]) -> dict[int, float]:
    """The differences by step, where both are finite."""
    deltas = {step: value - reference[step] for step, value in values.items() if step in reference}
    return {step: delta for step, delta in deltas.items() if math.isfinite(delta)}


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _curves(run: Run, base: Run) -> dict[str, list[list[Any]]]:
    """All that the figure shows, as pairs of step and value."""
    curves = {"loss": run.losses, "eval_loss": run.evals}
    if run is not base:
        curves["delta_loss"] = _deltas(run.losses, base.losses)
        curves["delta_eval_loss"] = _deltas(run.evals, base.evals)
    return {key: [[step, _finite(value)] for step, value in values.items()] for key, values in curves.items()}


def _config_differences(runs: list[Run]) -> dict[str, dict[str, str]]:
    keys = sorted(set().union(*(run.config for run in runs)) - COMPARED_KEYS)
    texts = {key: {run.name: _text(run.config.get(key, "–")) for run in runs} for key in keys}
    return {key: values for key, values in texts.items() if len(set(values.values())) > 1}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
