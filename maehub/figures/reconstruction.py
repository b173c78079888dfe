"""What a masked autoencoder paints in, what it cannot guess, and where an encoder looks: arrays, numbers and figures.

    picture ─ preprocess ─ pixels ─┬─ masked ─ autoencoder ─ prediction ─ reconstruction
                                   └────────── visible patches put back ──┴─ pasted

Every function takes a model, never a name, runs without gradients, and leaves the model as it is, its training flag
included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from maehub.errors import UsageError
from maehub.figures import rendering
from maehub.figures.drawing import Bar, as_rgb, compose, heat, over_patches, save_figure
from maehub.figures.masks import MaskSource, given_mask
from maehub.images import Preprocess, grid_size
from maehub.models import Encoder, MaskedAutoencoder, Strategy, covering_masks, make_masks
from maehub.rng import one_seed

_MASK_GREY = 128
_MAP_TITLES = ("Original", "Predicted unseen", "Squared error")
_SPACES = {"normalised_pixels": " (normalised patches)", "pca": " (coefficients)", "tokens": " (mean colours)"}
_LEAK = "leaks hidden statistics: the true mean and variance of every hidden patch were used to draw it"


class _Drawn:
    """What a model made of a picture, with a figure of it."""

    def figure(self) -> Image.Image:
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the figure in the format of the path's ending.

        Raises:
            UsageError: the folder does not exist or the ending is unknown; nothing was written.
        """
        save_figure(self.figure(), path)


@dataclass(frozen=True, eq=False)
class Panels(_Drawn):
    """The four pictures of a reconstruction and what was measured.

    ``mse`` is the training loss: the mean squared error over hidden patches in the space of the target, which is
    preprocessed pixels, patches of mean 0 and variance 1 each, or PCA coefficients; for tokens, whose loss has no
    squares, that of their colours in preprocessed pixels. ``psnr`` is in dB over the hidden pixels of the 8-bit
    pictures, 255 being the peak. ``strategy`` is ``given`` where the caller gave the mask.
    """

    original: np.ndarray  # (H, W, C) uint8, the preprocessed picture
    masked: np.ndarray  # (H, W, C) uint8, hidden patches are mid grey
    reconstruction: np.ndarray  # (H, W, C) uint8, the model's own output everywhere
    pasted: np.ndarray  # (H, W, C) uint8, the visible patches put back
    mask: np.ndarray  # (rows, columns) bool, True where hidden
    mse: float
    psnr: float
    seed: int
    statistics: rendering.Statistics
    strategy: Strategy | Literal["given"]
    mask_ratio: float  # the share that was hidden, N − K of N
    target: str
    name: str  # of the model, empty if it has none

    @property
    def leaks(self) -> bool:
        """The reconstruction was drawn with the true statistics of hidden patches."""
        return self.target == "normalised_pixels" and self.statistics == "true"

    @property
    def caption(self) -> str:
        """One line: model, mask, seed, numbers."""
        mask = f"{self.mask_line}, {_percent(self.mask_ratio)} hidden"
        numbers = f"MSE {self.mse:.3g}{_SPACES.get(self.target, '')} · PSNR {self.psnr:.1f} dB"
        if self.target == "normalised_pixels" and not self.leaks:
            numbers += " (estimated statistics)"
        return " · ".join(part for part in (self.name, mask, self.seed_line, numbers) if part)

    @property
    def mask_line(self) -> str:
        """How the mask was made, in words."""
        return f"{self.strategy} mask"

    @property
    def seed_line(self) -> str:
        """The seed in words; empty where the mask does not depend on it."""
        return f"seed {self.seed}" if self.strategy in ("random", "block") else ""

    @property
    def label(self) -> str:
        """Two lines for a row of a grid: the share that was hidden, and the PSNR."""
        return f"{_percent(self.mask_ratio)}\n{self.psnr:.1f} dB"

    @property
    def notice(self) -> str:
        """What a reader of the figure must know; empty where there is nothing."""
        return _LEAK if self.leaks else ""

    def figure(self) -> Image.Image:
        """Original, masked, reconstruction and pasted side by side with titles and the caption."""
        titles = ["Original", f"Masked {_percent(self.mask_ratio)}", "Reconstruction", "Pasted"]
        return compose([self.row()], titles, self.caption, notice=self.notice)

    def row(self) -> list[np.ndarray]:
        """The pictures of the figure, from left to right."""
        return [self.original, self.masked, self.reconstruction, self.pasted]


@dataclass(frozen=True, eq=False)
class ErrorMap(_Drawn):
    """What a model could not guess.

    ``error`` is the squared error of a patch, the mean over its values and over the masks in which it was hidden, in
    the space of the target, as in `Panels`. ``score`` is its mean.
    """

    original: np.ndarray  # (H, W, C) uint8, the preprocessed picture
    reconstruction: np.ndarray  # (H, W, C) uint8, the mean over the masks in which a patch was hidden
    error: np.ndarray  # (rows, columns) float32
    score: float
    masks: int
    seed: int
    mask_ratio: float  # the share that each mask hid
    target: str
    name: str  # of the model, empty if it has none

    @property
    def caption(self) -> str:
        """One line: model, masks, seed, score."""
        score = f"mean squared error {self.score:.3g}{_SPACES.get(self.target, '')}"
        return " · ".join(part for part in (self.name, self.mask_line, self.seed_line, score) if part)

    @property
    def mask_line(self) -> str:
        """How many masks, in words."""
        return f"{self.masks} masks, {_percent(self.mask_ratio)} hidden in each"

    @property
    def seed_line(self) -> str:
        """The seed in words."""
        return f"seed {self.seed}"

    @property
    def label(self) -> str:
        """Two lines for a row of a grid: the share that was hidden, and the score."""
        return f"{_percent(self.mask_ratio)}\n{self.score:.3g}"

    def figure(self) -> Image.Image:
        """Original, prediction and error side by side; black is no error, the palest the largest."""
        largest = float(self.error.max())
        return compose([self.row(largest)], _MAP_TITLES, self.caption, bar=Bar(0.0, largest))

    def row(self, largest: float) -> list[np.ndarray]:
        """The pictures of the figure, from left to right; ``largest`` is the error of the palest colour."""
        colours = heat(self.error / (largest or 1.0))
        return [self.original, self.reconstruction, over_patches(colours, rendering.picture_size(self.original))]


@dataclass(frozen=True, eq=False)
class AttentionMap(_Drawn):
    """How much the class token of one block attends to each patch."""

    original: np.ndarray  # (H, W, C) uint8, the preprocessed picture
    attention: np.ndarray  # (rows, columns) float32, probabilities; the rest up to 1 is the class token's own
    overlay: np.ndarray  # (H, W, 3) uint8, the picture in grey under colours from 0 to the largest
    layer: int
    head: int | None  # None for the mean of all
    name: str

    def figure(self) -> Image.Image:
        """Original and overlay side by side."""
        heads = "mean of the heads" if self.head is None else f"head {self.head}"
        caption = f"attention of the class token, block {self.layer}, {heads}, brightest {self.attention.max():.2g}"
        caption = " · ".join(part for part in (self.name, caption) if part)
        return compose([[self.original, self.overlay]], ["Original", "Attention"], caption)


@torch.inference_mode()
def reconstruct(
    autoencoder: MaskedAutoencoder,
    image: rendering.ImageSource,
    *,
    mask: MaskSource | None = None,
    strategy: Strategy = "random",
    mask_ratio: float = 0.75,
    seed: int = 0,
    statistics: rendering.Statistics = "visible",
    preprocess: Preprocess | None = None,
) -> Panels:
    """Hide part of a picture and let the model paint it in.

    Args:
        autoencoder: on any device; its target must be known, and of tokens only mean colours can be drawn.
        image: a path, a URL, a PIL image, or an array (H, W, C) uint8.
        mask: what to hide instead of drawing a mask: (rows, columns) bool, True = hidden; a PIL image, white = hidden,
            laid over the whole picture if it has the size of ``image``, otherwise stretched over what the model sees;
            or boxes (left, top, right, bottom) in pixels of the preprocessed picture, every patch they touch hidden.
        strategy: how the mask is drawn; see `make_masks`. It depends on the seed alone, not on the device.
        mask_ratio: share of patches to hide.
        seed: an int64 number.
        statistics: for models trained on normalised pixels, see `Statistics`; others need none.
        preprocess: instead of the model's own.

    Raises:
        UsageError: the target cannot be drawn, an argument is wrong, or the size is not divisible by the patch.
        DataError: the picture cannot be read, or the mask hides everything.
        HubError: the URL cannot be fetched.
    """
    if statistics not in get_args(rendering.Statistics):
        raise UsageError(f"statistics={statistics!r} is not one of {', '.join(get_args(rendering.Statistics))}")
    rendering.check_target(autoencoder)
    preprocess = preprocess or autoencoder.preprocess
    picture = rendering.open_picture(image, preprocess)
    pixels = preprocess.pixels(picture)
    size = rendering.picture_size(pixels)
    grid = grid_size(*size, autoencoder.config.encoder.patch_size)
    if mask is None:
        masked = make_masks(strategy, one_seed(seed), grid, mask_ratio)
    else:
        masked = torch.tensor(given_mask(mask, rendering.picture_size(picture), preprocess, size, grid)).flatten()[None]
    if not masked.any():
        raise UsageError("the mask hides no patch, so there is nothing to reconstruct; hide at least one")
    images = rendering.network_input(autoencoder, preprocess, pixels)
    reconstruction, errors = rendering.painted(autoencoder, preprocess, images, masked, grid, statistics)
    hidden = masked[0].reshape(grid).numpy()
    where = over_patches(hidden[:, :, None], size)
    return Panels(
        original=pixels,
        masked=np.where(where, np.uint8(_MASK_GREY), pixels),
        reconstruction=reconstruction,
        pasted=np.where(where, reconstruction, pixels),
        mask=hidden,
        mse=float(errors[masked.to(errors.device)].mean()),
        psnr=_psnr(reconstruction[where[:, :, 0]], pixels[where[:, :, 0]]),
        seed=seed,
        statistics=statistics,
        strategy=strategy if mask is None else "given",
        mask_ratio=float(hidden.mean()),
        target=autoencoder.config.target,
        name=rendering.model_name(autoencoder.encoder),
    )


@torch.inference_mode()
def error_map(
    autoencoder: MaskedAutoencoder,
    image: rendering.ImageSource,
    *,
    mask_ratio: float = 0.75,
    seed: int = 0,
    preprocess: Preprocess | None = None,
) -> ErrorMap:
    """Predict every patch of a picture while it is hidden, with as few masks as that takes (4 for a ratio of 0.75).

    Args:
        autoencoder: on any device; its target must be known, and of tokens only mean colours can be drawn.
        image: a path, a URL, a PIL image, or an array (H, W, C) uint8.
        mask_ratio: share of patches that each mask hides.
        seed: of the masks, an int64 number.
        preprocess: instead of the model's own.

    Raises:
        UsageError: the target cannot be drawn, the ratio hides nothing, or the size is not divisible by the patch.
        DataError: the picture cannot be read.
        HubError: the URL cannot be fetched.
    """
    rendering.check_target(autoencoder)
    preprocess = preprocess or autoencoder.preprocess
    pixels = preprocess.pixels(rendering.open_picture(image, preprocess))
    grid = grid_size(*rendering.picture_size(pixels), autoencoder.config.encoder.patch_size)
    masks = covering_masks(seed, grid[0] * grid[1], mask_ratio)  # (M, N)
    images = rendering.network_input(autoencoder, preprocess, pixels)
    error = np.zeros(grid, dtype=np.float64)
    colours = np.zeros(pixels.shape, dtype=np.float64)
    for masked in masks[:, None]:  # one by one: many patches or a high ratio would need much memory
        picture, squared = rendering.painted(autoencoder, preprocess, images, masked, grid, "visible")
        hidden = masked[0].reshape(grid).numpy()
        error += squared.reshape(grid).cpu().numpy() * hidden
        colours += picture * over_patches(hidden[:, :, None], rendering.picture_size(pixels))
    times = masks.sum(dim=0).reshape(grid).numpy()  # at least 1
    error /= times
    colours /= over_patches(times[:, :, None], rendering.picture_size(pixels))
    return ErrorMap(
        original=pixels,
        reconstruction=colours.round().astype(np.uint8),
        error=error.astype(np.float32),
        score=float(error.mean()),
        masks=len(masks),
        seed=seed,
        mask_ratio=float(masks[0].double().mean()),
        target=autoencoder.config.target,
        name=rendering.model_name(autoencoder.encoder),
    )


def grid(panels: Sequence[Panels] | Sequence[ErrorMap], labels: Sequence[str] | None = None) -> Image.Image:
    """Several reconstructions or several error maps, one a row: several pictures, ratios or models.

    Args:
        panels: at least one, all of a kind.
        labels: left of the rows, one each; None writes the hidden share and the PSNR or the score.
    """
    if not panels or len({type(one) for one in panels}) > 1:
        raise UsageError("a grid needs at least one reconstruction, or one error map, and not both kinds")
    if labels is None:
        labels = [one.label for one in panels]
    if len(labels) != len(panels):
        raise UsageError(f"{len(labels)} labels do not fit {len(panels)} rows")
    shared = [{one.name for one in panels}, {one.mask_line for one in panels}, {one.seed_line for one in panels}]
    caption = " · ".join(values.pop() for values in shared if len(values) == 1 and values != {""})
    maps = [one for one in panels if isinstance(one, ErrorMap)]
    if maps:
        largest = max(float(one.error.max()) for one in maps)
        caption = " · ".join(part for part in (caption, f"squared error{_SPACES.get(maps[0].target, '')}") if part)
        return compose([one.row(largest) for one in maps], _MAP_TITLES, caption, labels=labels, bar=Bar(0.0, largest))
    rows = [one for one in panels if isinstance(one, Panels)]
    ratios = {_percent(one.mask_ratio) for one in rows}
    titles = ["Original", f"Masked {ratios.pop()}" if len(ratios) == 1 else "Masked", "Reconstruction", "Pasted"]
    notice = _LEAK if any(one.leaks for one in rows) else ""
    return compose([one.row() for one in rows], titles, caption, notice=notice, labels=labels)


@torch.inference_mode()
def attention_overlay(
    encoder: Encoder,
    image: rendering.ImageSource,
    *,
    layer: int = -1,
    head: int | None = None,
    preprocess: Preprocess | None = None,
) -> AttentionMap:
    """Where the class token looks.

    Args:
        encoder: on any device.
        image: a path, a URL, a PIL image, or an array (H, W, C) uint8.
        layer: the block, 0 the first, −1 the last.
        head: one head of it; None means the mean of all.
        preprocess: instead of the model's own.
    """
    heads = encoder.config.heads
    if head is not None and not 0 <= head < heads:
        raise UsageError(f"head={head} must be from 0 to {heads - 1}, or None for the mean of all")
    preprocess = preprocess or encoder.preprocess
    pixels = preprocess.pixels(rendering.open_picture(image, preprocess))
    grid = grid_size(*rendering.picture_size(pixels), encoder.config.patch_size)
    images = rendering.network_input(encoder, preprocess, pixels)
    weights = encoder.attention(images, layer=layer)[0, :, 0, 1:]  # (heads, N)
    chosen = weights.mean(dim=0) if head is None else weights[head]
    attention = chosen.float().reshape(grid).cpu().numpy()
    colours = Image.fromarray(heat(attention / attention.max()))
    smooth = np.asarray(colours.resize(rendering.picture_size(pixels)[::-1], Image.Resampling.BILINEAR))
    grey = np.asarray(as_rgb(pixels).convert("L"))[:, :, None]
    overlay = (0.35 * grey + 0.65 * smooth).round().astype(np.uint8)
    return AttentionMap(pixels, attention, overlay, layer % encoder.config.depth, head, rendering.model_name(encoder))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit values, dB; infinite where they are equal."""
    error = np.square(a.astype(np.float64) - b).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
