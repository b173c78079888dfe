"""What is trained, and its loss: encoders with a head, stochastic depth, frozen parts, probes on a frozen network."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maehub.data import Labelled
from maehub.errors import UsageError
from maehub.models import Block, Encoder, Pool
from maehub.train.engine import Group
from maehub.train.networks import Backbone
from maehub.weights import HEAD_STD

_PROBE_STD = 0.01  # of a linear probe's fresh weights, as published
_BATCH_NORM_EPS = 1e-6
_HEAD_WIDTH = 64  # of the attention that pools


class Objective(nn.Module):
    """A network and its loss: soft-target cross-entropy, binary cross-entropy of each label, or Huber's of numbers.

    ``unit``, (columns,) float32, is the deviation of numbers, what their loss is measured in.
    """

    def __init__(
        self, network: nn.Module, positive: Tensor | None, *, multi_label: bool, unit: Tensor | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.multi_label = multi_label
        self.unit: Tensor | None
        self.register_buffer("unit", unit, persistent=False)
        self.positive: Tensor | None
        self.register_buffer("positive", positive, persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images (B, C, H, W) and targets (B, classes) to the mean loss, () float32."""
        logits = self.network(images).float()
        if self.unit is not None:
            return F.huber_loss(logits / self.unit, targets / self.unit)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.positive)
        return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean()


def class_weights(labels: np.ndarray, classes: int) -> Tensor:
    """(classes,) float32. What makes every class count alike; of several labels, how much more a present one counts."""
    if labels.ndim == 2:
        present = labels.sum(axis=0)
        return torch.from_numpy(((len(labels) - present) / np.maximum(present, 1)).astype(np.float32))
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy((len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32))


def as_classifier(
    encoder: Encoder,
    classes: Sequence[str],
    *,
    pool: Pool,
    multi_label: bool = False,
    numeric: bool = False,
    seed: int = 0,
    fresh_norm: bool = True,
) -> Encoder:
    """An encoder on the CPU with a head to be fine-tuned: its weights, and fresh ones for what they lack.

    With the mean the final norm is a fresh ``fc_norm``, unless the weights have one; without ``fresh_norm`` it begins
    as the norm that they have. The head is kept where it is one
    of the same classes, else drawn with the published small deviation. Positions are trained, as published.
    """
    old = encoder.config
    names = tuple(classes)
    kind: Any = {"multi_label": multi_label, "numeric": numeric}
    config = replace(old, classes=len(names), class_names=names, pool=pool, **kind)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = Encoder(config, encoder.preprocess)
        nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
    fresh, brought = model.state_dict(), encoder.state_dict()
    keeps = config == old
    wanted = {name for name in fresh if name in brought and (keeps or not name.startswith("head."))}
    if not fresh_norm and pool == "mean" and old.pool != "mean":
        brought |= {name.replace("norm", "fc_norm", 1): brought[name] for name in ("norm.weight", "norm.bias")}
        wanted |= {"fc_norm.weight", "fc_norm.bias"}
    model.load_state_dict(fresh | {name: brought[name] for name in wanted})
    model.pos_embed.requires_grad_(True)
    model.origin = encoder.origin
    return model


def with_head(encoder: Encoder, training: Labelled, weight: Tensor, bias: Tensor) -> Encoder:
    """The encoder as it is, on the CPU and in eval mode, with a head of these weights (C, D) and biases (C,)."""
    kind: Any = {"multi_label": training.multi_label, "numeric": training.numeric}
    model = as_classifier(encoder.cpu(), training.classes, pool=encoder.config.pool, **kind)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    return model.eval()


def drop_paths(blocks: Sequence[nn.Module], rate: float, names: Sequence[str] = ("drop_path",)) -> None:
    """Put stochastic depth into blocks: the first is never passed over, the last for ``rate`` of the samples."""
    from timm.layers.drop import DropPath

    for number, block in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        for name in names:
            setattr(block, name, DropPath(share) if share else nn.Identity())


def freeze(encoder: Encoder, blocks: float) -> None:
    """Leave the last so many blocks, the final norm and the head to be trained (He et al. 2021, figure 9).

    Half a block is the MLP of the last one with its norm, as in the paper; all of them are the whole network.
    """
    depth = encoder.config.depth
    if blocks > depth:
        raise UsageError(f"--blocks {blocks:g} is more than the {depth} blocks of the network")
    if blocks == depth:
        return
    encoder.requires_grad_(False)
    trained: list[nn.Module] = [encoder.final_norm, encoder.head]
    if blocks == 0.5 and depth:
        last = encoder.blocks[-1]
        assert isinstance(last, Block)
        trained += [last.norm2, last.mlp]
    else:
        trained += list(encoder.blocks[depth - int(blocks) :])
    for part in trained:
        part.requires_grad_(True)


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch normalisation without affine parameters, over the batch of all processes.

    torch's own SyncBatchNorm does not run on a CPU.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, group: Group) -> None:
        super().__init__(width, eps=_BATCH_NORM_EPS, affine=False)
        self.group = group

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        if not self.training or self.group.size == 1:
            return super().forward(features)
        from torch.distributed.nn.functional import all_reduce  # which a gradient flows through

        x = features.double()
        sums = all_reduce(torch.cat([x.sum(0), (x * x).sum(0), x.new_tensor([len(x)])]), group=self.group.step_group)
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).view(2, -1)
        variance = (square - mean * mean).clamp(min=0)
        with torch.no_grad():
            momentum = self.momentum or 0.1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), momentum)
            self.num_batches_tracked += 1
        return ((x - mean) / torch.sqrt(variance + self.eps)).to(features.dtype)

    def folded_into(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weights (C, D) and biases (C,), float64 on the CPU, of one layer that does what both do in eval mode."""
        scale = (self.running_var.double().cpu() + self.eps).rsqrt()
        weight = linear.weight.detach().double().cpu() * scale
        return weight, linear.bias.detach().double().cpu() - weight @ self.running_mean.double().cpu()


class StandardisedHead(nn.Module):
    """A linear layer on batch-normalised features: what a head is while it is trained that began as a probe.

    A probe leans on directions in which features hardly differ. When the network moves, the mean of all features moves
    with it, by more than they differ there, and every picture becomes one class. Normalised by the batch, a head does
    not see a common move, and no gradient makes one.
    """

    def __init__(self, linear: nn.Linear, group: Group, unit: Tensor | None = None) -> None:
        super().__init__()
        self.norm = GlobalBatchNorm(linear.in_features, group)
        self.linear = linear
        self.unit: Tensor | None
        self.register_buffer("unit", unit)  # (2, columns), of numbers: their mean and deviation

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to logits (B, classes)."""
        outputs = self.linear(self.norm(features.float()))
        return outputs if self.unit is None else self.unit[0] + outputs * self.unit[1]

    def folded(self) -> nn.Linear:
        """One linear layer that computes the same in eval mode."""
        weight, bias = self.norm.folded_into(self.linear)
        if self.unit is not None:
            middle, unit = self.unit.double().cpu()
            weight, bias = weight * unit[:, None], bias * unit + middle
        layer = nn.Linear(weight.shape[1], len(weight))
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return layer


class _Probe(nn.Module):
    """A head on a network that stays as it is."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.trunk = backbone.module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "_Probe":
        """The network stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self


class LinearProbe(_Probe):
    """Linear probing as published (He et al. 2021, appendix A.1): frozen features, batch-normalised, a linear layer."""

    def __init__(self, backbone: Backbone, pool: str, classes: int, group: Group) -> None:
        super().__init__(backbone)
        self.pool = pool
        width = backbone.width * (2 if pool == "cls+mean" else 1)
        self.norm = GlobalBatchNorm(width, group)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=_PROBE_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        with torch.no_grad():
            normed = self.norm(self.backbone.features(images, self.pool).float())
        return self.head(normed)

    def folded(self, training: Labelled) -> Encoder | None:
        """A classifier that computes the same in eval mode, the normalisation folded into the head.

        None of a network of timm, and where the pooling is not the one that the encoder was trained with, whose norm is
        elsewhere.
        """
        encoder = self.trunk
        if not isinstance(encoder, Encoder) or self.pool != encoder.config.pool:
            return None
        weight, bias = self.norm.folded_into(self.head)
        return with_head(encoder, training, weight, bias)


class AttentiveProbe(_Probe):
    """A probe that pools the frozen patch tokens by attention: one learned query, then a norm and a linear layer.

    Such probes are how later work reads networks whose patches, not whose class token, hold what they know (Chen et
    al. 2022, Context Autoencoder, section 4).
    """

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__(backbone)
        width = backbone.width
        heads = next(count for count in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % count == 0)
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=1 / math.sqrt(width))
        nn.init.trunc_normal_(self.head.weight, std=_PROBE_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        network: Any = self.trunk
        with torch.no_grad():  # patch tokens (B, N, D) after the final norm; of a convolutional network its last map
            if isinstance(network, Encoder):
                tokens = network.features(images, pool="tokens")
            else:
                tokens = network.forward_features(images)
                maps = tokens.ndim == 4
                tokens = tokens.flatten(2).transpose(1, 2) if maps else tokens[:, network.num_prefix_tokens :]
        query = self.query.expand(len(tokens), -1, -1)
        pooled, _ = self.attention(query, tokens, tokens, need_weights=False)
        return self.head(self.norm(pooled[:, 0]))
