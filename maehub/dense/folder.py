"""Folders of segmenters and detectors: the folder of the encoder, as maehub and timm load it, and the rest beside it.

config.json, model.safetensors, README.md     the encoder's; see `maehub.weights.save`
segmenter.json, or detector.json              what it is on top: its classes, its parts, how pictures are scaled
segmenter.safetensors, detector.safetensors   the tensors of that
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from maehub.data import MapClasses, ObjectClasses
from maehub.dense.attention import AttentionConfig, plain
from maehub.dense.detector import Detector, DetectorConfig
from maehub.dense.segmenter import Segmenter, SegmenterConfig
from maehub.errors import IntegrityError, UsageError
from maehub.files import DETECTOR, SEGMENTER, check_free, read_json, whole_folder, write_json
from maehub.hub import fetch_folder, is_hub_id, load
from maehub.models import usable_device
from maehub.version import __version__
from maehub.weights import MEMBERS, check_finite, find_model_folder, read_tensors, write_members, write_tensors

_FORMAT = 1
_Dense = TypeVar("_Dense", Segmenter, Detector)


def save_segmenter(model: Segmenter, folder: str | Path, *, card: str | None = None, overwrite: bool = False) -> Path:
    """Write a segmenter's folder, whole or not at all; arguments and errors as in `maehub.save`."""
    return _save(Segmenter, model, Path(folder), SEGMENTER, card, overwrite)


def save_detector(model: Detector, folder: str | Path, *, card: str | None = None, overwrite: bool = False) -> Path:
    """Write a detector's folder, whole or not at all; arguments and errors as in `maehub.save`."""
    return _save(Detector, model, Path(folder), DETECTOR, card, overwrite)


def load_segmenter(folder: str | Path, *, device: str | torch.device = "cpu") -> Segmenter:
    """A segmenter by its folder, that of its run, or a Hub id, in eval mode; `maehub.load` gives its encoder alone.

    ``load_segmenter("runs/streets").predict("street.jpg")`` is (H, W) int16, places in its ``config.classes.names``.

    Raises:
        UsageError: it is no such folder.
        IntegrityError: a file is broken, or holds other tensors than it should.
    """
    return _load(Segmenter, SegmenterConfig, MapClasses, folder, SEGMENTER, "segment", device)


def load_detector(folder: str | Path, *, device: str | torch.device = "cpu") -> Detector:
    """A detector by its folder, that of its run, or a Hub id, in eval mode; `maehub.load` gives its encoder alone.

    ``load_detector("runs/crowns").predict("wood.jpg")`` has boxes (n, 4) in pixels, scores (n,), labels (n,), places in
    its ``config.classes.names``, and masks where it draws them.

    Raises:
        UsageError: it is no such folder.
        IntegrityError: a file is broken, or holds other tensors than it should.
    """
    return _load(Detector, DetectorConfig, ObjectClasses, folder, DETECTOR, "detect", device)


def _save(kind: type[_Dense], model: _Dense, folder: Path, name: str, card: str | None, overwrite: bool) -> Path:
    if not isinstance(model, kind):
        raise UsageError(f"a {kind.__name__} can be saved here, not a {type(model).__name__}")
    beside = Path(name).with_suffix(".safetensors").name
    members = (*MEMBERS, name, beside)
    check_free(folder, overwrite, members)
    with whole_folder(folder, overwrite=overwrite, members=members) as staging:
        write_members(staging, folder.absolute().name, plain(model.encoder), card=card)
        write_beside(staging, model)
    return folder


def write_beside(folder: Path, model: Segmenter | Detector) -> None:
    """Write what lies beside the encoder's files."""
    name, task = (SEGMENTER, "segment") if isinstance(model, Segmenter) else (DETECTOR, "detect")
    tensors = {key: value.contiguous() for key, value in _own(model).items()}
    check_finite({key: value for key, value in tensors.items() if value.is_floating_point()}, "the weights to save")
    path = (folder / name).with_suffix(".safetensors")
    sha256 = write_tensors(path, tensors, {"format": "pt", "maehub": __version__}, torch.float32)
    said: dict[str, Any] = {"format": _FORMAT, "maehub": __version__, "task": task, "sha256": sha256}
    write_json(folder / name, said | asdict(model.config))


def _own(model: Segmenter | Detector) -> dict[str, Tensor]:
    """Its tensors but those of the encoder as it was pretrained."""
    encoder = {id(tensor) for tensor in plain(model.encoder).state_dict(keep_vars=True).values()}
    everything = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in everything.items() if id(tensor) not in encoder}


def _load(
    kind: type[_Dense], config: type, classes: type, source: str | Path, name: str, task: str, device: Any
) -> _Dense:
    beside = Path(name).with_suffix(".safetensors").name
    folder = fetch_folder(str(source), [name, beside]) if is_hub_id(source) else find_model_folder(source)
    if not (folder / name).is_file():
        raise UsageError(
            f"{folder} is no {kind.__name__.lower()}: it has no {name}. `maehub finetune` trains one; "
            "maehub.load(FOLDER) loads encoders and classifiers"
        )
    said = read_json(folder / name)
    if said.get("format") != _FORMAT or said.get("task") != task:
        raise IntegrityError(f"{folder / name} is of another format or task than this version of maehub reads")
    rest = {key: value for key, value in said.items() if key not in ("format", "maehub", "task", "sha256")}
    encoder = load(folder)
    try:
        model = kind(encoder, _config(config, classes, rest))
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise IntegrityError(f"{folder / name} cannot be used: {error}") from error
    path = folder / beside
    if not path.is_file():
        raise IntegrityError(f"{folder} has a {name} and no {beside}")
    tensors, expected = read_tensors(path).tensors, _own(model)
    if tensors.keys() != expected.keys() or any(tensors[key].shape != expected[key].shape for key in expected):
        missing, more = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise IntegrityError(
            f"{path} does not hold what {name} describes: it lacks {missing[:3]}, has {more[:3]} beside it, or shapes "
            "differ"
        )
    check_finite({key: value for key, value in tensors.items() if value.is_floating_point()}, str(path))
    model.load_state_dict(tensors, strict=False)
    return model.to(usable_device(device)).eval()


def _config(kind: type, classes: type, said: Mapping[str, Any]) -> Any:
    if unknown := sorted(said.keys() - set(kind.__dataclass_fields__)):  # type: ignore[attr-defined]
        raise UsageError(f"it has unknown keys: {', '.join(unknown)[:200]}")
    read = {key: _frozen(value) for key, value in said.items()}
    named = {key: _frozen(value) for key, value in said["classes"].items()}
    attention = {key: _frozen(value) for key, value in said.get("attention", {}).items()}
    return kind(**read | {"classes": classes(**named), "attention": AttentionConfig(**attention)})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
