"""The report of a run: one HTML page with curves, pictures, settings and hardware, that needs nothing but itself."""

import base64
import io
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maehub.encoder import PRESETS
from maehub.errors import DataError, UsageError
from maehub.files import atomic_write
from maehub.opening import open_image
from maehub.train.config import PretrainConfig
from maehub.train.curves import Series, chart, smoothed, tick_words
from maehub.train.page import HEAD, STATES

_PICTURES = 6  # from the first to the last
_PICTURE_WIDTH = 1000  # pixels; larger ones are made smaller
_JPEG_QUALITY = 88
_BASELINES = (("mean_fill", "mean fill"), ("interpolation", "linear interpolation"))
_TARGETS = {
    "pixels": "pixels",
    "normalised_pixels": "normalised pixels",
    "pca": "PCA coefficients of patches",
    "tokens": "tokens",
}


class Metrics(NamedTuple):
    """A column of ``metrics.jsonl``: where it is a finite number."""

    steps: np.ndarray
    values: np.ndarray


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, from what else is in it. The run may be finished, stopped or broken.

    The page is one file without scripts and loads nothing. Of the user's data it shows the pictures of reconstructions
    and what the configuration says, no names of files.

    Returns:
        The page's path.

    Raises:
        UsageError: the folder has no ``config.json``.
        CheckpointError: the page cannot be written.
    """
    config = _json(run / "config.json")
    if not config:
        raise UsageError(f"{run} has no config.json that can be read, so it is no run folder; nothing was written")
    state = _json(run / "run.json")
    metrics = read_metrics(run / "metrics.jsonl")
    name = run.resolve().name
    sections = [
        f"<header><h1>{escape(name)}</h1>{_badge(state)}<p>{escape(_sentence(config, metrics))}</p>{_ending(state)}"
        "</header>",
        _section("Summary", _summary(config, state, metrics)),
        _section("Curves", _curves(metrics)),
        _section("Reconstructions, from first to last", _pictures(run / "pictures")),
        _section("Settings", _settings(config)),
        _section("Hardware and versions", _rows(_environment(config))),
        "<footer>Written by maehub. This page is one file: it loads nothing and sends nothing.</footer>",
    ]
    page = f"{HEAD}<title>{escape(name)}</title>\n<main>\n" + "\n".join(filter(None, sections)) + "\n</main>\n"
    path = run / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def read_metrics(path: Path) -> dict[str, Metrics]:
    """The numbers of a run by name, each in the order of its steps. Broken lines and what is no number are left out."""
    columns: dict[str, dict[int, float]] = {}
    for line in _lines(path):
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, TypeError, KeyError):
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
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError:
        return


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _badge(state: Mapping[str, Any]) -> str:
    word = str(state.get("state", "unknown"))
    kind = STATES.get(word, "quiet")
    return f'<span class="badge {kind}">{escape(word)}</span>'


def _ending(state: Mapping[str, Any]) -> str:
    """Why the run is not complete. The reason itself may name files, so it stays in run.json."""
    word, code, saved = state.get("state"), state.get("exit_code"), state.get("last_good_step")
    kept = f"The newest checkpoint is that of step {saved:,}." if type(saved) is int else "There is no checkpoint."
    if word == "completed":
        return ""
    if word == "running":
        text = f"It was still running when this page was written, or was killed. {kept}"
    elif word == "preempted":
        text = f"It was stopped from outside and goes on with --resume. {kept}"
    elif word == "diverged":
        text = f"The loss or a gradient was not finite. {kept} run.json says more."
    else:
        text = f"It ended with exit code {code}. {kept} run.json says why."
    return f'<p class="note">{escape(text)}</p>'


def _sentence(config: Mapping[str, Any], metrics: Mapping[str, Metrics]) -> str:
    """What was trained."""
    start, model = config.get("from_"), config.get("model")
    name = f"An autoencoder that goes on from {start}" if start else f"A fresh {model}"
    target = _TARGETS.get(str(config.get("target")), "the target of its weights" if start else "normalised pixels")
    size = config.get("image_size") or (PRESETS[model].size if not start and model in PRESETS else ())
    sides = "×".join(map(str, [*size, *size][:2])) if isinstance(size, list | tuple) else str(size)
    where = f" of {sides} pixels" if sides else ""
    hidden = config.get("mask_ratio")
    share = f"{100 * hidden:g} %" if isinstance(hidden, int | float) else "share"
    done = int(metrics["loss"].steps[-1]) if "loss" in metrics else 0
    steps = f"{done:,} step{'s' * (done != 1)}"
    return (
        f"{name}, trained to predict {target} of the {share} of patches that are hidden "
        f"({config.get('strategy', 'random')}) in crops{where}: {steps} of {config.get('batch_size', '?')} views."
    )


def _summary(config: Mapping[str, Any], state: Mapping[str, Any], metrics: Mapping[str, Metrics]) -> str:
    loss, speed, validation = metrics.get("loss"), metrics.get("images_per_second"), metrics.get("val_loss")
    batch = config.get("batch_size")
    rows: dict[str, str] = {}
    done = int(loss.steps[-1]) if loss else 0
    total = config.get("steps")
    rows["steps"] = f"{done:,} of {total:,}" if type(total) is int else f"{done:,}"
    if type(batch) is int:
        rows["views seen"] = f"{done * batch:,}"
    if loss:
        last = loss.values[-max(1, min(100, len(loss.values) // 10)) :]
        rows["training loss"] = f"{last.mean():.4g} at the end" + (
            f", mean over {len(last)} steps" if len(last) > 1 else ""
        )
    if validation:
        best = int(validation.values.argmin())
        rows["validation loss"] = f"{validation.values[-1]:.4g} at the end"
        rows["best validation loss"] = f"{validation.values[best]:.4g} at step {int(validation.steps[best]):,}"
        for key, words in _BASELINES:
            if key in metrics:
                simple = metrics[key].values[-1]
                ratio = f"; the model has {validation.values[-1] / simple:.2f} of it" if simple > 0 else ""
                rows[f"loss of {words}"] = f"{simple:.4g}{ratio}"
    for key, words, unit in (("effective_rank", "effective rank", ""), ("knn_top1", "nearest neighbours", " %")):
        if key in metrics:
            rows[words] = f"{metrics[key].values[-1]:.4g}{unit} at the end, {metrics[key].values[0]:.4g}{unit} at first"
    if speed and len(speed.values[speed.values > 0]):
        positive = speed.values[speed.values > 0]
        rows["images/s"] = f"{statistics.median(positive):,.4g}, the median"
        if type(batch) is int:
            rows["time of the steps"] = _duration(float((batch / positive).sum()))
    if "data_wait" in metrics:
        rows["waiting for pictures"] = f"{100 * metrics['data_wait'].values.mean():.1f} % of the time"
    if "memory_gb" in metrics:
        rows["memory"] = f"{metrics['memory_gb'].values.max():,.3g} GB at most"
    saved = state.get("last_good_step")
    if type(saved) is int:
        rows["newest checkpoint"] = f"step {saved:,}"
    return _rows(rows)


def _curves(metrics: Mapping[str, Metrics]) -> str:
    """Every curve that there are numbers for."""
    figures = [_loss_figure(metrics)]
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
            series = _raw_and_smooth(title, steps, values, 0)
        figures.append(_figure(title, unit, series, legend=False))
    shown = [figure for figure in figures if figure]
    if not shown:
        return "<p>No step was written yet.</p>"
    return f'<p class="legend">Against the step of the optimizer.</p><div class="figures">{"".join(shown)}</div>'


def _loss_figure(metrics: Mapping[str, Metrics]) -> str:
    series = []
    if "loss" in metrics:
        steps, values = metrics["loss"]
        series = _raw_and_smooth("training", steps, values, 0)
    for number, (key, words) in enumerate(_BASELINES):
        if key in metrics:
            series.append(Series(words, *metrics[key], colour=2 + number, style="dashed"))
    if "val_loss" in metrics:
        series.append(Series("validation", *metrics["val_loss"], colour=1, style="points"))
    return _figure("Loss", "", series, legend=True)


def _raw_and_smooth(name: str, steps: np.ndarray, values: np.ndarray, colour: int) -> list[Series]:
    window = len(values) // 40
    if window <= 1:
        return [Series(name, steps, values, colour)]
    return [
        Series("", steps, values, colour, "faint"),
        Series(f"{name} (mean over {window | 1} steps)", steps, smoothed(values, window), colour),
    ]


def _figure(title: str, unit: str, series: Sequence[Series], *, legend: bool) -> str:
    drawn = [one for one in series if len(one.values)]
    if not drawn:
        return ""
    main = drawn[-1]
    words = f"{title}: {tick_words(float(main.values[0]))} at first, {tick_words(float(main.values[-1]))} at the end"
    keys = "".join(
        f'<span class="key"><i class="c{one.colour} {one.style}"></i>{escape(one.name)}</span>'
        for one in drawn
        if one.name and legend
    )
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    caption = f"<figcaption><b>{escape(title)}</b>{unit}{keys}</figcaption>"
    return f"<figure>{caption}{chart(drawn, escape(words))}</figure>"


def _pictures(folder: Path) -> str:
    """Reconstructions of a few steps, spread over the run."""
    found = {}
    for path in folder.glob("step-*.png"):
        if match := re.fullmatch(r"step-(\d{1,15})\.png", path.name):
            found[int(match[1])] = path
    steps = sorted(found)
    places = sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(_PICTURES, len(steps)))})
    shown = []
    for step in (steps[place] for place in places):
        try:
            picture = open_image(found[step])
        except DataError:
            shown.append(f'<p class="note">The picture of step {step:,} cannot be read.</p>')
            continue
        width, height = picture.size
        if width > _PICTURE_WIDTH:
            height = max(1, round(height * _PICTURE_WIDTH / width))
            picture = picture.resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
        shown.append(
            f"<figure><figcaption><b>Step {step:,}</b></figcaption>"
            f'<img alt="Reconstructions at step {step}" width="{picture.width}" height="{picture.height}" '
            f'src="{_data_address(picture)}"></figure>'
        )
    return f'<div class="pictures">{"".join(shown)}</div>' if shown else ""


def _data_address(picture: Image.Image) -> str:
    """The picture as a data: address, PNG or JPEG, whichever is smaller."""
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": _JPEG_QUALITY})):
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format=kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def _settings(config: Mapping[str, Any]) -> str:
    """Every setting, those that are not the default marked."""
    rows = []
    known = {field.name: field for field in fields(PretrainConfig)}
    for name in [*known, *(name for name in config if name not in known)]:
        if name not in config or name == "environment":
            continue
        field, value = known.get(name), config[name]
        default = MISSING if field is None else field.default
        changed = default is MISSING or _plain(value) != _plain(default)
        label = name.strip("_").replace("_", "-")
        mark = ' class="changed"' if changed else ""
        rows.append(f"<tr{mark}><th>{escape(label)}</th><td>{escape(_value_words(value))}</td></tr>")
    if not rows:
        return ""
    return f'<p class="legend">Marked: not the default.</p><table class="settings">{"".join(rows)}</table>'


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value_words(value: Any) -> str:
    if value is None or value in ("", []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_value_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _environment(config: Mapping[str, Any]) -> dict[str, str]:
    facts = config.get("environment")
    if not isinstance(facts, dict):
        return {}
    return {str(name).replace("_gb", ", GB").replace("_", " "): _value_words(value) for name, value in facts.items()}


def _rows(rows: Mapping[str, str]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{body}</table>" if body else ""


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
