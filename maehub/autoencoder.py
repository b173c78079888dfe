"""The masked autoencoder of He et al. 2021, figure 1.

image ─ patchify ─┬─ visible patches ─ encoder ──┐
                  │                              ├─ tokens of every patch ─ decoder ─ pixels of every patch
                  └─ hidden patches ─ mask token ┘                                       │
                        └───────────────────────────── target ──────────────── loss on hidden patches
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from maehub.encoder import LAYER_NORM_EPS, Block, Encoder, EncoderConfig, initialise, initialise_token, take
from maehub.errors import UsageError
from maehub.images import Preprocess
from maehub.masking import kept_count, random_masks, split_index, visible_count
from maehub.patches import Size, grid_size, normalise_patches, patchify
from maehub.positions import resize_table, sincos_table, with_cls_row

Target = Literal["pixels", "normalised_pixels", "unknown"]
"""What the decoder was trained to predict; ``unknown`` where a file does not say."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """The network of a `MaskedAutoencoder`; saved beside its weights.

    ``mask_tokens="encoder"`` is the ablation of table 1c: the encoder sees mask tokens too.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    target: Target = "normalised_pixels"
    mask_tokens: Literal["decoder", "encoder"] = "decoder"

    def __post_init__(self) -> None:
        if self.encoder.pool != "cls" or self.encoder.classes:
            raise UsageError("the encoder of an autoencoder has no head and ends in norm: classes=0 and pool='cls'")
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            value, least = getattr(self, name), 0 if name == "decoder_depth" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} must be an int of at least {least}, not {value!r}")
        if self.decoder_width % self.decoder_heads:
            raise UsageError(f"decoder_width={self.decoder_width} is not divisible by {self.decoder_heads} heads")
        if self.decoder_width % 4:
            raise UsageError(f"decoder_width={self.decoder_width} is not divisible by 4")
        if self.target not in get_args(Target):
            raise UsageError(f"target={self.target!r} is not one of {', '.join(get_args(Target))}")
        if self.mask_tokens not in ("decoder", "encoder"):
            raise UsageError(f"mask_tokens={self.mask_tokens!r} is not one of decoder, encoder")

    @property
    def prediction_width(self) -> int:
        """Values predicted for one patch: P·P·C."""
        return self.encoder.patch_size**2 * self.encoder.channels


class Output(NamedTuple):
    """What a forward of the autoencoder gives."""

    loss: Tensor  # () float32
    prediction: Tensor  # (B, N, P·P·C), every patch
    masked: Tensor  # (B, N) bool, True where hidden


class Decoder(nn.Module):
    """A small transformer from the encoder's tokens to the pixels of every patch."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width, encoder = config.decoder_width, config.encoder
        self.embed = nn.Linear(encoder.width, width)
        if config.mask_tokens == "decoder":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(with_cls_row(sincos_table(width, encoder.grid)), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, encoder.mlp_ratio) for _ in range(config.decoder_depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(width, config.prediction_width)

    def forward(self, tokens: Tensor, grid: Size, wanted: Tensor | None = None) -> Tensor:
        """Predict patches.

        Args:
            tokens: (B, N + 1, D/dec), class token first, spatial order, without positions.
            grid: (rows, columns) of the N patches.
            wanted: (B, M) int64 patches to predict; None means all. The last block and the head run on these alone.

        Returns:
            (B, N or M, P·P·C).
        """
        native = self.config.encoder
        x = tokens + resize_table(self.pos_embed, native.grid, grid, native.positions)
        if wanted is None:
            for block in self.blocks:
                x = block(x)
            x = x[:, 1:]  # the class token has no pixels
        elif self.blocks:
            *before, last = self.blocks
            for block in before:
                x = block(x)
            x = last(x, wanted + 1)
        else:
            x = take(x, wanted + 1)
        return self.pred(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder, trained to paint in what is hidden."""

    def __init__(self, config: AutoencoderConfig, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, preprocess)
        self.decoder = Decoder(config)
        initialise(self.decoder)
        if config.mask_tokens == "encoder":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.encoder.width))
        token = self.mask_token if config.mask_tokens == "encoder" else self.decoder.mask_token
        initialise_token(token)

    @property
    def preprocess(self) -> Preprocess:
        """The transform of a picture, the encoder's."""
        return self.encoder.preprocess

    def forward(
        self,
        images: Tensor,
        masked: Tensor | None = None,
        *,
        mask_ratio: float = 0.75,
        seeds: Tensor | list[int] | None = None,
    ) -> Output:
        """Hide patches and predict every patch.

        Args:
            images: (B, C, H, W) floating, preprocessed; H and W divisible by the patch.
            masked: (B, N) bool, True where hidden; None draws random masks.
            mask_ratio: share of patches to hide where ``masked`` is None.
            seeds: (B,) int64 seeds of the random masks; None means 0 … B − 1.

        Returns:
            `Output`; its loss is NaN where the target is unknown.
        """
        grid, patches = self._patches(images)
        if masked is None:
            kept = kept_count(patches.shape[1], mask_ratio)
            masked = random_masks(self._seeds(seeds, images), patches.shape[1], kept)
        else:
            kept = self._check(masked, patches)
        prediction = self._predict(patches, masked, kept, grid)
        if self.config.target == "unknown":
            loss = torch.full((), torch.nan, device=images.device)
        else:
            loss = _mean_over_hidden(_squared_error(prediction, self.target(patches)), masked)
        return Output(loss, prediction, masked)

    def loss(self, images: Tensor, masked: Tensor, *, kept: int | None = None) -> Tensor:
        """The training path: the same loss as `forward`, computing only what the loss needs.

        Only visible patches are embedded; the last decoder block asks, and the head predicts, only where patches are
        hidden.

        Args:
            images: (B, C, H, W) floating, preprocessed.
            masked: (B, N) bool, True where hidden, each row keeping the same number.
            kept: that number, where the caller knows it; None counts and checks, which waits for the device.

        Returns:
            () float32: the mean squared error over all values of all hidden patches.
        """
        if self.config.target == "unknown":
            raise UsageError(
                "what this autoencoder was trained to predict is unknown, so it has no loss; "
                "say it: load_autoencoder(..., target='pixels') or target='normalised_pixels'"
            )
        grid, patches = self._patches(images)
        kept = self._check(masked, patches) if kept is None else kept
        _, hidden = split_index(masked, kept)
        prediction = self._predict(patches, masked, kept, grid, wanted=hidden)  # (B, N − K, P·P·C)
        return _squared_error(prediction, self.target(take(patches, hidden))).mean()

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder should predict for patches (B, N, P·P·C): float32, same shape."""
        patches = patches.float()
        return patches if self.config.target == "pixels" else normalise_patches(patches).patches

    def _predict(self, patches: Tensor, masked: Tensor, kept: int, grid: Size, wanted: Tensor | None = None) -> Tensor:
        """Figure 1, from left to right: patches (B, N, P·P·C) to predictions of all or of the ``wanted`` ones."""
        encoder, decoder = self.encoder, self.decoder
        visible, hidden = split_index(masked, kept)
        positions = encoder.position_table(grid)
        if self.config.mask_tokens == "encoder":
            tokens = torch.where(masked[:, :, None], self.mask_token, encoder.patch_embed(patches))
            tokens = encoder.encode(encoder.with_cls(tokens + positions[:, 1:], positions))
            return decoder(decoder.embed(encoder.norm(tokens)), grid, wanted)

        tokens = encoder.patch_embed(take(patches, visible))  # (B, K, D)
        tokens = tokens + take(positions[:, 1:].expand(len(tokens), -1, -1), visible)
        tokens = encoder.norm(encoder.encode(encoder.with_cls(tokens, positions)))  # (B, K + 1, D)

        tokens = decoder.embed(tokens)  # (B, K + 1, decoder width)
        cls, seen = tokens[:, :1], tokens[:, 1:]
        unseen = decoder.mask_token.to(seen.dtype).expand(len(seen), hidden.shape[1], -1)
        order = torch.cat([visible, hidden], dim=1).argsort(dim=1)
        everything = take(torch.cat([seen, unseen], dim=1), order)  # (B, N, decoder width), spatial order
        return decoder(torch.cat([cls, everything], dim=1), grid, wanted)

    def _patches(self, images: Tensor) -> tuple[Size, Tensor]:
        self.encoder.check_channels(images)
        size = self.config.encoder.patch_size
        return grid_size(images.shape[2], images.shape[3], size), patchify(images, size)

    @staticmethod
    def _seeds(seeds: Tensor | list[int] | None, images: Tensor) -> Tensor:
        if seeds is None:
            return torch.arange(len(images), device=images.device)
        seeds = torch.as_tensor(seeds, dtype=torch.int64, device=images.device)
        if seeds.shape != (len(images),):
            raise UsageError(f"seeds must be {len(images)} ints, one an image, not of shape {tuple(seeds.shape)}")
        return seeds

    @staticmethod
    def _check(masked: Tensor, patches: Tensor) -> int:
        if masked.dtype != torch.bool or masked.shape != patches.shape[:2]:
            raise UsageError(
                f"masked must be bool of shape {tuple(patches.shape[:2])} (images, patches), True where hidden, "
                f"not {masked.dtype} of {tuple(masked.shape)}"
            )
        return visible_count(masked)


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the values of each patch, float32: (B, M)."""
    return (prediction.float() - target).square().mean(dim=-1)


def _mean_over_hidden(error: Tensor, masked: Tensor) -> Tensor:
    return (error * masked).sum() / masked.sum()
