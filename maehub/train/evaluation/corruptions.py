"""Robustness to 15 common corruptions at 5 severities (Hendrycks and Dietterich 2019).

Their mean corruption error compares a model with a baseline: for each corruption the errors of both are summed over the
severities and divided, and the mean over corruptions is taken, in percent. Pictures are spoilt as the network sees
them, resized and cropped, as in ImageNet-C. The corruptions are those of the package imagecorruptions-imaug.
"""

import statistics
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from maehub.data import Labelled, Source
from maehub.errors import IntegrityError, UsageError
from maehub.features import outputs
from maehub.files import read_json
from maehub.images import Preprocess, read_pixels
from maehub.rng import seeded
from maehub.train.evaluation.plots import contact_sheet
from maehub.train.evaluation.text_tables import text_table

SEVERITIES = (1, 2, 3, 4, 5)
_SMALLEST = 32  # pixels of a side that can be spoilt
_SEEDED = ("impulse_noise", "glass_blur")  # these draw from a generator of their own
_SHOWN = 3  # severity of the picture of all


@dataclass(frozen=True)
class Robustness:
    """Top-1 errors of a model on spoilt pictures, percent: ``clean``, and of each corruption one a severity.

    ``baseline`` names the model that ``relative`` compares with: percent of its errors, for each corruption.
    """

    clean: float
    errors: dict[str, tuple[float, ...]]
    baseline: str = ""
    relative: dict[str, float] | None = None

    @property
    def mean_error(self) -> float:
        """Over corruptions and severities, percent."""
        return statistics.mean(value for row in self.errors.values() for value in row)

    @property
    def mean_corruption_error(self) -> float | None:
        """mCE, percent of the baseline's errors; None without one."""
        return statistics.mean(self.relative.values()) if self.relative else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        more = {"mean_error": self.mean_error, "mean_corruption_error": self.mean_corruption_error}
        return {**vars(self), "errors": {name: list(row) for name, row in self.errors.items()}, **more}

    def __str__(self) -> str:
        header = ["CORRUPTION", *(f"SEVERITY {number}" for number in SEVERITIES), "MEAN"]
        header += ["OF THE BASELINE'S"] if self.relative else []
        rows = []
        for name, row in self.errors.items():
            cells = [f"{value:.1f} %" for value in (*row, statistics.mean(row))]
            cells += [f"{self.relative[name]:.1f} %"] if self.relative else []
            rows.append([name.replace("_", " "), *cells])
        last = f"top-1 error: {self.clean:.1f} % of clean pictures, {self.mean_error:.1f} % of spoilt ones in the mean"
        if self.relative:
            last += f"; mean corruption error {self.mean_corruption_error:.1f} % of {self.baseline}'s"
        return f"{text_table(header, rows)}\n\n{last}"


def corruption_names(labelled: Labelled, preprocess: Preprocess) -> tuple[str, ...]:
    """The 15 of them, if these pictures can be spoilt."""
    if preprocess.channels != 3 or labelled.labels.ndim == 2:
        raise UsageError(
            f"--corruptions are of colour pictures of one class each; these have {preprocess.channels} channels"
            + (" and several labels" * labelled.multi_label + " and numbers" * labelled.numeric)
        )
    if preprocess.resize == "native" or min(preprocess.size) < _SMALLEST:
        raise UsageError(f"--corruptions need pictures of one size, of {_SMALLEST} pixels or more: give --image-size")
    try:
        library: Any = import_module("imagecorruptions")
    except ImportError as error:
        raise UsageError(f"--corruptions need a package: pip install 'maehub[corruptions]' ({error})") from error
    return tuple(library.get_corruption_names())


def spoilt_pixels(source: Any, preprocess: Preprocess, *, name: str, severity: int) -> np.ndarray:
    """(H, W, 3) uint8, as the network would see a picture and then spoilt; what is random follows from the picture."""
    return spoil(read_pixels(source, preprocess), name, severity)


def spoil(pixels: np.ndarray, name: str, severity: int) -> np.ndarray:
    """(H, W, 3) uint8 to the same."""
    library: Any = import_module("imagecorruptions")
    seed = zlib.crc32(pixels.tobytes())
    more = {"seed": seed} if name in _SEEDED else {}
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.ascontiguousarray(library.corrupt(pixels, severity=severity, corruption_name=name, **more))


def measure(
    names: Sequence[str],
    compute: Callable[[Tensor], Tensor],
    labelled: Labelled,
    used: Sequence[int],
    preprocess: Preprocess,
    device: torch.device,
    *,
    batch_size: int | None,
    workers: int | None,
    progress: bool,
) -> dict[str, tuple[float, ...]]:
    """Top-1 errors, percent, of each corruption at each severity. ``used`` are the outputs that count."""
    errors = {}
    bar = tqdm(total=len(names) * len(SEVERITIES), unit=" passes", disable=None if progress else True, file=sys.stderr)
    with bar:
        for name in names:
            row = []
            spoil(np.zeros((_SMALLEST, _SMALLEST, 3), np.uint8), name, 1)  # compiled here, once for all workers
            for severity in SEVERITIES:
                read = partial(spoilt_pixels, preprocess=preprocess, name=name, severity=severity)
                common: Any = {"batch_size": batch_size, "workers": workers, "progress": False}
                found = outputs(compute, labelled.samples, preprocess, device, read=read, **common).numpy()
                row.append(100 * float((found[:, list(used)].argmax(axis=1) != labelled.labels).mean()))
                bar.update()
            errors[name] = tuple(row)
    return errors


class Baseline(NamedTuple):
    """The errors of a model that others are compared with: summed over severities, of each corruption."""

    model: str
    sums: dict[str, float]

    def compare(self, clean: float, errors: dict[str, tuple[float, ...]]) -> Robustness:
        """Errors beside these."""
        relative = {name: 100 * sum(row) / self.sums[name] for name, row in errors.items()}
        return Robustness(clean, errors, self.model, relative)


def read_baseline(folder: Path, names: Sequence[str], pictures: int) -> Baseline:
    """What another evaluation by ``--corruptions`` wrote, of these corruptions and so many pictures."""
    told = read_json(folder / "evaluation.json")
    try:
        sums = {name: sum(map(float, row)) for name, row in told["corruptions"]["errors"].items()}
        model, count = str(told["model"]), told["n"]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{folder} is no evaluation with --corruptions: write one by -o FOLDER") from error
    if count != pictures or sums.keys() != set(names):
        raise UsageError(f"{folder} was measured on {count} pictures and this on {pictures}: they do not compare")
    if not all(sums.values()):
        raise UsageError(f"{model} makes no errors under some corruptions, so nothing can be divided by them")
    return Baseline(model, sums)


def robustness_picture(found: Robustness, samples: Source, preprocess: Preprocess) -> Image.Image:
    """The first picture under each corruption, with the mean error of the model there."""
    pictures = [Image.fromarray(read_pixels(samples.source(0), preprocess))]
    captions = [f"clean: {found.clean:.1f} % error"]
    for name, row in found.errors.items():
        pixels = spoilt_pixels(samples.source(0), preprocess, name=name, severity=_SHOWN)
        pictures.append(Image.fromarray(pixels))
        captions.append(f"{name.replace('_', ' ')}: {statistics.mean(row):.1f} %")
    return contact_sheet(pictures, captions, [True] * len(pictures), title=f"severity {_SHOWN}, and errors over all 5")
