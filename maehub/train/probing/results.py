"""What probes found: objects that print as tables and draw themselves in a notebook."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
class FrozenResult:
    """What was found of a frozen network: ``scores`` are measured on the test pictures, on which nothing was chosen."""

    _SETTING: ClassVar = "STRENGTH"
    model: str
    data: str
    pool: str
    layer: int
    """Counted from 0."""
    scores: AnyScores
    n_train: int | None = None
    chosen: Chosen = NOTHING_CHOSEN
    seconds: Seconds | None = None
    out: Path | None = field(default=None, compare=False)
    precision: str = "fp32"
    """What the network computed in."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return {
            "model": self.model,
            "data": self.data,
            "pool": self.pool,
            "layer": self.layer,
            "precision": self.precision,
            "n_train": self.n_train,
            "combinations": [row._asdict() for row in self.chosen.combinations],
            "chosen_by": self.chosen.by,
            "seconds": None if self.seconds is None else self.seconds._asdict(),
            "out": None if self.out is None else str(self.out),
            **self.scores.to_dict(),
        }

    def _text(self, kind: str, note: str = "") -> str:
        """Title, scores, what was chosen among, what it took, where it is."""
        parts = [f"{self.model} on {printable(self.data, 200)}: {kind}", str(self.scores)]
        if self.chosen.combinations:
            table = text_table(*self._table(), left=(0, 4))
            parts.append(f"* chosen by {self.chosen.by}\n\n{table}")
        words = [] if self.n_train is None else [f"{self.n_train:,} training pictures"]
        if self.seconds is not None:
            features, probe = self.seconds
            words += [f"features {features:.1f} s in {self.precision}", f"probe {probe:.1f} s"]
        return "\n\n".join(part for part in (*parts, ", ".join(words), str(self.out or ""), note) if part)

    def _repr_html_(self) -> str:
        table = html_table(*self._table()) if self.chosen.combinations else ""
        return html_table(("MODEL",), [(self.model,)]) + self.scores._repr_html_() + table

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of what was chosen among."""
        return ("POOL", "LAYER", self._SETTING, "INNER", ""), [
            (row.pool, str(row.layer), _two_digits(row.setting), percent(row.accuracy), "*" * _is_chosen(self, row))
            for row in self.chosen.combinations
        ]


@dataclass(frozen=True)
class ProbeResult(FrozenResult):
    """What `probe` found."""

    method: str = "fast"
    strength: float | None = None
    """Of the penalty (`maehub.train.evaluation.linear.LinearFit`); None where the probe was trained in a run folder."""
    inner: tuple[Trial, ...] = ()
    """The sweep of the chosen pool and layer, from strong to weak."""
    note: str = ""
    """Why no model folder was written."""

    @property
    def inner_accuracy(self) -> float | None:
        """Of the chosen combination, on the inner splits, percent."""
        return best(self.inner).accuracy if self.inner else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        inner = [trial._asdict() for trial in self.inner]
        return super().to_dict() | {"method": self.method, "strength": self.strength, "inner": inner, "note": self.note}

    def __str__(self) -> str:
        strength = f", strength {_two_digits(self.strength)}" if self.strength else ""
        kind = f"{self.method} linear probe, pool {self.pool}, layer {self.layer}{strength}"
        return self._text("attentive probe" if self.method == "attentive" else kind, self.note)


@dataclass(frozen=True)
class KnnResult(FrozenResult):
    """What `knn` found. The logits behind the scores are the logarithms of vote shares; of numbers their mean."""

    _SETTING: ClassVar = "NEIGHBOURS"
    neighbours: int = 1
    temperature: float = 0.07
    inner: tuple[NeighbourTrial, ...] = ()
    """Of the chosen pool, from few neighbours to many."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        inner = [trial._asdict() for trial in self.inner]
        return super().to_dict() | {"neighbours": self.neighbours, "temperature": self.temperature, "inner": inner}

    def __str__(self) -> str:
        voters = "the nearest neighbour" if self.neighbours == 1 else f"{self.neighbours} nearest neighbours"
        return self._text(f"{voters}, pool {self.pool}, layer {self.layer}")


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


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _is_chosen(result: FrozenResult, row: Combination) -> bool:
    return (row.pool, row.layer) == (result.pool, result.layer)
