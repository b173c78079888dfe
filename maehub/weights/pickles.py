"""PyTorch pickles, opened without running code.

This is the only place that opens a pickle, and it opens it with torch's restricted reader: tensors and plain values
come out, and what asks for anything else is refused by name. A few kilobytes can ask that reader for gigabytes or for
days, so a pass that makes nothing goes before it and adds up what it would cost.
"""

import argparse
import io
import itertools
import os
import pathlib
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch.serialization import safe_globals

from maehub.errors import IntegrityError, UsageError, first_names, log
from maehub.files import check_regular
from maehub.weights.tensorfile import check_names

# The restricted reader was itself exploitable before (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)

# Where training programs put the weights; of several copies the first one here is taken.
_WRAPPED_IN = (
    *("model", "state_dict", "model_state_dict", "module", "net", "network", "teacher", "student"),
    *("model_ema", "ema", "state_dict_ema", "ema_state_dict"),
)

# What may be in a file beside tensors and plain values. The official training checkpoints hold their command line as a
# Namespace, which only stores attributes. Checkpoints of ScaleMAE hold paths in it: they become pure paths, which are
# text with slashes and cannot touch a disk. Nothing of either is used.
_TORCH = b"\x8a\x0al\xfc"  # with which torch's own old pickles begin
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
_MOST_KINDS = 100  # of classes and functions in a file

# What torch's reader makes itself, beside the two above. Of what it could make more, no file of weights has any.
_MADE_BY_TORCH = re.compile(
    r"torch\.(_utils\._rebuild_(tensor(_v2|_v3)?|parameter(_with_state)?)|_tensor\._rebuild_from_type_v2|Tensor|Size|device"
    r"|nn\.parameter\.Parameter|serialization\._get_layout|(storage\.)?\w+Storage|(u?int|b?float|complex|bool)\w*)$"
    r"|collections\.(OrderedDict|Counter)$|_codecs\.encode$|builtins\.(set|bytearray|complex)$"
    r"|argparse\.Namespace$|pathlib\.(_local\.)?PosixPath$"
)
_OPCODES = b"\x80\x81\x85\x86\x87\x88\x89\x8a\x8f().GJKMNQRUX]abcehjqrstu}"  # all that torch's reader knows
_MOST_READS = 1_000_000  # of codes and their arguments: ViT-H with its optimizer has a tenth of it
_LARGEST_PICKLE = 50_000_000  # bytes of the structure of a PyTorch file; real ones have some hundred thousand
_MOST_COPIED = 2**28  # bytes


class _Nothing:
    """Stands for an object that is not wanted, or not yet."""

    name = ""
    outline: "_Outline"
    copied = 0  # bytes that a copy of it takes

    def __new__(cls, *values: Any, **_: Any) -> "_Nothing":
        if cls.name.startswith("torch._tensor.") and not getattr(values[0], "name", "").startswith("torch._utils."):
            raise pickle.UnpicklingError("it has a tensor of an unknown kind")
        made = super().__new__(cls)
        if not cls.name.startswith("torch._utils."):  # a view costs nothing, whatever the numbers in it
            made.copied = cls.outline.spend(values)
        return made

    def __setstate__(self, state: Any) -> None:
        self.copied += self.outline.spend((state,))

    def __setitem__(self, key: Any, _: Any) -> None:
        _check_key(key)
        self.copied += 100

    def append(self, _: Any) -> None:
        """As lists take things."""


def _check_key(key: Any) -> None:
    """Refuse what would be hashed for ever: a tuple of tuples of the same tuples."""
    if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
        raise pickle.UnpicklingError("it has keys of tuples in tuples")


class _Outline(pickle._Unpickler):
    """What a file's pickles ask for, in memory and time that are those of their bytes; no name in them is looked up."""

    dispatch: ClassVar = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES} | {
        pickle.EMPTY_DICT[0]: lambda reader: reader.append(reader.find_class("collections", "OrderedDict")())
    }

    def __init__(self, file: BinaryIO, path: str | Path) -> None:
        reads = itertools.count()

        def read(count: int) -> bytes:
            if next(reads) == _MOST_READS:
                raise pickle.UnpicklingError("it has too many parts")
            return file.read(count)

        super().__init__(SimpleNamespace(read=read, readline=file.readline), encoding="bytes")
        self.path = path
        self.kinds: dict[str, type[_Nothing]] = {}  # by what they stand for
        self.copied = 0

    def find_class(self, module: str, name: str) -> type[_Nothing]:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full not in self.kinds:
            if not (_MADE_BY_TORCH.match(full) or _KEPT_BESIDE.match(full)) or len(self.kinds) == _MOST_KINDS:
                raise IntegrityError(
                    f"{self.path} is not a file of tensors alone: it asks for {full}. No code in it was run"
                )
            self.kinds[full] = type("_Nothing", (_Nothing,), {"name": full, "outline": self})
        return self.kinds[full]

    def persistent_load(self, pid: Any) -> str:
        return "a storage"

    def spend(self, values: tuple[Any, ...]) -> int:
        """Count what a call copies of its arguments, or makes of a number, and look at what it may hash."""
        before = self.copied
        for value in values:
            if isinstance(value, list | tuple):
                self.copied += 100 * len(value)
                for part in value:
                    _check_key(part[0] if isinstance(part, list) and part else part)
            else:
                self.copied += 8 * abs(value) if type(value) is int else sys.getsizeof(value)
                self.copied += getattr(value, "copied", 0)
        if self.copied > _MOST_COPIED:
            raise pickle.UnpicklingError("it copies its parts over and over")
        return self.copied - before


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
    try:
        check_regular(path)
        mapped = not str(path).endswith(".safetensors") and zipfile.is_zipfile(path)  # torch goes by that ending
        with safe_globals([*_ALLOWED, *_outline(path)]), open(path, "rb") as file:
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except IntegrityError:
        raise
    except Exception as error:  # a damaged pickle raises nearly every type there is
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise IntegrityError(
            f"{path} cannot be read: {reason}. It is damaged or hostile. No code in it was run"
        ) from error
    beside: list[str] = []
    entry = ""
    for _ in range(8):  # a dictionary may hold itself
        wrapped = [key for key in _WRAPPED_IN if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not wrapped:
            break
        inner, *copies = wrapped
        beside += [key for key in content if isinstance(key, str) and key != inner]
        if copies:
            log.warning("%s: its weights under %r are taken; other copies are %s", path, inner, ", ".join(copies))
        content, entry = content[inner], entry or inner
    if not isinstance(content, dict) or not content:
        raise IntegrityError(f"{path} holds no dictionary of tensors but a {type(content).__name__}")
    if not all(isinstance(name, str) for name in content):
        raise IntegrityError(f"{path} holds tensors under keys that are no text")
    others = [name for name, value in content.items() if not isinstance(value, Tensor) or value.layout != torch.strided]
    if others:
        raise IntegrityError(f"{path} holds other things than plain tensors: {first_names(others, 5)}")
    _check_values(path, content)
    return Pickled(content, tuple(beside), entry)


def holds_dense(source: str | Path) -> bool:
    """Whether a file is a pickle of detectron2's detectors, by how it begins, or of mmsegmentation's segmenters, by its
    tensors."""
    path = Path(source)
    if not path.is_file() or path.suffix not in (".pkl", ".pth"):
        return False
    if path.suffix == ".pkl":
        with open(path, "rb") as file:
            head = file.read(16)
        return head[:1] == pickle.PROTO and _TORCH not in head
    return any(name.startswith("decode_head.") for name in read_pickle(path).tensors)


def _outline(path: str | Path) -> list[Any]:
    """Refuse a file that would cost more than its bytes; what torch's reader is to allow, kinds by their names."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        outline = _Outline(io.BytesIO(_structure(path)) if zipped else file, path)
        # Before zip archives: a magic number, a version, facts of the machine, the content, and the order of its bytes.
        for number in range(1 if zipped else 5):
            if outline.load() != torch.serialization.MAGIC_NUMBER and not (number or zipped):
                raise pickle.UnpicklingError("it does not begin as files of PyTorch do")
    return [(kind, name) for name, kind in outline.kinds.items() if not _MADE_BY_TORCH.match(name)]


def _structure(file: str | Path) -> bytes:
    """The pickle in a zip archive; those that PyTorch did not write are refused before anything is unpacked."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [one.filename for one in members]
            structures = [one for one in members if re.fullmatch(r"[^/]+/data\.pkl", one.filename)]
            if not structures:
                inside = first_names(sorted(name.rsplit("/", 1)[-1] for name in names), 5) or "nothing"
                raise IntegrityError(
                    f"{file} is a zip archive that PyTorch did not write: it has no data.pkl but {inside}"
                )
            if any(name.endswith("/constants.pkl") for name in names):
                raise IntegrityError(
                    f"{file} is a TorchScript program, not weights alone. No code in it was run. Where its origin is "
                    "trusted, save the state_dict() of torch.jit.load(…)"
                )
            problems = [f"{one.filename} is compressed" for one in members if one.compress_type != zipfile.ZIP_STORED]
            if structures[0].file_size > _LARGEST_PICKLE:
                problems += [f"data.pkl has {structures[0].file_size:,} bytes"]
            if len(structures) > 1 or len(set(names)) < len(names):
                problems += ["it has two members of one name"]
            if problems:
                raise IntegrityError(f"{file} was not written by PyTorch: {problems[0]}. Nothing of it was unpacked")
            return archive.read(structures[0])  # compares its checksum
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{file} is a damaged zip archive ({error}); download or copy it again") from error


def _check_values(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of more values than the file has, which a pickle can make of strides and of one piece shown twice.

    Tied weights are in a file once, so half of its tensors may be.
    """
    check_names(path, tensors)
    size, claimed = os.path.getsize(path), 0
    for name, value in tensors.items():
        claimed += value.nbytes
        if value.nbytes > min(size, value.untyped_storage().nbytes()):
            raise IntegrityError(
                f"{path}: {name[:80]!r} claims {value.numel():,} values and has {value.untyped_storage().nbytes():,} "
                f"bytes in a file of {size:,}; it is damaged or hostile"
            )
    if claimed > 2 * size:
        raise IntegrityError(f"{path}: its tensors claim {claimed:,} bytes in a file of {size:,}; it is hostile")


def write_pickle(path: str | Path, tensors: Mapping[str, Tensor], inside: str) -> None:
    """A new PyTorch pickle, for libraries that read nothing else; the same tensors give the same bytes.

    They are written in float32, in the order of their names; ``inside`` is the key of the dictionary around them.
    """
    plain = {name: tensors[name].detach().to("cpu", torch.float32).contiguous().clone() for name in sorted(tensors)}
    with open(path, "xb") as file:
        torch.save({inside: plain}, file)
