"""Imported, converted and exported checkpoints beside the families' own library, in float64."""

import dataclasses

import checkpoints as theirs
import numpy as np
import pytest
from common import changed, logits, relative
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import numpy_gpt

import prenorm_jax
from prenorm_jax import build_model, convert_config, convert_params
from prenorm_jax.base.trees import count
from prenorm_jax.interop.explain import explain
from prenorm_jax.interop.export import export_checkpoint
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.models.coordinates import coordinates
from prenorm_jax.models.decoding import generate

pytestmark = pytest.mark.reference
nothing_compared = theirs.nothing_compared

V, T, D, H = 13, 9, 24, 3
GPT2 = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": 2, "n_head": H, "layer_norm_epsilon": 3e-4}
LATER = {"vocab_size": V, "max_position_embeddings": T, "hidden_size": D, "num_hidden_layers": 2}
LATER |= {"num_attention_heads": H}
OPT = LATER | {"ffn_dim": 40, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
NEOX = LATER | {"intermediate_size": 40, "layer_norm_eps": 3e-4}
OLMO = LATER | {"intermediate_size": 40, "pad_token_id": None, "eos_token_id": None}
STARCODER2 = LATER | {"intermediate_size": 40, "norm_epsilon": 3e-4, "num_key_value_heads": 1}
FALCON = LATER | {"layer_norm_epsilon": 3e-4}
NEW_FALCON = FALCON | {"new_decoder_architecture": True, "num_attention_heads": 6, "num_kv_heads": 2}
NO_ENDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
WIDE = LATER | {"intermediate_size": 40, "layer_norm_eps": 3e-4} | NO_ENDS
GROUPED = WIDE | {"num_attention_heads": 6, "num_key_value_heads": 2}
HALF_TURNED = {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_type": "default"}}
PAIRS = GPT2 | {"rotary_dim": 4}
NEO = {"vocab_size": V, "max_position_embeddings": T, "hidden_size": D, "num_layers": 2, "num_heads": H}
NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": 4, "layer_norm_epsilon": 3e-4}
BLOOM = {"vocab_size": V, "hidden_size": D, "n_layer": 2, "n_head": H, "layer_norm_epsilon": 3e-4} | NO_ENDS
MPT = {"vocab_size": V, "d_model": D, "n_layers": 2, "n_heads": H, "max_seq_len": T, "layer_norm_epsilon": 3e-4}
MPT |= {"attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.5}} | NO_ENDS
RW = FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
NEMOTRON = LATER | {"intermediate_size": 40, "norm_eps": 3e-4, "num_key_value_heads": 1, "head_dim": 8} | NO_ENDS
XGLM = {"vocab_size": V, "max_position_embeddings": T, "d_model": D, "num_layers": 2, "attention_heads": H}
XGLM |= {"ffn_dim": 40} | NO_ENDS

# name -> (model_type, config.json, whether all that is folded has a bias to go to in the format)
CASES = {
    "gpt2": ("gpt2", GPT2, True),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 20}, False),
    "bigcode-one-key": ("gpt_bigcode", GPT2, True),
    "bigcode-own-keys": ("gpt_bigcode", GPT2 | {"multi_query": False}, True),
    "opt": ("opt", OPT, True),
    "opt-bare": ("opt", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}, True),
    "neox": ("gpt_neox", NEOX, False),
    "neox-in-turn": ("gpt_neox", NEOX | {"use_parallel_residual": False, "attention_bias": False}, False),
    "neox-all-turned": (
        "gpt_neox",
        NEOX | {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 1.0}},
        False,
    ),
    "olmo": ("olmo", OLMO | {"clip_qkv": 0.7}, True),
    "olmo-tied": ("olmo", OLMO | {"tie_word_embeddings": True, "num_key_value_heads": 1}, True),
    "starcoder2": ("starcoder2", STARCODER2 | {"sliding_window": 4}, True),
    "falcon-7b": ("falcon", FALCON, False),
    "falcon-11b": ("falcon", NEW_FALCON | {"num_ln_in_parallel_attn": 1}, False),
    "falcon-40b": ("falcon", NEW_FALCON | {"bias": True}, True),
    "falcon-in-turn": ("falcon", FALCON | {"parallel_attn": False, "multi_query": False, "bias": True}, True),
    "falcon-rw": ("falcon", RW, True),
    "gptj": ("gptj", PAIRS, False),
    "codegen": ("codegen", PAIRS | {"n_embd": 32, "n_head": 8, "rotary_dim": 2, "n_ctx": T}, False),
    "phi": ("phi", WIDE | HALF_TURNED | {"num_key_value_heads": 1}, True),
    "phi-normed": ("phi", WIDE | {"qk_layernorm": True}, True),
    "stablelm": ("stablelm", WIDE | {"num_key_value_heads": 1}, False),
    "stablelm-12b": (
        "stablelm",
        GROUPED | HALF_TURNED | {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
        False,
    ),
    "gpt-neo": ("gpt_neo", NEO, False),
    "bloom": ("bloom", BLOOM, True),
    "mpt": ("mpt", MPT, True),
    "cohere": ("cohere", GROUPED | {"use_qk_norm": True}, True),
    "cohere2": ("cohere2", WIDE | {"num_hidden_layers": 4, "num_key_value_heads": 1, "sliding_window": 4}, True),
    "persimmon": ("persimmon", WIDE, False),
    "nemotron": ("nemotron", NEMOTRON, False),
    "xglm": ("xglm", XGLM, True),
    "biogpt": ("biogpt", WIDE, True),
}


@pytest.fixture(scope="module", params=theirs.grouped(CASES))
def case(request, tmp_path_factory):
    """A folder that the library wrote, the logits of its tokens, and whether it folds."""
    model_type, config, folds = CASES[request.param]
    model = theirs.make(model_type, **config)
    folder = tmp_path_factory.mktemp(request.param) / "source"
    model.save_pretrained(folder)
    tokens = np.random.default_rng(1).integers(V, size=(2, T))
    return folder, tokens, theirs.logits(model, tokens), folds


def test_an_import_is_the_librarys_function_under_every_norm(case):
    folder, tokens, expected, _ = case
    theirs.check_function(folder, tokens, expected, numpy_gpt)


def test_an_import_comes_back_bit_for_bit(case, tmp_path):
    is_nemotron = (case[0] / "config.json").read_text().find('"nemotron"') > 0
    theirs.check_way_back(case[0], tmp_path, r"norm\.weight" if is_nemotron else "")


def test_explain_says_what_a_conversion_does(case):
    report = explain(case[0])
    assert not any("not looked at" in note for note in report["notes"]), report["notes"]
    config, params = prenorm_jax.load(case[0])
    converted = convert_params(params, config, "rmsnorm")
    assert {norm: count(tree) for norm, tree in (("layernorm", params), ("rmsnorm", converted))}.items() <= report[
        "parameters"
    ].items()
    affine = {path[:-1] for path in flatten_dict(params) if path[-1] == "scale"}
    kept = {path[:-1] for path in flatten_dict(converted) if path[-1] == "scale"}
    said = {site["norm"]: site for site in report["norms"]}
    for path in affine:
        assert said["/".join(path).replace("head_affine", "head_norm")]["becomes"] == (
            "kept" if path in kept else "folded"
        ), path


def edited(leaf, edit):
    """The parameters with what `edit` makes of each leaf whose path ends in these words."""

    def change(params):
        flat = flatten_dict(params)
        found = [path for path in flat if "/".join(path).endswith(leaf)]
        assert found
        return unflatten_dict(flat | {path: edit(flat[path]) for path in found})

    return change


# What each of these families would be without one of its rules: other keys of our config, or other parameters.
RULES = {
    "gptj": [{"rotary_interleaved": False}, {"rotary_dim": None}],
    "phi": [edited("key/bias", np.zeros_like), {"rotary_dim": None}],
    "stablelm-12b": [edited("query_norm/scale", lambda x: x[:1] + 0 * x), edited("key_norm/scale", lambda x: x[::-1])],
    "gpt-neo": [{"score_scale": None}, {"attention_pattern": "l"}, {"window": None}],
    "bloom": [{"positions": "none"}],
    "mpt": [{"positions": "none"}, {"score_scale": None}, {"clip_qkv": None}],
    "falcon-rw": [{"positions": "none", "alibi_rounded": False}, {"alibi_rounded": False}],
    "cohere": [edited("query_norm/scale", lambda x: x[:1] + 0 * x), {"logit_scale": 1.0}],
    "cohere2": [{"global_rotary_base": None}, {"attention_pattern": "l", "global_rotary_base": None}, {"window": None}],
    "nemotron": [edited("_norm/scale", lambda x: x - 1)],
    "xglm": [{"positions": "sinusoidal"}, {"embed_scale": 1.0}],
    "biogpt": [edited("position_embedding", lambda x: np.roll(x, 2, 0)), {"embed_scale": 1.0}],
}


@pytest.mark.parametrize("case", theirs.grouped(RULES), indirect=True)
def test_without_one_of_its_rules_a_family_is_another_function(case, request):
    folder, tokens, expected, _ = case
    config, params = prenorm_jax.load(folder)
    assert relative(numpy_gpt(config, params, tokens), expected) < 1e-9
    for rule in RULES[request.node.callspec.params["case"]]:
        without = (config, rule(params)) if callable(rule) else (changed(config, **rule), params)
        assert relative(numpy_gpt(*without, tokens), expected) > 1e-2, rule


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-rw"])
def test_alibi_is_the_librarys_at_500_tokens(name, tmp_path):
    """Of three heads. Rounded to bfloat16, as Falcon's, it is another function behind some 200 tokens."""
    model_type, config, _ = CASES[name]
    longer = {"max_seq_len": 500} if name == "mpt" else {"seq_length": 500, "max_position_embeddings": 500}
    model = theirs.make(model_type, **config | longer | {"n_layer": 1, "n_layers": 1, "num_hidden_layers": 1})
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(V, size=(1, 500))
    expected = theirs.logits(model, tokens)
    config, params = prenorm_jax.load(tmp_path)
    rms = convert_config(config, "rmsnorm"), convert_params(params, config, "rmsnorm")
    assert relative(logits(*rms, tokens), expected) < 1e-9
    other = changed(config, alibi_rounded=not config.alibi_rounded)
    assert relative(logits(other, params, tokens)[:, 200:], expected[:, 200:]) > 1e-2


@pytest.mark.parametrize("name", ["cohere2", "mpt"])
def test_greedy_tokens_from_the_cache_are_the_librarys(name, tmp_path):
    """Of blocks with a window and without positions, and of ALiBi, past the window."""
    model_type, config, _ = CASES[name]
    model = theirs.make(model_type, **config | {"max_seq_len" if name == "mpt" else "max_position_embeddings": 24})
    model.save_pretrained(tmp_path)
    config, params = prenorm_jax.load(tmp_path)
    crms = build_model(convert_config(config, "crmsnorm")), convert_params(params, config, "crmsnorm")
    found = [int(step[0]) for step in generate(*crms, [[1, 5, 2, 7]], 16)]
    assert found == theirs.generate(model, [1, 5, 2, 7], 16)


def test_blooms_embedding_norm_is_centred_behind_it(tmp_path, monkeypatch):
    model_type, config, _ = CASES["bloom"]
    model = theirs.make(model_type, **config)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(V, size=(2, T))
    config, params = prenorm_jax.load(tmp_path)
    rms, converted = convert_config(config, "rmsnorm"), convert_params(params, config, "rmsnorm")
    table = converted["token_embedding"]
    converted["token_embedding"] = table - table.mean(-1, keepdims=True)  # in place of what comes after its norm
    raw = dataclasses.replace(coordinates(rms), enter=lambda x: x)
    monkeypatch.setattr("prenorm_jax.models.transformer.coordinates", lambda _: raw)
    assert relative(build_model(rms).apply({"params": converted}, tokens), theirs.logits(model, tokens)) > 1e-2


@pytest.mark.parametrize("to", ["rmsnorm", "crmsnorm"])
def test_what_was_converted_is_exported_as_a_network_that_the_library_loads(case, tmp_path, to):
    folder, tokens, expected, folds = case
    if (exported := theirs.exported(folder, tmp_path, to, folds)) is not None:
        assert relative(theirs.logits(exported, tokens), expected) < 1e-9


@pytest.mark.parametrize("tied", [False, True])
def test_a_recentred_olmo_is_a_stock_llama(tmp_path, tied):
    model = theirs.make("olmo", **OLMO | {"tie_word_embeddings": tied, "num_key_value_heads": 1})
    model.save_pretrained(tmp_path / "source")
    tokens = np.random.default_rng(1).integers(V, size=(2, T))
    import_checkpoint(tmp_path / "source", tmp_path / "run", "crmsnorm")
    export_checkpoint(tmp_path / "run", tmp_path / "llama", "rmsnorm", form="llama")
    llama = theirs.load(tmp_path / "llama")
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert relative(theirs.logits(llama, tokens), theirs.logits(model, tokens)) < 1e-9
    llama.load_state_dict(model.state_dict(), strict=False)  # OLMo's own weights, under norms that keep their mean
    assert relative(theirs.logits(llama, tokens), theirs.logits(model, tokens)) > 1e-2


def test_a_reflected_crmsnorm_is_a_stock_mistral_of_one_entry_less(tmp_path):
    model = theirs.make("olmo", **OLMO | {"tie_word_embeddings": False})
    model.save_pretrained(tmp_path / "source")
    tokens = np.random.default_rng(1).integers(V, size=(2, T))
    for kind in ("drop", "reflect"):
        import_checkpoint(tmp_path / "source", tmp_path / kind, "crmsnorm", coordinates=kind)
    with pytest.raises(prenorm_jax.PrenormError, match="none of plain RMSNorms: one is that was converted by"):
        export_checkpoint(tmp_path / "drop", tmp_path / "mistral", "crmsnorm", form="mistral")
    export_checkpoint(tmp_path / "reflect", tmp_path / "mistral", "crmsnorm", form="mistral")
    mistral = theirs.load(tmp_path / "mistral")
    assert (type(mistral).__name__, mistral.config.hidden_size) == ("MistralForCausalLM", OLMO["hidden_size"] - 1)
    assert relative(theirs.logits(mistral, tokens), theirs.logits(model, tokens)) < 1e-9
    mistral.model.norm.weight.data[:] = 1  # as if it were a norm of d - 1 entries
    assert relative(theirs.logits(mistral, tokens), theirs.logits(model, tokens)) > 1e-4
