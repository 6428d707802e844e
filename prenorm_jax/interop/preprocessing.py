"""How a source prepares images, as the keys of our data say it; and in words, what of it they do not.

The source says it in preprocessor_config.json (transformers) or in config.json's `pretrained_cfg` (timm). Here an image
file's central square is resized, bicubically, to `data.image_size`, its middle is taken, and pixels are normalised.
"""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import read_json
from prenorm_jax.interop.files import Source
from prenorm_jax.models.vit import ViTConfig
from prenorm_jax.train.workdir import SOURCE

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_FILES = ("preprocessor_config.json", "processor_config.json")


class Preprocessing(NamedTuple):
    """What a source does with images.

    Attributes:
      edge: what an image's shorter edge is resized to, before a square of the model's size is cut from the middle.
      mean, std: of each channel, as `data.mean` and `data.std`.
      labels: how many classes have names.
      others: what is done otherwise here, in words.
    """

    edge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: int
    others: list[str]

    def set(self, config: ConfigDict) -> None:
        """Makes it that of a run's configuration."""
        config.data.update({"mean": self.mean, "std": self.std})
        if self.edge != config.model.image_size:
            config.data.image_size = self.edge


def preprocessing(source: Source, model: ViTConfig) -> Preprocessing | None:
    """That of a source of this model; None: it says nothing of it, or takes no squares. Raises PrenormError."""
    config, labels, (size, width, _) = source.config, _labels(source.config), model.image_shape
    if size != width:
        return None
    try:
        if "pretrained_cfg" in config:
            return _at_least(size, _timm(config["pretrained_cfg"], size, labels))
        for name in _FILES:
            if (file := source.folder / name) in source.small_files():
                given = read_json(file)
                return _at_least(size, _transformers(given.get("image_processor", given), size, labels))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PrenormError(
            f"{source.name}: what it says of preparing images is not understood ({error!r}): mend or remove that"
        ) from error
    return None


def _at_least(size: int, found: Preprocessing) -> Preprocessing:
    """The same for a model whose position table is of this size, where the source's library interpolates it."""
    if found.edge >= size:
        return found
    other = f"images have {found.edge} pixels, for which the source interpolates its positions, here {size}"
    return found._replace(edge=size, others=[*found.others, other])


def _labels(config: Mapping[str, Any]) -> int:
    return len(config.get("id2label") or config.get("label_names") or ())


def _transformers(given: Mapping[str, Any], size: int, labels: int) -> Preprocessing:
    others, edge = [], size
    resampling = _RESAMPLING.get(given.get("resample", 2), "unknown")
    if given.get("do_resize", True):
        wanted, crops = given.get("size", size), given.get("do_center_crop", "crop_size" in given)
        kind = given.get("image_processor_type", given.get("feature_extractor_type", ""))
        if isinstance(wanted, int) and kind.startswith("ViT"):  # a number has another meaning in that class
            wanted = {"height": wanted, "width": wanted}
        if isinstance(wanted, Mapping) and "height" in wanted:
            others.append(
                f"images are squeezed to {wanted['width']} × {wanted['height']}, where here a square is cut out"
            )
        else:
            edge = int(wanted["shortest_edge"] if isinstance(wanted, Mapping) else wanted)
            cut = given.get("crop_size", edge) if crops else edge
            cut = cut["height"] if isinstance(cut, Mapping) else cut
            if cut != size:
                others.append(f"a square of {cut} pixels is cut out, where the model takes {size}")
        if resampling != "bicubic":
            others.append(f"resampling is {resampling}, here bicubic")
    else:
        others.append("images are not resized")
    if not math.isclose(given.get("rescale_factor", 1 / 255), 1 / 255) or not given.get("do_rescale", True):
        others.append("pixels are not divided by 255")
    mean, std = (given.get(f"image_{key}") for key in ("mean", "std"))
    if not given.get("do_normalize", True) or mean is None or std is None:
        mean, std = (0.0,), (1.0,)
    return Preprocessing(edge, _numbers(mean), _numbers(std), labels, others)


def _timm(given: Mapping[str, Any], size: int, labels: int) -> Preprocessing:
    others = []
    if (resampling := given.get("interpolation", "bicubic")) != "bicubic":
        others.append(f"resampling is {resampling}, here bicubic")
    if (mode := given.get("crop_mode", "center")) != "center":
        others.append(f"images are cut by crop_mode={mode!r}, where here a square is taken from the middle")
    edge = math.floor(size / given.get("crop_pct", 0.875))
    return Preprocessing(edge, _numbers(given["mean"]), _numbers(given["std"]), labels, others)


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in (values if isinstance(values, list | tuple) else [values]))


def said(found: Preprocessing | None, model: ViTConfig, workdir: Path) -> list[str]:
    """Lines about it, and about what a workdir that was imported lacks."""
    height, width, _ = model.image_shape
    if height != width:
        return [f"it takes spectrograms, {height} mel bins × {width} frames: no data here has any to evaluate it on"]
    lines = ["it does not say how images are prepared: data.mean and data.std are 0.5, as for pixels from -1 to 1"]
    if found:
        lines = [f"images: shorter edge {found.edge}, mean {found.mean}, std {found.std} (config.data)"]
        if found.others:
            lines.append(f"not applied of how the source prepares images: {'; '.join(found.others)}")
        if found.labels:
            kept = f"names of {found.labels} in {workdir / SOURCE / 'config.json'}"
            lines.append(f"labels: {kept}; classes of a data set are numbered by their folders' names")
    if not model.classes:
        return [*lines, f"it has no classifier, so that it gives features (model.pooling={model.pooling})"]
    lines.append("it has no data and no optimizer: name data, and the optimizer starts anew")
    made = f"--workdir={shlex.quote(str(workdir))} --config.data.path=FOLDER"
    return [*lines, f"evaluate: python eval.py {made}", f"train on: python train.py {made} --config.steps=N"]
