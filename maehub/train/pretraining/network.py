"""The network that is pretrained, how it looks at pictures, and how many of them fit into memory."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from maehub.data import Key
from maehub.errors import IntegrityError, UsageError
from maehub.hub import Located, is_model, load, load_autoencoder, locate, model_info
from maehub.images import Augmentation, Size
from maehub.models import COLOURS, AutoencoderConfig, Encoder, MaskedAutoencoder, Strategy
from maehub.train.engine import Group, Precision, computes_bf16, pictures_fit
from maehub.train.networks import (
    activation_bytes,
    block_parameters,
    count_parameters,
    fixed_bytes,
    pair,
    preset,
    work_of,
)
from maehub.train.pretraining.config import MaskTokens, Target
from maehub.train.pretraining.objective import Objective
from maehub.train.pretraining.views import Batch, View

log = logging.getLogger("maehub")

# decoder (width, depth, heads) of a preset; He et al. 2021 use one for all sizes
_DECODERS = {"vit-nano": (160, 5, 5)}
_PAPER_DECODER = (512, 8, 16)


@dataclass(frozen=True)
class NetworkOptions:
    """Which network is asked for; None is what the weights have, or the preset."""

    preset: str
    weights: str = ""
    """Their name; empty from scratch."""
    image_size: tuple[int, ...] = ()
    channels: int | None = None
    target: Target | None = None
    pca_components: int = 96
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    mask_tokens: MaskTokens | None = None
    seed: int = 0
    """Of fresh weights."""


def find_weights(name: str) -> Located | None:
    """The files that a name means, downloaded where they are not here; None for the empty one, from scratch."""
    if not name:
        return None
    try:
        return locate(name, "pretrain")  # of vit-b the one on normalised pixels, not the one that draws
    except UsageError:
        if is_model(name) and model_info(name).role != "autoencoder":
            return locate(name, "encoder")
        raise


def build_network(options: NetworkOptions, files: Located | None, vocabulary: int = 0) -> MaskedAutoencoder:
    """The autoencoder to train, on the CPU: fresh, with weights, or with an encoder's weights and a fresh decoder.

    Args:
        files: what `find_weights` gives.
        vocabulary: tokens that the caller's tokenizer knows; 0 for ViT's mean colours.
    """
    size: int | Size | None = pair(options.image_size)
    if files is None:
        return _fresh(options, None, vocabulary)
    try:
        model = load_autoencoder(files, image_size=size, channels=options.channels)
    except IntegrityError as error:
        try:
            encoder = load(files, image_size=size, channels=options.channels, classes=0)
        except IntegrityError:
            raise error from None
        log.info("%s has no decoder: a fresh one is trained", options.weights)
        return _fresh(options, encoder, vocabulary)
    if model.config.target == "unknown":
        if options.target is None:
            raise UsageError(f"what {options.weights} was trained to predict is unknown: say it by --target")
        model = load_autoencoder(files, image_size=size, channels=options.channels, target=options.target)
    if other := _other_decoder(options, model.config):
        log.info("%s: other than %s was asked for: its encoder is kept, the decoder is fresh", options.weights, other)
        return _fresh(options, model.encoder, vocabulary, model.config)
    return model


def make_view(
    network: AutoencoderConfig,
    augmentation: Augmentation,
    *,
    strategy: Strategy,
    mask_ratio: float,
    corruption: tuple[float, float, float],
    weights: str = "",
) -> View:
    """How a run looks at its pictures.

    Args:
        weights: name of what the network came from, for an error.
    """
    encoder = network.encoder
    if augmentation.rot90 and encoder.size[0] != encoder.size[1]:
        raise UsageError(f"--rot90 needs square crops, and these are {encoder.size[0]}×{encoder.size[1]}")
    if corruption != (1.0, 0.0, 0.0) and network.mask_tokens != "encoder":
        raise UsageError("--corruption leaves patches for the encoder to see: it needs --mask-tokens encoder")
    if encoder.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, and {weights} takes {encoder.channels}: say --channels")
    return View(encoder.size, encoder.patch_size, encoder.channels, augmentation, strategy, mask_ratio)


def kept_patches(view: View) -> int:
    """How many patches every mask of a view leaves visible."""
    masked = view.masks([0])
    if not masked.any():
        raise UsageError(f"--mask-ratio {view.mask_ratio} hides none of {masked.shape[1]} patches: take a higher one")
    return int((~masked).sum())


def _other_decoder(options: NetworkOptions, network: AutoencoderConfig) -> str:
    """What of a file's decoder is not as asked for, in words; empty if it can be trained on."""
    asked = {
        "target": options.target,
        "decoder_width": options.decoder_width,
        "decoder_depth": options.decoder_depth,
        "decoder_heads": options.decoder_heads,
        "mask_tokens": options.mask_tokens,
    }
    has = {name: getattr(network, name) for name in asked}
    return ", ".join(f"{name} {has[name]}" for name, value in asked.items() if value not in (None, has[name]))


def _fresh(
    options: NetworkOptions, encoder: Encoder | None, vocabulary: int, like: AutoencoderConfig | None = None
) -> MaskedAutoencoder:
    """A fresh autoencoder, with the weights of an encoder if there is one and a decoder shaped ``like`` another's."""
    if encoder is None:
        size, preprocess = preset(options.preset, options.image_size, options.channels)
        width, depth, heads = _DECODERS.get(options.preset, _PAPER_DECODER)
    else:
        size, preprocess = replace(encoder.config, pool="cls", classes=0), encoder.preprocess
        width, depth, heads = _PAPER_DECODER
    if like is not None:
        width, depth, heads = like.decoder_width, like.decoder_depth, like.decoder_heads
    target = options.target or "normalised_pixels"
    outputs = {"pca": options.pca_components, "tokens": vocabulary or COLOURS.get(size.channels, 0)}.get(target, 0)
    network = AutoencoderConfig(
        size,
        options.decoder_width or width,
        depth if options.decoder_depth is None else options.decoder_depth,
        options.decoder_heads or heads,
        target,
        options.mask_tokens or (like.mask_tokens if like else "decoder"),
        outputs,
        "mean-colour" if target == "tokens" and not vocabulary else "",
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(options.seed)
        model = MaskedAutoencoder(network, preprocess)
    if encoder is not None:
        # A classifier that pools the mean has fc_norm instead of norm, which then is fresh.
        brought = {name: value for name, value in encoder.state_dict().items() if not name.startswith("fc_norm.")}
        model.encoder.load_state_dict(model.encoder.state_dict() | brought)
        model.encoder.origin = encoder.origin
    return model


def views_fit(
    objective: Objective,
    view: View,
    group: Group,
    *,
    precision: Precision = "auto",
    shard: bool = False,
    checkpoint_activations: bool = False,
) -> Callable[[int], bool]:
    """Whether pretraining on so many views at once fits.

    On a GPU forward and backward are tried; on a CPU, where nothing says no, memory is estimated.
    """
    network = objective.model.config

    def estimate() -> tuple[float, float]:
        precise: Precision = "bf16" if computes_bf16(precision, group.device) else "fp32"
        work = work_of(
            network,
            objective.kept,
            share=objective.predict_share,
            loss_on=objective.loss_on,
            corrupts=objective.corrupts,
        )
        shards = group.size if shard else 1
        largest = block_parameters(network)
        fixed = fixed_bytes(count_parameters(network), precise, shards=shards, largest_block=largest)
        each = activation_bytes(network, objective.kept, precise, work=work, checkpoint=checkpoint_activations)
        return fixed, each

    blank = partial(_blank, view, device=group.device)
    return pictures_fit(objective, blank, group, precision=precision, shard=shard, estimate=estimate)


def _blank(view: View, size: int, device: torch.device) -> Sequence[Tensor]:
    keys = [Key(0, number, number) for number in range(size)]
    batch: Batch = view.batch(view.empty(size).zero_(), keys).to(device)
    return batch.pixels, batch.masked, batch.seeds
