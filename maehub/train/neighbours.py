"""How well the neighbours of a feature tell its class."""

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 1024  # compared with all others at once
_TEMPERATURE = 0.07


def leave_one_out(features: Tensor, labels: Tensor, neighbours: int = 20) -> float:
    """Accuracy of a weighted vote of the nearest other features (Wu et al. 2018, section 3.4).

    Args:
        features: (n, D) floating, any device.
        labels: (n,) int64 from 0, on the same device.
        neighbours: how many vote, each with exp(cosine similarity / 0.07); at most n − 1.

    Returns:
        Top-1 accuracy in percent.
    """
    normed = F.normalize(features.float(), dim=1)
    count, classes = len(normed), int(labels.max()) + 1
    neighbours = min(neighbours, count - 1)
    right = 0
    for start in range(0, count, _ROWS):
        rows = torch.arange(start, min(count, start + _ROWS), device=normed.device)
        similarity = normed[rows] @ normed.T  # (rows, n)
        similarity[torch.arange(len(rows), device=normed.device), rows] = -torch.inf
        near, places = similarity.topk(neighbours, dim=1)
        votes = torch.zeros(len(rows), classes, device=normed.device)
        votes.scatter_add_(1, labels[places], (near / _TEMPERATURE).exp())
        right += int((votes.argmax(dim=1) == labels[rows]).sum())
    return 100 * right / count


def effective_rank(features: Tensor) -> float:
    """How many directions features use: exp of the entropy of their normalised singular values.

    Roy and Vetterli 2007; as a signal of representation quality without labels, RankMe (Garrido et al. 2023).

    Args:
        features: (n, D) floating.

    Returns:
        Between 1 and min(n, D).
    """
    values = torch.linalg.svdvals(features.double().cpu())
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))
