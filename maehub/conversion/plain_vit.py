"""A plain Vision Transformer or masked autoencoder, read off names and shapes: what it is and whether it is whole.

The networks that maehub computes. Shapes tell nearly everything; the number of attention heads is told by the
published networks of the same shape or by a configuration, and the grid by the position table where that is the
sine-cosine one of MAE.
"""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maehub import weights
from maehub.conversion.checkpoints import Checkpoint
from maehub.errors import IntegrityError, MaehubError, UsageError
from maehub.hub import Role, architecture_heads
from maehub.images import Preprocess, Size
from maehub.models import AutoencoderConfig, Encoder, EncoderConfig, MaskedAutoencoder, sincos_table
from maehub.weights import Config, Dialect, Hints, Misfit

SizeFrom = Literal["configuration", "positions", "square", ""]
"""How an image size is known; "square" is assumed, since learned positions do not tell; "" is not known."""

Tuning = Literal["none", "head", "linear probe", "fine-tuned"]
"""What was trained after pre-training: ``head`` is a head that may be a probe's or tuned with part of the network."""

_SIZE_WORDS: dict[SizeFrom, str] = {
    "configuration": "as its configuration says",
    "positions": "by the values of its position table",
    "square": "if its pictures are square, which learned positions do not tell",
}
_TUNING_WORDS: dict[Tuning, str] = {
    "fine-tuned": "fine-tuned",
    "linear probe": "a linear probe: BatchNorm and a linear layer, which together are one",
    "head": "a linear probe, or fine-tuned in part: its positions are those of pre-training",
}

_VOCABULARY = re.compile(
    r"cls_token|pos_embed|mask_token|encoder_mask_token|decoder_(pos_embed|centre|components)"
    r"|(patch_embed\.proj|norm|fc_norm|head|decoder_(embed|norm|pred)|(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.qkv"
    r"|attn\.proj|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
)

_EQUAL = 5e-3  # of table values in [-1, 1]; bfloat16 rounds by 4e-3
_LARGEST_TABLE = 16_000_000  # values of a position table; ViT-H on a grid of 64×64 has a third


@dataclass(frozen=True)
class DecoderShape:
    """The decoder of an autoencoder; ``heads`` is None where nothing tells it."""

    width: int
    depth: int
    heads: int | None


@dataclass(frozen=True)
class Network:
    """A plain Vision Transformer. None is what nothing tells."""

    name: str  # "ViT-B/16", or width, depth and patch
    width: int
    depth: int
    heads: int | None
    patch_size: int
    channels: int
    image_size: tuple[int, int] | None  # (height, width), pixels
    size_from: SizeFrom
    positions: Literal["sine-cosine", "learned"]
    pool: Literal["cls", "mean"]
    classes: int
    tuning: Tuning
    decoder: DecoderShape | None

    @property
    def role(self) -> Role:
        """What a file of it holds."""
        return "autoencoder" if self.decoder else "classifier" if self.classes else "encoder"

    def describe(self) -> dict[str, str]:
        """Rows of a table for a person: network, size, decoder and head; empty is what it does not have."""
        channels = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        size = f"not told by a position table that is no square; {channels}"
        if self.image_size:
            rows, columns = self.image_size
            size = f"{rows}×{columns} pixels ({_SIZE_WORDS[self.size_from]}), {channels}"
        head = "none; tokens are averaged, then fc_norm: it was or is to be fine-tuned" if self.pool == "mean" else ""
        if self.tuning != "none":
            pool = "mean of the patch tokens" if self.pool == "mean" else "class token"
            head = f"{self.classes} classes from the {pool} ({_TUNING_WORDS[self.tuning]})"
        return {
            "network": f"{_blocks_words(self)}, patch {self.patch_size}, {self.positions} positions",
            "size": size,
            "decoder": _blocks_words(self.decoder) if self.decoder else "",
            "head": head,
        }


@dataclass(frozen=True)
class PlainVit:
    """What the tensors are, as far as a network here has them."""

    dialect: Dialect
    config: Config | None  # None where even the stem and the position table do not tell a network; heads may be 1 in it
    preprocess: Preprocess | None
    network: Network | None  # the same in words, with what nothing tells as None
    configured: bool  # a configuration says what shapes do not
    misfit: Misfit

    @property
    def whole(self) -> bool:
        """Whether every tensor fits, so that maehub computes the network."""
        return self.config is not None and not any(self.misfit)

    @property
    def lacks_class_token(self) -> bool:
        """Whether the token is all that is missing, so that it was never there."""
        return self.misfit.missing == ["cls_token"] and not self.misfit.unexpected


def _blocks_words(stack: Network | DecoderShape) -> str:
    heads = f"{stack.heads} heads" if stack.heads else "a number of heads that tensors do not tell"
    return f"{stack.depth} blocks of width {stack.width}, {heads}"


def read_plain(checkpoint: Checkpoint, hints: Hints) -> tuple[PlainVit | None, str]:
    """Read a checkpoint as a plain ViT or masked autoencoder; of its tensors only the position table is read.

    Returns:
        What was found, and why a configuration beside the tensors was not used, if it was not. None if the names are
        of no dialect that is known here, or of a network that is not read, with the reason.
    """
    try:
        official = weights.to_official(checkpoint.shapes)
    except UsageError as error:
        return None, str(error)
    except (IntegrityError, RuntimeError):  # torch's own where tensors cannot be fused
        return None, ""
    state = official.state
    names = weights.official_names(checkpoint.shapes).names
    grid, table = None, state.get("pos_embed")
    if table is not None and table.ndim == 3 and table.is_floating_point() and 0 < table.numel() <= _LARGEST_TABLE:
        grid = grid_of_table(checkpoint.values()[next(key for key, name in names.items() if name == "pos_embed")])
    config, preprocess, refused = _configured(checkpoint, state, hints)
    configured = config is not None
    size_from: SizeFrom = "configuration"
    if config is None:
        config, size_from = _inferred(state, hints, grid)
    network = None
    if config:
        # Of a whole linear probe the BatchNorm is no more in the state.
        is_probe = "head.0.running_mean" in names.values() and "head.0.running_mean" not in state
        network = _network(config, configured, hints, size_from, grid is not None, is_probe)
    return PlainVit(official.dialect, config, preprocess, network, configured, _misfit(state, config)), refused


def _network(
    config: Config, configured: bool, hints: Hints, size_from: SizeFrom, is_sincos: bool, is_probe: bool
) -> Network:
    """A network in words. What is ``configured`` has its heads, any other those that a hint or its shape tells."""
    encoder, decoder = config if isinstance(config, EncoderConfig) else config.encoder, None
    key = (encoder.width, encoder.depth, encoder.patch_size)
    if isinstance(config, AutoencoderConfig) and not config.decoder_depth:
        decoder = DecoderShape(encoder.width, 0, None)
    elif isinstance(config, AutoencoderConfig):
        told = hints.decoder_heads or weights.published_decoder_heads(config.decoder_width)
        heads = config.decoder_heads if configured else told
        decoder = DecoderShape(config.decoder_width, config.decoder_depth, heads)
    tuning: Tuning = "none"
    if is_probe:
        tuning = "linear probe"
    elif encoder.classes:
        tuning = "head" if is_sincos and encoder.pool == "cls" else "fine-tuned"
    return Network(
        name=weights.size_name(*key),
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads if configured else hints.heads or weights.published_heads(*key) or architecture_heads(*key),
        patch_size=encoder.patch_size,
        channels=encoder.channels,
        image_size=encoder.size if size_from else None,
        size_from=size_from,
        positions="sine-cosine" if is_sincos else "learned",
        pool=encoder.pool,
        classes=encoder.classes,
        tuning=tuning,
        decoder=decoder,
    )


def _configured(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], hints: Hints
) -> tuple[Config | None, Preprocess | None, str]:
    """What a configuration in the file or beside it says; None and why not where it says nothing that is read."""
    try:
        if block := weights.packed_block(checkpoint.metadata, str(checkpoint.file)):
            return block.config, block.preprocess, ""
        if checkpoint.config:
            stored = weights.read_config(checkpoint.config, checkpoint.file, hints, state=state)
            return stored.config, stored.preprocess, ""
    except (MaehubError, ValueError) as error:
        return None, None, str(error).split("\n")[0]
    return None, None, ""


def _inferred(state: Mapping[str, Tensor], hints: Hints, grid: Size | None) -> tuple[Config | None, SizeFrom]:
    """The network by its shapes; heads that nothing tells are 1 in it, and a size that nothing tells is one row."""
    kernel, table, head = (
        tuple(state[name].shape) if name in state else ()
        for name in ("patch_embed.proj.weight", "pos_embed", "decoder_pred.weight")
    )
    if len(kernel) != 4 or len(table) != 3 or table[1] < 2 or not kernel[2]:
        return None, ""
    patch = kernel[2]
    tokens = len(head) == 2 and head[0] != kernel[1] * patch**2 and "decoder_components" not in state
    sizes: dict[SizeFrom, Size | None] = {
        "positions" if grid else "square": (grid[0] * patch, grid[1] * patch) if grid else None,
        "": (patch, (table[1] - 1) * patch),
    }
    for size_from, size in sizes.items():
        said = Hints(hints.heads or 1, hints.decoder_heads or 1, "tokens" if tokens else None, size)
        with suppress(UsageError, IntegrityError):
            return weights.infer_config(state, said), size_from
    return None, ""


def _misfit(state: Mapping[str, Tensor], config: Config | None) -> Misfit:
    """What of the tensors does not fit; where no network is told, by the names that networks here have."""
    unknown = [name for name in state if not _VOCABULARY.fullmatch(name)]
    if config is None:
        missing = [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in state]
        return Misfit(missing, unknown, [] if missing else ["its shapes are those of no network that can be built"])
    encoder = config.encoder if isinstance(config, AutoencoderConfig) else config
    depth, width = encoder.depth, encoder.width
    if isinstance(config, AutoencoderConfig) and config.decoder_depth:
        depth, width = depth + config.decoder_depth, max(width, config.decoder_width)
    if depth > len(state) or encoder.grid[0] * encoder.grid[1] * width > _LARGEST_TABLE:  # dear to build
        return Misfit([], unknown, ["the tensors are too few or too small for the network that their names tell"])
    with torch.device("meta"):
        network = MaskedAutoencoder(config) if isinstance(config, AutoencoderConfig) else Encoder(config)
    return weights.misfit(state, weights.to_official(network.state_dict()).state)


def grid_of_table(table: Tensor) -> Size | None:
    """The (rows, columns) that a sine-cosine table (1, N + 1, D), class token first, is for; None of a learned one."""
    count, width = table.shape[1] - 1, table.shape[2]
    if count < 1 or width % 4:
        return None
    values = table[0].float()
    if not values[0].abs().max() <= _EQUAL:  # the class token's row is zero
        return None
    for columns in (number for number in range(1, count + 1) if not count % number):
        # The whole table is compared only where its first row fits.
        grids = [(1, columns), (count // columns, columns)]
        if all((values[1 : 1 + math.prod(grid)] - sincos_table(width, grid)).abs().max() <= _EQUAL for grid in grids):
            return grids[1]
    return None
