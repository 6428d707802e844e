"""What a family of checkpoints is: how to read its config.json, and a table of what lies where."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.registry import model_config

# Foreign names of activations.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # its constant has fewer digits: 1e-12
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


Shapes = Mapping[str, tuple[int, ...]]
_LABELS = ("id2label", "num_labels")

# Keys of config.json that say nothing of the function that a network is in inference.
_OTHERS = re.compile(
    r"_.*|model_type|architectures?|(torch_)?dtype|transformers_version|auto_map|license|.*_token_ids?|use_cache|n_ctx|"
    r"initializer_.*|.*_initializer_.*|init_.*|output_.*|return_dict.*|task_specific_params|summary_.*|problem_type|"
    r"id2label|label2id|num_labels|label_names|num_classes|gradient_checkpointing|pretraining_tp|"
    r"(transformers_)?loss_.*|prefix|pruned_heads|use_bfloat16|torchscript|finetuning_task|pretrained_cfg|"
    r"tokenizer_(class|name)|"
    r"is_(encoder_)?decoder|encoder_stride|pooler_.*|.*softmax_in_fp32|reorder_and_upcast_attn|out_(features|indices)|"
    r"stage_names|reshape_hidden_states|use_mask_token|(text|vision)_config(_dict)?|logit_scale_init_value|"
    r"image_size|patch_size|projection_dim|apply_layernorm|pos_embed_(shift|jitter|rescale)|decoder_.*|norm_pix_loss|"
    r"mask_ratio|pool_scales|.*auxiliary_.*|semantic_loss_.*|add_fpn|"
    r"cross_attention_hidden_size|encoder_no_repeat_ngram_size|chunk_size_feed_forward|.*dropout|.*_pdrop|layerdrop"
)


class Given:
    """A config.json, of which a family's config function asks key by key: `given("n_layer", default=12)`.

    Attributes:
      values: all of it.
      asked: the keys that were asked for.
      shapes: of the tensors, by the table's names, where config.json leaves to them what there is.
    """

    def __init__(self, values: Mapping[str, Any], shapes: Shapes | None = None):
        self.values, self.shapes = values, shapes or {}
        self.asked: set[str] = set()
        self._inner: dict[str, Given] = {}

    def __call__(self, *keys: str, default: Any) -> Any:
        """The value of the first of these keys, which versions call differently; the family's default where none is.

        Raises PrenormError for one of another type than the default has, and for two that are not the same.
        """
        self.asked |= set(keys)
        there = {key: self.values[key] for key in keys if self.values.get(key) is not None}
        key, value = next(iter(there.items()), (None, default))
        if other := next((other for other in there if there[other] != value), None):
            raise PrenormError(f"config.json: {key}={value!r} and {other}={there[other]!r} mean one thing: remove one")
        if type(default) is int and type(value) is float and value.is_integer():
            value = int(value)
        wanted = (int, float) if type(default) is float else type(default)
        if default is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise PrenormError(f"config.json: {key}={value!r} must be of type {type(default).__name__}")
        return value

    def within(self, key: str, *overriding: str) -> "Given":
        """The config that is the value of this key, or of the first of the overriding ones that is there.

        What the outer config says of the classes that it was written by holds for it, too.
        """
        key = next((other for other in overriding if self(other, default=None) is not None), key)
        outer = {name: self.values[name] for name in ("architectures", *_LABELS) if name in self.values}
        self._inner[key] = Given({**self(key, default={}), **outer}, self.shapes)
        return self._inner[key]

    @property
    def unread(self) -> list[str]:
        """The keys that nobody asked for, and that might say something of the function."""
        found = [key for key in self.values if key not in self.asked and not _OTHERS.fullmatch(key)]
        return sorted([*found, *(f"{key}.{name}" for key, inner in self._inner.items() for name in inner.unread)])

    def labels(self, tensor: str = "classifier.weight", kind: str = "ForImageClassification") -> int:
        """How many classes the classifier has whose kernel is this tensor; 0: there is none.

        Where no tensors are known it is there if config.json says that the model is of this kind.
        """
        if self.shapes:
            return self.shapes[tensor][0] if tensor in self.shapes else 0
        if not self.is_a(kind):
            return 0
        return len(self.values.get("id2label") or ()) or self(*_LABELS[1:], default=2)

    def is_a(self, kind: str) -> bool:
        """Whether config.json says that the model is of a class whose name ends so."""
        return any(str(name).endswith(kind) for name in (self.values.get("architectures") or ())[:1])

    def names(self, module: str) -> bool:
        """Whether a tensor of this module is known to be there."""
        return any(name.startswith(f"{module}.") for name in self.shapes)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """A tensor's shape. Raises PrenormError if it is not there."""
        if not self.shapes:
            raise PrenormError("config.json does not say what the network is, its tensors do: give the weights, too")
        if tensor not in self.shapes:
            raise PrenormError(
                f"the file has no tensor {tensor}, which says what the network is: it is of another kind"
            )
        return self.shapes[tensor]

    def side(self, key: str, default: int) -> int:
        """The side of a square. Raises PrenormError for another rectangle."""
        value = self.values.get(key)
        if isinstance(value, list | tuple) and len(value) == 2:
            if value[0] != value[1]:
                raise PrenormError(f"config.json: {key}={value!r} is no square, and the models here take squares alone")
            value = value[0]
        return Given({key: value})(key, default=default)

    def only(self, key: str, *values: Any, why: str = "no model here computes it") -> None:
        """Raises PrenormError, naming the key, unless it has one of these values; the first is the family's default."""
        value = self(key, default=values[0])
        if value not in values:
            supported = " or ".join(map(repr, values))
            raise PrenormError(
                f"config.json: {key}={value!r} changes the function and is not supported: {why} (known: {supported})"
            )

    def said(self, *keys: str) -> None:
        """Raises PrenormError, naming the key, for one that is null: the family's library then computes otherwise."""
        for key in keys:
            if self.values.get(key, key) is None:
                raise PrenormError(f"config.json: {key}=null changes the function and is not supported: give a number")

    def activation(self, key: str, default: str) -> str:
        """Our name of an activation. Raises PrenormError for one that is not known."""
        self.only(key, default, *ACTIVATIONS, why="of activations these are known")
        return ACTIVATIONS[self(key, default=default)]

    def masked_language_model(self, head: str) -> dict[str, Any]:
        """An encoder's keys: with the tensor `head` the vocabulary's logits, without it the normalised tokens.

        Where no tensors are known, the architecture that config.json names says which.
        """
        architectures = self("architectures", default=[]) or [""]
        tied, has_head = self("tie_word_embeddings", default=True), str(architectures[0]).endswith("ForMaskedLM")
        has_head = head in self.shapes if self.shapes else has_head
        return {
            "family": "encoder",
            "transform": has_head,
            "tie_embeddings": has_head and tied,
            "outputs": self("vocab_size", default=0) if has_head and not tied else 0,
        }

    def rotary(
        self,
        width: int,
        heads: int,
        share: float = 1.0,
        base_key: str = "rope_theta",
        share_key: str = "",
        base: float = 10000.0,
    ) -> dict[str, Any]:
        """The keys of our rotary positions, in the family's old spelling or the new.

        `share`, of a head, and `base` where none is given. Raises PrenormError for a spelling of other families, which
        this one's library does not read, if it says anything else.
        """
        rope = self("rope_scaling", default=None) or self("rope_parameters", default={})
        said = rope if isinstance(rope, Mapping) else {"rope_scaling": rope}
        for key in ("rope_scaling", "rope_theta", "partial_rotary_factor"):
            if not isinstance(said.get(key, 1.0), int | float | None):
                raise PrenormError(f"config.json: {key}={said[key]!r} is no number: correct it")
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise PrenormError(f"config.json: rope_type={kind!r} changes the function and is not supported: default is")
        base = self(base_key, default=base) if rope.get("rope_theta") is None else rope["rope_theta"]
        if not share_key and rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise PrenormError(
                "config.json: partial_rotary_factor changes the function, and this family has none: remove it"
            )
        if share_key:
            own = rope.get("partial_rotary_factor")
            share = self(share_key, default=share) if own is None else own
        read = {"rope_theta": base, "rotary_emb_base": base, "partial_rotary_factor": share, "rotary_pct": share}
        self.asked |= set(read)
        for key, value in read.items():
            if self.values.get(key) not in (None, value) and key not in (base_key, share_key):
                raise PrenormError(
                    f"config.json: {key}={self.values[key]!r} is not how this family says it ({value:g} is read): "
                    "remove it, or correct the family's own key"
                )
        head_dim = width // max(heads, 1)
        turned = int(head_dim * share)
        return {
            "positions": "rotary",
            "rotary_base": float(base),
            "rotary_dim": None if turned == head_dim else turned,
        }


@dataclass(frozen=True)
class Family:
    """One family of another library's checkpoints.

    Attributes:
      model_type: what its config.json calls it.
      config: its config.json -> the keys of our `config.model`; raises PrenormError for what no model of ours computes.
      table: what lies where, in the language of `views.py`; or a function of the config.json, where that decides it.
        Lines for leaves that the model has not are left out.
      prefixes: what the names of tensors may begin with, beside nothing; the first that fits is taken off.
      ignored: patterns of names, without prefix, of tensors that say nothing new, such as masks.
      along: the same of tensors that no model of ours has, but an export does, as they are: they stand beside the
        network, or read its output.
      aliases: (pattern, replacement) of other versions' names.
      sizes: the axes of its own that its table names.
    """

    model_type: str
    config: Callable[[Given], dict[str, Any]]
    table: str | Callable[[Given], str]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    sizes: Callable[[ModelConfig], dict[str, int]] = lambda model: {}

    def model(self, config: Mapping[str, Any], shapes: Shapes | None = None, **changes: Any) -> ModelConfig:
        """The network that a config.json, and tensors of these shapes, describe, with these keys changed.

        Raises PrenormError.
        """
        given = self._given(config, shapes)
        values = {"family": "gpt"} | self.config(given) | changes
        given.only("is_causal", values["family"] == "gpt" or values.get("causal", False))
        return model_config({key: value for key, value in values.items() if value is not None})

    def unread(self, config: Mapping[str, Any], shapes: Shapes | None = None) -> list[str]:
        """The keys of a config.json that nobody asked for, and that might say something of the function."""
        given = self._given(config, shapes)
        self.config(given)
        return given.unread

    def name(self, tensor: str) -> str:
        """What the table calls a tensor of this name."""
        name = tensor.removeprefix(next((prefix for prefix in self.prefixes if tensor.startswith(prefix)), ""))
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor that the table calls so is none of the network."""
        return self.takes_along(name) or any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def takes_along(self, name: str) -> bool:
        """Whether such a tensor belongs to an export all the same."""
        return any(re.fullmatch(pattern, name) for pattern in self.along)

    def lines(self, config: Mapping[str, Any], shapes: Shapes | None = None) -> str:
        """The table of a config.json, and of tensors of these shapes."""
        return self.table if isinstance(self.table, str) else self.table(self._given(config, shapes))

    def _given(self, config: Mapping[str, Any], shapes: Shapes | None) -> Given:
        return Given(config, {self.name(name): shape for name, shape in (shapes or {}).items()})
