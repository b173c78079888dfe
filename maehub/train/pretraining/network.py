"""The network that is pretrained, how it looks at pictures, and how many of them fit into memory."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from maehub.data import Key
from maehub.errors import IntegrityError, UsageError
from maehub.hub import Located, is_model, load, load_autoencoder, locate, model_info
from maehub.images import Augmentation
from maehub.models import COLOURS, AutoencoderConfig, Encoder, MaskedAutoencoder
from maehub.train.engine import Group, Precision, computes_bf16, pictures_fit
from maehub.train.networks import costs, pair, preset
from maehub.train.pretraining.config import PretrainConfig
from maehub.train.pretraining.objective import Objective
from maehub.train.pretraining.views import Batch, View

log = logging.getLogger("maehub")

# decoder (width, depth, heads) of a preset; He et al. 2021 use one for all sizes
_DECODERS = {"vit-nano": (160, 5, 5)}
_PAPER_DECODER = (512, 8, 16)


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


def build_network(config: PretrainConfig, files: Located | None, vocabulary: int = 0) -> MaskedAutoencoder:
    """The autoencoder to train, on the CPU: fresh, with weights, or with an encoder's weights and a fresh decoder.

    Args:
        files: what `find_weights` gives.
        vocabulary: tokens that the caller's tokenizer knows; 0 for ViT's mean colours.
    """
    size = pair(config.image_size)
    if files is None:
        return _fresh(config, None, vocabulary)
    try:
        model = load_autoencoder(files, image_size=size, channels=config.channels)
    except IntegrityError as error:
        try:
            encoder = load(files, image_size=size, channels=config.channels, classes=0)
        except IntegrityError:
            raise error from None
        log.info("%s has no decoder: a fresh one is trained", config.from_)
        return _fresh(config, encoder, vocabulary)
    if model.config.target == "unknown":
        if config.target is None:
            raise UsageError(f"what {config.from_} was trained to predict is unknown: say it by --target")
        model = load_autoencoder(files, image_size=size, channels=config.channels, target=config.target)
    names = ("target", "decoder_width", "decoder_depth", "decoder_heads", "mask_tokens")
    asked = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    has = {name: getattr(model.config, name) for name in asked}
    if other := ", ".join(f"{name} {has[name]}" for name in asked if asked[name] != has[name]):
        log.info("%s: other than %s was asked for: its encoder is kept, the decoder is fresh", config.from_, other)
        return _fresh(config, model.encoder, vocabulary, model.config)
    return model


def view_of(config: PretrainConfig, network: AutoencoderConfig) -> View:
    """How a run looks at its pictures."""
    encoder = network.encoder
    if config.rot90 and encoder.size[0] != encoder.size[1]:
        raise UsageError(f"--rot90 needs square crops, and these are {encoder.size[0]}×{encoder.size[1]}")
    if config.corruption != (1.0, 0.0, 0.0) and network.mask_tokens != "encoder":
        raise UsageError("--corruption leaves patches for the encoder to see: it needs --mask-tokens encoder")
    if encoder.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, and {config.from_} takes {encoder.channels}: say --channels")
    augmentation = Augmentation(
        config.augment, config.crop_scale, config.hflip, config.vflip, config.rot90, config.rotate
    )
    return View(encoder.size, encoder.patch_size, encoder.channels, augmentation, config.strategy, config.mask_ratio)


def kept_patches(view: View) -> int:
    """How many patches every mask of a view leaves visible."""
    masked = view.masks([0])
    if not masked.any():
        raise UsageError(f"--mask-ratio {view.mask_ratio} hides none of {masked.shape[1]} patches: take a higher one")
    return int((~masked).sum())


def _fresh(
    config: PretrainConfig, encoder: Encoder | None, vocabulary: int, like: AutoencoderConfig | None = None
) -> MaskedAutoencoder:
    """A fresh autoencoder, with the weights of an encoder if there is one and a decoder shaped ``like`` another's."""
    if encoder is None:
        size, preprocess = preset(config.model, config.image_size, config.channels)
        width, depth, heads = _DECODERS.get(config.model, _PAPER_DECODER)
    else:
        size, preprocess = replace(encoder.config, pool="cls", classes=0), encoder.preprocess
        width, depth, heads = _PAPER_DECODER
    if like is not None:
        width, depth, heads = like.decoder_width, like.decoder_depth, like.decoder_heads
    target = config.target or "normalised_pixels"
    outputs = {"pca": config.pca_components, "tokens": vocabulary or COLOURS.get(size.channels, 0)}.get(target, 0)
    network = AutoencoderConfig(
        size,
        config.decoder_width or width,
        depth if config.decoder_depth is None else config.decoder_depth,
        config.decoder_heads or heads,
        target,
        config.mask_tokens or (like.mask_tokens if like else "decoder"),
        outputs,
        "mean-colour" if target == "tokens" and not vocabulary else "",
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        model = MaskedAutoencoder(network, preprocess)
    if encoder is not None:
        # A classifier that pools the mean has fc_norm instead of norm, which then is fresh.
        brought = {name: value for name, value in encoder.state_dict().items() if not name.startswith("fc_norm.")}
        model.encoder.load_state_dict(model.encoder.state_dict() | brought)
        model.encoder.origin = encoder.origin
    return model


def views_fit(config: PretrainConfig, objective: Objective, view: View, group: Group) -> Callable[[int], bool]:
    """Whether pretraining on so many views at once fits.

    On a GPU forward and backward are tried; on a CPU, where nothing says no, memory is estimated.
    """
    network = objective.model.config

    def estimate() -> tuple[float, float]:
        precise: Precision = "bf16" if computes_bf16(config.precision, group.device) else "fp32"
        kept, corrupts = objective.kept, objective.corrupts
        work = costs.work_of(network, kept, share=config.predict_share, loss_on=config.loss_on, corrupts=corrupts)
        parameters, shards = costs.count_parameters(network), group.size if config.fsdp else 1
        fixed = costs.fixed_bytes(parameters, precise, shards=shards, largest_block=costs.block_parameters(network))
        return fixed, costs.activation_bytes(network, work, precise, checkpoint=config.checkpoint_activations)

    blank = partial(_blank, view, device=group.device)
    return pictures_fit(objective, blank, group, config, estimate)


def _blank(view: View, size: int, device: torch.device) -> Sequence[Tensor]:
    keys = [Key(0, number, number) for number in range(size)]
    batch: Batch = view.batch(view.empty(size).zero_(), keys).to(device)
    return batch.pixels, batch.masked, batch.seeds
