"""Segmentation and detection beside what else one could do with the same pictures, network and time.

    scripts/dense-data DATA
    python benchmarks/dense.py run DATA WORK [--set drawn] [--task detect] [--way auto] [--seed 0] [--minutes 20]
    python benchmarks/dense.py report WORK
    python benchmarks/dense.py windows WORK

Drawn objects have both tasks, nuclei have pixels and crowns objects alone. Ways, with `vit-nano`:

- auto: `maehub finetune DATA --task segment`, or detect, with so many minutes
- upernet: the same with --decoder upernet, of pixels
- scratch: the network of auto with fresh weights, three times the steps that auto took
- frozen: the encoder as it is, `--recipe linear`, or of objects --blocks 0
- torchvision: its smallest network (LRASPP, or Faster R-CNN for 320 pixels, on MobileNetV3-Large) from fresh weights,
  for as long as auto trained, on the same crops, AdamW 1e-3 with a cosine
- otsu: one threshold (Otsu 1979) a picture, of the nuclei alone

``windows``: the memory of predicting 4,000×3,000 pixels of noise by `vit-nano` with 150 classes, windows of 256 pixels.

Each cell is one line of WORK/dense.jsonl: a cell that is there is not run again. Quote machines and cores with numbers.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import maehub
from maehub.data import MapClasses, StepKeys, split_label_maps, split_objects
from maehub.dense import Detections
from maehub.images import Preprocess, open_image
from maehub.train import FinetuneConfig, finetune
from maehub.train.engine import learning_rate
from maehub.train.evaluation import score_maps, score_objects
from maehub.train.evaluation.dense.map_scores import confusion_of
from maehub.train.finetuning.dense.views import DenseTransform, MapCrops, MapTransform, ObjectCrops
from maehub.train.finetuning.views import LabelledBatch, LabelledCrops

SETS = {"segment": ("drawn", "nuclei"), "detect": ("drawn", "crowns")}
WAYS = ("auto", "upernet", "scratch", "frozen", "torchvision", "otsu")
SEEDS = (0, 1, 2)


def ours(
    task: str, way: str, data: Path, folder: Path, seed: int, minutes: float, steps: int | None
) -> dict[str, object]:
    """One of our own ways."""
    more: dict[str, object] = {"minutes": minutes}
    if way == "scratch":
        more = {"model": "untrained/vit-nano", "steps": 3 * (steps or 0)}
    if way == "frozen":
        more |= {"recipe": "linear"} if task == "segment" else {"blocks": 0}
    if way == "upernet":
        more["decoder"] = "upernet"
    config = FinetuneConfig(str(data), folder, task=task, seed=seed, overwrite=True, quiet=True, **more)
    result = finetune(config)
    assert result.scores is not None
    return result.scores.summary() | {"steps": result.step}


def trained(
    model: torch.nn.Module, crops: LabelledCrops, loss_of: Callable[[Any], Tensor], seed: int, seconds: float
) -> int:
    """Train for so long; the steps that it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05)
    keys = iter(StepKeys(crops.labelled.samples, 16, seed, 0, 10**9))
    begun, step, total = time.monotonic(), 0, 10**9
    model.train()
    while step < total:
        batch = crops.__getitems__(next(keys))
        assert not isinstance(batch, Exception)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, 1e-3, 0.05) if total < 10**9 else 1e-3 * (step + 1) / 20
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step == 10:  # the speed is known: so many steps are left
            total = max(11, int(10 * seconds / (time.monotonic() - begun)))
    model.eval()
    return step


def torchvisions_detector(data: Path, seed: int, seconds: float) -> dict[str, object]:
    """torchvision's smallest Faster R-CNN, for so long; pictures in its own way, crops of 320 pixels."""
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    split = split_objects(data)
    training, testing = split.training.objects, split.testing.objects
    assert training is not None
    assert testing is not None
    torch.manual_seed(seed)
    more: Any = {"weights": None, "weights_backbone": None, "num_classes": 1 + len(training.classes.names)}
    model = fasterrcnn_mobilenet_v3_large_320_fpn(**more)
    shape = Preprocess((320, 320), 16)
    crops = ObjectCrops(split.training, DenseTransform(shape, None, (0.5, 2.0), fitted=True), False, cache=False)

    def loss_of(batch: LabelledBatch) -> Tensor:
        images = list(batch.pixels.permute(0, 3, 1, 2) / 255)
        total: Tensor = sum(
            model(images, [{"boxes": one.boxes, "labels": one.labels + 1} for one in batch.targets]).values()
        )
        return total

    steps = trained(model, crops, loss_of, seed, seconds)
    found = []
    for index in range(len(split.testing)):
        pixels = torch.from_numpy(np.array(open_image(split.testing.samples.source(index)))).permute(2, 0, 1) / 255
        with torch.inference_mode():
            said = model([pixels])[0]
        found.append(Detections(said["boxes"].numpy(), said["scores"].numpy(), said["labels"].numpy() - 1))
    scores = score_objects(testing.rows, found, testing.classes, split.testing.groups)
    return scores.summary() | {"steps": steps}


def torchvisions(data: Path, seed: int, seconds: float) -> dict[str, object]:
    """torchvision's smallest segmentation network, for so long."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    split = split_label_maps(data)
    training, testing = split.training, split.testing
    assert training.maps is not None
    assert testing.maps is not None
    first = training.maps.read(0).shape
    shape = Preprocess((first[0], first[1]), 16)
    torch.manual_seed(seed)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(training.classes))
    crops = MapCrops(training, MapTransform(shape, None, (0.5, 2.0)), cache=False)
    steps = trained(
        model,
        crops,
        lambda batch: F.cross_entropy(
            model(shape.normalise(batch.pixels))["out"], batch.targets.long(), ignore_index=-1
        ),
        seed,
        seconds,
    )
    tables = []
    for index in range(len(testing)):
        pixels = np.array(open_image(testing.samples.source(index)))
        with torch.inference_mode():
            scores = model(shape.normalise(torch.from_numpy(pixels[None])))["out"][0]
        tables.append(confusion_of(testing.maps.read(index), scores.argmax(dim=0).numpy(), len(testing.classes)))
    return score_maps(tables, testing.classes, testing.groups).summary() | {"steps": steps}


def otsus(data: Path) -> dict[str, object]:
    """The threshold of each picture that leaves least variance within the two sides."""
    testing = split_label_maps(data).testing
    assert testing.maps is not None
    tables = []
    for index in range(len(testing)):
        grey = np.asarray(open_image(testing.samples.source(index), channels=1))
        counts = np.bincount(grey.reshape(-1), minlength=256).astype(float)
        below, values = counts.cumsum(), (counts * np.arange(256)).cumsum()
        above = below[-1] - below
        with np.errstate(invalid="ignore", divide="ignore"):
            between = below * above * (values / below - (values[-1] - values) / above) ** 2
        said = (grey > np.nanargmax(between)).astype(np.int16)
        tables.append(confusion_of(testing.maps.read(index), said, 2))
    return score_maps(tables, testing.classes, testing.groups).summary() | {"steps": 0}


def windows() -> None:
    """Print the peak of resident memory and the seconds of one large picture."""
    count, (height, width) = 150, (3000, 4000)
    classes = MapClasses(tuple(map(str, range(count))), tuple(range(count)), tuple(range(count)))
    model = maehub.Segmenter(maehub.load("vit-nano", image_size=256), maehub.SegmenterConfig(classes))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    begun = time.monotonic()
    model.predict(pixels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{width}×{height}, {count} classes: {peak:.2f} GiB at most, {time.monotonic() - begun:.0f} s")


def known(work: Path) -> list[dict[str, Any]]:
    """The cells that were run."""
    path = work / "dense.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Run cells, or print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "windows"))
    parser.add_argument("folders", nargs="+", type=Path, metavar="DATA WORK")
    parser.add_argument("--task", choices=tuple(SETS))
    parser.add_argument("--set", choices=sorted({name for names in SETS.values() for name in names}))
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--seed", type=int, choices=SEEDS)
    parser.add_argument("--minutes", type=float, default=20.0)
    given = parser.parse_args()
    work = given.folders[-1]
    if given.what == "windows":
        windows()
        return
    tasks = [(task, name) for task, names in SETS.items() for name in names]
    if given.what == "report":
        for task, name in tasks:
            for way in WAYS:
                cells = [cell for cell in known(work) if (cell["task"], cell["set"], cell["way"]) == (task, name, way)]
                measure = "miou" if task == "segment" else "ap50"
                shown = ", ".join(
                    f"{cell[measure]:.1f} ({cell['steps']} steps, {cell['seconds']:.0f} s)" for cell in cells
                )
                if cells:
                    mean = np.mean([cell[measure] for cell in cells])
                    print(f"{name:<8}{measure:<6}{way:<12}{mean:6.1f}   {shown}")
        return
    work.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS if given.seed is None else (given.seed,):
        for task, name in tasks:
            if given.task in (None, task) and given.set in (None, name):
                for way in [given.way] if given.way else WAYS:
                    run(given.folders[0] / name, work, {"task": task, "set": name, "way": way, "seed": seed,
                                                        "minutes": given.minutes})  # fmt: skip


def run(data: Path, work: Path, cell: dict[str, Any]) -> None:
    """One cell, unless it was run, or needs one that was not."""
    task, name, way, seed = (cell[key] for key in ("task", "set", "way", "seed"))
    done = [one for one in known(work) if cell.items() <= one.items()]
    if done or (way == "otsu" and (name != "nuclei" or seed)) or (way == "upernet" and task == "detect"):
        return
    auto = [one for one in known(work) if (cell | {"way": "auto"}).items() <= one.items()]
    if way in ("scratch", "torchvision") and not auto:
        return  # which says for how long
    begun = time.monotonic()
    if way == "otsu":
        found = otsus(data)
    elif way == "torchvision":
        found = (torchvisions if task == "segment" else torchvisions_detector)(data, seed, auto[0]["seconds"])
    else:
        folder = work / f"{name}-{task}-{way}-{seed}"
        found = ours(task, way, data, folder, seed, cell["minutes"], auto[0]["steps"] if auto else None)
    cell |= {"seconds": time.monotonic() - begun, "threads": torch.get_num_threads()} | found
    with open(work / "dense.jsonl", "a") as file:
        file.write(json.dumps(cell) + "\n")
    print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
