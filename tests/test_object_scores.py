"""Average precision is pycocotools', to the last digit; and it is another implementation's, and one written out."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maehub.data import ObjectClasses, Objects, code_of
from maehub.dense import Detections
from maehub.errors import DataError
from maehub.train.evaluation import ObjectScores, score_objects
from maehub.train.evaluation.objects.scores import _files, _measured, coco_results

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
