"""A plain Vision Transformer or masked autoencoder, read off names and shapes: what it is and whether it is whole.

The networks that maehub computes. Shapes tell nearly everything; the number of attention heads is told by the
published networks of the same shape or by a configuration, and the grid by the position table where that is the
sine-cosine one of MAE.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maehub.conversion.checkpoints import Checkpoint
from maehub.errors import IntegrityError, MaehubError, UsageError
from maehub.hub import architecture_heads
from maehub.images import Preprocess, Size
from maehub.models import PRESETS, AutoencoderConfig, Encoder, EncoderConfig, MaskedAutoencoder, sincos_table
from maehub.weights import Dialect, infer_config, official_names, packed_block, read_config, to_official

Config = EncoderConfig | AutoencoderConfig

_VOCABULARY = re.compile(
    r"cls_token|pos_embed|mask_token|encoder_mask_token|decoder_(pos_embed|centre|components)"
    r"|(patch_embed\.proj|norm|fc_norm|head|decoder_(embed|norm|pred)|(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.qkv"
    r"|attn\.proj|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
)

_EQUAL = 5e-3  # of table values in [-1, 1]; bfloat16 rounds by 4e-3
_LARGEST_TABLE = 16_000_000  # values of a position table; ViT-H on a grid of 64×64 has a third


@dataclass(frozen=True)
class Plain:
    """What the tensors are, as far as a network here has them."""

    dialect: Dialect
    dropped: tuple[str, ...]  # left out on purpose
    config: Config | None  # None where even the stem and the position table do not tell a network
    preprocess: Preprocess | None
    heads: int | None  # None where nothing tells; ``config`` then has a placeholder
    decoder_heads: int | None
    size_from: Literal["configuration", "positions", "square", ""]  # how the image size is known; "" is not
    sincos: bool  # the position table is MAE's sine-cosine one
    configured: bool  # a configuration says what shapes do not
    missing: tuple[str, ...]  # official names
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    probe_head: bool  # the head was a BatchNorm and a linear layer, as published for linear probes

    @property
    def whole(self) -> bool:
        """Whether every tensor fits, so that maehub computes the network."""
        return self.config is not None and not (self.missing or self.unexpected or self.misshaped)


def read_plain(
    checkpoint: Checkpoint, heads: int | None = None, decoder_heads: int | None = None
) -> tuple[Plain | None, str]:
    """Read a checkpoint as a plain ViT or masked autoencoder.

    Args:
        checkpoint: opened; only its position table is read.
        heads: attention heads of the encoder, where the caller knows them.
        decoder_heads: likewise of the decoder.

    Returns:
        What was found, and why a configuration beside the tensors was not used, if it was not. None if the names are
        of no dialect that is known here, or of a network that is not read, with the reason.
    """
    try:
        official = to_official(checkpoint.shapes)
    except UsageError as error:
        return None, str(error)
    except (IntegrityError, RuntimeError):  # torch's own where tensors cannot be fused
        return None, ""
    state = official.state
    # Of a whole one nothing of it is left in the state.
    probe_head = "head.0.running_mean" in official_names(checkpoint.shapes).names.values() and (
        "head.0.running_mean" not in state
    )
    grid, sincos = _grid(checkpoint, state)
    config, preprocess, refused = _configured(checkpoint, state, heads, decoder_heads)
    configured = config is not None
    size_from: Literal["configuration", "positions", "square", ""] = "configuration"
    if config is None:
        config, size_from = _inferred(state, heads, decoder_heads, grid)
    encoder = config.encoder if isinstance(config, AutoencoderConfig) else config
    plain = Plain(
        official.dialect,
        tuple(official.dropped),
        config,
        preprocess,
        encoder.heads if configured and encoder else heads or (_published_heads(encoder) if encoder else None),
        _decoder_heads(config, configured, decoder_heads),
        size_from,
        sincos,
        configured,
        *_differences(state, config),
        probe_head,
    )
    return plain, refused


def share_of_known_names(names: Mapping[str, Tensor]) -> float:
    """How many of the tensors have names that a plain ViT or masked autoencoder has."""
    try:
        official = official_names(names).names.values()
    except MaehubError:
        return 0.0
    bare = [re.sub(r"\.attn\.(query|key|value)\.", ".attn.qkv.", name) for name in official]
    return sum(bool(_VOCABULARY.fullmatch(name)) for name in bare) / max(1, len(bare))


def _configured(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], heads: int | None, decoder_heads: int | None
) -> tuple[Config | None, Preprocess | None, str]:
    """What a configuration in the file or beside it says; None and why not where it says nothing that is read."""
    try:
        if block := packed_block(checkpoint.metadata, str(checkpoint.file)):
            return block.config, block.preprocess, ""
        if checkpoint.config:
            said = read_config(
                checkpoint.config, checkpoint.file, heads=heads, decoder_heads=decoder_heads, state=dict(state)
            )
            return said.config, said.preprocess, ""
    except (MaehubError, ValueError) as error:
        return None, None, str(error).split("\n")[0]
    return None, None, ""


def _inferred(
    state: Mapping[str, Tensor], heads: int | None, decoder_heads: int | None, grid: Size | None
) -> tuple[Config | None, Literal["positions", "square", ""]]:
    """The network by its shapes; heads that nothing tells are 1 in it, and a size that nothing tells is one row."""
    kernel, table, head = (
        tuple(state[name].shape) if name in state else ()
        for name in ("patch_embed.proj.weight", "pos_embed", "decoder_pred.weight")
    )
    if len(kernel) != 4 or len(table) != 3 or table[1] < 2 or not kernel[2]:
        return None, ""
    pixels = kernel[1] * kernel[2] ** 2
    tokens = len(head) == 2 and head[0] != pixels and "decoder_components" not in state
    common = {"heads": heads or 1, "decoder_heads": decoder_heads or 1, "target": "tokens" if tokens else None}
    how: Literal["positions", "square", ""] = "positions" if grid else "square"
    for size in ((grid[0] * kernel[2], grid[1] * kernel[2]) if grid else None, (kernel[2], (table[1] - 1) * kernel[2])):
        try:
            config = infer_config(state, image_size=size, **common)  # type: ignore[arg-type]
        except (UsageError, IntegrityError):
            how = ""
        else:
            return config, how
    return None, ""


def _published_heads(encoder: EncoderConfig) -> int | None:
    """Of the published network with the same width, depth and patch."""
    key = (encoder.width, encoder.depth, encoder.patch_size)
    same = (preset.heads for preset in PRESETS.values() if (preset.width, preset.depth, preset.patch_size) == key)
    return next(same, None) or architecture_heads(*key)


def _decoder_heads(config: Config | None, configured: bool, said: int | None) -> int | None:
    if not isinstance(config, AutoencoderConfig) or not config.decoder_depth:
        return None
    return config.decoder_heads if configured else said or (16 if config.decoder_width == 512 else None)


def _differences(
    state: Mapping[str, Tensor], config: Config | None
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Official names that are missing, too many, and of another shape than the network has."""
    if config is None:
        needed = [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in state]
        return tuple(needed), tuple(name for name in state if not _VOCABULARY.fullmatch(name)), ()
    if not _is_bounded(state, config):
        return (), (), ("the tensors are too few or too small for the network that their names tell",)
    with torch.device("meta"):
        network = MaskedAutoencoder(config) if isinstance(config, AutoencoderConfig) else Encoder(config)
    expected = to_official(network.state_dict()).state
    misshaped = (
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    )
    return (
        tuple(name for name in expected if name not in state),
        tuple(name for name in state if name not in expected),
        tuple(misshaped),
    )


def _is_bounded(state: Mapping[str, Tensor], config: Config) -> bool:
    """Whether a network of this configuration is about as large as its tensors, so that building it is cheap."""
    encoder = config.encoder if isinstance(config, AutoencoderConfig) else config
    depth, widths = encoder.depth, [encoder.width]
    if isinstance(config, AutoencoderConfig):
        depth += config.decoder_depth
        widths += [config.decoder_width] if config.decoder_depth else []
    tables = encoder.grid[0] * encoder.grid[1] * max(widths)
    return depth <= len(state) and tables <= _LARGEST_TABLE


def _grid(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> tuple[Size | None, bool]:
    """The (rows, columns) whose sine-cosine table is the stored one, and whether there is any."""
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or not table.is_floating_point() or not 0 < table.numel() <= _LARGEST_TABLE:
        return None, False
    name = next(key for key, official in official_names(checkpoint.shapes).names.items() if official == "pos_embed")
    return grid_of_table(checkpoint.values()[name])


def grid_of_table(table: Tensor) -> tuple[Size | None, bool]:
    """Find the grid that a sine-cosine table was made for; learned tables have none.

    Args:
        table: (1, N + 1, D), class token first.

    Returns:
        (rows, columns), and True; None and False where the table is no sine-cosine one.
    """
    count, width = table.shape[1] - 1, table.shape[2]
    if count < 1 or width % 4:
        return None, False
    values = table[0].float()
    if not values[0].abs().max() <= _EQUAL:  # the class token's row is zero
        return None, False
    for columns in (number for number in range(1, count + 1) if not count % number):
        # The whole table is compared only where its first row fits.
        row = sincos_table(width, (1, columns))
        if (values[1 : columns + 1] - row).abs().max() > _EQUAL:
            continue
        whole = sincos_table(width, (count // columns, columns))
        if (values[1:] - whole).abs().max() <= _EQUAL:
            return (count // columns, columns), True
    return None, False
