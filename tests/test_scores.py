"""Scores beside scikit-learn's and scipy's: accuracy, intervals, calibration, several labels; what is refused."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn import metrics

from maehub.errors import DataError, DivergedError, UsageError
from maehub.train.evaluation.scores import average_precision, losses, probabilities, score, wilson


def made(count, classes, seed=0, gain=2.0):
    """Logits that are right more often than not, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += gain
    return logits, labels


def names(count):
    return tuple(f"class {number}" for number in range(count))


# --- intervals


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 12), (83, 100), (4321, 5000)])
def test_the_interval_is_wilsons(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_an_interval_of_nothing_is_refused():
    for right, n in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(UsageError):
            wilson(right, n)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    rights = rng.binomial(60, 0.85, 2000)
    covered = [low <= 85 <= high for low, high in (wilson(int(right), 60) for right in rights)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def clustered(groups, each, seed):
    """Right or wrong by whole groups: pictures of one patient are alike."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, groups * each)
    right = np.repeat(rng.random(groups) < 0.8, each)
    logits = np.zeros((groups * each, 2), np.float32)
    logits[np.arange(len(labels)), np.where(right, labels, 1 - labels)] = 1
    return logits, labels, np.repeat(np.arange(groups), each)


def test_pictures_of_a_group_do_not_count_as_many_trials():
    logits, labels, groups = clustered(50, 40, seed=1)
    alone, together = score(logits, labels, names(2)), score(logits, labels, names(2), groups)
    assert (alone.top1, alone.n, alone.loss) == (together.top1, together.n, together.loss)
    assert (alone.interval, together.interval) == ("Wilson", "bootstrap over 50 groups")
    # Groups that are right or wrong as a whole are 50 trials, not 2000.
    expected = wilson(round(together.top1 * 50 / 100), 50)
    assert together.high - together.low == pytest.approx(expected.high - expected.low, rel=0.15)
    assert together.high - together.low > 5 * (alone.high - alone.low)


def test_the_bootstrap_is_scipys():
    logits, labels = made(600, 5, gain=1.5)
    groups = np.random.default_rng(3).integers(0, 40, 600)
    found = score(logits, labels, names(5), groups)
    right = logits.argmax(axis=1) == labels
    rights, sizes = np.bincount(groups, right), np.bincount(groups)
    expected = stats.bootstrap(
        (rights, sizes),
        lambda rights, sizes, axis: rights.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.6)
    assert score(logits, labels, names(5), groups) == found  # the same resamples every time


def test_groups_need_not_be_numbered_from_0():
    logits, labels, groups = clustered(20, 5, seed=2)
    named = score(logits, labels, names(2), groups * 1000 - 7)
    assert named == score(logits, labels, names(2), groups)


def test_groups_that_do_not_differ_still_have_an_interval():
    logits = np.eye(2, dtype=np.float32)[[0, 1] * 10]
    labels = np.array([0, 1] * 10)
    one = score(logits, labels, names(2), np.zeros(20, np.int64))
    assert (one.interval, one.low, one.high) == ("Wilson over 1 group", *wilson(1, 1))
    ten = score(logits, labels, names(2), np.arange(20) // 2)
    assert (ten.interval, ten.low, ten.high) == ("Wilson over 10 groups", *wilson(10, 10))


# --- one class a picture


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (57, 2), (200, 3), (900, 12), (9000, 30)])
def test_numbers_are_those_of_sklearn(count, classes):
    logits, labels = made(count, classes)
    found = score(logits, labels, names(classes))
    predicted = logits.argmax(axis=1)
    every = range(classes)
    assert found.n == count
    assert found.top1 == pytest.approx(100 * metrics.accuracy_score(labels, predicted))
    assert np.array_equal(found.confusion, metrics.confusion_matrix(labels, predicted, labels=every))
    shares = special.softmax(logits.astype(np.float64), axis=1)
    assert np.allclose(probabilities(logits), shares, atol=1e-7)
    assert found.loss == pytest.approx(metrics.log_loss(labels, shares, labels=every), rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found.balanced_accuracy == pytest.approx(100 * metrics.balanced_accuracy_score(labels, predicted))
        parts = metrics.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=np.nan)
    for row, precision, recall, shown in zip(found.per_class, parts[0], parts[1], parts[3], strict=True):
        assert row.n == shown
        assert row.precision == (None if math.isnan(precision) else pytest.approx(100 * precision))
        assert row.recall == (None if math.isnan(recall) else pytest.approx(100 * recall))
    if classes > 5:
        assert found.top5 == pytest.approx(100 * metrics.top_k_accuracy_score(labels, logits, k=5, labels=every))
    else:
        assert found.top5 is None


def test_what_a_class_is_taken_for():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 1, 2]]
    found = score(logits, np.array([0, 0, 0, 0, 1, 2]), ("ant", "bee", "cat"))
    assert [(row.taken_for, row.times) for row in found.per_class] == [("bee", 2), (None, 0), (None, 0)]


def test_equal_logits_go_to_the_first_class():
    found = score(np.zeros((8, 8), np.float32), np.arange(8), names(8))
    assert (found.top1, found.top5) == (100 / 8, 100 * 5 / 8)
    assert found.confusion[:, 0].tolist() == [1] * 8
    assert found.loss == pytest.approx(math.log(8))


def test_calibration_error_is_that_of_its_definition():
    logits, labels = made(3000, 6, gain=2.5)
    found = score(logits, labels, names(6))
    shares = np.exp(logits.astype(np.float64))
    sure = (shares / shares.sum(axis=1, keepdims=True)).max(axis=1)
    right = logits.argmax(axis=1) == labels
    # scipy's bins are open on the other side, which no confidence here meets.
    edges = np.linspace(0, 1, 16)
    of = {statistic: stats.binned_statistic(sure, (sure, right), statistic, edges).statistic for statistic in ("mean", "count")}  # fmt: skip  # noqa: E501
    gaps = np.nan_to_num(np.abs(of["mean"][0] - of["mean"][1])) * of["count"][0]
    assert found.calibration_error == pytest.approx(100 * gaps.sum() / 3000)
    assert [row.n for row in found.bins] == of["count"][0].tolist()
    assert sum(row.n for row in found.bins) == 3000
    assert (found.bins[0].low, found.bins[-1].high) == (0, 100)


def test_a_calibrated_model_has_no_calibration_error_and_a_boastful_one_has():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40000, 3)).astype(np.float32) * 2
    shares = probabilities(logits).astype(np.float64).cumsum(axis=1)
    labels = np.minimum((rng.random(40000)[:, None] > shares).sum(axis=1), 2)
    assert score(logits, labels, names(3)).calibration_error < 1
    assert score(logits * 5, labels, names(3)).calibration_error > 15
    certain = score(np.eye(2, dtype=np.float32)[[0, 0]] * 1000, np.array([0, 1]), names(2))
    assert certain.calibration_error == pytest.approx(50)  # a confidence of exactly 1 lies in the last bin
    assert certain.bins[-1].n == 2


def test_huge_logits_overflow_nothing():
    logits = np.array([[3e38, -3e38], [-3e38, 3e38]], np.float32)
    found = score(logits, np.array([0, 0]), names(2))
    assert found.top1 == 50
    assert math.isfinite(found.loss)
    assert probabilities(logits).tolist() == [[1, 0], [0, 1]]
    assert probabilities(logits, multi_label=True).tolist() == [[1, 0], [0, 1]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_the_order_of_pictures_and_of_classes_changes_nothing(count, classes, seed):
    logits, labels = made(count, classes, seed, gain=1.0)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(count), rng.permutation(classes)
    found = score(logits, labels, names(classes))
    place = np.argsort(columns)
    other = score(logits[rows][:, columns], place[labels[rows]], tuple(names(classes)[c] for c in columns))
    for name, value in found.summary().items():
        assert getattr(other, name) == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)
    assert found.low <= found.top1 <= found.high
    by_name = {row.name: row for row in other.per_class}
    assert all(by_name[row.name][1:3] == row[1:3] for row in found.per_class)


# --- several classes a picture


@pytest.mark.parametrize("ties", [False, True])
def test_several_labels_are_those_of_sklearn(ties):
    rng = np.random.default_rng(0)
    labels = rng.random((400, 7)) < 0.25
    labels[:, 3] = False  # a class without pictures
    logits = (rng.normal(size=(400, 7)) + labels).astype(np.float32)
    if ties:
        logits = logits.round()
    found = score(logits, labels, names(7))
    shown = [0, 1, 2, 4, 5, 6]
    expected = [metrics.average_precision_score(labels[:, c], logits[:, c]) for c in shown]
    assert [row.average_precision for row in found.per_class if row.n] == pytest.approx([100 * x for x in expected])
    assert found.per_class[3].average_precision is None
    assert found.mean_average_precision == pytest.approx(100 * np.mean(expected))
    f1 = metrics.f1_score(labels[:, shown], logits[:, shown] >= 0, average="macro")
    assert found.macro_f1 == pytest.approx(100 * f1)
    shares = special.expit(logits.astype(np.float64))
    assert np.allclose(probabilities(logits, multi_label=True), shares, atol=1e-7)
    entropy = np.mean([metrics.log_loss(labels[:, c], shares[:, c], labels=[False, True]) for c in range(7)])
    assert found.loss == pytest.approx(entropy, rel=1e-9)
    told = labels.any(axis=1)
    assert found.n == told.sum() < 400
    hits = labels[np.arange(400), logits.argmax(axis=1)][told]
    assert found.top1 == pytest.approx(100 * hits.mean())
    assert (found.low, found.high) == wilson(int(hits.sum()), int(told.sum()))
    assert found.multi_label
    assert (found.top5, found.confusion, found.calibration_error) == (None, None, None)


def test_several_labels_in_groups():
    rng = np.random.default_rng(0)
    labels = rng.random((300, 4)) < 0.3
    logits = (rng.normal(size=(300, 4)) + 2 * labels).astype(np.float32)
    found = score(logits, labels, names(4), np.arange(300) // 10)
    assert found.interval == "bootstrap over 30 groups"
    assert found.low < found.top1 < found.high


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_average_precision_is_sklearns(rows):
    values, truth = np.array([row[0] for row in rows], np.float32), np.array([row[1] for row in rows])
    truth[0] = True
    assert average_precision(values, truth) == pytest.approx(metrics.average_precision_score(truth, values))


# --- as one sees them


def test_everything_is_plain_json():
    for found in (score(*made(50, 8), names(8)), score(np.ones((3, 2)), np.array([[True, False]] * 3), names(2))):
        back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert back["top1"] == found.top1
        assert back["n"] == found.n
        assert back["confusion"] == (None if found.multi_label else found.confusion.tolist())
        assert [row["name"] for row in back["per_class"]] == list(names(len(back["per_class"])))


def test_a_table_of_few_classes_has_them_all_in_order():
    found = score(*made(300, 4), ("ant", "bee", "cat", "dog"))
    lines = str(found).splitlines()
    assert lines[0].startswith(f"top-1                {found.top1:.1f} %   95 % interval {found.low:.1f} to ")
    assert lines[0].endswith("(Wilson), n = 300")
    assert [line.split()[0] for line in lines[-4:]] == ["ant", "bee", "cat", "dog"]
    assert f"{found.per_class[2].recall:.1f} %" in lines[-2]
    assert len(found.reliability().splitlines()) == 1 + sum(row.n > 0 for row in found.bins)


def test_a_table_of_many_classes_has_the_worst_and_the_best():
    found = score(*made(20000, 400), names(400))
    lines = str(found).splitlines()
    assert len(lines) < 30
    assert lines[-1] == "the 10 worst and the 3 best of 400 classes that have pictures"
    worst = min(found.per_class, key=lambda row: row.recall)
    best = max(found.per_class, key=lambda row: row.recall)
    assert f"{worst.recall:.1f} %" in lines[-14]
    assert f"{best.recall:.1f} %" in lines[-2]


def test_any_name_can_be_printed():
    strange = ("猫", "two\nlines", "<b>", "\udcff\ud800", "x" * 300)
    found = score(*made(100, 5), strange)
    str(found).encode()
    assert max(map(len, str(found).splitlines())) < 130
    html = found._repr_html_()
    html.encode()
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert "猫" in html


# --- what is refused


def test_what_does_not_fit_is_refused():
    logits, labels = made(10, 3)
    wrong = [
        (logits[:9], labels, names(3), None),
        (logits, labels, names(4), None),
        (logits, labels.astype(float), names(3), None),
        (logits, labels + 1, names(3), None),
        (logits, labels - 3, names(3), None),
        (logits, np.ones((10, 3), int), names(3), None),
        (logits, np.ones((10, 2), bool), names(3), None),
        (logits, labels, names(3), np.zeros(9, int)),
        (logits[:, :0], labels, (), None),
    ]
    for arguments in wrong:
        with pytest.raises(UsageError):
            score(*arguments)


def test_no_picture_and_no_label_are_refused():
    with pytest.raises(DataError, match="no picture"):
        score(np.empty((0, 3), np.float32), np.empty(0, np.int64), names(3))
    with pytest.raises(DataError, match="none of 4 pictures has a label"):
        score(np.ones((4, 3), np.float32), np.zeros((4, 3), bool), names(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits, labels = made(10, 3)
    logits[6, 1] = value
    with pytest.raises(DivergedError, match="1 of 10 pictures, the first at place 6"):
        score(logits, labels, names(3))


def test_losses_are_one_a_picture():
    logits, labels = made(5000, 3)
    found = losses(logits, labels)
    assert found.shape == (5000,)
    assert np.argmax(found) == np.argmin(probabilities(logits)[np.arange(5000), labels])
