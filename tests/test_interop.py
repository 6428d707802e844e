"""Other libraries' checkpoints in and out, as far as no other library is needed (`references/` has the rest)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from commands import ROOT, command, error_of, here
from common import logits, relative
from flax.traverse_util import flatten_dict
from foreign import GPT2, gpt2_shapes, random_tensors, write, write_sharded

import prenorm_jax
from prenorm_jax import PrenormError
from prenorm_jax.interop.export import export_checkpoint
from prenorm_jax.interop.families import FAMILIES
from prenorm_jax.interop.files import open_source
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.safetensors import Entry, Header, create_file, map_file
from prenorm_jax.interop.views import View, axis_sizes, read_table, tensor_shape
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.train import convert_run

TOKENS = np.random.default_rng(0).integers(11, size=(2, 7))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(gpt2_shapes())


@pytest.fixture(scope="module")
def source(tmp_path_factory, tensors) -> Path:
    """A folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("gpt2")
    write(folder, tensors, GPT2)
    (folder / "README.md").write_text("a model card")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory, source) -> Path:
    """A folder of workdirs, each of which has the name of its norm."""
    folder = tmp_path_factory.mktemp("imported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_run, "COMPARED_BYTES", 0)
        for norm in ("layernorm", "rmsnorm", "crmsnorm"):
            here("-m", "prenorm_jax.convert", source, folder / norm, f"--to={norm}")
    return folder


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch):
    """The commands' own comparison of logits would compile both networks at each call."""
    monkeypatch.setattr(convert_run, "COMPARED_BYTES", 0)


# --- Views: the language of tables. ---


def view(axes: str, layout: str, sizes: dict[str, int], part: dict[str, tuple[int, int]]) -> tuple[np.ndarray, View]:
    [place] = read_table(f"t  {axes}  x  {layout}", 1)
    place = place._replace(part=part)
    shape = tensor_shape(place, sizes)
    tensor = np.arange(np.prod(shape)).reshape(shape)
    return tensor, View(tensor, place, sizes)


SIZES = {"d": 5, "h": 6, "g": 2, "k": 4, "n": 3, "r": 3, "f": 7}
LAYOUTS = {
    "gpt2": ("d (p h k)", "d (h k)", (1, 3), lambda x: x.reshape(5, 3, 6, 4)[:, 1].reshape(5, 24)),
    "neox": ("(h p k) d", "d (h k)", (1, 3), lambda x: x.reshape(6, 3, 4, 5)[:, 1].reshape(24, 5).T),
    "falcon-q": ("(g p=r,1,1 k) d", "d (g p k)", (0, 3), lambda x: x.reshape(2, 5, 4, 5)[:, :3].reshape(24, 5).T),
    "falcon-v": ("(g p=r,1,1 k) d", "d (g p k)", (2, 3), lambda x: x.reshape(2, 5, 4, 5)[:, 4].reshape(8, 5).T),
    "unequal": ("(p=h*k,g*k,g*k) d", "d p", (1, 3), lambda x: x[24:32].T),
    "skipped": ("n@2 d", "n d", None, lambda x: x[2:]),
    "literal": ("1 n d", "d n", None, lambda x: x[0].T),
    "one row": ("d", "1 d", None, lambda x: x[None]),
    "one row of one": ("1 1 d", "1 d", None, lambda x: x[0]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_view_reads_and_writes_any_part_of_a_leaf(name):
    axes, layout, part, expected = LAYOUTS[name]
    tensor, leaf = view(axes, layout, SIZES, {} if part is None else {"p": part})
    assert leaf.shape == expected(tensor).shape
    np.testing.assert_array_equal(leaf.read(), expected(tensor))
    rng, written = np.random.default_rng(0), tensor.copy()
    for _ in range(20):  # parts that begin and end inside heads, too
        bounds = [sorted(rng.integers(size + 1, size=2)) for size in leaf.shape]
        index = tuple(slice(start, stop) for start, stop in bounds)
        np.testing.assert_array_equal(leaf.read(index), expected(tensor)[index])
        value = rng.integers(1000, size=expected(tensor)[index].shape)
        leaf.write(index, value)
        expected(written)[index] = value
        if expected(written).base is not None and np.shares_memory(expected(written), written):
            np.testing.assert_array_equal(tensor, written)
        np.testing.assert_array_equal(leaf.read(index), value)


def test_a_table_counts_blocks_in_a_foreign_axis_where_only_our_name_has_them():
    places = list(read_table("norm/scale  l d  block_{i}/norm/scale  d   # as a scan stacks them", 2))
    assert [(place.path[0], place.part) for place in places] == [("block_0", {"l": (0, 2)}), ("block_1", {"l": (1, 2)})]
    tensor = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(View(tensor, places[1], {"d": 3}).read(), [3, 4, 5])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("timm", "vit_npz")])  # of them tensors tell
def test_a_familys_table_has_one_line_for_each_leaf_of_its_defaults(name):
    """With every size at the family's own default, none of which config.json gives: no array is made."""
    family, small = FAMILIES[name], dict.fromkeys(("n_layer", "num_hidden_layers"), 1)
    small |= {"vision_config": dict(small)}  # of CLIP
    small |= {"attention_types": [[["global"], 1]]}  # of GPT-Neo, which says so of each block
    model = family.model(small)
    sizes = axis_sizes(model) | family.sizes(model)
    shapes = param_shapes(model)
    places = [place for place in read_table(family.lines(small), model.depth) if place.path in shapes]
    assert {place.path for place in places} == shapes.keys()
    assert len(places) == len(shapes)
    for place in places:
        tensor = np.broadcast_to(np.zeros(()), tensor_shape(place, sizes))  # of no size in memory
        assert View(tensor, place, sizes).shape == shapes[place.path].shape, place


# --- In and out. ---


def test_the_three_imports_are_one_function(source, imported):
    config, params = prenorm_jax.load(source)
    expected = logits(config, params, TOKENS)
    for norm in ("layernorm", "rmsnorm", "crmsnorm"):
        config, params = prenorm_jax.load(imported / norm)
        assert config.norm == norm
        assert relative(logits(config, params, TOKENS), expected) < 1e-5, norm


def test_an_unconverted_export_is_the_source_bit_for_bit_and_keeps_its_files(source, imported, tmp_path, tensors):
    here("-m", "prenorm_jax.convert", imported / "layernorm", tmp_path / "out", "--to=layernorm", "--format=source")
    old, new = (map_file(folder / "model.safetensors")[0] for folder in (source, tmp_path / "out"))
    assert old == new
    for name, tensor in map_file(tmp_path / "out" / "model.safetensors")[1].items():
        np.testing.assert_array_equal(tensor, tensors[name], strict=True)
    assert (tmp_path / "out" / "README.md").read_text() == "a model card"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == GPT2
    assert json.loads((tmp_path / "out" / "converted.json").read_text())["source"] == str(source)


@pytest.mark.parametrize("norm", ["rmsnorm", "crmsnorm"])
def test_a_converted_export_is_a_recentred_layernorm_network(source, imported, tmp_path, norm):
    export_checkpoint(imported / norm, tmp_path / "out", "layernorm")
    (config, params), (old_config, old) = prenorm_jax.load(tmp_path / "out"), prenorm_jax.load(source)
    assert config == old_config
    assert relative(logits(config, params, TOKENS), logits(old_config, old, TOKENS)) < 1e-5
    kernel = params["block_0"]["mlp"]["down"]["kernel"]
    assert np.abs(kernel.mean(-1)).max() < 1e-7 < np.abs(old["block_0"]["mlp"]["down"]["kernel"].mean(-1)).max()


def test_shards_come_back_as_shards(tmp_path, tensors):
    write_sharded(tmp_path / "source", tensors, GPT2)
    import_checkpoint(tmp_path / "source", tmp_path / "run", "layernorm")
    export_checkpoint(tmp_path / "run", tmp_path / "out", "layernorm")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    old = json.loads((tmp_path / "source" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == old["weight_map"]
    for name, tensor in open_source(tmp_path / "out").tensors.items():
        np.testing.assert_array_equal(tensor, tensors[name], strict=True)


def test_a_bfloat16_source_is_float32_until_it_is_exported(tmp_path, tensors):
    narrow = {name: x.astype(ml_dtypes.bfloat16) if x.ndim < 4 else x for name, x in tensors.items()}
    write(tmp_path / "source", narrow, GPT2 | {"torch_dtype": "bfloat16"})
    config, _ = prenorm_jax.load(tmp_path / "source")
    assert config.param_dtype == "float32"
    assert prenorm_jax.load(tmp_path / "source", dtype="keep")[0].param_dtype == "bfloat16"
    for to, dtype in (("layernorm", "bfloat16"), ("rmsnorm", "float32")):
        import_checkpoint(tmp_path / "source", tmp_path / to, to)
        export_checkpoint(tmp_path / to, tmp_path / f"{to}-out", "layernorm")
        found = open_source(tmp_path / f"{to}-out")
        assert {x.dtype.name for x in found.tensors.values()} == {dtype, "uint8"}  # of the mask
        assert found.config["torch_dtype"] == dtype
    for name, x in open_source(tmp_path / "layernorm-out").tensors.items():
        np.testing.assert_array_equal(x.view(np.uint8), narrow[name].view(np.uint8))
    export_checkpoint(tmp_path / "rmsnorm", tmp_path / "kept", "layernorm", dtype="keep")
    assert {x.dtype.name for x in open_source(tmp_path / "kept").tensors.values()} == {"bfloat16", "uint8"}


def test_dropout_is_left_out_unless_it_is_asked_for(source, tmp_path):
    said = here("-m", "prenorm_jax.convert", source, tmp_path / "kept", "--to=layernorm", "--dropout=keep").stdout
    assert "left out" not in said
    assert prenorm_jax.load(tmp_path / "kept")[0].branch_dropout == 0.1
    said = here("-m", "prenorm_jax.convert", source, tmp_path / "none", "--to=layernorm").stdout
    assert "dropout is left out" in said
    assert "branch_dropout 0.1" in said


def test_a_workdir_that_was_imported_says_that_it_has_no_data_and_takes_some(imported, tmp_path, text):
    assert "--config.data.path" in error_of("eval.py", f"--workdir={imported / 'rmsnorm'}")
    assert "--config.data.path" in error_of("train.py", f"--workdir={imported / 'rmsnorm'}", "--config.steps=2")


def test_names_with_and_without_prefix_are_the_same_tensors(tmp_path, tensors, source):
    write(tmp_path, {name.removeprefix("transformer."): x for name, x in tensors.items()}, GPT2)
    (_, one), (_, two) = prenorm_jax.load(tmp_path), prenorm_jax.load(source)
    for path, leaf in flatten_dict(one).items():
        np.testing.assert_array_equal(leaf, flatten_dict(two)[path])


def test_a_tied_head_in_the_file_is_taken_only_if_it_is_the_table(tmp_path, tensors):
    head = tensors["transformer.wte.weight"].copy()
    write(tmp_path / "equal", tensors | {"lm_head.weight": head}, GPT2)
    config, params = prenorm_jax.load(tmp_path / "equal")
    assert config.tie_embeddings
    assert "head" not in params
    import_checkpoint(tmp_path / "equal", tmp_path / "run", "rmsnorm")
    export_checkpoint(tmp_path / "run", tmp_path / "out", "layernorm")
    out = open_source(tmp_path / "out").tensors
    np.testing.assert_array_equal(out["lm_head.weight"], out["transformer.wte.weight"])
    head[3, 5] += 1
    write(tmp_path / "other", tensors | {"lm_head.weight": head}, GPT2)
    with pytest.raises(PrenormError, match=r"lm_head\.weight is not the token embedding"):
        prenorm_jax.load(tmp_path / "other")
    write(tmp_path / "untied", tensors | {"lm_head.weight": head}, GPT2 | {"tie_word_embeddings": False})
    assert not prenorm_jax.load(tmp_path / "untied")[0].tie_embeddings


def test_a_name_on_the_hub_is_read_from_the_cache(tmp_path, monkeypatch, source):
    import huggingface_hub

    asked = []

    def snapshot(name, **patterns):
        asked.append(name)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert prenorm_jax.load("owner/gpt2")[0].d_model == 12
    assert asked == ["owner/gpt2"]
    here_said = re.compile("is no folder, and the hub gives no such model")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline"))
    )
    with pytest.raises(PrenormError, match=here_said):
        prenorm_jax.load("owner/gpt2")


# --- Wrong inputs: one line that names the thing, and nothing written. ---

OPT = {"model_type": "opt", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}


def cut(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    path = write(folder, tensors, GPT2)
    path.write_bytes(path.read_bytes()[:-100])


def overlapping(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    path = write(folder, tensors, GPT2)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["transformer.wpe.weight"]["data_offsets"] = header["transformer.wte.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def absent_shard(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    write_sharded(folder, tensors, GPT2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def wrong_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    changed = dict(tensors)
    del changed["transformer.h.0.mlp.c_fc.bias"]
    changed["transformer.h.0.mlp.c_proj.weight"] = np.zeros((12, 48), np.float32)
    changed["transformer.h.0.adapter.weight"] = changed["wpe.weight"] = tensors["transformer.wpe.weight"]
    write(folder, changed, GPT2)


def optimizer_state(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    write(folder, tensors | {f"exp_avg.{name}": x for name, x in tensors.items()}, GPT2)


def quantised(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    entries = {name: Entry("I8" if name.endswith("c_fc.weight") else "F32", x.shape) for name, x in tensors.items()}
    create_file(folder / "model.safetensors", Header(entries, {}))
    (folder / "config.json").write_text(json.dumps(GPT2))


def torchs(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    (folder / "config.json").write_text(json.dumps(GPT2))


def unknown_dtype(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    path = write(folder, tensors, GPT2)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"Q4A"', 1))


def described(config: dict) -> object:
    return lambda folder, tensors: write(folder, tensors, config)


WRONG = {
    "cut": (cut, r"model\.safetensors is cut short: it holds [\d,]+ bytes of"),
    "overlapping": (overlapping, "is damaged: transformer.wpe.weight .*copy or download it again"),
    "pointer": (
        lambda folder, tensors: write(folder, tensors, GPT2).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        "is a pointer of Git LFS",
    ),
    "absent shard": (absent_shard, r"names model-00002-of-00002\.safetensors, not in the folder"),
    "tensors": (
        wrong_tensors,
        r"missing h\.0\.mlp\.c_fc\.bias.*unknown .*h\.0\.adapter\.weight.*"
        r"of another shape .*h\.0\.mlp\.c_proj\.weight \[12, 48\], not \[48, 12\].*there twice .*wpe\.weight",
    ),
    "optimizer": (optimizer_state, "unknown exp_avg.*it seems to hold an optimizer's state"),
    "quantised": (quantised, r"quantised, or no floating-point numbers, .*c_fc\.weight \(int8\)"),
    "unknown dtype": (unknown_dtype, "numbers of an unknown dtype, Q4A"),
    "quantised config": (described(GPT2 | {"quantization_config": {"bits": 4}}), "quantization_config"),
    "family": (described({"model_type": "mamba"}), "model_type='mamba' is no family that has a table here"),
    "llama": (described({"model_type": "llama"}), "model_type='llama': its norms are RMSNorms"),
    "bert": (described({"model_type": "bert"}), "model_type='bert': it is Post-LN"),
    "opt-350m": (described(OPT | {"do_layer_norm_before": False}), "do_layer_norm_before=False .*Post-LN"),
    "opt-350m's projection": (described(OPT | {"word_embed_proj_dim": 6}), "word_embed_proj_dim=6"),
    "opt without final norm": (described(OPT | {"_remove_final_layer_norm": True}), "_remove_final_layer_norm=True"),
    "cross-attention": (described(GPT2 | {"add_cross_attention": True}), "add_cross_attention=True"),
    "activation": (described(GPT2 | {"activation_function": "gelu_10"}), "activation_function='gelu_10' changes"),
    "scores": (described(GPT2 | {"scale_attn_by_inverse_layer_idx": True}), "scale_attn_by_inverse_layer_idx=True"),
    "rotary": (
        described({"model_type": "gpt_neox", "rope_scaling": {"type": "linear", "factor": 2.0}}),
        "rope_type='linear' changes",
    ),
    "rotary of others": (
        described({"model_type": "gpt_neox", "rope_theta": 100.0}),
        "rope_theta=100.0 is not how this family says it .10000 is read.",
    ),
    "two spellings": (
        described(GPT2 | {"num_attention_heads": 2}),
        "n_head=3 and num_attention_heads=2 mean one thing: remove one",
    ),
    "not causal": (described(GPT2 | {"is_causal": False}), "is_causal=False changes the function"),
    "other weights": (described(GPT2 | {"transformers_weights": "b.safetensors"}), "transformers_weights='b.safetens"),
    "type": (described(GPT2 | {"n_embd": "12"}), "n_embd='12' must be of type int"),
    "heads": (described(GPT2 | {"n_head": 5}), "model.heads=5 does not divide"),
    "nothing": (lambda folder, tensors: described(GPT2)(folder, tensors).unlink(), "should hold one file of weights"),
    "no config": (
        lambda folder, tensors: (write(folder, tensors, GPT2), (folder / "config.json").unlink()),
        r"there is no config\.json with it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path, tensors, name):
    make, line = WRONG[name]
    make(tmp_path / "source", tensors)
    error = error_of("-m", "prenorm_jax.convert", tmp_path / "source", tmp_path / "new", "--to=rmsnorm")
    assert re.search(line, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# What has no equivalent: config.json as its library writes it, the reason, what would have to be otherwise.
NOT_CONVERTIBLE = {
    "bert": ({"model_type": "bert"}, "it is Post-LN", "norms would have to begin the branches.*roberta-prelayernorm"),
    "roberta": ({"model_type": "roberta"}, "it is Post-LN", "would have to begin the branches"),
    "bart": ({"model_type": "bart"}, "it is Post-LN", "as those of mbart and pegasus do"),
    "llama": ({"model_type": "llama"}, "RMSNorms already", "would have to be LayerNorms, as those of olmo are"),
    "t5": ({"model_type": "t5"}, "RMSNorms already", "would have to be LayerNorms"),
    "swin": ({"model_type": "swin"}, "one norm takes four tokens together", "be normalised before they are merged"),
    "sam": (
        {"model_type": "sam"},
        "convolution behind its image encoder reads the raw",
        "LayerNorm .* stand before it",
    ),
    "convnext": ({"model_type": "convnext"}, "depthwise convolution .* reads the raw stream", "to stand before it"),
    "classifier": (
        {"model_type": "clip", "architectures": ["CLIPForImageClassification"]},
        "a CLIP's classifier reads the raw stream",
        "would have to read what post_layernorm gives",
    ),
    "classifier's tensor": (
        {"model_type": "clip_vision_model"},
        "a CLIP's classifier reads the raw stream",
        "would have to read what post_layernorm gives",
    ),
    "opt-350m": (
        {"model_type": "opt", "do_layer_norm_before": False, "hidden_size": 1024, "word_embed_proj_dim": 512},
        "do_layer_norm_before=False changes the function .* Post-LN",
        "would have to begin the branches, as those of the other sizes do",
    ),
}


@pytest.mark.parametrize("name", NOT_CONVERTIBLE)
def test_what_has_no_equivalent_is_refused_with_the_reason_and_the_remedy_by_every_command(tmp_path, name):
    config, reason, remedy = NOT_CONVERTIBLE[name]
    weights = write(tmp_path / "source", {"classifier.weight": np.ones((2, 3), np.float32)}, config)
    by_convert = error_of("-m", "prenorm_jax.convert", tmp_path / "source", tmp_path / "new", "--to=rmsnorm")
    assert re.search(f"{reason}.*; .*{remedy}", by_convert), by_convert
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    if name != "classifier's tensor":
        weights.unlink()  # config.json is enough
    assert error_of("-m", "prenorm_jax.explain", tmp_path / "source") == by_convert


def test_a_bin_without_pytorch_says_what_reads_it(tmp_path, tensors, monkeypatch):
    torchs(tmp_path / "source", tensors)
    monkeypatch.setitem(sys.modules, "torch", None)
    error = error_of("-m", "prenorm_jax.convert", tmp_path / "source", tmp_path / "new", "--to=rmsnorm")
    assert "pytorch_model.bin is of PyTorch's own format, which PyTorch alone reads: install it" in error


def test_flags_that_say_nothing_of_a_conversion_are_named(source, imported, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for arguments, line in (
        ((source, "--to=rmsnorm", "--step=3"), "--step says nothing of a conversion of another library's checkpoint"),
        ((run, "--to=rmsnorm", "--dtype=keep"), "--dtype says nothing of a conversion of a run"),
        ((run, "--to=layernorm", "--format=source"), "holds no run"),
        ((imported / "rmsnorm", "--to=rmsnorm", "--format=source"), "--format=source is of layernorm networks"),
        (
            (imported / "rmsnorm", "--to=layernorm", "--format=gguf"),
            "--format='gguf' is not one of source, llama, mistral, timm-rmsnorm",
        ),
        ((imported / "rmsnorm", "--to=rmsnorm", "--format=llama"), "a llama has no"),
        ((source, "--to=crmsnorm", "--keep-affine"), "crmsnorm has no affine to keep"),
        ((source, "--to=rmsnorm", "--dtype=int8"), "dtype='int8' is not one of keep"),
        ((source, "--to=rmsnorm", "--dropout=2"), "--dropout='2' is not one of 0, keep"),
    ):
        where, *flags = arguments
        assert line in error_of("-m", "prenorm_jax.convert", where, tmp_path / "new", *flags)
        assert not (tmp_path / "new").exists()


def test_an_export_that_fails_leaves_nothing(imported, tmp_path, monkeypatch):
    import prenorm_jax.interop.export as export

    def full(*_, **__):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(export, "create_file", full)
    flags = ("--to=layernorm", "--format=source")
    assert "No space left" in error_of("-m", "prenorm_jax.convert", imported / "rmsnorm", tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path):
    size = ("--depth=2", "--d_model=1024", "--vocab=32000")
    paths = f"{ROOT}:{ROOT / 'tests'}"
    done = command("tests/measure_import.py", tmp_path, "--to=crmsnorm", *size, PYTHONPATH=paths)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["source_mb"] > 360
    assert result["peak_mb"] - result["before_mb"] < 250, result


def test_numbers_that_the_asked_dtype_cannot_hold_are_refused_and_nothing_is_written(tmp_path):
    tensors = random_tensors(gpt2_shapes())
    tensors["transformer.wte.weight"][0, 0] = 1e6
    write(tmp_path / "source", tensors, GPT2)
    with pytest.raises(PrenormError, match="token_embedding has numbers that float16 cannot hold"):
        import_checkpoint(tmp_path / "source", tmp_path / "new", "rmsnorm", dtype="float16")
    assert not (tmp_path / "new").exists()


def test_what_lies_beside_a_model_by_chance_does_not_go_along(tmp_path):
    source = write(tmp_path / "source", random_tensors(gpt2_shapes()), GPT2).parent
    for name in ("passwords.txt", "notes.json", "README.md", "LICENSE", "tokenizer_config.json"):
        (source / name).write_text("{}")
    import_checkpoint(source, tmp_path / "new", "layernorm")
    taken = {path.name for path in (tmp_path / "new" / "source").iterdir()}
    assert {"README.md", "LICENSE", "tokenizer_config.json"} <= taken and not {"passwords.txt", "notes.json"} & taken
