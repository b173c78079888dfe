"""The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527, section 3): one map becomes four.

A plain ViT has one scale. Instead of the usual top-down pyramid, each level is made of the last block's map alone:

    encoder ─ map at stride 16 ─┬─ deconvolve ─ norm ─ GELU ─ deconvolve ─ 1×1 ─ norm ─ 3×3 ─ norm ─ p2, stride 4
                                ├─ deconvolve ──────────────────────────── 1×1 ─ norm ─ 3×3 ─ norm ─ p3, stride 8
                                ├───────────────────────────────────────── 1×1 ─ norm ─ 3×3 ─ norm ─ p4, stride 16
                                └─ max-pool ────────────────────────────── 1×1 ─ norm ─ 3×3 ─ norm ─ p5, stride 32

The norms are LayerNorms over channels. A deconvolution has kernel and stride 2 and, where the paper does not say it,
halves the channels. The map is taken before the encoder's final norm, as in ViTDet, whose backbone has none.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from maehub.errors import UsageError
from maehub.models import Encoder

LEVELS = ("p2", "p3", "p4", "p5")
"""Names by the power of two of the stride."""

TORCHVISION_LEVELS = ("0", "1", "2", "3", "pool")
"""Names under which torchvision's detectors expect levels where nothing else is said."""


def level_strides(patch: int) -> list[float]:
    """Pixels of an image that are one pixel of each of four levels, finest first, for an encoder's patch."""
    return [patch / 2**times for times in _doublings(patch)]


def _doublings(patch: int) -> list[int]:
    return [round(math.log2(patch / stride)) for stride in (4, 8, 16, 32)]


class FeaturePyramid(nn.Module):
    """An encoder as backbone of detectors: images to maps at strides 4, 8, 16 and 32.

    Parameters are ``encoder.…`` (those of `Encoder`), and for each level, ``levels.0`` being the finest,
    ``levels.0.resample.…`` (deconvolutions), ``levels.0.project.…`` (the 1×1 convolution and its norm) and
    ``levels.0.smooth.…`` (the 3×3 one and its norm). The encoder is not copied: it trains along. What the pyramid does
    not use of it (final norm, head, blocks after the last that is taken) is frozen, or DistributedDataParallel would
    wait for gradients that never come.

    The map of an encoder of another patch than 16 is resampled by the power of two that comes nearest: for patch 8 the
    strides are the same, for 14 they are 3.5, 7, 14 and 28. `strides` has the true ones.

    Images of any size divisible by the patch are taken, positions being resized on their grid; where a map cannot be
    halved the last row or column is pooled from what is there. Detection kits pad pictures at the right and bottom
    anyway, and anchors lie exactly where they pad to a multiple of `size_divisibility`.

    Attributes:
        out_channels: of every level, as torchvision asks for it.
        strides: pixels of an image that are one pixel of a level, by the name of the level.
        size_divisibility: pixels, of which height and width should be multiples.
    """

    def __init__(
        self, encoder: Encoder, width: int = 256, *, names: Sequence[str] = LEVELS, layers: Sequence[int] | None = None
    ) -> None:
        """Make the levels, with fresh weights.

        Args:
            encoder: the backbone; a head is not used.
            width: channels of every level.
            names: of the four levels, finest first. A fifth is the coarsest with every second pixel left out, as
                detectors take it for their largest boxes; `TORCHVISION_LEVELS` are torchvision's own five.
            layers: blocks whose maps become the levels, four of them, 0 the first, −1 the last; None takes the last
                for all, as ViTDet does. A segmentation head such as UperNet takes blocks at even distances.

        Raises:
            UsageError: an argument that cannot be, or an encoder without blocks.
        """
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise UsageError(f"a pyramid is made of an Encoder, not of a {type(encoder).__name__}")
        depth = encoder.config.depth
        if len(names) not in (4, 5) or len(set(names)) != len(names):
            raise UsageError(f"names must be four or five different ones, not {', '.join(map(repr, names))}")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise UsageError(f"width must be a positive int, not {width!r}")
        layers = (-1,) * 4 if layers is None else tuple(layers)
        if len(layers) != 4 or any(not -depth <= layer < depth for layer in layers):
            raise UsageError(f"layers={list(layers)} must be four blocks from {-depth} to {depth - 1} of {depth}")
        self.layers = tuple(layer % depth for layer in layers)
        self.encoder = encoder
        unused = [encoder.final_norm, *encoder.blocks[max(self.layers) + 1 :]]
        for part in [*unused, encoder.head] if encoder.config.classes else unused:
            part.requires_grad_(False)
        patch = encoder.config.patch_size
        doublings = _doublings(patch)
        self.levels = nn.ModuleList(_Level(encoder.config.width, width, times) for times in doublings)
        self.names = tuple(names)
        self.out_channels = width
        sides = level_strides(patch)
        self.strides = dict(zip(names, [*sides, 2 * sides[-1]], strict=False))
        self.size_divisibility = patch * 2 ** max(0, -doublings[-1])

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps of every level, finest first.

        Args:
            images: (B, C, H, W), the dtype of the weights, preprocessed; H and W divisible by the patch.

        Returns:
            (B, width, H/4, W/4), (B, width, H/8, W/8) … by the name of the level; see `strides`.

        Raises:
            UsageError: H or W is not divisible by the patch.
        """
        blocks = sorted(set(self.layers))
        maps = self.encoder.features(images, pool="map", layers=blocks, norm=False)  # (B, layers, D, H/P, W/P)
        return self.of([maps[:, blocks.index(layer)] for layer in self.layers])

    def of(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """What `forward` gives, of the four maps (B, D, H/P, W/P) of `layers`, however they were made."""
        outputs = [level(one) for level, one in zip(self.levels, maps, strict=True)]
        outputs.append(outputs[-1][:, :, ::2, ::2])
        return OrderedDict(zip(self.names, outputs, strict=False))


class _Level(nn.Module):
    """One level: (B, D, h, w) to (B, width, h·2^times, w·2^times)."""

    def __init__(self, channels: int, width: int, times: int) -> None:
        from timm.layers.norm import LayerNorm2d  # over channels, eps 1e-6

        super().__init__()
        parts: list[nn.Module] = []
        for number in range(times):
            if number:
                parts += [LayerNorm2d(channels), nn.GELU()]
            fewer = max(1, channels // 2)
            parts.append(nn.ConvTranspose2d(channels, fewer, 2, stride=2))
            channels = fewer
        if times < 0:
            parts.append(nn.MaxPool2d(2**-times, ceil_mode=True))
        self.resample = nn.Sequential(*parts)
        self.project = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width))
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width))

    def forward(self, features: Tensor) -> Tensor:
        return self.smooth(self.project(self.resample(features)))
