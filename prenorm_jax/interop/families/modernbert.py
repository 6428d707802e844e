"""ModernBERT (transformers' `modernbert`): a masked language model, a classifier, or its tokens without a head.

Block 0's attention has no norm of its own: it reads the embedding's LayerNorm as it is, and the stream beside it alone
loses its mean. Blocks see all or `local_attention` tokens around their own, each kind with its own rotary base.
"""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _config(given: Given) -> dict[str, Any]:
    attention, mlp = given("attention_bias", default=False), given("mlp_bias", default=False)
    depth = given("num_hidden_layers", default=22)
    # What training, other implementations and older versions go by.
    given.asked |= {"deterministic_flash_attn", "reference_compile", "repad_logits_with_grad", "sparse_prediction"}
    given.asked |= {"sparse_pred_ignore_index", "position_embedding_type", "layer_norm_eps"}
    return (
        _head(given)
        | _attention(given, depth)
        | {
            "vocab_size": given("vocab_size", default=50368),
            "max_len": given("max_position_embeddings", default=8192),
            "embed_norm": True,
            "first_norm": False,
            "d_model": given("hidden_size", default=768),
            "depth": depth,
            "heads": given("num_attention_heads", default=12),
            "mlp_dim": given("intermediate_size", default=1152),
            "gated_mlp": True,
            "activation": given.activation("hidden_activation", default="gelu"),
            "use_bias": attention or mlp,
            "reader_bias": mlp,
            "qkv_bias": attention,
            "norm_bias": given("norm_bias", default=False),
            "epsilon": given("norm_eps", default=1e-5),
            "embed_dropout": float(given("embedding_dropout", default=0.0)),
            "branch_dropout": 0.0,
            "attention_dropout": float(given("attention_dropout", default=0.0)),
        }
    )


def _head(given: Given) -> dict[str, Any]:
    """The keys of the head: the vocabulary's, a classifier's of tokens or of a pooled one, or none."""
    head = given.masked_language_model("decoder.bias" if given("decoder_bias", default=True) else "head.dense.weight")
    classifies = "classifier.weight" in given.shapes
    pooling, bias = given("classifier_pooling", default="cls"), given("classifier_bias", default=False)
    if not (classifies or head["transform"]):
        return head
    given.only("classifier_activation", given("hidden_activation", default="gelu"), why="here it is that of the blocks")
    if not classifies:
        return head | {"transform_bias": bias, "head_bias": given("decoder_bias", default=True)}
    kind = str((given("architectures", default=None) or [""])[0]).removeprefix("ModernBertFor")
    if kind not in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        raise PrenormError(f"config.json: architectures name no ModernBERT whose classifier is known here ({kind!r})")
    pooled = {"cls": "first", "mean": "mean"}
    given.only("classifier_pooling", *pooled)
    return head | {
        "transform": True,
        "tie_embeddings": False,
        "outputs": given.shapes["classifier.weight"][0],
        "pooling": pooled[pooling] if kind == "SequenceClassification" else "none",
        "transform_bias": bias,
    }


def _attention(given: Given, depth: int) -> dict[str, Any]:
    """The keys that say which block sees how far, and how it turns queries and keys; in either spelling."""
    if (every := given("global_attn_every_n_layers", default=3)) < 1:
        raise PrenormError(f"config.json: global_attn_every_n_layers={every} must be at least 1")
    kinds = given("layer_types", default=[]) or [_LOCAL if i % every else _GLOBAL for i in range(depth)]
    if len(kinds) != depth or not all(kind in (_GLOBAL, _LOCAL) for kind in kinds):
        raise PrenormError(f"config.json: layer_types must name {_GLOBAL} or {_LOCAL} for each of {depth} layers")
    if given("rope_scaling", default=None):
        raise PrenormError("config.json: rope_scaling changes the function and is not supported: remove it")
    parameters, bases = given("rope_parameters", default={}), []
    for kind, key, default in ((_GLOBAL, "global_rope_theta", 160000.0), (_LOCAL, "local_rope_theta", 10000.0)):
        rope = Given(parameters)(kind, default={})
        if (how := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise PrenormError(f"config.json: rope_type={how!r} changes the function and is not supported: default is")
        old = given(key, default=default)
        bases.append(Given(rope)("rope_theta", default=float(old)))
    pattern = "".join("l" if kind == _LOCAL else "g" for kind in kinds)
    return {
        "positions": "rotary",
        "attention_pattern": pattern,
        "window": given("local_attention", "sliding_window", default=128) // 2
        + 1,  # its own, and so many on either side
        "rotary_base": bases[1],
        "global_rotary_base": bases[0] if "g" in pattern else None,
    }


_TABLE = """
embeddings.tok_embeddings.weight        v d        token_embedding
embeddings.norm.{weight,bias}           d          embedding_norm/{scale,bias}
layers.{i}.attn_norm.{weight,bias}      d          block_{i}/attention_norm/{scale,bias}             # but of block 0
layers.{i}.attn.Wqkv.weight             (p h k) d  block_{i}/attention/{query,key,value}/kernel      d (h k)
layers.{i}.attn.Wqkv.bias               (p h k)    block_{i}/attention/{query,key,value}/bias        (h k)
layers.{i}.attn.Wo.weight               d (h k)    block_{i}/attention/out/kernel                    (h k) d
layers.{i}.mlp_norm.{weight,bias}       d          block_{i}/mlp_norm/{scale,bias}
layers.{i}.mlp.Wi.weight                (p f) d    block_{i}/mlp/{gate,up}/kernel                    d f
layers.{i}.mlp.Wi.bias                  (p f)      block_{i}/mlp/{gate,up}/bias                      f
layers.{i}.mlp.Wo.weight                d f        block_{i}/mlp/down/kernel                         f d
final_norm.{weight,bias}                d          head_norm/{scale,bias}                            # if read
final_norm.{weight,bias}                d          head_affine/{scale,bias}                          # if not
head.dense.weight                       e d        transform/kernel                                  d e
head.dense.bias                         d          transform/bias
head.norm.{weight,bias}                 d          transform_norm/{scale,bias}
"""
_VOCABULARY = """
decoder.bias                            v          head_bias                                         # tied
decoder.bias                            o          head/bias                                         # untied, and:
decoder.weight                          v d        head/kernel                                       d v
"""
_CLASSIFIER = """
classifier.weight                       o d        head/kernel                                       d o
classifier.bias                         o          head/bias
"""


def _table(given: Given) -> str:
    """With zeros where attention or the MLP alone has biases."""
    attention, mlp = given("attention_bias", default=False), given("mlp_bias", default=False)
    out, down = "layers.{i}.attn.Wo.bias" if attention else "-", "layers.{i}.mlp.Wo.bias" if mlp else "-"
    biases = f"{out}  d  block_{{i}}/attention/out/bias\n{down}  d  block_{{i}}/mlp/down/bias\n"
    return _TABLE + biases + (_CLASSIFIER if "classifier.weight" in given.shapes else _VOCABULARY)


FAMILY = Family("modernbert", _config, _table, prefixes=("model.",), sizes=lambda model: {"e": model.d_model})
