"""PyTorch pickles, opened without running code.

This is the only place that opens a pickle, and it opens it with torch's restricted reader: tensors and plain values
come out, and what asks for anything else is refused by name.
"""

import argparse
import logging
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import safe_globals

from maehub.errors import IntegrityError, UsageError

log = logging.getLogger("maehub")

# The restricted reader was itself exploitable before (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)

# Where training programs put the weights; of several copies the first one here is taken.
_WRAPPED_IN = (
    *("model", "state_dict", "model_state_dict", "module", "net", "network", "teacher", "student"),
    *("model_ema", "ema", "state_dict_ema", "ema_state_dict"),
)
_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")

# What may be in a file beside tensors and plain values. The official training checkpoints hold their command line as a
# Namespace, which only stores attributes. Checkpoints of ScaleMAE hold paths in it: they become pure paths, which are
# text with slashes and cannot touch a disk. Nothing of either is used.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 calls it
]
# What training programs keep beside the weights, such as a history of losses: of classes and functions of these modules
# none is ever imported. An object that takes anything and keeps nothing stands for each.
_KEPT_BESIDE = re.compile(
    r"(mmengine|mmcv|mmcls|mmpretrain|mmseg|mmdet|numpy|_codecs|collections|datetime|pytorch_lightning|lightning|omegaconf"
    r"|lightning_fabric|lightning_utilities|torchmetrics|easydict|yacs|fvcore|ml_collections|deepspeed|timm\.scheduler)\."
    r"|(builtins\.)?(int|float|bool|str|list|dict|set|tuple|frozenset|complex|slice|range|bytearray)$"
)
_MOST_KINDS = 50  # of such objects in a file


class _Nothing:
    """Stands for an object that is not wanted."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None:
        """As lists take things."""

    def extend(self, _: Any) -> None:
        """As lists take things."""


class Pickled(NamedTuple):
    """What a pickle holds."""

    tensors: dict[str, Tensor]  # under the names of the file
    beside: tuple[str, ...]  # names of what else there is: ``optimizer``, ``args`` …
    entry: str  # the dictionary entry that the tensors are in; empty if in none


def read_pickle(path: str | Path) -> Pickled:
    """The tensors of a PyTorch pickle, at its top or inside ``{"model": …}``, read without running code."""
    version = torch.__version__
    if version < _SAFE_TORCH:  # type: ignore[operator]
        raise UsageError(
            f"reading the pickle {path} needs torch {_SAFE_TORCH[0]}.{_SAFE_TORCH[1]} or newer, and this is {version}: "
            "the restricted reader of older ones can be broken out of. Nothing was read; update torch"
        )
    allowed = list(_ALLOWED)
    mapped = not str(path).endswith(".safetensors") and zipfile.is_zipfile(path)  # torch goes by that ending
    try:
        while True:
            try:
                with safe_globals(allowed), open(path, "rb") as file:
                    content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
                break
            except pickle.UnpicklingError as error:
                asked = re.search(r"GLOBAL ([\w.]+)", str(error))
                if asked and _KEPT_BESIDE.match(asked[1]) and len(allowed) < _MOST_KINDS:
                    name = asked[1] if "." in asked[1] else f"builtins.{asked[1]}"
                    allowed.append((type("_Nothing", (_Nothing,), {}), name))
                    continue
                wants = f"it asks for {asked[1]}" if asked else "it is damaged, or asks for what is not allowed"
                raise IntegrityError(
                    f"{path} is not a file of tensors alone: {wants}. No code in it was run"
                ) from error
    except IntegrityError:
        raise
    except Exception as error:  # a damaged pickle raises nearly every type there is
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise IntegrityError(f"{path} cannot be read: {reason}. No code in it was run") from error
    beside: list[str] = []
    entry = ""
    while isinstance(content, dict):
        inner = next((key for key in _WRAPPED_IN if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        beside += [str(key) for key in content if key != inner]
        if copies := [key for key in _WRAPPED_IN if key != inner and isinstance(content.get(key), dict)]:
            log.warning("%s: its weights under %r are taken; other copies are %s", path, inner, ", ".join(copies))
        content, entry = content[inner], entry or inner
    if not isinstance(content, dict) or not content:
        raise IntegrityError(f"{path} holds no dictionary of tensors but a {type(content).__name__}")
    others = [
        str(name) for name, value in content.items() if not isinstance(value, Tensor) or value.layout != torch.strided
    ]
    if others:
        raise IntegrityError(f"{path} holds other things than plain tensors: {', '.join(others[:5])}")
    if not all(isinstance(name, str) for name in content):
        raise IntegrityError(f"{path} holds tensors under keys that are no text")
    return Pickled(content, tuple(beside), entry)


def write_pickle(path: str | Path, tensors: Mapping[str, Tensor], inside: str) -> None:
    """A new PyTorch pickle, for libraries that read nothing else; the same tensors give the same bytes.

    They are written in float32, in the order of their names; ``inside`` is the key of the dictionary around them.
    """
    plain = {name: tensors[name].detach().to("cpu", torch.float32).contiguous().clone() for name in sorted(tensors)}
    with open(path, "xb") as file:
        torch.save({inside: plain}, file)


def is_pickle(file: Path) -> bool:
    """Whether a file of weights is a pickle: by content where it shows, else by name."""
    with open(file, "rb") as opened:
        start = opened.read(9)
    if start[8:] == b"{":
        return False
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or file.suffix in _ENDINGS


def pickles_in(folder: Path) -> list[Path]:
    """The files of a folder that have a pickle's ending."""
    return sorted(entry for entry in folder.iterdir() if entry.suffix in _ENDINGS and entry.is_file())
