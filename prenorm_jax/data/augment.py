"""From a batch of images to what a model takes and is to give, on the device: crops, flips, mixtures.

Shapes: B batch, H W image, C channels, V classes; images are (B, H, W, C). All randomness is drawn from one key, which
the training step derives from (seed, step).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


class Examples(NamedTuple):
    """Model inputs, their targets (classes, or distributions over them on a further axis) and each target's weight."""

    inputs: jax.Array
    targets: jax.Array
    weights: jax.Array


def image_examples(config: ConfigDict, batch: dict[str, jax.Array], key: jax.Array | None = None) -> Examples:
    """Of {images, labels, weights}. With a key (in training), images are augmented by it."""
    images = batch["images"].astype(jnp.float32) / 255
    size = config.model.image_size
    if key is None:
        margin = (images.shape[1] - size) // 2
        images = images[:, margin : margin + size, margin : margin + size]
        return Examples(_normalize(config, images), batch["labels"], batch["weights"])
    crop_key, flip_key, mix_key = jax.random.split(key, 3)
    augment = config.augment
    if augment.min_area < 1:
        images = resized_crop(images, size, augment.min_area, crop_key)
    else:
        images = shifted_crop(images, size, augment.shift, crop_key)
    if augment.flip:
        flipped_B = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
        images = jnp.where(flipped_B, images[:, :, ::-1], images)
    targets_BxV = jax.nn.one_hot(batch["labels"], config.model.classes)
    targets_BxV += augment.label_smoothing * (1 / config.model.classes - targets_BxV)
    if augment.mixup or augment.cutmix:
        images, targets_BxV = mix(images, targets_BxV, augment.mixup, augment.cutmix, mix_key)
    return Examples(_normalize(config, images), targets_BxV, batch["weights"])


def _normalize(config: ConfigDict, images: jax.Array) -> jax.Array:
    return (images - jnp.array(config.data.mean)) / jnp.array(config.data.std)


def shifted_crop(images: jax.Array, size: int, shift: int, key: jax.Array) -> jax.Array:
    """size × size pixels from anywhere in the image, around which `shift` zeros are put on each side."""
    margin = images.shape[1] + 2 * shift - size
    if not margin:
        return images
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    starts_Bx2 = jax.random.randint(key, (len(images), 2), 0, margin + 1)

    def crop(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*start, 0), (size, size, image.shape[-1]))

    return jax.vmap(crop)(padded, starts_Bx2)


def resized_crop(images: jax.Array, size: int, min_area: float, key: jax.Array) -> jax.Array:
    """A rectangle of `min_area` to all of the area, of shape 3:4 to 4:3, resized (arXiv 1409.4842, section 6)."""
    B, side = images.shape[:2]
    area_key, shape_key, place_key = jax.random.split(key, 3)
    area_B = jax.random.uniform(area_key, (B,), minval=min_area)
    log_ratio_B = jax.random.uniform(shape_key, (B,), minval=-1, maxval=1) * jnp.log(4 / 3)
    extents_Bx2 = jnp.stack([area_B * jnp.exp(log_ratio_B), area_B * jnp.exp(-log_ratio_B)], axis=1) ** 0.5
    extents_Bx2 = jnp.minimum(extents_Bx2, 1)  # of the side
    starts_Bx2 = jax.random.uniform(place_key, (B, 2)) * (1 - extents_Bx2)

    def crop(image: jax.Array, extent: jax.Array, start: jax.Array) -> jax.Array:
        shape = (size, size, image.shape[-1])
        scale, translation = size / (side * extent), -start * size / extent
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, translation, "linear")

    return jax.vmap(crop)(images, extents_Bx2, starts_Bx2)


def mix(
    images: jax.Array, targets_BxV: jax.Array, mixup: float, cutmix: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each image mixed with the one before it in the batch, and its target in the same proportion.

    Mixup (arXiv 1710.09412) takes λ ~ Beta(mixup, mixup) of every pixel, CutMix (arXiv 1905.04899) all pixels but those
    of a rectangle of 1-λ of the area. If both are on, each batch draws one of them.
    """
    B, H, W, _ = images.shape
    mixup_key, cutmix_key, place_key, choice_key = jax.random.split(key, 4)
    shares = []
    if mixup:
        share_B = jax.random.beta(mixup_key, mixup, mixup, (B, 1, 1, 1))
        shares.append(jnp.broadcast_to(share_B, (B, H, W, 1)))
    if cutmix:
        extent_B = (1 - jax.random.beta(cutmix_key, cutmix, cutmix, (B, 1, 1))) ** 0.5
        y_B, x_B = jax.random.uniform(place_key, (2, B, 1, 1))  # of the rectangle's centre
        y_Hx1, x_1xW = (jnp.arange(H)[:, None] + 0.5) / H, (jnp.arange(W)[None] + 0.5) / W
        inside_BxHxW = (jnp.abs(y_Hx1 - y_B) < extent_B / 2) & (jnp.abs(x_1xW - x_B) < extent_B / 2)
        shares.append(1.0 - inside_BxHxW[..., None])
    share = jnp.where(jax.random.bernoulli(choice_key), shares[0], shares[-1]).astype(images.dtype)
    share_B = share.mean((1, 2))
    mixed = share * images + (1 - share) * jnp.roll(images, 1, axis=0)
    return mixed, share_B * targets_BxV + (1 - share_B) * jnp.roll(targets_BxV, 1, axis=0)
