"""A foreign checkpoint as a workdir, of whatever norm, that the commands accept.

Beside what every workdir has, it keeps the source's tokenizer (`tokens.py`), and in `source/` what an export takes
along: config.json, tokenizer, licence and model card as they came, and

    checkpoint.json      where it came from, the headers of its files, the digest of the parameters as they were, and of
                         a language model how its source begins and ends texts
    rest.safetensors     what of its tensors is in no leaf of ours: rows (`n@2`), small ones that say nothing new, and
                         what the family takes along
"""

import dataclasses
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from prenorm_jax.base.files import write_json
from prenorm_jax.base.trees import count
from prenorm_jax.config import base_config
from prenorm_jax.data.tokenizer import NONE
from prenorm_jax.equivalence.convert import convert_config
from prenorm_jax.equivalence.stored import convert_stored, copy_stored
from prenorm_jax.interop.checkpoint import ForeignCheckpoint, dtype_of, foreign
from prenorm_jax.interop.files import open_source
from prenorm_jax.interop.preprocessing import Preprocessing, preprocessing, said
from prenorm_jax.interop.safetensors import NAMES, Entry, Header, create_file
from prenorm_jax.interop.tokens import ABOUT, TOKENIZER, SourceTexts
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.convert_run import (
    check_asked,
    chosen_coordinates,
    compare,
    in_the_making,
    stated_coordinates,
    write_about,
)
from prenorm_jax.train.workdir import SOURCE, configure_jax

REST = "rest.safetensors"
PART_SIZE = 2**20  # entries of a part, of which there are some copies: four times as many take twice the memory
KEPT_BYTES = 2**16  # of a tensor that says nothing new: masks are larger


def import_checkpoint(
    name: str | Path,
    target: str | Path,
    to: str,
    dtype: str | None = None,
    keep_dropout: bool = False,
    keep_affine: bool = False,
    coordinates: str | None = None,
) -> None:
    """Writes folder `target` with the checkpoint `name`, of another library, as parameters of norm `to`.

    Tensors are read, converted and written in parts, so that they may be larger than memory. Prints what it did.
    `name`, `dtype` and `keep_dropout` as of `checkpoint.load`, the others as of `train.convert_run.convert`. Raises
    PrenormError; `target` is then not made.
    """
    target = Path(target)
    check_asked(name, target, to, coordinates)
    source = open_source(name)
    configure_jax(ConfigDict({"model": {"dtype": dtype_of(source, dtype)}}))
    found = foreign(source, dtype, keep_dropout)
    model, made = found.model, {"imported_from": str(name), "sessions": []}
    if to == "crmsnorm":
        if coordinates is None:
            model, chosen = chosen_coordinates(found.leaves, model)
        else:
            model, chosen = stated_coordinates(model, coordinates)
        made |= chosen
    new_model = model if to == model.norm else convert_config(model, to, keep_affine)
    texts = SourceTexts.of(source.folder, source.config, model.vocab_size) if model.inputs == "text" else None
    config = run_config(new_model, target, texts)
    images = preprocessing(source, model) if model.inputs == "images" else None
    if images:
        images.set(config)
    with in_the_making(target) as folder:
        _write(found, folder, model, new_model, keep_affine, texts)
        write_about(folder, config, new_model, made)
        print(f"{name}: {found.family.model_type}, {count(param_shapes(model)):,} parameters, {found.dtype}")
        print(f"{target}: {new_model.norm}, {count(param_shapes(new_model)):,} parameters, {new_model.param_dtype}")
        if to != model.norm:
            with Checkpoints(folder, read_only=True) as new:
                compare(model, lambda: ((model, _params(found)), new.params(0)))
    _say_what_is_left(found, target, keep_dropout, config, images)
    print(f"proof: python -m prenorm_jax.certify {shlex.quote(str(target))} {shlex.quote(str(name))}")


def run_config(model: ModelConfig, target: Path, texts: SourceTexts | None) -> ConfigDict:
    """The configuration of a run of this model, without data: what `configs/finetune.py` starts from."""
    config = base_config(model.family)
    config.model.update(dataclasses.asdict(model))
    if texts is not None:
        config.data.tokenizer = str(target.absolute() / TOKENIZER) if texts.tokenizer else NONE
        config.data.eot_token = texts.eot_token
        config.data.seq_len = min(model.max_len, 1024)
        config.batch_size = 4  # of which the logits of 50,000 tokens take less than a GB
        config.optimizer.learning_rate = 5e-5  # the model is trained already
    return config


def _params(found: ForeignCheckpoint) -> dict[str, Any]:
    return unflatten_dict({path: found.leaves.read(path) for path in param_shapes(found.model)})


def _write(
    found: ForeignCheckpoint,
    folder: Path,
    model: ModelConfig,
    new_model: ModelConfig,
    keep_affine: bool,
    texts: SourceTexts | None,
) -> None:
    """Writes the checkpoint, the tokenizer and `source/` into a workdir."""
    with Checkpoints(folder) as made:
        with made.save_leaves(0, param_shapes(new_model), new_model) as new:
            if new_model.norm == model.norm:
                copy_stored(found.leaves, new, param_shapes(model), PART_SIZE)
            else:
                convert_stored(found.leaves, new, model, new_model.norm, PART_SIZE, keep_affine)
        digest = made.metadata(0)["digests"]["params"]
    (folder / SOURCE).mkdir()
    for path in found.source.small_files():
        shutil.copyfile(path, folder / SOURCE / path.name)
    _write_rest(found, folder / SOURCE)
    headers = {file: header._asdict() for file, header in _kept(found).items()}
    known = {"imported_from": found.source.name, "family": found.family.model_type, "dtype": found.dtype}
    known["config"] = found.source.config
    known["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    if texts is not None:
        known["texts"] = texts.ends._asdict()
        if texts.tokenizer:
            texts.tokenizer.save(str(folder / TOKENIZER))
    unchanged = digest if new_model.norm == model.norm else None
    write_json(folder / SOURCE / ABOUT, known | {"unchanged": unchanged, "headers": headers})


def _kept(found: ForeignCheckpoint) -> dict[str, Header]:
    """The headers of the source's files without what is not worth keeping: large tensors that say nothing new."""
    family = found.family

    def keep(name: str) -> bool:
        if name not in found.leaves.ignored or family.takes_along(family.name(name)):
            return True
        return found.source.tensors[name].nbytes <= KEPT_BYTES

    return {
        file: header._replace(tensors={name: entry for name, entry in header.tensors.items() if keep(name)})
        for file, header in found.source.headers.items()
    }


def _write_rest(found: ForeignCheckpoint, folder: Path) -> None:
    """Writes what of the source is in no leaf of ours, for an export to have it."""
    tensors, leaves = found.source.tensors, found.leaves
    rest = {
        name: tensors[name] for header in _kept(found).values() for name in header.tensors if name in leaves.ignored
    }
    rest |= {name: tensors[name][:rows] for name, rows in leaves.skipped.items()}
    header = Header({name: Entry(NAMES[array.dtype], array.shape) for name, array in rest.items()}, {})
    for name, place in create_file(folder / REST, header).items():
        place[...] = rest[name]


def _say_what_is_left(
    found: ForeignCheckpoint, target: Path, keep_dropout: bool, config: ConfigDict, images: Preprocessing | None
) -> None:
    if found.dropout and not keep_dropout:
        rates = ", ".join(f"{key} {value:g}" for key, value in found.dropout.items())
        print(f"dropout is left out, as nothing is recentred under it ({rates}): --dropout=keep keeps it")
    if unread := found.family.unread(found.source.config, found.source.shapes):
        print(f"not looked at in config.json, which should say nothing of the function: {', '.join(unread)}")
    if found.model.inputs == "images":
        print(*said(images, found.model, target), sep="\n")
        return
    if not found.model.trains:
        print("it fills masks and gives embeddings from Python: docs/checkpoints.md")
        return
    made, data = shlex.quote(str(target)), "--config.data.path=FILE --config.data.eval_path=FILE"
    print("it has no data and no optimizer: name data, and the optimizer starts anew")
    print(f"evaluate: python eval.py --workdir={made} {data}")
    finetune = shlex.quote(f"--config=configs/finetune.py:{target}")
    print(f"train on: python train.py {finetune} --workdir=NEW {data} --config.steps=N")
    if found.model.decodes and config.data.tokenizer == NONE:
        print("it came without a tokenizer that can be read: name one, too, with --config.data.tokenizer=FILE")
