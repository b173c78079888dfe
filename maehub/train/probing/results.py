"""What probes found: objects that print as tables and draw themselves in a notebook."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from maehub.train.evaluation import AnyScores, NeighbourTrial, Trial, best, html_table, percent, printable, text_table

_NAME = 60  # characters of a model's name in a table


class Seconds(NamedTuple):
    """How long the parts took, by the clock."""

    features: float
    probe: float


class Combination(NamedTuple):
    """One feature of a network, and how well its best probe does on pictures held out of the training ones."""

    pool: str
    layer: int
    setting: float  # strength of the penalty, or how many neighbours
    accuracy: float  # percent; where a picture may have several classes, mean average precision; of numbers R²


class Chosen(NamedTuple):
    """How settings were chosen."""

    combinations: tuple[Combination, ...]
    by: str
    """What the accuracies were measured on, in words."""


NOTHING_CHOSEN = Chosen((), "")


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found: ``scores`` are measured on the test pictures, on which nothing was chosen."""

    model: str
    data: str
    method: str
    pool: str
    layer: int
    """Counted from 0."""
    strength: float | None
    """Of the penalty (`maehub.train.evaluation.linear.LinearFit`); None where the probe was trained in a run folder."""
    scores: AnyScores
    n_train: int | None = None
    chosen: Chosen = NOTHING_CHOSEN
    inner: tuple[Trial, ...] = ()
    """The sweep of the chosen pool and layer, from strong to weak."""
    seconds: Seconds | None = None
    out: Path | None = None
    note: str = ""
    """Why no model folder was written."""
    precision: str = "fp32"
    """What the network computed in."""

    @property
    def inner_accuracy(self) -> float | None:
        """Of the chosen combination, on the inner splits, percent."""
        return best(self.inner).accuracy if self.inner else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return {
            **_facts(self),
            "method": self.method,
            "strength": self.strength,
            "inner": [trial._asdict() for trial in self.inner],
            "out": None if self.out is None else str(self.out),
            "note": self.note,
            **self.scores.to_dict(),
        }

    def __str__(self) -> str:
        strength = f", strength {_two_digits(self.strength)}" if self.strength else ""
        kind = f"{self.method} linear probe, pool {self.pool}, layer {self.layer}{strength}"
        return _text(self, "attentive probe" if self.method == "attentive" else kind, "STRENGTH", self.note)

    def _repr_html_(self) -> str:
        return _html(self, "STRENGTH")


@dataclass(frozen=True)
class Sweep:
    """Every pool and layer of some models, and of each model the test accuracy of the one chosen without the test."""

    results: tuple[ProbeResult, ...]
    out: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"models": [result.to_dict() for result in self.results], "out": str(self.out) if self.out else None}

    def __str__(self) -> str:
        by = self.results[0].chosen.by
        what = self.results[0].scores.headline[0]
        note = f"{what}; INNER is measured on {by}; * is chosen by it, and it alone is measured on the test pictures."
        table = text_table(_SWEEP, self._rows(), left=(0, 1, 6, 7))
        return "\n\n".join(filter(None, (table, note, str(self.out or ""))))

    def _repr_html_(self) -> str:
        return html_table(_SWEEP, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for result in self.results:
            _, measure = result.scores.headline
            for row in result.chosen.combinations:
                measured = (percent(measure.value), "*", f"{measure.ends}, n = {result.scores.n:,}")
                test = measured if _is_chosen(result, row) else ("", "", "")
                name = printable(result.model, _NAME)
                rows.append((name, row.pool, str(row.layer), _two_digits(row.setting), percent(row.accuracy), *test))
        return rows


_SWEEP = ("MODEL", "POOL", "LAYER", "STRENGTH", "INNER", "TEST", "", "95 % INTERVAL")


@dataclass(frozen=True)
class KnnResult:
    """What `knn` found: ``scores`` are measured on the test pictures, on which nothing was chosen.

    The logits behind them are the logarithms of vote shares.
    """

    model: str
    data: str
    pool: str
    layer: int
    """Counted from 0."""
    neighbours: int
    temperature: float
    scores: AnyScores
    n_train: int
    chosen: Chosen = NOTHING_CHOSEN
    inner: tuple[NeighbourTrial, ...] = ()
    """Of the chosen pool, from few neighbours to many."""
    seconds: Seconds | None = None
    out: Path | None = field(default=None, compare=False)
    precision: str = "fp32"
    """What the network computed in."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return {
            **_facts(self),
            "neighbours": self.neighbours,
            "temperature": self.temperature,
            "inner": [trial._asdict() for trial in self.inner],
            "out": None if self.out is None else str(self.out),
            **self.scores.to_dict(),
        }

    def __str__(self) -> str:
        voters = "the nearest neighbour" if self.neighbours == 1 else f"{self.neighbours} nearest neighbours"
        return _text(self, f"{voters}, pool {self.pool}, layer {self.layer}", "NEIGHBOURS")

    def _repr_html_(self) -> str:
        return _html(self, "NEIGHBOURS")


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _is_chosen(result: ProbeResult | KnnResult, row: Combination) -> bool:
    return (row.pool, row.layer) == (result.pool, result.layer)


def _facts(result: ProbeResult | KnnResult) -> dict[str, Any]:
    """What both kinds of results begin with."""
    return {
        "model": result.model,
        "data": result.data,
        "pool": result.pool,
        "layer": result.layer,
        "precision": result.precision,
        "n_train": result.n_train,
        "combinations": [row._asdict() for row in result.chosen.combinations],
        "chosen_by": result.chosen.by,
        "seconds": None if result.seconds is None else result.seconds._asdict(),
    }


def _text(result: ProbeResult | KnnResult, kind: str, setting: str, note: str = "") -> str:
    """Title, scores, what was chosen among, what it took, where it is."""
    parts = [f"{result.model} on {printable(result.data, 200)}: {kind}", str(result.scores)]
    if result.chosen.combinations:
        table = text_table(*_table(result, setting), left=(0, 4))
        parts.append(f"* chosen by {result.chosen.by}\n\n{table}")
    words = [] if result.n_train is None else [f"{result.n_train:,} training pictures"]
    if result.seconds is not None:
        features, probe = result.seconds
        words += [f"features {features:.1f} s in {result.precision}", f"probe {probe:.1f} s"]
    return "\n\n".join(part for part in (*parts, ", ".join(words), str(result.out or ""), note) if part)


def _html(result: ProbeResult | KnnResult, setting: str) -> str:
    table = html_table(*_table(result, setting)) if result.chosen.combinations else ""
    return html_table(("MODEL",), [(result.model,)]) + result.scores._repr_html_() + table


def _table(result: ProbeResult | KnnResult, setting: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of what was chosen among."""
    return ("POOL", "LAYER", setting, "INNER", ""), [
        (row.pool, str(row.layer), _two_digits(row.setting), percent(row.accuracy), "*" * _is_chosen(result, row))
        for row in result.chosen.combinations
    ]
