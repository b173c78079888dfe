"""An encoder for maps: windows, relative positions and layer scale in the blocks of one that was pretrained without.

    tokens ─ norm ─ attention ─ ×γ₁ ─(+)─ norm ─ MLP ─ ×γ₂ ─(+)
                        └ windows, and what is added to the logits:

    table       one number a head for each offset between two patches, and three for the class token's pairs: BEiT
                (Bao et al. 2021, arXiv 2106.08254), and the segmentation of MAE, which also scales its branches
    decomposed  q·R_h + q·R_w, a vector for each offset of rows and of columns, q unscaled: ViTDet (Li et al. 2022,
                arXiv 2203.16527), which has no class token and sees windows in all blocks but a few

Everything that is added begins as nothing: tables at 0, γ at 1.
"""

from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maehub.errors import UsageError
from maehub.images import Size, grid_size
from maehub.models import Attention, Block, Encoder, FeaturePool

Relative = Literal["none", "decomposed", "table"]

_ADDED = ("table", "rel_pos_h", "rel_pos_w", "gamma_1", "gamma_2")
_ALIGNED = 8  # numbers of a head's vectors; efficient kernels take multiples alone


@dataclass(frozen=True)
class AttentionConfig:
    """How blocks attend; without arguments as they were pretrained.

    ``window``: patches of a window's side, None for attention to everything; ``whole`` are the blocks that see
    everything nevertheless. ``relative`` are the relative positions. With ``cls`` the class token takes part, which
    `table` needs and windows and `decomposed` exclude.
    """

    window: int | None = None
    whole: tuple[int, ...] = ()
    relative: Relative = "none"
    layer_scale: bool = False
    cls: bool = True

    def __post_init__(self) -> None:
        whole = self.whole if self.window is None else (*self.whole, self.window)
        if any(type(number) is not int or number < 0 for number in whole) or self.window == 0:
            raise UsageError(f"a window {self.window!r} and blocks {self.whole!r} must be whole numbers, not negative")
        if self.relative not in get_args(Relative):
            raise UsageError(f"{self.relative!r} is none of {', '.join(get_args(Relative))}")
        if not isinstance(self.layer_scale, bool) or not isinstance(self.cls, bool):
            raise UsageError("layer_scale and cls are bools")
        if self.whole and self.window is None:
            raise UsageError("whole names blocks without windows, and without window no block has any")
        if self.cls and (self.window or self.relative == "decomposed"):
            raise UsageError("windows and decomposed positions have no place for a class token: cls must be False")
        if self.relative == "table" and not self.cls:
            raise UsageError("tables of relative positions have rows for the class token, so it must take part")


class DenseEncoder(Encoder):
    """An encoder whose blocks attend in another way; weights are those of the encoder that it is made of, not copies.

    It is an `Encoder` wherever one is taken (`FeaturePyramid` too), and trains in its place; `plain` is what to save.
    Beside its parameters it has ``blocks.N.attn.table`` ((2h−1)·(2w−1) + 3, heads), or ``blocks.N.attn.rel_pos_h`` and
    ``…rel_pos_w`` (2S−1, D/heads), S being a window's side, or a side of the native grid in blocks without windows; and
    ``blocks.N.gamma_1`` and ``…gamma_2`` (D,).

    Images may have other sizes than the native one, as in any encoder, unless there is a `table`. A window beyond the
    edges sees zeros, of which keys and values are made too, as published.
    """

    def __init__(self, encoder: Encoder, config: AttentionConfig) -> None:
        nn.Module.__init__(self)
        if isinstance(encoder, DenseEncoder) or any(number >= encoder.config.depth for number in config.whole):
            raise UsageError(
                f"it takes an Encoder, and blocks {config.whole} of the {encoder.config.depth} of that one"
            )
        self.config, self.preprocess, self.origin = encoder.config, encoder.preprocess, encoder.origin
        self.attending = config
        for name, parameter in encoder.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, part in encoder.named_children():
            self.add_module(name, part)
        self.blocks = nn.ModuleList()
        for number, block in enumerate(encoder.blocks):
            assert isinstance(block, Block)
            attn = block.attn
            if config.relative == "table":
                attn = TableAttention(attn, encoder.config.grid)
            elif not config.cls:
                window = None if number in config.whole else config.window
                sides = encoder.config.grid if window is None else (window, window)
                attn = GridAttention(attn, window, sides if config.relative == "decomposed" else None)
            self.blocks.append(DenseBlock(block, attn, layer_scale=config.layer_scale))
        self.train(encoder.training)

    def maps(self, images: Tensor, layers: tuple[int, ...], *, normed: bool) -> list[Tensor]:
        """(B, D, H/P, W/P) for each of ``layers``, blocks from 0 or −1; ``normed`` through the final norm.

        Images are (B, C, H, W), the dtype of the weights, preprocessed.

        Raises:
            UsageError: H or W is not divisible by the patch, or not the native one where there is a table.
        """
        return list(self.features(images, pool="map", layers=layers, norm=normed).unbind(1))

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N + 1, D), or (B, H/P, W/P, D) where there is no class token."""
        tokens, patch = super().embed(images), self.config.patch_size
        grid = grid_size(images.shape[2], images.shape[3], patch)
        if self.attending.relative == "table" and grid != self.config.grid:
            raise UsageError(f"a table of relative positions is for {self.config.size} pixels, not {images.shape[2:]}")
        return tokens if self.attending.cls else tokens[:, 1:].unflatten(1, grid)

    def added(self) -> dict[str, Tensor]:
        """Of the state those tensors that the encoder did not have, by their names."""
        return {name: value for name, value in self.state_dict().items() if name.rpartition(".")[2] in _ADDED}

    def plain(self) -> Encoder:
        """An encoder without what was added, which shares its weights: what it can be saved as."""
        with torch.device("meta"):
            other = Encoder(self.config, self.preprocess)
        added = self.added()
        state = {name: value for name, value in self.state_dict().items() if name not in added}
        other.load_state_dict(state, assign=True)
        other.origin = self.origin
        return other.train(self.training)

    def resized(self, image_size: int | Size) -> NoReturn:
        """Refused: tables are of one grid. Resize an encoder before this is made of it."""
        raise UsageError(f"resize the encoder to {image_size}, and then make a DenseEncoder of it")

    def _pooled(self, tokens: Tensor, pool: FeaturePool, norm: bool, grid: Size) -> Tensor:
        if not self.attending.cls:
            if pool in ("cls", "cls+mean"):
                raise UsageError(f"without a class token there is no {pool}; the mean, tokens and maps need none")
            tokens = F.pad(tokens.flatten(1, 2), (0, 0, 1, 0))  # where the class token would be
        return super()._pooled(tokens, pool, norm, grid)


def plain(encoder: Encoder) -> Encoder:
    """The encoder as it was pretrained, which timm knows too."""
    return encoder.plain() if isinstance(encoder, DenseEncoder) else encoder


def attending(encoder: Encoder, config: AttentionConfig) -> Encoder:
    """The encoder with blocks that attend so."""
    return plain(encoder) if config == AttentionConfig() else DenseEncoder(plain(encoder), config)


class DenseBlock(Block):
    """A block with another attention, and with layer scale: (B, T, D) or (B, h, w, D) to the same."""

    def __init__(self, block: Block, attn: Attention, *, layer_scale: bool) -> None:
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.attn = attn
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if layer_scale:
            weight = block.norm1.weight
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones_like(weight)) for _ in range(2))

    def forward(self, x: Tensor, query_index: Tensor | None = None) -> Tensor:
        if self.gamma_1 is None or self.gamma_2 is None:
            return super().forward(x, query_index)
        assert query_index is None
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class _Placed(Attention):
    """Attention with the projections of another, that knows places."""

    def __init__(self, attn: Attention) -> None:
        nn.Module.__init__(self)
        self.heads, self.qkv, self.proj = attn.heads, attn.qkv, attn.proj

    def weights(self, x: Tensor) -> NoReturn:
        raise UsageError("attention maps are those of an encoder as it was pretrained; see DenseEncoder.plain")


class TableAttention(_Placed):
    """With a bias for each offset: (B, N + 1, D) to the same, patches of one grid behind the class token."""

    def __init__(self, attn: Attention, grid: Size) -> None:
        super().__init__(attn)
        self.grid = grid
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.table = nn.Parameter(attn.qkv.weight.new_zeros(offsets + 3, attn.heads))

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        assert queries is None
        query, key, value = self._heads(self.qkv(x), 3)  # (B, heads, N + 1, D/heads) each
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias()[None].to(query.dtype))
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def bias(self) -> Tensor:
        """(heads, N + 1, N + 1), asking tokens in rows.

        The table's first rows go by the offset of rows and then of columns, asking minus asked, least first; the last
        three are of the class token that asks a patch, of a patch that asks it, and of itself.
        """
        rows, columns = self.grid
        plane = self.table[:-3].T.unflatten(1, (2 * rows - 1, 2 * columns - 1))
        between = _pairs(_pairs(plane, 1, rows), 2, columns)  # (heads, rows, columns of the asked, rows, columns)
        between = between.flatten(3, 4).flatten(1, 2).mT  # (heads, N, N)
        asks, asked, itself = self.table[-3:, :, None, None].unbind(0)  # (heads, 1, 1) each
        size = rows * columns
        first = torch.cat([itself, asks.expand(-1, 1, size)], dim=2)
        return torch.cat([first, torch.cat([asked.expand(-1, size, 1), between], dim=2)], dim=1)


class GridAttention(_Placed):
    """Without class token, in windows or everywhere, with positions for ``sides`` or none: (B, h, w, D) to the same."""

    def __init__(self, attn: Attention, window: int | None, sides: Size | None) -> None:
        super().__init__(attn)
        self.window = window
        width = attn.qkv.in_features // attn.heads
        new = attn.qkv.weight.new_zeros
        self.rel_pos_h = None if sides is None else nn.Parameter(new(2 * sides[0] - 1, width))
        self.rel_pos_w = None if sides is None else nn.Parameter(new(2 * sides[1] - 1, width))

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        assert queries is None
        grid = x.shape[1], x.shape[2]
        if self.window:
            x = windowed(x, self.window)
        seen = x.shape[1], x.shape[2]
        query, key, value = self._heads(self.qkv(x.flatten(1, 2)), 3)  # (B, heads, T, D/heads) each
        if self.rel_pos_h is None or self.rel_pos_w is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            query, key = placed(query, key, self.rel_pos_h, self.rel_pos_w, seen)
            mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        x = self.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, seen)
        return unwindowed(x, grid) if self.window else x


def placed(query: Tensor, key: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, heads, T, d), longer by rows + columns, whose plain product has the decomposed positions.

    A query gets its products with R_h for every row and with R_w for every column, a key ones at its own row and
    column; so no bias of all pairs is made, which has 805 MB for 64×64 patches and 12 heads.
    """
    (rows, columns), width = grid, query.shape[3]
    where = query.unflatten(2, grid)  # (B, heads, rows, columns, d)
    by_row = torch.einsum("bnhwd,kdh->bnhwk", where, _pairs(_stretched(rel_pos_h, rows), 0, rows))
    by_column = torch.einsum("bnhwd,kdw->bnhwk", where, _pairs(_stretched(rel_pos_w, columns), 0, columns))
    row = torch.eye(rows).to(query)[:, None].expand(-1, columns, -1)
    column = torch.eye(columns).to(query)[None].expand(rows, -1, -1)
    places = torch.cat([row, column], dim=2).flatten(0, 1).expand(*key.shape[:2], -1, -1)  # (B, heads, T, rows + …)
    spare = (0, -(width + rows + columns) % _ALIGNED)
    scaled = query * width**-0.5
    query = torch.cat([scaled, by_row.flatten(2, 3).to(query.dtype), by_column.flatten(2, 3).to(query.dtype)], dim=3)
    return F.pad(query, spare), F.pad(torch.cat([key, places], dim=3), spare)


def windowed(x: Tensor, side: int) -> Tensor:
    """(B, h, w, D) to (windows of all, side, side, D), with zeros beyond the right and the bottom edge."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(0, 2)


def unwindowed(windows: Tensor, grid: Size) -> Tensor:
    """What `windowed` gave, of maps of (rows, columns), back to (B, h, w, D)."""
    (rows, columns), side = grid, windows.shape[1]
    windows = windows.unflatten(0, (-1, -(-rows // side), -(-columns // side)))
    return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


def _pairs(table: Tensor, dim: int, side: int) -> Tensor:
    """A dimension of 2·side − 1 offsets as the places of the asked (side), and those of the asking as the last one."""
    return table.unfold(dim, side, 1).flip(dim)


def _stretched(table: Tensor, side: int) -> Tensor:
    """A table (offsets, d) with 2·side − 1 of them."""
    if len(table) == 2 * side - 1:
        return table
    return F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
