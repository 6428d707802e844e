"""A run's configuration: every key with its default. `base_config()` is what the files in `configs/` start from.

The comment beside a key, here and in the classes of `config.model`, is what --help says of it.
"""

import inspect
import itertools
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import flatten
from prenorm_jax.data import Data
from prenorm_jax.data.kinds import KINDS, Kind
from prenorm_jax.models import registry

PARAMETERIZATIONS = ("pre_ln", "native")


def data_kind(config: ConfigDict) -> Kind:
    """The kind of data that the model of a run takes. Raises PrenormError for an unknown family."""
    return KINDS[registry.family(config.model.family).config_class.inputs]


def load_data(config: ConfigDict) -> Data:
    """Reads the data of a run. Raises PrenormError."""
    return data_kind(config).load(config)


def base_config(family: str = "gpt") -> ConfigDict:
    """A run's configuration with every key at its default; files in `configs/` change what they need.

    The family of the model (`models/registry.py`) decides the keys of `model` (`models/config.py` and its own file)
    and of `data`. Keys that are None and typed (`data.path`, `model.kv_heads`, ...) may be set on the command line.
    Raises PrenormError for an unknown family.
    """
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the data, dropout and augmentation
    config.steps = 1000  # the schedule spans them: it changes with them, from where a run goes on with another number
    config.stop_at = config_dict.placeholder(int)  # stop on purpose after this step; go on later without it
    config.init_from = config_dict.placeholder(str)  # start from the parameters of this workdir's last checkpoint
    config.on_nonfinite = "stop"  # stop | skip: what a loss or gradient that is not finite does
    config.grace_seconds = 60  # SIGTERM and Ctrl-C: time to save before the process ends regardless
    config.batch_size = 16  # sequences or images in one optimizer step, over all devices
    config.accumulate = 1  # pieces that a batch is computed in, one after the other: less memory
    config.parameterization = "pre_ln"  # pre_ln | native: which parameters are trained (docs/training.md)
    config.eval_every = 200  # steps; 0: only at the end
    config.checkpoint_every = 200  # steps; 0: only at the end
    config.keep_checkpoints = 3  # the latest; older ones are removed
    config.log_every = 10  # steps between two flushes of metrics to disk; each step gets its line all the same
    config.tensorboard = True  # whether metrics are written as event files too
    config.profile = config_dict.placeholder(str)  # FIRST:END, as 10:13: trace steps 10 to 12 into workdir/profile

    config.mesh = ConfigDict()  # of the devices (`train/sharding.py`); what these leave is the axis data
    config.mesh.fsdp = 1  # devices that parameters and the batch are split over
    config.mesh.tensor = 1  # devices that heads, MLP and vocabulary are split over
    config.mesh.largest_replicated = 2**22  # numbers: a larger parameter must not be whole on every device

    config.update(_DATA[registry.family(family).config_class.inputs]())

    config.optimizer = ConfigDict()  # the learning rate warms up linearly and ends in a cosine
    config.optimizer.name = "adamw"  # adamw | sgd | adafactor | lamb | muon
    config.optimizer.learning_rate = 1e-3  # peak
    config.optimizer.warmup_steps = 100  # to the peak
    config.optimizer.final_learning_rate = 0.1  # at the end of the cosine, as a fraction of the peak
    config.optimizer.weight_decay = 0.1  # of matrices; never of biases and norms
    config.optimizer.clip = 1.0  # global gradient norm; 0: none
    config.optimizer.b1 = 0.9  # sgd and muon: the momentum
    config.optimizer.b2 = 0.95  # adamw, lamb and muon: of the mean square
    config.optimizer.eps = 1e-8  # adamw and lamb: added to its root

    config.model = registry.model_defaults(family)  # None: as the key that is named beside it
    return config


def full_config(values: Mapping[str, Any], origin: str) -> ConfigDict:
    """The configuration of these values, read from `origin`; what they leave out has its default.

    Raises PrenormError for a value of a wrong type.
    """
    try:
        config = base_config(values.get("model", {}).get("family", "gpt"))
        defaults = flatten(config)  # with the types of keys that are None, by which `update` checks
        config.update(values)
        found = flatten(config)
        for key, default in defaults.items():
            if default is not None and found[key] is None and not key.startswith("model."):
                raise TypeError(f"{key} is None; its default is {default!r}")
            if isinstance(default, tuple) and not all(isinstance(number, int | float) for number in found[key]):
                raise TypeError(f"{key}={found[key]!r} must be numbers")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PrenormError(f"{origin}: {' '.join(str(error).split())}") from error
    return config


def describe_keys(config: ConfigDict) -> str:
    """A line for each key: its flag with its value, and what the comment beside it says."""
    config_class, comments, lines = registry.family(config.model.family).config_class, {}, []
    for place in (base_config, _DATA[config_class.inputs], _augment, *reversed(config_class.__mro__[:-1])):
        found = re.findall(
            r"^ +(?:config\.)?([\w.]+)(?:: [^=]+)? = .*?  # (.*)", inspect.getsource(place), re.MULTILINE
        )
        comments |= {"model." * isinstance(place, type) + key: comment for key, comment in found}
    order, values = list(comments), flatten(config)
    groups = itertools.groupby(sorted(values, key=order.index), key=lambda key: key.rpartition(".")[0])
    for group, keys in sorted((group, list(keys)) for group, keys in groups):
        lines += ["", f"{group}: {comments[group]}" if group in comments else group] if group else []
        lines += [f"  {f'--config.{key}={values[key]}':<44}  {comments[key]}" for key in keys]
    return "\n".join(lines)


def _text() -> dict[str, Any]:
    data = ConfigDict()
    data.path = config_dict.placeholder(str)  # file, folder or glob: .txt .md .rst .py .jsonl .json .parquet
    data.hub = config_dict.placeholder(str)  # a hub data set's name; give path or hub, or neither: stdlib
    data.hub_config = config_dict.placeholder(str)  # its configuration, e.g. wikitext-103-raw-v1
    data.stream_tokens = config_dict.placeholder(int)  # of hub data: stream until there are so many; None: load whole
    data.cache = config_dict.placeholder(str)  # folder for streamed tokens; None: ~/.cache/prenorm_jax
    data.text_column = "text"  # of jsonl, parquet and hub data
    data.train_split = "train"  # of hub data
    data.eval_split = config_dict.placeholder(str)  # of hub data; None: hold documents out
    data.eval_path = config_dict.placeholder(str)  # like path; None: hold documents out
    data.holdout = 0.02  # fraction of documents held out where no evaluation data are named
    data.separate_documents = True  # end each document with the tokenizer's end-of-text token
    data.tokenizer = "bytes"  # bytes, a tokenizers .json file, or a hub name such as gpt2; none: to be named
    data.eot_token = config_dict.placeholder(str)  # None: the first usual one that the tokenizer knows
    data.seq_len = 128  # tokens a training example predicts
    return {"data": data}


def _images() -> dict[str, Any]:
    data = ConfigDict()
    data.path = config_dict.placeholder(str)  # folder of IDX files (the MNIST family), or of a folder for each class
    data.hub = config_dict.placeholder(str)  # a hub data set's name; give path or hub, or neither: digits
    data.hub_config = config_dict.placeholder(str)  # its configuration
    data.image_column = "image"  # of hub data
    data.label_column = "label"  # of hub data
    data.train_split = "train"  # of hub data, or a folder's name in path
    data.eval_split = config_dict.placeholder(str)  # the same; None: hold images out
    data.holdout = 0.2  # fraction of the images held out where no evaluation data are named
    data.image_size = config_dict.placeholder(int)  # pixels to resize images to, before they are cropped to the model's
    data.mean = (0.5,)  # of all channels or of each, in units of the largest pixel value: subtracted,
    data.std = (0.5,)  # then divided by
    loss = "softmax"  # softmax | sigmoid: in training, each class for itself (arXiv 2110.00476)
    return {"data": data, "augment": _augment(), "loss": loss}


def _augment() -> ConfigDict:
    augment = ConfigDict()  # of training images; all of it a pure function of (seed, step)
    augment.shift = 0  # pixels: a crop from an image padded by as many zeros on each side
    augment.min_area = 1.0  # below 1: a crop of this share of the area at least, of a random shape, resized
    augment.flip = False  # left to right, half of the time
    augment.mixup = 0.0  # α of the Beta distribution (arXiv 1710.09412); 0: off
    augment.cutmix = 0.0  # the same (arXiv 1905.04899); with both, each batch draws one
    augment.label_smoothing = 0.0  # mass that is spread over all classes
    return augment


_DATA = {"text": _text, "images": _images}  # the kind of data -> its groups of keys
