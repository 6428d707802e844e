"""Text from a GPT: with the cache as without it, under every norm, alone as in a batch; sampling; the command."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import SMALL, command, error_of, here
from common import random_inputs, random_params, relative, tiny
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import prenorm_jax.generate as generate_module
from prenorm_jax import PrenormError, build_model, convert_config, convert_params
from prenorm_jax.data.tokenizer import load_tokenizer
from prenorm_jax.models import continuation
from prenorm_jax.models.config import NORMS
from prenorm_jax.models.continuation import TextStream, of_documents, write_texts
from prenorm_jax.models.decoding import NO_TOKEN, decode_step, generate, prefill
from prenorm_jax.models.sampling import Sampling, choice_logits, choose
from prenorm_jax.train import evaluation, workdir

GROUPED = {"heads": 4, "kv_heads": 2, "head_dim": 6}
ROTARY = {"positions": "rotary", "rotary_dim": 4, "rotary_interleaved": True, "clip_qkv": 0.5}
CONFIGS = {
    "learned, tied": {"depth": 2},
    "grouped, rotary, window": GROUPED | {"positions": "rotary", "window": 5, "tie_embeddings": False},
    "sinusoidal, gated": {"positions": "sinusoidal", "gated_mlp": True, "head_bias": True},
    "one key head, parallel, qk_norm, partial rotary": {"kv_heads": 1, "parallel": True, "qk_norm": True}
    | {"qk_norm_by_head": True}
    | ROTARY,
    "no positions, shared norm": {"positions": "none", "parallel": True, "shared_norm": True, "layer_scale": 0.1},
    "alibi, a window in every second block": {"positions": "alibi", "window": 4, "attention_pattern": "lg", "depth": 2}
    | {"score_scale": 1.0},
    "fairseq positions, scaled": {"positions": "fairseq", "embed_scale": 3.5, "logit_scale": 0.1},
    "rounded alibi, untied": GROUPED | {"positions": "alibi", "alibi_rounded": True, "tie_embeddings": False},
    "rotary in local blocks": GROUPED
    | {"positions": "rotary", "window": 5, "attention_pattern": "lg", "global_rotary_base": 0.0, "depth": 2},
    "raw branches": {"dropout": 0.2, "embed_norm": True, "tie_embeddings": False},
}


def model_of(norm="layernorm", seed=4, **changes):
    """A model whose sequences may have 20 tokens, and its parameters: those of one Pre-LN network for all norms."""
    config = tiny(**{"max_len": 20, "depth": 1} | changes)
    params = random_params(config, seed, embedding_mean=3.0)
    if norm != "layernorm":
        config, params = convert_config(config, norm), convert_params(params, config, norm)
    return build_model(config), params


def continuations(model, params, prompts, tokens, **options):
    """What `generate` adds to each prompt."""
    steps = np.array(list(generate(model, params, prompts, tokens, **options)))
    return [[token for token in column.tolist() if token != NO_TOKEN] for column in steps.T]


apply = jax.jit(lambda model, params, tokens: model.apply({"params": params}, tokens), static_argnums=0)


def without_cache(model, params, prompt, tokens):
    """The same of one prompt, greedily, by the model alone. It is causal, so that what is behind does not matter."""
    sequence = list(prompt)
    for _ in range(tokens):
        padded = np.array([sequence + [0] * (model.config.max_len - len(sequence))])
        sequence.append(int(apply(model, params, padded)[0, len(sequence) - 1].argmax()))
    return sequence[len(prompt) :]


# Each norm with two of them, and in the next test with two others.
QUICK = list(zip(CONFIGS, NORMS[1:] + NORMS * 2 + NORMS[:2], strict=True))
GRID = [
    pytest.param(norm, changes, id=f"{norm} {name}", marks=[] if (name, norm) in QUICK else [pytest.mark.wide])
    for norm in NORMS
    for name, changes in CONFIGS.items()
]


@pytest.mark.parametrize(("norm", "changes"), GRID)
def test_greedy_tokens_are_those_of_layernorm_without_a_cache(norm, changes):
    expected = without_cache(*model_of(**changes), [3, 1, 4], 6)
    assert continuations(*model_of(norm, **changes), [[3, 1, 4]], 6) == [expected]


@pytest.mark.parametrize(
    ("norm", "changes"), list(zip((NORMS * 4)[: len(CONFIGS)], CONFIGS.values(), strict=True)), ids=CONFIGS
)
def test_logits_with_the_cache_are_those_of_the_whole_sequence(norm, changes):
    """Whether the tokens after a beginning come one by one, or several at once; and from a cache with room to spare."""
    model, params = model_of(norm, **changes)
    tokens = random_inputs(model.config)
    expected = apply(model, params, tokens)
    begin = jax.jit(lambda v, tokens: model.apply(v, tokens, cache_size=20, mutable=["cache"]))
    beginning, state = begin({"params": params}, tokens[:, :12])
    assert relative(beginning, expected[:, :12]) < 1e-12
    step = jax.jit(lambda v, tokens, t: model.apply(v, tokens, position=t, mutable=["cache"]))
    position = 12
    for count in (1, 1, 5, 1):
        now = slice(position, position + count)
        found, state = step({"params": params, **state}, tokens[:, now], position)
        assert relative(found, expected[:, now]) < 1e-12
        position += count
    assert position == 20


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "norm": "crmsnorm"}, {"head_bias": True}])
def test_logits_at_one_place_of_each_sequence_are_those_of_all(changes):
    model, params = model_of(**changes)
    tokens, at_B = random_inputs(model.config, batch=3), jnp.array([19, 0, 7])
    at = jax.jit(lambda params, at_B: model.apply({"params": params}, tokens, at_B=at_B))
    found = at(params, at_B)
    assert found.shape == (3, 1, model.config.vocab_size)
    assert relative(found[:, 0], apply(model, params, tokens)[jnp.arange(3), at_B]) < 1e-12


def test_only_a_call_that_asks_for_it_makes_a_cache():
    model, params = model_of()
    tokens = jnp.zeros((2, 3), int)

    def state(**options):
        apply = functools.partial(model.apply, mutable=True, **options)
        return jax.eval_shape(apply, {"params": params}, tokens)[1]

    assert jax.eval_shape(model.init, jax.random.key(0), tokens).keys() == {"params"}
    assert state().keys() == {"params"}
    assert {leaf.shape for leaf in jax.tree.leaves(state(cache_size=9)["cache"])} == {(2 * 2, 9, 6)}
    for options in ({"cache_size": 2}, {"cache_size": 21}, {"cache_size": 9, "position": 3}):
        with pytest.raises(PrenormError, match=f"cache_size={options['cache_size']} must be from 3"):
            state(**options)


def test_prompts_of_other_lengths_change_nothing():
    model, params = model_of(**CONFIGS["grouped, rotary, window"])
    prompts = [[5, 2, 7, 1, 9], [3], [8, 8, 0]]
    assert continuations(model, params, prompts, 7) == [without_cache(model, params, prompt, 7) for prompt in prompts]
    # The place in the batch decides the random numbers: the first is as it is alone.
    sampling = Sampling(temperature=1.5, top_p=0.9)
    alone = continuations(model, params, prompts[:1], 7, sampling=sampling)
    assert continuations(model, params, prompts, 7, sampling=sampling)[:1] == alone


def test_sampling_is_decided_by_the_seed_and_the_place_in_the_batch():
    model, params = model_of()

    def sample(seed):
        return continuations(model, params, [[3], [3]], 15, sampling=Sampling(temperature=3), seed=seed)

    assert sample(0) == sample(0) != sample(1)
    assert sample(0)[0] != sample(0)[1]
    crms = model_of("crmsnorm")
    assert continuations(*crms, [[3], [3]], 15, sampling=Sampling(temperature=3)) == sample(0)


def test_each_prompt_stops_by_itself():
    model, params = model_of()
    prompts = [[5, 2, 7], [3], [1] * 20, [4] * 18]
    found = continuations(model, params, prompts, 10)
    # The last token of a full sequence can still be followed by one, which then nobody reads.
    assert [len(tokens) for tokens in found] == [10, 10, 1, 3]
    end = found[0][4]
    stopped = continuations(model, params, prompts, 10, end=end)
    for tokens, before in zip(stopped, found, strict=True):
        assert tokens == (before[: before.index(end) + 1] if end in before else before)
    # An end-of-text token in a prompt stops nothing.
    assert len(continuations(model, params, [[3], [3, end, 5]], 2)[1]) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 21], {}, "a prompt of 21 tokens, the first one included, exceeds model.max_len=20"),
        ([[1], []], {}, "a prompt holds no token"),
        ([], {}, "a prompt holds no token"),
        ([[1, 11]], {}, "tokens that are not integers from 0 to 10"),
        ([[-1]], {}, "tokens that are not integers from 0 to 10"),
        ([[2**31]], {}, "tokens that are not integers from 0 to 10"),
        ([[2**32 + 1]], {}, "tokens that are not integers from 0 to 10"),
        ([[1], [2**70]], {}, "tokens that are not integers from 0 to 10"),
        ([[1, 2.5]], {}, "tokens that are not integers from 0 to 10"),
        ([np.ones(3)], {}, "tokens that are not integers from 0 to 10"),
        ([["a"]], {}, "tokens that are not integers from 0 to 10"),
        ([[1]], {"tokens": 2.5}, "tokens=2.5 must be an integer"),
        ([[1]], {"seed": 0.5}, "seed=0.5 must be an integer"),
        ([[1]], {"end": 3.5}, "end=3.5 must be an integer"),
        ([[1]], {"tokens": 0}, "tokens=0 must be at least 1"),
        ([[1]], {"seed": -1}, "seed=-1 must be at least 0"),
        ([[1]], {"seed": 2**32}, "and below 4294967296"),
    ],
)
def test_what_generate_refuses(prompts, options, message):
    with pytest.raises(PrenormError) as error:
        generate(*model_of(), prompts, **{"tokens": 3} | options)
    assert message in str(error.value)


def test_numbers_of_tokens_that_no_array_holds_are_as_good_as_many():
    model, params = model_of()
    for prompt in ([3], np.array([3], np.uint8), jnp.array([3])):
        assert continuations(model, params, [prompt], 10**20) == continuations(model, params, [[3]], 20)
    logits_BxV = jnp.arange(4.0)[None]
    np.testing.assert_array_equal(choice_logits(logits_BxV, Sampling(1.0, 10**20)), logits_BxV - 3)


# --- sampling


def numpy_probabilities(logits_V, temperature, top_k, top_p):
    """Of the next token, by definition."""
    p = np.exp((logits_V - logits_V.max()) / temperature)
    order = np.argsort(-p, kind="stable")[:top_k]
    kept, total = [], 0.0
    for i in order:
        if top_p is not None and total >= top_p:
            break
        kept.append(i)
        total += p[i] / p[order].sum()
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (50, None), (None, 0.6), (4, 0.8), (None, 1.0)])
def test_probabilities_are_those_of_the_definition(temperature, top_k, top_p):
    logits_BxV = np.random.default_rng(0).normal(size=(20, 9))
    logits_BxV[1] = 0.0  # of equal tokens the first stay
    found = jax.nn.softmax(choice_logits(jnp.asarray(logits_BxV), Sampling(temperature, top_k, top_p)))
    for row, logits_V in zip(found, logits_BxV, strict=True):
        np.testing.assert_allclose(row, numpy_probabilities(logits_V, temperature, top_k, top_p), atol=1e-14)


def test_samples_have_these_probabilities():
    sampling, logits_V = Sampling(0.7, top_k=4, top_p=0.95), np.array([0.3, -1.0, 1.2, 0.9, 0.0, 0.5])
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = choose(jnp.tile(logits_V, (len(keys), 1)), sampling, keys, position=3)
    expected = numpy_probabilities(logits_V, 0.7, 4, 0.95)
    counts = np.bincount(tokens, minlength=6)
    assert ((counts == 0) == (expected == 0)).all() and (expected == 0).sum() == 2
    deviation = np.sqrt(expected * (1 - expected) / len(keys))
    assert (np.abs(counts / len(keys) - expected) <= 4 * deviation).all()


def test_the_limits_of_sampling_are_greedy():
    keys, logits_BxV = jax.random.split(jax.random.key(0), 50), np.random.default_rng(0).normal(size=(50, 9)) * 1e4
    for sampling in (Sampling(), Sampling(1.0, top_k=1), Sampling(9.0, top_p=1e-9), Sampling(1e-30), Sampling(1e-300)):
        for dtype in (jnp.float32, jnp.bfloat16):
            logits_in_it = jnp.asarray(logits_BxV, dtype)
            assert (choose(logits_in_it, sampling, keys, 0) == logits_in_it.argmax(-1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0 and finite"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k=2.5 must be an integer"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"top_k": 3}, "set a temperature above 0"),
        ({"top_p": 0.5}, "set a temperature above 0"),
    ],
)
def test_what_sampling_refuses(options, message):
    with pytest.raises(PrenormError) as error:
        Sampling(**options)
    assert message in str(error.value)


# --- text


def pieces(tokenizer, prompt, ids):
    stream = TextStream(tokenizer.decode, prompt)
    return [*(stream.push(i) for i in ids), stream.rest()]


def test_characters_come_whole():
    tokenizer = load_tokenizer("bytes")
    text = "aé€😀\N{REPLACEMENT CHARACTER}b"
    found = pieces(tokenizer, [], text.encode())
    assert "".join(found) == text
    assert [piece for piece in found if piece] == ["a", "é", "€", "😀", "\N{REPLACEMENT CHARACTER}b"]
    # What can never be complete is replaced, as the whole text would be; the end of the text too.
    broken = b"\xff\xffa\xe2\x82b\xf0\x9f\x98"
    assert "".join(pieces(tokenizer, [], broken)) == broken.decode(errors="replace")
    assert tokenizer.decode([97, 256, 300]) == "a"  # end-of-text and ids that no text has


def test_the_pieces_of_a_tokenizer_make_its_text(tmp_path):
    def saved(tokenizer):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(str(tmp_path / "tokenizer.json"))

    words = saved(Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="a")))
    assert pieces(words, [0, 1], [2, 0]) == [" c", " a", ""]
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet | {"</s>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    by_byte = saved(tokenizer)
    ids = by_byte.encode(["n 😀é x"])[0].tolist()
    assert [piece for piece in pieces(by_byte, ids[:1], ids[1:]) if piece] == [" ", "😀", "é", " ", "x"]


def test_texts_end_where_they_should():
    model, params = model_of(vocab_size=257, max_len=16, head_bias=True)
    shown, tokenizer = [], load_tokenizer("bytes")

    def write(prompts, likely, show=None):
        biased = params | {"head_bias": params["head_bias"].at[likely].add(1e4)}
        convention = of_documents(tokenizer)
        return write_texts(model, biased, convention, prompts, 5, Sampling(), 0, *([show] if show else []))

    prompts = ["é", "0123456789abcd", ""]
    results = write(prompts, ord("x"), shown.append)
    assert [dataclasses.astuple(result) for result in results] == [
        ("é", "xxxxx", 5, "tokens"),
        ("0123456789abcd", "xx", 2, "max_len"),
        ("", "xxxxx", 5, "tokens"),
    ]
    assert shown == ["é", *"xxxxx"]
    assert dataclasses.astuple(write(["ab"], 256)[0]) == ("ab", "", 0, "end-of-text")
    assert write(["ab"], 0xE2)[0].text == 5 * "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(PrenormError, match="not valid UTF-8"):
        write(["\udcff"], 0)


def test_the_step_takes_over_the_cache():
    model, params = model_of()
    _, cache = prefill(model, params, jnp.zeros((1, 3), int), 9)
    decode_step(model, params, cache, jnp.zeros(1, jnp.int32), 3, jax.random.split(jax.random.key(0), 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


# --- the command


@pytest.mark.parametrize("scan", [False, True])
def test_the_command_casts_what_the_model_reads_in_its_dtype_once_and_rounds_nothing_twice(monkeypatch, scan):
    config = tiny(vocab_size=257, head_bias=True, scan=scan, dtype="bfloat16", param_dtype="float32")
    params = random_params(config, 4, embedding_mean=3.0)
    given = {}
    run = ConfigDict({"model": dict(vars(config)), "data": {"tokenizer": "bytes", "eot_token": None}})
    monkeypatch.setattr(workdir, "load_config", lambda workdir: run)
    monkeypatch.setattr(workdir, "configure_jax", lambda config: None)
    monkeypatch.setattr(evaluation, "load_as", lambda workdir, norm, step: ({"step": 1}, config, params))
    monkeypatch.setattr(
        continuation, "write_texts", lambda model, params, *rest: given.update(model=model, params=params) or []
    )
    generate_module.main(["run"])
    assert generate_module.generate is generate, "which Python users import from there"
    flat = flatten_dict(given["params"])
    read = {path[-1]: leaf.dtype for path, leaf in flat.items()}
    assert read.pop("kernel") == read.pop("token_embedding") == read.pop("position_embedding") == jnp.bfloat16
    assert set(read.values()) == {jnp.dtype("float32")}
    tokens = random_inputs(config)
    np.testing.assert_array_equal(apply(given["model"], given["params"], tokens), apply(given["model"], params, tokens))


@pytest.mark.slow
def test_the_command_on_a_run(text, tmp_path):
    run, vit = tmp_path / "ln", tmp_path / "vit"
    here("train.py", *SMALL, f"--config.data.path={text}", f"--workdir={run}", "--config.model.max_len=48")
    generate_text = ["-m", "prenorm_jax.generate"]
    plain = command(*generate_text, run, "--prompt=def é", "--tokens=20").stdout
    assert plain.startswith("def é") and len(plain) > 10
    assert "unknown norm 'batchnorm'" in error_of(*generate_text, run, "--norm=batchnorm")
    for norm in ("rmsnorm", "crmsnorm"):
        assert here(*generate_text, run, "--prompt=def é", "--tokens=20", f"--norm={norm}").stdout == plain
    several = [*generate_text, run, "--prompt=def é", "--prompt=", "--tokens=60", "--step=3"]
    printed = here(*several, "--json")
    result = json.loads(printed.stdout)
    assert (result["step"], result["norm"]) == (3, "layernorm")
    assert [text["prompt"] for text in result["texts"]] == ["def é", ""]
    full = [str(i) for i, text in enumerate(result["texts"], 1) if text["end"] == "max_len"]
    assert full and printed.stderr == f"stopped where model.max_len=48 is full (prompt {', '.join(full)})\n"
    headed = here(*several).stdout
    for i, text in enumerate(result["texts"], 1):
        assert f"--- {i} of 2, {text['tokens']} tokens\n{text['prompt']}{text['text']}\n" in headed

    message = error_of(*generate_text, run, "--prompt=" + 48 * "a")
    assert "a prompt of 49 tokens, the first one included, exceeds model.max_len=48" in message
    vit.mkdir()
    (vit / "config.json").write_text('{"model": {"family": "vit"}}')
    assert "is the run of a vit: only a gpt writes text" in error_of(*generate_text, vit)
