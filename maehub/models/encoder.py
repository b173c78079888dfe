"""The encoder: a Vision Transformer (Dosovitskiy et al. 2020) as MAE trains it (He et al. 2021, section 3).

Pre-norm blocks, exact GELU, LayerNorm with eps 1e-6, no dropout, a learned class token. Parameter names equal those of
the published files, so official and timm weights need no renaming.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maehub.errors import UsageError
from maehub.images import LARGEST_PATCH, Preprocess, Size, as_size, grid_size
from maehub.models.devices import FullPrecision
from maehub.models.patches import patchify
from maehub.models.positions import ResizeRule, resize_table, sincos_table, with_cls_row


@dataclass(frozen=True)
class Origin:
    """Where weights come from; written into what is made with them. Unknown fields are empty."""

    name: str
    revision: str = ""
    sha256: str = ""
    licence: str = ""


Pool = Literal["cls", "mean"]
"""How a forward pools: the class token after ``norm``, or the mean of the patch tokens before ``fc_norm``."""

FeaturePool = Literal["cls", "mean", "cls+mean", "tokens", "map"]
"""What `Encoder.features` can give."""

LAYER_NORM_EPS = 1e-6

BOUNDS = {
    "patch_size": (1, LARGEST_PATCH),
    "channels": (1, 4096),
    **dict.fromkeys(("width", "decoder_width"), (1, 16_384)),
    **dict.fromkeys(("depth", "decoder_depth"), (0, 512)),
    **dict.fromkeys(("heads", "decoder_heads"), (1, 1024)),
    **dict.fromkeys(("classes", "outputs"), (0, 500_000)),
}
"""The least and the most of a network, several times what was ever published: a file that says more is hostile."""


def check_bounds(config: object) -> None:
    """Refuse whole numbers of a configuration that are none or past their `BOUNDS`."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(config, name, least)
        if type(value) is not int or not least <= value <= most:
            raise UsageError(f"{name} must be an int of at least {least} and at most {most:,}, not {value!r:.60}")


@dataclass(frozen=True)
class EncoderConfig:
    """The network of an `Encoder`; saved beside its weights.

    ``image_size`` (height, width; one int means a square) is the native size that the position table is stored for,
    in pixels. ``classes`` = 0 means no head. ``positions`` says how the table is resized for other sizes.
    ``class_names`` are those of the classes, if they are known; with ``multi_label`` a picture may have several, so
    logits are for a sigmoid each instead of one softmax; with ``numeric`` outputs are numbers, which they name.
    """

    image_size: int | Size = 224
    patch_size: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    classes: int = 0
    pool: Pool = "cls"
    positions: ResizeRule = "bicubic"
    class_names: tuple[str, ...] = ()
    multi_label: bool = False
    numeric: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size, "image_size"))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        check_bounds(self)
        if self.width % self.heads:
            raise UsageError(f"width={self.width} is not divisible by heads={self.heads}")
        if self.width % 4:
            raise UsageError(f"width={self.width} is not divisible by 4, which the sine-cosine positions need")
        if isinstance(self.mlp_ratio, bool) or not 1 / self.width <= self.mlp_ratio <= 256:
            raise UsageError(f"mlp_ratio must be from 1 / width to 256, not {self.mlp_ratio}")
        if self.pool not in get_args(Pool):
            raise UsageError(f"pool={self.pool!r} is not one of {', '.join(get_args(Pool))}")
        if self.positions not in get_args(ResizeRule):
            raise UsageError(f"positions={self.positions!r} is not one of {', '.join(get_args(ResizeRule))}")
        if math.prod(grid_size(*self.size, self.patch_size)) > 2**20:
            raise UsageError(f"{self.size} pixels are more than {2**20:,} patches of {self.patch_size}")
        if self.class_names and (
            len(self.class_names) != self.classes or not all(isinstance(name, str) for name in self.class_names)
        ):
            raise UsageError(f"class_names must be {self.classes} strings, one a class, not {len(self.class_names)}")
        kinds = self.multi_label, self.numeric
        if not all(isinstance(kind, bool) for kind in kinds) or all(kinds):
            raise UsageError("multi_label and numeric must be bools, one true at most, not {!r}, {!r}".format(*kinds))

    @property
    def size(self) -> Size:
        """(height, width) of the native image, pixels."""
        return as_size(self.image_size)

    @property
    def grid(self) -> Size:
        """(rows, columns) of patches at the native size."""
        return grid_size(*self.size, self.patch_size)


PRESETS = {
    # He et al. 2021, section 4 and Dosovitskiy et al. 2020, table 1: B, L, H
    "vit-b": EncoderConfig(224, 16, 3, 768, 12, 12),
    "vit-l": EncoderConfig(224, 16, 3, 1024, 24, 16),
    "vit-h": EncoderConfig(224, 14, 3, 1280, 32, 16),
    # Touvron et al. 2020 (DeiT), table 1: Ti, S
    "vit-s": EncoderConfig(224, 16, 3, 384, 12, 6),
    "vit-ti": EncoderConfig(224, 16, 3, 192, 12, 3),
    # ours: the embedded model
    "vit-nano": EncoderConfig(96, 8, 3, 192, 5, 6),
}


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Attend from every token, or only from some.

        Args:
            x: (B, T, D), normalised tokens.
            queries: (B, M, D), the tokens that ask; None means all of ``x``.

        Returns:
            (B, T, D), or (B, M, D).
        """
        if queries is None:
            query, key, value = self._heads(self.qkv(x), 3)  # (B, heads, T, D/heads) each
        else:
            width = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias  # (3·D, D) and (3·D,)
            (query,) = self._heads(F.linear(queries, weight[:width], bias[:width]), 1)  # (B, heads, M, D/heads)
            key, value = self._heads(F.linear(x, weight[width:], bias[width:]), 2)  # (B, heads, T, D/heads) each
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, T or M, D/heads)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """The attention probabilities, (B, heads, T, T), rows sum to 1."""
        query, key, _ = self._heads(self.qkv(x), 3)
        return (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, T, parts·D) to ``parts`` tensors of (B, heads, T, D/heads)."""
        batch, tokens, _ = projected.shape
        return projected.reshape(batch, tokens, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block: (B, T, D) to (B, T, D).

    ``drop_path`` is applied to each branch before it is added; a training loop may put stochastic depth there.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, x: Tensor, query_index: Tensor | None = None) -> Tensor:
        """Run the block; with ``query_index`` (B, M) int64 only those tokens leave it, and all are attended to."""
        normed = self.norm1(x)
        if query_index is None:
            x = x + self.drop_path(self.attn(normed))
        else:
            x = take(x, query_index) + self.drop_path(self.attn(normed, take(normed, query_index)))  # (B, M, D)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One linear map from the pixels of a patch to a token, stored as the published convolution ``proj``."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, P·P·C) from `patchify` to (B, N, D)."""
        # The kernel runs channel, row, column and a patch runs row, column, channel. Multiplying patches lets the
        # visible ones be embedded alone.
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of each sequence: (B, T, D) and (B, M) int64 to (B, M, D)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


class Encoder(nn.Module):
    """A Vision Transformer for features, and with a head a classifier.

    ``config`` is its `EncoderConfig`, ``preprocess`` the `Preprocess` that turns a picture into its input, and
    ``origin`` says where the weights come from, None for fresh ones.
    """

    origin: Origin | None = None

    def __init__(self, config: EncoderConfig, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.config = config
        self.preprocess = preprocess or Preprocess.evaluation(config.size, config.channels, config.patch_size)
        self.patch_embed = PatchEmbed(config.patch_size, config.channels, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(with_cls_row(sincos_table(config.width, config.grid)), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        if config.pool == "mean":
            self.fc_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        else:
            self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        if config.classes:
            self.head = (FullPrecision if config.numeric else nn.Linear)(config.width, config.classes)
        initialise(self, self.cls_token)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) if there is a head, else the feature (B, D) of ``config.pool``.

        Args:
            images: (B, C, H, W), the dtype of the weights, preprocessed; H and W divisible by the patch.
        """
        feature = self.features(images)
        return self.head(feature) if self.config.classes else feature

    def features(
        self,
        images: Tensor,
        *,
        pool: FeaturePool | None = None,
        layers: Sequence[int] | None = None,
        norm: bool = True,
    ) -> Tensor:
        """Features of every patch, unmasked, in spatial order, deterministic.

        Args:
            images: (B, C, H, W), the dtype of the weights, preprocessed; H and W divisible by the patch.
            pool: ``"cls"``, ``"mean"`` (patch tokens only), ``"cls+mean"``, ``"tokens"`` or ``"map"``; None is the
                pooling that the weights were trained with.
            layers: blocks whose outputs to take, 0 the first, −1 the last; None gives the last block's alone.
            norm: apply the final LayerNorm. A model trained on the class token normalises tokens and then pools; one
                trained on the mean (``fc_norm``) pools and then normalises, as it was trained.

        Returns:
            (B, D), (B, D), (B, 2·D), (B, N, D) or (B, D, H/P, W/P), in the order of the names above; with ``layers``
            a dimension after the first: (B, layers, …).
        """
        pool = pool or self.config.pool
        if pool not in get_args(FeaturePool):
            raise UsageError(f"pool={pool!r} is not one of {', '.join(get_args(FeaturePool))}")
        if pool in ("cls", "cls+mean") and self.config.pool == "mean":
            warnings.warn(
                "the class token of a model that was trained on the mean of its patches is not a trained feature; "
                "pool='mean' is",
                stacklevel=2,
            )
        grid = grid_size(images.shape[2], images.shape[3], self.config.patch_size)
        if layers is None:
            return self._pooled(self.encode(self.embed(images)), pool, norm, grid)
        depth = self.config.depth
        if not layers or any(not -depth <= layer < depth for layer in layers):
            raise UsageError(f"layers={list(layers)} must name blocks from {-depth} to {depth - 1} of {depth}")
        numbers = [layer % depth for layer in layers]
        tokens = self.embed(images)  # (B, N + 1, D)
        outputs = {}
        for number, block in enumerate(self.blocks[: max(numbers) + 1]):
            tokens = block(tokens)
            if number in numbers:
                outputs[number] = self._pooled(tokens, pool, norm, grid)
        return torch.stack([outputs[number] for number in numbers], dim=1)  # (B, layers, …)

    def attention(self, images: Tensor, *, layer: int = -1) -> Tensor:
        """Attention probabilities of one block: (B, heads, N + 1, N + 1); row and column 0 are the class token."""
        depth = self.config.depth
        if not -depth <= layer < depth:
            raise UsageError(f"layer={layer} must name a block from {-depth} to {depth - 1} of {depth}")
        tokens = self.embed(images)  # (B, N + 1, D)
        *before, last = self.blocks[: layer % depth + 1]
        for block in before:
            tokens = block(tokens)
        assert isinstance(last, Block)
        return last.attn.weights(last.norm1(tokens))

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N + 1, D) with positions, the class token first."""
        self.check_channels(images)
        patches = patchify(images, self.config.patch_size)  # (B, N, P·P·C)
        positions = self.position_table(grid_size(images.shape[2], images.shape[3], self.config.patch_size))
        tokens = self.patch_embed(patches) + positions[:, 1:]  # (B, N, D)
        return self.with_cls(tokens, positions)

    def with_cls(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Put the class token and its position in front: (B, T, D) to (B, T + 1, D)."""
        cls = (self.cls_token + positions[:, :1]).expand(tokens.shape[0], -1, -1)  # (B, 1, D)
        return torch.cat([cls, tokens], dim=1)

    def encode(self, tokens: Tensor) -> Tensor:
        """All blocks: (B, T, D) to (B, T, D), before the final norm."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def position_table(self, grid: Size) -> Tensor:
        """The positions for a grid, (1, N + 1, D): the stored table, resized where the grid is not the native one."""
        return resize_table(self.pos_embed, self.config.grid, grid, self.config.positions)

    def check_channels(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.config.channels:
            raise UsageError(
                f"images must be (B, {self.config.channels}, H, W), not {tuple(images.shape)}; "
                "load(..., channels=) adapts a model to another number of channels"
            )

    @property
    def final_norm(self) -> nn.LayerNorm:
        """``norm``, or ``fc_norm`` in a model that was trained on the mean."""
        return self.fc_norm if self.config.pool == "mean" else self.norm

    def _pooled(self, tokens: Tensor, pool: FeaturePool, norm: bool, grid: Size) -> Tensor:
        """The last step of `features`: (B, N + 1, D) to what ``pool`` names."""
        finish = self.final_norm if norm else nn.Identity()
        pools_first = self.config.pool == "mean" and pool in ("mean", "cls+mean")
        if not pools_first:
            tokens = finish(tokens)
        cls, patches = tokens[:, 0], tokens[:, 1:]  # (B, D), (B, N, D)
        if pool == "cls":
            return cls
        if pool == "tokens":
            return patches
        if pool == "map":
            return patches.transpose(1, 2).reshape(patches.shape[0], -1, *grid)  # (B, D, rows, columns)
        mean = patches.mean(dim=1)  # (B, D)
        if pools_first:
            cls, mean = finish(cls), finish(mean)
        return mean if pool == "mean" else torch.cat([cls, mean], dim=1)

    def resized(self, image_size: int | Size) -> Self:
        """This encoder with its position table stored for another native size; the weights are shared."""
        config = replace(self.config, image_size=image_size)
        with torch.device("meta"):
            other = type(self)(config, self.preprocess.with_size(config.size))
        state = self.state_dict()
        state["pos_embed"] = self.position_table(config.grid)
        other.load_state_dict(state, assign=True)
        other.origin = self.origin
        return other.train(self.training)


def initialise(module: nn.Module, token: Tensor) -> None:
    """The published initialisation: Xavier-uniform linear maps, zero biases, LayerNorms at one and zero.

    The fused qkv matrix and the flattened patch kernel each count as one matrix; the bias of the patch kernel keeps
    torch's default. The class or mask token is normal, with a standard deviation of 0.02; on the meta device it stays
    as it is: a file's values follow.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.view(len(part.proj.weight), -1))
    if not token.is_meta:  # where normal_ would make torch load a second's worth of modules
        nn.init.normal_(token, std=0.02)
