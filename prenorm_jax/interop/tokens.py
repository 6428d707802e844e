"""How a source reads and ends texts: its tokenizer, what stands before a prompt, and its end-of-text tokens.

Beside `source/` an imported workdir has, of a language model that came with a tokenizer of `tokenizers`,

    tokenizer.json       that tokenizer, as the source's own library makes it of all its files

and in `source/checkpoint.json` what its library's `generate` would begin and end a text with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.base.files import read_json
from prenorm_jax.train.workdir import SOURCE

ABOUT = "checkpoint.json"  # in `source/`
TOKENIZER = "tokenizer.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# transformers' classes that make more of the files than is in tokenizer.json: the special tokens that they add.
_END = "<|endoftext|>"
_CLASSES: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END) | {"pad_token": "<|padding|>"},
}
_BY_FAMILY = dict.fromkeys(
    ("gpt2", "opt", "starcoder2", "gptj", "gpt_neo"), "GPT2Tokenizer"
)  # where the files name no class
_BY_FAMILY |= dict.fromkeys(("gpt_neox", "olmo"), "GPTNeoXTokenizer")

# Keys of generation_config.json under which transformers' greedy continuation is not the likeliest token each time,
# and the values under which it is.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}


class Ends(NamedTuple):
    """What the source's `generate` begins and ends texts with.

    Attributes:
      begin: the token that an empty prompt starts from; None: there is none.
      end: the tokens any of which ends a text.
      otherwise: "key=value" of its generation_config.json for what changes even its greedy continuation, and is not
        done here.
    """

    begin: int | None
    end: tuple[int, ...]
    otherwise: tuple[str, ...] = ()


class SourceTexts(NamedTuple):
    """How a language model's source reads and ends texts.

    Attributes:
      tokenizer: None if there is none that `tokenizers` alone can make.
      eot_token: what separates texts in training: the first token that ends one; None: not known by name.
    """

    tokenizer: Tokenizer | None
    ends: Ends
    eot_token: str | None

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], vocab_size: int) -> SourceTexts:
        """Those of a source's folder. `config`: its config.json. Raises PrenormError for what is damaged."""
        tokenizer, ends = source_tokenizer(folder, config, vocab_size), source_ends(folder, config)
        token = tokenizer.id_to_token(ends.end[0]) if tokenizer and ends.end else None
        return cls(tokenizer, ends, token or None)


def source_ends(folder: Path, config: Mapping[str, Any]) -> Ends:
    """What stands in generation_config.json, or, only where there is none, in config.json, as transformers has it.

    (Tokens that are named in neither are none: the classes' own defaults do not count.) Raises PrenormError.
    """
    file = folder / "generation_config.json"
    given = read_json(file) if file.is_file() else config
    ids = {key: given.get(key) for key in ("bos_token_id", "eos_token_id")}
    lists = {key: [] if value is None else value if isinstance(value, list) else [value] for key, value in ids.items()}
    for key, values in lists.items():
        if any(type(value) is not int or value < 0 for value in values):
            where = file.name if given is not config else "config.json"
            raise PrenormError(f"{where}: {key}={ids[key]!r} is no token: mend it, or remove the key")
    begin, end = lists.values()
    values = {key: given.get(key) for key in _PLAIN}
    otherwise = [f"{key}={value!r}" for key, value in values.items() if value and value not in _PLAIN[key]]
    return Ends(begin[0] if begin else None, tuple(end), tuple(otherwise))


def ends_of(workdir: str | Path) -> Ends | None:
    """Those of what the run in a workdir was imported from; None for a run that began here."""
    file = Path(workdir) / SOURCE / ABOUT
    found = read_json(file).get("texts") if file.is_file() else None
    return found and Ends(found["begin"], tuple(found["end"]), tuple(found["otherwise"]))


def source_tokenizer(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a folder that transformers wrote; None if there is none that `tokenizers` alone can make.

    tokenizer.json says which, or GPT-2's vocab.json and merges.txt; the special tokens of the other files are added,
    and left out where the model has no row for them. No pickle is opened. `config`: the folder's config.json.
    transformers 5 takes GPT-2's pre-tokenizer by the name of a class, whatever tokenizer.json says; here the file
    counts, with which the model was trained. Raises PrenormError for files that are damaged.
    """
    options = {**_json(folder / "tokenizer_config.json")}
    named = options.get("tokenizer_class") or config.get("tokenizer_class") or _BY_FAMILY.get(config["model_type"], "")
    kind = str(named).removesuffix("Fast")
    try:
        if (folder / TOKENIZER).is_file():
            tokenizer = Tokenizer.from_str(json.dumps(_adjusted(_json(folder / TOKENIZER), kind, options)))
        elif (folder / "vocab.txt").is_file() and config["model_type"] == "esm":
            tokenizer = _residues(folder)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and kind in _CLASSES:
            tokenizer = _byte_level(folder, kind, options)
        else:
            return None
        names = _CLASSES.get(kind, {}) | {key: value for key, value in _names(folder, options).items() if value}
        _add_special(tokenizer, names, options, _json(folder / "added_tokens.json"))
        if not (folder / TOKENIZER).is_file():
            _frame(tokenizer, names, options)
        known = json.loads(tokenizer.to_str())
        known["added_tokens"] = [token for token in known["added_tokens"] if token["id"] < vocab_size]
        return Tokenizer.from_str(json.dumps(known))
    except PrenormError:
        raise
    except Exception as error:  # `tokenizers` raises nothing more special, and files of any kind may lie there
        raise PrenormError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}): download its files again, or remove them "
            "and name another where one is needed"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _adjusted(content: dict[str, Any], kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json as the class changes it: a space before the text or not; NeoX has no post-processor."""
    if kind in _CLASSES and (first := content.get("pre_tokenizer")):
        for part in first.get("pretokenizers", [first]):
            if part["type"] == "ByteLevel":
                part["add_prefix_space"] = options.get("add_prefix_space", False)
    if kind == "GPTNeoXTokenizer":
        content["post_processor"] = None
    return content


def _byte_level(folder: Path, kind: str, options: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's byte-level BPE, of vocab.json and merges.txt."""
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    vocabulary, merges = models.BPE.read_file(*files)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    if kind == "GPTNeoXTokenizer":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _residues(folder: Path) -> Tokenizer:
    """ESM's, of vocab.txt: each token a residue, wherever it stands, between a beginning and an end."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
    ends = [(word, tokenizer.token_to_id(word)) for word in ("<cls>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <eos>", special_tokens=ends)
    return tokenizer


def _names(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json names; where it does not list all added tokens, special_tokens_map.json counts."""
    return options if "added_tokens_decoder" in options else options | _json(folder / "special_tokens_map.json")


def _add_special(tokenizer: Tokenizer, names: dict[str, Any], options: dict[str, Any], others: dict[str, int]) -> None:
    """Adds the tokens that the other files name and the tokenizer does not treat as such yet."""

    def wanted() -> Iterator[AddedToken]:
        for _, token in sorted(options.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            yield _added(token)
        special = [names[key] for key in _NAMED if key in names]
        extra = names.get("extra_special_tokens") or names.get("additional_special_tokens") or []
        special += extra.values() if isinstance(extra, dict) else extra
        texts = {_added(token).content for token in special}
        for text in sorted(others, key=others.get):
            yield AddedToken(text, special=text in texts, normalized=text not in texts)
        yield from map(_added, special)

    for token in wanted():
        there = {known.content for known in tokenizer.get_added_tokens_decoder().values()}
        if token.content not in there:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _added(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    known = ("lstrip", "rstrip", "single_word", "normalized")
    flags = {key: value for key, value in token.items() if key in known}
    return AddedToken(token["content"], special=token.get("special", True), **flags)


def _frame(tokenizer: Tokenizer, names: dict[str, Any], options: dict[str, Any]) -> None:
    """Gives a tokenizer without tokenizer.json what its class puts around a text: add_bos_token, add_eos_token."""
    single, special = ["$A"], []
    for key, place in (("bos_token", 0), ("eos_token", 2)):
        if options.get(f"add_{key}"):
            text = _added(names[key]).content
            single.insert(place, text)
            special.append((text, tokenizer.token_to_id(text)))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
