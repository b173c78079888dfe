"""The mean and the spread of hidden patches, estimated from what is visible.

A model that was trained on normalised pixels predicts every patch with mean 0 and variance 1. To draw its prediction,
each hidden patch needs a brightness and a contrast that nobody has seen. Taking them from the original leaks the answer
(they carry most of the picture); here they are estimated:

- Pictures are continuous, so the means and spreads of the hidden patches are chosen such that neighbours agree where
  they touch: the squared jump across all patch borders is as small as possible. Visible patches are fixed.
- Spreads alone are pulled towards the harmonic interpolation of the visible ones over the grid, so that a prediction
  with wrong borders does not flatten or overdraw the picture.

Only visible pixels and the model's prediction enter. ``benchmarks/statistics_floor.py`` compares this with
interpolating mean and spread over the grid; ``docs/reconstructions.md`` has the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maehub.images import Size
from maehub.models import normalise_patches

_EPS = 1e-6  # of `normalise_patches`
_SPREAD_PULL = 3.0  # weight of the interpolated spread against the jumps of one border; flat between 1 and 10
_TOLERANCE = 1e-6  # of the residual, relative; far below one grey level


class PatchStatistics(NamedTuple):
    """What `denormalise_patches` needs beside the patches."""

    mean: Tensor  # (B, N, 1) float32
    variance: Tensor  # (B, N, 1) float32


def estimate_statistics(
    patches: Tensor, prediction: Tensor, masked: Tensor, grid: Size, patch_size: int
) -> PatchStatistics:
    """Statistics of hidden patches from visible pixels and the prediction; visible patches keep their own.

    ``patches`` (B, N, P·P·C) floating are the preprocessed picture, read where visible; ``prediction``, as large, is
    that of a model trained on normalised pixels, read where hidden. ``masked`` (B, N) bool is True where hidden; each
    picture has a visible patch. ``grid`` is (rows, columns). What comes back is on the device of ``patches``, computed
    in float64 on the CPU, the same for every device.
    """
    device, batch = patches.device, len(patches)
    patches, prediction, masked = patches.cpu().double(), prediction.cpu().double(), masked.cpu()
    hidden = masked.reshape(batch, 1, *grid)
    shown = normalise_patches(patches.masked_fill(masked[:, :, None], 0))
    values = torch.where(masked[:, :, None], prediction, shown.patches)
    cells = values.reshape(batch, *grid, patch_size, patch_size, -1)
    across = 3, cells[:, :, :-1, :, -1].flatten(3), cells[:, :, 1:, :, 0].flatten(3)
    borders = across, (2, cells[:, :-1, :, -1].flatten(3), cells[:, 1:, :, 0].flatten(3))
    start = torch.cat([shown.mean, torch.sqrt(shown.variance + _EPS)], dim=2)  # (B, N, 2)
    start = harmonic(start.transpose(1, 2).reshape(batch, 2, *grid), hidden)

    def pull(step: Tensor) -> Tensor:
        """Half the gradient of the squared jumps plus that of the spread's distance from its start."""
        return _pull_of_borders(step, borders) + step * torch.tensor([0.0, _SPREAD_PULL])[:, None, None]

    step = _conjugate_gradients(pull, -_pull_of_borders(start, borders), hidden)
    mean, spread = (start + step).flatten(2).transpose(1, 2).split(1, dim=2)  # (B, N, 1) each
    variance = (spread.clamp_min(0).square() - _EPS).clamp_min(0)
    return PatchStatistics(mean.float().to(device), variance.float().to(device))


def harmonic(values: Tensor, hidden: Tensor) -> Tensor:
    """Fill the hidden cells of a grid so that each is the mean of its neighbours, like a stretched membrane.

    ``values`` (B, channels, rows, columns) float64 are read where ``hidden`` (B, 1, rows, columns) is False; each grid
    has a visible cell. Visible cells come back unchanged, hidden ones within the range of the visible.
    """
    seen = (~hidden).sum(dim=(2, 3), keepdim=True)
    level = values.masked_fill(hidden, 0).sum(dim=(2, 3), keepdim=True) / seen
    start = torch.where(hidden, level, values)
    return start + _conjugate_gradients(_pull_of_neighbours, -_pull_of_neighbours(start), hidden)


def _pull_of_neighbours(values: Tensor) -> Tensor:
    """The graph Laplacian of the grid: half the gradient of the squared differences between neighbours."""
    pull = torch.zeros_like(values)
    for axis in (2, 3):
        difference = values.diff(dim=axis)
        pull.narrow(axis, 1, difference.shape[axis]).add_(difference)
        pull.narrow(axis, 0, difference.shape[axis]).sub_(difference)
    return pull


def _pull_of_borders(values: Tensor, borders: tuple[tuple[int, Tensor, Tensor], ...]) -> Tensor:
    """Half the gradient of the mean squared jumps over the borders, for (mean, spread): (B, 2, rows, columns).

    Of each axis of that the normalised values before and after every border: (B, …, …, P·C), one patch fewer along it.
    """
    pull = torch.zeros_like(values)
    for axis, before, after in borders:
        count = values.shape[axis] - 1
        mean, spread = values.diff(dim=axis)[:, 0], values[:, 1]
        first, second = spread.narrow(axis - 1, 0, count), spread.narrow(axis - 1, 1, count)
        jump = mean[..., None] + second[..., None] * after - first[..., None] * before  # (B, …, …, P·C)
        level = jump.mean(dim=3)
        pull.narrow(axis, 1, count).add_(torch.stack([level, (jump * after).mean(dim=3)], dim=1))
        pull.narrow(axis, 0, count).sub_(torch.stack([level, (jump * before).mean(dim=3)], dim=1))
    return pull


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], right: Tensor, hidden: Tensor) -> Tensor:
    """Solve operator(x) = right on the hidden cells, x being 0 elsewhere (Hestenes and Stiefel 1952).

    Each picture of the batch has its own step lengths, so it does not matter what it is batched with.
    """
    solution = torch.zeros_like(right)
    residual = right * hidden
    direction = residual
    energy = residual.square().sum(dim=(1, 2, 3), keepdim=True)
    enough = energy * _TOLERANCE**2
    for _ in range(right[0].numel()):  # exact arithmetic would need no more
        if bool((energy <= enough).all()):
            break
        image = operator(direction) * hidden
        length = energy / (direction * image).sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-300)
        solution = solution + length * direction
        residual = residual - length * image
        before, energy = energy, residual.square().sum(dim=(1, 2, 3), keepdim=True)
        direction = residual + energy / before.clamp_min(1e-300) * direction
    return solution
