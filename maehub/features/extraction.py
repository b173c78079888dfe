"""A folder of pictures to a table of features."""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn, cast, get_args

import numpy as np
import PIL
import PIL.features
import torch
from torch import Tensor
from tqdm import tqdm

from maehub.data import Pictures, PictureSource, Readers, Samples, as_samples, reader_count
from maehub.errors import DataError, UsageError, log
from maehub.features import table
from maehub.features.inference import Input, batch_size_for, batches_of_one_size, infer
from maehub.features.store import FeatureStore
from maehub.files import check_place, free_space_guard
from maehub.images import Preprocess, TransformName, grid_size
from maehub.models import Encoder, FeaturePool, Precision, autocast, settled_precision
from maehub.version import __version__

_CHUNK_BATCHES = 8  # batches between two commits
_CHUNK_BYTES = 2**25  # of rows in a chunk, unless one batch has more
_GPU_TOKENS = 2**15  # in a batch whose size nobody chose


def extract_features(
    encoder: Encoder,
    source: PictureSource,
    *,
    pool: FeaturePool | None = None,
    layers: Sequence[int] | None = None,
    preprocess: Preprocess | TransformName | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    precision: Precision = "fp32",
    out: str | Path | None = None,
    skip_bad: bool = False,
    exact_decode: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> table.FeatureTable:
    """Features of every picture of a source, unmasked, in the order of the source.

    Args:
        encoder: on the device where it shall compute.
        source: a folder (every picture at any depth, sorted), a file, a list of paths, PIL images or (H, W, C) uint8
            arrays, a (B, H, W, C) uint8 array, a (B, C, H, W) uint8 tensor, or a floating (B, C, H, W) tensor that is
            preprocessed already.
        pool, layers: see `Encoder.features`.
        preprocess: None is the model's own; or the name of another library's.
        batch_size: pictures computed at once; None chooses.
        workers: processes that read files; None takes as many as there are cores and work, 0 reads in this one.
        precision: what matrices are multiplied in; "bf16" is autocast, within a cosine of 0.999 of fp32 and faster on
            GPUs and on CPUs with tile units; "auto" takes it on a GPU that has it. It stands in the provenance.
        out: a file to write, .safetensors, .npz, .parquet or .csv. Memory then does not grow with the source. What
            is finished lies in ``OUT.partial/`` meanwhile, and the same call goes on there after an interruption,
            to the same bytes. A file with the same provenance and source is not computed again.
        skip_bad: leave out pictures that cannot be read, and list them in ``skipped`` and, beside ``out``, in
            ``bad_files.csv``; else the first one stops everything.
        exact_decode: decode JPEGs at full size, not at 1/2, 1/4 or 1/8 where that is still large enough.
        overwrite: replace ``out``, and what lies unfinished beside it.
        progress: show a bar on stderr, if that is a terminal.

    Returns:
        The table. Its features are (rows, …) float32 on the CPU, … as `Encoder.features` gives them.

    Raises:
        UsageError: arguments that do not go together, or ``out`` exists and is another table.
        DataError: no pictures, one that cannot be read, or a reading process died.
        CheckpointError: ``out`` cannot be written.
    """
    job = _checked_job(encoder, pool, layers, preprocess, batch_size, precision)
    target = None if out is None else Path(out)
    if target is not None:
        table.check_ending(target, job.pool)
        if not target.is_file():
            check_place(target)
    pictures = as_samples(source)
    if isinstance(pictures, Pictures) and isinstance(pictures.items[0], Tensor):
        height, width = pictures.items[0].shape[1:]  # of network inputs, whatever the transform would give
        job = replace(job, preprocess=replace(job.preprocess, size=(height, width)))
    processes = reader_count(workers, len(pictures) if isinstance(pictures, Samples) else 0)
    made_with = _provenance(job, exact_decode)
    whole = made_with | {"source": {"images": len(pictures), "sha256": pictures.digest()}}
    if target is not None and target.exists() and not overwrite:
        return _finished(target, whole, skip_bad)
    if target is not None and skip_bad:
        table.check_bad_files(target, overwrite)

    readers = Readers(processes, job.preprocess, exact_decode=exact_decode)
    bar = tqdm(total=len(pictures), unit=" images", disable=None if progress else True, file=sys.stderr)
    with readers, bar:
        work = _Work(job, pictures, readers, bar, skip_bad)
        if target is None:
            return _in_memory(work, whole)
        run = made_with | {"batch_size": job.batch_size, "torch": torch.__version__}
        run |= {"device": encoder.cls_token.device.type}
        with FeatureStore(target, run, job.row_shape, overwrite=overwrite) as store:
            return _on_disk(work, store, whole)


@dataclass(frozen=True)
class _Job:
    """What is computed for every picture."""

    encoder: Encoder
    pool: FeaturePool
    layers: tuple[int, ...] | None
    preprocess: Preprocess
    batch_size: int
    precision: Precision

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one picture's features, as `Encoder.features` gives them after the batch."""
        width, patch = self.encoder.config.width, self.encoder.config.patch_size
        rows, columns = (math.ceil(side / patch) for side in self.preprocess.size)
        shapes = {"tokens": (rows * columns, width), "map": (width, rows, columns), "cls+mean": (2 * width,)}
        shape = shapes.get(self.pool, (width,))
        return shape if self.layers is None else (len(self.layers), *shape)

    @property
    def chunk_size(self) -> int:
        """Pictures between two commits: whole batches, so that a resumed run computes the same ones."""
        batch_bytes = self.batch_size * 4 * math.prod(self.row_shape)
        return self.batch_size * max(1, min(_CHUNK_BATCHES, _CHUNK_BYTES // batch_bytes))

    def features(self, pictures: Tensor) -> Tensor:
        """(B, H, W, C) uint8 pixels, or (B, C, H, W) floats that are preprocessed: (B, …), on the device."""
        device = self.encoder.cls_token.device
        images = pictures.to(device)
        if not pictures.is_floating_point():
            images = self.preprocess.normalise(images)
        images = images.to(self.encoder.cls_token.dtype)
        try:
            with autocast(self.precision, device):
                return self.encoder.features(images, pool=self.pool, layers=self.layers)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                batch = f"a batch of {len(images)} pictures of {images.shape[2]}×{images.shape[3]}"
                fits = f"does not fit into the memory of {device}"
                raise UsageError(f"{batch} {fits}; choose a smaller batch_size") from error
            raise


def _checked_job(
    encoder: Encoder,
    pool: FeaturePool | None,
    layers: Sequence[int] | None,
    preprocess: Preprocess | TransformName | None,
    batch_size: int | None,
    precision: Precision,
) -> _Job:
    """Whatever can be refused before a file is opened."""
    if not isinstance(encoder, Encoder):
        raise UsageError(f"features come from an Encoder, not {type(encoder).__name__}; an autoencoder's is .encoder")
    config = encoder.config
    if isinstance(preprocess, str):
        preprocess = Preprocess.named(preprocess, encoder.preprocess.size, config.channels)
    # The patches are the model's, whatever the transform was made for.
    preprocess = replace(preprocess or encoder.preprocess, patch_size=config.patch_size)
    if preprocess.channels != config.channels:
        raise UsageError(f"the transform gives {preprocess.channels} channels and the model takes {config.channels}")
    if preprocess.resize in ("centre-crop", "squash"):
        grid_size(*preprocess.size, config.patch_size)
    chosen = pool or config.pool
    if chosen not in get_args(FeaturePool):
        raise UsageError(f"pool={pool!r} is not one of {', '.join(get_args(FeaturePool))}")
    if preprocess.resize == "native" and chosen in ("tokens", "map"):
        raise UsageError(f"pool={chosen!r} has another shape for each picture of native size; choose another pool")
    if layers is not None and (not layers or any(not -config.depth <= layer < config.depth for layer in layers)):
        raise UsageError(f"layers={list(layers)} must name blocks from {-config.depth} to {config.depth - 1}")
    if batch_size is None:
        tokens = math.prod(math.ceil(side / config.patch_size) for side in preprocess.size)
        batch_size = batch_size_for(tokens, encoder.cls_token.device, _GPU_TOKENS)
    if batch_size < 1:
        raise UsageError(f"batch_size must be 1 or more, not {batch_size}")
    if precision not in get_args(Precision):
        raise UsageError(f"precision={precision!r} is not one of {', '.join(get_args(Precision))}")
    precise = settled_precision(precision, encoder.cls_token.device)
    return _Job(encoder, chosen, None if layers is None else tuple(layers), preprocess, batch_size, precise)


@dataclass
class _Work:
    """A job, what it is done to, and what helps."""

    job: _Job
    pictures: Samples | Pictures
    readers: Readers
    bar: "tqdm[NoReturn]"
    skip_bad: bool
    store: FeatureStore | None = None

    def chunks(self, first: int) -> Iterator[range]:
        """The indices of the pictures of each chunk, from chunk ``first`` on."""
        size, count = self.job.chunk_size, len(self.pictures)
        return (range(start, min(start + size, count)) for start in range(first * size, count, size))

    def results(self, first: int) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
        """Of every chunk from ``first`` on: (k, …) float32 rows in order, and why pictures are left out."""
        indices = range(first * self.job.chunk_size, len(self.pictures))
        if isinstance(self.pictures, Samples):
            readings: Iterator[Input | DataError] = self.readers.read(map(self.pictures.path, indices))
        else:
            readings = map(self._in_memory, indices)
        for chunk in self.chunks(first):
            skipped: dict[int, str] = {}
            readable = self._readable(zip(chunk, readings, strict=False), skipped)
            batches = batches_of_one_size(readable, self.job.batch_size)
            results = list(infer(batches, self.job.features, self.bar))
            order = np.argsort([index for indices, _ in results for index in indices])
            none = np.empty((0, *self.job.row_shape), np.float32)
            yield np.concatenate([none, *(rows.numpy() for _, rows in results)])[order], skipped

    def _in_memory(self, index: int) -> Input | DataError:
        picture = cast(Pictures, self.pictures).items[index]
        try:
            return picture if isinstance(picture, Tensor) else self.job.preprocess.pixels(picture)
        except DataError as error:
            return DataError(f"picture {index}: {error}")

    def _readable(
        self, readings: Iterator[tuple[int, Input | DataError]], skipped: dict[int, str]
    ) -> Iterator[tuple[int, Input]]:
        """Those that can be read; the others go to ``skipped``, or the first of them stops everything."""
        for index, reading in readings:
            if not isinstance(reading, DataError):
                yield index, reading
                continue
            if not self.skip_bad:
                kept = ""
                if self.store:
                    kept = f"{self.store.rows} of {len(self.pictures)} rows are kept in {self.store.folder}. "
                hint = "Mend or remove it and run again, or leave such pictures out: skip_bad (--skip-bad)"
                raise DataError(f"{reading}. {kept}{hint}") from reading
            skipped[index] = str(reading)
            self.bar.update()


def _in_memory(work: _Work, provenance: table.Provenance) -> table.FeatureTable:
    rows = np.empty((len(work.pictures), *work.job.row_shape), np.float32)
    count, skipped = 0, dict[int, str]()
    for chunk, left_out in work.results(0):
        rows[count : count + len(chunk)] = chunk
        count += len(chunk)
        skipped |= left_out
    paths, bad = _split(work, skipped)
    return table.FeatureTable(paths, torch.from_numpy(rows[:count]), provenance, bad)


def _on_disk(work: _Work, store: FeatureStore, provenance: table.Provenance) -> table.FeatureTable:
    work.store = store
    chunks = ((chunk, work.pictures.digest(chunk.start, chunk.stop)) for chunk in work.chunks(0))
    first = store.resume(chunks, work.skip_bad)
    if first:
        log.info("%s: %d pictures are there already", store.folder, store.rows)
    work.bar.initial = work.bar.n = store.rows + len(store.skipped)
    missing = 2 * len(work.pictures) - store.rows  # each row once more in the file that is made of them
    free_space_guard(store.out, missing * 4 * math.prod(store.row_shape))
    for chunk, (rows, left_out) in zip(work.chunks(first), work.results(first), strict=True):
        store.append(work.pictures.digest(chunk.start, chunk.stop), rows, left_out)
    paths, skipped = _split(work, store.skipped)
    facts = provenance | {"skipped": [list(item) for item in skipped]}
    shape = (store.rows, *store.row_shape)
    table.write_features(store.out, store.pieces(), shape, [os.fsencode(path) for path in paths], facts)
    if skipped:
        table.write_bad_files(store.out, skipped)
    shutil.rmtree(store.folder)  # the rows are elsewhere now
    return table.FeatureTable.load(store.out)


def _split(work: _Work, skipped: dict[int, str]) -> tuple[list[str], list[table.Skipped]]:
    """Paths with a row, and those without."""
    paths = [os.fsdecode(work.pictures.path(index)) for index in range(len(work.pictures))]
    good = [path for index, path in enumerate(paths) if index not in skipped]
    if not good:
        raise DataError(f"none of {len(paths)} pictures can be read; the first: {min(skipped.items())[1]}")
    return good, [table.Skipped(paths[index], reason) for index, reason in sorted(skipped.items())]


def _finished(target: Path, provenance: table.Provenance, skip_bad: bool) -> table.FeatureTable:
    """The table that is there, if it is the one that is asked for."""
    known, hint = table.read_provenance(target), "name another file, or overwrite (--overwrite)"
    if known is None:
        raise UsageError(f"{target} exists and is no table of features; {hint}")
    skipped = known.pop("skipped", [])
    known.pop("shape", None)
    asked = json.loads(json.dumps(provenance))
    differing = [key for key in sorted(asked.keys() | known.keys()) if asked.get(key) != known.get(key)]
    if differing:
        raise UsageError(f"{target} exists and was made with another {', '.join(differing)}; {hint}")
    if skipped and not skip_bad:
        raise UsageError(f"{target} exists and leaves out {len(skipped)} pictures; skip_bad (--skip-bad) accepts it")
    log.info("%s is done: same model, transform and pictures", target)
    return table.FeatureTable.load(target)


def _provenance(job: _Job, exact_decode: bool) -> table.Provenance:
    """What the rows follow from, all but the pictures."""
    origin, hasher = job.encoder.origin, hashlib.sha256()
    # Tells weights apart, those that never were a file too. Integer sums are exact on every device.
    whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in job.encoder.state_dict().items():
        bits = tensor.detach().contiguous().view(whole_numbers[tensor.element_size()])
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}\n".encode())
    libraries = {"pillow": PIL.__version__, "libjpeg_turbo": PIL.features.version("libjpeg_turbo")}
    return {
        "maehub": __version__,
        "model": asdict(origin) if origin else None,
        "network": {name: value for name, value in asdict(job.encoder.config).items() if name != "numeric"},
        "weights": hasher.hexdigest()[:16],
        "pool": job.pool,
        "layers": None if job.layers is None else list(job.layers),
        "transform": job.preprocess.to_dict(),
        "decode": {"jpeg": "exact" if exact_decode else "scaled", **libraries},
        **({} if job.precision == "fp32" else {"precision": job.precision}),
    }
