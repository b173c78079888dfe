"""Architectures by name."""

from dataclasses import replace

from maehub.errors import UsageError
from maehub.images import Preprocess, Size
from maehub.models import PRESETS, EncoderConfig

_WHOLE_PICTURE = {"vit-nano"}  # presets whose evaluation crops nothing off


def preset(
    name: str, image_size: tuple[int, ...] = (), channels: int | None = None
) -> tuple[EncoderConfig, Preprocess]:
    """An architecture by name and its transform, for another size of pictures or other channels where given."""
    if name not in PRESETS:
        raise UsageError(f"--model {name} is not one of {', '.join(PRESETS)}; --from names weights")
    config = PRESETS[name]
    size = image_size * 2 if len(image_size) == 1 else image_size or config.size
    if any(side % config.patch_size for side in size):
        raise UsageError(f"--image-size must be a multiple of {config.patch_size}, not {' '.join(map(str, size))}")
    config = replace(config, image_size=(size[0], size[1]), channels=channels or config.channels)
    preprocess = Preprocess.evaluation(config.size, config.channels, config.patch_size)
    return config, replace(preprocess, crop_fraction=1.0) if name in _WHOLE_PICTURE else preprocess


def pair(sides: tuple[int, ...]) -> int | Size | None:
    """``--image-size`` as `load` takes it."""
    if not sides:
        return None
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
