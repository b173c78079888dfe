"""Which patches are hidden.

A mask is ``masked: (B, N) bool. True where the patch is hidden from the encoder.`` Every row of a batch keeps the same
number of patches, and kept patches stay in ascending order.

Randomness is counter-based: a mask is a pure function of an int64 seed, the same on every device, in every process and
under compilation. The seed of a training sample is a hash of (run seed, epoch, sample id, view), so the number of
workers or ranks changes nothing.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from maehub.errors import DataError, UsageError
from maehub.images import Size
from maehub.rng import one_seed, random_bits, random_uniform, sample_seed

Strategy = Literal["random", "block", "grid"]
"""``random`` is the paper's; ``block`` hides rectangles (Bao et al. 2021, BEiT); ``grid`` keeps one of each 2×2."""

_BLOCK_ASPECT = (0.3, 1 / 0.3)  # height to width of a rectangle, from BEiT
_BLOCK_SMALLEST = 16  # patches in a rectangle, from BEiT; fewer where the grid is small


def kept_count(patches: int, mask_ratio: float) -> int:
    """How many of N patches stay visible: max(1, int(N·(1 − ratio))), rounded as in the published code."""
    if not 0 <= mask_ratio < 1:
        raise UsageError(f"mask_ratio must be at least 0 and below 1, not {mask_ratio}")
    return max(1, int(patches * (1 - mask_ratio)))


def make_masks(strategy: Strategy, seeds: Tensor, grid: Size, mask_ratio: float = 0.75) -> Tensor:
    """Masks of a strategy, one a seed.

    Args:
        strategy: see `Strategy`.
        seeds: (B,) int64.
        grid: (rows, columns) of patches.
        mask_ratio: share of patches to hide, in [0, 1). ``random`` and ``block`` hide exactly N − K patches.
            ``grid`` hides three of four and refuses another ratio; on an odd side it keeps the outer patch too.

    Returns:
        (B, N) bool on the device of ``seeds``. True where the patch is hidden.
    """
    rows, columns = grid
    kept = kept_count(rows * columns, mask_ratio)
    if strategy == "random":
        return random_masks(seeds, rows * columns, kept)
    if strategy == "block":
        blocks = [_block_mask(seed, grid, rows * columns - kept) for seed in seeds.tolist()]
        return torch.from_numpy(np.stack(blocks)).to(seeds.device)
    if strategy == "grid":
        if mask_ratio != 0.75:
            raise UsageError(f"the grid strategy keeps one patch of each 2×2, so its ratio is 0.75, not {mask_ratio}")
        masked = torch.ones(rows, columns, dtype=torch.bool, device=seeds.device)
        masked[::2, ::2] = False
        return masked.flatten().repeat(len(seeds), 1)
    raise UsageError(f"strategy={strategy!r} is not one of {', '.join(get_args(Strategy))}")


def random_masks(seeds: Tensor, patches: int, kept: int) -> Tensor:
    """Uniform masks without replacement that keep ``kept`` of ``patches``: (B,) int64 seeds to (B, N) bool."""
    order = random_bits(seeds, patches).argsort(dim=1, stable=True)  # (B, N), a shuffle of the patches
    masked = torch.ones(len(seeds), patches, dtype=torch.bool, device=seeds.device)
    return masked.scatter(1, order[:, :kept], False)


def covering_masks(seed: int, patches: int, mask_ratio: float = 0.75) -> Tensor:
    """As few masks of a ratio as hide every patch equally often or nearly so, and each at least once.

    Returns:
        (M, N) bool on the CPU. True where the patch is hidden; 4 masks for a ratio of 0.75.
    """
    kept = kept_count(patches, mask_ratio)
    hidden = patches - kept
    if not hidden:
        raise UsageError(f"a mask_ratio of {mask_ratio} hides none of {patches} patches, so nothing can be covered")
    order = random_bits(one_seed(seed), patches)[0].argsort(stable=True)  # (N,), a shuffle of the patches
    step = min(kept, hidden)
    starts = torch.arange(math.ceil(patches / step)) * step  # (M,)
    windows = (starts[:, None] + torch.arange(hidden)) % patches  # (M, N − K) of the shuffle, around its end
    masked = torch.zeros(len(starts), patches, dtype=torch.bool)
    return masked.scatter(1, order[windows], True)


def _block_mask(seed: int, grid: Size, hidden: int) -> np.ndarray:
    """Rectangles of random size, shape and position until exactly ``hidden`` patches are covered: (N,) bool."""
    rows, columns = grid
    masked = np.zeros(grid, dtype=bool)
    smallest = min(_BLOCK_SMALLEST, max(1, hidden // 4))
    logs = [math.log(side) for side in _BLOCK_ASPECT]
    tries = 0
    while (missing := hidden - int(masked.sum())) > 0:
        area, aspect, down, right = random_uniform(sample_seed(seed, tries, 0), 4)
        tries += 1
        size = smallest + area * max(0, missing - smallest)
        shape = math.exp(logs[0] + aspect * (logs[1] - logs[0]))
        height = min(rows, max(1, round(math.sqrt(size * shape))))
        width = min(columns, max(1, round(math.sqrt(size / shape))))
        top, left = int(down * (rows - height + 1)), int(right * (columns - width + 1))
        block = np.zeros(grid, dtype=bool)
        block[top : top + height, left : left + width] = True
        fresh = np.flatnonzero(block & ~masked)[:missing]  # the last rectangle is cut to the exact number
        masked.flat[fresh] = True
    return masked.flatten()


def visible_count(masked: Tensor) -> int:
    """K of a batch of masks."""
    counts = (~masked).sum(dim=1)
    fewest, most = int(counts.min()), int(counts.max())
    if fewest != most:
        raise DataError(
            f"the masks of one batch keep between {fewest} and {most} patches, but a batch needs one number; "
            "group the images by the number of patches they keep, or run them one by one"
        )
    if not fewest:
        raise DataError("the mask hides every patch, so the encoder would see nothing; leave at least one visible")
    return fewest


def split_index(masked: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Indices of the visible patches (B, K) and of the hidden ones (B, N − K), each ascending, int64."""
    order = masked.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :kept], order[:, kept:]
