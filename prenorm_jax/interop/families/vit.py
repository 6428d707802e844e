"""ViT (transformers' `vit`). With a classifier it gives logits, without one all tokens (`last_hidden_state`)."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def config(given: Given) -> dict[str, Any]:
    """The keys of our `config.model`."""
    classes = given.labels()
    return {
        "family": "vit",
        "image_size": given.side("image_size", default=224),
        "patch_size": given.side("patch_size", default=16),
        "channels": given("num_channels", default=3),
        "classes": classes,
        "pooling": "class" if classes else "none",
        "d_model": given("hidden_size", default=768),
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=12),
        "mlp_dim": given("intermediate_size", default=3072),
        "activation": given.activation("hidden_act", default="gelu"),
        "qkv_bias": given("qkv_bias", default=True),
        "epsilon": given("layer_norm_eps", default=1e-12),
        "embed_dropout": given("hidden_dropout_prob", default=0.0),
        "branch_dropout": given("hidden_dropout_prob", default=0.0),
        "attention_dropout": given("attention_probs_dropout_prob", default=0.0),
    }


EMBEDDING = """
    embeddings.cls_token                                1 1 d    class_token                          1 d
    embeddings.position_embeddings                      1 n d    position_embedding                   n d
    embeddings.patch_embeddings.projection.weight       d c y x  patch_embedding/kernel               y x c d
    embeddings.patch_embeddings.projection.bias         d        patch_embedding/bias
"""
ATTENTION = """
    encoder.layer.{i}.attention.attention.query.weight  (h k) d  block_{i}/attention/query/kernel     d (h k)
    encoder.layer.{i}.attention.attention.query.bias    (h k)    block_{i}/attention/query/bias
    encoder.layer.{i}.attention.attention.key.weight    (h k) d  block_{i}/attention/key/kernel       d (h k)
    encoder.layer.{i}.attention.attention.key.bias      (h k)    block_{i}/attention/key/bias
    encoder.layer.{i}.attention.attention.value.weight  (h k) d  block_{i}/attention/value/kernel     d (h k)
    encoder.layer.{i}.attention.attention.value.bias    (h k)    block_{i}/attention/value/bias
    encoder.layer.{i}.attention.output.dense.weight     d (h k)  block_{i}/attention/out/kernel       (h k) d
    encoder.layer.{i}.attention.output.dense.bias       d        block_{i}/attention/out/bias
"""
BLOCK = """
    encoder.layer.{i}.layernorm_before.{weight,bias}    d        block_{i}/attention_norm/{scale,bias}
    encoder.layer.{i}.layernorm_after.{weight,bias}     d        block_{i}/mlp_norm/{scale,bias}
    encoder.layer.{i}.intermediate.dense.weight         f d      block_{i}/mlp/up/kernel              d f
    encoder.layer.{i}.intermediate.dense.bias           f        block_{i}/mlp/up/bias
    encoder.layer.{i}.output.dense.weight               d f      block_{i}/mlp/down/kernel            f d
    encoder.layer.{i}.output.dense.bias                 d        block_{i}/mlp/down/bias
"""
REST = (
    BLOCK
    + """
    layernorm.{weight,bias}                             d        head_norm/{scale,bias}               # with, and:
    classifier.weight                                   v d      head/kernel                          d v
    classifier.bias                                     v        head/bias
    layernorm.{weight,bias}                             d        head_affine/{scale,bias}             # without
"""
)
FAMILY = Family(
    "vit",
    config,
    table=EMBEDDING + ATTENTION + REST,
    prefixes=("vit.",),
    along=(r"pooler\.dense\..*", r"decoder\..*", r"embeddings\.mask_token"),
)
