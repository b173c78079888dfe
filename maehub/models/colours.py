"""Mean colours as tokens: each patch is one of 512 colours, as in the masked patch prediction of the ViT paper.

Dosovitskiy et al. 2020, appendix B.1.2: the mean colour of a patch in 3 bits a channel. One channel gives 8 greys.
"""

import torch
from torch import Tensor

from maehub.errors import UsageError
from maehub.models.patches import patchify

COLOURS = {1: 8, 3: 512}
"""How many tokens there are, by the channels of the picture."""

_LEVELS = 8  # 3 bits


def mean_colours(images: Tensor, patch_size: int) -> Tensor:
    """The token of every patch.

    Args:
        images: (B, C, H, W) floating in [0, 1], C 1 or 3; H and W divisible by the patch.
        patch_size: P, pixels.

    Returns:
        (B, N) int64 in [0, 8^C), the first channel in the highest bits.
    """
    channels = images.shape[1]
    if channels not in COLOURS or not images.is_floating_point():
        raise UsageError(
            f"mean colours are of floating pictures in [0, 1] with 1 or 3 channels, not {channels} of {images.dtype}"
        )
    means = patchify(images.float(), patch_size).unflatten(2, (-1, channels)).mean(dim=2)  # (B, N, C)
    levels = (means * _LEVELS).to(torch.int64).clamp(0, _LEVELS - 1)
    return sum(level * _LEVELS**power for power, level in enumerate(reversed(levels.unbind(dim=2))))


def mean_colour_of(tokens: Tensor, channels: int = 3) -> Tensor:
    """The colours that tokens stand for, the middle of each level: (…) integers to (…, C) float32 in (0, 1)."""
    levels = [tokens // _LEVELS**power % _LEVELS for power in reversed(range(channels))]
    return (torch.stack(levels, dim=-1).float() + 0.5) / _LEVELS
