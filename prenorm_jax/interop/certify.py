"""Evidence that a workdir's checkpoint computes what its source does: numbers, bounds, and a control that must fail.

certificate.json    all of it
certificate.html    the page
certificate.npz     the probes, and the reference's outputs: with them it is verified where its library is not
"""

import dataclasses
import hashlib
import io
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, check_choice, check_range
from prenorm_jax.base.files import check_folder, json_bytes, read_json, write_together
from prenorm_jax.base.trees import count
from prenorm_jax.equivalence.roles import parameter_roles
from prenorm_jax.interop import certificate_page
from prenorm_jax.interop.checkpoint import dtype_of, foreign
from prenorm_jax.interop.files import is_workdir, open_source
from prenorm_jax.interop.forms import (
    Evaluated,
    Form,
    check_comparable,
    converted,
    difference,
    evaluate,
    form_of,
    pre_ln,
    same_leaves,
    sha256_of,
    swapped,
)
from prenorm_jax.interop.probe_inputs import Probe, compared_positions, probes_of
from prenorm_jax.interop.probes import shifted
from prenorm_jax.interop.reference import Reference, by_library, why_not
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.flops import model_flops, norm_operations
from prenorm_jax.report.runs_words import two_digits
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.workdir import configure_jax, device_name

EXACT = 1e-9  # relative, in float64: of what differs in the order of operations alone, and is 1e-15 to 1e-13
# Of rounding: what a form may err, relative to what Pre-LN itself errs in the same dtype. With coordinates that are
# chosen it is .98 to 1.14 times that in the mean square; the largest of many errors varies by 2.
MULTIPLE = 4.0
POWER = 2.0  # times the largest bound: by so much, at least, the control must miss
REFERENCES = ("auto", "library", "own")
VERSIONS = ("prenorm_jax", "jax", "jaxlib", "flax", "numpy")


class Side(NamedTuple):
    """A source or a result: its form as it is stored, and what of it is to be written down."""

    form: Form
    dtype: str
    about: dict[str, Any]
    folder: Path | None = None  # of another library's


def certify_checkpoint(
    workdir: str | Path,
    source: str | Path,
    step: int | None = None,
    length: int | None = None,
    reference: str = "auto",
) -> dict[str, Any]:
    """Compares a workdir's checkpoint with its source, and writes the certificate beside it.

    Args:
      workdir: of a run, or of a converted or imported checkpoint.
      source: another library's checkpoint, or another workdir.
      step: which checkpoint of `workdir`; None: the latest.
      length: tokens of each probe; None: all that the model has positions for, where their logits fit.
      reference: library, the source's own, computes the outputs that count; own, our import of it in float64 does;
        auto: the library where it is installed, else what it gave for an earlier certificate, else ours.

    Returns:
      What certificate.json holds; its "verdict" is PASS or FAIL.

    Raises:
      PrenormError: for what is no workdir or source, for two that take different inputs, and where nothing can be
        written.
    """
    check_choice("--reference", reference, REFERENCES)
    configure_jax(ConfigDict({"model": {}}))
    with jax.enable_x64(True):
        return _certify(Path(workdir), source, step, length, reference)


def _certify(workdir: Path, name: str | Path, step: int | None, length: int | None, how: str) -> dict[str, Any]:
    if is_workdir(name) and Path(name).resolve() == workdir.resolve():
        raise PrenormError(f"{workdir} is named twice: name what it was made from as the source")
    result = _of_workdir(workdir, step)
    check_folder(workdir, "WORKDIR")
    source = _of_workdir(Path(name), None) if is_workdir(name) else _of_library(name)
    check_comparable(result.form.config, source.form.config)
    if how == "library" and source.folder is None:
        raise PrenormError(f"{name} is a workdir, which no other library computes: leave out --reference=library")
    if source.form.config.inputs == "text":
        check_range("--length", length, at_least=1, below=source.form.config.max_len + 1)
    plain = pre_ln(source.form.cast("float64"))
    probes = probes_of(plain.config, length)
    positions = compared_positions(plain.config, probes)
    ours = evaluate(plain, probes, positions)
    expected, note = _reference(workdir, source, name, probes, positions, ours, how)
    measured = _measure(result, source, plain, probes, positions, ours, expected)
    inputs = np.stack([probe.inputs for probe in probes])
    kept = io.BytesIO()
    np.savez(kept, inputs=inputs, positions=positions, outputs=expected.outputs)
    report = {
        "verdict": "FAIL" if measured["failures"] else "PASS",
        "title": f"{workdir.absolute().name} beside {Path(name).name}",
        "workdir": str(workdir),
        "source": str(name),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": _named_output(plain.config),
        **measured,
        "reference": {
            "by": expected.by,
            "of_library": expected.of_library,
            "note": note,
            "versions": expected.versions,
            "sha256": hashlib.sha256(kept.getvalue()).hexdigest(),
        },
        "probes": [{"name": probe.name, "for": probe.why, "shape": list(probe.inputs.shape)} for probe in probes],
        "compared": {"positions": len(positions), "of": inputs.shape[2] if plain.config.token_outputs else 1},
        "bounds": {"exact": EXACT, "multiple": MULTIPLE, "power": POWER},
        "sizes": {"source": _sizes(source, probes), "result": _sizes(result, probes)},
        "files": {"source": source.about, "result": result.about},
        "device": device_name(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
    }
    page, picture = certificate_page.html_page(report)
    contents = {".json": json_bytes(report), ".html": page, ".png": picture, ".npz": kept.getvalue()}
    write_together({workdir / f"certificate{suffix}": content for suffix, content in contents.items()})
    return report


def _of_workdir(workdir: Path, step: int | None) -> Side:
    with Checkpoints(workdir, read_only=True) as checkpoints:

        def read(step: int) -> tuple[int, str, Form]:
            digest = checkpoints.metadata(step)["digests"]["params"]
            return step, digest, form_of(*checkpoints.params(step))

        step, digest, form = checkpoints.of(step, read)
    about = {"what": f"{workdir} at step {step}", "step": step, "digest": digest, "sha256": sha256_of(form.params)}
    return Side(form, form.config.param_dtype, about)


def _of_library(name: str | Path) -> Side:
    found = foreign(open_source(name), "float64")
    params = {path: found.leaves.read(path) for path in param_shapes(found.model)}
    dtype = dtype_of(found.source, "keep")
    written = [*found.source.folder.glob("config.json"), *found.source.files]  # beside an .npz there is none
    files = {path.name: _sha256_of_file(path) for path in written}
    about = {"what": f"{name} ({found.family.model_type}, {dtype})", "files": files}
    return Side(form_of(found.model, unflatten_dict(params)), dtype, about, found.source.folder)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named_output(model: ModelConfig) -> str:
    if model.inputs == "text" and not model.token_outputs:
        return "pooled output"
    has_head = model.tie_embeddings or any(path[0] == "head" for path in param_shapes(model))
    return "logits" if has_head else "features"


def _reference(
    workdir: Path,
    source: Side,
    name: str | Path,
    probes: list[Probe],
    positions: np.ndarray,
    ours: Evaluated,
    how: str,
) -> tuple[Reference, str]:
    """What is compared with, and why it is not the source's own library, if it is not."""
    own = Reference(ours.outputs, "our own Pre-LN form of the source, in float64", False, {})
    if source.folder is None:
        return own, "the source is a workdir"
    if how == "own":
        return own, "asked for"
    inputs, note = np.stack([probe.inputs for probe in probes]), why_not(source.folder, str(name), source.form.config)
    if not note:
        try:
            return by_library(source.folder, source.form.config, inputs, positions), ""
        except PrenormError as error:
            note = str(error)
    if how == "library":
        raise PrenormError(f"--reference=library: {note}: install it, mend that, or leave the flag out")
    kept = _kept(workdir, source, inputs, positions)
    return (kept, note) if kept else (own, note)


def _kept(workdir: Path, source: Side, inputs: np.ndarray, positions: np.ndarray) -> Reference | None:
    """What the source's library gave for an earlier certificate, if that was of the same source and probes."""
    try:
        report, content = read_json(workdir / "certificate.json"), (workdir / "certificate.npz").read_bytes()
        reference = report["reference"]
        if not reference["of_library"] or report["files"]["source"]["files"] != source.about["files"]:
            return None
        if hashlib.sha256(content).hexdigest() != reference["sha256"]:
            return None
        with np.load(io.BytesIO(content)) as arrays:
            if not (np.array_equal(arrays["inputs"], inputs) and np.array_equal(arrays["positions"], positions)):
                return None
            by = reference["by"]
            by += "" if " (kept" in by else f" (kept from the certificate of {report['date']})"
            return Reference(arrays["outputs"], by, True, reference["versions"])
    except (PrenormError, OSError, KeyError, TypeError, ValueError):
        return None


def _measure(
    result: Side,
    source: Side,
    plain: Form,
    probes: list[Probe],
    positions: np.ndarray,
    ours: Evaluated,
    expected: Reference,
) -> dict[str, Any]:
    """The rows of numbers with their bounds, the norms, the control, and what fails."""

    def row(what: str, form: Form, evaluated: Evaluated, bound: float | None) -> dict[str, Any]:
        numbers = difference(evaluated.outputs, expected.outputs)
        holds = None if bound is None else numbers["relative"] is not None and numbers["relative"] <= bound
        return (
            {"what": what, "norm": form.config.norm, "dtype": form.config.dtype}
            | numbers
            | {
                "bound": bound,
                "holds": holds,
            }
        )

    stored, dtypes = result.dtype, list(dict.fromkeys(["float64", "float32", result.dtype]))
    rows, failures, seen, rounding = [], [], {}, {}
    rows.append(row("source, Pre-LN", plain, ours, EXACT if expected.of_library else None))
    for dtype in dtypes[1:]:
        form = plain.cast(dtype)
        rows.append(row("source, Pre-LN", form, evaluate(form, probes, positions), None))
        rounding[dtype] = max(rows[-1]["relative"] or 0.0, _epsilon(dtype))
    rounding.setdefault("float64", EXACT / MULTIPLE)
    leaves = None
    try:
        exact = converted(plain, result.form.config)
    except PrenormError as error:
        failures.append(f"the networks differ: {error}")
    else:
        leaves = same_leaves(result.form, exact)
        bound = EXACT if source.form.config.norm == "layernorm" else MULTIPLE * rounding[_coarser("float32", stored)]
        rows.append(row("conversion", exact, evaluate(exact, probes, positions), bound))
    for dtype in dtypes:
        form = result.form.cast(dtype)
        seen[dtype] = evaluate(form, probes, positions)
        bound = MULTIPLE * rounding[_coarser(dtype, stored)]
        rows.append(row("checkpoint", form, seen[dtype], bound))
    failures += [_failure(one) for one in rows if one["holds"] is False]
    control = _control(plain, probes, positions, expected, max(one["bound"] or 0.0 for one in rows))
    if not control["power"]:
        failures.append("the test has no power: the control is not far off")
    norms = _norms(ours, seen["float64"], seen[stored], result.form.config.epsilon)
    stated = {"rows": rows, "control": control, "failures": failures, "norms": norms, "stored_dtype": stored}
    return stated | {"leaves": None if leaves is None else {"as_converted": leaves[0], "of": leaves[1]}}


def _failure(row: Mapping[str, Any]) -> str:
    size = "not finite" if row["relative"] is None else f"off by {two_digits(row['relative'])} of the largest"
    return f"the {row['what']} ({row['norm']}) in {row['dtype']} is {size}; the bound is {two_digits(row['bound'])}"


def _control(
    plain: Form, probes: list[Probe], positions: np.ndarray, expected: Reference, bound: float
) -> dict[str, Any]:
    """The norms swapped and nothing recentred. Where the source has no mean to miss, one is given to it first."""
    control: dict[str, Any] = {"power": False}
    for first in (False, True):
        if not control["power"]:
            flat = flatten_dict(plain.params)
            flat = shifted(flat, parameter_roles(plain.config)) if first else flat
            naive = evaluate(swapped(Form(plain.config, unflatten_dict(flat))), probes, positions)
            numbers = difference(naive.outputs, expected.outputs)
            far = numbers["relative"] is None or numbers["relative"] >= POWER * bound
            control = {"mean_given_first": first, "power": far, **numbers}
    return control


def _norms(before: Evaluated, exact: Evaluated, stored: Evaluated, epsilon: float) -> list[dict[str, Any]]:
    """For each norm on the stream the largest |mean| of what it is given, under the source and under the result."""
    return [
        {
            "norm": site,
            "epsilon": epsilon,
            "size": size,
            "mean_in_source": before.means.get(site, (None,))[0],
            "mean_float64": mean,
            "mean_stored_dtype": stored.means[site][0],
        }
        for site, (mean, size) in exact.means.items()
    ]


def _sizes(side: Side, probes: list[Probe]) -> dict[str, Any]:
    """Of the stored form: parameters, and FLOPs of one probe's forward pass."""
    config, length = side.form.config, probes[0].inputs.shape[1]
    return {
        "norm": config.norm,
        "dtype": side.dtype,
        "width": config.stream_width,
        "parameters": count(param_shapes(config)),
        "flops": model_flops(dataclasses.replace(config), 1, length, training=False),
        "norm_operations": norm_operations(config) * config.tokens(length),
        "tokens": config.tokens(length),
    }


def _epsilon(dtype: str) -> float:
    return float(jax.numpy.finfo(dtype).eps)


def _coarser(one: str, other: str) -> str:
    return max(one, other, key=_epsilon)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a clone that is not installed
        return "of a clone"
