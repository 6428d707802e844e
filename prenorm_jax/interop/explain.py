"""What conversion would do to a checkpoint, and why, from its config.json and its tensors' names: no weight is read."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import count
from prenorm_jax.equivalence.convert import convert_config
from prenorm_jax.equivalence.roles import parameter_roles
from prenorm_jax.folding.fold import fold
from prenorm_jax.interop.families import family_of
from prenorm_jax.interop.files import is_workdir, open_config, open_source, tower_of
from prenorm_jax.interop.leaves import ForeignLeaves
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import NORMS, ModelConfig
from prenorm_jax.report import table
from prenorm_jax.train.checkpoint import Checkpoints

Report = Mapping[str, Any]


def explain(name: str | Path | Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What would become of each norm of a checkpoint, of its ties and of its parameter count.

    `name`: a workdir, or another library's folder, file or name on the hub, of which config.json alone is fetched. Or a
    JAX function, with its parameters and inputs or their shapes: then it is what `fold` reports of its LayerNorms.

    Raises PrenormError, with the reason, for what cannot be converted: a family that has no table, or no equivalent, a
    value of config.json that no model here computes, tensors that are not the config's.
    """
    if callable(name):
        return fold(name, *args).report.as_dict()
    with jax.enable_x64(True):  # for what is of float64
        return _explain(name)


def _explain(name: str | Path) -> dict[str, Any]:
    notes: list[str] = []
    if is_workdir(name):
        model, kind, dropout = _of_workdir(name), "workdir", {}
    else:
        model, kind, dropout = _of_library(name, notes)
    model = dataclasses.replace(model, scan=False)  # each block by its name
    others = {norm: model if norm == model.norm else convert_config(model, norm) for norm in NORMS}
    leaves = {norm: param_shapes(config) for norm, config in others.items()}
    added = {
        norm: {"/".join(path): leaf.size for path, leaf in found.items() if path not in leaves[model.norm]}
        for norm, found in leaves.items()
    }
    if dropout:
        rates = ", ".join(f"{key} {value:g}" for key, value in dropout.items())
        notes.append(f"dropout ({rates}) is left out, since what it drops out has to be centred at run time")
    return {
        "source": str(name),
        "kind": kind,
        "norm": model.norm,
        "dtype": model.param_dtype,
        "depth": model.depth,
        "width": model.d_model,
        "norms": norm_sites(model),
        "embedding": _embedding(model),
        "tie": _tie(model),
        "parameters": {norm: count(found) for norm, found in leaves.items()},
        "added": added,
        "notes": notes,
    }


def _of_workdir(name: str | Path) -> ModelConfig:
    with Checkpoints(name, read_only=True) as checkpoints:
        return checkpoints.of(None, checkpoints.model)


def _of_library(name: str | Path, notes: list[str]) -> tuple[ModelConfig, str, dict[str, float]]:
    """The Pre-LN model, its family's name, the dropout that is left out. Adds to the notes."""
    is_here = Path(tower_of(name)[0]).exists()
    _, _, config = open_config(name, weights=is_here)
    family, source = family_of(config), None
    try:
        if not is_here:
            raise PrenormError("of a name on the hub only config.json is fetched")
        source = open_source(name)
    except PrenormError as error:
        notes.append(f"the tensors' names were not looked at: {error}")
    shapes = {} if source is None else source.shapes
    given = family.model(config, shapes)
    model = family.model(config, shapes, **dict.fromkeys(given.rates, 0.0))
    if unread := family.unread(config, shapes):
        notes.append(f"not looked at in config.json, which should say nothing of the function: {', '.join(unread)}")
    if source is not None:
        leaves = ForeignLeaves(family, config, model, source.tensors, unread=True)
        widest = max((x.dtype for x in source.tensors.values() if jnp.issubdtype(x.dtype, jnp.floating)), key=_width)
        model = dataclasses.replace(model, param_dtype=widest.name)
        notes += [f"{len(leaves.ignored)} tensors say nothing new and are left out"] if leaves.ignored else []
        if absent := leaves.absent:
            kinds = ", ".join(dict.fromkeys("/".join(path[-2:]) for path in absent))
            numbers = sum(param_shapes(model)[path].size for path in absent)
            notes.append(f"{numbers:,} numbers are zero here, and in no tensor: {kinds}")
        if len(leaves.views.get(("token_embedding",), ())) > 1:
            notes.append("the tied head is in the file once more: it is taken only if it equals the table")
    return model, family.model_type, {rate: value for rate in given.rates if (value := getattr(given, rate))}


def _width(dtype: np.dtype) -> int:
    return jnp.finfo(dtype).nmant


def norm_sites(model: ModelConfig) -> list[dict[str, Any]]:
    """For each norm of a network its place, ε, whether it is folded or kept, what it feeds, and why."""
    roles, found = parameter_roles(model), {}
    has_affine = {role.norm.path for role in roles.values() if role.affine is not None}
    for path, role in roles.items():
        if role.reads is not None and role.norm is not None:
            site = found.setdefault(role.norm.path, {"epsilon": role.norm.epsilon, "feeds": []})
            site["feeds"].append(path[-2])
    sites = []
    for path, site in found.items():
        scale = "its γ and β go into" if model.norm_bias else "its γ goes into"
        becomes, why = "plain", "it has no γ or β: nothing to fold"
        if path in has_affine:
            becomes, why = "folded", f"{scale} {', '.join(site['feeds'])}"
        sites.append({"norm": "/".join(path), **site, "becomes": becomes, "why": why})
    output = _unfolded_output(model)
    if output and model.final_norm and not model.final_norm_affine:
        site = {"norm": "head_norm", "epsilon": model.epsilon, "feeds": [output]}
        sites.append(site | {"becomes": "plain", "why": "it has no γ or β: nothing to fold"})
    return sorted(sites, key=_place) + _kept_sites(model)


def _unfolded_output(model: ModelConfig) -> str:
    """What the final norm feeds, where that is no linear map of its own; "" where it is."""
    if model.final_norm_bias is not None:
        return ""
    if model.tie_embeddings:
        return "token_embedding"
    return "pooled_norm" if ("pooled_norm", "scale") in param_shapes(model) else "the output"


def _place(site: Report) -> tuple[int, str]:
    """The blocks in their order; what follows them; each block's norms by name."""
    block = site["norm"].partition("/")[0].removeprefix("block_")
    return (int(block) if block.isdecimal() else 2**16, site["norm"])


def _kept_sites(model: ModelConfig) -> list[dict[str, Any]]:
    """Those that no reader on the stream takes up."""
    kept: list[tuple[str, str, str]] = []
    output = _unfolded_output(model)
    if output and model.final_norm and model.final_norm_affine:
        whys = {"token_embedding": "the tied table cannot take them up", "pooled_norm": "what reads it is a norm"}
        kept.append(("head_norm", output, f"its γ and β stay: {whys.get(output, 'nothing that has weights reads it')}"))
    if model.embed_norm:
        feeds, why = "the stream", "it stays a LayerNorm, and its output is centred at run time"
        if not model.first_norm:
            feeds, why = "block 0's attention, the stream", f"{why}, for the stream alone"
        kept.append(("embedding_norm", feeds, why))
    if model.qk_norm:
        mean = "an RMSNorm over each head: the mean leaves the weights of query and key; its γ and β stay"
        sites = [(i, name) for i in range(model.depth) for name in ("query", "key")]
        kept += [(f"block_{i}/attention/{name}_norm", name, mean) for i, name in sites]
    behind = "it stays a LayerNorm: it is behind the pooling, not on the stream"
    if any(path[0] == "pool" for path in param_shapes(model)):
        kept.append(("pool/mlp_norm", "up", behind))
    if any(path[0] == "pooled_norm" for path in param_shapes(model)):
        kept.append(("pooled_norm", "head", behind))
    if ("transform_norm", "scale") in param_shapes(model):
        kept.append(("transform_norm", "the head", "it stays a LayerNorm: it is in the head, not on the stream"))
    keys = ("norm", "feeds", "why")
    return [
        {**dict(zip(keys, (name, [feeds], why), strict=True)), "epsilon": model.epsilon, "becomes": "kept"}
        for name, feeds, why in kept
    ]


def _embedding(model: ModelConfig) -> str:
    entering = [path for path in param_shapes(model) if len(path) == 1 and not path[0].startswith("head")]
    tables = ", ".join(path[0] for path in [*entering, *[("patch_embedding",)] * (model.inputs == "images")])
    if not model.raw_embedding:
        return f"{tables}: recentred, once and for all"
    return f"{tables}: left as it is, what it gives is centred at run time, once a token"


def _tie(model: ModelConfig) -> dict[str, Any] | None:
    if not model.tie_embeddings:
        return None
    shape = param_shapes(model)["token_embedding",].shape
    numbers = int(np.prod(shape))
    return {
        "table": list(shape),
        "broken": False,
        "would_add_parameters": numbers,
        "would_add_mb": numbers * jnp.dtype(model.param_dtype).itemsize / 1e6,
    }


def plain_text(report: Report) -> str:
    """For a terminal."""
    parameters, norm = report["parameters"], report["norm"]
    lines = [
        f"{report['source']}: {report['kind']}, {report['depth']} blocks of width {report['width']}, "
        f"{parameters[norm]:,} parameters ({norm}, {report['dtype']})",
        "",
        table.to_text([["norm", "ε", "feeds", "becomes", "why"], *_norm_rows(report["norms"])]),
        "",
        f"embedding: {report['embedding']}",
    ]
    if tie := report["tie"]:
        rows, columns = tie["table"]
        lines.append(
            f"tie: the head is the token embedding ({rows:,} × {columns:,}) and stays it; untied, it would cost "
            f"{tie['would_add_parameters']:,} parameters more, {tie['would_add_mb']:,.1f} MB"
        )
    rows = [["as", "parameters", "change", "of them new"]]
    for name, number in parameters.items():
        change = f"{number - parameters[norm]:+,}" if number != parameters[norm] else ""
        rows.append([name, f"{number:,}", change, _new_leaves(report["added"][name])])
    return "\n".join([*lines, "", table.to_text(rows), *([""] if report["notes"] else []), *report["notes"]])


def _norm_rows(sites: list[Report]) -> table.Rows:
    """One row for all blocks that have the same."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for site in sites:
        block, _, name = site["norm"].rpartition("/") if site["norm"].startswith("block_") else ("", "", site["norm"])
        block, _, inner = block.partition("/")
        name = f"{inner}/{name}" if inner else name
        key = (name, f"{site['epsilon']:g}", ", ".join(site["feeds"]), site["becomes"], site["why"])
        grouped.setdefault(key, []).append(block.removeprefix("block_"))
    return [
        [f"block {blocks[0]}{f' to {blocks[-1]}' if len(blocks) > 1 else ''}, {name}" if blocks[0] else name, *rest]
        for (name, *rest), blocks in grouped.items()
    ]


def _new_leaves(added: Mapping[str, int]) -> str:
    if not added:
        return ""
    kinds = list(dict.fromkeys("/".join(name.split("/")[-2:]) for name in added))
    return f"{sum(added.values()):,}, where a β has to go: {', '.join(kinds)}"
