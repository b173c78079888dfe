"""The report of a run: one HTML page with curves, pictures, settings and hardware, that needs nothing but itself."""

import contextlib
import json
import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maehub.errors import MaehubError, UsageError, log
from maehub.figures import Series, raw_and_smooth
from maehub.files import atomic_write, fill_template, json_or_nothing
from maehub.models import PRESETS
from maehub.train.engine import RunConfig, RunLog
from maehub.train.evaluation import duration_text, percent
from maehub.train.reports import classifier as report_classifier
from maehub.train.reports.html import Chart, Picture, Setting, chart, marked_settings, picture, value_text

_PICTURES = 6  # from the first to the last
_PICTURE_WIDTH = 1000  # pixels; larger ones are made smaller
_BASELINES = (("mean_fill", "mean fill"), ("interpolation", "linear interpolation"))
_TARGETS = {
    "pixels": "pixels",
    "normalised_pixels": "normalised pixels",
    "pca": "PCA coefficients of patches",
    "tokens": "tokens",
}
_BADGES = {"completed": "good", "preempted": "warn", "running": "warn", "diverged": "bad", "failed": "bad"}


class Metrics(NamedTuple):
    """A column of ``metrics.jsonl``: where it is a finite number."""

    steps: np.ndarray
    values: np.ndarray


def write_report(run: Path, kind: type[RunConfig]) -> Path:
    """Write ``report.html`` into a run folder, from what else is in it. The run may be finished, stopped or broken.

    The page is one file without scripts and loads nothing. Of the user's data it shows the pictures that the run drew,
    the names of classes and what the configuration says, and marks what is not a default of its class ``kind``; its
    text has no names of picture files. Gives the page's path.
    """
    config = json_or_nothing(run / "config.json")
    if not config:
        raise UsageError(f"{run} has no config.json that can be read, so it is no run folder; nothing was written")
    state, environment = json_or_nothing(run / "run.json"), config.get("environment")
    metrics = read_metrics(run / "metrics.jsonl")
    done = int(metrics["loss"].steps[-1]) if "loss" in metrics else 0
    finetuned = config.get("kind") == "finetune"
    settled = report_classifier.settled(config) if finetuned else config
    batch = settled.get("batch_size")
    progress = _progress(settled.get("steps"), done, batch, "pictures" if finetuned else "views", metrics)
    if not finetuned:
        progress |= _validation(metrics)
    elif "training loss" in progress and (differs := report_classifier.trained_on(config)):
        progress["training loss"] += f"; of {differs}"
    drawn = "Held-out pictures" if finetuned else "Reconstructions"
    apart = ("environment", *(("kind", "settings", "classes", "steps", *settled) if finetuned else ()))
    page = {
        "name": run.resolve().name,
        "state": (word := str(state.get("state", "unknown"))),
        "badge": _BADGES.get(word, "quiet"),
        "ending": _ending(state),
        "charts": _charts(metrics),
        "environment": {
            str(name).replace("_gb", ", GB").replace("_", " "): value_text(value)
            for name, value in (environment.items() if isinstance(environment, dict) else ())
        },
        "classifier": _classifier(run, config, metrics) if finetuned else None,
        "sentence": (report_classifier.sentence if finetuned else _sentence)(config, done),
        "progress": progress | _costs(batch, state, metrics),
        "pictures_title": drawn,
        "pictures": _pictures(run / "pictures", drawn),
        "settings": _settings(config, kind, apart),
    }
    text = fill_template(Path(__file__).with_name("report.html.jinja"), page)
    path = run / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def update_report(run: RunLog, kind: type[RunConfig]) -> None:
    """The page of a run; one that cannot be written takes nothing from it."""
    try:
        if run.is_main:
            write_report(run.folder, kind)
    except MaehubError as error:
        log.warning("report.html: %s", error)


def read_metrics(path: Path) -> dict[str, Metrics]:
    """The numbers of a run by name, each in the order of its steps. Broken lines and what is no number are left out."""
    columns: dict[str, dict[int, float]] = {}
    for line in _lines(path):
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(step) is not int or not 0 <= step < 2**53:
            continue
        for name, value in entry.items():
            if name != "step" and type(value) in (int, float) and math.isfinite(value):
                columns.setdefault(name, {})[step] = float(value)
    ordered = {name: sorted(column.items()) for name, column in columns.items()}
    return {
        name: Metrics(np.array([step for step, _ in rows]), np.array([value for _, value in rows]))
        for name, rows in ordered.items()
    }


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_file():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            yield from file


def _classifier(run: Path, config: Mapping[str, Any], metrics: Mapping[str, Metrics]) -> dict[str, Any]:
    scored = json_or_nothing(run / "scores.json")
    scores = report_classifier.scores_of(scored)
    result = report_classifier.result(config, scored, scores) if scores else _so_far(metrics)
    for key, words in (("val_miou", "mIoU"), ("val_ap", "AP")):
        if scores and (on_the_way := metrics.get(key)) and on_the_way.steps[0] == 0:
            first, last = on_the_way.values[[0, -1]]
            ends = f"{first:.1f} % → {last:.1f} %"
            result[f"{words} from step 0"] = f"{ends}, of the pictures that were measured on the way"
    return {
        "warning": report_classifier.warning(run / "twins.csv", scores),
        "result": result,
        "reliability": report_classifier.reliability(scores) if scores else None,
        "classes": report_classifier.class_table(scores) if scores else None,
        "pictures": report_classifier.pictures(run / "pictures") if scores else [],
        "recipe": report_classifier.recipe(config),
    }


def _ending(state: Mapping[str, Any]) -> str:
    """Why the run is not complete. The reason itself may name files, so it stays in run.json."""
    code, saved = state.get("exit_code"), state.get("last_good_step")
    kept = f"The newest checkpoint is that of step {saved:,}." if type(saved) is int else "There is no checkpoint."
    endings = {
        "completed": "",
        "running": f"It was still running when this page was written, or was killed. {kept}",
        "preempted": f"It was stopped from outside and goes on with --resume. {kept}",
        "diverged": f"The loss or a gradient was not finite. {kept} run.json says more.",
    }
    return endings.get(str(state.get("state")), f"It ended with exit code {code}. {kept} run.json says why.")


def _sentence(config: Mapping[str, Any], done: int) -> str:
    """What was trained."""
    start, model = config.get("from_"), config.get("model")
    name = f"An autoencoder that goes on from {start}" if start else f"A fresh {model}"
    target = _TARGETS.get(str(config.get("target")), "the target of its weights" if start else "normalised pixels")
    size = config.get("image_size") or (PRESETS[model].size if not start and model in PRESETS else ())
    sides = "×".join(map(str, [*size, *size][:2])) if isinstance(size, list | tuple) else str(size)
    where = f" of {sides} pixels" if sides else ""
    hidden = config.get("mask_ratio")
    share = f"{100 * hidden:g} %" if isinstance(hidden, int | float) else "share"
    steps = f"{done:,} step{'s' * (done != 1)}"
    return (
        f"{name}, trained to predict {target} of the {share} of patches that are hidden "
        f"({config.get('strategy', 'random')}) in crops{where}: {steps} of {config.get('batch_size', '?')} views."
    )


def _progress(total: Any, done: int, batch: Any, seen: str, metrics: Mapping[str, Metrics]) -> dict[str, str]:
    """How far it came, and the loss that was trained on."""
    facts = {"steps": f"{done:,} of {total:,}" if type(total) is int else f"{done:,}"}
    if type(batch) is int:
        facts[f"{seen} seen"] = f"{done * batch:,}"
    if loss := metrics.get("loss"):
        last = loss.values[-max(1, min(100, len(loss.values) // 10)) :]
        facts["training loss"] = f"{last.mean():.4g} at the end" + (
            f", mean over {len(last)} steps" if len(last) > 1 else ""
        )
    return facts


def _validation(metrics: Mapping[str, Metrics]) -> dict[str, str]:
    """What was measured of an autoencoder."""
    facts: dict[str, str] = {}
    if validation := metrics.get("val_loss"):
        best = int(validation.values.argmin())
        facts["validation loss"] = f"{validation.values[-1]:.4g} at the end"
        facts["best validation loss"] = f"{validation.values[best]:.4g} at step {int(validation.steps[best]):,}"
        for key, words in _BASELINES:
            if key in metrics:
                simple = metrics[key].values[-1]
                ratio = f"; the model has {validation.values[-1] / simple:.2f} of it" if simple > 0 else ""
                facts[f"loss of {words}"] = f"{simple:.4g}{ratio}"
    for key, words, unit in (("effective_rank", "effective rank", ""), ("knn_top1", "nearest neighbours", " %")):
        if key in metrics:
            first, last = metrics[key].values[[0, -1]]
            facts[words] = f"{last:.4g}{unit} at the end, {first:.4g}{unit} at first"
    return facts


def _so_far(metrics: Mapping[str, Metrics]) -> dict[str, str]:
    """What was measured of a classifier that is not finished."""
    facts: dict[str, str] = {}
    known = (
        ("val_miou", "mIoU so far", " %"),
        ("val_ap", "AP so far", " %"),
        ("val_r2", "R² so far", " %"),
        ("val_top1", "top-1 so far", " %"),
        ("val_loss", "loss so far", " nats"),
    )
    for key, words, unit in known:
        if key in metrics:
            steps, values = metrics[key]
            facts[words] = f"{values[-1]:.4g}{unit} at step {int(steps[-1]):,}"
    if facts:
        facts["interval"] = "comes with the last step, which is the one that is reported"
    return facts


def _costs(batch: Any, state: Mapping[str, Any], metrics: Mapping[str, Metrics]) -> dict[str, str]:
    """Time and memory, and what is kept."""
    facts: dict[str, str] = {}
    speed = metrics.get("images_per_second")
    if speed and len(speed.values[speed.values > 0]):
        positive = speed.values[speed.values > 0]
        facts["images/s"] = f"{statistics.median(positive):,.4g}, the median"
        if type(batch) is int:
            facts["time of the steps"] = duration_text(float((batch / positive).sum()))
    if "data_wait" in metrics:
        facts["waiting for pictures"] = f"{percent(100 * metrics['data_wait'].values.mean())} of the time"
    if "memory_gb" in metrics:
        facts["memory"] = f"{metrics['memory_gb'].values.max():,.3g} GB at most"
    saved = state.get("last_good_step")
    if type(saved) is int:
        facts["newest checkpoint"] = f"step {saved:,}"
    return facts


def _charts(metrics: Mapping[str, Metrics]) -> list[Chart]:
    """Every curve that there are numbers for."""
    loss = raw_and_smooth("training", *metrics["loss"], 0) if "loss" in metrics else []
    for number, (key, words) in enumerate(_BASELINES):
        if key in metrics:
            loss.append(Series(words, *metrics[key], colour=2 + number, style="dashed"))
    if "val_loss" in metrics:
        loss.append(Series("validation", *metrics["val_loss"], colour=1, style="points"))
    right = [
        Series(words, *metrics[key], colour=colour, style="points")
        for key, words, colour in (
            *(("val_pixel_accuracy", "pixels right", 2), ("val_miou", "mIoU", 1)),
            *(("val_ap50", "AP50", 2), ("val_ap", "AP", 1)),
            *(("val_top5", "top-5", 2), ("val_top1", "top-1", 1), ("val_r2", "R²", 1)),
        )
        if key in metrics
    ]
    title = "Variance explained on held-out pictures" if "val_r2" in metrics else "Right on held-out pictures"
    charts = chart("Loss", "", loss, legend=True) + chart(title, "%", right, legend=True)
    for name, title, unit, scale in (
        ("lr", "Learning rate", "", 1),
        ("knn_top1", "Nearest neighbours", "%, of the labelled folder", 1),
        ("effective_rank", "Effective rank of the features", "", 1),
        ("images_per_second", "Images a second", "", 1),
        ("data_wait", "Waiting for pictures", "% of the time", 100),
        ("grad_norm", "Norm of the gradient", "", 1),
    ):
        if name not in metrics:
            continue
        steps, values = metrics[name].steps, metrics[name].values * scale
        series = [Series(title, steps, values, 0, "points" if len(values) <= 60 else "line")]
        if name in ("images_per_second", "data_wait", "grad_norm") and len(values) > 60:
            series = raw_and_smooth(title, steps, values, 0)
        charts += chart(title, unit, series, legend=False)
    return charts


def _pictures(folder: Path, what: str) -> list[Picture]:
    """Pictures of a few steps, spread over the run."""
    paths = {}
    for path in folder.glob("step-*.png"):
        if match := re.fullmatch(r"step-(\d{1,15})\.png", path.name):
            paths[int(match[1])] = path
    steps = sorted(paths)
    chosen = sorted({round(index) for index in np.linspace(0, len(steps) - 1, min(_PICTURES, len(steps)))})
    return [
        picture(paths[step], f"Step {step:,}", f"{what} at step {step}", _PICTURE_WIDTH)
        for step in (steps[index] for index in chosen)
    ]


def _settings(config: Mapping[str, Any], kind: type[RunConfig], apart: Collection[str]) -> list[Setting]:
    """Every setting but those ``apart``, those that are not the default marked."""
    defaults: dict[str, Any] = {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default for field in fields(kind)
    }
    shown = {name: config[name] for name in {**defaults, **config} if name in config and name not in apart}
    return marked_settings(shown, {name for name, value in shown.items() if value != defaults.get(name, MISSING)})
