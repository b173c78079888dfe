"""Decoders of segmentation: from maps of an encoder's blocks to a score of every class at every place.

Linear, as probes and the simplest fine-tuning have it:

    last block ─ final norm ─ 1×1 ─ scores at the stride of a patch

UPerNet (Xiao et al. 2018, arXiv 1807.10221), with which He et al. 2021 (table 5) measure on ADE20K:

    block a ─ deconvolve ×2 ─ 1×1 ─────────────────(+)─ 3×3 ─┐
    block b ─ deconvolve ──── 1×1 ───────────(+)────┴─ 3×3 ──┤
    block c ───────────────── 1×1 ─────(+)────┴─────── 3×3 ──┼─ join ─ 3×3 ─ 1×1 ─ scores at stride 4
    block d ─ max-pool ────── pooled ───┴────────────────────┘
       └ pooled to 1×1, 2×2, 3×3 and 6×6, each 1×1, joined with the map, 3×3

The strides are those of a patch of 16; other patches are resampled by the power of two that comes nearest. Every
convolution but the last has no bias and is followed by a norm and ReLU.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

Decoder = Literal["linear", "upernet"]
Norm = Literal["layer", "batch"]
"""``layer`` normalises every place by its channels, ``batch`` every channel over the batch, as published."""

_STRIDES = (4, 8, 16, 32)
_POOLED = (1, 2, 3, 6)
_DROPOUT = 0.1
_AUXILIARY = 256  # channels of the side head


class LinearDecoder(nn.Module):
    """One linear map of every patch of the last block. Parameters: ``classify``."""

    normed = True  # whether maps go through the encoder's final norm

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(channels, classes, 1)
        _begin(self.classify)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One map (B, D, h, w) to (B, classes, h, w)."""
        return self.classify(maps[-1])

    def side(self, maps: Sequence[Tensor]) -> None:
        """No scores of an auxiliary head, which `UPerNet` has."""
        return


class UPerNet(nn.Module):
    """The neck of plain Vision Transformers, UPerNet's head, and a side head on the third map.

    Parameters: ``neck.N``, ``pool.N``, ``bottleneck``, ``lateral.N``, ``smooth.N``, ``fuse``, ``classify``, and
    ``auxiliary`` where there is one.
    """

    normed = False

    def __init__(
        self, channels: int, width: int, classes: int, patch: int, norm: Norm, *, auxiliary: bool = True
    ) -> None:
        """Make it with fresh weights.

        Args:
            channels: D of the encoder.
            width: channels inside; the encoder's as published.
            patch: pixels; of the encoder.
            auxiliary: with the side head.
        """
        super().__init__()
        doublings = [round(math.log2(patch / stride)) for stride in _STRIDES]
        self.neck = nn.ModuleList(_resampled(channels, times, norm) for times in doublings)
        self.pool = nn.ModuleList(_convolution(channels, width, 1, norm) for _ in _POOLED)
        self.bottleneck = _convolution(channels + len(_POOLED) * width, width, 3, norm)
        self.lateral = nn.ModuleList(_convolution(channels, width, 1, norm) for _ in range(3))
        self.smooth = nn.ModuleList(_convolution(width, width, 3, norm) for _ in range(3))
        self.fuse = _convolution(4 * width, width, 3, norm)
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.classify = nn.Conv2d(width, classes, 1)
        self.auxiliary: nn.Sequential | None = None
        if auxiliary:
            between = min(_AUXILIARY, width)
            self.auxiliary = nn.Sequential(
                _convolution(channels, between, 3, norm), nn.Dropout2d(_DROPOUT), nn.Conv2d(between, classes, 1)
            )
        for layer in (self.classify, *(self.auxiliary[-1:] if self.auxiliary else ())):
            _begin(layer)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, D, h, w), of early blocks first, to (B, classes, 4·h, 4·w) for a patch of 16."""
        taps = [resample(tap) for resample, tap in zip(self.neck, maps, strict=True)]  # strides 4, 8, 16, 32
        size = taps[3].shape[2:]
        pooled = [_enlarged(conv(F.adaptive_avg_pool2d(taps[3], side)), size) for conv, side in self._pools()]
        levels = [conv(tap) for conv, tap in zip(self.lateral, taps[:3], strict=True)]
        levels.append(self.bottleneck(torch.cat([taps[3], *pooled], dim=1)))
        for number in (2, 1, 0):  # from coarse to fine
            levels[number] = levels[number] + _enlarged(levels[number + 1], levels[number].shape[2:])
        smooth = [conv(level) for conv, level in zip(self.smooth, levels[:3], strict=True)] + [levels[3]]
        joined = torch.cat([_enlarged(level, smooth[0].shape[2:]) for level in smooth], dim=1)
        return self.classify(self.dropout(self.fuse(joined)))

    def side(self, maps: Sequence[Tensor]) -> Tensor | None:
        """(B, classes, h, w) at the third map's stride."""
        return None if self.auxiliary is None else self.auxiliary(self.neck[2](maps[2]))

    def _pools(self) -> list[tuple[nn.Module, int]]:
        return list(zip(self.pool, _POOLED, strict=True))


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes together, which may be on CPUs.

    In one process, and where it does not train, it is its parent. The batches of processes may differ in size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        values, axes = x.float(), (0, 2, 3)
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _SumOfAll.apply(torch.cat([values.sum(axes), count]))
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centred = values - mean[:, None, None]
        variance = _SumOfAll.apply(centred.square().sum(axes)) / count  # not of squares: these may cancel
        with torch.no_grad():
            for kept, now in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
                assert kept is not None
                kept.lerp_(now, self.momentum or 0.0)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _SumOfAll(torch.autograd.Function):
    """The sum of every process's tensor; gradients are of the sum of all losses, as SyncBatchNorm has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


def _begin(layer: nn.Module) -> None:
    """Of a layer that gives scores: small weights, no bias."""
    assert isinstance(layer, nn.Conv2d)
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _norm(channels: int, norm: Norm) -> nn.Module:
    if norm == "batch":
        return SharedBatchNorm(channels)
    from timm.layers.norm import LayerNorm2d  # over channels, eps 1e-6

    return LayerNorm2d(channels)


def _convolution(channels: int, width: int, kernel: int, norm: Norm) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, _norm(width, norm), nn.ReLU())


def _resampled(channels: int, times: int, norm: Norm) -> nn.Sequential:
    """A map made 2^times as large, its channels kept."""
    parts: list[nn.Module] = []
    for number in range(times):
        parts += [_norm(channels, norm), nn.GELU()] if number else []
        parts.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
    if times < 0:
        parts.append(nn.MaxPool2d(2**-times, ceil_mode=True))
    return nn.Sequential(*parts)
