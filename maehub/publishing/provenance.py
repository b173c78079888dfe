"""How a model came about, as its run folder tells it, and in words that hold nothing of the user's data or machine."""

import csv
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from maehub.errors import IntegrityError
from maehub.files import read_json, read_small
from maehub.hub import is_model, model_info
from maehub.models import PRESETS, Origin
from maehub.train.engine import RunConfig, option
from maehub.train.finetuning import FinetuneConfig
from maehub.train.pretraining import PretrainConfig

# Settings that say where and how a run was carried out, or name something of the user's.
_NOT_TOLD = {field.name for field in fields(RunConfig)} - {"precision", "seed"} | {"knn", "quiet"}
_MOST_METRICS = 2**29  # bytes of metrics.jsonl: a few million steps
_CONFIGS = {"finetune": FinetuneConfig, "pretrain": PretrainConfig}
_NAMES_DATA = ("group", "label")  # settings whose values are names in the user's data
_MEASURED = ("val_loss", "val_top1", "val_r2", "val_miou", "val_ap50")
_NUMBERS = ("step", "loss", "lr", "grad_norm", "mean_fill", "interpolation", "top1", "n", *_MEASURED)


@dataclass(frozen=True)
class Provenance:
    """What is known of the training; of a model that came without a run everything is empty."""

    kind: str = ""  # "pretrain", "finetune", "probe"
    command: str = ""  # as one would type it, with DATA and MODEL for what is not told
    recipe: dict[str, Any] = field(default_factory=dict)  # settings, without paths
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)  # of maehub, torch, python
    processes: int = 1
    seconds: float = 0.0  # that the steps took
    steps: int = 0
    pictures: int = 0  # that were trained on; 0 if not known
    curve: tuple[dict[str, float], ...] = ()  # numbers of metrics.jsonl
    scores: dict[str, Any] = field(default_factory=dict)  # of a classifier
    split: str = ""  # how its test pictures were chosen
    twins: int = 0  # test pictures that are in training too, or nearly
    weights: str = ""  # that it began with, as they were given; empty for fresh ones
    names: frozenset[str] = field(default=frozenset(), repr=False)  # of files and folders, which must not be published


def read_run(folder: Path, origin: Origin | None) -> Provenance:
    """What a run folder tells, or the folder that `maehub probe` writes; nothing where it is neither.

    ``origin`` is what its model says of the weights that it was trained from.
    """
    if not (folder / "run.json").exists():
        return _of_probe(folder) if (folder / "probe.json").exists() else Provenance()
    config = read_json(folder / "config.json")
    environment = config.get("environment") or {}
    kind = "finetune" if config.get("kind") == "finetune" else "pretrain"
    weights = str(config.get("model" if kind == "finetune" else "from_") or "")
    config |= {name: _public_name(str(config[name]), origin) for name in ("model", "from_") if config.get(name)}
    settings = config.get("settings") or {}
    entries, metrics = [], folder / "metrics.jsonl"
    for line in read_small(metrics, most=_MOST_METRICS).splitlines() if metrics.exists() else []:
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            text = line[:60].decode(errors="replace")
            raise IntegrityError(f"{metrics} has a line that is no JSON object: {text!r}; nothing was sent") from error
    curve = tuple({key: one[key] for key in _NUMBERS if isinstance(one.get(key), int | float)} for one in entries)
    batch = (settings or config).get("batch_size") or 0
    speeds = [one.get("images_per_second") for one, numbers in zip(entries, curve, strict=True) if "loss" in numbers]
    scores = read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    twins = set()  # the names stay here
    if (folder / "twins.csv").exists():
        with (folder / "twins.csv").open(newline="", encoding="utf-8") as file:
            twins = {row["testing"] for row in csv.DictReader(file)}
    return Provenance(
        kind,
        _command(kind, config),
        (settings if kind == "finetune" else {}) | _told(kind, config),
        str(environment.get("device", "")),
        {name: str(environment[name]) for name in ("maehub", "torch", "python") if name in environment},
        int(environment.get("processes", 1)),
        sum(batch / speed for speed in speeds if speed),
        max((int(numbers.get("step", 0)) for numbers in curve), default=0),
        int(scores.get("training_pictures", 0)),
        curve,
        scores.get("scores", {}),
        str(scores.get("split", "")),
        len(twins),
        weights if not weights.startswith("untrained/") else "",
        _names(config),
    )


def _of_probe(folder: Path) -> Provenance:
    results = read_json(folder / "probe.json")
    numbers = ("r2", "mae", "rmse", "spearman", "quadratic_kappa")
    scored = ("n", "top1", "low", "high", "interval", "top5", "loss", *numbers)
    scores: dict[str, Any] = {name: results[name] for name in scored if name in results}
    recipe = {name: results.get(name) for name in ("method", "pool", "layer", "strength")}
    command = f"maehub probe DATA -m MODEL --pool {results.get('pool')}"
    weights = str(results.get("model") or "")
    names = _names({"data": results.get("data"), "out": results.get("out")})
    return Provenance(
        "probe", command, recipe, pictures=int(results.get("n_train") or 0), scores=scores, weights=weights, names=names
    )


def _told(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that may be told, by name."""
    known = {field.name for field in fields(_CONFIGS[kind])} - _NOT_TOLD - {*_NAMES_DATA}
    return {
        name.strip("_"): value for name, value in config.items() if name in known and value not in (None, "", [], ())
    }


def _command(kind: str, config: Mapping[str, Any]) -> str:
    """What one would type to train like this."""
    words = ["maehub", kind, "DATA"]
    for setting in fields(_CONFIGS[kind]):
        name, value = setting.name, config.get(setting.name)
        value = tuple(value) if isinstance(value, list) else value
        if name in _NOT_TOLD or value in (None, setting.default, ()):
            continue
        if name in _NAMES_DATA:
            value = "COLUMN"
        flag = option(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag, *(f"{one:g}" if isinstance(one, float) else str(one) for one in values)]
    return shlex.join([*words, "-o", "RUN"])


def _public_name(name: str, origin: Origin | None) -> str:
    """The name of weights that anybody knows, of the Hub only if they were downloaded from there; else MODEL."""
    kind, _, rest = name.partition("/")
    if kind in ("untrained", "timm") and "@" not in rest:
        return name if kind == "timm" or rest in PRESETS else "MODEL"
    if name in PRESETS or is_model(name):
        return name
    return name if origin and origin.revision and origin.name == name else "MODEL"


def public_origin(origin: Origin | None, weights: str) -> Origin | None:
    """Where weights come from, as far as anybody knows it: a file or folder of the author's keeps its licence alone.

    ``weights`` are those that the training began with, which need not know where they come from.
    """
    if origin is None:
        return Origin("weights that are not public") if weights else None
    if origin.revision or (is_model(origin.name) and origin.licence):  # a folder may be called like a model
        return origin
    return Origin("weights that are not public", licence=origin.licence)


def base_model_of(origin: Origin | None) -> str:
    """The Hub id of what weights were trained from; empty where it has none."""
    if origin is None:
        return ""
    if is_model(origin.name):
        return next((source.repo for source in model_info(origin.name).sources if source.kind == "hub"), "")
    return origin.name.partition("@")[0] if origin.revision else ""


def _names(config: Mapping[str, Any]) -> frozenset[str]:
    """Names of the user's files and folders, as far as the run knows them."""
    names = set()
    for key in ("data", "out", "knn"):
        if value := config.get(key):
            names |= {str(value), str(Path(str(value)).absolute())}
    names |= {str(config[key]) for key in _NAMES_DATA if isinstance(config.get(key), str)}
    return frozenset(name for name in names if "/" in name or "." in name)
