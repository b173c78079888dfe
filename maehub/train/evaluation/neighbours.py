"""How well the neighbours of a feature tell its class (Wu et al. 2018, section 3.4)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from maehub.errors import UsageError
from maehub.train.evaluation.linear import accuracy

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
"""Numbers of neighbours to choose from."""

_AT_ONCE = 2**25  # similarities in memory
_TEMPERATURE = 0.07


class NeighbourTrial(NamedTuple):
    """One number of neighbours, and how well it did."""

    neighbours: int
    accuracy: float  # percent; where a picture may have several classes, mean average precision


def vote(
    train_features: Tensor,
    train_labels: np.ndarray,
    features: Tensor,
    neighbours: int,
    temperature: float = _TEMPERATURE,
    *,
    classes: int | None = None,
) -> Tensor:
    """Votes for each class over all votes, (n, C) float32 in [0, 1], of the nearest of the training pictures.

    Each votes with exp(cosine similarity / temperature), at most all of the m training pictures. Features are (m, D)
    and (n, D) floating on one device; labels (m,) integers below ``classes``, or below as many as they name; or (m, C)
    bool, where a neighbour votes for each of its classes.
    """
    ballots = targets_of(train_labels, classes, features.device)
    return torch.cat([_shares(*near, ballots) for near in _nearest(train_features, features, neighbours, temperature)])


def choose_neighbours(
    features: Tensor,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    temperature: float = _TEMPERATURE,
    candidates: Sequence[int] = (),
) -> tuple[NeighbourTrial, ...]:
    """How well each number of neighbours tells the class of a picture that is left out of them.

    Features are (n, D) floating, n at least 2, labels as in `vote`. Pictures of its own group, ``groups`` (n,)
    integers, do not vote for a picture; None bars only itself. Candidates, or `NEIGHBOURS`, of n and more are left out.
    """
    count = len(features)
    if count < 2:
        raise UsageError("one picture has no neighbours to choose by")
    ballots = targets_of(labels, None, features.device)
    tried = [number for number in candidates or NEIGHBOURS if number < count] or [count - 1]
    barred = torch.arange(count) if groups is None else torch.as_tensor(groups)
    votes: dict[int, list[Tensor]] = {number: [] for number in tried}
    for weights, indices in _nearest(features, features, max(tried), temperature, barred.to(features.device)):
        for number in tried:
            shares = _shares(weights[:, :number], indices[:, :number], ballots)
            votes[number].append(shares if labels.ndim == 2 else shares.argmax(dim=1))  # the shares are large
    return tuple(NeighbourTrial(number, accuracy(torch.cat(votes[number]), labels)) for number in tried)


def leave_one_out(features: Tensor, labels: Tensor, neighbours: int = 20) -> float:
    """Top-1 in percent of the vote of the nearest other features, (n, D) floating; labels (n,) int64 from 0."""
    neighbours = min(neighbours, len(features) - 1)
    return choose_neighbours(features.float(), labels.cpu().numpy(), candidates=[neighbours])[0].accuracy


def effective_rank(features: Tensor) -> float:
    """How many directions features use: exp of the entropy of their normalised singular values.

    Roy and Vetterli 2007; as a signal of representation quality without labels, RankMe (Garrido et al. 2023). Of
    (n, D) floating it lies between 1 and min(n, D).
    """
    values = torch.linalg.svdvals(features.double().cpu())
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def _nearest(
    train: Tensor, asking: Tensor, neighbours: int, temperature: float, barred: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The nearest of ``train``, for some rows of ``asking`` at a time; of equal (n,) ``barred`` none counts.

    Weights (rows, k), exp(cosine similarity / temperature), the nearest one's being 1, and indices (rows, k) int64.
    """
    train, asking = F.normalize(train.float(), dim=1), F.normalize(asking.float(), dim=1)
    step = max(1, _AT_ONCE // len(train))
    for start in range(0, len(asking), step):
        rows = slice(start, start + step)
        similarity = asking[rows] @ train.T  # (rows, m)
        if barred is not None:
            similarity[barred[rows, None] == barred] = -torch.inf
        near, indices = similarity.topk(min(neighbours, len(train)), dim=1)
        weights = ((near - near[:, :1]) / temperature).exp()
        yield weights.nan_to_num(0), indices  # where every one is barred, nobody votes


def _shares(weights: Tensor, indices: Tensor, ballots: Tensor) -> Tensor:
    """(rows, C): votes for each class over all votes."""
    votes = torch.zeros(len(weights), ballots.shape[1], device=ballots.device)
    for weight, index in zip(weights.T, indices.T, strict=True):  # all at once would be k times as large
        votes += weight[:, None] * ballots[index]
    return votes / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)


def targets_of(labels: np.ndarray, classes: int | None, device: torch.device | str = "cpu") -> Tensor:
    """(n, C) float32 with 1 for each class of a picture, of labels (n,) integers or (n, C) bool."""
    truth = torch.as_tensor(labels, device=device)
    if truth.ndim == 2:
        return truth.float()
    return F.one_hot(truth.long(), classes or int(truth.max()) + 1).float()
