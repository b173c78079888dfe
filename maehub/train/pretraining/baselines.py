"""What the loss is worth: the loss of two guesses that have learnt nothing, on the same hidden patches."""

from typing import NamedTuple

import torch
from torch import Tensor

from maehub.errors import UsageError
from maehub.images import Size, grid_size
from maehub.models import patchify, squared_error
from maehub.train.pretraining.objective import Objective

_AT_ONCE = 16  # pictures that are in memory together


class Baselines(NamedTuple):
    """Losses in the units of `Objective`, which a trained model must beat."""

    mean_fill: float
    interpolation: float  # NaN for tokens


@torch.no_grad()
def baselines(objective: Objective, pixels: Tensor, masked: Tensor) -> Baselines:
    """The loss of filling hidden patches without a model.

    ``mean_fill`` fills them with the mean colour of the visible pixels of their picture; for normalised pixels with
    their own mean, which is 0. ``interpolation`` fills them by `interpolated`, and normalises the result where the
    target is. Both are means over the hidden patches; with ``loss_on="all"`` over all, the visible ones being right.

    For tokens, ``mean_fill`` is the cross-entropy of guessing by the tokens of the visible patches of the same picture:
    to their counts, the tokens of all visible patches of the sample are added with a weight of √K patches, and to these
    every token once.

    Pixels are (B, H, W, C) uint8, or floating in the same range, on any device; ``masked`` is (B, N) bool, True where
    hidden, and each row keeps the same number, at least one.
    """
    config = objective.model.config
    if config.target == "tokens":
        return Baselines(_by_frequency(objective, pixels, masked), float("nan"))
    if config.target == "pca" and not objective.model.decoder.components.isfinite().all():
        raise UsageError("the components of this model were never fitted: fit_components and store_components do it")
    size = config.encoder.patch_size
    fill, interpolation = 0.0, 0.0
    for some, hidden in zip(pixels.split(_AT_ONCE), masked.split(_AT_ONCE), strict=True):
        patches = patchify(objective.normalise(some), size)  # (b, N, P·P·C)
        grid = grid_size(some.shape[1], some.shape[2], size)
        target = objective.model.target(patches)
        if config.target == "normalised_pixels":
            flat = torch.zeros_like(target)
        else:
            visible = (~hidden)[:, :, None]
            total = (patches * visible).sum(dim=1).unflatten(1, (-1, some.shape[3])).mean(dim=1)  # (b, C)
            colour = (total / visible.sum(dim=1)).repeat(1, patches.shape[2] // some.shape[3])
            flat = objective.model.target(colour[:, None].expand_as(patches))
        smooth = objective.model.target(interpolated(patches, hidden, grid, size))
        fill += (squared_error(flat, target) * hidden).sum().item()
        interpolation += (squared_error(smooth, target) * hidden).sum().item()
    terms = masked.numel() if objective.loss_on == "all" else int(masked.sum())
    return Baselines(fill / terms, interpolation / terms)


def interpolated(patches: Tensor, masked: Tensor, grid: Size, patch_size: int) -> Tensor:
    """Fill hidden patches linearly from the borders of the visible ones.

    A hidden pixel is the mean of the nearest visible pixels to its left and right in its row, and above and below in
    its column, weighted by 1 / distance: between two of them that is linear interpolation, and a picture whose
    brightness rises evenly is restored between its visible patches. Where a patch sees no visible one in its row or its
    column, what was filled so is used in the same way.

    Patches are (B, N, P·P·C) floating, in a grid of (rows, columns); visible ones are unchanged, hidden ones not read.
    ``masked`` is (B, N) bool, True where hidden; each row has a visible patch.
    """
    batch = len(patches)
    cells = patches.masked_fill(masked[:, :, None], 0).reshape(batch, *grid, patch_size, patch_size, -1)
    known = ~masked.reshape(batch, *grid)
    for _ in range(2):  # the second time everything has a known patch in its row or column
        total, weight = torch.zeros_like(cells), torch.zeros_like(cells[..., :1])
        for axis in (1, 2):
            for backwards in (False, True):
                _add_nearest(total, weight, cells, known, axis, backwards)
        reached = (weight > 0).flatten(3).any(dim=3)
        fresh = (reached & ~known)[..., None, None, None]
        cells = torch.where(fresh, total / weight, cells)
        known = known | reached
    return cells.reshape(patches.shape)


def _add_nearest(total: Tensor, weight: Tensor, cells: Tensor, known: Tensor, axis: int, backwards: bool) -> None:
    """Add the nearest known pixels in one direction along an axis of the grid, weighted by 1 / distance.

    ``cells`` is (B, rows, columns, P, P, C), and ``weight`` has one channel.
    """
    count, side = known.shape[axis], cells.shape[3]
    shape = [1, 1, 1]
    shape[axis] = count
    here = torch.arange(count, device=known.device).reshape(shape)
    if backwards:
        place = here.where(known, torch.tensor(count, device=known.device)).flip(axis).cummin(axis).values.flip(axis)
        there, gap = place < count, (place - here - 1) * side
    else:
        place = here.where(known, torch.tensor(-1, device=known.device)).cummax(axis).values
        there, gap = place >= 0, (here - place - 1) * side
    # the row or column of pixels of each patch that is next to what comes after it
    borders = cells.select(axis + 2, 0 if backwards else side - 1)  # (B, rows, columns, P, C)
    index = place.clamp(0, count - 1)[..., None, None].expand_as(borders)
    nearest = borders.gather(axis, index).unsqueeze(axis + 2)
    steps = torch.arange(1, side + 1, device=known.device)
    distance = gap[..., None] + (steps.flip(0) if backwards else steps)  # (B, rows, columns, P)
    share = torch.where(there[..., None], 1 / distance.clamp_min(1), 0).to(cells.dtype)
    share = share.unsqueeze(4 if axis == 1 else 3).unsqueeze(5)  # along the axis; the same across it
    total += share * nearest
    weight += share


def _by_frequency(objective: Objective, pixels: Tensor, masked: Tensor) -> float:
    """The cross-entropy of guessing tokens by how often they are visible; see `baselines`."""
    count = objective.model.config.outputs
    pieces = [objective.tokens(some) for some in pixels.split(_AT_ONCE)]
    tokens = torch.cat(pieces)
    shown = ~masked
    everywhere = 1.0 + torch.bincount(tokens[shown], minlength=count).double()
    everywhere /= everywhere.sum()
    kept = int(shown[0].sum())
    pull = kept**0.5
    total = torch.zeros((), dtype=torch.float64)
    for row, hidden in zip(tokens, masked, strict=True):
        own = torch.bincount(row[~hidden], minlength=count)
        shares = (own + pull * everywhere) / (kept + pull)
        wanted = row if objective.loss_on == "all" else row[hidden]
        total -= shares[wanted].log().sum().cpu()
    terms = masked.numel() if objective.loss_on == "all" else int(masked.sum())
    return float(total) / terms
