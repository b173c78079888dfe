"""Tables of features, and the files that hold them: .safetensors, .npz, .parquet and .csv.

Every writer takes the rows piece by piece, so a table may be larger than memory, and writes nothing that depends on the
time or the machine: equal tables are equal files. Paths need not be UTF-8; safetensors and npz keep them as bytes.
"""

import csv
import itertools
import json
import math
import os
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from maehub.errors import DataError, IntegrityError, MissingDependencyError, UsageError
from maehub.files import FORMULA, atomic_write, check_regular, sheet_cells
from maehub.weights import header_bytes, read_header, read_tensors

Provenance = dict[str, Any]
Pieces = Iterator[np.ndarray]
"""Rows of a table, some at a time: (k, …) float32."""

_KEY = "maehub"  # under which a file keeps the provenance
_COMMENT = "# "  # before it, in the first line of a .csv
_PIECE_BYTES = 2**24
_MOST_DIMENSIONS = 8
_LARGEST_FACTS = 2**25  # bytes: with the reasons of 200,000 pictures that could not be read
_MOST_LARGER = 32  # times as large as its .parquet file a table may be; the best that Snappy does is 21


class Skipped(NamedTuple):
    """A picture that is not in the table."""

    path: str
    reason: str


@dataclass
class FeatureTable:
    """One row of features a picture.

    ``paths``: one a row, as `os.fsdecode` gives them; a picture that came without a file is called by its place in the
    source. ``features``: (rows, …) float32. ``provenance`` says what they were made with. ``skipped``: pictures that
    could not be read.
    """

    paths: list[str]
    features: Tensor
    provenance: Provenance = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a file; its ending says which kind.

        Raises:
            UsageError: an ending that is not known or cannot hold these rows, or the file exists.
            CheckpointError: the disk is full or read-only.
        """
        target = Path(path)
        check_ending(target, self.provenance.get("pool"))
        if target.exists() and not overwrite:
            raise UsageError(f"{target} exists; overwrite=True replaces it")
        rows = self.features.detach().float().cpu().numpy()
        step = piece_rows(rows.shape[1:])
        pieces = (rows[start : start + step] for start in range(0, len(rows), step))
        facts = self.provenance | {"skipped": [list(item) for item in self.skipped]}
        write_features(target, pieces, rows.shape, [os.fsencode(path) for path in self.paths], facts)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` or `extract_features` wrote. Those of .safetensors are mapped, not read.

        Raises:
            IntegrityError: it is not such a file.
            UsageError: an ending that is not known, or no file.
        """
        target = Path(path)
        check_ending(target, None)
        if not target.exists():
            raise UsageError(f"{target} does not exist")
        check_regular(target)
        try:
            facts, paths, features = _kind(target).parts(target)
            if features.dtype != torch.float32 or features.ndim < 2 or len(features) != len(paths):
                raise DataError(f"{len(paths)} paths do not go with {features.dtype} of {tuple(features.shape)}")
        except Exception as error:  # the libraries of four formats raise nearly every type there is
            raise IntegrityError(f"{target} is not a file of features: {error}") from error
        return cls(paths, features, facts, [Skipped(*item) for item in facts.pop("skipped", [])])


def piece_rows(row_shape: tuple[int, ...]) -> int:
    """How many rows are written at once; fixed by their shape alone, since a parquet file shows it."""
    return max(1, _PIECE_BYTES // (4 * math.prod(row_shape)))


def check_ending(path: Path, pool: str | None) -> None:
    """Whether a file of this ending can hold features of this pool, and what it needs is installed."""
    if not _kind(path).many_dimensions and pool in ("tokens", "map"):
        raise UsageError(f"{path.suffix} holds one vector a picture, not pool={pool!r}; take .safetensors or .npz")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(".parquet needs pyarrow: pip install 'maehub[parquet]'") from error


def write_features(
    path: Path, pieces: Pieces, shape: tuple[int, ...], paths: list[bytes], provenance: Provenance
) -> None:
    """Write a table of (rows, …) float32 with one path a row, whose pieces but the last have `piece_rows` rows."""
    facts = json.dumps(provenance | {"shape": list(shape)}, sort_keys=True)
    with atomic_write(path) as temporary:
        _kind(path).write(temporary, pieces, shape, paths, facts)


def read_provenance(path: Path) -> Provenance | None:
    """The provenance of a file of features without its rows; None if it is another file."""
    kind = _kind(path)
    try:
        return next(kind.parts(path)) if path.is_file() else None
    except Exception:
        return None


def check_bad_files(out: Path, overwrite: bool) -> None:
    """Refuse what the list of skipped pictures beside ``out`` would replace."""
    listed = out.with_name("bad_files.csv")
    if out == listed:
        raise UsageError(f"{out}: so the list of skipped pictures is called; choose another name")
    if listed.exists() and not overwrite:
        raise UsageError(
            f"{listed} exists, and the list of skipped pictures would replace it; move it away, or accept that by "
            "--overwrite (overwrite=True)"
        )


def write_bad_files(out: Path, skipped: list[Skipped]) -> None:
    """A .csv of path and reason, ``bad_files.csv`` beside ``out``."""
    with (
        atomic_write(out.with_name("bad_files.csv")) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file).writerows([Skipped._fields, *map(sheet_cells, skipped)])


def _offsets(paths: list[bytes]) -> np.ndarray:
    """(rows + 1,) int64: name i is bytes offsets[i] to offsets[i + 1]."""
    return np.cumsum([0, *(len(path) for path in paths)], dtype="<i8")


def _names(buffer: bytes, offsets: np.ndarray) -> list[str]:
    places = offsets.tolist()
    ends = [*places[:1], *places[-1:]]
    if offsets.dtype != np.int64 or offsets.ndim != 1 or places != sorted(places) or ends != [0, len(buffer)]:
        raise DataError("the places of its paths are no ascending numbers from 0 to their end")
    return [os.fsdecode(buffer[start:stop]) for start, stop in itertools.pairwise(places)]


def _facts(text: str | bytes) -> Provenance:
    """What a file tells of its table, checked as far as it is used here."""
    facts = json.loads(text) if len(text) <= _LARGEST_FACTS else None
    if not isinstance(facts, dict) or not isinstance(skipped := facts.get("skipped", []), list):
        raise DataError("its provenance is no object, or too long")
    if not all(isinstance(item, list) and [type(part) for part in item] == [str, str] for item in skipped):
        raise DataError("its skipped pictures are no pairs of path and reason")
    shape = facts["shape"]
    whole = isinstance(shape, list) and all(type(side) is int and 0 <= side < 2**63 for side in shape)
    if not whole or not 2 <= len(shape) <= _MOST_DIMENSIONS:
        raise DataError(f"its shape is no list of whole numbers: {shape!r:.60}")
    return facts


def _write_safetensors(path: Path, pieces: Pieces, shape: tuple[int, ...], paths: list[bytes], facts: str) -> None:
    offsets, names = _offsets(paths), b"".join(paths)
    tensors = {  # the 8-byte integers stand first so that all are aligned
        "path_offsets": (torch.int64, offsets.shape),
        "features": (torch.float32, shape),
        "paths": (torch.uint8, (len(names),)),
    }
    with open(path, "wb") as file:
        file.write(header_bytes(tensors, {"format": "pt", _KEY: facts}))
        file.write(offsets.data)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, "<f4").data)
        file.write(names)


def _parts_of_safetensors(path: Path) -> Iterator[Any]:
    yield _facts(read_header(path).metadata[_KEY])
    tensors = read_tensors(path).tensors
    yield _names(tensors["paths"].numpy().tobytes(), tensors["path_offsets"].numpy())
    yield tensors["features"]


def _write_npz(path: Path, pieces: Pieces, shape: tuple[int, ...], paths: list[bytes], facts: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        # `ZipInfo` by name has the fixed date of 1980.
        with archive.open(zipfile.ZipInfo("features.npy"), "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for piece in pieces:
                file.write(np.ascontiguousarray(piece, "<f4").data)
        small = {
            "paths": np.frombuffer(b"".join(paths), np.uint8),
            "path_offsets": _offsets(paths),
            _KEY: np.frombuffer(facts.encode(), np.uint8),
        }
        for name, array in small.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _parts_of_npz(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        members = arrays.zip.infolist()
        if any(one.compress_type for one in members) or sum(one.file_size for one in members) > os.path.getsize(path):
            raise DataError("its arrays are packed, and those of a table never are")
        yield _facts(arrays[_KEY].tobytes())
        yield _names(arrays["paths"].tobytes(), arrays["path_offsets"])
        yield torch.from_numpy(arrays["features"])


def _write_parquet(path: Path, pieces: Pieces, shape: tuple[int, ...], paths: list[bytes], facts: str) -> None:
    import pyarrow
    from pyarrow import parquet

    kind, names = pyarrow.string(), list[Any]()
    try:
        names = [path.decode() for path in paths]
    except UnicodeDecodeError:  # text where it can be, since that is what people look for
        kind, names = pyarrow.binary(), paths
    width = math.prod(shape[1:])
    features = pyarrow.list_(pyarrow.float32(), width)
    schema = pyarrow.schema([("path", kind), ("features", features)], metadata={_KEY: facts})
    remaining = iter(names)
    # By a handle, since pyarrow takes no path that is not text.
    with open(path, "wb") as file, parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for piece in pieces:
            column = pyarrow.array(list(itertools.islice(remaining, len(piece))), kind)
            values = pyarrow.array(piece.reshape(-1), pyarrow.float32())
            rows = pyarrow.FixedSizeListArray.from_arrays(values, width)
            writer.write_table(pyarrow.Table.from_arrays([column, rows], schema=schema), row_group_size=len(piece))


def _parts_of_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with open(path, "rb") as opened, parquet.ParquetFile(opened) as file:
        yield (facts := _facts((file.schema_arrow.metadata or {})[_KEY.encode()]))
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        if {column.compression for column in columns} - {"SNAPPY", "UNCOMPRESSED"}:
            raise DataError("it is packed in a way that tables are not")
        paths, rows, size = list[str](), [np.empty(0, "f4")], 0
        for batch in file.iter_batches(64, columns=["path", "features"]):  # rows that are one row said often
            size += batch.nbytes
            if size > _MOST_LARGER * os.path.getsize(path) + 2**20:
                raise DataError("it holds far more than its bytes")
            names = batch["path"].to_pylist()
            paths += [os.fsdecode(name.encode() if isinstance(name, str) else name) for name in names]
            rows.append(batch["features"].flatten().to_numpy())
    yield paths
    yield torch.from_numpy(np.concatenate(rows).reshape(facts["shape"]))


def _write_csv(path: Path, pieces: Pieces, shape: tuple[int, ...], paths: list[bytes], facts: str) -> None:
    width = math.prod(shape[1:])
    numbers = ",%.9g" * width + "\n"  # nine digits bring a float32 back exactly
    names = (sheet_cells([path.decode("utf-8", "surrogateescape")])[0] for path in paths)
    quoted = (
        '"' + name.replace('"', '""') + '"' if any(mark in name for mark in ',"\r\n#') else name for name in names
    )
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(f"{_COMMENT}{facts}\n")
        file.write("path," + ",".join(f"f{number}" for number in range(width)) + "\n")
        for piece in pieces:
            for row, name in zip(piece.reshape(len(piece), width).tolist(), quoted, strict=False):
                file.write(name + numbers % tuple(row))


def _parts_of_csv(path: Path) -> Iterator[Any]:
    names, numbers = list[str](), array("f")
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        first = file.readline(_LARGEST_FACTS)
        if not first.startswith(_COMMENT + "{"):
            raise DataError("its first line holds no provenance")
        yield (facts := _facts(first.removeprefix(_COMMENT)))
        if not file.readline():
            raise DataError("no line names its columns")
        width = math.prod(facts["shape"][1:])
        for name, *row in csv.reader(file):
            if len(row) != width:
                raise DataError(f"row {len(names) + 1} has {len(row)} numbers of {width}")
            quoted = name.startswith("'") and name.lstrip("'").startswith(FORMULA)
            names.append(os.fsdecode((name[1:] if quoted else name).encode("utf-8", "surrogateescape")))
            numbers.extend(map(float, row))
    yield names
    yield torch.from_numpy(np.array(numbers, np.float32).reshape(facts["shape"]))


class _Kind(NamedTuple):
    write: Callable[[Path, Pieces, tuple[int, ...], list[bytes], str], None]
    parts: Callable[[Path], Iterator[Any]]
    """Provenance, paths and features, one after the other: who asks for the first alone reads no rows."""
    many_dimensions: bool


_KINDS = {
    ".safetensors": _Kind(_write_safetensors, _parts_of_safetensors, True),
    ".npz": _Kind(_write_npz, _parts_of_npz, True),
    ".parquet": _Kind(_write_parquet, _parts_of_parquet, False),
    ".csv": _Kind(_write_csv, _parts_of_csv, False),
}


def _kind(path: Path) -> _Kind:
    if path.suffix not in _KINDS:
        raise UsageError(f"{path}: the ending must be one of {', '.join(_KINDS)}")
    return _KINDS[path.suffix]
