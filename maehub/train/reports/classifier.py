"""What the report of a fine-tuning run says of its classifier: how it came about, how often it is right, where not."""

import contextlib
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maehub.figures import Series
from maehub.train.engine import peak_rate
from maehub.train.evaluation import (
    Bin,
    ClassScore,
    MapScores,
    NumberScores,
    ObjectScores,
    Paired,
    Scores,
    percent,
    printable,
)
from maehub.train.reports.html import Chart, Picture, Setting, chart, marked_settings, picture

AnyFound = Scores | NumberScores | MapScores | ObjectScores

_MOST_CLASSES = 30  # in the table
_WIDEST = 1500  # pixels of a picture
_HEADS = {"normed": "A linear probe on", "attentive": "An attentive probe on"}
_FITTED = ("epochs", "warmup_epochs")  # of a recipe: `steps` and `warmup` say what became of them


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as it was fitted to the network and the data, by the names of `finetuning.recipes.Settings`."""
    settings = config.get("settings")
    return settings if isinstance(settings, dict) else {}


def scores_of(scored: Mapping[str, Any]) -> AnyFound | None:
    """The scores in ``scores.json``; None where there are none."""
    try:
        facts = dict(scored["scores"])
        if "miou" in facts:
            return MapScores.from_dict(facts)
        if "ap50" in facts:
            return ObjectScores.from_dict(facts)
        if "columns" in facts:
            return NumberScores.from_dict(facts)
        lists = {
            "per_class": tuple(ClassScore(**row) for row in facts["per_class"]),
            "bins": tuple(Bin(**row) for row in facts["bins"]),
            "confusion": None if facts["confusion"] is None else np.array(facts["confusion"], np.int64),
        }
        return Scores(**(facts | lists))
    except (KeyError, TypeError, ValueError):
        return None


def sentence(config: Mapping[str, Any], done: int) -> str:
    """What was trained from what, by which recipe, on what, for how many steps."""
    recipe, names, size = settled(config), config.get("classes"), config.get("image_size")
    total, batch, epochs = (_number(recipe.get(name)) for name in ("steps", "batch_size", "epochs"))
    pictures = f"{round(total * batch / epochs):,} pictures" if total and batch and epochs else "pictures"  # an epoch's
    what = "number" if config.get("task") == "regression" else "class"
    what = what if isinstance(names, list) and len(names) == 1 else {"number": "numbers", "class": "classes"}[what]
    classes = f" of {len(names):,} {what}" if isinstance(names, list) else ""
    sides = f" at {'×'.join(map(str, [*size, *size][:2]))} pixels" if isinstance(size, list) and size else ""
    steps = f"{done:,} step{'s' * (done != 1)}"
    return (
        f"{_trained(config, recipe)} by the recipe {recipe.get('recipe', config.get('recipe'))} on {pictures}"
        f"{classes}{sides}: {steps} of {recipe.get('batch_size', '?')} pictures."
    )


def _trained(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    model, blocks, head = (
        str(config.get("model")),
        _number(config.get("blocks") if recipe.get("blocks") is None else recipe["blocks"]),
        str(recipe.get("head")),
    )
    fresh = model.startswith("untrained/")
    start = f"{model.removeprefix('untrained/')} from fresh weights" if fresh else model
    if head in _HEADS:
        return f"{_HEADS[head]} {start}, trained"
    few = {None: "", 0: "The head of ", 0.5: "Half of the last block of ", 1: "The last block of "}
    part = few.get(blocks, f"The last {blocks or 0:g} blocks of ")
    above = {"segment": f"A {recipe.get('decoder')} decoder", "detect": "A detector"}.get(str(config.get("task")))
    if above:
        part = f"{above} on {part.lower() if blocks else 'the frozen ' if blocks == 0 else ''}"
    return f"{part}{start}, {'trained' if fresh else 'fine-tuned'}"


def result(config: Mapping[str, Any], scored: Mapping[str, Any], scores: AnyFound) -> dict[str, str]:
    """How often a finished run's classifier is right, and how that was measured, by ``scores.json``."""
    if isinstance(scores, NumberScores):
        (_, *titles), rows = scores.table()
        cells_of = {name: map(" ".join, zip(titles, cells, strict=True)) for name, *cells in rows}
        found = {f"number {name}": "; ".join(cells) for name, cells in cells_of.items()}
        found |= {"n": f"{scores.n:,}", "95 % intervals": scores.interval} | _against_probe(scored)
        return found | {"for comparison": "R² is 0 for always the mean"} | _how_measured(config, scored)
    if isinstance(scores, MapScores):
        between = (
            scores.interval if scores.low is None else f"95 % interval {scores.headline[1].ends}, {scores.interval}"
        )
        found = {"mIoU": f"{percent(scores.miou)} ({between}; n = {scores.n:,})"}
        found |= {"pixels right": percent(scores.pixel_accuracy), "mean accuracy": percent(scores.mean_accuracy)}
        most = max(row.pixels for row in scores.per_class) / sum(row.pixels for row in scores.per_class)
        found["for comparison"] = f"{percent(100 * most)} of the pixels are of the most frequent class"
        return found | _how_measured(config, scored)
    if isinstance(scores, ObjectScores):
        found = {name: ", ".join(filter(None, (value, note))) for name, value, note in scores.rows()}
        return found | _how_measured(config, scored)
    interval = f"95 % interval {scores.low:.1f} to {scores.high:.1f}, {scores.interval}"
    facts = {"top-1": f"{percent(scores.top1)} ({interval}; n = {scores.n:,})"}
    for words, value, note in (
        ("top-5", scores.top5, ""),
        ("mean average precision", scores.mean_average_precision, ""),
        ("macro F1", scores.macro_f1, ", at a probability of 0.5"),
        ("balanced accuracy", scores.balanced_accuracy, ", the mean of the classes"),
        ("calibration error", scores.calibration_error, " between confidence and accuracy"),
    ):
        if value is not None:
            facts[words] = percent(value) + note
    facts["loss"] = f"{scores.loss:.4g} nats"
    facts |= _against_probe(scored)
    if not scores.multi_label:
        most = max((row.n for row in scores.per_class), default=0)
        facts["for comparison"] = f"{percent(100 * most / scores.n)} for always the most frequent class"
    else:
        facts["top-1 counts"] = "pictures with a label, where the surest class is one of theirs"
    return facts | _how_measured(config, scored)


def _against_probe(scored: Mapping[str, Any]) -> dict[str, str]:
    """The probe that a run began as, beside what became of it."""
    probe, tuned = (scores_of({"scores": scored.get(name)}) for name in ("probe", "finetuned"))
    if not probe or not tuned:
        return {}
    kept = "the fine-tuned network" if scored.get("kept") == "finetuned" else "the probe"
    both = [f"{percent(measure.value)} ({measure.ends})" for _, measure in (probe.headline, tuned.headline)]
    both[0] = f"{tuned.headline[0]} {both[0]}"
    facts = {"probe → fine-tuned": f"{' → '.join(both)}; kept is {kept}, by training pictures that were not trained on"}
    with contextlib.suppress(KeyError, TypeError):
        facts["the difference"] = Paired(**scored["paired"]).describe(numeric=isinstance(tuned, NumberScores))
    return facts


def _how_measured(config: Mapping[str, Any], scored: Mapping[str, Any]) -> dict[str, str]:
    made = "by --seed" if scored.get("split") == "made by seed" else "as the data say"
    facts = {"measured on": f"pictures held out {made}, at the last step; nothing was chosen on them"}
    if config.get("skip_twins") is True:
        facts["pictures on both sides"] = "not looked for (--skip-twins)"
    return facts


def warning(twins: Path, scores: AnyFound | None) -> str:
    """That held-out pictures are in training too, if ``twins.csv`` says so."""
    try:
        with open(twins, encoding="utf-8", errors="replace", newline="") as file:
            kinds = [row[0] for row in csv.reader(file) if row]
    except (OSError, csv.Error):
        return ""
    counts = [(kinds.count("exact"), "the same file"), (kinds.count("near"), "nearly the same picture")]
    total = sum(count for count, _ in counts)
    if not total:
        return ""
    of = f" of {scores.n:,}" if isinstance(scores, Scores) and not scores.multi_label else ""
    plural, verb = ("" if total == 1 and not of else "s"), ("is" if total == 1 else "are")
    kinds_found = " and ".join(f"{count:,} {words}" for count, words in counts if count)
    return f"{total:,}{of} held-out picture{plural} {verb} in training too: {kinds_found}. The scores may be too high."


def pictures(folder: Path) -> list[Picture]:
    """What classes are taken for, and the worst mistakes, as far as the run has drawn them."""
    drawn = (
        ("confusion.png", "Confusion", "The confusion matrix"),
        ("scatter.png", "Predicted and true", "Predicted against true numbers"),
        ("mistakes.png", "The worst mistakes", "Pictures, what they show, and what they are taken for"),
    )
    return [picture(folder / name, title, what, _WIDEST) for name, title, what in drawn if (folder / name).exists()]


def recipe(config: Mapping[str, Any]) -> list[Setting]:
    """The recipe's settings; those that a flag gave are marked."""
    settings = {name: value for name, value in settled(config).items() if name not in _FITTED}
    base, batch = _number(settings.get("base_lr")), _number(settings.get("batch_size"))
    if base and batch:
        settings["peak_lr"] = peak_rate(base, int(batch))
    asked = {name for name in settings if config.get(name) not in (None, "auto")}
    return marked_settings(settings, asked)


def trained_on(config: Mapping[str, Any]) -> str:
    """What makes the loss in training another one than what is measured; empty where nothing does."""
    settings = settled(config)
    words = [
        *["mixed labels"] * any(_number(settings.get(name)) for name in ("mixup", "cutmix")),
        *["smoothed labels"] * bool(_number(settings.get("smoothing"))),
        *["weighted classes"] * (config.get("class_weights") == "balanced"),
    ]
    return ", ".join(words)


def reliability(scores: AnyFound) -> Chart | None:
    """How often it is right, against how sure it is."""
    if not isinstance(scores, Scores):
        return None
    full = [row for row in scores.bins if row.confidence is not None and row.accuracy is not None]
    sure, right = (np.array([getattr(row, name) for row in full], float) for name in ("confidence", "accuracy"))
    ends = np.array([0.0, 100.0])
    series = [Series("ideal", ends, ends, 2, "dashed"), Series("measured", sure, right, 1, "points")]
    return chart("Calibration", "% right, against % sure", series, legend=True)[0] if full else None


def class_table(scores: AnyFound) -> dict[str, Any] | None:
    """Classes with what they are ordered by, and where they can be one, what they are taken for; None of numbers."""
    if isinstance(scores, NumberScores):
        return None
    if isinstance(scores, MapScores | ObjectScores):
        _, cells = scores.table()
        rows: list[tuple[str, ...]]
        if isinstance(scores, MapScores):
            titles: tuple[str, ...] = ("class", "pictures", "IoU", "found", "most often taken for")
            rows = [(name, n, iou.split()[0], iou, found, taken) for name, n, iou, found, _, taken in cells]
        else:
            titles = ("class", "objects", "AP", "AP50", "found", *["AP of masks"] * (scores.mask_ap is not None))
            rows = [(name, n, ap.split()[0], ap, *rest) for name, _, n, ap, *rest in cells]
        left = max(0, len(rows) - _MOST_CLASSES)
        return {
            "titles": titles,
            "rows": rows[:_MOST_CLASSES],
            "note": f"{left:,} better classes are left out." if left else "",
            "kind": "classes worded" if isinstance(scores, MapScores) else "classes",
        }
    several = scores.multi_label
    key = "average_precision" if several else "recall"
    rest = ("recall", "precision") if several else ("precision", "most often taken for")
    ranked = sorted((row for row in scores.per_class if row.n), key=lambda row: getattr(row, key) or 0.0)
    rows = []
    for row in ranked[:_MOST_CLASSES]:
        share = getattr(row, key) or 0.0
        taken = "" if row.taken_for is None else f"{printable(row.taken_for)} ({row.times:,} of {row.n:,})"
        more = (percent(row.recall), percent(row.precision)) if several else (percent(row.precision), taken)
        rows.append((printable(row.name), f"{row.n:,}", f"{share:.0f}", percent(share), *more))
    better, absent = len(ranked) - len(rows), len(scores.per_class) - len(ranked)
    notes = [f"{better:,} better classes are left out."] * bool(better)
    notes += [f"{absent:,} of the classes have no held-out picture."] * bool(absent)
    titles = ("class", "pictures", key.replace("_", " "), *rest)
    kind = "classes" if several else "classes worded"
    return {"titles": titles, "rows": rows, "note": " ".join(notes), "kind": kind}


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None
