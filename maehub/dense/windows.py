"""How a network of one native size sees pictures of any: scaled, and by windows that overlap."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maehub.errors import DataError
from maehub.images import ImagePath, Size, open_image, plain
from maehub.models import Encoder

_OVERLAP = 1 / 3  # of a window with the next one


def pixels_of(picture: ImagePath | Image.Image | np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) uint8 of a picture, upright."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != channels:
            raise DataError(f"an array must be (H, W, {channels}) uint8, not {picture.shape} {picture.dtype}")
        return picture
    if channels not in (1, 3):
        raise DataError(f"files have 1 or 3 channels and the model takes {channels}; give an array")
    image = plain(picture) if isinstance(picture, Image.Image) else open_image(picture, channels=channels)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def scaled_size(size: Sequence[int], short_side: int | None, within: Size | None = None) -> Size:
    """(height, width) of a picture whose shorter side becomes so many pixels; its own with None.

    ``within`` another (height, width) it fits as large as it can, whatever ``short_side`` is.
    """
    if within is not None:
        factor = min(edge / side for edge, side in zip(within, size, strict=True))
    elif short_side is None:
        return size[0], size[1]
    else:
        factor = short_side / min(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def window_starts(side: int, window: int) -> list[int]:
    """Where windows begin: a stride apart, the last one at the edge."""
    if side <= window:
        return [0]
    stride = max(1, round(window * (1 - _OVERLAP)))
    count = -(-(side - window) // stride) + 1
    return [min(number * stride, side - window) for number in range(count)]


def windows_of(encoder: Encoder, pixels: np.ndarray, corners: Sequence[tuple[int, int]]) -> Tensor:
    """Windows of pixels (H, W, C) uint8 by their (top, left), as the encoder takes them: (B, C, h, w) on its device.

    Beyond the edges of a small picture a window sees the mean colour.
    """
    (height, width, channels), window = pixels.shape, encoder.config.size
    cut = np.zeros((len(corners), *window, channels), np.uint8)
    for place, (top, left) in enumerate(corners):
        part = pixels[top : top + window[0], left : left + window[1]]
        cut[place, : part.shape[0], : part.shape[1]] = part
    images = encoder.preprocess.normalise(torch.from_numpy(cut).to(encoder.cls_token.device))
    for place, (top, left) in enumerate(corners):
        images[place, :, height - top :] = 0
        images[place, :, :, width - left :] = 0
    return images
