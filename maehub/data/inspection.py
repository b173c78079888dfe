"""A look at a data set before anything is trained on it: what cannot be read, and what its pictures are like."""

import csv
import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from maehub.data.objects.finding import annotation_files
from maehub.data.sources import Source, find_samples
from maehub.data.workers import Examiners, Finding, reader_count
from maehub.errors import DataError, UsageError, visible
from maehub.files import atomic_write, sheet_cells
from maehub.images import ImagePath

SAMPLE = 2000
"""Pictures that `data_statistics` looks at unless told otherwise."""


class BadPicture(NamedTuple):
    """A picture that cannot be read."""

    where: str  # path; shard and member; file and row
    reason: str


@dataclass(frozen=True)
class DataCheck:
    """What `check_data` found."""

    images: int
    """Pictures, those that cannot be read included."""
    formats: dict[str, int]
    """How many of each format can be read: JPEG, PNG, …"""
    bad: tuple[BadPicture, ...]
    warnings: dict[str, int] = field(default_factory=dict)
    """How many pictures have which harmless oddity, such as bytes after their end."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """How many files of each ending were found beside them and left out."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {
            "images": self.images,
            "readable": self.images - len(self.bad),
            "formats": self.formats,
            "bad": [picture._asdict() for picture in self.bad],
            "warnings": sum(self.warnings.values()),
            "warning_kinds": self.warnings,
            "passed_over": self.passed_over,
        }

    def describe(self) -> str:
        """The result in a line or two."""
        kinds, pictures = _counts(self.formats), _several(self.images, "picture")
        odd = "".join(f"\n{count:,} with {oddity}, which does no harm" for oddity, count in self.warnings.items())
        if not self.bad:
            return f"{pictures}, all readable: {kinds}{odd}"
        readable = f"{self.images - len(self.bad):,} readable" + (f" ({kinds})" if kinds else "")
        return f"{pictures}: {readable}, {len(self.bad):,} not{odd}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pictures that cannot be read to a CSV file with the columns path and reason.

        Raises:
            CheckpointError: it cannot be written; what was there is unchanged.
        """
        with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "reason"), *map(sheet_cells, self.bad)])


class Spread(NamedTuple):
    """Of one number over the pictures."""

    least: float
    median: float
    greatest: float


@dataclass(frozen=True)
class DataStatistics:
    """What `data_statistics` found. All but ``images`` and ``bytes`` is about the pictures that were looked at."""

    images: int
    looked_at: int
    """Pictures that were decoded."""
    unreadable: int
    """Pictures that were chosen and cannot be read; `check_data` lists them."""
    formats: dict[str, int]
    modes: dict[str, int]
    """How many of each mode of Pillow, with the bits of a channel: ``"RGB (8 bits)"``."""
    bytes: Spread
    """Of the picture files."""
    width: Spread
    """Pixels, upright."""
    height: Spread
    megapixels: Spread
    value_range: tuple[float, float]
    """Least and greatest value in the files."""
    mean: tuple[float, ...]
    """Of each channel in [0, 1], over the pixels of a picture, then over pictures: a large one counts like a small one.
    One channel if all are grey, else three."""
    std: tuple[float, ...]
    """Standard deviation likewise."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        plain = {
            name: value._asdict() if isinstance(value, Spread) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return plain | {"python": self.python()}

    def python(self) -> str:
        """A line of Python that makes a transform with these statistics."""
        comma = "," * (len(self.mean) == 1)
        mean, std = (", ".join(f"{number:.4f}" for number in numbers) + comma for numbers in (self.mean, self.std))
        return f"maehub.Preprocess(mean=({mean}), std=({std}))"

    def describe(self) -> str:
        """A table."""
        whole = self.looked_at + self.unreadable == self.images
        looked = "all of them" if whole else f"{self.looked_at + self.unreadable:,} of them, chosen by their names"
        rows = [("pictures", f"{self.images:,}"), ("looked at", looked)]
        if self.unreadable:
            rows.append(("unreadable", f"{self.unreadable:,}; `maehub data check DATA` lists them"))
        low, high = self.value_range
        # Pictures of 16 bits are scaled by all that 16 bits can hold, so those of a 12-bit camera come out dark.
        dark = 255 < high <= 65535 // 2
        hint = "; 16 bits can hold 65535, and are scaled by that: these pictures will be dark" if dark else ""
        rows += [("formats", _counts(self.formats)), ("modes", _counts(self.modes))]
        rows += [("values", f"{low:g} to {high:g}{hint}")]
        lines = [f"{name:<12}{text}" for name, text in rows]
        lines += ["", f"{'':<12}{'least':>10}{'median':>10}{'greatest':>10}"]
        spreads = [("width", self.width, "{:,.0f}"), ("height", self.height, "{:,.0f}")]
        spreads += [("megapixels", self.megapixels, "{:,.2f}")]
        spreads += [("kilobytes", Spread(*(number / 1000 for number in self.bytes)), "{:,.0f}")]
        lines += [f"{name:<12}" + "".join(f"{form.format(x):>10}" for x in spread) for name, spread, form in spreads]
        channels = ("grey",) if len(self.mean) == 1 else ("red", "green", "blue")
        lines += ["", f"{'':<12}" + "".join(f"{channel:>10}" for channel in channels)]
        for name, numbers in (("mean", self.mean), ("deviation", self.std)):
            lines.append(f"{name:<12}" + "".join(f"{x:>10.4f}" for x in numbers))
        return "\n".join([*lines, "", self.python()])


def tell(picture: BadPicture) -> None:
    """Print a picture that cannot be read, above a progress bar."""
    tqdm.write(visible(f"{picture.where}: {picture.reason}"))


def check_data(
    folder: ImagePath,
    *,
    workers: int | None = None,
    progress: bool = False,
    on_bad: Callable[[BadPicture], None] | None = None,
) -> DataCheck:
    """Decode every picture in full and say which cannot be read.

    Args:
        folder: what `maehub.data.sources.find_samples` takes: a folder, a list, tar shards, Parquet, a saved dataset.
        workers: processes that decode; None is as many as there are cores, 0 decodes in this one.
        progress: show a progress bar on stderr.
        on_bad: called with each picture that cannot be read, as soon as it is known, in order.

    Raises:
        DataError: there are no pictures, or a process hangs.
    """
    text = os.fsdecode(folder)
    samples = find_samples(text, read=annotation_files(text))
    formats, warnings = Counter[str](), Counter[str]()
    bad: list[BadPicture] = []
    for index, finding in _findings(samples, range(len(samples)), workers, progress, statistics=False):
        if not finding.reason:
            formats[finding.format] += 1
            warnings.update(finding.warnings)
            continue
        bad.append(BadPicture(samples.where(index), finding.reason))
        if on_bad is not None:
            on_bad(bad[-1])
    counts = dict(formats.most_common())
    return DataCheck(len(samples), counts, tuple(bad), dict(warnings.most_common()), samples.passed_over)


def data_statistics(
    folder: ImagePath, *, sample: int = SAMPLE, workers: int | None = None, progress: bool = False
) -> DataStatistics:
    """Sizes, formats, values and per-channel statistics of pictures.

    Args:
        folder: as in `check_data`.
        sample: how many pictures to look at, chosen by a hash of their names, so always the same ones; 0 is all.
        workers: as in `check_data`.
        progress: show a progress bar on stderr.

    Raises:
        DataError: there are no pictures, or none of those that were chosen can be read.
        UsageError: a negative number.
    """
    if sample < 0:
        raise UsageError(f"sample must be 0 or more, not {sample}; 0 looks at all pictures")
    samples = find_samples(os.fsdecode(folder))
    chosen: Sequence[int] = range(len(samples))
    if 0 < sample < len(samples):
        chosen = sorted(heapq.nsmallest(sample, chosen, key=samples.sample_id))
    examined = list(_findings(samples, chosen, workers, progress, statistics=True))
    good = [(samples.size(index), finding) for index, finding in examined if not finding.reason]
    if not good:
        index, finding = examined[0]
        pictures = _several(len(examined), "picture")
        raise DataError(f"none of {pictures} can be read; {samples.where(index)}: {finding.reason}")
    findings = [finding for _, finding in good]
    # Grey pictures among coloured ones count as red, green and blue.
    channels = max(len(finding.mean) for finding in findings)
    moments = [[np.resize(numbers, channels) for numbers in (finding.mean, finding.square)] for finding in findings]
    mean, square = np.mean(moments, axis=0)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return DataStatistics(
        images=len(samples),
        looked_at=len(good),
        unreadable=len(examined) - len(good),
        formats=dict(Counter(finding.format for finding in findings).most_common()),
        modes=dict(Counter(f"{finding.mode} ({_several(finding.bits, 'bit')})" for finding in findings).most_common()),
        bytes=_spread(size for size, _ in good),
        width=_spread(finding.width for finding in findings),
        height=_spread(finding.height for finding in findings),
        megapixels=_spread(finding.width * finding.height / 1e6 for finding in findings),
        value_range=(min(finding.low for finding in findings), max(finding.high for finding in findings)),
        mean=tuple(mean.tolist()),
        std=tuple(deviation.tolist()),
    )


def _findings(
    samples: Source, chosen: Sequence[int], workers: int | None, progress: bool, *, statistics: bool
) -> Iterator[tuple[int, Finding]]:
    """Index and finding of each chosen sample, in order."""
    pictures = (partial(samples.source, index) for index in chosen)
    # A process of their own even for a few: a decoder may crash.
    count = max(1, reader_count(None, len(chosen))) if workers is None else reader_count(workers, len(chosen))
    with (
        Examiners(count, statistics=statistics) as examiners,
        tqdm(total=len(chosen), unit=" images", disable=None if progress else True, leave=False) as bar,
    ):
        for index, finding in zip(chosen, examiners.findings(pictures), strict=True):
            bar.update()
            yield index, finding


def _spread(numbers: Iterable[float]) -> Spread:
    values = np.fromiter(numbers, np.float64)
    return Spread(float(values.min()), float(np.median(values)), float(values.max()))


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
