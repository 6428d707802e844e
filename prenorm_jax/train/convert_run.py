"""A run's checkpoint as a workdir of another norm."""

import contextlib
import dataclasses
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.files import write_json
from prenorm_jax.base.trees import count
from prenorm_jax.equivalence.choice import Choice, stored_choices, with_choice
from prenorm_jax.equivalence.convert import convert_config
from prenorm_jax.equivalence.stored import Readable, convert_stored
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import NORMS, ModelConfig
from prenorm_jax.models.coordinates import KINDS
from prenorm_jax.models.registry import build_model, family
from prenorm_jax.train.checkpoint import Checkpoints, check_place
from prenorm_jax.train.workdir import SOURCE, configure_jax, load_config

COMPARED_BYTES = 2**29  # the parameters of two models and their logits, computed in one process


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    step: int | None = None,
    materialize: bool = False,
    reset_optimizer: bool = False,
    coordinates: str | None = None,
    keep_affine: bool = False,
) -> None:
    """Writes folder `target` with the checkpoint of run `source` as the parameters of norm `to`; prints what it did.

    `target` is a workdir that eval.py and train.py accept: it trains the converted parameters themselves
    (parameterization native). With `materialize` a run may also be "converted" to the norm that it computes, which
    writes the parameters that its Pre-LN ones stand for. Parameters are read, converted and written in parts, so that
    they may be larger than memory.

    The coordinates of crmsnorm's stream are those that round the least with these weights (`equivalence/choice.py`), or
    `coordinates`: drop or reflect, with a colon and an entry or not, as reflect:7. With `keep_affine` the norms keep
    their scales and biases, where otherwise these are folded into what the norms feed; not under crmsnorm.

    The optimizer state is carried over, exactly, where the stored tree is: a pre_ln run to layernorm. Elsewhere its
    moments, being those of other parameters, have no exact equivalent: the optimizer starts anew, which for a native
    run has to be asked for with `reset_optimizer`. Raises PrenormError; `target` is then not made.
    """
    target = Path(target)
    check_asked(source, target, to, coordinates)
    config = load_config(source)
    configure_jax(config)

    with Checkpoints(source, read_only=True) as checkpoints:

        def write(step: int) -> int:
            metadata, model = checkpoints.metadata(step), checkpoints.model(step)
            would_lose = "optimizer" in metadata["digests"] and not reset_optimizer
            _check_wanted(source, config, model.norm, to, materialize, would_lose)
            chosen = {}
            if to == "crmsnorm" and model.norm != to:
                if coordinates is None:
                    with checkpoints.leaves(step) as stored:
                        model, chosen = chosen_coordinates(stored, model)
                else:
                    model, chosen = stated_coordinates(model, coordinates)
            new_model = model if to == model.norm else convert_config(model, to, keep_affine)
            with in_the_making(target) as folder:
                _write(source, checkpoints, step, folder, target, model, new_model, keep_affine)
                take_source_along(Path(source), folder, target, config)
                write_about(folder, config, new_model, {"converted_from": str(source), "sessions": []} | chosen)
            return step

        step = checkpoints.of(step, write)
    if not family(config.model.family).config_class.trains:
        return
    made = shlex.quote(str(target))
    print(f"evaluate: python eval.py --workdir={made}")
    print(f"train on: python train.py --workdir={made} --config.steps=N   (now at step {step} of {config.steps})")


def check_asked(source: str | Path, target: Path, to: str, coordinates: str | None) -> None:
    """Raises PrenormError for what cannot be meant, whatever the source is."""
    check_choice("--to", to, NORMS)
    if coordinates is not None:
        check_choice("--coordinates", coordinates.partition(":")[0], KINDS)
        if to != "crmsnorm":
            raise PrenormError(f"--coordinates says something of --to=crmsnorm alone: leave it out for {to}")
    if target.exists():
        raise PrenormError(f"{target} exists: name a new folder")
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise PrenormError(f"{target} lies in {source}, the run that is converted: name a folder beside it")
    check_place(target)


def write_about(folder: Path, config: ConfigDict, model: ModelConfig, made: dict[str, Any]) -> None:
    """Writes config.json and run.json of the converted run; `made`: what the second says of how it was made."""
    parameterization = "pre_ln" if model.norm == "layernorm" else "native"
    changed = {"model": dataclasses.asdict(model), "parameterization": parameterization}
    write_json(folder / "config.json", config.to_dict() | changed)
    counts = dict.fromkeys(("trained", "computed"), count(param_shapes(model)))
    write_json(folder / "run.json", {"norm": model.norm, "parameters": counts} | made)


def take_source_along(workdir: Path, folder: Path, target: Path, config: ConfigDict) -> None:
    """Copies what an imported checkpoint came with, for its export, and names the tokenizer's new place.

    `folder` will be `target`.
    """
    if not (workdir / SOURCE).is_dir():
        return
    shutil.copytree(workdir / SOURCE, folder / SOURCE)
    tokenizer = Path(config.data.tokenizer) if "tokenizer" in config.data else workdir
    if tokenizer.is_file() and tokenizer.parent == workdir.absolute():
        shutil.copyfile(tokenizer, folder / tokenizer.name)
        config.data.tokenizer = str(target.absolute() / tokenizer.name)


def _check_wanted(
    source: str | Path, config: ConfigDict, stored: str, to: str, materialize: bool, would_lose: bool
) -> None:
    """Raises PrenormError if the run has the norm already, or would lose an optimizer's state that is its own."""
    if to == config.model.norm and not (materialize and to != stored):
        why = "there is nothing to convert"
        if to == "crmsnorm":
            why += "; for other coordinates convert it to rmsnorm, and that to crmsnorm"
        if to != stored:
            why = f"it trains its Pre-LN parameters; add --materialize to write the {to} parameters that they stand for"
        raise PrenormError(f"{source} is {to} already: {why}")
    if would_lose and to != stored and config.parameterization == "native":
        raise PrenormError(
            f"the optimizer state of {source} belongs to its {stored} parameters and has no exact equivalent for {to}: "
            "add --reset-optimizer to start it anew"
        )


def chosen_coordinates(stored: Readable, model: ModelConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """The model with the coordinates that round the least, for which all weights are read; and run.json's words."""
    choices = stored_choices(stored, model)
    best, last = choices[0], model.d_model - 1
    papers = next(choice.error for choice in choices if choice[:2] == ("drop", last))
    error = f"{best.error:.2f} times rmsnorm's, dropping the last {papers:.2f}"
    print(f"coordinates: {best.kind} entry {best.entry}; rounding predicted: {error}")
    return with_choice(model, best), {"coordinates": best._asdict()}


def stated_coordinates(model: ModelConfig, asked: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The same of coordinates that are asked for, as reflect:7: no weight is read, and nothing predicted."""
    last, (kind, _, entry) = model.d_model - 1, asked.partition(":")
    if entry and not (entry.isdecimal() and int(entry) <= last):
        raise PrenormError(f"--coordinates={asked}: name an entry from 0 to {last}, as in {kind}:{last}")
    stated = Choice(kind, int(entry or last), None)
    print(f"coordinates: {stated.kind} entry {stated.entry}, as asked for")
    return with_choice(model, stated), {"coordinates": stated._asdict()}


def _write(
    source: str | Path,
    checkpoints: Checkpoints,
    step: int,
    folder: Path,
    target: Path,
    model: ModelConfig,
    new_model: ModelConfig,
    keep_affine: bool,
) -> None:
    """Writes the checkpoint into `folder`, which will be `target`, and prints what it did."""
    metadata, shapes = checkpoints.metadata(step), param_shapes(new_model)
    if model.norm == new_model.norm:
        checkpoints.copy(step, folder)
        print(f"{source} stores its {model.norm} parameters: they and the optimizer state are carried over as they are")
        return
    known = [metadata.get(key) for key in ("nonfinite", "data", "vocabulary")]
    with (
        Checkpoints(folder) as made,
        made.save_leaves(step, shapes, new_model, *known) as new,
        checkpoints.leaves(step) as stored,
    ):
        convert_stored(stored, new, model, new_model.norm, keep_affine=keep_affine)
    print(f"{source} at step {step}: {model.norm}, {count(param_shapes(model)):,} parameters")
    print(f"{target}: {new_model.norm}, {count(shapes):,} parameters")
    with Checkpoints(folder, read_only=True) as made:
        compare(model, lambda: (checkpoints.params(step), made.params(step)))
    if "optimizer" in metadata["digests"]:
        print("the optimizer state is not carried over: its moments are the old parameters' and start anew")


def compare(model: ModelConfig, both: Callable[[], Iterable[tuple[ModelConfig, Any]]]) -> None:
    """Prints how far the logits of two trees are apart, if these are small enough to be held in memory.

    `both` gives the config and the tree of each; `model` is the first's config.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in param_shapes(model).values())
    if size > COMPARED_BYTES:
        print(f"their logits are not compared, for that takes all of the {size / 1e9:.1f} GB at once: eval.py does")
        return
    inputs = build_model(model).example(batch=2, seed=0)
    old, new = (jax.jit(build_model(config).apply)({"params": params}, inputs) for config, params in both())
    difference = float(jnp.abs(old - new).max() / jnp.abs(old).max())
    print(f"largest difference of their logits on random inputs: {difference:.1e} of the largest ({model.dtype})")


@contextlib.contextmanager
def in_the_making(target: Path) -> Iterator[Path]:
    """A folder beside `target`, moved there on leaving, or removed after an error: it is never seen half-written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    place = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True)
    try:
        with place as temporary:
            (folder := Path(temporary) / target.name).mkdir()  # whose rights are those of any folder
            yield folder
            folder.rename(target)
    except BaseException:
        for _ in range(10):  # TensorStore's other writers, for which nobody can wait, make anew the folders they need
            time.sleep(0.1)
            shutil.rmtree(place.name, ignore_errors=True)
        raise
