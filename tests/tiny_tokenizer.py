"""A byte-level BPE as GPT-2's, of few tokens, in the files that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
TEXT = "def main(hello, world): the cat sat on the mat, 12345 times; it's the end of the other thing."


def tiny_tokenizer(special: str = END, begins: bool = False) -> Tokenizer:
    """270 tokens: `special`, which is 0, bytes, and pairs of them. With `begins` it stands before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": 270, "special_tokens": [special], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(**options))
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special} $A", pair=f"{special} $A $B", special_tokens=[(special, 0)]
        )
    return tokenizer


def write_slow(tokenizer: Tokenizer, folder: Path) -> None:
    """vocab.json and merges.txt, as before there was a tokenizer.json."""
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
