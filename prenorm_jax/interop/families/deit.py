"""DeiT (transformers' `deit`): a ViT with a second class token, that of distillation, which writes as the first does.

With two classifiers, one for each token, it gives the mean of their logits; with one, which reads the first token, that
one's; without any all tokens (`last_hidden_state`).
"""

from typing import Any

from prenorm_jax.interop.families import vit
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    values = vit.config(given) | {"distillation_token": True}
    if classes := given.labels("cls_classifier.weight", "ForImageClassificationWithTeacher"):
        values |= {"classes": classes, "pooling": "distilled"}
    return values


FAMILY = Family(
    "deit",
    _config,
    table=vit.EMBEDDING
    + vit.ATTENTION
    + vit.REST
    + """
    embeddings.distillation_token                       1 1 d    distillation_token                   1 d
    cls_classifier.weight                               v d      head/class/kernel                    d v
    cls_classifier.bias                                 v        head/class/bias
    distillation_classifier.weight                      v d      head/distillation/kernel             d v
    distillation_classifier.bias                        v        head/distillation/bias
    """,
    prefixes=("deit.",),
    along=(r"pooler\.dense\..*", r"decoder\..*", r"embeddings\.mask_token"),
)
