"""A stranger's checkpoint, opened as little as possible: which file, of which format, with which tensors.

Of a safetensors file the header is read and nothing else; of a pickle the tensors are mapped, where its format allows
that. No code of a file is run.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from maehub.errors import IntegrityError, UsageError, first_names
from maehub.files import check_regular
from maehub.hub import is_model
from maehub.weights import find_model_folder, read_header, read_pickle, read_tensors

USUAL = ("model.safetensors", "pytorch_model.bin")
"""The files that a folder is searched for first."""

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_MARKUP = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error)", re.IGNORECASE)
# what `read_header` has words of its own for
_NAMED_ELSEWHERE = re.compile(rb"version https://git-lfs|\x1f\x8b|\x28\xb5\x2f\xfd|\x89HDF|\s*\{|.{8}\{|$", re.DOTALL)


class Checkpoint(NamedTuple):
    """An opened file of weights."""

    file: Path
    config: Path | None  # the config.json that belongs to it
    format: Literal["safetensors", "pickle"]
    shapes: dict[str, Tensor]  # every tensor by its name in the file, on the meta device: shape and dtype alone
    values: Callable[[], Mapping[str, Tensor]]  # the tensors themselves, mapped or in memory
    metadata: dict[str, str]  # of a safetensors header
    entry: str  # the dictionary entry of a pickle that the tensors are in; empty if in none
    beside: tuple[str, ...]  # what else a pickle has: ``optimizer``, ``args`` …


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a safetensors file or PyTorch pickle, or the one of a model, run or other folder.

    Of a run without an exported model it is the newest checkpoint.
    """
    file, config = _find(Path(path))
    check_regular(file, UsageError)
    try:
        with open(file, "rb") as opened:
            start = opened.read(512)
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read: {error.strerror or error}") from error
    if start[8:9] == b"{" or not start.startswith((b"PK", b"\x80")):
        if _MARKUP.match(start):
            raise IntegrityError(
                f"{file} is an HTML or XML page, not weights: the download failed and the server's page was kept under "
                "this name. A gated repository answers so to who was not let in: accept its terms on its page, run "
                "`hf auth login`, then download again"
            )
        if not _NAMED_ELSEWHERE.match(start):
            raise IntegrityError(
                f"{file} is neither a safetensors file nor a PyTorch pickle; its first bytes are of no kind known here"
            )
        entries, metadata = read_header(file)
        return Checkpoint(
            file, config, "safetensors", _on_meta(entries), lambda: read_tensors(file).tensors, metadata, "", ()
        )
    tensors, beside, entry = read_pickle(file)
    return Checkpoint(file, config, "pickle", _on_meta(tensors), lambda: tensors, {}, entry, beside)


def _find(path: Path) -> tuple[Path, Path | None]:
    """The file of weights that a path means, and the ``config.json`` that belongs to it."""
    if not os.path.exists(path):  # unlike the method of a path, False for a name that is too long
        hint = f"; a model is called so, and `maehub info {path}` says what it is" if is_model(str(path)) else ""
        raise UsageError(f"there is no file or folder {path}{hint}")
    if not path.is_dir():
        beside = path.parent / "config.json"
        return path, beside if path.name in USUAL and beside.is_file() else None
    steps = [] if (path / "model" / "config.json").exists() else path.glob("checkpoints/step-*/model.safetensors")
    numbers = {int(name): step for step in steps if (name := step.parent.name[5:]).isdecimal() and step.is_file()}
    is_run = (path / "run.json").exists()
    folder = numbers[max(numbers)].parent if numbers and is_run else find_model_folder(path)
    config = folder / "config.json"
    return _only_one(folder), config if config.is_file() else None


def _only_one(folder: Path) -> Path:
    for name in USUAL:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob("*.index.json")):
        raise UsageError(f"{folder} has its weights in several files; name one of them, or join them")
    files = sorted(entry for entry in folder.iterdir() if entry.suffix in _ENDINGS and entry.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise UsageError(f"{folder} has {len(files)} files of weights: {_some(files)}; name one of them")
    others = _some(folder.iterdir()) or "nothing"
    raise UsageError(f"{folder} has no file of weights ({', '.join(_ENDINGS)}) but {others}")


def _on_meta(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors, or the entries of a header, without their values."""
    return {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in tensors.items()}


def _some(paths: Iterable[Path]) -> str:
    return first_names(sorted(path.name for path in paths), 5)
