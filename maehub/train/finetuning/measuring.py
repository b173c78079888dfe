"""What a fine-tuned network is measured by, drawn and exported as."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from maehub.data import MOST_LOOKED_AT, Labelled, LabelledSplit, Source, find_twins, select
from maehub.errors import log
from maehub.features import outputs
from maehub.figures import save_figure
from maehub.files import atomic_write
from maehub.images import Preprocess
from maehub.models import Encoder
from maehub.train.engine import Group
from maehub.train.evaluation import AnyScores, MapScores, labelled_sheet, overview, worst_mistakes
from maehub.train.finetuning.classifier import AttentiveProbe, LinearProbe
from maehub.train.finetuning.recipes import Settings
from maehub.weights import save

_SHOWN = 8


def look_for_twins(split: LabelledSplit, file: Path | None, workers: int | None, *, progress: bool) -> None:
    """Say which test pictures are in training too, and write them to a file that is named."""
    if len(split.training) + len(split.testing) > MOST_LOOKED_AT:
        return
    twins = find_twins(split.training, split.testing, workers=workers, progress=progress)
    if twins.exact or twins.near:
        if file:
            twins.save(file)
        log.warning("%s%s", twins.describe(), f" See {file}." if file else "")


def logits_of(
    single: nn.Module | None,
    samples: Source,
    preprocess: Preprocess,
    group: Group,
    precision: contextlib.AbstractContextManager[Any],
    workers: int | None,
    *,
    alone: bool,
) -> np.ndarray | None:
    """Logits of every picture, (n, classes) float32 in rank 0, None elsewhere; each process computes a part.

    ``single`` is what `maehub.train.engine.single_network` gives; ``alone``: it is there in rank 0 only.
    """
    if single is None:
        return outputs_of(None, samples, preprocess, group, workers, "measuring")
    training = single.training
    single.eval()

    def compute(images: Tensor) -> Tensor:
        with precision:
            return single(images)

    try:
        return outputs_of(compute, samples, preprocess, group, workers, "measuring", alone=alone)
    finally:
        single.train(training)


def outputs_of(
    compute: Callable[[Tensor], Tensor] | None,
    samples: Source,
    preprocess: Preprocess,
    group: Group,
    workers: int | None,
    what: str,
    *,
    alone: bool = False,
) -> np.ndarray | None:
    """What ``compute`` gives for every picture, (n, …) float32 in rank 0, None elsewhere; each process does a part.

    ``alone``: rank 0 does all of it; the others give None to compute. ``what`` names it where a process does not come.
    """
    shares = 1 if alone or len(samples) < group.size else group.size
    part = None
    if compute is not None and group.rank < shares:
        mine = select(samples, np.arange(group.rank, len(samples), shares))
        part = outputs(compute, mine, preprocess, group.device, workers=workers, progress=False).numpy()
    parts = [one for one in group.all(part, what) if one is not None]
    if not group.is_main:
        return None
    whole = np.empty((len(samples), *parts[0].shape[1:]), np.float32)
    for rank, one in enumerate(parts):
        whole[rank :: len(parts)] = one
    return whole


def show(
    logits: np.ndarray, scores: AnyScores, labelled: Labelled, channels: int, folder: Path, step: int, *, last: bool
) -> None:
    """Write a sheet of some pictures, always the same, with what is said of them: ``step-N.png``.

    At the end also what goes wrong: ``confusion.png``, or of numbers ``scatter.png``, and ``mistakes.png``.
    """
    folder.mkdir(exist_ok=True)
    order = sorted(range(len(labelled)), key=labelled.samples.sample_id)[:_SHOWN]
    pictures = {f"step-{step}.png": labelled_sheet(labelled, logits, order, channels)}
    if last:
        pictures |= overview(scores)
    wrong = worst_mistakes(logits, labelled.labels)
    if last and len(wrong):
        pictures["mistakes.png"] = labelled_sheet(labelled, logits, wrong, channels)
    for name, picture in pictures.items():
        save_figure(picture, folder / name)


class Outcome(NamedTuple):
    """What a run ended with; see `maehub.train.FinetuneResult`."""

    scores: AnyScores | MapScores | None = None
    probe: AnyScores | None = None
    kept: Literal["finetuned", "probe"] = "finetuned"
    compared: dict[str, Any] | None = None
    """What ``scores.json`` says of both."""


def export(
    run: Path, model: str, settings: Settings, network: nn.Module, outcome: Outcome, split: LabelledSplit
) -> None:
    """Write ``scores.json`` and the model folder, which has the classes, the transform and ``metrics.json``.

    An attentive probe, and a linear one on a pooling that no classifier has, are measured but not exported. ``network``
    is on one device, and ``model`` is what its training started from.
    """
    scores = outcome.scores
    assert not isinstance(scores, MapScores | None)
    facts = {
        "trained_from": model,
        "recipe": asdict(settings),
        "training_pictures": len(split.training),
        "split": "made by seed" if split.made else "as given",
        "scores": scores.to_dict(),
        **(outcome.compared or {}),
    }
    text = json.dumps(facts, indent=1) + "\n"
    with atomic_write(run / "scores.json") as temporary:
        temporary.write_text(text)
    classifier = network
    if isinstance(network, LinearProbe):
        classifier = network.folded(split.training) or network
    if isinstance(classifier, Encoder):
        save(classifier.eval(), run / "model", card=_card(model, settings, outcome, split), overwrite=True)
    elif isinstance(network, LinearProbe | AttentiveProbe):
        log.info("this probe is no network that can be loaded, so no model folder is written; its scores are kept")
        return
    else:
        from timm.models._hub import save_for_hf  # where it is in every version

        folder, names = run / "model", {"label_names": list(split.training.classes)}
        folder.mkdir(exist_ok=True)
        save_for_hf(network.cpu().eval(), str(folder), model_config=names, safe_serialization=True)
    with atomic_write(run / "model" / "metrics.json") as temporary:
        temporary.write_text(text)


def _card(model: str, settings: Settings, outcome: Outcome, split: LabelledSplit) -> str:
    """What the model card says of training and of what was measured; no names of files."""
    scores = outcome.scores
    assert scores is not None
    made = "a stratified split by seed" if split.made else "a split that was given"
    made += ", with {} and {} groups that were kept whole".format(*split.groups) if split.groups else ""
    done = "Fine-tuned from" if settings.head == "linear" else "A probe on the frozen features of"
    how = f"{settings.steps:,} steps of {settings.batch_size}"
    if outcome.kept == "probe":
        done, how = "A linear probe on the frozen features of", f"after {how} fine-tuning was no better"
    what = "" if split.training.numeric else f" of {len(split.training.classes)} classes"
    return (
        f"{done} {model} by the recipe `{settings.recipe}` on {len(split.training):,} pictures{what}: "
        f"{how}.\n\n{scores.in_words} on {scores.n:,} held-out pictures, {made}, measured at the last step."
    )
