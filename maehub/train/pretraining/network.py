"""The network that is pretrained, and how many views fit into memory."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maehub.data import Key
from maehub.errors import IntegrityError, UsageError, log
from maehub.hub import Located, is_model, load, load_autoencoder, locate, model_info
from maehub.images import Preprocess
from maehub.models import COLOURS, AutoencoderConfig, Encoder, EncoderConfig, MaskedAutoencoder, Precision
from maehub.train.engine import Group, pictures_fit
from maehub.train.networks import costs, pair, preset
from maehub.train.pretraining.objective import Objective
from maehub.train.pretraining.views import Batch, View

# The decoder of a preset that has another than `AutoencoderConfig`; He et al. 2021 use one for all sizes.
_DECODERS: dict[str, dict[str, Any]] = {"vit-nano": {"decoder_width": 160, "decoder_depth": 5, "decoder_heads": 5}}


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


def build_network(
    name: str,
    files: Located | None,
    asked: dict[str, Any],
    *,
    image_size: tuple[int, ...],
    channels: int | None,
    pca_components: int,
    vocabulary: int,
    seed: int,
) -> MaskedAutoencoder:
    """The autoencoder to train, on the CPU: fresh, with weights, or with an encoder's weights and a fresh decoder.

    Args:
        name: of the weights, or of a preset.
        files: what `find_weights` gives.
        asked: fields of `AutoencoderConfig` that the user decides: the target, the decoder's shape, the mask tokens.
        vocabulary: tokens that the caller's tokenizer knows; 0 for ViT's mean colours.
        seed: of fresh weights.
    """

    def fresh(
        fields: dict[str, Any], size: EncoderConfig, preprocess: Preprocess, encoder: Encoder | None = None
    ) -> MaskedAutoencoder:
        """A fresh autoencoder, with the weights of an encoder if there is one."""
        target = fields.get("target", AutoencoderConfig.target)
        outputs = {"pca": pca_components, "tokens": vocabulary or COLOURS.get(size.channels, 0)}.get(target, 0)
        network = AutoencoderConfig(
            replace(size, pool="cls", classes=0),
            **fields,
            outputs=outputs,
            tokenizer="mean-colour" if target == "tokens" and not vocabulary else "",
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = MaskedAutoencoder(network, preprocess)
        if encoder is not None:
            # A classifier that pools the mean has fc_norm instead of norm, which then is fresh.
            brought = {name: value for name, value in encoder.state_dict().items() if not name.startswith("fc_norm.")}
            model.encoder.load_state_dict(model.encoder.state_dict() | brought)
            model.encoder.origin = encoder.origin
        return model

    if files is None:
        return fresh(_DECODERS.get(name, {}) | asked, *preset(name, image_size, channels))
    size = pair(image_size)
    try:
        model = load_autoencoder(files, image_size=size, channels=channels)
    except IntegrityError as error:
        try:
            encoder = load(files, image_size=size, channels=channels, classes=0)
        except IntegrityError:
            raise error from None
        log.info("%s has no decoder: a fresh one is trained", name)
        return fresh(asked, encoder.config, encoder.preprocess, encoder)
    if model.config.target == "unknown":
        if "target" not in asked:
            raise UsageError(f"what {name} was trained to predict is unknown: say it by --target")
        model = load_autoencoder(files, image_size=size, channels=channels, target=asked["target"])
    has = {field: getattr(model.config, field) for field in asked}
    if other := ", ".join(f"{field} {has[field]}" for field in asked if asked[field] != has[field]):
        log.info("%s: other than %s was asked for: its encoder is kept, the decoder is fresh", name, other)
        shape = ("decoder_width", "decoder_depth", "decoder_heads", "mask_tokens")
        like = {field: getattr(model.config, field) for field in shape}
        return fresh(like | asked, model.encoder.config, model.encoder.preprocess, model.encoder)
    return model


def kept_patches(view: View) -> int:
    """How many patches every mask of a view leaves visible."""
    masked = view.masks([0])
    if not masked.any():
        raise UsageError(f"--mask-ratio {view.mask_ratio} hides none of {masked.shape[1]} patches: take a higher one")
    return int((~masked).sum())


def views_fit(
    objective: Objective, view: View, group: Group, precision: Precision, *, shard: bool, checkpoint: bool
) -> Callable[[int], bool]:
    """Whether pretraining on so many views at once fits.

    On a GPU forward and backward are tried; on a CPU, where nothing says no, memory is estimated.
    """
    network = objective.model.config

    def estimate() -> tuple[float, float]:
        kept, corrupts, share = objective.kept, objective.corrupts, objective.predict_share
        work = costs.work_of(network, kept, share=share, loss_on=objective.loss_on, corrupts=corrupts)
        parameters, shards = costs.count_parameters(network), group.size if shard else 1
        fixed = costs.fixed_bytes(parameters, precision, shards=shards, largest_block=costs.block_parameters(network))
        return fixed, costs.activation_bytes(network, work, precision, checkpoint=checkpoint)

    blank = partial(_blank, view, device=group.device)
    return pictures_fit(objective, blank, group, precision, shard=shard, estimate=estimate)


def _blank(view: View, size: int, device: torch.device) -> Sequence[Tensor]:
    keys = [Key(0, number, number) for number in range(size)]
    batch: Batch = view.batch(view.empty(size).zero_(), keys).to(device)
    return batch.pixels, batch.masked, batch.seeds
