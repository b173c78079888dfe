"""A head that starts as the linear probe of what it sees, solved before the first step (Kumar et al. 2022, LP-FT).

A fresh head sends large gradients into the encoder while it learns what the features hold already. One that starts as
the probe sends those that are left, and a run begins where the probe ends.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from maehub.data import Labelled, LabelledSplit, Source, inner_parts, select
from maehub.errors import UsageError, log
from maehub.images import Preprocess, printable
from maehub.models import Encoder
from maehub.train.engine import Group
from maehub.train.evaluation import (
    AnyScores,
    LinearFit,
    accuracy,
    best,
    fit_at,
    losses,
    paired,
    score_of,
    surely_better,
    sweep,
)
from maehub.train.finetuning.classifier import StandardisedHead
from maehub.train.finetuning.config import HeadPool
from maehub.train.finetuning.fitting import Clock
from maehub.train.finetuning.measuring import Outcome, outputs_of
from maehub.train.finetuning.network import Classifier

_TIMED = 16  # pictures, to see whether there is time for all
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
    own: bool = False
    """Whether both are the head that the network came with, of the same classes, and no probe."""

    def against(
        self, scores: AnyScores, logits: np.ndarray, held: np.ndarray, truth: np.ndarray, testing: Labelled
    ) -> Outcome:
        """Which is kept, the probe or the network.

        The network has these scores and logits (n, classes) on the held-out pictures, and logits ``held`` on those to
        choose by, whose labels are ``truth``. It is kept unless the probe is right there more often, by more than the
        standard error of the difference: few pictures do not tell, and on the sets of benchmarks/small_data.py the
        network mostly gained. Where both are right about the same pictures the one with less loss is kept.
        """
        before = score_of(self.testing, testing.labels, testing.classes, testing.groups)
        compared: dict[str, Any] = {"finetuned": scores.to_dict(), "probe": before.to_dict()}
        right = [accuracy(torch.from_numpy(one), truth) for one in (self.held, held)]
        surer = losses(held, truth).sum() < losses(self.held, truth).sum()
        better = not surely_better(self.held, held, truth) and (right[0] != right[1] or surer)
        if not testing.multi_label:
            compared["paired"] = paired(self.testing, logits, testing.labels)._asdict()
            found = paired(self.held, held, truth)
            compared["chosen_by"] = {"gained": found.gained, "lost": found.lost}
        compared.setdefault("chosen_by", {}).update(probe=right[0], finetuned=right[1], n=len(truth))
        kept: Literal["finetuned", "probe"] = "finetuned" if better else "probe"
        name = "classifier as it was" if self.own else "probe"
        what = "on %d pictures that were not trained on the %s has %.1f %%%s, the network %.1f %%: the %s is kept"
        of = " of the variance explained" * testing.numeric
        log.info(what, len(truth), name, right[0], of, right[1], "network" if better else name)
        return Outcome(scores if better else before, before, kept, compared | {"kept": kept})


def solve_head(
    classifier: Classifier,
    split: LabelledSplit,
    inner: tuple[np.ndarray, np.ndarray],
    group: Group,
    precision: contextlib.AbstractContextManager[Any],
    *,
    both: bool,
    own: bool,
    clock: Clock,
    workers: int | None,
    seed: int,
) -> HeadStart:
    """Solve the probes in rank 0, and give them to every process.

    ``inner`` are places in the training pictures to train on and to choose by. With ``both``, the class token and the
    mean of the patches are tried, of a network that takes the mean; the class token wins if it is better by more than
    the standard error of its accuracy. With ``own`` the head of the network is taken as it is.
    """
    training, network = split.training, classifier.network.eval()
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
            return _seen_by_head(network, images)[:, None]

    def seen(samples: Source) -> np.ndarray | None:
        start = time.monotonic()
        found = outputs_of(compute, samples, classifier.preprocess, group, workers, "the features of the probe")
        clock.picture = (time.monotonic() - start) / len(samples)
        return found

    if clock.minutes is not None:
        seen(select(training.samples, np.arange(min(_TIMED, len(training)))))
        with group.together("looking at the clock"):
            clock.has_time_for(len(training) + len(split.testing))
    sides = [seen(labelled.samples) for labelled in (split.testing, training)]
    found: HeadStart | None = None
    with group.together("solving the probe"):
        if sides[0] is not None and sides[1] is not None:
            unseen, features = map(torch.from_numpy, sides)
            classes, labels = len(training.classes), training.labels
            parts, ways = [] if own else inner_parts(training, seed)[0], []
            for place in range(0 if own else len(pools)):
                ways.append(best(sweep(features[:, place], labels, classes, parts)))
            chosen = 0
            if len(ways) == 2:
                level = min(100.0, max(0.0, ways[1].accuracy))  # R² can be below 0
                error = math.sqrt(level * (100 - level) / len(training))
                chosen = int(ways[1].accuracy > ways[0].accuracy + error)
            known, (trained, held) = features[:, chosen], inner
            if own:
                fitted = whole = _fit_of(head_of(network))
            else:
                whole = fit_at(known, labels, classes, ways[chosen].strength)
                fitted = fit_at(known[trained], labels[trained], classes, whole.strength)
            deviation, mean = torch.std_mean(known.double(), dim=0)
            constant = deviation <= _CONSTANT * known.abs().amax(dim=0)
            spread = torch.stack([mean.masked_fill(constant, 0), deviation.masked_fill(constant, 1)]).float()
            logits = [fitted.logits(known[held]).numpy(), whole.logits(unseen[:, chosen]).numpy()]
            found = HeadStart(pools[chosen], spread, fitted, whole, logits[0], logits[1], own)
    found = group.first(found, "the probe")
    assert found is not None
    return found


def solve_again(
    start: HeadStart,
    single: nn.Module | None,
    training: Labelled,
    inner: tuple[np.ndarray, np.ndarray],
    preprocess: Preprocess,
    group: Group,
    precision: contextlib.AbstractContextManager[Any],
    workers: int | None,
    *,
    alone: bool,
) -> tuple[np.ndarray | None, LinearFit]:
    """The head for a network that was trained: the probe of what it sees now, fitted to all training pictures.

    Before it (k, classes) float32, in rank 0: the logits for the pictures to choose by of one that was not fitted to
    them. With few pictures that head is better than the one that training left, which met crops alone; where the
    latter is surely better on the pictures to choose by, and where the network came with it, it stays. ``single`` and
    ``alone`` as in `logits_of`.
    """
    logits, fit, labels, classes = None, None, training.labels, len(training.classes)

    def compute(images: Tensor) -> Tensor:
        assert single is not None
        with precision:
            return _seen_by_head(single, images)

    trains = single is not None and single.training
    if single is not None:
        single.eval()
    mine, what = None if single is None else compute, "the features of the head"
    found = outputs_of(mine, training.samples, preprocess, group, workers, what, alone=alone)
    with group.together("solving the head"):
        if found is not None and single is not None:
            features, (trained, held) = torch.from_numpy(found), inner
            fit = _fit_of(head_of(single))
            logits = fit.logits(features[held]).numpy()
            if not start.own:
                apart = fit_at(features[trained], labels[trained], classes, start.whole.strength)
                solved = apart.logits(features[held]).numpy()
                if not surely_better(logits, solved, labels[held]):
                    logits, fit = solved, fit_at(features, labels, classes, start.whole.strength)
    if single is not None:
        single.train(trains)
    fit = group.first(fit, "the head")
    assert fit is not None
    return logits, fit


def look_early(start: HeadStart, logits: np.ndarray, truth: np.ndarray, classes: Sequence[str], rate: float) -> None:
    """Say where a run that has begun stands worse than it started, by the logits (k, classes) to choose by."""
    before, now = (accuracy(torch.from_numpy(one), truth) for one in (start.held, logits))
    said = np.unique(logits.argmax(axis=1))
    one_class = truth.ndim == 1 and len(said) == 1 < len(np.unique(truth))
    if now >= before and not one_class:
        return
    what = f"every one is taken for {printable(classes[said[0]])}" if one_class else f"the network has {now:.1f} %"
    log.warning(
        "on the %d pictures to choose by %s, and what it began with had %.1f %%. It may recover; else that is kept. "
        "Likely causes: steps too large (--base-lr %.2g), or crops and flips that take away what tells the classes "
        "(--crop-scale 0.8 1, --no-hflip)",
        len(truth),
        what,
        before,
        rate / 3,
    )


def _seen_by_head(network: nn.Module, images: Tensor) -> Tensor:
    """(B, D) float32."""
    seen: list[Tensor] = []
    handle = head_of(network).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        network(images)
    finally:
        handle.remove()
    return seen[0].float()


def head_of(network: nn.Module) -> nn.Linear | StandardisedHead:
    """The last layer of a network that `build_classifier` gives."""
    return network.get_submodule(_name_of_head(network))  # type: ignore[return-value]


def _name_of_head(network: nn.Module) -> str:
    timms: Any = getattr(network, "get_classifier", None)
    head = timms() if timms else network.head
    if not isinstance(head, nn.Linear | StandardisedHead):
        raise UsageError("this network does not end in one linear layer, so its head can only start fresh")
    return next(name for name, part in network.named_modules() if part is head)


def _fit_of(head: nn.Linear | StandardisedHead) -> LinearFit:
    layer = head.folded() if isinstance(head, StandardisedHead) else head
    return LinearFit(layer.weight.detach().cpu(), layer.bias.detach().cpu(), 0.0)


def put_head(
    network: nn.Module,
    fit: LinearFit,
    spread: Tensor | None = None,
    group: Group | None = None,
    unit: Tensor | None = None,
) -> None:
    """Give the head of a network the weights of a probe.

    With the mean and deviation ``spread`` (2, D) of what it sees it becomes one that is trained, in the processes of
    ``group``: its weights are those of standardised features, all of one size, as one learning rate wants them. The
    logits in eval mode are the same. ``unit``, (2, columns) float32: mean and deviation of numbers.
    """
    head, weight, bias = head_of(network), fit.weight.double(), fit.bias.double()
    if isinstance(head, StandardisedHead):
        network.set_submodule(_name_of_head(network), head := head.linear)
    with torch.no_grad():
        if spread is not None:
            trained = StandardisedHead(head, group or Group(), unit)
            mean, deviation = spread.double()
            trained.norm.running_mean.copy_(mean)
            trained.norm.running_var.copy_(deviation**2)
            scale = (trained.norm.running_var.double() + trained.norm.eps).sqrt()
            weight, bias = weight * scale, bias + weight @ trained.norm.running_mean.double()
            if unit is not None:
                middle, size = unit.double()
                weight, bias = weight / size[:, None], (bias - middle) / size
            network.set_submodule(_name_of_head(network), trained)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
