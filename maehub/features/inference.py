"""What a network gives for every picture of a source: one pass, whole pictures, nothing random."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from maehub.data import Source, batches_of, naming, worker_count
from maehub.errors import DataError
from maehub.images import Preprocess, grid_size, read_pixels

_TOKENS_AT_ONCE = {"cpu": 2**13, "cuda": 2**16}  # in a batch whose size nobody chose
_PIXELS_PER_WORKER = 2**21  # fewer than these are read sooner here than in processes that must be started


@dataclass(frozen=True)
class Whole(Dataset[Tensor | DataError]):
    """Pictures through the transform of a model, a whole batch at a time; one that cannot be read is its error."""

    samples: Source
    preprocess: Preprocess

    def __getitems__(self, indices: list[int]) -> Tensor | DataError:
        """(B, H, W, C) uint8."""
        self.samples.prefetch(indices)
        pictures = []
        for index in indices:
            try:
                with naming(self.samples, index):
                    pictures.append(torch.from_numpy(read_pixels(self.samples.source(index), self.preprocess)))
            except DataError as error:
                return error
        return torch.stack(pictures)

    def __getitem__(self, index: int) -> Tensor | DataError:
        return self.__getitems__([index])


@torch.inference_mode()
def outputs(
    compute: Callable[[Tensor], Tensor],
    samples: Source,
    preprocess: Preprocess,
    device: torch.device,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    what: str = "pictures",
) -> Tensor:
    """What ``compute`` gives for each picture, in their order.

    Args:
        compute: (B, C, H, W) float32 on ``device``, preprocessed, to (B, …).
        samples: the pictures.
        preprocess: of the model; not of ``native`` size, since pictures are put into one tensor.
        batch_size: pictures at once; None chooses.
        workers: processes that read; 0 reads in this one, None chooses.
        progress: show a bar on stderr, if that is a terminal.
        what: the word of the bar.

    Returns:
        (n, …) float32 on the CPU.

    Raises:
        DataError: a picture cannot be read; the text names it.
    """
    if batch_size is None:
        tokens = math.prod(grid_size(*preprocess.size, preprocess.patch_size))
        budget = _TOKENS_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
        batch_size = 2 ** int(math.log2(max(1, budget // tokens)))
    count = len(samples)
    if workers is None and count * math.prod(preprocess.size) < _PIXELS_PER_WORKER:
        workers = 0
    keys = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    reading = batches_of(Whole(samples, preprocess), keys, workers=worker_count(workers), pin=device.type == "cuda")
    found = []
    bar = tqdm(total=count, unit=f" {what}", disable=None if progress else True, file=sys.stderr, leave=False)
    with reading as batches, bar:
        for pixels in batches:
            images = preprocess.normalise(pixels.to(device, non_blocking=True))
            found.append(compute(images).float().cpu())
            bar.update(len(pixels))
    return torch.cat(found)
