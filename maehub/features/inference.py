"""What a network gives for every picture: one pass, whole pictures, nothing random."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maehub.data import Source, Whole, batches_of, worker_count
from maehub.images import Preprocess, grid_size, read_pixels

Input = np.ndarray | Tensor
"""(H, W, C) uint8 pixels, or (C, H, W) floats that are preprocessed."""
Batch = tuple[Sequence[int], Tensor]
"""Indices of pictures, and (B, …) of their inputs."""

_CPU_TOKENS, _GPU_TOKENS = 2**13, 2**16  # in a batch whose size nobody chose
_WAITING_BYTES = 2**28  # of pixels that wait for others of their size
_HELD_BYTES = 2**25  # of results that stay on the device
_PIXELS_PER_WORKER = 2**21  # fewer than these are read sooner here than in processes that must be started


def batch_size_for(tokens: int, device: torch.device, gpu_tokens: int) -> int:
    """How many pictures of so many tokens are computed at once where nobody said: a power of 2."""
    budget = _CPU_TOKENS if device.type == "cpu" else gpu_tokens
    return 2 ** int(math.log2(max(1, budget // tokens)))


def batches_of_one_size(pictures: Iterable[tuple[int, Input]], batch_size: int) -> Iterator[Batch]:
    """Pictures of one size make a batch as soon as there are enough of them, or too many wait for others."""
    waiting: defaultdict[tuple[int, ...], list[tuple[int, Input]]] = defaultdict(list)
    waiting_bytes = 0
    for index, pixels in pictures:
        shape = tuple(pixels.shape)
        waiting[shape].append((index, pixels))
        waiting_bytes += pixels.nbytes
        if len(waiting[shape]) == batch_size:
            waiting_bytes -= batch_size * pixels.nbytes
            yield _stacked(waiting.pop(shape))
        elif waiting_bytes > _WAITING_BYTES:
            waiting_bytes = 0
            yield from (_stacked(waiting.pop(shape)) for shape in list(waiting))
    yield from map(_stacked, waiting.values())


def _stacked(pictures: list[tuple[int, Input]]) -> Batch:
    indices, inputs = zip(*pictures, strict=True)
    return indices, _joined(list(inputs))


def _joined(inputs: list[Any]) -> Tensor:
    """One tensor of each `Input`."""
    if isinstance(inputs[0], Tensor):
        return torch.stack(inputs)
    # By numpy: the many threads of torch would only wait for the cores that decode.
    return torch.from_numpy(np.stack(inputs))


def infer(
    batches: Iterable[Batch], compute: Callable[[Tensor], Tensor], bar: "tqdm[NoReturn]"
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Indices of each batch, and what ``compute`` gives for it: (B, …) float32 on the CPU."""
    waiting: list[tuple[Sequence[int], Tensor]] = []
    held = 0
    for indices, pixels in batches:
        with torch.inference_mode():
            rows = compute(pixels).float()
        waiting.append((indices, rows))
        held += rows.nbytes
        bar.update(len(indices))
        if held > _HELD_BYTES:  # not each by itself: until then a GPU is never waited for
            yield from ((some, rows.cpu()) for some, rows in waiting)
            waiting, held = [], 0
    yield from ((some, rows.cpu()) for some, rows in waiting)


def outputs(
    compute: Callable[[Tensor], Tensor],
    samples: Source,
    preprocess: Preprocess,
    device: torch.device,
    *,
    read: Callable[[Any], np.ndarray] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    what: str = "pictures",
) -> Tensor:
    """What ``compute`` gives for each picture, in their order: (n, …) float32 on the CPU.

    It takes (B, C, H, W) float32 on ``device``, preprocessed, to (B, …). The transform is not of ``native`` size, since
    pictures are put into one tensor. ``read``: what gives (H, W, C) uint8 of a picture, in place of
    the transform. They are read by ``workers`` processes, with 0 in this one. None chooses, for that
    and for ``batch_size``. The bar on stderr, if that is a terminal, counts ``what``.
    """
    if batch_size is None:
        tokens = math.prod(grid_size(*preprocess.size, preprocess.patch_size))
        batch_size = batch_size_for(tokens, device, _GPU_TOKENS)
    count = len(samples)
    if workers is None and count * math.prod(preprocess.size) < _PIXELS_PER_WORKER:
        workers = 0
    keys = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    dataset = Whole(samples, read or partial(read_pixels, preprocess=preprocess), _joined)
    reading = batches_of(dataset, keys, workers=worker_count(workers), pin=device.type == "cuda")
    bar = tqdm(total=count, unit=f" {what}", disable=None if progress else True, file=sys.stderr, leave=False)

    def normalised(pixels: Tensor) -> Tensor:
        return compute(preprocess.normalise(pixels.to(device, non_blocking=True)))

    with reading as batches, bar:
        return torch.cat([rows for _, rows in infer(zip(keys, batches, strict=True), normalised, bar)])
