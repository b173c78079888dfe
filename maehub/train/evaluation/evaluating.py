"""How well a classifier tells labelled pictures: the published evaluation, its mistakes, and a folder with both."""

import base64
import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from maehub.data import Labelled, measured_folder, measured_part, naming, split_labelled
from maehub.errors import UsageError, first_names, log
from maehub.features import outputs
from maehub.files import check_free, is_detector, is_segmenter, sheet_cells, whole_folder, write_text
from maehub.hub import load
from maehub.images import open_image
from maehub.models import Encoder, autocast, computed_in, usable_device
from maehub.train.evaluation.class_matching import match_classes
from maehub.train.evaluation.config import EvaluateConfig
from maehub.train.evaluation.corruptions import (
    Robustness,
    corruption_names,
    measure,
    read_baseline,
    robustness_picture,
)
from maehub.train.evaluation.dense.evaluating import MapEvaluation, ObjectEvaluation, evaluate_dense, held_out_by
from maehub.train.evaluation.plots import contact_sheet, overview
from maehub.train.evaluation.scores import AnyScores, Scores, losses, probabilities, score_of
from maehub.train.evaluation.text_tables import printable
from maehub.train.networks import pair

MEMBERS = ("evaluation.json", "confusion.png", "scatter.png", "mistakes.png", "corruptions.png", "predictions.csv")
"""What an evaluation's folder is made of."""

_MOST_MISTAKES = 16


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Prints as tables, and draws itself in a notebook."""

    model: str
    data: str
    """What was measured on: the folder or file with the pictures."""
    scores: AnyScores
    mistakes: Image.Image | None = field(default=None, repr=False, compare=False)
    """The worst of them as a sheet; None if there are none."""
    files: tuple[Path, ...] = ()
    """What was written."""
    classes_used: tuple[str, ...] = ()
    """The classes that were scored, as the data call them."""
    precision: str = "fp32"
    """What the network computed in."""
    robustness: Robustness | None = None
    """Under corruptions, where that was asked for."""
    spoilt: Image.Image | None = field(default=None, repr=False, compare=False)
    """A picture under each of them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {
            "model": self.model,
            "data": self.data,
            "classes_used": list(self.classes_used),
            "precision": self.precision,
            "corruptions": None if self.robustness is None else self.robustness.to_dict(),
            **self.scores.to_dict(),
            "files": [str(path) for path in self.files],
        }

    def __str__(self) -> str:
        how = "" if self.precision == "fp32" else f", computed in {self.precision}"
        parts = [f"{self.model} on {printable(self.data, 200)}{how}\n\n{self.scores}"]
        if isinstance(self.scores, Scores) and self.scores.bins:
            parts.append(f"how sure it is, and how often it is right then\n\n{self.scores.reliability()}")
        if self.robustness:
            parts.append(str(self.robustness))
        if self.files:
            parts.append("\n".join(map(str, self.files)))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        drawn = [*overview(self.scores).values(), self.mistakes, self.spoilt]
        pictures = [picture for picture in drawn if picture is not None]
        page = self.scores._repr_html_() + (f"<pre>{self.robustness}</pre>" if self.robustness else "")
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            data = base64.b64encode(buffer.getvalue()).decode()
            page += f'<img src="data:image/png;base64,{data}" style="max-width: 100%">'
        return page


def evaluate(config: EvaluateConfig) -> Evaluation | MapEvaluation | ObjectEvaluation:
    """Measure a classifier on labelled pictures, each through the model's own transform; or a segmenter on label maps,
    or a detector on objects.

    Returns:
        `Evaluation`; with ``config.out`` also as a folder with ``evaluation.json``, ``predictions.csv``, and where
        there is something to draw ``confusion.png``, ``mistakes.png`` and, by ``corruptions``, ``corruptions.png``. Of
        a segmenter `MapEvaluation`, whose folder has ``evaluation.json`` and ``worst.png``; of a detector
        `ObjectEvaluation`, whose folder has ``detections.json``, COCO's results, too.

    Raises:
        UsageError: the model has no head, its head does not fit the labels, or the folder is in use.
        DataError: the data have classes that the model does not know, or a picture cannot be read.
        HubError, IntegrityError, CheckpointError: as in `maehub.load` and `maehub.save`.
    """
    if (segments := is_segmenter(config.model)) or is_detector(config.model):
        return evaluate_dense(config, detects=not segments)
    if config.out is not None:
        check_free(config.out, config.overwrite, MEMBERS)
    device = usable_device(config.device)
    encoder = load(config.model, image_size=pair(config.image_size), device=device)
    if not encoder.config.classes:
        raise UsageError(
            f"{config.model} has no head, so it names no classes. Train one by `maehub finetune DATA -m MODEL -o RUN` "
            "and evaluate RUN; `maehub probe DATA -m MODEL` measures its features as they are"
        )
    labelled, measured_on, used = _read(config, encoder)
    names = corruption_names(labelled, encoder.preprocess) if config.corruptions else ()
    baseline = read_baseline(config.baseline, names, len(labelled)) if config.baseline else None
    native = encoder.preprocess.resize == "native"  # every picture has its own size, so they are computed one by one

    def compute(images: Tensor) -> Tensor:
        with autocast(config.precision, device):
            return encoder(images)

    logits = outputs(
        compute,
        labelled.samples,
        encoder.preprocess,
        device,
        batch_size=1 if native else config.batch_size,
        workers=config.workers,
        progress=not config.quiet,
    ).numpy()
    if used != list(range(logits.shape[1])):
        logits = logits[:, used]
    scores = score_of(logits, labelled.labels, labelled.classes, labelled.groups)
    wrong = worst_mistakes(logits, labelled.labels)
    title = f"the {len(wrong)} worst mistakes of {config.model}" if len(wrong) > 1 else f"a mistake of {config.model}"
    sheet = labelled_sheet(labelled, logits, wrong, encoder.config.channels, title) if len(wrong) else None
    evaluation = Evaluation(
        config.model, measured_on, scores, sheet, classes_used=labelled.classes, precision=computed_in(config.precision)
    )
    if names:
        common: Any = {"batch_size": config.batch_size, "workers": config.workers, "progress": not config.quiet}
        errors = measure(names, compute, labelled, used, encoder.preprocess, device, **common)
        clean = 100 - scores.headline[1].value
        found = baseline.compare(clean, errors) if baseline else Robustness(clean, errors)
        picture = robustness_picture(found, labelled.samples, encoder.preprocess)
        evaluation = replace(evaluation, robustness=found, spoilt=picture)
    return evaluation if config.out is None else _write(evaluation, config.out, config.overwrite, labelled, logits)


def worst_mistakes(logits: np.ndarray, labels: np.ndarray, most: int = _MOST_MISTAKES) -> np.ndarray:
    """Places of the pictures that a model is wrong about, (up to ``most``,) int64, those with the greatest loss first.

    With one class a picture that is the least probability of the true one. Where it may have several, a picture is
    wrong if a label is missing or too many at a probability of one half; numbers are never quite right. Logits and
    labels are as `score_of` takes them.
    """
    if labels.dtype.kind == "f":
        return np.argsort(-losses(logits, labels), kind="stable")[:most]
    wrong = ((logits >= 0) != labels).any(axis=1) if labels.ndim == 2 else logits.argmax(axis=1) != labels
    indices = np.flatnonzero(wrong)
    return indices[np.argsort(-losses(logits, labels)[indices], kind="stable")][:most]


def labelled_sheet(
    labelled: Labelled, logits: np.ndarray, places: Sequence[int] | np.ndarray, channels: int, title: str = ""
) -> Image.Image:
    """Some pictures, in the order of ``places``, with what they show and what they are taken for.

    The logits (n, classes) are those of all pictures; the model has 1 or 3 ``channels``. Of numbers the frame says
    whether the error is below the mean.
    """
    numeric, squares = labelled.numeric, losses(logits, labelled.labels) if labelled.numeric else None
    shares = logits[places] if numeric else probabilities(logits[places], multi_label=labelled.multi_label)
    pictures, captions, right = [], [], []
    for index, row in zip(map(int, places), shares, strict=True):
        with naming(labelled.samples, index):
            pictures.append(open_image(labelled.samples.source(index), channels=channels))
        name = os.path.basename(os.fsdecode(labelled.samples.name(index)))
        if squares is not None:
            true, guessed = (", ".join(f"{value:.4g}" for value in values) for values in (labelled.labels[index], row))
            right.append(bool(squares[index] <= squares.mean()))
        else:
            told, said = _told_and_said(labelled, index, row)
            guessed = ", ".join(f"{labelled.classes[place]} ({100 * row[place]:.0f} %)" for place in said)
            true = ", ".join(labelled.classes[place] for place in told)
            right.append(told == said)
        captions.append("\n".join([f"true: {true or 'none'}", f"predicted: {guessed or 'none'}", name]))
    return contact_sheet(pictures, captions, right, title=title)


def _read(config: EvaluateConfig, encoder: Encoder) -> tuple[Labelled, str, list[int]]:
    """The labelled pictures, where they are, and which outputs of the head their classes are."""
    numeric, names = encoder.config.numeric, encoder.config.class_names
    outputs_in_order = list(range(encoder.config.classes))
    own = held_out_by(
        config,
        lambda run: split_labelled(
            config.data,
            seed=run["seed"],
            share=run["val_share"],
            group=run["group"],
            label=run["label"],
            numeric=numeric,
        ),
    )
    if own is not None:
        return own, config.data, outputs_in_order
    folder = config.data if numeric else measured_folder(config.data)
    label = ",".join(names) if numeric and config.label is None else config.label
    labelled = measured_part(folder, group=config.group, label=label, classes=(), numeric=numeric)
    if folder != config.data or folder.endswith(".csv"):
        log.info("measured on %s, %d pictures", folder, len(labelled))
    if numeric:
        if len(labelled.classes) != len(outputs_in_order) or config.classes_from:
            raise UsageError(
                f"{config.model} predicts {encoder.config.classes} numbers ({first_names(names, 3)}) "
                "and no classes: name as many columns by --label, and leave out --classes-from"
            )
        return labelled, folder, outputs_in_order
    labelled, used = match_classes(
        labelled, encoder.config.class_names, encoder.config.classes, config.classes_from, config.model, folder
    )
    several = encoder.config.multi_label
    if labelled.multi_label and not several:
        raise UsageError(
            f"{folder} has pictures with several labels or none, and {config.model} gives each picture one class: its "
            f"head does not fit. Train one on such labels by `maehub finetune DATA -m MODEL -o RUN`"
        )
    if several and not labelled.multi_label:  # one label each is a case of several
        labelled = replace(labelled, labels=np.eye(len(labelled.classes), dtype=bool)[labelled.labels])
    return labelled, folder, used


def _write(evaluation: Evaluation, out: Path, overwrite: bool, labelled: Labelled, logits: np.ndarray) -> Evaluation:
    drawn = {"mistakes.png": evaluation.mistakes, "corruptions.png": evaluation.spoilt} | overview(evaluation.scores)
    pictures = {name: picture for name, picture in drawn.items() if picture is not None}
    evaluation = replace(
        evaluation, files=tuple(out / name for name in MEMBERS if name in pictures or not name.endswith(".png"))
    )
    with whole_folder(out, overwrite=overwrite, members=MEMBERS) as folder:
        lines = (
            f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in evaluation.to_dict().items()
        )
        write_text(folder / "evaluation.json", "{\n" + ",\n".join(lines) + "\n}\n")
        for name, picture in pictures.items():
            picture.save(folder / name)
        path = folder / "predictions.csv"
        with open(path, "x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = csv.writer(file)
            if labelled.numeric:
                rows.writerow(
                    ("name", *(f"{side} {name}" for name in labelled.classes for side in ("true", "predicted")))
                )
                for index, pair_of in enumerate(np.stack([labelled.labels, logits], axis=2).reshape(len(logits), -1)):
                    cells = (f"{value:.7g}" for value in pair_of)
                    rows.writerow(sheet_cells((os.fsdecode(labelled.samples.name(index)), *cells)))
                return evaluation
            rows.writerow(("name", "true", "predicted", "probability"))
            for index, row in enumerate(probabilities(logits, multi_label=labelled.multi_label)):
                told, said = _told_and_said(labelled, index, row)
                names = ("|".join(labelled.classes[place] for place in places) for places in (told, said))
                shown = "|".join(f"{row[place]:.6g}" for place in said)
                rows.writerow(sheet_cells((os.fsdecode(labelled.samples.name(index)), *names, shown)))
    return evaluation


def _told_and_said(labelled: Labelled, index: int, row: np.ndarray) -> tuple[list[int], list[int]]:
    """A picture's classes, and those that probabilities (C,) say: the most probable, or all from one half on."""
    true = labelled.labels[index]
    if labelled.multi_label:
        return np.flatnonzero(true).tolist(), np.flatnonzero(row >= 0.5).tolist()
    return [int(true)], [int(row.argmax())]
