"""Folders of segmenters: the folder of the encoder, as maehub and timm load it, and the decoder beside it.

config.json, model.safetensors, README.md     the encoder's; see `maehub.weights.save`
segmenter.json                                decoder, classes, palette, scale, attention
segmenter.safetensors                         the decoder's tensors, and what attention adds to the encoder's
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from maehub.data import MapClasses
from maehub.dense.attention import AttentionConfig, DenseEncoder
from maehub.dense.segmenter import Segmenter, SegmenterConfig
from maehub.errors import IntegrityError, UsageError
from maehub.files import SEGMENTER, check_free, read_json, whole_folder, write_json
from maehub.hub import load
from maehub.models import usable_device
from maehub.version import __version__
from maehub.weights import MEMBERS, check_finite, find_model_folder, read_tensors, write_members, write_tensors

_CONFIG, _TENSORS = SEGMENTER, "segmenter.safetensors"
_FORMAT = 1


def save_segmenter(model: Segmenter, folder: str | Path, *, card: str | None = None, overwrite: bool = False) -> Path:
    """Write a segmenter's folder, whole or not at all; arguments and errors as in `maehub.save`."""
    if not isinstance(model, Segmenter):
        raise UsageError(f"save_segmenter takes a Segmenter, not a {type(model).__name__}")
    folder, members = Path(folder), (*MEMBERS, _CONFIG, _TENSORS)
    check_free(folder, overwrite, members)
    tensors = {name: value.contiguous() for name, value in _beside(model).items()}
    encoder = model.encoder.plain() if isinstance(model.encoder, DenseEncoder) else model.encoder
    check_finite({name: value for name, value in tensors.items() if value.is_floating_point()}, "the weights to save")
    with whole_folder(folder, overwrite=overwrite, members=members) as staging:
        write_members(staging, folder.absolute().name, encoder, card=card)
        sha256 = write_tensors(staging / _TENSORS, tensors, {"format": "pt", "maehub": __version__}, torch.float32)
        said: dict[str, Any] = {"format": _FORMAT, "maehub": __version__, "task": "segment", "sha256": sha256}
        write_json(staging / _CONFIG, said | asdict(model.config))
    return folder


def load_segmenter(folder: str | Path, *, device: str | torch.device = "cpu") -> Segmenter:
    """A segmenter by its folder, or that of its run, in eval mode; `maehub.load` gives its encoder alone.

    ``load_segmenter("runs/streets").predict("street.jpg")`` is (H, W) int16, places in its ``config.classes.names``.

    Raises:
        UsageError: it is no such folder.
        IntegrityError: a file is broken, or holds other tensors than it should.
    """
    folder = find_model_folder(folder)
    if not (folder / _CONFIG).is_file():
        raise UsageError(
            f"{folder} is no segmenter: it has no {_CONFIG}. Train one by `maehub finetune DATA -o RUN --task "
            "segment`; maehub.load(FOLDER) loads encoders and classifiers"
        )
    config = _config(folder / _CONFIG)
    encoder = load(folder)
    model = Segmenter(encoder, config)
    path = folder / _TENSORS
    if not path.is_file():
        raise IntegrityError(f"{folder} has a {_CONFIG} and no {_TENSORS}")
    tensors, expected = read_tensors(path).tensors, _beside(model)
    if tensors.keys() != expected.keys() or any(tensors[key].shape != expected[key].shape for key in expected):
        missing, more = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise IntegrityError(
            f"{path} does not hold what {_CONFIG} describes: it lacks {missing[:3]}, has {more[:3]} beside "
            "it, or shapes differ"
        )
    check_finite({name: value for name, value in tensors.items() if value.is_floating_point()}, str(path))
    for name, value in expected.items():
        value.copy_(tensors[name])
    return model.to(usable_device(device)).eval()


def _beside(model: Segmenter) -> dict[str, torch.Tensor]:
    """The decoder's tensors by their names in it, and what attention adds by its names in the segmenter."""
    added = model.encoder.added() if isinstance(model.encoder, DenseEncoder) else {}
    return model.decoder.state_dict() | {f"encoder.{name}": value for name, value in added.items()}


def _config(path: Path) -> SegmenterConfig:
    said = read_json(path)
    known = set(SegmenterConfig.__dataclass_fields__)
    if said.get("format") != _FORMAT or said.get("task") != "segment":
        raise IntegrityError(f"{path} is of another format or task than this version of maehub reads")
    if unknown := sorted(said.keys() - known - {"format", "maehub", "task", "sha256"}):
        raise IntegrityError(f"{path} has unknown keys: {', '.join(unknown)[:200]}")
    try:
        classes = MapClasses(**{name: _frozen(value) for name, value in said["classes"].items()})
        attention = {name: _frozen(value) for name, value in said.get("attention", {}).items()}
        rest: Any = {name: _frozen(said[name]) for name in said.keys() & known - {"classes", "attention"}}
        return SegmenterConfig(classes, **rest, attention=AttentionConfig(**attention))
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise IntegrityError(f"{path} cannot be used: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
