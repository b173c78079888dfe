"""How well objects are found: average precision as COCO measures it, with an interval over pictures or groups.

A detection is right if it overlaps an object of its class, by an intersection over union (IoU) that is high enough, and
no surer one has that object. AP is the mean over classes and over ten such bounds, 0.50 to 0.95, of the precision at
101 recalls.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from maehub.data import ObjectClasses, Objects, coco_masks
from maehub.dense import Detections
from maehub.errors import DataError
from maehub.train.evaluation.numbers import Measure, bootstrap
from maehub.train.evaluation.text_tables import html_table, percent, printable, text_table

_MOST = 100  # detections of a class in a picture that count
_LONGEST = 60  # classes in a table
_ENTRIES = 2**22  # detections times resamples that are in memory at once
_AREAS = {"small": "below 32² pixels", "medium": "from 32² to 96² pixels", "large": "above 96² pixels"}


class ObjectMeasure(NamedTuple):
    """One class; shares are in percent, None where there is no object to find."""

    name: str
    pictures: int  # that show it
    objects: int  # that are to be found
    ap: float | None
    ap50: float | None  # at an IoU of 0.50
    mask_ap: float | None  # of masks; None where there are none, too
    recall: float | None  # share of the objects that are found at an IoU of 0.50, however unsure


@dataclass(frozen=True)
class ObjectScores:
    """What `score_objects` measured; shares are in percent. Prints as a table, and draws itself in a notebook."""

    n: int
    """Pictures."""
    objects: int
    """That are to be found: those that are ignored are not."""
    ap: float
    """Of boxes."""
    low: float | None
    """``low`` to ``high`` is the 95 % interval of ``ap``; None with few pictures or groups."""
    high: float | None
    interval: str
    """How the interval was found."""
    ap50: float
    """At an IoU of 0.50 alone; so ``ap75``."""
    ap75: float
    ap_small: float | None
    """Of objects by their area, that of the mask where there are masks; None where there are none of that size."""
    ap_medium: float | None
    ap_large: float | None
    ar100: float
    """Average recall: mean share of objects that are found, by at most 100 detections of a class in a picture."""
    mask_ap: float | None
    """Of masks, as the two that follow; None where the truth or the detections have none."""
    mask_ap50: float | None
    mask_ap75: float | None
    per_class: tuple[ObjectMeasure, ...]

    @property
    def headline(self) -> tuple[str, Measure]:
        """What stands for the whole, in percent."""
        return "AP", Measure(self.ap, self.low, self.high)

    @property
    def in_words(self) -> str:
        """The headline, as a card says it."""
        ends = "" if self.low is None else f" (95 % interval {self.headline[1].ends})"
        masks = "" if self.mask_ap is None else f", AP of masks {self.mask_ap:.1f} %"
        return f"AP of boxes {self.ap:.1f} %{ends}, AP at an IoU of 0.50 {self.ap50:.1f} %{masks},"

    def summary(self) -> dict[str, Any]:
        """The numbers that stand for the whole, for JSON; those that do not apply are None."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "per_class"}

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return self.summary() | {"per_class": [row._asdict() for row in self.per_class]}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "ObjectScores":
        """The inverse of `to_dict`."""
        return cls(**{**facts, "per_class": tuple(ObjectMeasure(**row) for row in facts["per_class"])})

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Titles, and a row a class that has objects, the worst first."""
        ranked = sorted((row for row in self.per_class if row.ap is not None), key=lambda row: row.ap or 0.0)
        rows = []
        for row in ranked[:_LONGEST]:
            shares = [row.ap, row.ap50, row.recall, *[row.mask_ap] * (self.mask_ap is not None)]
            rows.append((printable(row.name), f"{row.pictures:,}", f"{row.objects:,}", *map(percent, shares)))
        return ("CLASS", "PICTURES", "OBJECTS", "AP", "AP50", "FOUND", *["MASK AP"] * (self.mask_ap is not None)), rows

    def __str__(self) -> str:
        lines = [f"{name:<16}{value:>8}   {note}".rstrip() for name, value, note in self.rows()]
        return "\n".join([*lines, "", text_table(*self.table())])

    def _repr_html_(self) -> str:
        return html_table((), self.rows()) + html_table(*self.table())

    def rows(self) -> list[tuple[str, str, str]]:
        """What stands for the whole: name, value, note."""
        between = self.interval if self.low is None else f"95 % interval {self.headline[1].ends}, {self.interval}"
        about = f"boxes, mean over classes and IoU 0.50 to 0.95; {between}; n = {self.n:,}, {self.objects:,} objects"
        sizes = [(f"AP {size}", getattr(self, f"ap_{size}"), f"objects {area}") for size, area in _AREAS.items()]
        rows = [("AP", self.ap, about), ("AP50", self.ap50, "at an IoU of 0.50"), ("AP75", self.ap75, ""), *sizes]
        rows += [("recall", self.ar100, f"mean over classes and IoU, {_MOST} detections of a class in a picture")]
        masks = [("mask AP", self.mask_ap, "as AP, of masks"), ("mask AP50", self.mask_ap50, "")]
        masks += [("mask AP75", self.mask_ap75, "")]
        shown = [*rows, *(row for row in masks if row[1] is not None)]
        return [(name, percent(value), note) for name, value, note in shown]


def score_objects(
    truth: Sequence[Objects], found: Sequence[Detections], classes: ObjectClasses, groups: np.ndarray | None
) -> ObjectScores:
    """Scores of what was found in pictures, in their order; ``groups`` (n,) are resampled whole, where there are some.

    The numbers are those of pycocotools: up to 100 detections of a class count in a picture, classes without an object
    are left out of means, and what is ignored is a crowd. Masks are measured where every object and detection has one.
    The interval, of ``ap``, is a bootstrap (1000 resamples) over pictures or groups, by percentiles; the matches of
    each picture are kept, so a picture that is drawn twice counts twice. With fewer than ten there is none.

    Raises:
        DataError: there is no object to find, or a detection cannot be: not finite, of an unknown class, a mask of
            another size than the picture.
        MissingDependencyError: pycocotools is not installed.
    """
    masked = all(row.shapes is not None for row in truth if len(row)) and any(one.masks is not None for one in found)
    for row, one in zip(truth, found, strict=True):
        _check(row, one, len(classes.names), masked)
    counts = np.stack([np.bincount(row.labels[~row.ignored], minlength=len(classes.names)) for row in truth])
    if not counts.sum():
        raise DataError("the pictures have no object to find, so there is nothing to measure")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        files = _files(truth, found, classes)
        precision, recall, matched = _measured(files, "bbox")
        masks = _measured(files, "segm")[0] if masked else None
    tables = [table for table, count in zip(matched, counts.sum(axis=0), strict=True) if count]

    def drawn_ap(weights: np.ndarray) -> np.ndarray:
        aps = np.stack([table.average_precisions(weights) for table in tables])
        known = ~np.isnan(aps)
        with np.errstate(invalid="ignore"):
            means: np.ndarray = np.where(known, aps, 0).sum(axis=0) / known.sum(axis=0)
        return means

    low, high, how = bootstrap(len(truth), groups, drawn_ap)
    whole: Any = {
        **{f"ap{name}": _mean(precision[bound, ..., 0]) for name, bound in _BOUNDS.items()},
        **{f"ap_{name}": _mean(precision[..., place]) for place, name in enumerate(_AREAS, 1)},
        **{f"mask_ap{name}": None if masks is None else _mean(masks[bound]) for name, bound in _BOUNDS.items()},
        "ar100": _mean(recall[:, :, 0]),
    }
    rows = []
    for place, name in enumerate(classes.names):
        mask_ap = None if masks is None else _mean(masks[:, :, place])
        ap, ap50 = _mean(precision[:, :, place, 0]), _mean(precision[0, :, place, 0])
        seen = int((counts[:, place] > 0).sum()), int(counts[:, place].sum())
        rows.append(ObjectMeasure(name, *seen, ap, ap50, mask_ap, _mean(recall[0, place, 0])))
    whole |= {"low": low, "high": high, "interval": how, "per_class": tuple(rows)}
    return ObjectScores(len(truth), int(counts.sum()), **whole)


_BOUNDS: dict[str, Any] = {"": slice(None), "50": 0, "75": 5}
"""Places in the ten bounds of IoU."""


def coco_results(found: Detections, classes: ObjectClasses, image: int) -> list[dict[str, Any]]:
    """The rows of a file of COCO's results: what was found in the picture of this number."""
    rows: list[dict[str, Any]] = []
    for label, box, score in zip(
        found.labels.tolist(), coco_boxes(found.boxes).tolist(), found.scores.tolist(), strict=True
    ):
        rows.append({"image_id": image, "category_id": classes.ids[label], "bbox": box, "score": score})
    for row, code in zip(rows, found.masks or (), strict=found.masks is not None):
        counts = code["counts"]
        text = counts.decode() if isinstance(counts, bytes) else counts
        row["segmentation"] = {"size": list(map(int, code["size"])), "counts": text}
    return rows


def coco_boxes(boxes: np.ndarray) -> np.ndarray:
    """Edges (n, 4) to left, top, width and height, float64."""
    edges = boxes.astype(float)
    return np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], axis=1)


class _Matches(NamedTuple):
    """The detections of a class, the surest first, by the picture that they are in."""

    counts: np.ndarray  # (pictures,) objects to find
    pictures: np.ndarray  # (n,) places
    right: np.ndarray  # (IoU, n) bool, that has an object
    counted: np.ndarray  # (IoU, n) bool, that has none that is ignored
    recalls: np.ndarray  # at which precision is taken, rising

    def average_precisions(self, weights: np.ndarray) -> np.ndarray:
        """(k,), 0 to 1, where each picture is there as often as (k, pictures) says; NaN where no object is."""
        if len(weights) > 1 and len(weights) * len(self.pictures) > _ENTRIES:
            return np.concatenate([self.average_precisions(half) for half in np.array_split(weights, 2)])
        there = (weights @ self.counts)[:, None]
        some = np.maximum(there, 1)
        wanted = np.ceil(self.recalls * some).astype(int)  # objects, so many that their share of all is not below
        wanted -= (wanted - 1) / some >= self.recalls
        wanted += wanted / some < self.recalls
        drawn = weights[:, self.pictures]
        every = np.concatenate([np.zeros((len(weights), 1), int), drawn.cumsum(axis=1)], axis=1)  # before each one
        rows = np.arange(len(weights))[:, None] * (int(there.max()) + 1)  # so that one search finds those of all rows
        totals = np.zeros(len(weights))
        for right, counted in zip(self.right, self.counted, strict=True):
            places = np.flatnonzero(right)
            if not len(places):
                continue
            got = drawn[:, places].cumsum(axis=1)
            out = np.flatnonzero(~counted)
            gone = np.concatenate([np.zeros((len(weights), 1), int), drawn[:, out].cumsum(axis=1)], axis=1)
            seen = every[:, places + 1] - gone[:, np.searchsorted(out, places)]
            precision = got / np.maximum(seen, 1)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            padded = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
            at = np.searchsorted((got + rows).reshape(-1), wanted + rows).reshape(wanted.shape)
            at -= np.arange(len(rows))[:, None] * len(places)
            totals += np.take_along_axis(padded, at, axis=1).mean(axis=1)
        return np.where(there[:, 0] > 0, totals / len(self.right), np.nan)


def _files(truth: Sequence[Objects], found: Sequence[Detections], classes: ObjectClasses) -> Any:
    """pycocotools' files of annotations and results; classes and pictures are numbered from 1."""
    coco_masks()
    from pycocotools.coco import COCO

    numbered = ObjectClasses(classes.names, tuple(range(1, len(classes.names) + 1)))
    common = {
        "images": [{"id": number, "height": row.size[0], "width": row.size[1]} for number, row in enumerate(truth, 1)],
        "categories": [{"id": number} for number in numbered.ids],
    }
    right = [row for number, one in enumerate(truth, 1) for row in _annotations(one, numbered, number)]
    said = [row for number, one in enumerate(found, 1) for row in coco_results(one, numbered, number)]
    for row in said:
        row |= {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
    files = COCO(), COCO()
    for file, rows in zip(files, (right, said), strict=True):
        file.dataset = common | {"annotations": [{**row, "id": number} for number, row in enumerate(rows, 1)]}
        file.createIndex()
    return files


def _measured(files: Any, kind: str) -> tuple[np.ndarray, np.ndarray, list[_Matches]]:
    """Precision (IoU, recall, class, area) and recall (IoU, class, area), −1 where no object is; and, class by class,
    matches of any area. Areas are all, then small, medium, large; of masks all."""
    from pycocotools.cocoeval import COCOeval

    run = COCOeval(*files, kind)
    params = run.params
    params.maxDets = [_MOST]
    if kind == "segm":
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    run.evaluate()
    run.accumulate()
    pictures = len(params.imgIds)
    every = range(0, len(run.evalImgs), pictures * len(params.areaRng))
    matched = [_matches(run.evalImgs[first : first + pictures], params.recThrs) for first in every]
    return run.eval["precision"][..., 0], run.eval["recall"][..., 0], matched


def _matches(pictures: Sequence[Mapping[str, Any] | None], recalls: np.ndarray) -> _Matches:
    """Of what COCOeval says of one class, picture by picture."""
    counts = np.array([0 if one is None else int((np.asarray(one["gtIgnore"]) == 0).sum()) for one in pictures])
    known = [one for one in pictures if one is not None]
    where = [place for place, one in enumerate(pictures) if one is not None]
    if not known:
        none = np.zeros((10, 0), bool)
        return _Matches(counts, np.zeros(0, int), none, none, recalls)
    scores = np.concatenate([one["dtScores"] for one in known])
    order = np.argsort(-scores, kind="stable")
    places = np.repeat(where, [len(one["dtScores"]) for one in known])[order]
    got, ignored = (np.concatenate([one[key] for one in known], axis=1)[:, order] for key in ("dtMatches", "dtIgnore"))
    counted = ~ignored.astype(bool)
    return _Matches(counts, places, (got > 0) & counted, counted, recalls)


def _annotations(one: Objects, classes: ObjectClasses, image: int) -> list[dict[str, Any]]:
    """Rows of a file of annotations. What is ignored and of no class is ignored in every class."""
    reach = [range(len(classes.ids)) if label < 0 else (label,) for label in one.labels.tolist()]
    labels = np.array([place for places in reach for place in places], np.int64)
    one = replace(one.take(np.repeat(np.arange(len(one)), list(map(len, reach)))), labels=labels)
    codes = None if one.shapes is None else tuple(one.codes())
    exact = Detections(one.boxes, np.ones(len(one), np.float32), one.labels, codes)
    rows = coco_results(exact, classes, image)
    for row, ignored in zip(rows, one.ignored.tolist(), strict=True):
        area = row["bbox"][2] * row["bbox"][3]
        if one.shapes is not None:
            area = float(coco_masks().area(row["segmentation"]))
        row |= {"area": area, "iscrowd": int(ignored)}
    return rows


def _check(row: Objects, one: Detections, classes: int, masked: bool) -> None:
    """Refuse detections that COCOeval would take for something else."""
    lengths = {len(one.boxes), len(one.scores), len(one.labels)} | (
        {len(one.masks)} if one.masks is not None else set()
    )
    if len(lengths) > 1 or (len(one) and not 0 <= one.labels.min() <= one.labels.max() < classes):
        raise DataError(f"detections have other numbers of boxes, scores, labels, or other classes than the {classes}")
    finite = np.isfinite(one.boxes).all() and np.isfinite(one.scores).all()
    if not finite or (one.boxes[:, 2:] < one.boxes[:, :2]).any():
        raise DataError("a detection is not finite, or its box ends before it begins")
    if masked and len(one) and one.masks is None:
        raise DataError("the detections of some pictures have masks, and those of others have none")
    if any(tuple(code["size"]) != tuple(row.size) for code in one.masks or ()):
        raise DataError(f"a mask has another size than its picture of {row.size[0]}×{row.size[1]} pixels")


def _mean(values: np.ndarray) -> Any:
    """In percent, of those that are there."""
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else None
