"""What is learnt: pixels to a loss, for every target and every variation of table 1 of He et al. 2021.

pixels ─ normalise ─┬─ corrupt ─ autoencoder ─ predictions of the wanted patches ─┐
                    └─ target: pixels, coefficients or tokens of the same patches ─┴─ loss

Everything random is a pure function of the samples' seeds, and nothing here waits for the device.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maehub.errors import UsageError
from maehub.images import Preprocess, grid_size
from maehub.models import (
    AutoencoderConfig,
    MaskedAutoencoder,
    mean_colours,
    patchify,
    split_index,
    squared_error,
    take,
    unpatchify,
)
from maehub.rng import random_bits
from maehub.train.engine import LossOn

TokenizerFunction = Callable[[Tensor], Tensor]
"""Pictures (B, C, H, W) float32 in [0, 1] to their tokens (B, N), integers from 0 up."""

_AT_ONCE = 16  # pictures whose patches are in memory together


class Objective(nn.Module):
    """The loss of a training step. A module, so that DDP, FSDP2 and torch.compile can wrap it; it has no weights of its
    own.

    Args:
        model: its target must be known; of ``pca`` the components must be fitted before the first step.
        preprocess: its channel statistics and value range are used, its geometry is not.
        loss_on: which patches the loss is taken on; the paper's is ``hidden`` (section 4).
        predict_share: share of the hidden patches that are predicted, drawn anew for every sample; at least one. The
            decoder runs without the others, unless hidden patches are corrupted, where it only does not predict them.
        corruption: shares of the hidden patches that become the mask token, become another patch of the picture,
            or stay (BERT, and the ViT paper, appendix B.1.2: 0.8, 0.1, 0.1). Exact up to rounding in every picture.
            Other than (1, 0, 0) needs mask tokens in the encoder.
        kept: how many patches every mask leaves visible.
        tokenizer: for a model that predicts tokens of the caller's. It stays where and as it is: not moved, not
            trained, not saved.

    Raises:
        UsageError: settings that do not go together.
    """

    scale: Tensor  # (C, 1, 1) float32, of `normalise`
    shift: Tensor

    def __init__(
        self,
        model: MaskedAutoencoder,
        preprocess: Preprocess,
        *,
        loss_on: LossOn = "hidden",
        predict_share: float = 1.0,
        corruption: tuple[float, float, float] = (1.0, 0.0, 0.0),
        kept: int,
        tokenizer: TokenizerFunction | None = None,
    ) -> None:
        super().__init__()
        _check_settings(model.config, loss_on, predict_share, corruption, tokenizer)
        if kept < 1:
            raise UsageError(f"kept must be at least 1, not {kept}: the encoder would see nothing")
        self.model = model
        self.preprocess = preprocess
        self.loss_on = loss_on
        self.predict_share = predict_share
        self.corruption = corruption
        self.kept = kept
        self.corrupts = corruption[0] < 1
        if tokenizer is not None:
            tokenizer = torch.compiler.disable(_checked(tokenizer, model.config))
        elif model.config.tokenizer == "mean-colour":
            tokenizer = partial(mean_colours, patch_size=model.config.encoder.patch_size)
        self.tokenizer = tokenizer
        # On the device from the start: to send numbers there in every step would wait for it.
        low, high = preprocess.value_range
        scale = [1 / ((high - low) * std) for std in preprocess.std]
        shift = [(-low / (high - low) - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer("shift", torch.tensor(shift)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor, masked: Tensor, seeds: Tensor) -> Tensor:
        """The mean loss over views and wanted patches; every view has the same number of them.

        Pixels are (B, H, W, C) uint8, or floating in the same range; ``masked`` is (B, N) bool, True where hidden, and
        each row keeps ``kept``; the samples' seeds are (B,) int64 in [0, 2⁶³). The loss is () float32: the mean squared
        error over the values of a patch, or the cross-entropy of tokens in nats.
        """
        # First of all: a caller's tokenizer is not compiled, and a break in the graph is cheapest here.
        tokens = None if self.tokenizer is None else self.tokens(pixels)
        images = self.normalise(pixels)
        patch_size = self.model.config.encoder.patch_size
        grid = grid_size(images.shape[2], images.shape[3], patch_size)
        batch, count = len(pixels), grid[0] * grid[1]
        if masked.dtype != torch.bool or masked.shape != (batch, count):
            raise UsageError(
                f"masked must be bool of shape ({batch}, {count}), not {masked.dtype} of {tuple(masked.shape)}"
            )
        if seeds.dtype != torch.int64 or seeds.shape != (batch,):
            raise UsageError(f"seeds must be int64 of shape ({batch},), not {seeds.dtype} of {tuple(seeds.shape)}")
        if self.kept >= count:
            raise UsageError(f"the masks keep {self.kept} of {count} patches, so nothing is hidden to be predicted")
        patches = patchify(images, patch_size)
        _, hidden = split_index(masked, self.kept)
        streams = random_bits(~seeds, 3)  # negative seeds, which no mask or crop of any sample has

        wanted = None if self.loss_on == "all" else hidden
        if self.predict_share < 1:
            wanted = chosen(hidden, self.predict_share, streams[:, 0])
        if self.corrupts:
            shown = corrupted(patches, hidden, self.corruption, streams[:, 1], streams[:, 2])
            images = unpatchify(shown.patches, grid, patch_size)
            prediction = self.model.predict(images, shown.masked, wanted=wanted)
        else:
            leave_out = self.predict_share < 1
            prediction = self.model.predict(images, masked, kept=self.kept, wanted=wanted, leave_out=leave_out)

        if tokens is not None:
            tokens = tokens if wanted is None else tokens.gather(1, wanted)
            return F.cross_entropy(prediction.float().flatten(0, 1), tokens.flatten())
        return squared_error(prediction, self.model.target(patches if wanted is None else take(patches, wanted))).mean()

    def normalise(self, pixels: Tensor) -> Tensor:
        """`Preprocess.normalise` without a wait for the device: (B, H, W, C) to (B, C, H, W) float32."""
        low, high = self.preprocess.value_range
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self.preprocess.clip and (pixels.is_floating_point() or (low, high) != (0.0, 255.0)):
            images = images.clamp(low, high)
        return images * self.scale + self.shift

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """The tokens of pictures (B, H, W, C): (B, N) int64."""
        if self.tokenizer is None:
            raise UsageError(f"a model with target={self.model.config.target!r} has no tokenizer")
        low, high = self.preprocess.value_range
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return self.tokenizer(((images - low) / (high - low)).clamp(0, 1))


def _checked(tokenizer: TokenizerFunction, config: AutoencoderConfig) -> TokenizerFunction:
    """A tokenizer of the caller's, whose output is checked: always its shape and type, at first its range."""
    has_run = False

    def checked(images: Tensor) -> Tensor:
        nonlocal has_run
        tokens = tokenizer(images)
        rows, columns = grid_size(images.shape[2], images.shape[3], config.encoder.patch_size)
        expected = (len(images), rows * columns)
        if not isinstance(tokens, Tensor):
            raise UsageError(f"the tokenizer must give a tensor of shape {expected}, not {type(tokens).__name__}")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool or tokens.shape != expected:
            raise UsageError(
                f"the tokenizer must give integers of shape {expected}, one for each patch in rows of {columns}, not "
                f"{tokens.dtype} of {tuple(tokens.shape)}"
            )
        tokens = tokens.to(images.device, torch.int64)
        if not has_run:  # once: to look at values waits for the device
            lowest, highest = int(tokens.min()), int(tokens.max())
            if lowest < 0 or highest >= config.outputs:
                raise UsageError(
                    f"the tokenizer gave tokens from {lowest} to {highest}, and the model predicts "
                    f"{config.outputs}: they must be from 0 to {config.outputs - 1}"
                )
            has_run = True
        return tokens

    return checked


class Corrupted(NamedTuple):
    """What the encoder is shown instead of hidden patches."""

    patches: Tensor  # (B, N, P·P·C)
    masked: Tensor  # (B, N) bool, True where the mask token stands; the same number in each row


def chosen(hidden: Tensor, share: float, seeds: Tensor) -> Tensor:
    """A random share of the hidden patches, rounded, at least one: (B, H) and (B,) int64 to (B, M) int64, ascending."""
    count = max(1, round(share * hidden.shape[1]))
    order = random_bits(seeds, hidden.shape[1]).argsort(dim=1, stable=True)
    return hidden.gather(1, order[:, :count].sort(dim=1).values)


def corrupted(
    patches: Tensor, hidden: Tensor, shares: tuple[float, float, float], seeds: Tensor, donor_seeds: Tensor
) -> Corrupted:
    """Hide some of the hidden patches, replace some, and let some stay: the ``shares``; see `Objective`.

    Patches are (B, N, P·P·C), N at least 2, and hidden ones (B, H) int64. The ``seeds``, (B,) int64, say which patches,
    and ``donor_seeds`` what they are replaced by: any other patch of the picture, equally likely.
    """
    count, total = hidden.shape[1], patches.shape[1]
    first, second = round(shares[0] * count), round((shares[0] + shares[1]) * count)
    order = random_bits(seeds, count).argsort(dim=1, stable=True)
    shuffled = hidden.gather(1, order)
    masked = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    masked = masked.scatter(1, shuffled[:, :first], True)
    if second > first:
        replaced = shuffled[:, first:second]
        steps = 1 + random_bits(donor_seeds, second - first) % (total - 1)
        donors = take(patches, (replaced + steps) % total)
        patches = patches.scatter(1, replaced[:, :, None].expand_as(donors), donors)
    return Corrupted(patches, masked)


class Components(NamedTuple):
    """The principal components of patches."""

    centre: Tensor  # (P·P·C,) float32
    components: Tensor  # (count, P·P·C) float32, orthonormal rows, the largest variance first


def fit_components(pixels: Tensor, preprocess: Preprocess, patch_size: int, count: int) -> Components:
    """Fit the target ``pca``: unwhitened principal components of preprocessed patches (He et al. 2021, table 1d).

    The eigenvectors of the covariance, in float64 on the CPU. The largest entry of each is positive, so the same sample
    gives the same components. The paper's ``count`` is 96; pixels are (B, H, W, C) uint8, a sample of the training
    pictures.
    """
    rows, columns = grid_size(pixels.shape[1], pixels.shape[2], patch_size)
    values, patches = patch_size**2 * pixels.shape[3], len(pixels) * rows * columns
    if not 1 <= count <= min(values, patches):
        raise UsageError(
            f"{count} components cannot be fitted to {patches} patches of {values} values: take at most "
            f"{min(values, patches)}, or a larger sample"
        )
    total = torch.zeros(values, dtype=torch.float64)
    products = torch.zeros(values, values, dtype=torch.float64)
    for some in pixels.cpu().split(_AT_ONCE):
        flat = patchify(preprocess.normalise(some), patch_size).flatten(0, 1).double()
        total += flat.sum(dim=0)
        products += flat.T @ flat
    centre = total / patches
    _, vectors = torch.linalg.eigh(products / patches - centre[:, None] * centre)  # ascending, in columns
    components = vectors.flip(1).T[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return Components(centre.float(), (components * largest.sign()).float())


@torch.no_grad()
def store_components(model: MaskedAutoencoder, found: Components) -> None:
    """Give a model of target ``pca`` its components, which are then saved with it."""
    config = model.config
    expected = (config.outputs, config.patch_values)
    if config.target != "pca" or found.components.shape != expected:
        raise UsageError(
            f"components of shape {tuple(found.components.shape)} do not fit a model with target={config.target!r} "
            f"and {expected[0]} outputs for patches of {expected[1]} values"
        )
    model.decoder.centre.copy_(found.centre)
    model.decoder.components.copy_(found.components)


def _check_settings(
    config: AutoencoderConfig,
    loss_on: LossOn,
    predict_share: float,
    corruption: tuple[float, float, float],
    tokenizer: TokenizerFunction | None,
) -> None:
    if config.target == "unknown":
        raise UsageError("a model of unknown target has no loss; say what it predicts by target=")
    if loss_on not in get_args(LossOn):
        raise UsageError(f"loss_on={loss_on!r} is not one of {', '.join(get_args(LossOn))}")
    if not 0 < predict_share <= 1:
        raise UsageError(f"predict_share must be above 0 and at most 1, not {predict_share}")
    if predict_share < 1 and loss_on == "all":
        raise UsageError("predict_share below 1 leaves patches out, so it cannot go with loss_on='all'")
    if len(corruption) != 3 or min(corruption) < 0 or abs(sum(corruption) - 1) > 1e-6:
        raise UsageError(f"corruption must be three shares that sum to 1, not {corruption}")
    if corruption[0] < 1 and config.mask_tokens == "decoder":
        raise UsageError("corrupted patches are for an encoder that sees hidden ones: say mask_tokens='encoder'")
    needs = config.target == "tokens" and not config.tokenizer
    if needs and tokenizer is None:
        raise UsageError("this model predicts tokens of a tokenizer of the caller's: give it as tokenizer=")
    if not needs and tokenizer is not None:
        own = "the mean colours of its own tokenizer" if config.tokenizer else config.target
        raise UsageError(f"this model predicts {own}, so tokenizer= must be left out")
