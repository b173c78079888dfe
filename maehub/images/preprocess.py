"""What a network sees: the transform that travels with a model.

Importing this module imports no torch, so the processes that decode start in a fraction of a second.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, get_args

import numpy as np
from PIL import Image

from maehub.errors import DataError, IntegrityError, UsageError
from maehub.images.decoding import Decoded, ImagePath, decode, plain, printable, to_channels
from maehub.images.sizes import LARGEST_PATCH, LONGEST_SIDE, Size, as_size

if TYPE_CHECKING:
    from torch import Tensor

ResizeMode = Literal["centre-crop", "squash", "pad", "native"]
"""``centre-crop`` scales to cover and crops, ``squash`` ignores the aspect ratio, ``pad`` scales to fit and fills with
the mean colour, ``native`` keeps the size of the picture, rounded to whole patches."""
Interpolation = Literal["bicubic", "bilinear"]
TransformName = Literal["official", "timm", "transformers"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LONGEST_SCALED = 8  # times as long as wide: beyond, what lies outside the crop is never computed
_LARGEST_CROPPED = 224  # the published evaluation crops up to this size and takes the whole picture above


def read_pixels(source: ImagePath | BinaryIO, preprocess: Preprocess, *, exact_decode: bool = False) -> np.ndarray:
    """A file, by its path or open, straight to ``preprocess.pixels``: (H, W, C) uint8.

    Unless ``exact_decode``, JPEGs are decoded at a smaller size that is large enough, and only the pixels inside the
    crop are resampled, which moves some of them by a grey level or two.
    """
    if preprocess.channels not in (1, 3):
        where = printable(source) if isinstance(source, ImagePath) else "a picture"
        raise DataError(f"{where}: files have 1 or 3 channels and the model takes {preprocess.channels}")
    decoded = decode(source, None if exact_decode else preprocess.decode_size)
    return preprocess._fit(decoded, exact=exact_decode)


@dataclass(frozen=True)
class Preprocess:
    """From a picture to a network's input: geometry on 8-bit pixels, then normalisation. Travels with the model.

    ``size`` is (height, width) of the result, one int a square. ``crop_fraction`` is for ``centre-crop``: the picture
    is scaled to cover ``round(size / crop_fraction)``. ``patch_size`` is what ``native`` and the canvas of ``pad``
    are rounded to. A pixel p becomes ``((p − low) / (high − low) − mean) / std`` with ``value_range`` = (low, high);
    ``clip`` first limits it to that range. ``mean`` and ``std`` have one number a channel.
    """

    size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    resize: ResizeMode = "centre-crop"
    crop_fraction: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: tuple[float, float] = (0.0, 255.0)
    clip: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_size(self.size))
        for name in ("mean", "std", "value_range"):
            object.__setattr__(self, name, tuple(float(number) for number in getattr(self, name)))
        if type(self.patch_size) is not int or not 1 <= self.patch_size <= LARGEST_PATCH:
            raise UsageError(f"patch_size must be an int from 1 to {LARGEST_PATCH}, not {self.patch_size!r:.60}")
        for name, choices in (("resize", ResizeMode), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(choices):
                raise UsageError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        if not 0 < self.crop_fraction <= 1 or max(self.size) > 2 * LONGEST_SIDE * self.crop_fraction:
            raise UsageError(f"crop_fraction must be above 0 and at most 1, and not tiny, not {self.crop_fraction}")
        if not self.mean or len(self.mean) != len(self.std):
            raise UsageError(f"mean and std need one number a channel each, not {self.mean} and {self.std}")
        if not all(math.isfinite(mean) for mean in self.mean) or not all(0 < std < math.inf for std in self.std):
            raise UsageError(f"mean must be finite and std above 0, not {self.mean} and {self.std}")
        if len(self.value_range) != 2 or not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise UsageError(f"value_range must be (low, high) with low < high, not {self.value_range}")

    @classmethod
    def evaluation(cls, size: int | Size, channels: int = 3, patch_size: int = 16) -> Self:
        """The published evaluation transform (He et al. 2021, as in the official evaluation).

        The short side is scaled to ``round(S / 0.875)`` up to 224 pixels, to S itself above; bicubic; centre crop;
        ImageNet statistics. Other than 3 channels get the average of ImageNet's three numbers each.
        """
        average = (sum(IMAGENET_MEAN) / 3,) * channels, (sum(IMAGENET_STD) / 3,) * channels
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else average
        size = as_size(size)
        fraction = 0.875 if max(size) <= _LARGEST_CROPPED else 1.0
        return cls(size, patch_size, "centre-crop", fraction, "bicubic", mean, std)

    @classmethod
    def named(cls, name: TransformName, size: int | Size, channels: int = 3, patch_size: int = 16) -> Self:
        """A transform by the name of the library that uses it for MAE.

        ``"official"`` is `evaluation`; ``"timm"`` crops nine tenths, bicubic; ``"transformers"`` squashes, bilinear.
        """
        official = cls.evaluation(size, channels, patch_size)
        if name == "official":
            return official
        if name == "timm":
            # timm rounds S / 0.9 down; this fraction gives that size when rounded to the nearest.
            short = min(official.size)
            return replace(official, crop_fraction=short / max(short, math.floor(short / 0.9)))
        if name == "transformers":
            return replace(official, resize="squash", interpolation="bilinear", crop_fraction=1.0)
        raise UsageError(f"the transform {name!r} is not one of {', '.join(get_args(TransformName))}")

    def with_size(self, size: int | Size) -> Self:
        """The same transform for another size. One of `named` follows its rule: above 224 nothing is cropped off."""
        for name in get_args(TransformName):
            if self == self.named(name, self.size, self.channels, self.patch_size):
                return self.named(name, size, self.channels, self.patch_size)
        return replace(self, size=as_size(size))

    @property
    def channels(self) -> int:
        """C of the result."""
        return len(self.mean)

    @property
    def decode_size(self) -> Size | None:
        """(height, width) that a scaled decoding must not fall below; None where every pixel counts."""
        if self.resize == "native":
            return None
        fraction = self.crop_fraction if self.resize == "centre-crop" else 1
        return round(self.size[0] / fraction), round(self.size[1] / fraction)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """One picture, as `pixels` takes it, to a network's input: (C, H, W) float32."""
        import torch

        return self.normalise(torch.from_numpy(self.pixels(image))[None])[0]

    def pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The geometry alone.

        Args:
            image: a picture of any mode (an EXIF orientation that is still in it is applied), or an array
                (H, W, C) or (H, W), uint8.

        Returns:
            (H, W, C) uint8; H and W are ``size``, or with ``native`` those of the picture in whole patches.

        Raises:
            DataError: an array of another type or with other channels than the model takes.
        """
        if isinstance(image, Image.Image):
            if self.channels not in (1, 3):
                raise DataError(f"a picture has 1 or 3 channels and the model takes {self.channels}; give an array")
            return self._fit(Decoded.whole(plain(image)), exact=True)
        if not isinstance(image, np.ndarray):
            raise UsageError(f"a picture is a PIL image or an (H, W, C) uint8 array, not {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
            raise DataError(f"an array must be (H, W, C) or (H, W) uint8, not {image.shape} {image.dtype}")
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        bands = 1 if image.ndim == 2 else image.shape[2]
        if bands == self.channels and bands not in (1, 3):
            # Pillow would take a fourth channel for transparency.
            pictures = [Decoded.whole(Image.fromarray(image[:, :, band])) for band in range(bands)]
            parts = [self._resized(picture, True, band) for band, picture in enumerate(pictures)]
            return np.stack([np.asarray(part) for part in parts], axis=2)
        if bands in (1, 3, 4) and self.channels in (1, 3):
            return self._fit(Decoded.whole(plain(Image.fromarray(np.ascontiguousarray(image)))), exact=True)
        raise DataError(f"an array with {bands} channels does not fit a model that takes {self.channels}")

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, H, W, C), uint8 or any other type, to a network's input (B, C, H, W) float32, on their device."""
        import torch

        batch, height, width, channels = pixels.shape
        images = torch.empty((batch, channels, height, width), dtype=torch.float32, device=pixels.device)
        images.copy_(pixels.permute(0, 3, 1, 2))  # one pass to floats in their final order
        low, high = self.value_range
        if self.clip and (pixels.is_floating_point() or self.value_range != (0.0, 255.0)):
            images.clamp_(low, high)
        statistics = zip(self.mean, self.std, strict=True)
        scale = images.new_tensor([1 / ((high - low) * std) for std in self.std])
        shift = images.new_tensor([(-low / (high - low) - mean) / std for mean, std in statistics])
        return images.mul_(scale[:, None, None]).add_(shift[:, None, None])

    def denormalise(self, images: Tensor) -> Tensor:
        """A network's input or prediction (B, C, H, W) back to pictures: (B, C, H, W) float in [0, 1], clipped."""
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; missing keys take their default.

        Raises:
            IntegrityError: an unknown key, or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise IntegrityError(f"unknown keys in the preprocessing: {', '.join(unknown)}; known: {', '.join(known)}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            return cls(**values)
        except (UsageError, TypeError, ValueError, OverflowError) as error:
            raise IntegrityError(f"the preprocessing cannot be used: {error}") from error

    def _fit(self, decoded: Decoded, *, exact: bool) -> np.ndarray:
        """A picture, possibly decoded scaled, to (H, W, C) uint8."""
        if self.channels == 1:
            decoded = decoded._replace(image=to_channels(decoded.image, 1))
        # Grey becomes RGB after the resize: a third of the work, the same numbers.
        pixels = np.array(to_channels(self._resized(decoded, exact), self.channels))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _resized(self, decoded: Decoded, exact: bool, band: int | None = None) -> Image.Image:
        image, (height, width), content, _ = decoded
        method = Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR
        if self.resize == "centre-crop":
            return self._cropped(decoded, method, exact)
        if self.resize == "squash":
            return image.resize(self.size[::-1], method, box=content)
        step = self.patch_size
        if self.resize == "native":
            rows, columns = (max(1, round(side / step)) * step for side in (height, width))
            return image.resize((columns, rows), method)
        canvas = [math.ceil(side / step) * step for side in self.size]
        scale = min(canvas[0] / height, canvas[1] / width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        padded = Image.new(image.mode, (canvas[1], canvas[0]), self._fill(image.mode, band))
        fitted = image.resize((columns, rows), method, box=content)
        padded.paste(fitted, ((canvas[1] - columns) // 2, (canvas[0] - rows) // 2))
        return padded

    def _cropped(self, decoded: Decoded, method: Image.Resampling, exact: bool) -> Image.Image:
        image, (height, width), content, _ = decoded
        rows, columns = (round(side / self.crop_fraction) for side in self.size)  # which the scaled picture covers
        # One side is met exactly, the other rounded down, as torchvision does.
        if rows * width <= columns * height:
            scaled = max(rows, columns * height // width), columns
        else:
            scaled = rows, max(columns, rows * width // height)
        top, left = round((scaled[0] - self.size[0]) / 2), round((scaled[1] - self.size[1]) / 2)
        if exact and max(scaled) <= _LONGEST_SCALED * min(scaled):
            whole = image.resize(scaled[::-1], method, box=content)
            return whole.crop((left, top, left + self.size[1], top + self.size[0]))
        # In one step that computes only what is inside the crop. Pillow keeps the box in single precision and may take
        # rows and columns in the other order, so some pixels round the other way.
        across, down = (content[2] - content[0]) / scaled[1], (content[3] - content[1]) / scaled[0]
        box = (left * across, top * down, (left + self.size[1]) * across, (top + self.size[0]) * down)
        shifted = (box[0] + content[0], box[1] + content[1], box[2] + content[0], box[3] + content[1])
        return image.resize(self.size[::-1], method, box=shifted)

    def _fill(self, mode: str, band: int | None) -> int | tuple[int, ...]:
        """The mean colour, which becomes zero when normalised."""
        low, high = self.value_range
        colour = [min(255, max(0, round(low + mean * (high - low)))) for mean in self.mean]
        if band is not None:
            return colour[band]
        return tuple(colour) if mode == "RGB" else round(sum(colour) / len(colour))
