"""From tensors to networks: the strict way in, without initialising anything twice.

A network is built on the meta device, where it costs no memory and no time, and then takes the tensors of a file as
they are. What a file lacks or has too much is an error; the three legal departures (image size, channels, classes) are
parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from maehub.errors import IntegrityError, UsageError, first_names, log
from maehub.images import Preprocess, Size
from maehub.models import AutoencoderConfig, Encoder, EncoderConfig, MaskedAutoencoder, Origin, ResizeRule, resize_table
from maehub.weights.config_inference import Config, describe
from maehub.weights.keys import from_official, to_official

Network = TypeVar("Network", Encoder, MaskedAutoencoder)

HEAD_STD = 2e-5
"""Standard deviation of a new head's weights, as published for fine-tuning."""

_MOST_LISTED = 10


@dataclass(frozen=True)
class LoadOptions:
    """How the network should differ from its file. None leaves a thing as the file has it.

    Args:
        image_size: native size in pixels, an int or (height, width); position tables are resized on their grid.
        channels: image channels. The kernels of the stem are summed for one channel; otherwise they are taken in turn
            and scaled by (old / new), so that a grey picture gives the same tokens. The pixel head predicts the mean
            for one channel, otherwise each channel in turn.
        classes: a new head with this many outputs (unless the file has just that one), or 0 for none.
        positions: the rule by which position tables are resized, now and in a forward at another size.
        dtype: of the weights; None means float32, whatever the file holds.
        device: where the weights go.
        check_finite: look for NaN and infinity, which reads every byte; False where that is known already.
    """

    image_size: int | Size | None = None
    channels: int | None = None
    classes: int | None = None
    positions: ResizeRule | None = None
    dtype: torch.dtype | None = None
    device: str | torch.device = "cpu"
    check_finite: bool = True


AS_STORED = LoadOptions()


def build(
    kind: type[Network],
    state: Mapping[str, Tensor],
    config: Config,
    preprocess: Preprocess | None = None,
    *,
    options: LoadOptions = AS_STORED,
    origin: Origin | None = None,
    where: str = "these weights",
) -> Network:
    """A network in eval mode that holds these tensors; of an autoencoder's an `Encoder` leaves the decoder out.

    Args:
        kind: `Encoder` or `MaskedAutoencoder`.
        state: official names.
        config: the network that the tensors are for, before any departure.
        preprocess: its transform; None means the published evaluation.
        options: the departures from the file, dtype and device.
        origin: where the weights come from.
        where: what the tensors are, for messages.
    """
    looks, tensors = describe(state), dict(state)
    if kind is Encoder:
        config = config.encoder if isinstance(config, AutoencoderConfig) else config
        tensors = from_official(state, "timm")
        if len(tensors) < len(state):
            log.debug("%s: the encoder alone, without %d tensors of the decoder", where, len(state) - len(tensors))
    elif isinstance(config, EncoderConfig):
        raise IntegrityError(
            f"{where}: this is {looks}, without the decoder that an autoencoder needs; "
            "load it with maehub.load(...), or name an autoencoder such as vit-b-pixel"
        )
    elif options.classes:
        raise UsageError("an autoencoder has no head; maehub.load(..., classes=) gives its encoder one")
    _check_size(tensors, config, looks, where)
    model = _empty(kind, config, preprocess)
    _check(tensors, model, looks, where)
    old = config if isinstance(config, EncoderConfig) else config.encoder
    new = _changed(old, options)
    if isinstance(config, AutoencoderConfig) and config.outputs and new.channels != old.channels:
        raise UsageError(
            f"{where}: the decoder predicts {config.target} of {old.channels} channels, which cannot be adapted to "
            f"{new.channels}; maehub.load(..., channels=) adapts the encoder alone"
        )
    if new != old:
        transform = model.preprocess if new.size == old.size else model.preprocess.with_size(new.size)
        if new.channels != old.channels:  # its statistics were for other channels
            transform = Preprocess.evaluation(new.size, new.channels, new.patch_size)
        tensors = _adapted(tensors, old, new)
        model = _empty(kind, new if isinstance(config, EncoderConfig) else replace(config, encoder=new), transform)
    if options.check_finite:
        check_finite(tensors, where)
    dtype = options.dtype or torch.float32
    if not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating one, not {dtype}")
    tensors = {name: value.to(options.device, dtype) for name, value in tensors.items()}
    model.load_state_dict(from_official(tensors, "module"), strict=True, assign=True)
    (model.encoder if isinstance(model, MaskedAutoencoder) else model).origin = origin
    return model.eval()


class Misfit(NamedTuple):
    """Official names whose tensors do not fit a network."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]  # with both shapes


def misfit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Misfit:
    """What of the tensors does not fit those of a network, in the order of the one or the other; official names."""
    return Misfit(
        [name for name in expected if name not in state],
        [name for name in state if name not in expected],
        [
            f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    )


def check_finite(state: Mapping[str, Tensor], where: str = "these weights") -> None:
    """Refuse NaN and infinity.

    One sum a tensor: it is finite only if every value is, or else the values themselves are looked at.
    """
    bad = []
    for name, tensor in state.items():
        exact = tensor if tensor.itemsize > 1 else tensor.float()  # the 8-bit floats have no isfinite
        if not math.isfinite(exact.sum(dtype=torch.float32).item()) and not exact.isfinite().all():
            bad.append(name)
    if bad:
        some = first_names(bad, _MOST_LISTED)
        raise IntegrityError(f"{where}: NaN or infinity in {some}; the weights were damaged or training diverged")


def _empty(kind: type[Network], config: Config, preprocess: Preprocess | None) -> Network:
    with torch.device("meta"):
        return kind(config, preprocess)  # type: ignore[arg-type]


def _check_size(state: Mapping[str, Tensor], config: Config, looks: str, where: str) -> None:
    """Refuse a configuration that is far too large for its tensors, before a network of that size is built."""
    encoder = config if isinstance(config, EncoderConfig) else config.encoder
    rows, columns = encoder.grid
    depth, largest = encoder.depth, rows * columns * encoder.width
    if isinstance(config, AutoencoderConfig):
        width = config.decoder_width if config.decoder_depth else encoder.width
        depth += config.decoder_depth
        largest = max(largest, rows * columns * width, width * config.prediction_width)
    if depth > len(state) or largest > sum(value.numel() for value in state.values()):
        raise IntegrityError(
            f"{where}: too few tensors for the configuration, depth {depth}, width {encoder.width}, grid "
            f"{rows}×{columns}; it looks like: {looks}. Nothing was loaded"
        )


def _check(state: Mapping[str, Tensor], model: Encoder | MaskedAutoencoder, looks: str, where: str) -> None:
    """Every tensor is there, none is too many, each has its shape and is floating."""
    expected = to_official(model.state_dict()).state
    misfits = misfit(state, expected)
    problems = {
        "missing": sorted(misfits.missing),
        "unexpected": sorted(misfits.unexpected),
        "of another shape": misfits.misshaped,
        "not floating": [f"{n} {state[n].dtype}" for n in expected if n in state and not state[n].is_floating_point()],
    }
    lines = [
        f"{what}, {len(names)} of {len(expected)}: {first_names(names, _MOST_LISTED)}"
        for what, names in problems.items()
        if names
    ]
    if lines:
        first = f"{where}: the tensors do not fit the network that was asked for; nothing was loaded"
        raise IntegrityError("\n".join([f"{first}. It looks like: {looks}", *lines]))


def _changed(config: EncoderConfig, options: LoadOptions) -> EncoderConfig:
    """The configuration after the departures that were asked for."""
    asked = {name: getattr(options, name) for name in ("image_size", "channels", "classes", "positions")}
    if options.classes not in (None, config.classes):
        asked |= {"class_names": (), "multi_label": False, "numeric": False}
    return replace(config, **{name: value for name, value in asked.items() if value is not None})


def _adapted(state: dict[str, Tensor], old: EncoderConfig, new: EncoderConfig) -> dict[str, Tensor]:
    """The tensors after the departures, each from the file's own; for channels see `LoadOptions`."""
    changed: dict[str, Tensor] = {
        name: resize_table(state[name], old.grid, new.grid, new.positions)
        for name in ("pos_embed", "decoder_pos_embed")
        if name in state
    }
    if new.channels != old.channels:
        turns = torch.arange(new.channels) % old.channels
        kernel = state["patch_embed.proj.weight"].float()  # (D, C, P, P)
        grey, coloured = kernel.sum(dim=1, keepdim=True), kernel[:, turns] * (old.channels / new.channels)
        changed["patch_embed.proj.weight"] = grey if new.channels == 1 else coloured
        for name in {"decoder_pred.weight", "decoder_pred.bias"} & state.keys():
            pixels = state[name].float().unflatten(0, (-1, old.channels))  # (P·P, C[, d]): channels are fastest
            changed[name] = pixels.mean(dim=1) if new.channels == 1 else pixels[:, turns].flatten(0, 1)
    if new.classes and new.classes != old.classes:
        changed["head.weight"] = nn.init.trunc_normal_(torch.empty(new.classes, new.width), std=HEAD_STD)
        changed["head.bias"] = torch.zeros(new.classes)
    return {name: value for name, value in (state | changed).items() if new.classes or not name.startswith("head.")}
