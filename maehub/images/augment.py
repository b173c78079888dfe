"""Augmentation: which part of a picture is seen, turned how, in which colours.

Crops, flips and turns are made where pictures are decoded, on 8-bit pixels; colours on the device, a batch at a time.
Everything random is a pure function of a seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from maehub.errors import UsageError
from maehub.images.decoding import Box, ImagePath, open_part, part_of
from maehub.images.sizes import Size
from maehub.rng import random_bits, random_uniform, sample_seed

Augment = Literal["none", "fixed-crop", "random-crop", "colour-jitter"]

_ASPECT = (3 / 4, 4 / 3)  # width to height of a random crop, Szegedy et al. 2015
_TRIES = 10
_FIXED = 8 / 7  # 256 to 224, Krizhevsky et al. 2012
_STRENGTH = 0.4  # of colour jitter, on either side of 1
_GREY = (0.299, 0.587, 0.114)  # brightness of red, green and blue, ITU-R BT.601
_GEOMETRY, _COLOUR = 1, 4  # views of `sample_seed`


@dataclass(frozen=True)
class Augmentation:
    """What is done to pictures; the fields are those of `PretrainConfig`."""

    kind: Augment = "random-crop"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    hflip: bool = True
    vflip: bool = False
    rot90: bool = False
    rotate: float = 0.0


def crop(
    source: ImagePath | BinaryIO | Image.Image, size: Size, channels: int, augmentation: Augmentation, seed: int
) -> np.ndarray:
    """A part of a picture, scaled to a size with bicubic filtering, flipped and turned; colours are left alone.

    ``none`` shows the largest centred part of the size's aspect, neither flipped nor turned. ``fixed-crop`` scales
    the short side to 8/7 of the size and takes a random part. ``random-crop`` and ``colour-jitter`` take
    ``crop_scale`` of the area, with an aspect from 3/4 to 4/3 times the size's; where ten tries do not fit the
    picture, the largest centred part of a permitted aspect. JPEG files are decoded scaled, where the part has enough
    pixels, and no further down than it reaches.

    Args:
        source: a path, a binary file, or a decoded L or RGB picture.
        size: (height, width) of the result.
        channels: 3, or 1 for greyscale.
        augmentation: see `Augmentation`.
        seed: everything random is a pure function of it.

    Returns:
        (H, W, C) uint8.

    Raises:
        DataError: the file cannot be read.
        UsageError: ``rot90`` and a size that is not square.
    """
    if augmentation.rot90 and size[0] != size[1]:
        raise UsageError(f"rot90 needs square crops, not {size[0]}×{size[1]} pixels")
    numbers = random_uniform(sample_seed(seed, 0, 0, _GEOMETRY), 4 + 4 * _TRIES)

    def choose(picture: Size) -> Box:
        return crop_box(picture, size, augmentation, numbers[1 : 1 + 4 * _TRIES])

    part = part_of(source, choose, size) if isinstance(source, Image.Image) else open_part(source, choose, size)
    views = scaled(part.pixels, size)
    if augmentation.kind != "none":
        hflip, (vflip, quarters, angle) = numbers[0], numbers[1 + 4 * _TRIES :]
        # torch mirrors pixels ten times as fast as a copy of numpy's mirrored view.
        if augmentation.hflip and hflip < 0.5:
            views = views.flip(1)
        if augmentation.vflip and vflip < 0.5:
            views = views.flip(0)
        if augmentation.rot90:
            views = torch.rot90(views, int(4 * quarters))
        if augmentation.rotate:
            views = rotated(views, augmentation.rotate * (2 * angle - 1))
    pixels = views.numpy()
    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None].repeat(channels, axis=2)
    return np.ascontiguousarray(pixels)


def crop_box(picture: Size, size: Size, augmentation: Augmentation, numbers: np.ndarray) -> Box:
    """Which part of a picture of (height, width) is seen; ``numbers``: (40,) in [0, 1)."""
    height, width = picture
    if augmentation.kind in ("none", "fixed-crop"):
        share = 1.0 if augmentation.kind == "none" else 1 / _FIXED
        right, down = (0.5, 0.5) if augmentation.kind == "none" else numbers[:2].tolist()
        side = share * min(height / size[0], width / size[1])
        return _placed(picture, max(1, round(side * size[0])), max(1, round(side * size[1])), right, down)
    least, most = augmentation.crop_scale
    shape = size[1] / size[0]
    low, high = (math.log(shape * aspect) for aspect in _ASPECT)
    for area, aspect, right, down in numbers.reshape(_TRIES, 4).tolist():
        share = least + area * (most - least)
        ratio = math.exp(low + aspect * (high - low))
        w = round(math.sqrt(width * height * share * ratio))
        h = round(math.sqrt(width * height * share / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _placed(picture, h, w, right, down)
    ratio = min(max(width / height, math.exp(low)), math.exp(high))
    return _placed(picture, max(1, round(width / ratio)), max(1, round(height * ratio)), 0.5, 0.5)


def _placed(picture: Size, height: int, width: int, right: float, down: float) -> Box:
    """A box of a size, cut to the picture, at a position from 0 (left, top) to just under 1 (right, bottom)."""
    height, width = min(height, picture[0]), min(width, picture[1])
    left, top = int(right * (picture[1] - width + 1)), int(down * (picture[0] - height + 1))
    return Box(left, top, left + width, top + height)


def scaled(pixels: np.ndarray, size: Size) -> Tensor:
    """(h, w) or (h, w, 3) uint8 to another (height, width) by bicubic filtering.

    It is Pillow's filter, by torch's kernel for 8-bit pixels, which takes a fifth of the time; they differ in rounding.
    """
    # torch warns of arrays that cannot be written, and takes its fast path where the batch comes first in memory.
    batch = torch.from_numpy(np.require(pixels.reshape(1, *pixels.shape[:2], -1), requirements=["C", "W"]))
    result = interpolate(batch.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return result[0].permute(1, 2, 0).reshape(*size, *pixels.shape[2:])


def rotated(pixels: Tensor, degrees: float) -> Tensor:
    """(H, W) or (H, W, 3) uint8 turned counter-clockwise about its middle, the corners filled by mirroring."""
    height, width = pixels.shape[:2]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = math.ceil(max(0.0, abs(cosine) * height + abs(sine) * width - height) / 2) + 1
    columns = math.ceil(max(0.0, abs(cosine) * width + abs(sine) * height - width) / 2) + 1
    around = ((rows, rows), (columns, columns), (0, 0))[: pixels.ndim]
    padded = Image.fromarray(np.pad(pixels.numpy(), around, mode="symmetric"))
    # Where each pixel of the result comes from: the middle stays in the middle.
    right = columns + (width - cosine * width + sine * height) / 2
    down = rows + (height - sine * width - cosine * height) / 2
    where = (cosine, -sine, right, sine, cosine, down)
    turned = padded.transform((width, height), Image.Transform.AFFINE, where, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(turned))


def colour_factors(seeds: Sequence[int]) -> Tensor:
    """Brightness, contrast and saturation of views: (B, 3) float32 from 0.6 to 1.4, a pure function of their seeds."""
    bits = random_bits(torch.tensor([sample_seed(seed, 0, 0, _COLOUR) for seed in seeds]), 3)
    uniform = (bits >> 39).float() * 2.0**-24  # (B, 3) in [0, 1)
    return 1 + _STRENGTH * (2 * uniform - 1)


def jitter(pixels: Tensor, factors: Tensor) -> Tensor:
    """Brightness, then contrast, then saturation, each multiplied by its factor and clipped.

    (B, H, W, C) uint8 and (B, 3) float32 on the same device to (B, H, W, C) float32 in [0, 255]. Contrast is the
    distance from the picture's mean brightness, saturation that from the pixel's own; greyscale has none.
    """
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    colours = (pixels * brightness).clamp_(0, 255)
    mean = _grey(colours).mean(dim=(1, 2, 3), keepdim=True)
    colours = torch.lerp(mean, colours, contrast).clamp_(0, 255)
    if colours.shape[3] == 3:
        colours = torch.lerp(_grey(colours), colours, saturation).clamp_(0, 255)
    return colours


def _grey(colours: Tensor) -> Tensor:
    """Brightness: (B, H, W, 1)."""
    if colours.shape[3] != 3:
        return colours.mean(dim=3, keepdim=True)
    return (colours * colours.new_tensor(_GREY)).sum(dim=3, keepdim=True)
