"""A segmenter: an encoder with a decoder, from pictures of any size to the class of every pixel."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from maehub.data import MapClasses
from maehub.dense.attention import AttentionConfig, attending
from maehub.dense.decoders import Decoder, LinearDecoder, Norm, UPerNet
from maehub.dense.windows import pixels_of, scaled_size, window_starts, windows_of
from maehub.errors import UsageError
from maehub.images import ImagePath, Size, scaled
from maehub.models import Encoder

_TOKENS, _SCORES = 2**12, 2**26  # patches that are computed at once, and numbers that come of them
_LINES = 256  # of a picture that are enlarged at once


@dataclass(frozen=True)
class SegmenterConfig:
    """What a `Segmenter` has on top of its encoder.

    ``layers`` are the blocks whose maps the decoder sees, early ones first, the last block alone by a linear one.
    ``width`` are the channels inside UPerNet, ``norm`` its norms. ``short_side``: pixels of the shorter side that
    pictures are scaled to, None for their own. ``palette``: a colour a class. ``attention``: what blocks get.
    """

    classes: MapClasses
    decoder: Decoder = "linear"
    layers: tuple[int, ...] = (-1,)
    width: int = 0
    norm: Norm = "layer"
    auxiliary: bool = False
    short_side: int | None = None
    palette: tuple[tuple[int, int, int], ...] = ()
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        if self.decoder not in get_args(Decoder) or self.norm not in get_args(Norm):
            raise UsageError(f"there is no decoder {self.decoder!r} with {self.norm!r} norms")
        if not isinstance(self.attention, AttentionConfig):
            raise UsageError(f"attention must be an AttentionConfig, not {self.attention!r:.60}")
        whole = (*self.layers, self.width, *(() if self.short_side is None else (self.short_side,)))
        if not all(type(number) is int for number in (*whole, *(part for colour in self.palette for part in colour))):
            raise UsageError("layers, width, short_side and palette are whole numbers")
        count = 4 if self.decoder == "upernet" else 1
        if len(self.layers) != count or (self.decoder == "upernet") != (self.width > 0):
            raise UsageError(f"a decoder {self.decoder} takes {count} blocks and a width above 0 if it is an upernet")
        if not self.palette:
            object.__setattr__(self, "palette", colours_of(self.classes))
        if len(self.palette) != len(self.classes.names):
            raise UsageError(f"{len(self.classes.names)} classes need as many colours, not {len(self.palette)}")


class Segmenter(nn.Module):
    """An encoder, a `DenseEncoder` if it attends in another way, and a decoder of its maps.

    Parameters are ``encoder.…`` and ``decoder.…``.

    ``encoder.config.size`` is the window that it sees at once, and ``encoder.preprocess`` normalises pixels. What the
    decoder does not use of the encoder is frozen, or DistributedDataParallel would wait for gradients that never come.
    """

    def __init__(self, encoder: Encoder, config: SegmenterConfig) -> None:
        super().__init__()
        shape, classes = encoder.config, len(config.classes.names)
        if any(not -shape.depth <= layer < shape.depth for layer in config.layers):
            raise UsageError(f"there are no blocks {list(config.layers)} in an encoder of {shape.depth}")
        self.config = config
        self.encoder = encoder = attending(encoder, config.attention)
        self.decoder: LinearDecoder | UPerNet
        if config.decoder == "linear":
            self.decoder = LinearDecoder(shape.width, classes)
        else:
            rest: Any = {"auxiliary": config.auxiliary}
            self.decoder = UPerNet(shape.width, config.width, classes, shape.patch_size, config.norm, **rest)
        self.layers = tuple(layer % shape.depth for layer in config.layers)
        unused = [*encoder.blocks[max(self.layers) + 1 :]]
        unused += [] if self.decoder.normed else [encoder.final_norm]
        for part in [*unused, encoder.head] if shape.classes else unused:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, classes, H, W), for a softmax over classes.

        Args:
            images: (B, C, H, W), the dtype of the weights, preprocessed; H and W divisible by the patch.
        """
        return self.enlarged(self.decoder(self.maps(images)), images)

    def scores(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `forward` gives, and the same of the side head, None without one."""
        maps = self.maps(images)
        side = self.decoder.side(maps)
        return self.enlarged(self.decoder(maps), images), None if side is None else self.enlarged(side, images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, D, H/P, W/P) of every block that the decoder takes."""
        blocks = sorted(set(self.layers))
        maps = self.encoder.features(images, pool="map", layers=blocks, norm=self.decoder.normed)
        return [maps[:, blocks.index(layer)] for layer in self.layers]

    def enlarged(self, scores: Tensor, images: Tensor) -> Tensor:
        """Scores of a coarse map at the size of the images, in float32."""
        size = tuple(images.shape[2:])
        return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)

    @torch.inference_mode()
    def predict(self, picture: ImagePath | Image.Image | np.ndarray) -> np.ndarray:
        """The class of every pixel of a picture: (H, W) int16, places in ``config.classes.names``.

        The picture is scaled as the network was trained, and seen by windows that overlap by a third; scores of
        overlapping windows are averaged, enlarged to the size of the picture, and the highest one wins. A large picture
        of many classes takes memory for the scores of one row of windows alone, unless it is scaled.

        Args:
            picture: a file, a PIL picture, or (H, W, C) uint8.

        Raises:
            DataError: it cannot be read, or has other channels than the model takes.
        """
        pixels = pixels_of(picture, self.encoder.config.channels)
        size, inner = pixels.shape[:2], scaled_size(pixels.shape[:2], self.config.short_side)
        found = np.empty(size, np.int16)
        training = self.training
        self.eval()
        try:
            if inner == size:
                for top, rows in self.rows(pixels):
                    found[top : top + rows.shape[1]] = rows.argmax(dim=0).short().cpu().numpy()
            else:
                whole = torch.cat([rows.clone() for _, rows in self.rows(scaled(pixels, inner).numpy())], dim=1)
                for top, rows in lines(whole, size):
                    found[top : top + rows.shape[1]] = rows.argmax(dim=0).short().cpu().numpy()
        finally:
            self.train(training)
        return found

    def rows(self, pixels: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Averaged scores of pixels (H, W, C) uint8, from top to bottom.

        Each part is its first row, and (classes, rows, W) float32, which the next part overwrites. Beyond the edges of
        a small picture a window sees the mean colour.
        """
        height, width = pixels.shape[:2]
        window, device = self.encoder.config.size, self.encoder.cls_token.device
        tops, lefts = (window_starts(side, step) for side, step in zip((height, width), window, strict=True))
        classes = len(self.config.classes.names)
        count = max(1, min(_TOKENS // math.prod(self.encoder.config.grid), _SCORES // (classes * math.prod(window))))
        sums = torch.zeros(classes, window[0], width, device=device)
        times = torch.zeros(window[0], width, device=device)
        for number, top in enumerate(tops):
            for first in range(0, len(lefts), count):
                some = lefts[first : first + count]
                images = windows_of(self.encoder, pixels, [(top, left) for left in some])
                scores = self(images)
                for place, left in enumerate(some):
                    across = min(window[1], width - left)
                    sums[:, :, left : left + across] += scores[place, :, :, :across]
                    times[:, left : left + across] += 1
            following = tops[number + 1] if number + 1 < len(tops) else height
            done = min(following, height) - top
            yield top, sums[:, :done].div_(times[:done])
            if following < height:
                kept = window[0] - done
                for table in (*sums, times):  # one by one: a copy of all would be too much of a large picture
                    table[:kept] = table[done:].clone()
                    table[kept:] = 0


def lines(scores: Tensor, size: Size) -> Iterator[tuple[int, Tensor]]:
    """Scores (classes, h, w) enlarged bilinearly to (height, width), some lines at a time from the top.

    Together they are what `torch.nn.functional.interpolate` gives of all at once.
    """
    height, (rows, _) = size[0], scores.shape[1:]
    for top in range(0, height, _LINES):
        wanted = torch.arange(top, min(top + _LINES, height), device=scores.device)
        where = ((wanted + 0.5) * (rows / height) - 0.5).clamp(min=0)
        above = where.floor().long().clamp(max=rows - 1)
        below = (above + 1).clamp(max=rows - 1)
        share = (where - above).float()[:, None]
        mixed = scores[:, above] * (1 - share) + scores[:, below] * share  # (classes, lines, w)
        yield top, F.interpolate(mixed[None], size=(len(wanted), size[1]), mode="bilinear", align_corners=False)[0]


def colours_of(classes: MapClasses) -> tuple[tuple[int, int, int], ...]:
    """A colour for each class: its own, where classes are known by colours; else Pascal VOC's of its place.

    VOC's spread the bits of a number over the high bits of red, green and blue, so that near numbers differ; 0 is
    black.
    """
    if classes.coloured:
        return tuple((value >> 16, value >> 8 & 255, value & 255) for value in classes.first_values)
    colours = []
    for place in range(len(classes.names)):
        red = green = blue = 0
        for bit in range(8):
            three = place >> 3 * bit
            red, green, blue = (
                channel | (three >> number & 1) << 7 - bit for number, channel in enumerate((red, green, blue))
            )
        colours.append((red, green, blue))
    return tuple(colours)
