"""Which network a pretraining configuration means, and how it looks at pictures."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from maehub.data import Key
from maehub.errors import IntegrityError, UsageError
from maehub.hub import Located, is_model, load, load_autoencoder, locate, model_info
from maehub.images import Augmentation, Size
from maehub.models import COLOURS, AutoencoderConfig, Encoder, MaskedAutoencoder
from maehub.train.engine import MEMORY_SHARE, Group, Precision, autocast, available_bytes, computes_bf16, pass_fits
from maehub.train.networks import (
    activation_bytes,
    block_parameters,
    count_parameters,
    fixed_bytes,
    pair,
    preset,
    work_of,
)
from maehub.train.pretraining.config import PretrainConfig
from maehub.train.pretraining.views import Batch, View

log = logging.getLogger("maehub")

# decoder (width, depth, heads) of a preset; He et al. 2021 use one for all sizes
_DECODERS = {"vit-nano": (160, 5, 5)}
_PAPER_DECODER = (512, 8, 16)


def find_weights(config: PretrainConfig) -> Located | None:
    """The files that ``from`` names, downloaded where they are not here; None from scratch."""
    if not config.from_:
        return None
    try:
        return locate(config.from_, "pretrain")  # of vit-b the one on normalised pixels, not the one that draws
    except UsageError:
        if is_model(config.from_) and model_info(config.from_).role != "autoencoder":
            return locate(config.from_, "encoder")
        raise


def build_network(config: PretrainConfig, found: Located | None, vocabulary: int = 0) -> MaskedAutoencoder:
    """The autoencoder to train, on the CPU: fresh, with weights, or with an encoder's weights and a fresh decoder.

    Args:
        found: what `find_weights` gives.
        vocabulary: tokens that the caller's tokenizer knows; 0 for ViT's mean colours.
    """
    size: int | Size | None = pair(config.image_size)
    if found is None:
        return _fresh(config, None, vocabulary)
    try:
        model = load_autoencoder(found, image_size=size, channels=config.channels)
    except IntegrityError as error:
        try:
            encoder = load(found, image_size=size, channels=config.channels, classes=0)
        except IntegrityError:
            raise error from None
        log.info("%s has no decoder: a fresh one is trained", config.from_)
        return _fresh(config, encoder, vocabulary)
    if model.config.target == "unknown":
        if config.target is None:
            raise UsageError(f"what {config.from_} was trained to predict is unknown: say it by --target")
        model = load_autoencoder(found, image_size=size, channels=config.channels, target=config.target)
    if other := _other_decoder(config, model.config):
        log.info("%s: other than %s was asked for: its encoder is kept, the decoder is fresh", config.from_, other)
        return _fresh(config, model.encoder, vocabulary, model.config)
    return model


def view_of(config: PretrainConfig, network: AutoencoderConfig) -> View:
    """How a run looks at its pictures."""
    encoder = network.encoder
    augmentation = Augmentation(
        config.augment, config.crop_scale, config.hflip, config.vflip, config.rot90, config.rotate
    )
    if config.rot90 and encoder.size[0] != encoder.size[1]:
        raise UsageError(f"--rot90 needs square crops, and these are {encoder.size[0]}×{encoder.size[1]}")
    if config.corruption != (1.0, 0.0, 0.0) and network.mask_tokens != "encoder":
        raise UsageError("--corruption leaves patches for the encoder to see: it needs --mask-tokens encoder")
    if encoder.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, and {config.from_} takes {encoder.channels}: say --channels")
    return View(
        encoder.size, encoder.patch_size, encoder.channels, augmentation, config.strategy, config.mask_ratio
    )  # fmt: skip


def kept_patches(view: View) -> int:
    """How many patches every mask of a view leaves visible."""
    masked = view.masks([0])
    if not masked.any():
        raise UsageError(f"--mask-ratio {view.mask_ratio} hides none of {masked.shape[1]} patches: take a higher one")
    return int((~masked).sum())


def _other_decoder(config: PretrainConfig, network: AutoencoderConfig) -> str:
    """What of a file's decoder is not as asked for, in words; empty if it can be trained on."""
    asked = {
        "target": config.target,
        "decoder_width": config.decoder_width,
        "decoder_depth": config.decoder_depth,
        "decoder_heads": config.decoder_heads,
        "mask_tokens": config.mask_tokens,
    }
    has = {name: getattr(network, name) for name in asked}
    return ", ".join(f"{name} {has[name]}" for name, value in asked.items() if value not in (None, has[name]))


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
    outputs = {"pca": config.pca_components, "tokens": vocabulary or COLOURS[size.channels]}.get(target, 0)
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


def views_fit(
    config: PretrainConfig, objective: nn.Module, network: AutoencoderConfig, view: View, kept: int, group: Group
) -> Callable[[int], bool]:
    """Whether pretraining on so many views at once fits.

    On a GPU forward and backward are tried; on a CPU, where nothing says no, memory is estimated.
    """
    device, precise = group.device, autocast(config, group.device)
    if device.type == "cuda" and not config.fsdp:
        return lambda size: pass_fits(objective, _blank(view, size, device), device, precise)
    precision: Precision = "bf16" if computes_bf16(config, device) else "fp32"
    free = available_bytes() / group.local_size
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    corrupts = config.corruption[0] < 1
    work = work_of(network, kept, share=config.predict_share, loss_on=config.loss_on, corrupts=corrupts)
    each = activation_bytes(network, kept, precision, work=work, checkpoint=config.checkpoint_activations)
    shards = group.size if config.fsdp else 1
    free -= fixed_bytes(count_parameters(network), precision, shards=shards, largest_block=block_parameters(network))
    return lambda size: size * each <= MEMORY_SHARE * free


def _blank(view: View, size: int, device: torch.device) -> Sequence[Tensor]:
    keys = [Key(0, number, number) for number in range(size)]
    batch: Batch = view.batch(view.empty(size).zero_(), keys).to(device)
    return batch.pixels, batch.masked, batch.seeds
