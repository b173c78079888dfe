"""What probes found: objects that print as tables and draw themselves in a notebook."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from maehub.train.evaluation import NeighbourTrial, Scores, Trial, best, html_table, percent, printable, text_table

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
    accuracy: float  # percent; where a picture may have several classes, mean average precision


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
    scores: Scores
    n_train: int | None = None
    chosen: Chosen = NOTHING_CHOSEN
    inner: tuple[Trial, ...] = ()
    """The sweep of the chosen pool and layer, from strong to weak."""
    seconds: Seconds | None = None
    out: Path | None = None
    note: str = ""
    """Why no model folder was written."""

    @property
    def inner_accuracy(self) -> float | None:
        """Of the chosen combination, on the inner splits, percent."""
        return best(self.inner).accuracy if self.inner else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return {
            **_facts(self.model, self.data, self.pool, self.layer, self.n_train, self.chosen, self.seconds),
            "method": self.method,
            "strength": self.strength,
            "inner": [trial._asdict() for trial in self.inner],
            "out": None if self.out is None else str(self.out),
            "note": self.note,
            **self.scores.to_dict(),
        }

    def __str__(self) -> str:
        settings = f"pool {self.pool}, layer {self.layer}" + (
            f", strength {_two_digits(self.strength)}" if self.strength else ""
        )
        parts = [
            f"{self.model} on {printable(self.data, 200)}: {self.method} linear probe, {settings}",
            str(self.scores),
        ]
        if self.method == "attentive":
            parts[0] = f"{self.model} on {printable(self.data, 200)}: attentive probe"
        parts += _chosen_text(self.chosen, "STRENGTH", self._is_chosen)
        parts += _last_lines(self.n_train, self.seconds)
        parts += [line for line in (str(self.out or ""), self.note) if line]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return _html(self.model, self.scores, self.chosen, "STRENGTH", self._is_chosen)

    def _is_chosen(self, row: Combination) -> bool:
        return (row.pool, row.layer) == (self.pool, self.layer)


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
        note = f"INNER is measured on {by}; * is chosen by it, and it alone is measured on the test pictures."
        return "\n\n".join(
            [text_table(_SWEEP, self._rows(), left=(0, 1, 6, 7)), note, *([str(self.out)] if self.out else [])]
        )

    def _repr_html_(self) -> str:
        return html_table(_SWEEP, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for result in self.results:
            best = result.scores
            for row in result.chosen.combinations:
                own = (row.pool, row.layer) == (result.pool, result.layer)
                test = (
                    (percent(best.top1), "*", f"{best.low:.1f} to {best.high:.1f}, n = {best.n:,}")
                    if own
                    else ("", "", "")
                )
                name = printable(result.model, _NAME)
                rows.append((name, row.pool, str(row.layer), _two_digits(row.setting), percent(row.accuracy), *test))
        return rows


_SWEEP = ("MODEL", "POOL", "LAYER", "STRENGTH", "INNER", "TEST TOP-1", "", "95 % INTERVAL")


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
    scores: Scores
    n_train: int
    chosen: Chosen = NOTHING_CHOSEN
    inner: tuple[NeighbourTrial, ...] = ()
    """Of the chosen pool, from few neighbours to many."""
    seconds: Seconds | None = None
    out: Path | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return {
            **_facts(self.model, self.data, self.pool, self.layer, self.n_train, self.chosen, self.seconds),
            "neighbours": self.neighbours,
            "temperature": self.temperature,
            "inner": [trial._asdict() for trial in self.inner],
            "out": None if self.out is None else str(self.out),
            **self.scores.to_dict(),
        }

    def __str__(self) -> str:
        voters = "the nearest neighbour" if self.neighbours == 1 else f"{self.neighbours} nearest neighbours"
        where = f"{self.model} on {printable(self.data, 200)}"
        parts = [f"{where}: {voters}, pool {self.pool}, layer {self.layer}", str(self.scores)]
        parts += _chosen_text(self.chosen, "NEIGHBOURS", self._is_chosen)
        parts += _last_lines(self.n_train, self.seconds)
        return "\n\n".join([*parts, *([str(self.out)] if self.out else [])])

    def _repr_html_(self) -> str:
        return _html(self.model, self.scores, self.chosen, "NEIGHBOURS", self._is_chosen)

    def _is_chosen(self, row: Combination) -> bool:
        return row.pool == self.pool


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _facts(
    model: str, data: str, pool: str, layer: int, n_train: int | None, chosen: Chosen, seconds: Seconds | None
) -> dict[str, Any]:
    return {
        "model": model,
        "data": data,
        "pool": pool,
        "layer": layer,
        "n_train": n_train,
        "combinations": [row._asdict() for row in chosen.combinations],
        "chosen_by": chosen.by,
        "seconds": None if seconds is None else seconds._asdict(),
    }


def _chosen_rows(chosen: Chosen, is_chosen: Any) -> list[tuple[str, ...]]:
    return [
        (row.pool, str(row.layer), _two_digits(row.setting), percent(row.accuracy), "*" if is_chosen(row) else "")
        for row in chosen.combinations
    ]


def _chosen_text(chosen: Chosen, setting: str, is_chosen: Any) -> list[str]:
    if not chosen.combinations:
        return []
    table = text_table(("POOL", "LAYER", setting, "INNER", ""), _chosen_rows(chosen, is_chosen), left=(0, 4))
    return [f"* chosen by {chosen.by}\n\n{table}"]


def _last_lines(n_train: int | None, seconds: Seconds | None) -> list[str]:
    words = [] if n_train is None else [f"{n_train:,} training pictures"]
    words += [] if seconds is None else [f"features {seconds.features:.1f} s", f"probe {seconds.probe:.1f} s"]
    return [", ".join(words)] if words else []


def _html(model: str, scores: Scores, chosen: Chosen, setting: str, is_chosen: Any) -> str:
    header = ("POOL", "LAYER", setting, "INNER", "")
    table = html_table(header, _chosen_rows(chosen, is_chosen)) if chosen.combinations else ""
    return html_table(("MODEL",), [(model,)]) + scores._repr_html_() + table
