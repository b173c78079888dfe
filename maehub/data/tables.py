"""Hugging Face datasets and Parquet files as samples.

Both are read as Arrow tables that lie memory-mapped on the disk, where any row is as near as any other. A saved
dataset is one; Parquet files, whose rows are packed in groups, are copied to one, once.
"""

import hashlib
import importlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maehub.data.listing import below_common
from maehub.data.sources import Source
from maehub.data.storage import StoredFile, reading, stored_file
from maehub.errors import DataError, MissingDependencyError, UsageError, log
from maehub.files import atomic_write, write_error
from maehub.images import printable

_BATCH = 1000
_VERSION = 1  # of the copies
_ROWS = 4  # decoded at once: a few bytes of a file may stand for the same large value in all of its rows
_GROUP = 2**24  # bytes of rows that are written at once
_MOST_DECODED, _TIMES = 2**29, 64  # bytes of a file's rows: so many in any case, or so many times the file
_MOST_ROWS = 1_000_000  # of a file in any case; one more for each byte


@dataclass(frozen=True)
class Table(Source):
    """Pictures in a column of a table, in the order of its rows."""

    rows: Any = field(repr=False)
    """datasets.Dataset with the one column, which is not decoded."""
    others: Any = field(repr=False)
    """datasets.Dataset with the other columns, none of them decoded."""
    column: str
    parts: tuple[bytes, ...] = field(repr=False)
    """The paths of the files, each as messages have it; of a saved dataset the folder alone."""
    prefixes: tuple[bytes, ...] = field(repr=False)
    """What stands before the row number in a name: the file's path below their common folder, or nothing."""
    starts: np.ndarray = field(repr=False)
    """(files + 1,) int64. The first sample of each file, and their number."""
    sizes: np.ndarray = field(repr=False)
    """(rows,) int64, bytes; −1 where a row holds none."""
    passed_over: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> bytes:
        """The file below the common folder, then the row in it: ``b"data.parquet/17"``; of a saved dataset the row."""
        part, row = self._place(index)
        return self.prefixes[part] + b"%d" % row

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def where(self, index: int) -> str:
        part, row = self._place(index)
        return f"{printable(self.parts[part])}, row {row}"

    def source(self, index: int) -> io.BytesIO:
        cell = self.rows[index][self.column]
        cell = cell if isinstance(cell, dict) else {"bytes": cell}
        if (data := cell.get("bytes")) is None:
            why = f"only the path {cell['path']!r} of a file" if cell.get("path") else "nothing"
            raise DataError(f"{self.where(index)}: its column {self.column!r} holds {why}, no picture")
        return io.BytesIO(data)

    def values(self, column: str) -> list[Any]:
        """What another column holds in each row, as Python objects; None where a row holds nothing."""
        if column not in self.others.column_names:
            have = ", ".join(self.others.column_names) or "none"
            raise UsageError(f"{printable(self.parts[0])} has no column {column!r} beside the pictures; it has: {have}")
        batches = self.others.select_columns([column]).with_format("arrow").iter(_BATCH)
        return [value for batch in batches for value in batch.column(column).to_pylist()]

    def _place(self, index: int) -> tuple[int, int]:
        """(file, row in it)."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])


def find_parquet(paths: Sequence[str], index_dir: Path | None = None, column: str | None = None) -> Table:
    """The pictures of Parquet files, in the order given; in which column, see `image_column`.

    The first time they are copied to an Arrow file as large as the pictures, below ``index_dir``, or in the cache of
    the datasets library if that is None.

    Raises:
        DataError: one of them cannot be read, or its rows are far more bytes than it has.
        CheckpointError: the copy does not fit on the disk.
    """
    datasets = _datasets()
    parquet = importlib.import_module("pyarrow.parquet")
    files, counts = [stored_file(path) for path in paths], []
    for file in files:
        with reading(file.path), open(file.path, "rb") as opened:
            facts = parquet.read_metadata(opened)
        declared = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
        _check_size(file, declared)
        _check_size(file, 0, facts.num_rows)
        counts.append(facts.num_rows)
    identity = hashlib.sha256(repr((_VERSION, files)).encode())
    folder = index_dir or Path(datasets.config.HF_DATASETS_CACHE) / "maehub"
    target = folder / f"{identity.hexdigest()[:32]}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(target, error) from error
    with reading(paths[0], "and its like cannot be read as one table"):
        with importlib.import_module("filelock").FileLock(f"{target}.lock"):  # of several processes, one copies
            if not target.exists():
                log.info("Copying %d Parquet files to an Arrow file", len(paths))
                _copy(files, target)
        rows = datasets.Dataset.from_file(str(target))
    prefixes = [name + b"/" for name in below_common(paths)]
    return _table(rows, [os.fsencode(path) for path in paths], prefixes, counts, column)


def find_saved(folder: str, column: str | None = None) -> Table:
    """The pictures of a dataset that the datasets library saved with ``save_to_disk``; see `find_parquet`."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        raise UsageError(f"{printable(folder)} holds several splits; name one: {', '.join(splits)}")
    datasets = _datasets()
    with reading(folder, "cannot be read as a saved dataset"):
        rows = datasets.load_from_disk(folder)
    return _table(rows, [os.fsencode(folder)], [b""], [len(rows)], column)


def _copy(files: Sequence[StoredFile], target: Path) -> None:
    """Parquet files to an Arrow file, a few rows at a time."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    cast = importlib.import_module("datasets.table").table_cast
    schema = _datasets().Features.from_arrow_schema(parquet.read_schema(files[0].path)).arrow_schema
    with atomic_write(target) as temporary, arrow.ipc.new_stream(str(temporary), schema) as writer:
        for file in files:
            waiting, decoded, written = list[Any](), 0, 0
            for batch in parquet.ParquetFile(file.path).iter_batches(_ROWS):
                waiting.append(batch)
                decoded += batch.nbytes
                _check_size(file, decoded)
                if decoded - written > _GROUP:
                    writer.write_table(cast(arrow.Table.from_batches(waiting), schema).combine_chunks())
                    waiting, written = [], decoded
            if waiting:
                writer.write_table(cast(arrow.Table.from_batches(waiting), schema).combine_chunks())


def _check_size(file: StoredFile, decoded: int, rows: int = 0) -> None:
    if decoded > _MOST_DECODED + _TIMES * file.size or rows > _MOST_ROWS + file.size:
        has = f"{rows:,} rows" if rows else f"{decoded / 2**20:,.0f} MiB or more"
        why = f"its {file.size:,} bytes stand for {has}"
        raise DataError(f"{printable(file.path)} is refused: {why}. Write it without compression and dictionary")


def image_column(features: Any, column: str | None, where: str) -> str:
    """The column that holds pictures, of the datasets library's names with their kinds.

    ``column``, if it is given; else the one whose feature is an image; else the one of bytes with a path; else the one
    of bytes.
    """
    if column is not None and column not in features:
        raise UsageError(f"{where} has no column {column!r}; its columns: {', '.join(features)}")
    if column is not None:
        return column
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    with_path = [name for name, kind in features.items() if isinstance(kind, dict) and set(kind) == {"bytes", "path"}]
    plain = [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("binary", "large_binary")]
    best = images or with_path or plain
    if not best:
        raise DataError(f"{where} has no column of pictures; its columns: {', '.join(features)}")
    if len(best) > 1:
        names = ", ".join(best)
        raise UsageError(f"{where} has several columns of pictures: {names}. Keep one of them: `select_columns`")
    return best[0]


def _table(rows: Any, parts: list[bytes], prefixes: list[bytes], counts: list[int], column: str | None) -> Table:
    where = printable(parts[0])
    name = image_column(rows.features, column, where)
    others = rows.remove_columns([name])
    rows = rows.select_columns([name]).with_format(None)
    if type(rows.features[name]).__name__ == "Image":
        rows = rows.cast_column(name, _datasets().Image(decode=False))
    if not len(rows):
        raise DataError(f"0 images in {where}: the table has no rows")
    compute, types = importlib.import_module("pyarrow.compute"), importlib.import_module("pyarrow.types")
    sizes = []  # of the offsets in the table alone: no picture is read
    for batch in rows.with_format("arrow").iter(_BATCH):
        cells = batch.column(name)
        if types.is_struct(cells.type):
            cells = compute.struct_field(cells, "bytes")
        sizes.append(compute.fill_null(compute.binary_length(cells), -1).to_numpy().astype(np.int64))
    starts = np.cumsum([0, *counts], dtype=np.int64)
    return Table(rows, others, name, tuple(parts), tuple(prefixes), starts, np.concatenate(sizes))


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            f"Parquet files and saved datasets need the datasets library: pip install 'maehub[data]' ({error})"
        ) from error
