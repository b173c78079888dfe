"""The network that tensors are for, read off their shapes where no configuration says it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from maehub.errors import IntegrityError, MaehubError, UsageError
from maehub.images import Size
from maehub.models import PRESETS, AutoencoderConfig, EncoderConfig, Pool, Target
from maehub.weights.keys import ENCODER_MASK_TOKEN, is_decoder

Config = EncoderConfig | AutoencoderConfig

HEAD_WIDTH, DECODER_HEAD_WIDTH = 64, 32
"""Of one attention head, in nearly all networks."""


class Hints(NamedTuple):
    """What a caller or a configuration says of a network beyond the shapes of its tensors; None where it does not."""

    heads: int | None = None  # attention heads of the encoder
    decoder_heads: int | None = None
    target: Target | None = None  # what the decoder was trained to predict
    image_size: Size | None = None  # pixels; it counts if the position table is for it


NO_HINTS = Hints()


def published_heads(width: int, depth: int, patch_size: int) -> int | None:
    """Attention heads of the published network of these numbers; None if there is none."""
    key = (width, depth, patch_size)
    return next((net.heads for net in PRESETS.values() if (net.width, net.depth, net.patch_size) == key), None)


def published_decoder_heads(width: int) -> int | None:
    """Attention heads of the published decoder of this width; None if there is none."""
    return 16 if width == 512 else None


def size_name(width: int, depth: int, patch_size: int) -> str:
    """``ViT-B/16``, or width, depth and patch of a network that has no such name."""
    same = [name for name, preset in PRESETS.items() if (preset.width, preset.depth) == (width, depth)]
    if not same:
        return f"ViT of width {width}, depth {depth}, patch {patch_size}"
    return f"ViT-{same[0].removeprefix('vit-').title()}/{patch_size}"


@contextmanager
def refusing(*files: object) -> Iterator[None]:
    """What a file says that no network can be is an error that names the file."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError, ArithmeticError) as error:
        if isinstance(error, MaehubError) and any(str(file) in str(error) for file in files):
            raise
        raise IntegrityError(f"{files[0]}: {error!s:.300}") from error


def infer_config(state: Mapping[str, Tensor], hints: Hints = NO_HINTS, where: str = "these weights") -> Config:
    """Read the network off the shapes of its tensors (official names), where no configuration says it.

    Of what shapes do not tell and no hint says, heads are those of the published network with the same width, depth and
    patch, and 16 in a decoder of width 512; the target is unknown, unless there are the components of ``pca``, which
    nothing else has; and the image is square. Where there is a decoder, an `AutoencoderConfig` comes back. ``where`` is
    what the tensors are, for messages.
    """
    with refusing(where):
        return _inferred(state, hints, where)


def _inferred(state: Mapping[str, Tensor], hints: Hints, where: str) -> Config:
    shape = {name: tuple(value.shape) for name, value in state.items()}
    kernel, table = shape.get("patch_embed.proj.weight", ()), shape.get("pos_embed", ())
    hidden = shape.get("blocks.0.mlp.fc1.weight", ())
    is_square = len(kernel) == 4 and all(kernel) and kernel[2] == kernel[3]
    if not is_square or len(table) != 3 or table[1] < 2 or len(hidden) not in (0, 2):
        raise IntegrityError(
            f"{where}: no Vision Transformer with a class token and one position table; "
            f"patch_embed.proj.weight is {kernel or 'missing'}, pos_embed {table or 'missing'}"
        )
    width, channels, patch, _ = kernel
    depth = _depth(shape, "blocks.")
    heads = published_heads(width, depth, patch) if hints.heads is None else hints.heads
    if heads is None:
        raise UsageError(
            f"{where}: no published network has width {width}, depth {depth} and patch {patch}, and tensors do not "
            f"tell the number of attention heads; say it: heads={max(1, width // HEAD_WIDTH)}, for example, or once "
            "for all by `maehub convert FILE -o FOLDER --heads N`"
        )
    size, patches = hints.image_size or (0, 0), table[1] - 1
    # timm states the input size, to which it would resize the table of another.
    if any(side % patch for side in size) or math.prod(size) != patches * patch**2:
        side = math.isqrt(patches)
        if side * side != patches:
            raise UsageError(
                f"{where}: {table[1]} positions are no class token and a square of patches. Of an image that is no "
                "square `maehub identify FILE` shows the config.json that says so; without a class token none is read"
            )
        size = side * patch, side * patch
    ratio = hidden[0] / width if hidden else 4.0
    if hidden and int(width * ratio) != hidden[0]:  # as `Mlp` counts its hidden values
        ratio = math.nextafter(ratio, math.inf)
    head = shape.get("head.weight") or (0,)
    pool: Pool = "mean" if "fc_norm.weight" in shape else "cls"
    encoder = EncoderConfig(size, patch, channels, width, depth, heads, mlp_ratio=ratio, classes=head[0], pool=pool)
    if not any(is_decoder(name) for name in shape):
        return encoder
    config = AutoencoderConfig(encoder, target="unknown")
    if ENCODER_MASK_TOKEN in shape:
        config = replace(config, mask_tokens="encoder")
    if _is_linear_head(shape):
        config = replace(config, decoder_depth=0)
    else:
        config = _with_decoder(config, state, hints.decoder_heads, where)
    return _with_outputs(config, shape, hints.target, where)


def with_target(config: AutoencoderConfig, target: Target, where: str = "these weights") -> AutoencoderConfig:
    """The configuration of unknown target once somebody says it; the head keeps its width."""
    if target == "pca":
        raise UsageError(f"{where} has no components of a PCA, so its target is not pca; say another target=")
    return replace(config, target=target, outputs=config.prediction_width)


def _with_decoder(
    config: AutoencoderConfig, state: Mapping[str, Tensor], heads: int | None, where: str
) -> AutoencoderConfig:
    """The configuration with the width, depth and heads of the decoder."""
    embed = tuple(state["decoder_embed.weight"].shape) if "decoder_embed.weight" in state else ()
    if len(embed) != 2:
        raise IntegrityError(f"{where}: tensors of a decoder but no decoder_embed.weight: {describe(state)}")
    heads = published_decoder_heads(embed[0]) if heads is None else heads
    if heads is None:
        raise UsageError(
            f"{where}: a decoder of width {embed[0]}, and tensors do not tell its number of attention heads; say it: "
            f"decoder_heads={max(1, embed[0] // DECODER_HEAD_WIDTH)}, for example, or once for all by "
            "`maehub convert FILE -o FOLDER --decoder-heads N`"
        )
    depth = _depth(state, "decoder_blocks.")
    return replace(config, decoder_width=embed[0], decoder_depth=depth, decoder_heads=heads)


def _with_outputs(
    config: AutoencoderConfig, shape: Mapping[str, tuple[int, ...]], target: Target | None, where: str
) -> AutoencoderConfig:
    """The configuration with what is predicted, as far as the caller and the shapes tell."""
    components = shape.get("decoder_components", ())
    if len(components) == 2:
        if target not in (None, "unknown", "pca"):
            raise UsageError(f"{where} has the components of a PCA, so its target is pca, not {target}")
        return replace(config, target="pca", outputs=components[0])
    head = shape.get("decoder_pred.weight", ())
    width = head[0] if len(head) == 2 else config.patch_values
    if target == "tokens":
        return replace(config, target=target, outputs=width)
    if target in (None, "unknown") and width != config.patch_values:
        raise UsageError(
            f"{where}: the head predicts {width} values for a patch, whose pixels would be {config.patch_values}; they "
            "may be the logits of tokens: say target='tokens', or `maehub convert FILE -o FOLDER --target tokens`"
        )
    return with_target(config, target or "unknown", where)


def _is_linear_head(names: Iterable[str]) -> bool:
    """Whether all there is of a decoder is the head, on an encoder that sees mask tokens."""
    names = set(names)
    return {ENCODER_MASK_TOKEN, "decoder_pred.weight"} <= names and not any(
        name.startswith(("decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm")) for name in names
    )


def describe(state: Mapping[str, Tensor]) -> str:
    """What a state dictionary (official names) looks like, in a few words, from whatever it has."""
    shape = {name: tuple(value.shape) for name, value in state.items()}
    kernel = shape.get("patch_embed.proj.weight", ())
    if len(kernel) != 4:
        return "not a Vision Transformer (it has no patch_embed.proj.weight)"
    size = size_name(kernel[0], _depth(shape, "blocks."), kernel[2])
    if _is_linear_head(shape):
        return f"an autoencoder {size} with a linear head"
    if "decoder_embed.weight" in shape:
        return f"an autoencoder {size} with {_depth(shape, 'decoder_blocks.')} decoder blocks"
    if shape.get("head.weight"):
        return f"a classifier {size} with {shape['head.weight'][0]} classes"
    return f"an encoder-only {size}"


def _depth(names: Iterable[str], stack: str) -> int:
    """Blocks of a stack: one more than the highest number in a name."""
    numbers = [name.removeprefix(stack).split(".")[0] for name in names if name.startswith(stack)]
    return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 4), default=-1)
