"""Several networks under the same protocols on the same pictures: the table that papers print."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maehub.data import LabelledSplit
from maehub.errors import CheckpointError
from maehub.files import atomic_write, check_free, write_error
from maehub.train.evaluation import AnyScores, Interval, Measure, html_table, mean_measure, printable, text_table
from maehub.train.probing.config import CompareConfig, KnnConfig
from maehub.train.probing.probing import extract, fast_probe, nearest_probe, open_for, read_split, run_config

MEMBERS = ("compare.json",)
"""What marks the folder of a comparison."""

_NAME = 60  # characters of a model's name in a table
_HEADERS = {"probe": "LINEAR PROBE", "knn": "K-NN", "finetune": "FINE-TUNED"}


class Run(NamedTuple):
    """One network under one protocol with one seed, and what was chosen for it without the test pictures."""

    seed: int
    scores: AnyScores
    settings: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One network under one protocol: the runs of all seeds."""

    model: str
    protocol: str
    runs: tuple[Run, ...]

    @property
    def n(self) -> int:
        """Test pictures of one run; where the seed makes the split, those of the first."""
        return self.runs[0].scores.n

    @property
    def what(self) -> str:
        """What is measured: top-1, or R² of numbers."""
        return self.runs[0].scores.headline[0]

    @property
    def measure(self) -> Measure:
        """Mean over the seeds and 95 % interval, of several seeds the means of both ends; percent."""
        return mean_measure([run.scores.headline[1] for run in self.runs])

    @property
    def top1(self) -> float:
        """The value of ``measure``, where classes were told apart."""
        return self.measure.value

    @property
    def interval(self) -> Interval:
        """The ends of ``measure``, where classes were told apart."""
        return Interval(*self.measure[1:])  # type: ignore[arg-type]

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds, percentage points; None of one seed."""
        values = [run.scores.headline[1].value for run in self.runs]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.measure.value:.1f}{spread} ({self.measure.ends})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        runs = [{"seed": run.seed, "settings": run.settings, **run.scores.summary()} for run in self.runs]
        return {
            "model": self.model,
            "protocol": self.protocol,
            {"top-1": "top1", "R²": "r2"}[self.what]: self.measure.value,
            "n": self.n,
            "low": self.measure.low,
            "high": self.measure.high,
            "deviation": self.deviation,
            "runs": runs,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: a row a model, a column a protocol. Prints as a table, draws itself in a notebook."""

    data: str
    cells: tuple[Cell, ...]
    """In the order of models, then of protocols."""
    n_train: int
    made: bool
    """Whether the split was made, by each seed another one."""
    out: Path | None = None

    def cell(self, model: str, protocol: str) -> Cell | None:
        """One of them; None where the protocol is not for the model, as fine-tuning is not for a baseline."""
        return next((cell for cell in self.cells if (cell.model, cell.protocol) == (model, protocol)), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the classes, for JSON."""
        return {
            "data": self.data,
            "n_train": self.n_train,
            "split": "by seed" if self.made else "given",
            "cells": [cell.to_dict() for cell in self.cells],
            "out": None if self.out is None else str(self.out),
        }

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (text_table(*self._table()), self._note(), str(self.out or ""))))

    def _repr_html_(self) -> str:
        return html_table(*self._table()) + self._note()

    def _table(self) -> tuple[list[str], list[list[str]]]:
        protocols = list(dict.fromkeys(cell.protocol for cell in self.cells))
        models = list(dict.fromkeys(cell.model for cell in self.cells))
        rows = [
            [printable(model, _NAME), *(str(self.cell(model, name) or "–") for name in protocols)] for model in models
        ]
        return ["MODEL", *(_HEADERS[name] for name in protocols)], rows

    def _note(self) -> str:
        first = self.cells[0]
        seeds = len(first.runs)
        by_seed = "a split by seed" if seeds == 1 else "a split by each seed"
        how = by_seed if self.made else "the split that was given"
        spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
        return (
            f"{first.what} in percent and its 95 % interval, n = {first.n:,} test pictures{spread}; "
            f"{self.n_train:,} training pictures, {how}. Nothing was chosen on the test pictures."
        )


def compare(config: CompareConfig) -> Comparison:
    """Measure networks by the linear probe, by k nearest neighbours and by fine-tuning.

    The features of a network are computed once for probe and neighbours. Fine-tuning takes the recipe that fits the
    network and the data, in run folders below ``config.out``.

    Raises:
        UsageError: there is no such model, or the folder is in use.
        DataError: labels or a split that cannot be used, or a picture that cannot be read.
        HubError, IntegrityError: weights cannot be had.
        CheckpointError: the disk is full; or fine-tuning was stopped.
    """
    if config.out is not None:
        check_free(config.out, config.overwrite, MEMBERS)
    once = replace(config, skip_twins=True)
    splits = {seed: read_split(once if number else config, seed) for number, seed in enumerate(config.seeds)}
    for name in config.model:  # a name that is wrong is found before any work
        open_for(config, name, config.seeds[0])
    first = splits[config.seeds[0]]
    comparison = Comparison(config.data, (), len(first.training), first.made, config.out)
    if config.out is not None:  # not sooner: data or a model that is not there leaves no folder behind
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(config.out, error) from error
    _write(comparison)
    for name in config.model:
        runs = _frozen_runs(config, name, splits)
        if "finetune" in config.protocols and not name.startswith("baseline/"):
            runs["finetune"] = [_finetuned(config, name, seed) for seed in config.seeds]
        done = [Cell(name, protocol, tuple(runs[protocol])) for protocol in config.protocols if protocol in runs]
        comparison = replace(comparison, cells=(*comparison.cells, *done))
        _write(comparison)
    return comparison


def _frozen_runs(config: CompareConfig, name: str, splits: dict[int, LabelledSplit]) -> dict[str, list[Run]]:
    """The protocols that leave the network as it is, on the features of one pass for each split and initialisation."""
    runs: dict[str, list[Run]] = {protocol: [] for protocol in config.protocols if protocol != "finetune"}
    if not runs:
        return {}
    features = None
    for seed, split in splits.items():
        backbone = open_for(config, name, seed)
        if features is None or split.made or name.startswith("untrained/"):
            features = extract(config, backbone, split, [-1])
        if "probe" in runs:
            linear, _ = fast_probe(config, backbone, split, features, seed)
            runs["probe"].append(Run(seed, linear.scores, {"pool": linear.pool, "strength": linear.strength}))
        if "knn" in runs:
            near = nearest_probe(KnnConfig(config.data), backbone, split, features)
            runs["knn"].append(Run(seed, near.scores, {"pool": near.pool, "neighbours": near.neighbours}))
    return runs


def _finetuned(config: CompareConfig, name: str, seed: int) -> Run:
    from maehub.train.finetuning import finetune

    assert config.out is not None
    folder = config.out / f"finetune-{config.model.index(name) + 1}-seed-{seed}"
    run = run_config(config, name, folder, seed)
    result = finetune(replace(run, epochs=config.epochs, steps=config.steps, skip_twins=True))  # they were looked for
    if result.scores is None:
        stopped = CheckpointError(
            f"fine-tuning {name} was stopped at step {result.step}; its checkpoint is kept in {folder}, and the "
            f"rows of the models before it in {config.out / MEMBERS[0]}. Compare the others, or all with --overwrite"
        )
        stopped.exit_code = result.exit_code
        raise stopped
    assert isinstance(result.scores, AnyScores)
    return Run(seed, result.scores, {"run": folder.name})


def _write(comparison: Comparison) -> None:
    """What is known so far."""
    if comparison.out is not None:
        with atomic_write(comparison.out / MEMBERS[0]) as temporary:
            temporary.write_text(json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n")
