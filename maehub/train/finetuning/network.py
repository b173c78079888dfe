"""Which network a fine-tuning configuration means: an encoder of ours or a network of timm, with the head to train."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from maehub.data import Labelled
from maehub.errors import UsageError
from maehub.hub import Located, load, locate
from maehub.images import Preprocess
from maehub.models import Encoder
from maehub.train.engine import Group, decayed_groups
from maehub.train.finetuning.classifier import AttentiveProbe, LinearProbe, as_classifier, drop_paths, freeze
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.recipes import Facts, Settings, settle
from maehub.train.networks import Backbone, backbone_of, open_backbone, pair

Groups = Callable[[float, float], list[dict[str, Any]]]
"""Weight decay and layer decay to the optimizer's groups of parameters, with the factor ``lr_scale`` of each."""


@dataclass(frozen=True)
class Trainee:
    """A network from preprocessed pictures (B, C, H, W) to logits (B, classes), and how it is trained."""

    network: nn.Module
    preprocess: Preprocess
    groups: Groups


class Fitted(NamedTuple):
    """A network, and the recipe fitted to it and to the data."""

    trainee: Trainee
    facts: Facts
    settings: Settings


def find_weights_of(config: FinetuneConfig) -> Located | None:
    """The files that the model's name means, downloaded where they are not here; None where timm or nobody has them."""
    if config.model.startswith(("timm/", "untrained/")):
        return None
    if config.model.startswith("baseline/"):
        raise UsageError(f"{config.model} is no network, so it cannot be trained; `maehub probe` can measure it")
    return locate(config.model, "encoder")


def trainee_of(config: FinetuneConfig, found: Located | None, training: Labelled, group: Group) -> Fitted:
    """Build what is trained, on the CPU, and settle the recipe.

    Args:
        found: what `find_weights_of` gives.
        training: the labelled pictures.

    Raises:
        UsageError: a setting that cannot be.
        HubError: timm's weights cannot be fetched.
    """
    size = pair(config.image_size)
    if found is not None:
        encoder = load(found, image_size=size, channels=config.channels)
        backbone = backbone_of(config.model, encoder)
    else:
        if config.channels not in (None, 3):
            raise UsageError(f"--channels {config.channels} is for weights of maehub; {config.model} takes 3")
        backbone = open_backbone(config.model, image_size=size, seed=config.seed)
    if backbone.preprocess.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, and {config.model} takes {backbone.preprocess.channels}")
    facts = Facts(
        backbone.width,
        backbone.depth,
        not config.model.startswith("untrained/"),
        max(backbone.preprocess.size),
        len(training),
        len(training.classes),
        training.multi_label,
    )
    settings = settle(config, facts)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        if settings.head != "linear":
            trainee = _frozen(config, settings, backbone, len(training.classes), group)
        elif isinstance(backbone.module, Encoder):
            trainee = _ours(config, settings, backbone.module, training)
        else:
            trainee = _timms(config, settings, backbone, len(training.classes))
    return Fitted(trainee, facts, settings)


def _ours(config: FinetuneConfig, settings: Settings, encoder: Encoder, training: Labelled) -> Trainee:
    network = as_classifier(
        encoder, training.classes, pool=settings.pool, multi_label=training.multi_label, seed=config.seed
    )
    depth = network.config.depth
    if config.blocks is not None:
        freeze(network, config.blocks)
    drop_paths(list(network.blocks), settings.drop_path)  # type: ignore[arg-type]
    return Trainee(network, network.preprocess, lambda wd, ld: decayed_groups(network, depth, wd, ld))


def _timms(config: FinetuneConfig, settings: Settings, backbone: Backbone, classes: int) -> Trainee:
    """A network of timm with a fresh head, pooled as timm pools it unless ``pool`` says otherwise."""
    from timm.layers.drop import DropPath

    optim: Any = import_module("timm.optim")
    if not hasattr(optim, "param_groups_layer_decay"):  # timm before 1.0.12
        optim = import_module("timm.optim.optim_factory")
    grouped = optim.param_groups_layer_decay
    if config.blocks is not None:
        raise UsageError(f"--blocks is for networks of maehub, and {config.model} is timm's")
    network: Any = backbone.module.requires_grad_(True)
    pools = {None: {}, "cls": {"global_pool": "token"}, "mean": {"global_pool": "avg"}}
    network.reset_classifier(classes, **pools[config.pool])
    blocks = [block for block in getattr(network, "blocks", []) if hasattr(block, "drop_path1")]
    for number, block in enumerate(blocks):
        share = settings.drop_path * number / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)
    undecayed: set[str] = getattr(network, "no_weight_decay", set)()

    def groups(weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        return grouped(network, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay)

    return Trainee(network, backbone.preprocess, groups)


def _frozen(config: FinetuneConfig, settings: Settings, backbone: Backbone, classes: int, group: Group) -> Trainee:
    if config.fsdp:
        raise UsageError(f"--fsdp is for training a network, which --recipe {settings.recipe} freezes")
    network: nn.Module
    if settings.head == "attentive":
        network = AttentiveProbe(backbone, classes)
    else:
        pool = settings.pool if config.pool or settings.pool in backbone.pools else backbone.pools[0]
        network = LinearProbe(backbone, pool, classes, group)

    def groups(weight_decay: float, _: float) -> list[dict[str, Any]]:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    return Trainee(network, backbone.preprocess, groups)
