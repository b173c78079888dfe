"""From tensors to networks: the strict way in, without initialising anything twice.

A network is built on the meta device, where it costs no memory and no time, and then takes the tensors of a file as
they are. What a file lacks or has too much is an error; the three legal departures (image size, channels, classes) are
parameters.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from maehub.errors import IntegrityError, UsageError, first_names
from maehub.images import Preprocess, Size, as_size, grid_size
from maehub.models import AutoencoderConfig, Encoder, EncoderConfig, MaskedAutoencoder, Origin, ResizeRule, resize_table
from maehub.weights.config_inference import describe
from maehub.weights.keys import from_official, is_decoder, to_official

log = logging.getLogger("maehub")

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


def build_encoder(
    state: Mapping[str, Tensor],
    config: EncoderConfig | AutoencoderConfig,
    preprocess: Preprocess | None = None,
    *,
    options: LoadOptions = AS_STORED,
    origin: Origin | None = None,
    where: str = "these weights",
) -> Encoder:
    """An `Encoder` in eval mode that holds these tensors.

    Args:
        state: official names. Of an autoencoder the decoder is left out.
        config: the network that the tensors are for, before any departure.
        preprocess: its transform; None means the published evaluation.
        options: the departures from the file, dtype and device.
        origin: where the weights come from.
        where: what the tensors are, for messages.
    """
    if isinstance(config, AutoencoderConfig):
        config = config.encoder
    dropped = [name for name in state if is_decoder(name)]
    if dropped:
        log.debug("%s: the encoder alone, without %d tensors of the decoder", where, len(dropped))
    tensors = {name: value for name, value in state.items() if not is_decoder(name)}
    _check_size(tensors, config, where)
    model = _empty(Encoder, config, preprocess)
    _check(tensors, model, where, describe(state))
    changed = _changed(config, options)
    if changed != config:
        tensors = _adapted(tensors, config, changed)
        model = _empty(Encoder, changed, _changed_preprocess(model.preprocess, config, changed))
    model = _filled(model, tensors, options, where)
    model.origin = origin
    return model


def build_autoencoder(
    state: Mapping[str, Tensor],
    config: EncoderConfig | AutoencoderConfig,
    preprocess: Preprocess | None = None,
    *,
    options: LoadOptions = AS_STORED,
    origin: Origin | None = None,
    where: str = "these weights",
) -> MaskedAutoencoder:
    """A `MaskedAutoencoder` in eval mode that holds these tensors; arguments as in `build_encoder`."""
    if isinstance(config, EncoderConfig):
        raise IntegrityError(
            f"{where}: this is {describe(state)}, without the decoder that an autoencoder needs; "
            "load it with maehub.load(...), or name an autoencoder such as vit-b-pixel"
        )
    if options.classes:
        raise UsageError("an autoencoder has no head; classes= belongs to maehub.load(...)")
    _check_size(state, config, where)
    model = _empty(MaskedAutoencoder, config, preprocess)
    _check(state, model, where, describe(state))
    tensors, encoder = dict(state), _changed(config.encoder, options)
    if encoder.channels != config.encoder.channels and config.outputs:
        raise UsageError(
            f"{where}: the decoder predicts {config.target} of {config.encoder.channels} channels, which cannot be "
            f"adapted to {encoder.channels}; maehub.load(..., channels=) adapts the encoder alone"
        )
    if encoder != config.encoder:
        tensors = _adapted(tensors, config.encoder, encoder)
        transform = _changed_preprocess(model.preprocess, config.encoder, encoder)
        model = _empty(MaskedAutoencoder, replace(config, encoder=encoder), transform)
    model = _filled(model, tensors, options, where)
    model.encoder.origin = origin
    return model


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


def _empty(kind: type[Network], config: EncoderConfig | AutoencoderConfig, preprocess: Preprocess | None) -> Network:
    with torch.device("meta"):
        return kind(config, preprocess)  # type: ignore[arg-type]


def _check_size(state: Mapping[str, Tensor], config: EncoderConfig | AutoencoderConfig, where: str) -> None:
    """Refuse a configuration that is far too large for its tensors, before a network of that size is built."""
    encoder = config if isinstance(config, EncoderConfig) else config.encoder
    rows, columns = encoder.grid
    depth, largest = encoder.depth, rows * columns * encoder.width
    if isinstance(config, AutoencoderConfig):
        width = config.decoder_width if config.decoder_depth else encoder.width
        depth += config.decoder_depth
        largest = max(largest, rows * columns * width if config.decoder_depth else 0, width * config.prediction_width)
    if depth > len(state) or largest > sum(value.numel() for value in state.values()):
        raise IntegrityError(
            f"{where}: too few tensors for the configuration, depth {depth}, width {encoder.width}, grid "
            f"{rows}×{columns}; it looks like: {describe(state)}. Nothing was loaded"
        )


def _check(state: Mapping[str, Tensor], model: Encoder | MaskedAutoencoder, where: str, looks: str) -> None:
    """Every tensor is there, none is too many, each has its shape and is floating."""
    expected = to_official(model.state_dict()).state
    misfits = misfit(state, expected)
    unusable = [f"{n} {state[n].dtype}" for n in expected if n in state and not state[n].is_floating_point()]
    problems = {
        "missing": sorted(misfits.missing),
        "unexpected": sorted(misfits.unexpected),
        "of another shape": misfits.misshaped,
        "not floating": unusable,
    }
    if not any(problems.values()):
        return
    lines = [
        f"{what}, {len(names)} of {len(expected)}: {first_names(names, _MOST_LISTED)}"
        for what, names in problems.items()
        if names
    ]
    first = f"{where}: the tensors do not fit the network that was asked for; nothing was loaded"
    raise IntegrityError("\n".join([f"{first}. It looks like: {looks}", *lines]))


def _changed(config: EncoderConfig, options: LoadOptions) -> EncoderConfig:
    """The configuration after the departures that were asked for."""
    size = config.size if options.image_size is None else as_size(options.image_size, "image_size")
    grid_size(*size, config.patch_size)
    return replace(
        config,
        image_size=size,
        channels=config.channels if options.channels is None else options.channels,
        classes=config.classes if options.classes is None else options.classes,
        class_names=config.class_names if options.classes in (None, config.classes) else (),
        multi_label=config.multi_label and options.classes in (None, config.classes),
        positions=config.positions if options.positions is None else options.positions,
    )


def _changed_preprocess(preprocess: Preprocess, old: EncoderConfig, new: EncoderConfig) -> Preprocess:
    if new.channels != old.channels:  # its statistics were for other channels
        return Preprocess.evaluation(new.size, new.channels, new.patch_size)
    return preprocess if new.size == old.size else preprocess.with_size(new.size)


def _adapted(state: Mapping[str, Tensor], old: EncoderConfig, new: EncoderConfig) -> dict[str, Tensor]:
    """The tensors after the departures, each from the file's own."""
    state = dict(state)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state:
            state[name] = resize_table(state[name], old.grid, new.grid, new.positions)
    if new.channels != old.channels:
        state["patch_embed.proj.weight"] = _with_channels(state["patch_embed.proj.weight"], new.channels)
        if "decoder_pred.weight" in state:
            for name in ("decoder_pred.weight", "decoder_pred.bias"):
                state[name] = _predicting_channels(state[name], old.channels, new.channels)
    if new.classes != old.classes:
        for name in ("head.weight", "head.bias"):
            state.pop(name, None)
        if new.classes:
            weight = torch.empty(new.classes, new.width)
            state["head.weight"] = nn.init.trunc_normal_(weight, std=HEAD_STD)
            state["head.bias"] = torch.zeros(new.classes)
    return state


def _with_channels(kernel: Tensor, channels: int) -> Tensor:
    """The stem (D, C, P, P) for other channels, (D, ``channels``, P, P); see `LoadOptions`."""
    kernel = kernel.float()
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    old = kernel.shape[1]
    return kernel[:, torch.arange(channels) % old] * (old / channels)


def _predicting_channels(values: Tensor, old: int, channels: int) -> Tensor:
    """The pixel head's weight (P·P·C, d) or bias (P·P·C,) for other channels; see `LoadOptions`."""
    pixels = values.float().unflatten(0, (-1, old))  # (P·P, C) or (P·P, C, d): channels are fastest
    if channels == 1:
        return pixels.mean(dim=1)
    return pixels[:, torch.arange(channels) % old].flatten(0, 1)


def _filled(model: Network, state: Mapping[str, Tensor], options: LoadOptions, where: str) -> Network:
    """Give an empty network its tensors, in eval mode."""
    if options.check_finite:
        check_finite(state, where)
    dtype = options.dtype or torch.float32
    if not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating one, not {dtype}")
    tensors = {name: value.to(options.device, dtype) for name, value in state.items()}
    dialect = from_official(tensors, "module") if isinstance(model, MaskedAutoencoder) else tensors
    model.load_state_dict(dialect, strict=True, assign=True)
    return model.eval()
