"""Features of a folder of JPEGs, beside the usual loop.

The usual loop opens each file with Pillow, converts it to RGB, applies torchvision's evaluation transform and is run by
a torch DataLoader with as many workers. The JPEGs are made here, from photos that come with scikit-image, enlarged and
with noise added so that they have the detail of a camera's.

    python benchmarks/folder_features.py [--images 1536] [--runs 5] [--workers 2] [--quality 85]

prints a Markdown table: medians over runs that take turns. "per core" is images per second by the wall clock divided by
the number of workers, "CPU" the processor time of all processes together for one image. Starting the workers counts.
Features are of a third of the images.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from maehub import load
from maehub.data.workers import Readers
from maehub.features.extraction import extract_features
from maehub.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from maehub.models.encoder import Encoder

SIZES = {"1024×768": (1024, 768), "500×375": (500, 375)}
BATCH = 32
NOISE = 4.0  # grey levels
SCENES = ("astronaut", "coffee", "chelsea")


def make_jpegs(folder: Path, width: int, height: int, count: int, quality: int) -> list[str]:
    """``count`` files, from a few different crops of each scene."""
    rng = np.random.default_rng(0)
    variants = []
    for scene in SCENES:
        photo = Image.fromarray(getattr(data, scene)()).convert("RGB")
        scale = 1.1 * max(width / photo.width, height / photo.height)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
        for _ in range(4):
            left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
            pixels = np.asarray(photo.crop((left, top, left + width, top + height)), np.float32)
            pixels = pixels + rng.normal(0, NOISE, (height, width, 1)) + rng.normal(0, NOISE / 2, pixels.shape)
            variants.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    for number, variant in enumerate(variants):
        variant.save(folder / f"{number:05}.jpg", quality=quality)
    for number in range(len(variants), count):
        (folder / f"{number:05}.jpg").write_bytes((folder / f"{number % len(variants):05}.jpg").read_bytes())
    return sorted(str(path) for path in folder.glob("*.jpg"))[:count]


class UsualFiles(Dataset[torch.Tensor]):
    """What most scripts do."""

    def __init__(self, paths: list[str], preprocess: Preprocess) -> None:
        side = preprocess.size[0]
        bicubic = transforms.InterpolationMode.BICUBIC
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(round(side / preprocess.crop_fraction), interpolation=bicubic),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def usual_loader(paths: list[str], preprocess: Preprocess, workers: int) -> DataLoader[torch.Tensor]:
    return DataLoader(UsualFiles(paths, preprocess), batch_size=BATCH, num_workers=workers)


def usual_reading(paths: list[str], preprocess: Preprocess, workers: int) -> None:
    assert sum(len(batch) for batch in usual_loader(paths, preprocess, workers)) == len(paths)


def our_reading(paths: list[str], preprocess: Preprocess, workers: int) -> None:
    """Up to the same batches of normalised floats."""
    count, waiting = 0, []
    with Readers(workers, preprocess) as readers:
        for pixels in readers.read(os.fsencode(path) for path in paths):
            assert isinstance(pixels, np.ndarray)
            waiting.append(pixels)
            if len(waiting) == BATCH or count + len(waiting) == len(paths):
                count += len(preprocess.normalise(torch.from_numpy(np.stack(waiting))))
                waiting = []
    assert count == len(paths)


def usual_features(encoder: Encoder, paths: list[str], workers: int) -> torch.Tensor:
    with torch.inference_mode():
        batches = usual_loader(paths, encoder.preprocess, workers)
        return torch.cat([encoder.features(batch) for batch in batches])


class Timing:
    """Wall and processor seconds an image of some runs."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def run(self, call: Callable[[], object], images: int) -> None:
        before, start = _processor_seconds(), time.perf_counter()
        call()
        self.wall.append((time.perf_counter() - start) / images)
        self.processor.append((_processor_seconds() - before) / images)

    def rate(self) -> float:
        return 1 / statistics.median(self.wall)

    def cpu(self) -> float:
        return statistics.median(self.processor) * 1e3


def _processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def take_turns(calls: dict[str, Callable[[], object]], images: int, runs: int) -> dict[str, Timing]:
    timings = {name: Timing() for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            timings[name].run(call, images)
    return timings


def row(name: str, timings: dict[str, Timing], workers: int) -> str:
    usual, ours = timings["usual"], timings["maehub"]
    return (
        f"| {name} | {usual.rate() / workers:.0f} | {ours.rate() / workers:.0f} | {ours.rate() / usual.rate():.2f} "
        f"| {usual.cpu():.2f} | {ours.cpu():.2f} | {usual.cpu() / ours.cpu():.2f} |"
    )


HEADER = (
    "| | usual, img/s per core | maehub, img/s per core | ratio | usual, CPU ms/img | maehub, CPU ms/img | ratio |\n"
    "|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quality", type=int, default=85)
    options = parser.parse_args()
    encoder = load("vit-nano")
    nano = encoder.preprocess
    transforms_ = {"96 px": nano, "224 px": Preprocess.evaluation(224)}
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{options.images} JPEGs of quality {options.quality}, {options.workers} workers, {options.runs} runs\n")
        lines, notes = [], []
        for label, (width, height) in SIZES.items():
            folder = Path(temporary, label)
            folder.mkdir()
            paths = make_jpegs(folder, width, height, options.images, options.quality)
            kilobytes = statistics.mean(os.path.getsize(path) for path in paths) / 1e3
            for pixels, preprocess in transforms_.items():
                calls = {
                    "usual": lambda p=paths, t=preprocess: usual_reading(p, t, options.workers),
                    "maehub": lambda p=paths, t=preprocess: our_reading(p, t, options.workers),
                }
                timings = take_turns(calls, len(paths), options.runs)
                lines.append(row(f"reading, {label} ({kilobytes:.0f} kB) to {pixels}", timings, options.workers))
            fewer = paths[: len(paths) // 3]
            out = Path(temporary, "features.safetensors")
            calls = {
                "usual": lambda p=fewer: usual_features(encoder, p, options.workers),
                "maehub": lambda p=fewer, o=out: extract_features(
                    encoder, p, batch_size=BATCH, workers=options.workers, out=o, overwrite=True, progress=False
                ),
            }
            timings = take_turns(calls, len(fewer), options.runs)
            lines.append(row(f"features of vit-nano, {label}", timings, options.workers))
            for pool in ("cls", "mean"):
                ours = extract_features(encoder, paths[:12], pool=pool, progress=False).features
                with torch.inference_mode():
                    batches = usual_loader(paths[:12], nano, 0)
                    usual = torch.cat([encoder.features(batch, pool=pool) for batch in batches])
                cosine = torch.nn.functional.cosine_similarity(ours, usual)
                notes.append(
                    f"{label}, pool {pool}: smallest cosine of maehub's and the usual features {cosine.min():.6f}"
                )
        print(HEADER, *lines, "", *notes, sep="\n")


if __name__ == "__main__":
    main()
