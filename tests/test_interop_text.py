"""What an imported language model does with texts: its source's tokenizer, prompts, ends; evaluated and trained on."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import error_of, here
from foreign import GPT2, gpt2_shapes, random_tensors, write
from tiny_tokenizer import END, TEXT, tiny_tokenizer, write_slow
from tokenizers import Tokenizer, normalizers, pre_tokenizers

import prenorm_jax
from prenorm_jax import PrenormError, build_model
from prenorm_jax.base.files import read_json
from prenorm_jax.interop.families import FAMILIES
from prenorm_jax.interop.tokens import Ends, SourceTexts, ends_of, source_ends
from prenorm_jax.train import convert_run

V, T = 288, 24  # of 270 tokens: the table has rows to spare
CONFIG = GPT2 | {"vocab_size": V, "n_positions": T}
PROMPT = "the cat"
GENERATE = ("-m", "prenorm_jax.generate")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "source"
    tensors = random_tensors(gpt2_shapes(vocabulary=V, positions=T))
    for name in ("wte", "wpe"):  # so that what follows depends on what was there
        tensors[f"transformer.{name}.weight"] *= 20
    write(folder, tensors, CONFIG | {"eos_token_id": 7})
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0]}))
    return folder


@pytest.fixture(scope="module")
def imported(source) -> Callable[[str], Path]:
    """The workdir of each norm, made when it is asked for; `further` was converted from another."""
    folder = source.parent / "runs"

    @functools.cache
    def run(norm: str) -> Path:
        place, to = (source, norm) if norm != "further" else (run("rmsnorm"), "crmsnorm")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convert_run, "COMPARED_BYTES", 0)
            here("-m", "prenorm_jax.convert", place, folder / norm, f"--to={to}")
        return folder / norm

    return run


@pytest.fixture(scope="module")
def logits(source) -> Callable[[list[int]], np.ndarray]:
    """A function: (len(ids), V), the source's."""
    config, params = prenorm_jax.load(source)
    apply = jax.jit(lambda tokens: build_model(config).apply({"params": params}, tokens))
    return lambda ids: np.asarray(apply(np.array([ids + [0] * (T - len(ids))])))[0, : len(ids)]


@pytest.fixture(scope="module")
def greedy(logits) -> Callable[[list[int], int], list[int]]:
    """A function: the ids that follow those it is given, by the source's logits alone."""

    def follow(ids: list[int], tokens: int) -> list[int]:
        return [] if not tokens else [best := int(logits(ids)[-1].argmax()), *follow([*ids, best], tokens - 1)]

    return follow


def ids_of(run: Path, ids: list[int], *flags: str) -> list[int]:
    """What `generate --prompt-ids` adds."""
    [text] = json.loads(here(*GENERATE, run, f"--prompt-ids={','.join(map(str, ids))}", "--json", *flags).stdout)[
        "texts"
    ]
    return [int(each) for each in text["text"].split(",") if each]


# --- What follows a prompt. ---


@pytest.mark.parametrize(
    "norm", ["further", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("layernorm", "rmsnorm", "crmsnorm"))]
)
def test_what_follows_a_prompt_is_what_its_source_adds(imported, greedy, norm):
    ids = tiny_tokenizer().encode(PROMPT).ids
    following = greedy(ids, 8)
    assert following != greedy([0, *ids], 8), "what would follow behind an end-of-text token, as in runs of ours"
    run = imported(norm)
    named = read_json(run / "config.json")["data"]["tokenizer"]
    assert named == str(run / "tokenizer.json") and Path(named).is_file(), "of another run, which may go away"
    [found] = json.loads(here(*GENERATE, run, f"--prompt={PROMPT}", "--tokens=8", "--json").stdout)["texts"]
    assert (found["text"], found["tokens"]) == (tiny_tokenizer().decode(following), 8)
    given = ",".join(map(str, ids))
    printed = here(*GENERATE, run, f"--prompt-ids={given}", "--tokens=8").stdout
    assert printed == ",".join(map(str, [*ids, *following])) + "\n", "a prompt for the next call"


def test_an_empty_prompt_begins_with_the_sources_first_token(imported, greedy):
    [found] = json.loads(here(*GENERATE, imported("further"), "--tokens=5", "--json").stdout)["texts"]
    assert found["text"] == tiny_tokenizer().decode(greedy([0], 5))


def with_ends(run: Path, folder: Path, **ends) -> Path:
    """A copy of a workdir whose source had other ends."""
    shutil.copytree(run, folder / "run")
    about = folder / "run" / "source" / "checkpoint.json"
    content = json.loads(about.read_text())
    content["texts"] |= ends
    about.write_text(json.dumps(content))
    return folder / "run"


def test_any_of_several_ends_ends_a_text_unless_they_are_ignored(imported, greedy, tmp_path):
    ids = tiny_tokenizer().encode(PROMPT).ids
    following = greedy(ids, 8)
    last = next(i for i, each in enumerate(following) if i and each not in following[:i])
    run = with_ends(imported("further"), tmp_path, end=[269, following[last]])
    assert ids_of(run, ids, "--tokens=8") == following[:last]
    assert ids_of(run, ids, "--tokens=8", "--ignore-eos") == following
    # An end that is given is read over, as `generate` of transformers does.
    given = [*ids, following[last]]
    assert ids_of(run, given, "--tokens=1") == [each for each in greedy(given, 1) if each not in (269, following[last])]


def test_what_the_source_does_otherwise_is_said_and_an_empty_prompt_without_a_first_token_refused(imported, tmp_path):
    run = with_ends(imported("further"), tmp_path, begin=None, otherwise=["repetition_penalty=1.2"])
    said = here(*GENERATE, run, f"--prompt={PROMPT}", "--tokens=1").stderr
    assert "repetition_penalty=1.2 (generation_config.json), which is left out here" in said
    assert "an empty prompt is of no token for this model" in error_of(*GENERATE, run)
    assert "exclude each other" in error_of(*GENERATE, run, "--prompt=a", "--prompt-ids=1")
    for wrong in ("1,,2", "a", "1.5"):
        assert "--prompt-ids takes ids" in error_of(*GENERATE, run, f"--prompt-ids={wrong}")
    assert "not integers from 0 to 287" in error_of(*GENERATE, run, "--prompt-ids=288")


def test_a_source_without_a_tokenizer_takes_ids_and_is_never_read_as_bytes(source, tmp_path, text, greedy):
    shutil.copytree(source, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / "bare" / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    run = tmp_path / "run"
    said = here("-m", "prenorm_jax.convert", tmp_path / "bare", run, "--to=layernorm").stdout
    assert "it came without a tokenizer that can be read" in said
    assert ids_of(run, [3, 1, 4], "--tokens=1") == greedy([3, 1, 4], 1)
    line = "the run came without a tokenizer: name one with --config.data.tokenizer=FILE"
    assert line in error_of(*GENERATE, run, "--prompt=a")
    assert line in error_of("eval.py", f"--workdir={run}", f"--config.data.path={text}")
    named = f"--config.data.tokenizer={tmp_path / 'tokenizer.json'}"
    found = here(*GENERATE, run, f"--prompt={PROMPT}", "--tokens=1", named).stdout
    assert found == PROMPT + tiny_tokenizer().decode(greedy(tiny_tokenizer().encode(PROMPT).ids, 1)) + "\n"


# --- Which tokenizer, which ends. ---


def made(folder: Path, config: dict, vocabulary: int = V) -> Tokenizer | None:
    return SourceTexts.of(folder, config, vocabulary).tokenizer


def test_vocabulary_and_merges_make_the_tokenizer_that_they_are_of(tmp_path):
    write_slow(tiny_tokenizer("</s>"), tmp_path)
    options = {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    options |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    found, expected = made(tmp_path, {"model_type": "opt"}), tiny_tokenizer("</s>")
    for text in (TEXT, " leading  spaces\n\nit's naïve 😀 12", "a</s>b"):
        assert found.encode(text).ids == [0, *expected.encode(text).ids]
        assert found.decode(found.encode(text).ids) == text.replace("</s>", "")
    # As a map of special tokens says it, where tokenizer_config.json does not.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_prefix_space": True}))
    special = dict.fromkeys(("eos_token", "unk_token"), "</s>")
    special["bos_token"] = {"content": "</s>", "lstrip": False, "normalized": True}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert made(tmp_path, {"model_type": "opt"}).encode("cat").ids == [0, *expected.encode(" cat").ids]
    assert made(tmp_path, {"model_type": "falcon"}) is None, "whose tokenizer is of no class that is known"


def test_tokenizer_json_counts_and_the_other_files_add_to_it(tmp_path):
    def saved(tokenizer: Tokenizer, **options) -> None:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))

    plain, framed = tiny_tokenizer(), tiny_tokenizer(begins=True)
    ids = plain.encode(PROMPT).ids
    saved(framed)
    for model_type, expected in (("gpt2", [0, *ids]), ("falcon", [0, *ids]), ("gpt_neox", ids)):
        assert made(tmp_path, {"model_type": model_type}).encode(PROMPT).ids == expected
    saved(plain, add_bos_token=True, bos_token=END)
    assert made(tmp_path, {"model_type": "gpt2"}).encode(PROMPT).ids == ids, "tokenizer.json has none"
    spaced = tiny_tokenizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    spaced.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    spaced.normalizer = normalizers.NFC()
    saved(spaced, add_prefix_space=False)
    for model_type, expected in (("starcoder2", plain), ("falcon", None)):
        found = made(tmp_path, {"model_type": model_type}).encode("the 12").ids
        assert found == (
            expected.encode("the ").ids + expected.encode("1").ids + expected.encode("2").ids
            if expected
            else spaced.encode("the 12").ids
        )
    # Special tokens that are in no vocabulary get the next ids, and are left out where the model has no row for them.
    saved(plain, eos_token="<end>", additional_special_tokens=["<more>"])
    assert made(tmp_path, {"model_type": "gpt2"}).encode("<end><more>").ids == [270, 271]
    assert len(made(tmp_path, {"model_type": "gpt2"}, 271).encode("<end><more>").ids) > 2
    listed = {"270": {"content": "<one>", "special": False}, "271": {"content": "<two>", "special": True}}
    saved(plain, added_tokens_decoder=listed)
    assert made(tmp_path, {"model_type": "gpt2"}).encode("<one><two>").ids == [270, 271]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, Ends(None, ())),
        ({"bos_token_id": 3, "eos_token_id": [4, 5]}, None, Ends(3, (4, 5))),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"max_length": 7}, Ends(None, ())),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"eos_token_id": [2], "num_beams": 1}, Ends(None, (2,))),
        ({}, {"eos_token_id": 0, "num_beams": 4, "suppress_tokens": [], "repetition_penalty": 1.1},
         Ends(None, (0,), ("num_beams=4", "repetition_penalty=1.1"))),
    ],
)  # fmt: skip
def test_the_ends_are_those_of_generation_config_if_there_is_one(tmp_path, config, generation, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert source_ends(tmp_path, config) == expected


def test_files_that_are_damaged_are_named_and_nothing_is_written(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    for name, content, line in (
        (
            "tokenizer.json",
            '{"model": {"type": "BPE"}}',
            "the tokenizer in .* cannot be read .*download its files again",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            "generation_config.json: eos_token_id='</s>' is no token",
        ),
    ):
        (tmp_path / "source" / name).write_text(content)
        error = error_of("-m", "prenorm_jax.convert", tmp_path / "source", tmp_path / "new", "--to=rmsnorm")
        assert re.search(line, error), error
        shutil.copy(source / name, tmp_path / "source" / name)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- Evaluated, and trained further. ---


@pytest.fixture(scope="module")
def texts(tmp_path_factory, logits) -> tuple[list[str], int, float]:
    """Flags that name texts; of those held out, the tokens that are predicted, and the source's nats for each.

    (Every token once, by windows of T; behind the text comes an end-of-text token, as one stands before it.)
    """
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.txt").write_text(TEXT * 3)
    (folder / "held.txt").write_text(TEXT)
    ids, nats = [0, *tiny_tokenizer().encode(TEXT).ids, 0], 0.0
    for start in range(0, len(ids) - 1, T):
        window = ids[start : start + T + 1]
        scores = logits(window[:-1]).astype(np.float64)
        nats += sum(np.log(np.exp(row).sum()) - row[token] for row, token in zip(scores, window[1:], strict=True))
    flags = [f"--config.data.path={folder / 'train.txt'}", f"--config.data.eval_path={folder / 'held.txt'}"]
    return flags, len(ids) - 1, nats / (len(ids) - 1)


def test_a_source_is_evaluated_on_texts_by_its_own_tokens(imported, texts):
    flags, tokens, loss = texts
    found = json.loads(here("eval.py", f"--workdir={imported('further')}", "--json", *flags).stdout)
    assert (found["eval_tokens"], found["eval_loss"]) == (tokens, pytest.approx(loss, rel=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "source_norm"), [("crmsnorm", "layernorm"), ("rmsnorm", "crmsnorm"), ("layernorm", "rmsnorm")]
)
def test_a_source_is_trained_further_under_any_norm_by_its_own_tokens(imported, texts, tmp_path, norm, source_norm):
    """Steps that change nothing end with the source's loss, whatever norm it was imported to."""
    flags, _, loss = texts
    run, origin = tmp_path / "tuned", imported(source_norm)
    flags = [*flags, f"--config.model.norm={norm}", "--config.steps=1", "--config.optimizer.learning_rate=0"]
    here("train.py", f"--config=configs/finetune.py:{origin}", f"--workdir={run}", *flags)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_loss"] == pytest.approx(loss, rel=1e-5)
    data = read_json(run / "config.json")["data"]
    assert (data["tokenizer"], data["eot_token"]) == (str(origin / "tokenizer.json"), END)
    assert ends_of(run) is None, "its texts begin as those that it was trained on: behind an end-of-text token"


def test_the_run_to_train_further_has_to_be_named():
    assert "name the run to start from after a colon" in error_of(
        "train.py", "--config=configs/finetune.py", "--workdir=x"
    )
    assert "no such workdir: nowhere" in error_of("train.py", "--config=configs/finetune.py:nowhere", "--workdir=x")


# --- What a config.json says that no model here computes. ---

REFUSED = {
    "gptj": [
        ({"rotary_dim": None}, "rotary_dim=null changes"),
        ({"activation_function": "gelu_10"}, "'gelu_10' changes"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False changes"),
    ],
    "codegen": [({"n_head": 6, "n_embd": 24}, "n_head=6 is not supported: a codegen's heads are a multiple of 4")],
    "phi": [({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type='dynamic' changes")],
    "stablelm": [({"rotary_pct": 0.5}, r"rotary_pct=0.5 is not how this family says it \(0.25 is read\)")],
    "gpt_neo": [
        ({"num_layers": 3}, "attention_types=.* does not say of each of 3 blocks"),
        ({"attention_types": [[["global", "sparse"], 12]]}, "attention_types=.*'sparse'"),
        ({"attention_layers": ["local"] * 24}, "attention_layers=.* it is not what attention_types says"),
    ],
    "bloom": [({"apply_residual_connection_post_layernorm": True}, "post_layernorm=True changes .*affine and all")],
    "mpt": [
        ({"no_bias": False}, "no_bias=False changes"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale='inv_sqrt_d_model' changes"),
        ({"norm_type": "rmsnorm"}, "norm_type='rmsnorm' changes"),
        ({"attn_config": {"alibi": False}}, "alibi=False changes"),
        ({"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max=16 changes .*reads 8 whatever it says"),
        ({"attn_config": {"qk_ln": True}}, "qk_ln=True changes"),
        ({"attn_config": {"prefix_lm": True}}, "prefix_lm=True changes"),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type='multiquery_attention' changes"),
    ],
    "cohere": [({"hidden_act": "geglu"}, "hidden_act='geglu' changes")],
    "cohere2": [
        ({"sliding_window": None}, "sliding_window=null changes"),
        ({"head_dim": 64}, "head_dim=64 changes"),
        ({"layer_types": ["chunked_attention"] * 40}, "layer_types=.* does not say of each of 40 blocks"),
    ],
    "persimmon": [({"rope_theta": "1e4"}, "rope_theta='1e4' must be of type float")],
    "nemotron": [({"is_causal": False}, "is_causal=False changes")],
    "xglm": [({"add_cross_attention": True}, "add_cross_attention=True changes")],
    "biogpt": [({"scale_embedding": 1}, "scale_embedding=1 must be of type bool")],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_here_computes_is_refused_by_name(name):
    for config, line in REFUSED[name]:
        with pytest.raises(PrenormError, match=line) as error:
            FAMILIES[name].model({"model_type": name} | config)
        assert "\n" not in str(error.value)
