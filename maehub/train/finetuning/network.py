"""The network that is fine-tuned: an encoder of ours or a network of timm, with the head to train."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from maehub.data import Labelled
from maehub.errors import UsageError
from maehub.hub import Located, load, locate
from maehub.images import Preprocess
from maehub.models import Encoder, FullPrecision
from maehub.train.engine import Group, decayed_groups, matrix_groups
from maehub.train.finetuning.classifier import AttentiveProbe, LinearProbe, as_classifier, drop_paths, freeze
from maehub.train.finetuning.config import HeadPool
from maehub.train.finetuning.recipes import Settings
from maehub.train.networks import Backbone, backbone_of, open_backbone, pair


@dataclass(frozen=True)
class Classifier:
    """A network from preprocessed pictures (B, C, H, W) to logits (B, classes), and how it is trained."""

    network: nn.Module
    preprocess: Preprocess
    groups: Callable[[float, float], list[dict[str, Any]]]
    """Weight decay and layer decay to the optimizer's groups of parameters, with the factor ``lr_scale`` of each."""


def find_weights(name: str) -> Located | None:
    """The files that a model's name means, downloaded where they are not here; None where timm or nobody has them."""
    if name.startswith(("timm/", "untrained/")):
        return None
    if name.startswith("baseline/"):
        raise UsageError(f"{name} is no network, so it cannot be trained; `maehub probe` can measure it")
    return locate(name, "encoder")


def open_network(
    name: str,
    files: Located | None,
    *,
    image_size: tuple[int, ...],
    channels: int | None,
    seed: int,
    classes: int | None = None,
) -> Backbone:
    """The network to start from, on the CPU, from what `find_weights` gives; ``seed`` is that of fresh weights.

    With 0 ``classes`` a head that it has is left out.
    """
    size = pair(image_size)
    if files is not None:
        backbone = backbone_of(name, load(files, image_size=size, channels=channels, classes=classes))
    elif channels not in (None, 3):
        raise UsageError(f"--channels {channels} is for weights of maehub; {name} takes 3")
    else:
        backbone = open_backbone(name, image_size=size, seed=seed)
    if backbone.preprocess.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, and {name} takes {backbone.preprocess.channels}")
    return backbone


def build_classifier(
    backbone: Backbone,
    settings: Settings,
    training: Labelled,
    group: Group,
    *,
    pool: HeadPool | None,
    seed: int,
) -> Classifier:
    """What is trained, on the CPU: the network with a fresh head, by the recipe. ``pool`` is the user's wish."""
    classes, encoder = training.classes, backbone.module
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if settings.head != "linear":
            own = settings.pool if pool or settings.pool in backbone.pools else backbone.pools[0]
            attentive, count = settings.head == "attentive", len(classes)
            probe = AttentiveProbe(backbone, count) if attentive else LinearProbe(backbone, own, count, group)
            return Classifier(probe, backbone.preprocess, lambda weight_decay, _: matrix_groups(probe, weight_decay))
        if not isinstance(encoder, Encoder):
            return _timms(backbone, settings, len(classes), pool, numeric=training.numeric)
        kind: Any = {"multi_label": training.multi_label, "numeric": training.numeric}
        fresh_norm = settings.head_start == "zero"
        network = as_classifier(encoder, classes, pool=settings.pool, seed=seed, fresh_norm=fresh_norm, **kind)
    depth = network.config.depth
    if settings.blocks is not None:
        freeze(network, settings.blocks)
    drop_paths(list(network.blocks), settings.drop_path)
    return Classifier(network, network.preprocess, lambda wd, ld: decayed_groups(network, depth, wd, ld))


def _timms(backbone: Backbone, settings: Settings, classes: int, pool: HeadPool | None, *, numeric: bool) -> Classifier:
    """A network of timm with a fresh head, pooled as timm pools it unless ``pool`` says otherwise."""
    optim: Any = import_module("timm.optim")
    if not hasattr(optim, "param_groups_layer_decay"):  # timm before 1.0.12
        optim = import_module("timm.optim.optim_factory")
    grouped = optim.param_groups_layer_decay
    if settings.blocks is not None:
        raise UsageError(f"--blocks is for networks of maehub, and {backbone.name} is timm's")
    network: Any = backbone.module.requires_grad_(True)
    pools = {None: {}, "cls": {"global_pool": "token"}, "mean": {"global_pool": "avg"}}
    network.reset_classifier(classes, **pools[pool])
    if numeric and isinstance(head := network.get_classifier(), nn.Linear):
        head.__class__ = FullPrecision
    blocks = [block for block in getattr(network, "blocks", []) if hasattr(block, "drop_path1")]
    drop_paths(blocks, settings.drop_path, ("drop_path1", "drop_path2"))
    undecayed: set[str] = getattr(network, "no_weight_decay", set)()

    return Classifier(
        network,
        backbone.preprocess,
        lambda wd, ld: grouped(network, wd, no_weight_decay_list=undecayed, layer_decay=ld),
    )


def optimizer_of(classifier: Classifier, settings: Settings) -> torch.optim.Optimizer:
    groups = classifier.groups(settings.weight_decay, settings.layer_decay)
    if settings.optimizer == "lars":
        from timm.optim.lars import Lars

        # As published, rates of matrices are adapted although there is no weight decay; those of vectors are not.
        adapted = [group | {"always_adapt": group["params"][0].ndim > 1} for group in groups if group["params"]]
        return Lars(adapted, lr=0.0, momentum=0.9, trust_coeff=0.001)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)
