"""The masked autoencoder of He et al. 2021, figure 1.

image ─ patchify ─┬─ visible patches ─ encoder ──┐
                  │                              ├─ tokens of every patch ─ decoder ─ pixels of every patch
                  └─ hidden patches ─ mask token ┘                                       │
                        └───────────────────────────── target ──────────────── loss on hidden patches
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from maehub.errors import UsageError
from maehub.images import Preprocess, Size, grid_size
from maehub.models.colours import COLOURS
from maehub.models.encoder import LAYER_NORM_EPS, Block, Encoder, EncoderConfig, check_bounds, initialise, take
from maehub.models.masking import kept_count, random_masks, split_index, visible_count
from maehub.models.patches import normalise_patches, patchify
from maehub.models.positions import resize_table, sincos_table, with_cls_row

Target = Literal["pixels", "normalised_pixels", "pca", "tokens", "unknown"]
"""What the decoder was trained to predict (table 1d); ``unknown`` where a file does not say.

``pca`` are coefficients of a patch's preprocessed pixels, ``tokens`` the logits of a tokenizer's tokens.
"""

Tokenizer = Literal["", "mean-colour"]
"""Whose tokens: those of a tokenizer of the caller's, or `maehub.models.colours`."""

_OF_PIXELS = ("pixels", "normalised_pixels")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The network of a `MaskedAutoencoder`; saved beside its weights.

    ``mask_tokens="encoder"`` is the ablation of table 1c: the encoder sees mask tokens too. ``decoder_depth=0`` then
    leaves one linear map from the encoder's tokens; the width and heads of the decoder mean nothing. ``outputs`` is how
    many values are predicted for one patch: coefficients of ``pca``, different ``tokens``; of pixels always P·P·C, for
    which 0 stands.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    target: Target = "normalised_pixels"
    mask_tokens: Literal["decoder", "encoder"] = "decoder"
    outputs: int = 0
    tokenizer: Tokenizer = ""

    def __post_init__(self) -> None:
        if self.encoder.pool != "cls" or self.encoder.classes:
            raise UsageError("the encoder of an autoencoder has no head and ends in norm: classes=0 and pool='cls'")
        check_bounds(self)
        if self.decoder_width % self.decoder_heads:
            raise UsageError(f"decoder_width={self.decoder_width} is not divisible by {self.decoder_heads} heads")
        if self.decoder_width % 4:
            raise UsageError(f"decoder_width={self.decoder_width} is not divisible by 4")
        if self.target not in get_args(Target):
            raise UsageError(f"target={self.target!r} is not one of {', '.join(get_args(Target))}")
        if self.mask_tokens not in ("decoder", "encoder"):
            raise UsageError(f"mask_tokens={self.mask_tokens!r} is not one of decoder, encoder")
        if self.decoder_depth == 0 and self.mask_tokens == "decoder":
            raise UsageError(
                "decoder_depth=0 is a linear head on the encoder, which must see the mask tokens: "
                "say mask_tokens='encoder', or a depth of at least 1"
            )
        outputs, pixels = self.outputs, self.patch_values
        if self.target in ("pca", "tokens"):
            if not outputs:
                raise UsageError(f"target={self.target!r} needs outputs, how many values are predicted for one patch")
        elif outputs not in (0, pixels):
            raise UsageError(f"outputs={outputs} does not fit target={self.target!r}, of {pixels} values a patch")
        else:
            object.__setattr__(self, "outputs", 0)
        if self.target == "pca" and outputs > pixels:
            raise UsageError(f"a patch of {pixels} values has no {outputs} components; outputs must be at most that")
        if self.tokenizer not in get_args(Tokenizer):
            raise UsageError(f"tokenizer={self.tokenizer!r} is not '' (the caller's) or 'mean-colour'")
        if self.tokenizer and self.target != "tokens":
            raise UsageError(f"tokenizer={self.tokenizer!r} belongs to target='tokens', not {self.target!r}")
        if self.tokenizer == "mean-colour" and outputs != COLOURS.get(self.encoder.channels):
            raise UsageError(
                f"mean colours are 8 tokens for 1 channel and 512 for 3, not outputs={outputs} for "
                f"{self.encoder.channels}"
            )

    @property
    def patch_values(self) -> int:
        """Values of one patch of the picture: P·P·C."""
        return self.encoder.patch_size**2 * self.encoder.channels

    @property
    def prediction_width(self) -> int:
        """Values predicted for one patch: ``outputs``, of pixels P·P·C."""
        return self.outputs or self.patch_values

    @property
    def has_picture(self) -> bool:
        """Whether a prediction can be drawn."""
        return self.target != "unknown" and (self.target != "tokens" or self.tokenizer != "")


class Output(NamedTuple):
    """What a forward of the autoencoder gives."""

    loss: Tensor  # () float32
    prediction: Tensor  # (B, N, outputs), every patch
    masked: Tensor  # (B, N) bool, True where hidden


class Decoder(nn.Module):
    """A small transformer from the encoder's tokens to what is predicted of every patch; of depth 0 its head alone."""

    # of the target pca; NaN until they are fitted, so that nobody trains without
    centre: Tensor  # (P·P·C,)
    components: Tensor  # (outputs, P·P·C), orthonormal rows

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        encoder, depth = config.encoder, config.decoder_depth
        width = config.decoder_width if depth else encoder.width
        self.embed = nn.Linear(encoder.width, width) if depth else nn.Identity()
        if config.mask_tokens == "decoder":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        if depth:
            self.pos_embed = nn.Parameter(with_cls_row(sincos_table(width, encoder.grid)), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.decoder_heads, encoder.mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if depth else nn.Identity()
        self.pred = nn.Linear(width, config.prediction_width)
        if config.target == "pca":
            self.register_buffer("centre", torch.full((config.patch_values,), torch.nan))
            self.register_buffer("components", torch.full((config.outputs, config.patch_values), torch.nan))

    def forward(
        self, tokens: Tensor, grid: Size, query_index: Tensor | None = None, token_index: Tensor | None = None
    ) -> Tensor:
        """Predict patches.

        Args:
            tokens: (B, N + 1, D/dec), class token first, spatial order, without positions.
            grid: (rows, columns) of the N patches.
            query_index: (B, M) int64 patches to predict; None means all. The last block and the head run on these
                alone.
            token_index: (B, T) int64 patches that take part, the queries last; None means all.

        Returns:
            (B, N or M, outputs).
        """
        native, x = self.config.encoder, tokens
        if self.blocks:
            x = x + resize_table(self.pos_embed, native.grid, grid, native.positions)
        if query_index is not None and token_index is not None:
            x = torch.cat([x[:, :1], take(x, token_index + 1)], dim=1)  # (B, T + 1, D/dec)
            count = token_index.shape[1]
            query_index = torch.arange(count - query_index.shape[1], count, device=x.device).expand_as(query_index)
        if query_index is None:
            for block in self.blocks:
                x = block(x)
            x = x[:, 1:]  # (B, N, D/dec): the class token has no pixels
        elif self.blocks:
            *before, last = self.blocks
            for block in before:
                x = block(x)
            x = last(x, query_index + 1)  # (B, M, D/dec)
        else:
            x = take(x, query_index + 1)  # (B, M, D/dec)
        return self.pred(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder, trained to paint in what is hidden."""

    def __init__(self, config: AutoencoderConfig, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, preprocess)
        self.decoder = Decoder(config)
        if config.mask_tokens == "encoder":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.encoder.width))
        initialise(self.decoder, self.mask_token if config.mask_tokens == "encoder" else self.decoder.mask_token)

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
            `Output`; its loss is NaN unless the target is pixels, normalised or not.
        """
        grid, patches = self._patchify(images)  # (B, N, P·P·C)
        if masked is None:
            if seeds is None:
                seeds = torch.arange(len(images), device=images.device)
            seeds = torch.as_tensor(seeds, dtype=torch.int64, device=images.device)
            if seeds.shape != (len(images),):
                raise UsageError(f"seeds must be {len(images)} ints, one an image, not of shape {tuple(seeds.shape)}")
            kept = kept_count(patches.shape[1], mask_ratio)
            masked = random_masks(seeds, patches.shape[1], kept)  # (B, N)
        else:
            self._check_masks(masked, patches)
            kept = visible_count(masked)
        prediction = self._predict(patches, masked, kept, grid)  # (B, N, outputs)
        if self.config.target in _OF_PIXELS:
            error = squared_error(prediction, self.target(patches))  # (B, N)
            loss = (error * masked).sum() / masked.sum()
        else:
            loss = torch.full((), torch.nan, device=images.device)
        return Output(loss, prediction, masked)

    def _predict(
        self,
        patches: Tensor,
        masked: Tensor,
        kept: int,
        grid: Size,
        query_index: Tensor | None = None,
        token_index: Tensor | None = None,
    ) -> Tensor:
        """Figure 1, from left to right: patches (B, N, P·P·C) to predictions of all (B, N, outputs) or of M queries.

        ``query_index`` and ``token_index`` are those of `Decoder.forward`.
        """
        encoder, decoder = self.encoder, self.decoder
        positions = encoder.position_table(grid)  # (1, N + 1, D)
        if self.config.mask_tokens == "encoder":  # the ablation of table 1c
            tokens = torch.where(masked[:, :, None], self.mask_token, encoder.patch_embed(patches))  # (B, N, D)
            tokens = encoder.with_cls(tokens + positions[:, 1:], positions)  # (B, N + 1, D)
            tokens = decoder.embed(encoder.norm(encoder.encode(tokens)))  # (B, N + 1, D/dec)
            return decoder(tokens, grid, query_index, token_index)

        # The encoder sees the visible patches alone.
        visible, hidden = split_index(masked, kept)  # (B, K), (B, N − K)
        tokens = encoder.patch_embed(take(patches, visible))  # (B, K, D)
        tokens = tokens + take(positions[:, 1:].expand(len(tokens), -1, -1), visible)
        tokens = encoder.with_cls(tokens, positions)  # (B, K + 1, D)
        tokens = decoder.embed(encoder.norm(encoder.encode(tokens)))  # (B, K + 1, D/dec)

        # Mask tokens stand for the hidden ones, and every patch goes back to its place.
        cls, seen = tokens[:, :1], tokens[:, 1:]
        unseen = decoder.mask_token.to(seen.dtype).expand(len(seen), hidden.shape[1], -1)  # (B, N − K, D/dec)
        order = torch.cat([visible, hidden], dim=1).argsort(dim=1)
        everything = take(torch.cat([seen, unseen], dim=1), order)  # (B, N, D/dec), spatial order
        return decoder(torch.cat([cls, everything], dim=1), grid, query_index, token_index)

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

        Raises:
            UsageError: the target is not pixels, normalised or not.
        """
        if self.config.target == "unknown":
            raise UsageError(
                "what this autoencoder was trained to predict is unknown, so it has no loss; "
                "say it: load_autoencoder(..., target='pixels') or target='normalised_pixels'"
            )
        if self.config.target not in _OF_PIXELS:
            raise UsageError(
                f"the loss of target={self.config.target!r} is a matter of training: maehub.train.pretraining.Objective"
                " computes it"
            )
        grid, patches = self._patchify(images)  # (B, N, P·P·C)
        if kept is None:
            self._check_masks(masked, patches)
            kept = visible_count(masked)
        _, hidden = split_index(masked, kept)  # (B, N − K)
        prediction = self._predict(patches, masked, kept, grid, query_index=hidden)  # (B, N − K, P·P·C)
        return squared_error(prediction, self.target(take(patches, hidden))).mean()

    def predict(
        self,
        images: Tensor,
        masked: Tensor,
        *,
        kept: int | None = None,
        wanted: Tensor | None = None,
        leave_out: bool = False,
    ) -> Tensor:
        """Predict some patches, or all, computing only what that needs.

        Args:
            images: (B, C, H, W) floating, preprocessed.
            masked: (B, N) bool, True where hidden, each row keeping the same number. With mask tokens in the encoder
                rows may differ, unless ``leave_out``.
            kept: that number, where the caller knows it; None counts and checks, which waits for the device, where the
                number matters.
            wanted: (B, M) int64, the patches to predict, in any order; None means all.
            leave_out: leave hidden patches that are not wanted out of the decoder: it runs on the visible and the
                wanted ones alone, all of which must be hidden.

        Returns:
            (B, M or N, outputs).
        """
        grid, patches = self._patchify(images)  # (B, N, P·P·C)
        self._check_masks(masked, patches)
        if wanted is not None and (wanted.dtype != torch.int64 or wanted.ndim != 2 or len(wanted) != len(images)):
            raise UsageError(
                f"wanted must be int64 of shape ({len(images)}, M), patches of each image, not {wanted.dtype} of "
                f"{tuple(wanted.shape)}"
            )
        token_index = None
        if leave_out:
            if wanted is None:
                raise UsageError("leave_out=True leaves out what is not wanted, so it needs wanted")
            if kept is None and not masked.gather(1, wanted).all():
                raise UsageError(
                    "leave_out=True predicts hidden patches alone, and some of the wanted ones are visible"
                )
            kept = visible_count(masked) if kept is None else kept
            visible, _ = split_index(masked, kept)  # (B, K)
            token_index = torch.cat([visible, wanted], dim=1)  # (B, K + M)
        elif kept is None and self.config.mask_tokens == "decoder":
            kept = visible_count(masked)
        return self._predict(patches, masked, kept or 0, grid, wanted, token_index)

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder should predict for patches (B, N, P·P·C): (B, N, outputs) float32.

        Raises:
            UsageError: of tokens, which their tokenizer makes from pictures, and of an unknown target.
        """
        patches = patches.float()
        if self.config.target == "pixels":
            return patches
        if self.config.target == "normalised_pixels":
            return normalise_patches(patches).patches
        if self.config.target == "pca":
            # No autocast, which would make products half precision; the meta device has none to switch off.
            device = patches.device.type
            with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
                return (patches - self.decoder.centre.float()) @ self.decoder.components.float().T
        raise UsageError(f"target={self.config.target!r} is no function of a patch's pixels alone")

    def _patchify(self, images: Tensor) -> tuple[Size, Tensor]:
        """The grid, and the patches (B, N, P·P·C)."""
        self.encoder.check_channels(images)
        size = self.config.encoder.patch_size
        return grid_size(images.shape[2], images.shape[3], size), patchify(images, size)

    @staticmethod
    def _check_masks(masked: Tensor, patches: Tensor) -> None:
        if masked.dtype != torch.bool or masked.shape != patches.shape[:2]:
            raise UsageError(
                f"masked must be bool of shape {tuple(patches.shape[:2])} (images, patches), True where hidden, "
                f"not {masked.dtype} of {tuple(masked.shape)}"
            )


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the values of each patch, float32: (B, M)."""
    return (prediction.float() - target).square().mean(dim=-1)
