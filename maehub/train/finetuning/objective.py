"""What is learnt: pictures and the classes they belong to, to a loss."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Objective(nn.Module):
    """A classifier and its loss: soft-target cross-entropy, or binary cross-entropy of each label."""

    def __init__(self, network: nn.Module, positive: Tensor | None, *, multi_label: bool) -> None:
        super().__init__()
        self.network = network
        self.multi_label = multi_label
        self.positive: Tensor | None
        self.register_buffer("positive", positive, persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images (B, C, H, W) and targets (B, classes) to the mean loss, () float32."""
        logits = self.network(images).float()
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
