"""The error floor of drawing normalised patches with estimated statistics.

    python benchmarks/statistics_floor.py

Hides 75 % of four photos of scikit-image (astronaut, chelsea, coffee, rocket) and draws the hidden patches from their
own normalised pixels, so that all that is wrong is what an estimator guesses for their mean and spread. Two stand-ins
for a model do the same: softened patches (the shapes without the detail), and softened ones at 0.6 of their strength
under smooth random blotches, about as wrong in normalised space as trained models are. Prints the mean squared error on
hidden pixels in ImageNet-normalised space and the PSNR in dB, as a Markdown table.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import skimage.data
import torch
from scipy.interpolate import griddata
from scipy.ndimage import gaussian_filter
from skimage.restoration import inpaint_biharmonic
from torch import Tensor
from torch.nn import functional as F

from maehub.figures.patch_statistics import PatchStatistics, estimate_statistics, harmonic
from maehub.images.preprocess import Preprocess
from maehub.models.masking import make_masks
from maehub.models.patches import denormalise_patches, normalise_patches, patchify

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
SIZES = ((224, 16), (96, 8))  # (picture, patch), pixels
BLUR = 0.2  # standard deviation of the softening, in patches

Fill = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Interpolate over the grid: (rows, columns, 2) with anything where hidden, (rows, columns) bool, to all cells."""


def by_distance(weight: Callable[[np.ndarray], np.ndarray]) -> Fill:
    """A mean of the visible cells, weighted by their distance in patches."""

    def fill(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        cells = np.argwhere(np.ones_like(hidden))
        seen = np.argwhere(~hidden)
        weights = weight(np.linalg.norm(cells[:, None] - seen[None], axis=2).clip(1e-9))
        return (weights @ values[~hidden] / weights.sum(axis=1, keepdims=True)).reshape(values.shape)

    return fill


def nearest(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    cells = np.argwhere(np.ones_like(hidden))
    return griddata(np.argwhere(~hidden), values[~hidden], cells, method="nearest").reshape(values.shape)


def linear(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Linear on the triangles between visible cells, nearest outside of them."""
    cells = np.argwhere(np.ones_like(hidden))
    inside = griddata(np.argwhere(~hidden), values[~hidden], cells, method="linear").reshape(values.shape)
    return np.where(np.isnan(inside), nearest(values, hidden), inside)


def biharmonic(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    return inpaint_biharmonic(np.where(hidden[:, :, None], 0, values), hidden, channel_axis=2)


def membrane(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    grid = torch.from_numpy(values).permute(2, 0, 1)[None]
    return harmonic(grid, torch.from_numpy(hidden)[None, None])[0].permute(1, 2, 0).numpy()


def membrane_of_logarithm(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Means as they are, spreads by their logarithm."""
    mean, spread = values[:, :, :1], values[:, :, 1:]
    filled = membrane(np.concatenate([mean, np.log(spread + 1e-3)], axis=2), hidden)
    return np.concatenate([filled[:, :, :1], np.exp(filled[:, :, 1:]) - 1e-3], axis=2)


FILLS: dict[str, Fill] = {
    "mean of the visible": by_distance(np.ones_like),
    "nearest": nearest,
    "inverse distance, power 2": by_distance(lambda distance: distance**-2),
    "inverse distance, power 3": by_distance(lambda distance: distance**-3),
    "Gaussian, σ 1 patch": by_distance(lambda distance: np.exp(-(distance**2) / 2) + 1e-12),
    "linear, nearest outside": linear,
    "biharmonic": biharmonic,
    "harmonic, logarithm of the spread": membrane_of_logarithm,
    "harmonic": membrane,
}


def interpolated(fill: Fill, patches: Tensor, masked: Tensor, side: int) -> PatchStatistics:
    """Statistics by interpolating mean and spread over the grid."""
    known = normalise_patches(patches)
    values = torch.cat([known.mean, known.variance.sqrt()], dim=2)[0].reshape(side, side, 2)
    filled = torch.from_numpy(fill(values.numpy(), masked.reshape(side, side).numpy())).reshape(1, -1, 2)
    return PatchStatistics(filled[..., :1], filled[..., 1:].clamp_min(0).square())


def stand_ins(patches: Tensor, patch_size: int, seed: int) -> dict[str, Tensor]:
    """Predictions (1, N, P·P·3) in normalised space, by name."""
    exact = normalise_patches(patches).patches
    cells = exact.reshape(-1, patch_size, patch_size, 3).numpy()
    blur = BLUR * patch_size
    soft = torch.from_numpy(gaussian_filter(cells, (0, blur, blur, 0), mode="nearest")).reshape(exact.shape)
    coarse = torch.randn(len(cells), 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    blotches = F.interpolate(coarse, size=(patch_size, patch_size), mode="bilinear").permute(0, 2, 3, 1)
    blotched = 0.6 * soft + 0.5 * blotches.reshape(exact.shape)
    return {"true patches": exact, "softened": soft, "blotched": blotched}


def measure(photo: str, size: int, patch_size: int, seed: int) -> dict[str, list[float]]:
    """One photo and mask: for each estimator the mean squared error and the PSNR, once for each stand-in."""
    preprocess = Preprocess.evaluation(size, 3, patch_size)
    patches = patchify(preprocess(getattr(skimage.data, photo)())[None].double(), patch_size)
    side = size // patch_size
    masked = make_masks("random", torch.tensor([seed]), (side, side))
    known = normalise_patches(patches)
    scale = 255 * torch.tensor(preprocess.std, dtype=torch.float64).repeat(patch_size**2)
    results: dict[str, list[float]] = {}

    def judge(name: str, prediction: Tensor, statistics: PatchStatistics) -> None:
        drawn = denormalise_patches(prediction, statistics.mean, statistics.variance)
        wrong = (drawn - patches)[masked]
        psnr = 10 * torch.log10(255**2 / (wrong * scale).square().mean())
        results.setdefault(name, []).extend([float(wrong.square().mean()), float(psnr)])

    for prediction in stand_ins(patches, patch_size, seed).values():
        for name, fill in FILLS.items():
            judge(name, prediction, interpolated(fill, patches, masked, side))
        ours = estimate_statistics(patches, prediction, masked, (side, side), patch_size)
        judge("**continuous borders** (maehub)", prediction, ours)
        judge("true statistics (leaks)", prediction, PatchStatistics(known.mean, known.variance))
        loss = float((prediction - known.patches)[masked].square().mean())
        results.setdefault("error in normalised space", []).extend([loss, math.inf])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="masks a photo")
    options = parser.parse_args()
    for size, patch_size in SIZES:
        runs = [measure(photo, size, patch_size, seed) for photo in PHOTOS for seed in range(options.seeds)]
        print(f"\n{size} px, patch {patch_size}, 75 % random, {len(PHOTOS)} photos × {options.seeds} masks\n")
        print("| estimator | true patches: MSE | dB | softened: MSE | dB | blotched: MSE | dB |")
        print("|---|---|---|---|---|---|---|")
        for name in runs[0]:
            row = np.mean([run[name] for run in runs], axis=0)
            cells = [f"{value:.3f}" if not place % 2 else f"{value:.1f}" for place, value in enumerate(row)]
            print(f"| {name} | {' | '.join('–' if float(cell) > 99 else cell for cell in cells)} |")


if __name__ == "__main__":
    main()
