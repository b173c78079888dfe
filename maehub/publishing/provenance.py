"""How a model came about, as its run folder tells it, and in words that hold nothing of the user's data or machine."""

import csv
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from maehub.errors import IntegrityError, UsageError
from maehub.files import read_json
from maehub.train.engine import RunConfig, option
from maehub.train.finetuning import FinetuneConfig
from maehub.train.pretraining import PretrainConfig

# Settings that say where and how a run was carried out, or name something of the user's.
_NOT_TOLD = {field.name for field in fields(RunConfig)} - {"precision", "seed"} | {"knn", "quiet"}
_NAMES_DATA = {"group": "COLUMN", "label": "COLUMN"}  # settings whose values are names in the user's data
_NUMBERS = (*("step", "loss", "lr", "grad_norm", "val_loss", "mean_fill", "interpolation", "top1", "n"), "val_top1")


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
    names: frozenset[str] = field(default=frozenset(), repr=False)  # of files and folders, which must not be published


def read_run(folder: Path) -> Provenance:
    """What a run folder tells; nothing where it is none."""
    if not (folder / "run.json").exists():
        return _of_probe(folder) if (folder / "probe.json").exists() else Provenance()
    config = read_json(folder / "config.json")
    environment = config.get("environment") or {}
    kind = "finetune" if config.get("kind") == "finetune" else "pretrain"
    curve, seconds, steps = _read_metrics(folder / "metrics.jsonl", config)
    scores = read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    recipe: dict[str, Any] = dict(config.get("settings") or {}) if kind == "finetune" else {}
    return Provenance(
        kind,
        _command(kind, config),
        recipe | _told(kind, config),
        str(environment.get("device", "")),
        {name: str(environment[name]) for name in ("maehub", "torch", "python") if name in environment},
        int(environment.get("processes", 1)),
        seconds,
        steps,
        int(scores.get("training_pictures", 0)),
        curve,
        scores.get("scores", {}),
        str(scores.get("split", "")),
        _twins(folder / "twins.csv"),
        _names(config),
    )


def _of_probe(folder: Path) -> Provenance:
    """Of the folder that `maehub probe` writes."""
    results = read_json(folder / "probe.json")
    scores: dict[str, Any] = {
        name: results[name] for name in ("n", "top1", "low", "high", "interval", "top5", "loss") if name in results
    }
    recipe = {name: results.get(name) for name in ("method", "pool", "layer", "strength")}
    command = f"maehub probe DATA -m MODEL --pool {results.get('pool')}"
    names = _names({"data": results.get("data"), "out": results.get("out")})
    return Provenance("probe", command, recipe, pictures=int(results.get("n_train") or 0), scores=scores, names=names)


def _read_metrics(path: Path, config: Mapping[str, Any]) -> tuple[tuple[dict[str, float], ...], float, int]:
    """The numbers of each line, the seconds of all steps, and the last step."""
    if not path.exists():
        return (), 0.0, 0
    settings = config.get("settings") or config
    batch = settings.get("batch_size") or 0
    curve, seconds, last = [], 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise IntegrityError(f"{path} has a line that is no JSON: {line[:60]!r}; nothing was sent") from error
        numbers = {name: entry[name] for name in _NUMBERS if isinstance(entry.get(name), int | float)}
        if "loss" in numbers and (speed := entry.get("images_per_second")):
            seconds += batch / speed
        last = max(last, int(numbers.get("step", 0)))
        curve.append(numbers)
    return tuple(curve), seconds, last


def _twins(path: Path) -> int:
    """How many test pictures the run found in training too; the names stay here."""
    if not path.exists():
        return 0
    with path.open(newline="", encoding="utf-8") as file:
        return len({row["testing"] for row in csv.DictReader(file)})


def _told(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that may be told, by name."""
    known = {field.name for field in fields(FinetuneConfig if kind == "finetune" else PretrainConfig)} - _NOT_TOLD
    told = {name.strip("_"): value for name, value in config.items() if name in known and value is not None}
    for name in ("model", "from"):
        if told.get(name):
            told[name] = _public_name(str(told[name]))
    return {name: value for name, value in told.items() if name not in _NAMES_DATA and value not in ("", [], ())}


def _command(kind: str, config: Mapping[str, Any]) -> str:
    """What one would type to train like this."""
    defaults = {field.name: field.default for field in fields(FinetuneConfig if kind == "finetune" else PretrainConfig)}
    words = ["maehub", kind, "DATA"]
    for name, default in defaults.items():
        value = config.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if name in _NOT_TOLD or value is None or value == default or value == ():
            continue
        if name in _NAMES_DATA:
            value = _NAMES_DATA[name]
        elif name in ("model", "from_"):
            value = _public_name(str(value))
        flag = option(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag, *(f"{one:g}" if isinstance(one, float) else str(one) for one in values)]
    return shlex.join([*words, "-o", "RUN"])


def _public_name(name: str) -> str:
    """The name of weights if it is one that anybody knows, else MODEL."""
    from maehub.hub import model_info
    from maehub.models import PRESETS

    kind, _, rest = name.partition("/")
    if kind in ("untrained", "timm") and "@" not in rest:
        return name if kind == "timm" or rest in PRESETS else "MODEL"
    if name in PRESETS:
        return name
    try:
        model_info(name)
    except UsageError:
        is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
        return name if is_hub_id and kind not in ("runs", "models", "checkpoints") else "MODEL"
    return name


def _names(config: Mapping[str, Any]) -> frozenset[str]:
    """Names of the user's files and folders, as far as the run knows them."""
    names = set()
    for key in ("data", "out", "knn"):
        if value := config.get(key):
            names |= {str(value), str(Path(str(value)).absolute())}
    names |= {str(config[key]) for key in _NAMES_DATA if isinstance(config.get(key), str)}
    return frozenset(name for name in names if "/" in name or "." in name)


def in_words(seconds: float) -> str:
    """A duration, such as 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
