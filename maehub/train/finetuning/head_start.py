"""A head that starts as the linear probe of what it sees, solved before the first step (Kumar et al. 2022, LP-FT).

A fresh head sends large gradients into the encoder while it learns what the features hold already. One that starts as
the probe sends those that are left, and a run begins where the probe ends.
"""

import contextlib
import math
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from maehub.data import Labelled, LabelledSplit, inner_parts
from maehub.errors import UsageError, log
from maehub.models import Encoder
from maehub.train.engine import Group
from maehub.train.evaluation import LinearFit, Scores, accuracy, best, fit_at, paired, score, sweep
from maehub.train.finetuning.config import HeadPool
from maehub.train.finetuning.measuring import Outcome, outputs_of
from maehub.train.finetuning.network import Classifier

_CONSTANT = 1e-6  # deviation below which a feature is constant, relative to its size


class HeadStart(NamedTuple):
    """Two probes of what the head of a network sees, and what is known of them."""

    pool: HeadPool | None
    """Of an encoder of ours; None where there is one way alone."""
    spread: Tensor
    """(2, D) float32: mean and deviation of the features of the training pictures; 0 and 1 of constant ones."""
    fitted: LinearFit
    """To the pictures that are trained on: what the head starts as."""
    whole: LinearFit
    """To all training pictures: what is kept where training does not help."""
    held: np.ndarray
    """(k, classes) float32: the logits of ``fitted`` for the pictures to choose by."""
    testing: np.ndarray
    """(n, classes) float32: the logits of ``whole`` for the held-out pictures."""

    def against(
        self, scores: Scores, logits: np.ndarray, held: np.ndarray, truth: np.ndarray, testing: Labelled
    ) -> Outcome:
        """Which is kept, the probe or the network.

        The network has these scores and logits (n, classes) on the held-out pictures, and logits ``held`` on those to
        choose by, whose labels are ``truth``. It is kept where it is right there more often, by more than the standard
        error: few pictures do not tell, and the probe is what is sure.
        """
        before = score(self.testing, testing.labels, testing.classes, testing.groups)
        compared: dict[str, Any] = {"finetuned": scores.to_dict(), "probe": before.to_dict()}
        right = [accuracy(torch.from_numpy(one), truth) for one in (self.held, held)]
        better = right[1] > right[0]
        if not testing.multi_label:
            hits = [one.argmax(axis=1) == testing.labels for one in (self.testing, logits)]
            compared["paired"] = paired(*hits)._asdict()
            found = paired(*[one.argmax(axis=1) == truth for one in (self.held, held)])
            better = found.gained - found.lost > math.sqrt(found.gained + found.lost)
        compared["chosen_by"] = {"probe": right[0], "finetuned": right[1], "n": len(truth)}
        kept: Literal["finetuned", "probe"] = "finetuned" if better else "probe"
        what = "on %d pictures that were not trained on the probe has %.1f %%, the network %.1f %%: the %s is kept"
        log.info(what, len(truth), *right, "network" if better else "probe")
        return Outcome(scores if better else before, before, kept, compared | {"kept": kept})


def solve_head(
    classifier: Classifier,
    split: LabelledSplit,
    inner: tuple[np.ndarray, np.ndarray],
    group: Group,
    precision: contextlib.AbstractContextManager[Any],
    *,
    both: bool,
    workers: int | None,
    seed: int,
) -> HeadStart:
    """Solve the probes in rank 0, and give them to every process.

    ``inner`` are places in the training pictures to train on and to choose by. With ``both``, the class token and the
    mean of the patches are tried, of a network that takes the mean; the class token wins if it is better by more than
    the standard error of its accuracy.
    """
    training, network = split.training, classifier.network.eval()
    head = head_of(network)
    pools: tuple[HeadPool | None, ...] = ("mean", "cls") if both else (None,)

    def compute(images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, pools, D)."""
        with precision:
            if both:
                assert isinstance(network, Encoder)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a class token behind the norm of the mean is meant
                    cls, mean = network.features(images, pool="cls+mean").chunk(2, dim=1)
                return torch.stack([mean, cls], dim=1).float()
            seen: list[Tensor] = []
            handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                network(images)
            finally:
                handle.remove()
            return seen[0][:, None].float()

    sides = [
        outputs_of(compute, labelled.samples, classifier.preprocess, group, workers, "the features of the probe")
        for labelled in (training, split.testing)
    ]
    found: HeadStart | None = None
    with group.together("solving the probe"):
        if sides[0] is not None and sides[1] is not None:
            features, unseen = map(torch.from_numpy, sides)
            classes, labels = len(training.classes), training.labels
            parts, _ = inner_parts(training, seed)
            ways = [best(sweep(features[:, place], labels, classes, parts)) for place in range(len(pools))]
            chosen = 0
            if both:
                error = math.sqrt(ways[1].accuracy * (100 - ways[1].accuracy) / len(training))
                chosen = int(ways[1].accuracy > ways[0].accuracy + error)
            strength, known = ways[chosen].strength, features[:, chosen]
            whole = fit_at(known, labels, classes, strength)
            trained, held = inner
            fitted = fit_at(known[trained], labels[trained], classes, strength)
            deviation, mean = torch.std_mean(known.double(), dim=0)
            constant = deviation <= _CONSTANT * known.abs().amax(dim=0)
            spread = torch.stack([mean.masked_fill(constant, 0), deviation.masked_fill(constant, 1)]).float()
            logits = [fitted.logits(known[held]).numpy(), whole.logits(unseen[:, chosen]).numpy()]
            found = HeadStart(pools[chosen], spread, fitted, whole, *logits)
    found = group.first(found, "the probe")
    assert found is not None
    return found


def head_of(network: nn.Module) -> nn.Linear:
    """The last layer of a network that `build_classifier` gives."""
    part: Any = network
    head = part.get_classifier() if hasattr(part, "get_classifier") else part.head
    if not isinstance(head, nn.Linear):
        raise UsageError("this network does not end in one linear layer, so its head can only start fresh")
    return head


def put_head(network: nn.Module, fit: LinearFit, spread: Tensor | None = None) -> None:
    """Give the head of a network the weights of a probe.

    With ``spread`` the last norm of an encoder of ours standardises what the head sees, so that the weights are those
    of standardised features: all of one size, as one learning rate wants them. The logits are the same.
    """
    head, weight, bias = head_of(network), fit.weight.double(), fit.bias.double()
    with torch.no_grad():
        if spread is not None and isinstance(network, Encoder):
            mean, deviation = spread.double()
            norm = network.final_norm
            norm.weight.copy_(norm.weight.double().cpu() / deviation)
            norm.bias.copy_((norm.bias.double().cpu() - mean) / deviation)
            weight, bias = weight * deviation, bias + weight @ mean
        head.weight.copy_(weight)
        head.bias.copy_(bias)
