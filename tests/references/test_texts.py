"""What follows a prompt, beside transformers' own tokenizers and `generate`, in float64."""

import json

import checkpoints as theirs
import pytest
from commands import here
from tiny_tokenizer import TEXT, tiny_tokenizer, write_slow

from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.tokens import SourceTexts

pytestmark = pytest.mark.reference
nothing_compared = theirs.nothing_compared

V, T, D, H = 288, 48, 24, 3
GPT2 = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": 2, "n_head": H}
LATER = {"vocab_size": V, "max_position_embeddings": T, "hidden_size": D, "num_hidden_layers": 2}
LATER |= {"num_attention_heads": H}
PROMPTS = ("the cat", "def main(", " 12 naïve 😀")
SLOW = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
SLOW |= dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "</s>")

# name -> model_type, config.json, tokenizer, tokenizer_config.json (None: no such file), whether vocab.json and
# merges.txt stand for tokenizer.json, and the norm that it is imported to
CASES = {
    "gpt2": ("gpt2", GPT2, tiny_tokenizer(), {"tokenizer_class": "GPT2Tokenizer"}, False, "crmsnorm"),
    "neox": ("gpt_neox", LATER | {"intermediate_size": 40}, tiny_tokenizer(), None, False, "rmsnorm"),
    "opt": ("opt", LATER | {"ffn_dim": 40, "pad_token_id": 0}, tiny_tokenizer("</s>"), SLOW, True, "crmsnorm"),
    "falcon": (
        "falcon",
        LATER,
        tiny_tokenizer(begins=True),
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        False,
        "layernorm",
    ),
}


@pytest.fixture(scope="module", params=theirs.grouped(CASES))
def case(request, tmp_path_factory):
    """A folder that the library wrote, its model, two tokens that end its texts, and a norm."""
    model_type, config, tokenizer, options, slow, norm = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "source"
    # OPT's padding row must be zero in the library, and is drawn at random here: 0 never follows.
    model = theirs.make(model_type, **{"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None} | config)
    first = theirs.generate(model, tokenizer.encode(PROMPTS[0]).ids, 20)
    ends = [269, next((each for i, each in enumerate(first) if i > 3 and each not in first[:i]), 268)]
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = ends, 0
    model.save_pretrained(folder)
    write_slow(tokenizer, folder) if slow else tokenizer.save(str(folder / "tokenizer.json"))
    if options is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder, theirs.load(folder), ends, norm


def test_the_command_adds_what_the_library_adds_token_for_token(case, tmp_path):
    folder, model, ends, norm = case
    run, library = tmp_path / "run", theirs.transformers().AutoTokenizer.from_pretrained(folder)
    import_checkpoint(folder, run, norm)
    given = [theirs.tokens_of(folder, prompt) for prompt in PROMPTS]
    expected = [theirs.generate(model, ids, 24) for ids in given]
    assert any(tokens[-1] in ends for tokens in expected), "that some text ends, and another than that of a wrong end"

    def said(*options):
        return json.loads(here("-m", "prenorm_jax.generate", run, "--tokens=24", "--json", *options, x64=True).stdout)

    as_ids = [f"--prompt-ids={','.join(map(str, ids))}" for ids in given]
    by_ids, by_text = said(*as_ids)["texts"], said(*[f"--prompt={prompt}" for prompt in PROMPTS])["texts"]
    further = said(*as_ids, "--ignore-eos")["texts"]
    for i, (prompt, ids) in enumerate(zip(PROMPTS, given, strict=True)):
        shown = [each for each in expected[i] if each not in ends]
        assert by_ids[i]["text"].lstrip(",") == ",".join(map(str, shown))
        assert (by_text[i]["tokens"], by_text[i]["end"]) == (len(shown), by_ids[i]["end"])
        assert by_text[i]["text"] == library.decode([*ids, *shown], skip_special_tokens=True)[len(prompt) :]
        on = theirs.generate(model, ids, 24, eos_token_id=None)
        assert further[i]["text"].lstrip(",") == ",".join(map(str, on))


def test_a_tokenizer_is_the_librarys_on_any_text(case):
    folder, *_ = case
    ours = SourceTexts.of(folder, json.loads((folder / "config.json").read_text()), V).tokenizer
    for text in ("", TEXT, " leading  spaces\n\n\tit's naïve 😀 12345", "a<|endoftext|>b</s> c"):
        assert ours.encode(text).ids == theirs.tokens_of(folder, text)


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({}, None),
        ({"bos_token_id": 3, "eos_token_id": [4, 5]}, None),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"max_length": 7}),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"bos_token_id": 1, "eos_token_id": [2, 3]}),
    ],
)
def test_where_files_disagree_the_ends_are_the_librarys(tmp_path, config, generation):
    folder = tmp_path / "source"
    theirs.make("gpt2", **GPT2).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in content.items() if not key.endswith("os_token_id")} | config
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    found = SourceTexts.of(folder, content, V).ends
    library = theirs.load(folder).generation_config
    end = library.eos_token_id
    assert found.begin == library.bos_token_id
    assert found.end == tuple([] if end is None else end if isinstance(end, list) else [end])
