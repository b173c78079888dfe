"""How well numbers are predicted: errors, explained variance and rank correlation, with bootstrap intervals."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from maehub.errors import DataError
from maehub.train.evaluation.text_tables import html_table, printable, text_table

_RESAMPLES, _SEED = 1000, 0
_FEWEST = 10  # pictures or groups that are resampled
_AT_ONCE = 100  # resamples, so that what is made of them stays small
_GRADES = 20  # the widest range of whole numbers that count as grades
_POINTS = 2000  # that are kept to be drawn

MEASURES = {"r2": "R²", "mae": "MAE", "rmse": "RMSE", "spearman": "Spearman", "quadratic_kappa": "quadratic kappa"}
"""Fields of `Column`, and what they are called."""


class Measure(NamedTuple):
    """A number with its 95 % interval; None where too few pictures or groups give one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> str:
        """Both ends of the interval in words, percent."""
        return "–" if self.low is None or self.high is None else f"{self.low:.1f} to {self.high:.1f}"

    def __str__(self) -> str:
        between = "" if self.low is None or self.high is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.3g}{between}"


def mean_measure(measures: Sequence[Measure], factor: float = 1) -> Measure:
    """Means of values and of ends, times a factor; no ends where one of them has none."""
    known = [[getattr(one, name) for one in measures] for name in Measure._fields]
    means = [None if None in values else factor * float(np.mean(values)) for values in known]
    return Measure(*means)  # type: ignore[arg-type]


def bootstrap(
    pictures: int, groups: np.ndarray | None, measure: Callable[[np.ndarray], np.ndarray]
) -> tuple[float | None, float | None, str]:
    """Ends of the 95 % interval, percent, of a measure of pictures, and how they were found.

    The percentile bootstrap (Efron 1979) of 1000 resamples, always the same ones, over pictures, or over ``groups``,
    (pictures,) integers, which are drawn whole; with fewer than ten of these there are no ends. ``measure`` takes how
    often each picture is drawn, (k, pictures) int64, a resample a row, and gives (k,), 0 to 1; NaN does not count.
    """
    units, members = np.unique(np.arange(pictures) if groups is None else groups, return_inverse=True)
    count, what = len(units), "pictures" if groups is None else "groups"
    if count < _FEWEST:
        return None, None, f"no interval: {count} {what}, and {_FEWEST} are needed"
    generator, found = np.random.default_rng(_SEED), []
    for _ in range(_RESAMPLES // _AT_ONCE):
        drawn = generator.multinomial(count, np.full(count, 1 / count), _AT_ONCE)
        found.append(measure(drawn[:, members]))
    low, high = np.nanpercentile(np.concatenate(found), (2.5, 97.5))
    return 100 * float(low), 100 * float(high), f"bootstrap over {count:,} {what}"


class Column(NamedTuple):
    """One of the numbers that are predicted; errors are in its own unit."""

    name: str
    r2: Measure  # share of the variance that is explained; 0 is the mean for every picture, and below 0 is worse
    mae: Measure  # mean absolute error
    rmse: Measure  # root of the mean squared error
    spearman: Measure  # correlation of ranks; 0 where predictions never differ
    quadratic_kappa: Measure | None = None  # of grades: whole numbers in a narrow range, predictions being rounded


@dataclass(frozen=True)
class NumberScores:
    """What `score` measured of predicted numbers. Prints as a table, and draws itself in a notebook."""

    n: int
    columns: tuple[Column, ...]
    interval: str
    """How intervals were found."""
    points: np.ndarray | None = field(default=None, repr=False, compare=False)
    """(2, at most 2000, columns) float64: true and predicted numbers of some pictures, evenly chosen; to be drawn."""

    @property
    def r2(self) -> Measure:
        """Mean of the columns, and of the ends of their intervals."""
        return mean_measure([column.r2 for column in self.columns])

    @property
    def headline(self) -> tuple[str, Measure]:
        """What stands for the whole, in percent."""
        return "R²", mean_measure([self.r2], 100)

    @property
    def in_words(self) -> str:
        """The headline, as a card says it."""
        errors = ", ".join(f"MAE of {printable(one.name)} {one.mae.value:.4g}" for one in self.columns)
        low, high = self.r2[1:]
        between = "" if low is None or high is None else f" (95 % interval {low:.3f} to {high:.3f})"
        return f"R² {self.r2.value:.3f}{between}, {errors}"

    def summary(self) -> dict[str, Any]:
        """The numbers that stand for the whole, for JSON; errors of several columns, in units of their own, are not."""
        facts: dict[str, Any] = {"n": self.n, "r2": self.r2.value, "low": self.r2.low, "high": self.r2.high}
        if len(self.columns) == 1:
            (one,) = self.columns
            found = {name: getattr(one, name) for name in MEASURES if name != "r2"}
            facts |= {name: measure.value for name, measure in found.items() if measure is not None}
        return facts | {"interval": self.interval}

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        rows = [
            {"name": column.name}
            | {name: getattr(column, name) and getattr(column, name)._asdict() for name in MEASURES}
            for column in self.columns
        ]
        return self.summary() | {"columns": rows}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "NumberScores":
        """What `to_dict` gave, without points."""
        columns = [
            Column(row["name"], **{name: Measure(**row[name]) for name in MEASURES if row[name]})
            for row in facts["columns"]
        ]
        return cls(facts["n"], tuple(columns), facts["interval"])

    def __str__(self) -> str:
        return f"{text_table(*self.table())}\n\n95 % intervals: {self.interval}; n = {self.n:,}"

    def _repr_html_(self) -> str:
        return html_table(*self.table()) + f"<p>95 % intervals: {self.interval}; n = {self.n:,}</p>"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one a column, of the measures that there are."""
        names = [name for name in MEASURES if any(getattr(column, name) for column in self.columns)]
        rows = [[printable(one.name), *(str(getattr(one, name) or "–") for name in names)] for one in self.columns]
        return ["NUMBER", *(MEASURES[name] for name in names)], rows


def score_numbers(
    predicted: np.ndarray, truth: np.ndarray, names: Sequence[str], groups: np.ndarray | None = None
) -> NumberScores:
    """Compare predicted with true numbers, (n, columns) floating each, finite.

    Intervals are the percentile bootstrap (Efron 1979; 1000 resamples, always the same ones) over pictures, or over
    ``groups``, (n,) integers, equal for those that are not independent; with fewer than ten of these there are none.

    Raises:
        DataError: a column of the truth is the same for every picture, so there is no variance to explain.
    """
    if (same := np.ptp(truth, axis=0) == 0).any():
        name = printable(names[int(same.argmax())])
        raise DataError(f"{name} is the same for all {len(truth)} pictures to measure on: nothing can be measured")
    _, units = np.unique(np.arange(len(truth)) if groups is None else groups, return_inverse=True)
    count, what = int(units.max()) + 1, "pictures" if groups is None else "groups"
    generator, order = np.random.default_rng(_SEED), np.argsort(units, kind="stable")
    starts = np.searchsorted(units[order], np.arange(count + 1))
    pairs = [(predicted[:, place].astype(float), truth[:, place]) for place in range(len(names))]
    resampled: list[list[dict[str, float]]] = [[] for _ in names]
    for _ in range(_RESAMPLES if count >= _FEWEST else 0):  # one at a time: all draws together would fill the memory
        drawn = (
            order[generator.integers(0, count, count)]
            if groups is None
            else np.concatenate([order[starts[one] : starts[one + 1]] for one in generator.integers(0, count, count)])
        )
        for (said, true), found in zip(pairs, resampled, strict=True):
            found.append(_measured(said[drawn], true[drawn]))
    columns = []
    for name, (said, true), drawn_ones in zip(names, pairs, resampled, strict=True):
        measures = {}
        for key, value in _measured(said, true).items():
            values = [one[key] for one in drawn_ones if np.isfinite(one[key])]
            ends = map(float, np.percentile(values, (2.5, 97.5))) if values else ()
            measures[key] = Measure(float(value), *ends)
        columns.append(Column(name, **measures))
    few = f"none, since there are fewer than {_FEWEST} {what}"
    how = f"bootstrap over {count:,} {what}" if count >= _FEWEST else few
    shown = np.unique(np.linspace(0, len(truth) - 1, _POINTS).round().astype(int))
    return NumberScores(len(truth), tuple(columns), how, np.stack([truth[shown], predicted[shown]]).astype(float))


def explained(predicted: np.ndarray, truth: np.ndarray) -> float:
    """R², the mean of the columns of (n, columns), percent; one that is the same for every picture has none."""
    spread = truth.var(axis=0)
    shares = 1 - np.square(predicted - truth).mean(axis=0)[spread > 0] / spread[spread > 0]
    return 100 * float(shares.mean()) if len(shares) else 0.0


def quadratic_kappa(said: np.ndarray, true: np.ndarray) -> float:
    """Agreement of grades (n,) beyond chance, disagreement counting by its square (Cohen 1968); NaN where none is."""
    chance = said.var() + true.var() + (said.mean() - true.mean()) ** 2  # of grades of pictures drawn apart
    return float(1 - np.square(said - true).mean() / chance) if chance else np.nan


def kappa_of_classes(classes: Sequence[str], said: np.ndarray, labels: np.ndarray) -> float | None:
    """Of places in classes that are called by whole numbers, said and true ones; None of others."""
    if not all(re.fullmatch(r"[+-]?\d{1,9}", name) for name in classes):
        return None
    grades = np.array([int(name) for name in classes], float)
    kappa = quadratic_kappa(grades[said], grades[labels])
    return kappa if np.isfinite(kappa) else None


def _measured(said: np.ndarray, true: np.ndarray) -> dict[str, float]:
    errors, spread = said - true, true.var()
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "r2": 1 - np.square(errors).mean() / spread if spread else np.nan,
            "mae": np.abs(errors).mean(),
            "rmse": np.sqrt(np.square(errors).mean()),
            "spearman": np.corrcoef(_ranks(said), _ranks(true))[0, 1] if np.ptp(said) else 0.0,
        }
    if np.array_equal(true, true.round()) and np.ptp(true) <= _GRADES:
        found["quadratic_kappa"] = quadratic_kappa(said.round(), true)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, (n,) float64; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]
