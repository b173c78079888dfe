"""Pictures to patches and back.

Shapes throughout the library: ``B`` images, ``H W`` pixels, ``P`` patch side, ``N = H/P · W/P`` patches, ``K`` kept
(visible) patches, ``D`` width, ``C`` channels. Tokens run row by row over the grid, and the values of one patch run
row, column, channel (channel fastest), which is the order of the published weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from maehub.errors import UsageError
from maehub.images import Size, grid_size


class NormalisedPatches(NamedTuple):
    """Patches with mean 0 and variance 1 each, and what undoes that."""

    patches: Tensor  # (B, N, P·P·C)
    mean: Tensor  # (B, N, 1)
    variance: Tensor  # (B, N, 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flat patches.

    Args:
        images: (B, C, H, W), any dtype, H and W divisible by ``patch_size``.
        patch_size: P, pixels.

    Returns:
        (B, N, P·P·C), same dtype. N runs row by row; a patch's values run row, column, channel.
    """
    batch, channels, height, width = images.shape
    rows, columns = grid_size(height, width, patch_size)
    cells = images.reshape(batch, channels, rows, patch_size, columns, patch_size)  # (B, C, rows, P, columns, P)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, grid: Size, patch_size: int) -> Tensor:
    """The inverse of `patchify`.

    Args:
        patches: (B, N, P·P·C).
        grid: (rows, columns) with rows · columns = N.
        patch_size: P, pixels.

    Returns:
        (B, C, rows·P, columns·P), same dtype.
    """
    batch, count, values = patches.shape
    rows, columns = grid
    channels, rest = divmod(values, patch_size * patch_size)
    if rows * columns != count or rest:
        raise UsageError(
            f"{count} patches of {values} values do not fill a grid of {rows}×{columns} with patches of {patch_size}"
        )
    cells = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)  # (B, rows, columns, P, P, C)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)


def normalise_patches(patches: Tensor, eps: float = 1e-6) -> NormalisedPatches:
    """Shift and scale every patch to mean 0 and variance 1 over all its values, channels together.

    The variance is the unbiased one (divisor P·P·C − 1), as the published normalised-pixel weights were trained
    (He et al. 2021, section 4.1, "w/ norm").

    Args:
        patches: (B, N, P·P·C), floating.
        eps: added to the variance under the square root.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True, unbiased=True)
    return NormalisedPatches((patches - mean) / torch.sqrt(variance + eps), mean, variance)


def denormalise_patches(patches: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-6) -> Tensor:
    """The inverse of `normalise_patches`, given its mean and variance or estimates of them: (B, N, P·P·C)."""
    return patches * torch.sqrt(variance + eps) + mean
