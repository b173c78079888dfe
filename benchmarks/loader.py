"""What a training crop costs on one core: JPEG decoders side by side, and our crops beside the official transform.

    python benchmarks/loader.py [--runs 9] [--decoders]

The official transform opens a file with Pillow, converts it to RGB, and applies torchvision's RandomResizedCrop(224,
scale=(0.2, 1), bicubic), RandomHorizontalFlip, ToTensor and Normalize. Ours is `maehub.images.augment.crop`, with the
fast decoder and without: uint8 is all that a reading process makes, the rest happens on the device.

The JPEGs are made here, half of quality 90 and half of 95, from the two photos of the package and three of
scikit-image's, enlarged to each size, once as they are and once with the noise of a camera (4 grey levels), which is
what most of a real photo's bytes are. Everything runs in one thread on one core. Rounds are interleaved, the figures
are medians of processor time. "Huffman alone" is the fast decoder at 1/8 on the same files, down to the same crop: no
loader over libjpeg-turbo can avoid it. "Differs" compares the crop to a full Pillow decoding, cut to the same box and
scaled by Pillow: mean absolute difference in grey levels, in the mean of 30 crops and of the worst.

--decoders adds decoders that are installed: torchvision, simplejpeg, PyTurboJPEG<2, opencv-python-headless, pyvips,
imagecodecs.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from torchvision import transforms

import maehub
from maehub.images import jpeg
from maehub.images.augment import Augmentation, crop, crop_box
from maehub.images.decoding import open_part
from maehub.images.preprocess import IMAGENET_MEAN, IMAGENET_STD
from maehub.rng import random_uniform, sample_seed

SIZES = {"500×375": (500, 375), "1024×768": (1024, 768), "2048×1536": (2048, 1536)}
GOALS = {"500×375": 2.0, "1024×768": 3.5, "2048×1536": 6.0}
NOISE = {"noisy": 4.0, "smooth": 0.0}  # grey levels
SIDE = (224, 224)
AUGMENTATION = Augmentation()
Decode = Callable[[bytes, int], object]  # a file and the denominator of the scale


def make_jpegs(folder: Path, width: int, height: int, noise: float) -> list[Path]:
    """Ten files: five scenes, two qualities."""
    assets = Path(maehub.__file__).parent / "assets"
    scenes = [Image.open(assets / name).convert("RGB") for name in ("cat.jpg", "coffee.jpg")]
    scenes += [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "rocket", "chelsea")]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number, scene in enumerate(scenes):
        scale = 1.1 * max(width / scene.width, height / scene.height)
        photo = scene.resize((round(scene.width * scale), round(scene.height * scale)), Image.Resampling.LANCZOS)
        for quality in (90, 95):
            left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
            pixels = np.asarray(photo.crop((left, top, left + width, top + height)), np.float32)
            pixels = pixels + rng.normal(0, noise, (height, width, 1)) + rng.normal(0, noise / 2, pixels.shape)
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(folder / f"{number}-{quality}.jpg", quality=quality)
    return sorted(folder.glob("*.jpg"))


# --- decoders alone


def by_pillow(file: bytes, scale: int) -> object:
    image = Image.open(io.BytesIO(file))
    image.draft(None, (image.width // scale, image.height // scale))
    return image.load()


def optional_decoders() -> dict[str, tuple[Decode, tuple[int, ...]]]:
    """Those that are installed, with the scales that they know."""
    found: dict[str, tuple[Decode, tuple[int, ...]]] = {"Pillow, draft mode": (by_pillow, (1, 2, 4, 8))}
    with contextlib.suppress(ImportError):
        from torchvision.io import decode_jpeg

        found["torchvision.io"] = (
            lambda file, _: decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8)),
            (1,),
        )
    with contextlib.suppress(ImportError):
        import simplejpeg

        def by_simplejpeg(file: bytes, scale: int) -> object:
            height, width = simplejpeg.decode_jpeg_header(file)[:2]
            least = -(-height // scale), -(-width // scale)
            return simplejpeg.decode_jpeg(file, min_height=least[0], min_width=least[1], min_factor=scale)

        found["simplejpeg"] = by_simplejpeg, (1, 2, 4, 8)
    with contextlib.suppress(ImportError):
        from turbojpeg import TJPF_RGB, TurboJPEG

        turbo = TurboJPEG()
        found["PyTurboJPEG"] = lambda file, scale: turbo.decode(file, TJPF_RGB, (1, scale)), (1, 2, 4, 8)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        flags = {
            1: cv2.IMREAD_COLOR_RGB,
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }
        found["OpenCV"] = lambda file, scale: cv2.imdecode(np.frombuffer(file, np.uint8), flags[scale]), (1, 2, 4, 8)
    with contextlib.suppress(ImportError):
        import pyvips

        found["pyvips"] = (
            lambda file, scale: pyvips.Image.new_from_buffer(file, "", shrink=scale).write_to_memory(),
            (1, 2, 4, 8),
        )
    with contextlib.suppress(ImportError):
        import imagecodecs

        found["imagecodecs"] = lambda file, _: imagecodecs.jpeg8_decode(file), (1,)
    return found


def milliseconds(decode: Decode, files: list[bytes], scale: int) -> float:
    """Of the processor, a file."""
    start = time.process_time()
    for file in files:
        decode(file, scale)
    return (time.process_time() - start) / len(files) * 1e3


def decoders(folder: Path, runs: int) -> None:
    found = optional_decoders()
    print("\n| whole noisy files, ms at 1/1, 1/2, 1/4, 1/8 | " + " | ".join(SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    cells: dict[str, list[str]] = {name: [] for name in found}
    for label in SIZES:
        files = [path.read_bytes() for path in sorted((folder / f"noisy {label}").glob("*.jpg"))]
        times: dict[tuple[str, int], list[float]] = {
            (name, scale): [] for name, (_, scales) in found.items() for scale in scales
        }
        for _ in range(runs):
            for (name, scale), values in times.items():
                values.append(milliseconds(found[name][0], files, scale))
        for name, (_, scales) in found.items():
            cells[name].append(", ".join(f"{statistics.median(times[name, scale]):.2f}" for scale in scales))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")


# --- the loader


def official(paths: list[Path], round_: int) -> None:
    bicubic = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, AUGMENTATION.crop_scale, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    for path in paths:
        transform(Image.open(path).convert("RGB"))


def ours(paths: list[Path], round_: int) -> None:
    for number, path in enumerate(paths):
        crop(path, SIDE, 3, AUGMENTATION, round_ * len(paths) + number)


def without_fast(paths: list[Path], round_: int) -> None:
    jpeg.simplejpeg = None
    ours(paths, round_)


def huffman(paths: list[Path], round_: int) -> None:
    """The files at 1/8 down to the crop: next to nothing but reading their codes."""
    for number, path in enumerate(paths):
        file = path.read_bytes()
        width, height = Image.open(path).size
        numbers = random_uniform(sample_seed(round_ * len(paths) + number, 0, 0, 1), 44)[1:41]
        box = crop_box((height, width), SIDE, AUGMENTATION, numbers)
        less = jpeg.first_rows(file, box.bottom)
        jpeg.simplejpeg.decode_jpeg(less or file, min_height=1, min_width=1, min_factor=8, strict=False)


def measured(contender: Callable[[list[Path], int], None], paths: list[Path], round_: int) -> float:
    """Processor milliseconds a file, of this process."""
    torch.set_num_threads(1)
    start = time.process_time()
    contender(paths, round_)
    return (time.process_time() - start) / len(paths) * 1e3


def in_turns(paths: list[Path], runs: int) -> dict[str, float]:
    """Medians of the contenders, each in a process of its own, as in a DataLoader: they share no freed memory."""
    contenders = {"official": official, "pillow": without_fast}
    if jpeg.simplejpeg is not None:
        contenders |= {"fast": ours, "huffman": huffman}
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in contenders}
        for round_ in range(runs + 1):
            for name, contender in contenders.items():
                milliseconds = processes[name].submit(measured, contender, paths, round_).result()
                if round_:  # the first warms up
                    times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def differences(paths: list[Path]) -> list[float]:
    """Grey levels between our unflipped crops and those of a full decoding with the same box."""
    unflipped = Augmentation(hflip=False)
    found = []
    for seed, path in enumerate(paths * 3):
        numbers = random_uniform(sample_seed(seed, 0, 0, 1), 44)[1:41]
        part = open_part(path, lambda size, numbers=numbers: crop_box(size, SIDE, unflipped, numbers), SIDE)
        whole = Image.open(path).convert("RGB").crop(part.box)
        expected = np.asarray(whole.resize(SIDE, Image.Resampling.BICUBIC), np.int16)
        found.append(float(np.abs(crop(path, SIDE, 3, unflipped, seed) - expected).mean()))
    return found


def loader(folder: Path, runs: int) -> None:
    print("\n| | kB | official, ms | maehub, fast | ratio | maehub, Pillow | ratio | Huffman alone | goal | differs |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for noise in NOISE:
        for label in SIZES:
            paths = sorted((folder / f"{noise} {label}").glob("*.jpg"))
            times = in_turns(paths * 2, runs)
            levels = differences(paths)
            usual, slow = times["official"], times["pillow"]
            fast, least = times.get("fast", float("nan")), times.get("huffman", float("nan"))
            print(
                f"| {noise} {label} | {statistics.mean(path.stat().st_size for path in paths) / 1e3:.0f} | {usual:.2f} "
                f"| {fast:.2f} | **{usual / fast:.2f}** | {slow:.2f} | {usual / slow:.2f} | {least:.2f} "
                f"| {GOALS[label]} | {statistics.mean(levels):.2f}, at most {max(levels):.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--decoders", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for noise, level in NOISE.items():
            for label, (width, height) in SIZES.items():
                make_jpegs(folder / f"{noise} {label}", width, height, level)
        if options.decoders:
            decoders(folder, options.runs)
        loader(folder, options.runs)


if __name__ == "__main__":
    main()
