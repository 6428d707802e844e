"""What a certificate's two networks are given: inputs under which those that differ in any one thing differ.

Shapes never tell a query from a key, or one rotary pairing from the other. Outputs do, of inputs such as these. In a
causal model each position is a probe too: the first sees itself alone, where what comes out is values and MLP, not
queries and keys.
"""

from typing import NamedTuple

import numpy as np

from prenorm_jax.models.config import ModelConfig

LARGEST_LOGITS = 2**30  # bytes of a sequence's logits in float64, all of which are computed
COMPARED = 2**26  # bytes of the compared outputs in float64, which are kept


class Probe(NamedTuple):
    """One input, (1, T) tokens or (1, side, side, C) numbers, and what it is for."""

    name: str
    why: str
    inputs: np.ndarray


def probes_of(config: ModelConfig, length: int | None = None, seed: int = 0) -> list[Probe]:
    """The probes of a model; `length`: tokens of each, None for all that it has positions for, where that can be."""
    rng = np.random.default_rng(seed)
    return _texts(config, length, rng) if config.inputs == "text" else _images(config, rng)


def affordable_length(config: ModelConfig) -> int:
    """`max_len`, or as many tokens as have logits of `LARGEST_LOGITS` bytes."""
    return max(1, min(config.max_len, LARGEST_LOGITS // (8 * config.vocab_size)))


def _texts(config: ModelConfig, length: int | None, rng: np.random.Generator) -> list[Probe]:
    V, T = config.vocab_size, length or affordable_length(config)
    ends = np.stack([np.arange(T) // 2 % V, V - 1 - np.arange(T) // 2 % V], 1).ravel()[:T]
    found = {
        "random": (
            "tokens of the whole vocabulary at every position: a query for a key, a head for another, a transposed "
            "square kernel, another activation or ε",
            rng.integers(V, size=T),
        ),
        "one token": (
            "the same token everywhere, so that positions alone tell keys apart: rotary pairs and base, offsets of a "
            "table, slopes, windows",
            np.full(T, rng.integers(V)),
        ),
        "phrase": (
            "five tokens again and again, the same key at many distances: relative positions, key heads that are "
            "grouped in another way",
            np.resize(rng.integers(V, size=5), T),
        ),
        "ends": (
            "the first and the last ids of the vocabulary in turn: rows that are cut off, padded or shifted",
            ends,
        ),
    }
    if not config.token_outputs and config.pooling == "eos":  # at the end, lest a causal model's output be of one token
        for _, tokens in found.values():
            tokens[-1] = V - 1 if config.eos_token is None else config.eos_token
    return [Probe(name, why, tokens[None].astype(np.int32)) for name, (why, tokens) in found.items()]


def _images(config: ModelConfig, rng: np.random.Generator) -> list[Probe]:
    shape = (1, *config.image_shape)
    ramp = np.linspace(-2, 2, int(np.prod(shape))).reshape(shape)
    found = {
        "noise": (
            "numbers of size 1: a query for a key, a head for another, another activation or ε",
            rng.normal(size=shape),
        ),
        "one value": (
            "the same number everywhere, so that positions alone tell patches apart: rows of their table, the class "
            "token's, registers",
            np.ones(shape),
        ),
        "ramp": ("every number another, in order: the order of pixels, channels and patches", ramp),
    }
    return [Probe(name, why, values.astype(np.float32)) for name, (why, values) in found.items()]


def compared_positions(config: ModelConfig, probes: list[Probe]) -> np.ndarray:
    """The positions whose logits are compared and kept: all, or evenly spaced ones, the first and the last among them.

    Of images and pooled texts, which have one output each, just one.
    """
    if not config.token_outputs:
        return np.zeros(1, int)
    length = probes[0].inputs.shape[1]
    count = max(2, COMPARED // (8 * config.vocab_size * len(probes)))
    return np.arange(length) if length <= count else np.unique(np.linspace(0, length - 1, count).round().astype(int))
