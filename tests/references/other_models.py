"""A GPT in Equinox and one in Haiku. Imported by the tests that need these libraries, which other tests do not have."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7))
WIDTH = 8


class EquinoxBlock(eqx.Module):
    norms: list
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, use_output_bias=True, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 16, 1, activation=jax.nn.gelu, key=second)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class EquinoxGPT(eqx.Module):
    embed: eqx.nn.Embedding
    positions: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(11, WIDTH, key=keys[0])
        self.positions = jax.random.normal(keys[1], (7, WIDTH))
        self.blocks = [EquinoxBlock(key) for key in keys[2:4]]
        self.norm, self.head = eqx.nn.LayerNorm(WIDTH), eqx.nn.Linear(WIDTH, 11, key=keys[4])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(lambda x: self.head(self.norm(x)))(x)


def equinox() -> tuple[Callable[..., Any], Any]:
    params, static = eqx.partition(EquinoxGPT(jax.random.key(0)), eqx.is_inexact_array)
    return lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens), params


def haiku() -> tuple[Callable[..., Any], Any]:
    def network(tokens: jax.Array) -> jax.Array:
        x = hk.Embed(11, WIDTH)(tokens)
        for _ in range(2):
            h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
            x = x + hk.MultiHeadAttention(2, 4, model_size=WIDTH, w_init=hk.initializers.RandomNormal())(h, h, h)
            h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
            x = x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(16)(h)))
        return hk.Linear(11)(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x))

    model = hk.without_apply_rng(hk.transform(network))
    return model.apply, model.init(jax.random.key(0), jnp.asarray(TOKENS))
