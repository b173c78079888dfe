"""Average precision is pycocotools', to the last digit; and it is another implementation's, and one written out."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import maehub.data
import maehub.dense
from maehub.cli import command_line as cli
from maehub.data import Labelled, LabelledSplit, ObjectClasses, ObjectLabels, Objects, code_of, find_images
from maehub.dense import Detections
from maehub.errors import EXIT_SKIPPED, DataError, UsageError
from maehub.train import FinetuneConfig, ObjectScores, evaluate, predict_objects
from maehub.train.evaluation import EvaluateConfig, score_objects
from maehub.train.evaluation.dense import evaluating
from maehub.train.evaluation.dense.object_scores import _files, _measured, coco_results
from maehub.train.evaluation.dense.plots import (
    Example,
    Mark,
    counted,
    found_marks,
    marked,
    object_colours,
    object_sheet,
    owners,
    sure_ones,
)
from maehub.train.reports.report import write_report

coco = pytest.importorskip("pycocotools.coco")
cocoeval = pytest.importorskip("pycocotools.cocoeval")
mask = pytest.importorskip("pycocotools.mask")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools, with newer numpys
SIZE = (120, 160)
CLASSES = ObjectClasses(("cat", "dog", "owl"), (18, 7, 44))


def objects(*rows, size=SIZE, masks=False):
    """Rows of (left, top, right, bottom, label), a sixth number being whether it is ignored."""
    boxes = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
    labels, ignored = np.array([row[4] for row in rows], np.int64), np.array([bool(row[5:]) for row in rows], bool)
    shapes = tuple(disc(box, size) for box in boxes) if masks else None
    return Objects(size, boxes, labels, ignored, shapes)


def detections(*rows, size=SIZE, masks=False):
    """Rows of (left, top, right, bottom, label, score)."""
    boxes = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
    labels, scores = np.array([row[4] for row in rows], np.int64), np.array([row[5] for row in rows], np.float32)
    return Detections(boxes, scores, labels, tuple(disc(box, size) for box in boxes) if masks else None)


def disc(box, size):
    """An ellipse in a box."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    across, down = (
        (x - (box[0] + box[2]) / 2) / (box[2] - box[0] + 1),
        (y - (box[1] + box[3]) / 2) / (box[3] - box[1] + 1),
    )
    return code_of(across**2 + down**2 <= 0.25)


def as_files(truth, found, folder, classes=CLASSES):
    """The annotations and results that a user of pycocotools has, as JSON: written without this package's own code."""
    rows, results = [], []
    for image, (one, said) in enumerate(zip(truth, found, strict=True)):
        for place in range(len(one)):
            left, top, right, bottom = map(float, one.boxes[place])
            row = {"id": len(rows) + 1, "image_id": 100 + image, "category_id": classes.ids[one.labels[place]]}
            row |= {"bbox": [left, top, right - left, bottom - top], "iscrowd": int(one.ignored[place])}
            row["area"] = (right - left) * (bottom - top)
            if one.shapes is not None:
                code = one.codes()[place]
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
                row["area"] = float(mask.area(code))
            rows.append(row)
        for place in range(len(said)):
            left, top, right, bottom = map(float, said.boxes[place])
            row = {"image_id": 100 + image, "category_id": classes.ids[said.labels[place]]}
            row |= {"bbox": [left, top, right - left, bottom - top], "score": float(said.scores[place])}
            if said.masks is not None:
                code = said.masks[place]
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            results.append(row)
    images = [{"id": 100 + image, "height": one.size[0], "width": one.size[1]} for image, one in enumerate(truth)]
    categories = [{"id": number, "name": name} for number, name in zip(classes.ids, classes.names, strict=True)]
    (folder / "truth.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": rows}))
    (folder / "found.json").write_text(json.dumps(results))
    return folder / "truth.json", folder / "found.json"


def by_pycocotools(truth, found, folder, kind="bbox"):
    """The twelve numbers, percent, and precision; the detections' file must have a row."""
    with contextlib.redirect_stdout(io.StringIO()):
        files = as_files(truth, found, folder)
        right = coco.COCO(str(files[0]))
        run = cocoeval.COCOeval(right, right.loadRes(str(files[1])), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return 100 * np.array(run.stats), run.eval["precision"]


NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def assert_same(truth, found, folder, masks=False):
    scores = score_objects(truth, found, CLASSES, None)
    stats, precision = by_pycocotools(truth, found, folder)
    for name, value in zip((*NAMES, "ar100"), stats[[0, 1, 2, 3, 4, 5, 8]], strict=True):
        assert getattr(scores, name) == (None if value < 0 else pytest.approx(value, abs=1e-6)), name
    order = sorted(CLASSES.ids)
    for row, number in zip(scores.per_class, CLASSES.ids, strict=True):
        own = precision[:, :, order.index(number), 0, 2]
        assert row.ap == (None if (own < 0).all() else pytest.approx(100 * own.mean(), abs=1e-6))
    if masks:
        stats, _ = by_pycocotools(truth, found, folder, "segm")
        for name, value in zip(("mask_ap", "mask_ap50", "mask_ap75"), stats, strict=False):
            assert getattr(scores, name) == pytest.approx(value, abs=1e-6)
    else:
        assert scores.mask_ap is None
    # what intervals are made of, where each picture is drawn once
    tables = _measured(_files(truth, found, CLASSES), "bbox")[2]
    for row, table in zip(scores.per_class, tables, strict=True):
        (drawn,) = table.average_precisions(np.ones((1, len(truth)), int))
        assert drawn == pytest.approx(np.nan if row.ap is None else row.ap / 100, abs=1e-9, nan_ok=True)
    assert ObjectScores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False))) == scores
    return scores


BOX = (10, 10, 60, 60)
CASES = {
    "right": ([objects((*BOX, 0))], [detections((*BOX, 0, 0.9))]),
    "a crowd takes many": (
        [objects((0, 0, 150, 100, 0, 1), (*BOX, 0))],
        [detections((0, 0, 40, 40, 0, 0.9), (20, 20, 60, 60, 0, 0.8), (*BOX, 0, 0.7), (100, 0, 159, 119, 0, 0.6))],
    ),
    "a crowd alone is no class": (
        [objects((*BOX, 0, 1), (*BOX, 1))],
        [detections((*BOX, 0, 0.9), (12, 12, 60, 60, 1, 0.4))],
    ),
    "pictures without detections or objects": (
        [objects((*BOX, 0)), objects(), objects((*BOX, 2)), objects()],
        [detections(), detections((*BOX, 0, 0.9), (*BOX, 1, 0.3)), detections((*BOX, 2, 0.2)), detections()],
    ),
    "the same twice": ([objects((*BOX, 0))], [detections((*BOX, 0, 0.9), (*BOX, 0, 0.9), (*BOX, 0, 0.8))]),
    "equal scores": (
        [objects((*BOX, 0), (80, 10, 100, 30, 0)), objects((*BOX, 0))],
        [
            detections((0, 90, 20, 110, 0, 0.5), (*BOX, 0, 0.5), (80, 10, 100, 29, 0, 0.5)),
            detections((90, 0, 110, 9, 0, 0.5), (11, 10, 60, 61, 0, 0.5)),
        ],
    ),
    "more than a hundred": (
        [objects((*BOX, 0), (80, 10, 100, 30, 1))],
        [
            detections(
                *((place, place, place + 20, place + 20, 0, 0.9 - place / 1000) for place in range(130)),
                (*BOX, 0, 0.1),
                (80, 10, 100, 30, 1, 0.05),
            )
        ],
    ),
    "small, medium and large": (
        [objects((0, 0, 10, 10, 0), (20, 20, 70, 70, 0), (0, 0, 150, 118, 0))],
        [
            detections(
                (0, 0, 10, 11, 0, 0.3), (20, 20, 75, 70, 0, 0.9), (4, 0, 150, 118, 0, 0.6), (50, 50, 53, 53, 0, 1)
            )
        ],
    ),
    "halves of an IoU": ([objects((0, 0, 10, 10, 0))], [detections((0, 0, 10, 5, 0, 0.9), (0, 0, 10, 20, 0, 0.8))]),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_pycocotools(case, tmp_path):
    assert_same(*CASES[case], tmp_path)


def test_nothing_found_is_nothing():
    truth = [objects((*BOX, 0))]
    scores = score_objects(truth, [detections()], CLASSES, None)
    assert (scores.ap, scores.ap50, scores.ar100, scores.mask_ap) == (0, 0, 0, None)
    assert [row.ap for row in scores.per_class] == [0, None, None]
    truth = [objects((*BOX, 0), masks=True)]
    assert score_objects(truth, [detections(masks=True)], CLASSES, None).mask_ap == 0


@st.composite
def sets(draw):
    """Few pictures on a coarse grid, so that boxes meet, scores are equal, and thresholds are hit exactly."""
    truth, found = [], []
    box = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 6), st.integers(1, 6))
    row = st.tuples(box, st.integers(0, 2), st.integers(0, 4))
    for _ in range(draw(st.integers(1, 4))):
        for kind, made in (("truth", truth), ("found", found)):
            rows = []
            for (left, top, width, height), label, number in draw(st.lists(row, max_size=6)):
                last = (number / 4,) if kind == "found" else (1,) if number == 0 else ()
                rows.append((10 * left, 10 * top, 10 * (left + width), 10 * (top + height), label, *last))
            made.append(rows)
    return truth, found


@settings(deadline=None)
@given(sets(), st.booleans())
def test_random_scores_are_those_of_pycocotools(tmp_path_factory, made, masks):
    truth = [objects(*rows, masks=masks) for rows in made[0]]
    found = [detections(*rows, masks=masks) for rows in made[1]]
    if not any((~one.ignored).any() for one in truth):
        with pytest.raises(DataError, match="no object"):
            score_objects(truth, found, CLASSES, None)
    elif any(map(len, found)):
        assert_same(truth, found, tmp_path_factory.mktemp("files"), masks)


def scene(count, classes=3, masks=False, seed=0):
    """Pictures with objects, most of which are found, roughly."""
    draw, truth, found = np.random.default_rng(seed), [], []
    for _ in range(count):
        rows = []
        for _ in range(draw.integers(0, 6)):
            left, top = draw.integers(0, 100), draw.integers(0, 70)
            rows.append((left, top, left + draw.integers(8, 60), top + draw.integers(8, 50), draw.integers(0, classes)))
        truth.append(objects(*(row if draw.random() < 0.9 else (*row, 1) for row in rows), masks=masks))
        said = []
        for *box, label in rows:
            corners = np.sort((np.array(box) + draw.normal(0, 3, 4)).reshape(2, 2), axis=0).reshape(-1)
            if draw.random() < 0.8:
                said.append((*corners, label, draw.uniform(0.3, 1)))
        said += [
            (5, 5, 5 + draw.integers(9, 90), 50, draw.integers(0, classes), draw.uniform(0, 0.7)) for _ in range(3)
        ]
        found.append(detections(*sorted(said, key=lambda row: -row[5]), masks=masks))
    return truth, found


@pytest.mark.parametrize("masks", [False, True])
def test_scores_are_those_of_another_implementation(masks, tmp_path):
    faster = pytest.importorskip("faster_coco_eval")
    truth, found = scene(20, masks=masks)
    scores = assert_same(truth, found, tmp_path, masks)
    files = as_files(truth, found, tmp_path)
    for kind, names in (("bbox", (*NAMES, "", "", "ar100")), ("segm", ("mask_ap", "mask_ap50", "mask_ap75")))[
        : 1 + masks
    ]:
        right = faster.COCO(str(files[0]))
        run = faster.COCOeval_faster(right, right.loadRes(str(files[1])), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
        for name, value in zip(names, run.stats, strict=False):
            if name:
                assert getattr(scores, name) == (None if value < 0 else pytest.approx(100 * value, abs=1e-6)), name


def overlap(one, other):
    across, down = (min(one[2 + side], other[2 + side]) - max(one[side], other[side]) for side in (0, 1))
    both = max(0, across) * max(0, down)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both)


def written_out(truth, found, bound):
    """AP of the only class, without ignored objects: each detection by its score takes the best object that is free."""
    said = sorted(
        (
            (-float(score), image, tuple(map(float, box)))
            for image, one in enumerate(found)
            for box, score in zip(one.boxes, one.scores, strict=True)
        ),
        key=lambda row: row[0],
    )
    free = [[tuple(map(float, box)) for box in one.boxes] for one in truth]
    total, right, points = sum(map(len, free)), 0, []
    for number, (_, image, box) in enumerate(said, 1):
        ranked = sorted(free[image], key=lambda other: overlap(box, other))
        if ranked and overlap(box, ranked[-1]) >= bound:
            free[image].remove(ranked[-1])
            right += 1
        points.append((right / total, right / number))
    return 100 * np.mean([max((p for r, p in points if r >= step / 100 - 1e-12), default=0) for step in range(101)])


def test_average_precision_is_what_it_is_written_to_be():
    truth, found = scene(15, classes=1, seed=4)
    truth = [one.take(~one.ignored) for one in truth]
    scores = score_objects(truth, found, ObjectClasses(("thing",), (1,)), None)
    aps = [written_out(truth, found, bound / 100) for bound in range(50, 100, 5)]
    assert scores.ap == pytest.approx(np.mean(aps))
    assert (scores.ap50, scores.ap75) == (pytest.approx(aps[0]), pytest.approx(aps[5]))
    assert 0 < scores.ap < 100


# -- intervals


def test_a_picture_that_is_drawn_twice_counts_as_two(tmp_path):
    truth, found = scene(12)
    weights = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12))
    chosen = np.repeat(np.arange(12), weights)
    again = score_objects([truth[place] for place in chosen], [found[place] for place in chosen], CLASSES, None)
    tables = _measured(_files(truth, found, CLASSES), "bbox")[2]
    for row, table in zip(again.per_class, tables, strict=True):
        assert 100 * table.average_precisions(weights[None])[0] == pytest.approx(row.ap, abs=0.7)  # of equal scores


def test_intervals_are_over_pictures_or_groups():
    truth, found = scene(40)
    alone = score_objects(truth, found, CLASSES, None)
    assert alone.low < alone.ap < alone.high
    assert "bootstrap over 40 pictures" in str(alone)
    assert score_objects(truth, found, CLASSES, None) == alone
    fourfold = score_objects(truth * 4, found * 4, CLASSES, np.tile(np.arange(40), 4))
    assert fourfold.high - fourfold.low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert fourfold.interval == "bootstrap over 40 groups"
    more = score_objects(*scene(160), CLASSES, None)
    assert more.high - more.low < 0.8 * (alone.high - alone.low)
    few = score_objects(truth, found, CLASSES, np.arange(40) % 3)
    assert (few.low, few.high) == (None, None)
    assert "no interval: 3 groups" in str(few)


def test_resamples_without_an_object_do_not_count():
    """One picture of twelve has the only object."""
    truth = [objects((*BOX, 0)), *[objects()] * 11]
    scores = score_objects(truth, [detections((*BOX, 0, 0.9)), *[detections()] * 11], CLASSES, None)
    assert (scores.low, scores.ap, scores.high) == pytest.approx((100, 100, 100))


# -- what is said, and what is refused


def test_scores_print_as_tables():
    scores = score_objects(*scene(12, masks=True), CLASSES, None)
    for text in (str(scores), scores._repr_html_()):
        for word in ("AP50", "AP small", "recall", "MASK AP", "owl", "95 % interval", "n = 12"):
            assert word in text
    assert scores.headline == ("AP", (scores.ap, scores.low, scores.high))
    assert scores.in_words.startswith(f"AP of boxes {scores.ap:.1f} % (95 % interval")
    assert scores.summary()["ap50"] == scores.ap50
    rows = scores.table()[1]
    assert [row[0] for row in rows] == [row.name for row in sorted(scores.per_class, key=lambda row: row.ap)]


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (Detections(np.array([[0, 0, np.nan, 5]], np.float32), np.ones(1, np.float32), np.zeros(1, int)), "finite"),
        (detections((5, 5, 4, 9, 0, 0.5)), "ends before"),
        (detections((0, 0, 4, 9, 3, 0.5)), "other classes"),
        (Detections(np.zeros((2, 4), np.float32), np.ones(1, np.float32), np.zeros(1, int)), "other numbers"),
        (detections((0, 0, 4, 9, 0, 0.5), size=(9, 9), masks=True), "another size"),
    ],
)
def test_what_cannot_be_is_refused(said, word):
    with pytest.raises(DataError, match=word):
        score_objects([objects((*BOX, 0), masks=True)], [said], CLASSES, None)


def test_masks_are_of_all_or_none():
    truth = [objects((*BOX, 0), masks=True)] * 2
    with pytest.raises(DataError, match="have none"):
        score_objects(truth, [detections((*BOX, 0, 1), masks=True), detections((*BOX, 0, 1))], CLASSES, None)


def test_results_are_those_of_coco():
    (row,) = coco_results(detections((10, 20, 40, 30, 1, 0.5), masks=True), CLASSES, 9)
    assert (row["image_id"], row["category_id"], row["bbox"], row["score"]) == (9, 7, [10, 20, 30, 10], 0.5)
    assert (mask.decode(json.loads(json.dumps(row))["segmentation"]) == mask.decode(disc((10, 20, 40, 30), SIZE))).all()


# -- figures


def test_each_object_is_had_once_and_crowds_by_many():
    truth = objects((*BOX, 0), (12, 12, 60, 60, 0), (70, 10, 90, 30, 1), (0, 70, 150, 118, 0, 1))
    found = detections(
        (*BOX, 0, 0.9),
        (*BOX, 0, 0.8),  # the next best
        (*BOX, 0, 0.7),  # none is left
        (70, 10, 90, 30, 0, 0.6),  # another class
        (0, 70, 40, 110, 0, 0.6),
        (50, 70, 90, 110, 0, 0.4),
    )
    assert owners(truth, found).tolist() == [0, 1, -1, -1, 3, 3]
    assert counted(truth, found) == (2, 1, 2)
    assert counted(objects(), detections()) == (0, 0, 0)
    assert counted(objects((*BOX, 0)), detections()) == (0, 1, 0)
    assert counted(objects(), found)[2] == 6
    assert sure_ones(found).scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.6])


@pytest.mark.parametrize("size", [(60, 80), (300, 100), (7, 900)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_has_a_row_a_picture_and_three_panels(size, channels):
    pixels = np.full((*size, channels), 127, np.uint8)
    box = (1, 1, size[1] - 2, size[0] - 2)
    examples = [
        Example("a.png", pixels, objects((*box, 0), size=size, masks=True), detections((*box, 0, 0.9), size=size)),
        Example("b.png", pixels, objects(size=size), detections((*box, 2, 0.6), size=size, masks=True)),
    ]
    sheet = object_sheet(examples, CLASSES)
    high = round(size[0] * 420 / max(size))
    assert sheet.size == (3 * 428 + 8, 20 + 8 + 20 + 2 * (high + 28))
    assert object_sheet([], CLASSES).width == sheet.width


def test_boxes_are_seen_on_any_background():
    (colour, *_) = object_colours(CLASSES)
    mark = Mark(np.array([20, 40, 80, 90], np.float32), colour, "cat")
    for value in (0, 255, *[np.array(one) for one in object_colours(CLASSES)]):
        pixels = np.full((120, 160, 3), value, np.uint8)
        drawn = np.asarray(marked(pixels, [mark])).astype(int)
        for line in (drawn[37:46, 50], drawn[86:94, 50], drawn[60, 17:26], drawn[60, 76:84]):
            assert np.abs(line - pixels[0, 0]).max() > 100, "either the colour or its border differs"
        assert (drawn[65, 50] == pixels[0, 0]).all()


def test_all_that_is_false_or_missed_is_told_apart():
    truth, found = objects((10, 60, 60, 110, 0)), detections((90, 60, 140, 110, 0, 0.9))
    pixels = np.zeros((*SIZE, 3), np.uint8)
    sheet = np.asarray(object_sheet([Example("a", pixels, truth, found)], CLASSES)).reshape(-1, 3).tolist()
    colours = set(map(tuple, sheet))
    assert {(215, 25, 28), object_colours(CLASSES)[0]} <= colours
    assert len({*object_colours(CLASSES), (0, 0, 0)}) == 4
    assert [mark.text for mark in found_marks(found, CLASSES)] == ["cat 0.90"]


# -- evaluating and predicting, with what finds bright rectangles


class Finder:
    """What a detector has, and finds red rectangles, as cats, and blue ones, as owls."""

    def __init__(self, masks=False, classes=CLASSES):
        self.config = SimpleNamespace(classes=classes, masks=masks)
        self.encoder = SimpleNamespace(cls_token=torch.zeros(1), config=SimpleNamespace(channels=3))

    def predict(self, picture):
        pixels = maehub.dense.pixels_of(picture, 3)
        rows = []
        for channel, name in ((0, "cat"), (2, "owl")):
            y, x = np.nonzero((pixels[..., channel] > 200) & (pixels[..., 1] < 90))
            if len(y):
                label = self.config.classes.names.index(name)
                rows.append((x.min(), y.min(), x.max() + 1, y.max() + 1, label, 0.9 - 0.6 * (len(y) < 150)))
        rows.sort(key=lambda row: -row[5])
        return detections(*rows, size=pixels.shape[:2], masks=self.config.masks)


def lay(folder, count=12):
    """Pictures with a red and a blue rectangle, and the objects that they show: one is missed, some are unsure."""
    folder.mkdir(parents=True)
    draw, rows = np.random.default_rng(0), []
    for number in range(count):
        pixels, made = np.full((60, 80, 3), 60, np.uint8), []
        for label, colour in ((0, (230, 30, 30)), (2, (30, 30, 230))):
            left, top = int(draw.integers(0, 30)) + 20 * label, int(draw.integers(0, 30))
            right, bottom = left + int(draw.integers(8, 20)), top + int(draw.integers(8, 20))
            pixels[top:bottom, left:right] = colour
            made.append((left, top, right, bottom, label))
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        rows.append(objects(*made, *([(60, 40, 79, 59, 1)] if number == 3 else []), size=(60, 80)))
    return rows


@pytest.fixture
def detector(tmp_path, monkeypatch):
    """A run folder and a set, and what reads them."""
    rows = lay(tmp_path / "pictures")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "detector.json").write_text("{}")
    config = {"kind": "finetune", "data": str(tmp_path / "pictures"), "seed": 0, "val_share": 0.2, "group": None}
    labels = np.stack([np.isin(np.arange(3), row.labels) for row in rows])
    labelled = Labelled(
        find_images(tmp_path / "pictures"), labels, CLASSES.names, objects=ObjectLabels((*rows,), CLASSES)
    )
    at = SimpleNamespace(
        run=tmp_path / "run", data=tmp_path / "pictures", model=Finder(), labelled=labelled, config=config
    )
    monkeypatch.setattr(maehub.dense, "load_detector", lambda folder, device: at.model, raising=False)
    monkeypatch.setattr(
        evaluating, "find_objects", lambda *a, **k: SimpleNamespace(training=at.labelled, testing=None), raising=False
    )
    monkeypatch.setattr(
        evaluating,
        "split_objects",
        lambda *a, **k: LabelledSplit(labelled.take(np.arange(2, 12)), labelled.take(np.arange(2)), True),
        raising=False,
    )
    return at


def test_a_detector_is_evaluated(detector, tmp_path, capsys):
    found = evaluate(
        EvaluateConfig(str(detector.data), str(detector.run), tmp_path / "e", quiet=True, precision="fp32")
    )
    assert (found.scores.n, found.scores.objects) == (12, 25)
    assert found.scores.per_class[0].recall == 100
    assert found.scores.per_class[1].ap == 0
    names = ["evaluation.json", "worst.png", "detections.json"]
    assert [path.name for path in found.files] == names
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == sorted(names)
    facts = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert (facts["task"], facts["ap"], facts["images"][3]) == ("detect", found.scores.ap, "03.png")
    files = as_files(detector.labelled.objects.rows, [detections()] * 12, tmp_path)
    results = [
        row | {"image_id": row["image_id"] + 99} for row in json.loads((tmp_path / "e" / "detections.json").read_text())
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        right = coco.COCO(str(files[0]))
        run = cocoeval.COCOeval(right, right.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert 100 * run.stats[0] == pytest.approx(found.scores.ap)
    assert "boxes, mean over classes" in str(found)
    line = ["evaluate", str(detector.data), "-m", str(detector.run), "--json", "--quiet"]
    assert cli.main(line) == 0
    assert json.loads(capsys.readouterr().out)["ap"] == found.scores.ap
    for wrong in (["-o", str(tmp_path / "e")], ["--batch-size", "4"], ["--label", "x"], ["--corruptions"]):
        assert cli.main([*line, *wrong]) == UsageError.exit_code


def test_what_a_run_held_out_is_measured(detector):
    (detector.run / "config.json").write_text(json.dumps(detector.config))
    assert evaluate(EvaluateConfig(str(detector.data), str(detector.run), quiet=True)).scores.n == 2


def test_classes_are_matched_by_their_names(detector):
    config = EvaluateConfig(str(detector.data), str(detector.run), quiet=True, precision="fp32")
    usual = evaluate(config).scores
    detector.model = Finder(classes=ObjectClasses(("owl", "emu", "cat", "dog"), (1, 2, 3, 4)))
    other = evaluate(config).scores
    assert (other.ap, other.low, other.ap50) == pytest.approx((usual.ap, usual.low, usual.ap50))
    assert [row.objects for row in other.per_class] == [12, 0, 12, 1]
    detector.model = Finder(classes=ObjectClasses(("owl", "cat"), (1, 2)))
    with pytest.raises(DataError, match="does not know: dog"):
        evaluate(config)


@pytest.mark.parametrize("masks", [False, True])
def test_predictions_are_results_of_coco_and_overlays(detector, tmp_path, masks):
    (detector.data / "sub").mkdir()
    Image.new("RGB", (30, 20)).save(detector.data / "sub" / "empty.png")
    (detector.data / "x.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"x\.png"):
        predict_objects(Finder(masks), detector.data, tmp_path / "p", progress=False)
    assert not (tmp_path / "p").exists()
    found = predict_objects(Finder(masks), detector.data, tmp_path / "p", skip_bad=True, progress=False)
    assert (len(found), len(found.skipped)) == (13, 1)
    results = json.loads((tmp_path / "p" / "detections.json").read_text())
    assert len(results) == 24
    assert all(("segmentation" in row) == masks for row in results)
    facts = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert facts["categories"] == {"cat": 18, "dog": 7, "owl": 44}
    named = {row["image_id"]: row for row in facts["predictions"]}
    sure = [row for row in results if row["score"] >= 0.5]
    assert 0 < len(sure) < 24
    assert found.counts.sum() == len(sure) == sum(len(row["objects"]) for row in named.values())
    first = named[results[0]["image_id"]]
    assert (first["path"], first["height"], first["width"]) == (str(detector.data / "00.png"), 60, 80)
    empty = next(row for row in named.values() if row["path"].endswith("empty.png"))
    assert (empty["objects"], empty["found"]) == ([], 0)
    for name, size in (("sub/empty.png", (30, 20)), ("03.png", (80, 60))):
        with Image.open(tmp_path / "p" / "overlays" / name) as picture:
            assert picture.size == size
    for text in (str(found), found._repr_html_()):
        assert "OBJECTS FROM 0.5 ON" in text
        assert "owl" in text
    with pytest.raises(UsageError, match="not empty"):
        predict_objects(Finder(), detector.data, tmp_path / "p", skip_bad=True, progress=False)
    with pytest.raises(UsageError, match="several pictures are called 00"):
        predict_objects(Finder(), [detector.data / "00.png"] * 2, tmp_path / "q", progress=False)


def test_the_command_predicts_objects(detector, tmp_path, capsys):
    line = ["predict", str(detector.data), "-m", str(detector.run), "--quiet", "--json"]
    assert cli.main([*line, "-o", str(tmp_path / "p")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    assert (tmp_path / "p" / "detections.json").exists()
    (detector.data / "x.png").write_bytes(b"no")
    assert cli.main(line) == DataError.exit_code
    assert cli.main([*line, "--skip-bad"]) == EXIT_SKIPPED
    assert cli.main([*line, "-o", str(tmp_path / "p.csv")]) == UsageError.exit_code
    assert cli.main([*line, "--image-size", "64"]) == UsageError.exit_code


@pytest.mark.parametrize("masks", [False, True])
def test_a_report_shows_classes_and_curves(tmp_path, masks):
    scores = score_objects(*scene(12, masks=masks), CLASSES, None)
    config = {
        "kind": "finetune",
        "task": "detect",
        "model": "vit-nano",
        "classes": [*CLASSES.names],
        "settings": {"recipe": "r", "steps": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scores.json").write_text(
        json.dumps({"task": "detect", "split": "as given", "scores": scores.to_dict()})
    )
    lines = [{"step": step, "loss": 1.0, "val_ap": 5.0 * step, "val_ap50": 9.0 * step} for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = write_report(tmp_path, FinetuneConfig).read_text()
    wanted = [
        "A detector on vit-nano",
        "95 % interval",
        "Classes, worst first",
        "owl",
        "AP from step 0",
        "0.0 % → 20.0 %",
    ]
    for text in [*wanted, "AP50", f"{scores.ap:.1f} %", f"{scores.per_class[0].recall:.1f} %"]:
        assert text in page, text
    assert ("AP of masks" in page) == masks
    (tmp_path / "scores.json").unlink()
    assert "AP so far" in write_report(tmp_path, FinetuneConfig).read_text()


def test_what_is_ignored_and_of_no_class_is_ignored_in_every_class():
    classes = ObjectClasses(("a", "b", "c"), (1, 2, 3))
    boxes = np.array([[0, 0, 20, 20], [40, 40, 60, 60]], np.float32)
    truth = [Objects((80, 80), boxes, np.array([0, -1]), np.array([False, True]))] * 2
    more = np.array([[0, 0, 20, 20], [42, 42, 58, 58]], np.float32)
    found = [Detections(more, np.array([0.5, 0.9], np.float32), np.array([0, 0]))] * 2
    assert score_objects(truth, found, classes, None).ap == pytest.approx(100)
    off = [Objects((80, 80), boxes[:1], np.array([0]), np.array([False]))] * 2
    assert score_objects(off, found, classes, None).ap < 60


def test_what_is_of_no_class_stays_so_in_the_order_of_a_model(tmp_path):
    rows = lay(tmp_path / "pictures")
    samples = find_images(tmp_path / "pictures")
    row = Objects(rows[0].size, np.array([[0, 0, 4, 4]] * 2, np.float32), np.array([0, -1]), np.array([False, True]))
    own, known = ObjectClasses(("b",), (1,)), ObjectClasses(("a", "b"), (1, 2))
    labelled = Labelled(samples, np.ones((len(samples), 1), bool), ("b",), objects=ObjectLabels((row,) * 12, own))
    moved = evaluating.in_classes(labelled, known, "it").objects
    assert moved.rows[0].labels.tolist() == [1, -1]
