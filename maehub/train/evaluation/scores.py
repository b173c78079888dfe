"""How well logits tell the classes of pictures: accuracy with its interval, class by class, calibration, loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from maehub.errors import DataError, DivergedError, UsageError
from maehub.train.evaluation.numbers import Measure, NumberScores, kappa_of_classes, score_numbers
from maehub.train.evaluation.text_tables import html_table, percent, printable, text_table

_Z = 1.959963984540054  # 95 % of a standard normal lie within this
_RESAMPLES, _SEED = 1000, 0
_FEWEST_GROUPS = 10  # that are resampled; with fewer each group counts as one trial
_BINS = 15
_ROWS = 4096  # whose probabilities are computed at once
_WORST, _BEST = 10, 3  # classes that are shown where there are more than _SHOWN
_SHOWN = 20


class Interval(NamedTuple):
    """Where an accuracy lies with 95 % confidence, in percent."""

    low: float
    high: float


class Bin(NamedTuple):
    """Pictures whose highest probability lies above ``low`` and at most at ``high``; all in percent."""

    low: float
    high: float
    n: int
    confidence: float | None  # mean of the highest probabilities; None where there is no picture
    accuracy: float | None

    @property
    def gap(self) -> float:
        """How far confidence and accuracy are apart."""
        return 0.0 if self.confidence is None or self.accuracy is None else abs(self.confidence - self.accuracy)


class ClassScore(NamedTuple):
    """One class; shares are in percent, and None where nothing is there to take them of."""

    name: str
    n: int  # pictures that show it
    predicted: int  # pictures that are said to show it
    recall: float | None  # of n
    precision: float | None  # of predicted
    average_precision: float | None = None  # only where a picture may have several classes
    taken_for: str | None = None  # the class that its pictures are most often mistaken for
    times: int = 0  # how often


@dataclass(frozen=True)
class Scores:
    """What `score` measured; shares are in percent. Prints as a table, and draws itself in a notebook."""

    n: int
    """Pictures that ``top1`` is taken over."""
    top1: float
    low: float
    """``low`` to ``high`` is the 95 % interval of ``top1``."""
    high: float
    interval: str
    """How the interval was found."""
    loss: float
    """Mean negative log-likelihood, nats; with several classes a picture, mean over pictures and classes."""
    per_class: tuple[ClassScore, ...]
    top5: float | None = None
    """None with fewer than 6 classes."""
    balanced_accuracy: float | None = None
    """Mean recall of the classes that have pictures."""
    calibration_error: float | None = None
    """Expected difference of confidence and accuracy (Guo et al. 2017), over ``bins``."""
    bins: tuple[Bin, ...] = ()
    confusion: np.ndarray | None = field(default=None, repr=False, compare=False)
    """(C, C) int64: of pictures of the class of the row, how many are taken for the class of the column."""
    mean_average_precision: float | None = None
    """Of the classes that have pictures; as ``macro_f1`` only where a picture may have several classes."""
    macro_f1: float | None = None
    """Mean F1 of the classes that have pictures, a class being predicted from a probability of one half on."""
    quadratic_kappa: float | None = None
    """Agreement beyond chance, up to 1, of classes called by whole numbers, if these are grades (Cohen 1968)."""

    @property
    def headline(self) -> tuple[str, Measure]:
        """What stands for the whole, in percent."""
        return "top-1", Measure(self.top1, self.low, self.high)

    @property
    def in_words(self) -> str:
        """The headline, as a card says it."""
        mean = self.mean_average_precision
        first = "" if mean is None else f"Mean average precision {mean:.1f} %. "
        return f"{first}Top-1 {self.top1:.1f} % (95 % interval {self.low:.1f} to {self.high:.1f})"

    @property
    def multi_label(self) -> bool:
        """Whether a picture may have several classes; then there is no confusion matrix."""
        return self.confusion is None

    def summary(self) -> dict[str, Any]:
        """The numbers that stand for the whole, for JSON; those that do not apply are None."""
        names = ("n", "top1", "low", "high", "interval", "top5", "balanced_accuracy", "calibration_error", "loss")
        return {name: getattr(self, name) for name in (*names, "mean_average_precision", "macro_f1", "quadratic_kappa")}

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return self.summary() | {
            "per_class": [row._asdict() for row in self.per_class],
            "bins": [row._asdict() for row in self.bins],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }

    def __str__(self) -> str:
        lines = [f"{name:<18}{value:>9}   {note}".rstrip() for name, value, note in self._summary_rows()]
        classes, note = self._class_rows()
        return "\n".join([*lines, "", text_table(self._class_header(), classes, left=(0, 5)), *note])

    def reliability(self) -> str:
        """The table that the calibration error is the mean of: how often the model is right when it is how sure."""
        return text_table(("CONFIDENCE", "N", "MEAN", "RIGHT"), self._bin_rows(), left=())

    def _repr_html_(self) -> str:
        classes, note = self._class_rows()
        parts = [html_table((), self._summary_rows()), html_table(self._class_header(), classes), *note]
        if self.bins:
            parts.append(html_table(("CONFIDENCE", "N", "MEAN", "RIGHT"), self._bin_rows()))
        return "".join(parts)

    def _summary_rows(self) -> list[tuple[str, str, str]]:
        interval = f"95 % interval {self.low:.1f} to {self.high:.1f} ({self.interval}), n = {self.n:,}"
        if self.multi_label:
            interval = f"the likeliest class is one of the picture's; {interval}"
        rows = [
            ("mean AP", self.mean_average_precision, "mean average precision of the classes"),
            ("macro F1", self.macro_f1, "mean F1 of the classes, at a probability of 0.5"),
            ("top-1", self.top1, interval),
            ("top-5", self.top5, ""),
            ("balanced accuracy", self.balanced_accuracy, "mean recall of the classes"),
            ("calibration error", self.calibration_error, f"over {len(self.bins)} bins of confidence"),
        ]
        shown = [(name, percent(value), note) for name, value, note in rows if value is not None]
        if self.quadratic_kappa is not None:
            shown.append(
                ("quadratic kappa", f"{self.quadratic_kappa:.3f}  ", "if the numbers of the classes are grades")
            )
        return [*shown, ("loss", f"{self.loss:.4f}  ", "nats")]

    def _class_header(self) -> tuple[str, ...]:
        shared = ("CLASS", "N", "RECALL", "PRECISION")
        return (*shared, "AP") if self.multi_label else (*shared, "PREDICTED", "MOST OFTEN TAKEN FOR")

    def _class_rows(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """All classes in order, or of many the worst and the best; and a line that says so."""
        chosen, note = list(self.per_class), []
        if len(chosen) > _SHOWN:
            ranked = sorted(
                (row for row in chosen if row.n), key=lambda row: row.average_precision or row.recall or 0.0
            )
            note = [f"the {_WORST} worst and the {_BEST} best of {len(ranked):,} classes that have pictures"]
            chosen = [*ranked[:_WORST], *ranked[max(_WORST, len(ranked) - _BEST) :]]
        rows = []
        for row in chosen:
            cells = (printable(row.name), f"{row.n:,}", percent(row.recall), percent(row.precision))
            taken = f"{printable(row.taken_for)} ({row.times:,})" if row.taken_for is not None else ""
            more = (percent(row.average_precision),) if self.multi_label else (f"{row.predicted:,}", taken)
            rows.append((*cells, *more))
        return rows, note

    def _bin_rows(self) -> list[tuple[str, ...]]:
        return [
            (f"{row.low:.0f}–{row.high:.0f} %", f"{row.n:,}", percent(row.confidence), percent(row.accuracy))
            for row in self.bins
            if row.n
        ]


AnyScores = Scores | NumberScores


def wilson(right: float, n: int) -> Interval:
    """The 95 % interval of the share of ``n`` independent trials that is right (Wilson 1927).

    It is sound for few pictures and for shares near 0 and 1.
    """
    if n < 1 or not 0 <= right <= n:
        raise UsageError(f"an interval needs 0 to n of n >= 1 trials, not {right} of {n}")
    share, squared = right / n, _Z**2 / n
    middle = (share + squared / 2) / (1 + squared)
    half = _Z * math.sqrt(share * (1 - share) / n + squared / (4 * n)) / (1 + squared)
    return Interval(100 * max(0.0, min(share, middle - half)), 100 * min(1.0, max(share, middle + half)))  # rounding


def score_of(
    outputs: np.ndarray, labels: np.ndarray, classes: Sequence[str], groups: np.ndarray | None = None
) -> "AnyScores":
    """`score`, or of labels (n, columns) floating `score_numbers`."""
    _check_finite(outputs)
    return (score_numbers if labels.dtype.kind == "f" else score)(outputs, labels, classes, groups)


def score(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], groups: np.ndarray | None = None) -> Scores:
    """Compare logits (n, C) with labels; of equal logits the first class counts as the higher.

    Labels are (n,) integers, places in ``classes``; or (n, C) bool where a picture may have several classes. Then
    ``top1`` is the share of pictures with a label whose highest logit is among their labels.

    ``groups``, (n,) integers, are equal for pictures that are not independent, such as those of a patient. With them
    the interval is a percentile bootstrap over groups (Efron 1979; 1000 resamples, always the same ones) instead of
    Wilson's. Where all groups have the same share of right ones it would have no width, and Wilson's is taken with each
    group as one trial.
    """
    _check(logits, labels, classes, groups)
    highest = logits.argmax(axis=1)
    if labels.ndim == 1:
        right = highest == labels
    else:
        told = labels.any(axis=1)
        right = labels[np.arange(len(labels)), highest][told]
        groups = None if groups is None else groups[told]
    if not len(right):
        raise DataError(f"none of {len(labels):,} pictures has a label, so nothing can be measured")
    interval, method = _interval(right, groups)
    loss = float(losses(logits, labels).mean())
    scores = Scores(len(right), 100 * float(right.mean()), interval.low, interval.high, method, loss, ())
    return (_one_label if labels.ndim == 1 else _several_labels)(scores, logits, labels, classes)


def probabilities(logits: np.ndarray, *, multi_label: bool = False) -> np.ndarray:
    """(n, C) float32 in [0, 1]: softmax over the classes, or with ``multi_label`` a sigmoid each."""
    values = np.empty(logits.shape, np.float32)
    for start in range(0, len(logits), _ROWS):
        part = logits[start : start + _ROWS].astype(np.float64)
        values[start : start + _ROWS] = np.exp(-np.logaddexp(0, -part) if multi_label else _log_softmax(part))
    return values


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each picture's label, or of its labels the mean over classes: (n,) float64, nats.

    Of numbers, labels (n, columns) floating, the squared error over the variance, the mean of the columns.
    """
    if labels.dtype.kind == "f":
        spread = labels.var(axis=0)
        return (np.square(logits - labels) / np.where(spread > 0, spread, 1)).mean(axis=1)
    values = np.empty(len(logits))
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        part, told = logits[rows].astype(np.float64), labels[rows]
        if labels.ndim == 2:
            values[rows] = np.logaddexp(0, np.where(told, -part, part)).mean(axis=1)
        else:
            values[rows] = -_log_softmax(part)[np.arange(len(part)), told]
    return values


def average_precision(values: np.ndarray, truth: np.ndarray) -> float:
    """Area under the precision-recall steps, in [0, 1], equal values being one step.

    Of values (n,), higher for what is more surely so, and the truth (n,) bool, at least once true.
    """
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # the last of each run of equal values
    hits = truth[order].cumsum()[ends]
    precision, recall = hits / (ends + 1), hits / hits[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def _check(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], groups: np.ndarray | None) -> None:
    if logits.ndim != 2 or logits.shape[1] != len(classes) or not classes:
        raise UsageError(f"logits must be (n, {len(classes)}), one column a class, not {logits.shape}")
    if not len(logits):
        raise DataError("there is no picture, so nothing can be measured")
    if labels.shape not in (logits.shape[:1], logits.shape) or (labels.ndim == 2) != (labels.dtype == bool):
        raise UsageError(
            f"labels must be {len(logits)} integers or {logits.shape} bool, not {labels.shape} {labels.dtype}"
        )
    if labels.ndim == 1 and not (labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < len(classes)):
        raise UsageError(f"labels must be places in the {len(classes)} classes, not {labels.min()} to {labels.max()}")
    if groups is not None and groups.shape != logits.shape[:1]:
        raise UsageError(f"groups must be {len(logits)} integers, one a picture, not {groups.shape}")
    _check_finite(logits)


def _check_finite(logits: np.ndarray) -> None:
    if not (finite := np.isfinite(logits).all(axis=1)).all():
        number = int((~finite).sum())
        raise DivergedError(
            f"the model gives NaN or infinity for {number:,} of {len(logits):,} pictures, the first at place "
            f"{int(finite.argmin())}: its weights are broken, or it was computed in too low a precision"
        )


def _one_label(scores: Scores, logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Scores:
    """The scores with what only exists where a picture has one class."""
    count = len(classes)
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels.astype(np.int64) * count + predicted, minlength=count**2).reshape(count, count)
    wrong = confusion * ~np.eye(count, dtype=bool)
    shown, said, right = confusion.sum(axis=1).tolist(), confusion.sum(axis=0).tolist(), confusion.diagonal().tolist()
    rows = []
    for number, name in enumerate(classes):
        most = int(wrong[number].argmax())
        times = int(wrong[number, most])
        recall, precision = _share(right[number], shown[number]), _share(right[number], said[number])
        taken_for = classes[most] if times else None
        rows.append(ClassScore(name, shown[number], said[number], recall, precision, None, taken_for, times))
    bins = _bins(logits, predicted == labels)
    own = logits[np.arange(len(labels)), labels][:, None]
    higher = (logits > own) | ((logits == own) & (np.arange(count) < labels[:, None]))  # than the true class
    return replace(
        scores,
        per_class=tuple(rows),
        top5=100 * float((higher.sum(axis=1) < 5).mean()) if count > 5 else None,
        balanced_accuracy=float(np.mean([row.recall for row in rows if row.recall is not None])),
        calibration_error=sum(row.n * row.gap for row in bins) / len(logits),
        bins=bins,
        confusion=confusion,
        quadratic_kappa=kappa_of_classes(classes, predicted, labels),
    )


def _several_labels(scores: Scores, logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Scores:
    """The scores with what only exists where a picture may have several classes."""
    predicted = logits >= 0  # a probability of one half
    rows, f1 = [], []
    for number, name in enumerate(classes):
        truth, guess = labels[:, number], predicted[:, number]
        shown, said, right = int(truth.sum()), int(guess.sum()), int((truth & guess).sum())
        precise = 100 * average_precision(logits[:, number], truth) if shown else None
        rows.append(ClassScore(name, shown, said, _share(right, shown), _share(right, said), precise))
        if shown:
            f1.append(200 * right / (shown + said))
    precisions = [row.average_precision for row in rows if row.average_precision is not None]
    return replace(
        scores,
        per_class=tuple(rows),
        mean_average_precision=float(np.mean(precisions)),
        macro_f1=float(np.mean(f1)),
    )


def _bins(logits: np.ndarray, right: np.ndarray) -> tuple[Bin, ...]:
    sure = np.exp(-losses(logits, logits.argmax(axis=1)))
    places = np.clip(np.ceil(sure * _BINS).astype(int) - 1, 0, _BINS - 1)
    rows = []
    for number in range(_BINS):
        inside = places == number
        count = int(inside.sum())
        means = [100 * float(one[inside].mean()) for one in (sure, right)] if count else [None, None]
        rows.append(Bin(100 * number / _BINS, 100 * (number + 1) / _BINS, count, *means))
    return tuple(rows)


def _interval(right: np.ndarray, groups: np.ndarray | None) -> tuple[Interval, str]:
    if groups is None:
        return wilson(int(right.sum()), len(right)), "Wilson"
    _, places = np.unique(groups, return_inverse=True)
    sizes, rights = np.bincount(places), np.bincount(places, right)
    count = len(sizes)
    of = f"over {count:,} group" + ("" if count == 1 else "s")
    if count < _FEWEST_GROUPS or np.ptp(rights / sizes) == 0:  # resampling so few shows too little of what may vary
        return wilson(count * float(right.mean()), count), f"Wilson {of}"
    generator = np.random.default_rng(_SEED)
    drawn = (generator.integers(0, count, count) for _ in range(_RESAMPLES))
    shares = [rights[chosen].sum() / sizes[chosen].sum() for chosen in drawn]
    low, high = (100 * float(value) for value in np.percentile(shares, (2.5, 97.5)))
    apart = wilson(int(right.sum()), len(right))  # pictures of a group tell no more than as many that are apart
    return Interval(min(low, apart.low), max(high, apart.high)), f"bootstrap {of}"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _share(part: float, whole: float) -> float | None:
    return 100 * float(part) / float(whole) if whole else None
