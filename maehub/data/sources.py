"""Folders, lists, shards and tables to samples: which pictures there are, in which order, under which names."""

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from maehub.data.listing import IMAGE_ENDINGS, Names, passed_over_words, say_passed_over, search
from maehub.data.storage import reading
from maehub.errors import DataError, UsageError
from maehub.images import ImagePath, printable
from maehub.rng import sample_id

Picture = Image.Image | np.ndarray | Tensor


class Source(Protocol):
    """Pictures that are read one by one, at random, by any process: a sample is its place in a fixed order."""

    passed_over: dict[str, int]
    """How many files of each ending were found beside them and left out; see `maehub.data.listing.say_passed_over`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> bytes:
        """A name that stays when the data are moved: the path below the folder, shard and member, or file and row."""

    def size(self, index: int) -> int:
        """Bytes of the picture file; −1 if it is not there."""

    def where(self, index: int) -> str:
        """Path, shard and member, or file and row: for messages."""

    def source(self, index: int) -> ImagePath | BinaryIO:
        """What `maehub.images.decoding.open_image` takes."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Says which samples `source` will be asked for next; those far away are fetched at once."""
        return

    def sample_id(self, index: int) -> int:
        """A 63-bit id that follows from the name: the same wherever the data lie."""
        return sample_id(self.name(index))

    def digest(self, first: int = 0, last: int | None = None) -> str:
        """sha256 of names and sizes of samples ``first`` to before ``last``: tells another list from this one."""
        hasher = hashlib.sha256()
        for index in range(first, len(self) if last is None else last):
            name = self.name(index)
            hasher.update(struct.pack("<qq", len(name), self.size(index)) + name)
        return hasher.hexdigest()


@dataclass(frozen=True)
class Samples(Source):
    """Picture files in a fixed order."""

    root: bytes
    """What stands before every name; empty where the names are paths themselves."""
    names: Names
    passed_over: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> bytes:
        return self.names[index]

    def path(self, index: int) -> bytes:
        return os.path.join(self.root, self.names[index])

    def paths(self) -> Iterator[bytes]:
        return (self.path(index) for index in range(len(self)))

    def size(self, index: int) -> int:
        try:
            return os.stat(self.path(index)).st_size
        except OSError:
            return -1

    def where(self, index: int) -> str:
        return printable(self.path(index))

    def source(self, index: int) -> bytes:
        return self.path(index)


@dataclass(frozen=True)
class Subset(Source):
    """Some samples of a source, under the names and ids that they have there."""

    whole: Source
    indices: np.ndarray = field(repr=False)
    """(samples,) int64. Places in ``whole``."""
    passed_over: dict[str, int] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> bytes:
        return self.whole.name(int(self.indices[index]))

    def size(self, index: int) -> int:
        return self.whole.size(int(self.indices[index]))

    def where(self, index: int) -> str:
        return self.whole.where(int(self.indices[index]))

    def prefetch(self, indices: Sequence[int]) -> None:
        self.whole.prefetch([int(self.indices[index]) for index in indices])

    def source(self, index: int) -> ImagePath | BinaryIO:
        return self.whole.source(int(self.indices[index]))


def select(samples: Source, indices: np.ndarray) -> Source:
    """Some samples, in the order of ``indices``: (n,) integers. Costs 8 bytes a sample."""
    chosen = np.asarray(indices, np.int64)
    if not len(chosen):
        raise DataError("no sample is selected")
    if chosen.min() < 0 or chosen.max() >= len(samples):
        raise UsageError(f"there are {len(samples)} samples, none has the number {chosen.min()} or {chosen.max()}")
    if isinstance(samples, Subset):
        return replace(samples, indices=samples.indices[chosen])
    return Subset(samples, chosen, samples.passed_over)


def groups(samples: Source, level: int) -> np.ndarray:
    """Which samples belong together, by the folders in their names: (samples,) int64, numbers as they first appear.

    ``level`` is 1 for the first folder of the name, 2 for the first two together. A shard counts as a folder.
    """
    if level < 1:
        raise UsageError(f"the level of a group must be 1 or more, not {level}")
    numbers: dict[bytes, int] = {}
    result = np.empty(len(samples), np.int64)
    for index in range(len(samples)):
        parts = samples.name(index).lstrip(b"/").split(b"/", level)
        if len(parts) <= level:
            has = f"{printable(samples.name(index))} has {len(parts) - 1}"
            raise UsageError(f"groups of level {level} are the first {level} folders of a name, and {has}")
        result[index] = numbers.setdefault(b"/".join(parts[:level]), len(numbers))
    return result


def find_images(source: ImagePath | Iterable[ImagePath]) -> Samples:
    """The pictures of a folder, at any depth; or one file; or a list of files, in its order.

    A folder is sorted by the bytes of the paths below it. Hidden files and folders are left out; symbolic links are
    followed, except to a folder that is being searched. Files are chosen by their ending, see `IMAGE_ENDINGS`.
    """
    if not isinstance(source, str | bytes | Path):
        names = Names.of(map(os.fsencode, source))
        if not len(names):
            raise DataError("the list of pictures is empty")
        return Samples(b"", names)
    path = os.fsencode(source)
    if os.path.isfile(path):
        return Samples(b"", Names.of([path]))
    if not os.path.isdir(path):
        raise DataError(f"{printable(path)} is neither a file nor a folder; look for a mistyped name")
    others: Counter[bytes] = Counter()
    names = Names.of(search(path, IMAGE_ENDINGS, others))
    if not len(names):
        raise _nothing(path, others)
    return Samples(path, names, say_passed_over(printable(path), others))


def find_samples(
    data: str | Path, *, index_dir: Path | None = None, column: str | None = None, read: Counter[bytes] | None = None
) -> Source:
    """The pictures of a folder, a list, tar shards, Parquet files or a saved dataset: what ``data`` is decides.

    A folder is searched for pictures as `find_images` does; without any, for .tar files, then for .parquet files. A
    folder that the datasets library saved is read as such. A .txt file is a list, a .json file one of COCO. What ends
    with .tar or .parquet may have braces and wildcards: ``"shards/{000..099}.tar"``; shards may lie behind an address:
    ``"s3://bucket/shards-{000..003}.tar"``. What was found in the headers of shards, and copies of Parquet files as
    Arrow tables, are kept in ``index_dir``. The ``column`` of a table is the one with the pictures; None finds it.
    ``read`` counts files in a folder, by ending, that the caller reads itself, so that they are not passed over.
    """
    from maehub.data.objects.finding import listed_pictures  # which knows `Source`, as these do
    from maehub.data.shards import find_shards, shard_paths
    from maehub.data.tables import find_parquet, find_saved

    text = os.fsdecode(data)
    if os.path.isdir(text):
        if any(os.path.isfile(os.path.join(text, name)) for name in ("state.json", "dataset_dict.json")):
            return find_saved(text, column)
        path, others = os.fsencode(text), Counter[bytes]()
        names = Names.of(search(path, IMAGE_ENDINGS, others))
        if len(names):
            return Samples(path, names, say_passed_over(printable(path), others - (read or Counter())))
        if others[b".tar"]:
            return find_shards(_below(path, b".tar"), index_dir)
        if others[b".parquet"]:
            return find_parquet(_below(path, b".parquet"), index_dir, column)
        raise _nothing(path, others)
    if text.endswith(".tar"):
        return find_shards(text, index_dir)
    if "://" in text:
        raise UsageError(f"{printable(text)}: behind an address there can be tar shards, and their names end with .tar")
    if text.lower().endswith(".json") and os.path.isfile(text):
        return listed_pictures(text)
    if text.endswith(".parquet"):
        return find_parquet(shard_paths(text), index_dir, column)
    if text.lower().endswith(".txt") and os.path.isfile(text):
        return read_list(text)
    if text.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise DataError(f"{printable(text)} is compressed, and shards are read at random: unpack it to a plain .tar")
    return find_images(text)


def _below(folder: bytes, ending: bytes) -> list[str]:
    return [os.fsdecode(os.path.join(folder, name)) for name in search(folder, frozenset([ending]), Counter())]


def read_list(path: str) -> Samples:
    """The files that a list names, one a line: absolute, or relative to the folder of the list.

    Empty lines and those that begin with # are passed over. Names are as they stand in the list. A file that stands
    there twice counts twice, and is looked at in the same way both times.
    """
    root = os.path.dirname(os.fsencode(path))

    def lines() -> Iterator[bytes]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                name = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n")
                if not name.strip() or name.startswith(b"#"):
                    continue
                if not os.path.isfile(os.path.join(root, name)):
                    raise DataError(f"{printable(path)}, line {number}: there is no file {printable(name)}")
                yield name

    with reading(path):
        names = Names.of(lines())
    if not len(names):
        raise DataError(f"0 images in {printable(path)}: it names no file")
    return Samples(root, names)


def _nothing(folder: bytes, others: Counter[bytes]) -> DataError:
    counts = passed_over_words(Counter(dict(others.most_common(5)))) or "nothing"
    endings = " ".join(sorted(ending.decode() for ending in IMAGE_ENDINGS))
    return DataError(f"0 images in {printable(folder)}; found {counts}. Endings that count: {endings}")


@dataclass(frozen=True)
class Pictures:
    """Pictures that are in memory already; they are called by their place."""

    items: Sequence[Picture]

    def __len__(self) -> int:
        return len(self.items)

    def path(self, index: int) -> bytes:
        return str(index).encode()

    def digest(self, first: int = 0, last: int | None = None) -> str:
        """sha256 of sizes and pixels, as in `Samples.digest`."""
        hasher = hashlib.sha256()
        for item in self.items[first : len(self) if last is None else last]:
            array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
            hasher.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()


PictureSource = ImagePath | Image.Image | np.ndarray | Tensor | Sequence[ImagePath] | Sequence[Image.Image | np.ndarray]
"""A folder, a file, a list of paths; a picture or a list of them; a (B, H, W, C) uint8 array; a (B, C, H, W) tensor."""


def as_samples(source: PictureSource) -> Samples | Pictures:
    """What `find_images` finds, or the pictures themselves."""
    if isinstance(source, ImagePath):
        return find_images(source)
    if isinstance(source, Image.Image):
        return Pictures([source])
    if isinstance(source, Tensor | np.ndarray):
        if source.ndim != 4:
            raise UsageError(f"an array or tensor of pictures has 4 dimensions, not the shape {tuple(source.shape)}")
        items: list[Picture] = list(source)
        if isinstance(source, Tensor) and not source.is_floating_point():
            items = [np.ascontiguousarray(item.permute(1, 2, 0).cpu().numpy()) for item in source]
        if not items:
            raise DataError("there are no pictures: the first dimension is 0")
        return Pictures(items)
    paths = [item for item in source if isinstance(item, ImagePath)]
    pictures: list[Picture] = [item for item in source if isinstance(item, Image.Image | np.ndarray)]
    if len(paths) == len(source):
        return find_images(paths)
    if len(pictures) == len(source):
        return Pictures(pictures)
    kinds = ", ".join(sorted({type(item).__name__ for item in source}))
    raise UsageError(f"a list of pictures holds paths, or PIL images and (H, W, C) arrays, not {kinds}")
