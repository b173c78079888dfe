"""Which recipe fine-tunes best on a few pictures a class: the study behind ``--recipe auto``, and its check.

    scripts/labelled-data LABELLED
    export OMP_NUM_THREADS=1
    for part in 0/2 1/2; do python benchmarks/small_data.py study LABELLED WORK --part $part & done; wait
    python benchmarks/small_data.py check LABELLED WORK
    python benchmarks/small_data.py others LABELLED WORK
    python benchmarks/small_data.py report docs/figures/small-data.png

``study``: four sets, 5, 20 and 100 pictures a class, two draws of them, every recipe of `CANDIDATES`, all from
``vit-nano``. Pictures to train on and to measure on are both drawn from the training side of one split; its test side
is not looked at. ``check``: two other sets, three draws, the recipe as it is now, measured on the test side.
``others``: what else a user might take, on the same pictures and network, measured on the test side too: the published
recipe at 1,000 steps; AdamW at a flat 1e-4 without layer decay, as LightlyTrain fine-tunes; the defaults of timm's
training script (SGD at 0.1 for 256 pictures, momentum 0.9, weight decay 2e-5, cosine with 5 epochs of warm-up, batch
128, crops of 8 to 100 %, colour jitter 0.4, smoothing 0.1), by timm's own parts; the last two for 50 passes. Results
go to benchmarks/results/small-data.jsonl as they come: a command that is given again goes on. What is there of the
first draw was measured while ``auto`` was still `official` with these flags; ``kept`` in it is by an earlier rule, and
some lines have losses of the pictures to choose by. The tables use neither.
"""

import argparse
import csv
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from protocols import Log

import maehub
from maehub.data import Labelled, split_labelled
from maehub.files import read_json
from maehub.train import FinetuneConfig, finetune

RESULTS = Path(__file__).parent / "results" / "small-data.jsonl"
STUDY, CHECK = ("openclipart", "animals", "emoji", "textile"), ("digits", "photos")
SIZES = (5, 20, 100)  # pictures a class
MEASURED = 400  # pictures

PLAIN: dict[str, Any] = {
    **{"head_start": "probe", "batch_size": 32, "layer_decay": 0.75, "warmup": 0.1, "crop_scale": (0.5, 1.0)},
    "blocks": 5,  # all of them: the whole network
    **{"randaugment": "none", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "erasing": 0.0, "drop_path": 0.0},
}
EPOCHS = {5: 30, 20: 12, 100: 5}
CANDIDATES: dict[str, dict[str, Any]] = {
    "rate 0.003": {"base_lr": 3e-3},
    "rate 0.003, last blocks": {"base_lr": 3e-3, "blocks": 2},
    "rate 0.003, twice as long": {"base_lr": 3e-3, "longer": 2},
    "rate 0.003, last blocks, twice as long": {"base_lr": 3e-3, "blocks": 2, "longer": 2},
    "rate 0.01": {"base_lr": 1e-2},
    "rate 0.003, recoloured": {"base_lr": 3e-3, "randaugment": "rand-m5-mstd0.5-inc1", "smoothing": 0.1},
    "rate 0.001": {"base_lr": 1e-3},
    "rate 0.003, crops from 0.2": {"base_lr": 3e-3, "crop_scale": (0.2, 1.0)},
}


def drawn(labelled: Labelled, each: int, seed: int) -> tuple[list[int], list[int]]:
    """Places of so many pictures of each class, and of others, in random order."""
    order = np.random.default_rng(seed).permutation(len(labelled))
    left = dict.fromkeys(range(len(labelled.classes)), each)
    chosen: list[int] = []
    others: list[int] = []
    for place in map(int, order):
        label = int(labelled.labels[place])
        (chosen if left[label] else others).append(place)
        left[label] -= left[label] > 0
    return chosen, others


def table(path: Path, training: tuple[Labelled, list[int]], testing: tuple[Labelled, list[int]]) -> str:
    """Write a table of labelled pictures with its split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for side, (labelled, places) in (("train", training), ("val", testing)):
            for place in places:
                where = Path(labelled.samples.where(place)).absolute()
                rows.writerow([where, labelled.classes[int(labelled.labels[place])], side])
    return str(path)


def run(data: str, out: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Fine-tune once: what `scores.json` says, in few numbers."""
    quiet: dict[str, Any] = {"device": "cpu", "quiet": True, "skip_twins": True, "workers": 0, "cache": True}
    result = finetune(FinetuneConfig(data, out, seed=seed, overwrite=out.exists(), **quiet, **changes))
    said, settings = read_json(out / "scores.json"), read_json(out / "config.json")["settings"]
    shutil.rmtree(out)
    found = {"kept": said.get("kept", "finetuned"), "steps": result.step, "base_lr": settings["base_lr"]}
    for name in ("finetuned", "probe"):
        found[name] = said[name]["top1"] if name in said else None
    return found | {name: said.get(name) for name in ("paired", "chosen_by")} | {"top1": said["scores"]["top1"]}


def study(labelled: Path, work: Path, part: int, parts: int) -> None:
    log = Log(RESULTS)
    cells = [(seed, each, name) for seed in (0, 1) for each in (20, 100, 5) for name in STUDY]
    for seed, each, name in cells[part::parts]:
        whole = split_labelled(labelled / name, seed=0).training
        chosen, others = drawn(whole, each, seed)
        path = work / f"{name}-{each}-{seed}.csv"
        data = table(path, (whole, chosen), (whole, others[:MEASURED]))
        for words, changes in CANDIDATES.items():
            key = {"kind": "study", "set": name, "each": each, "seed": seed, "recipe": words}
            settings = PLAIN | {"epochs": EPOCHS[each] * changes.get("longer", 1), "validate_every": 10**6} | changes
            settings.pop("longer", None)
            log.once(key, partial(run, data, work / f"run-{part}", seed, **settings))


def check(labelled: Path, work: Path, part: int, parts: int) -> None:
    log = Log(RESULTS)
    cells = [(seed, each, name) for seed in (0, 1, 2) for each in SIZES for name in CHECK]
    for seed, each, name in cells[part::parts]:
        split = split_labelled(labelled / name, seed=seed)
        chosen, _ = drawn(split.training, each, seed)
        path = work / f"{name}-{each}-{seed}.csv"
        data = table(path, (split.training, chosen), (split.testing, list(range(len(split.testing)))))
        key = {"kind": "check", "set": name, "each": each, "seed": seed, "recipe": "auto"}
        unhurried = {"minutes": 600, "validate_every": 10**6}  # cells may run beside each other
        log.once(key, partial(run, data, work / f"run-{part}", seed, **unhurried))


OTHERS = (("digits", 20), ("photos", 20), ("openclipart", 70))  # pictures a class
PASSES = 50
LIGHTLY: dict[str, Any] = {
    **{"recipe": "official", "head_start": "zero", "batch_size": 32, "base_lr": 1e-4 * 8**0.5, "layer_decay": 1.0},
    **{"randaugment": "none", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "erasing": 0.0, "drop_path": 0.0},
    **{"crop_scale": (0.2, 1.0), "epochs": PASSES},
}


def others(labelled: Path, work: Path, part: int, parts: int) -> None:
    log = Log(RESULTS)
    for name, each in OTHERS[part::parts]:
        split = split_labelled(labelled / name, seed=0)
        chosen, _ = drawn(split.training, each, 0)
        sides = (split.training, chosen), (split.testing, list(range(len(split.testing))))
        data = table(work / f"{name}-{each}-others.csv", *sides)
        out, seldom = work / f"run-{part}", {"validate_every": 10**6}
        ways = {
            "auto": partial(run, data, out, 0, minutes=600, **seldom),
            "AdamW 1e-4": partial(run, data, out, 0, **LIGHTLY, **seldom),
            "timm's script": partial(by_timm, data),
            "official, 1,000 steps": partial(run, data, out, 0, recipe="official", steps=1000, **seldom),
        }
        for words, way in ways.items():
            log.once({"kind": "others", "set": name, "each": each, "seed": 0, "recipe": words}, way)


def by_timm(data: str) -> dict[str, Any]:
    """Top-1 after training with the defaults of timm's script."""
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    with open(data, newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["label"] for row in rows})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        maehub.save(maehub.load("vit-nano"), folder + "/model")
        network = timm.create_model(f"local-dir:{folder}/model", pretrained=True, num_classes=len(names))
    settings = timm.data.resolve_data_config({}, model=network)
    shape = {name: settings[name] for name in ("input_size", "mean", "std", "interpolation")}
    views = {"train": create_transform(**shape, is_training=True), "val": create_transform(**settings)}
    sides: dict[str, list[tuple[Any, int]]] = {"train": [], "val": []}
    for row in rows:
        sides[row["split"]].append((Image.open(row["path"]).convert("RGB"), names.index(row["label"])))
    batch = min(128, len(sides["train"]))
    optimizer = create_optimizer_v2(network, opt="sgd", lr=0.1 * batch / 256, weight_decay=2e-5, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, PASSES, lr_min=0, warmup_t=5, warmup_lr_init=1e-5, warmup_prefix=False)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(PASSES):
        schedule.step(epoch)
        order = torch.randperm(len(sides["train"])).tolist()
        for start in range(0, len(order) - batch + 1, batch):  # what is left over is dropped, as there
            some = [sides["train"][place] for place in order[start : start + batch]]
            images = torch.stack([views["train"](picture) for picture, _ in some])
            optimizer.zero_grad()
            loss_of(network.train()(images), torch.tensor([label for _, label in some])).backward()
            optimizer.step()
    with torch.no_grad():
        said = [int(network.eval()(views["val"](picture)[None]).argmax()) for picture, _ in sides["val"]]
    right = [one == label for one, (_, label) in zip(said, sides["val"], strict=True)]
    return {"top1": 100 * sum(right) / len(right), "steps": PASSES * (len(sides["train"]) // batch)}


def report(path: Path) -> None:
    """Print the tables, and draw the figure."""
    log = Log(RESULTS)
    for line in (*tables(log), *check_tables(log)):
        print(line)
    draw(log, path)


def gains(log: Log, each: int, recipe: str, kind: str = "study") -> list[float]:
    """Of the fine-tuned network over the probe, points, one for each set and draw."""
    found = log.of({"kind": kind, "each": each, "recipe": recipe})
    return [line["finetuned"] - line["probe"] for line in found]


def tables(log: Log) -> Iterator[str]:
    """What each recipe gained over the probe: means over sets and draws."""
    yield f"| recipe | {' | '.join(f'{each} a class' for each in SIZES)} |\n|---{'|---' * len(SIZES)}|"
    for recipe in CANDIDATES:
        cells = [gains(log, each, recipe) for each in SIZES]
        words = [f"{statistics.mean(c):+.1f} ({min(c):+.1f} to {max(c):+.1f})" if c else "" for c in cells]
        yield f"| {recipe} | {' | '.join(words)} |"


def check_tables(log: Log) -> Iterator[str]:
    """What was exported against the probe, and against what else a user might take."""
    yield f"| check | pictures a class | probe | exported | gain, of each draw | p (McNemar) |\n{'|---' * 6}|"
    gained: list[float] = []
    for name in CHECK:
        for each in SIZES:
            if not (found := log.of({"kind": "check", "set": name, "each": each})):
                continue
            gains_here = [line["top1"] - line["probe"] for line in found]
            gained += gains_here
            means = [statistics.mean(line[key] for line in found) for key in ("probe", "top1")]
            words = ", ".join(f"{gain:+.1f}" for gain in gains_here)
            chances = ", ".join(f"{line['paired']['p']:.2g}" for line in found)
            yield f"| {name} | {each} | {means[0]:.1f} | {means[1]:.1f} | {words} | {chances} |"
    if gained:
        yield f"at or above the probe in {sum(gain >= 0 for gain in gained)} of {len(gained)} cells"
    yield f"| set | pictures a class | way | top-1 | steps | seconds |\n{'|---' * 6}|"
    for name, each in OTHERS:
        for line in log.of({"kind": "others", "set": name, "each": each}):
            cells = (name, each, line["recipe"], f"{line['top1']:.1f}", line["steps"], f"{line['seconds']:.0f}")
            yield f"| {' | '.join(map(str, cells))} |"


def draw(log: Log, path: Path) -> None:
    """One panel a size, one row a recipe: a dot for each set and draw, a line at their mean."""
    from matplotlib.figure import Figure

    recipes = list(CANDIDATES)
    figure = Figure(figsize=(11, 4.2))
    figure.subplots_adjust(left=0.25, right=0.98, bottom=0.13, top=0.84, wspace=0.08)
    axes = figure.subplots(1, len(SIZES), sharex=True, sharey=True)
    for one, each in zip(axes, SIZES, strict=True):
        one.axvline(0, color="0.75", zorder=0)
        for row, recipe in enumerate(recipes):
            for name, colour in zip(STUDY, ("#1b7837", "#762a83", "#b35806", "#2166ac"), strict=True):
                found = log.of({"kind": "study", "each": each, "recipe": recipe, "set": name})
                values = [line["finetuned"] - line["probe"] for line in found]
                label = name if row == 0 and one is axes[1] else None
                one.plot(values, [row] * len(values), "o", color=colour, alpha=0.8, label=label)
            if whole := gains(log, each, recipe):
                one.plot([statistics.mean(whole)] * 2, [row - 0.35, row + 0.35], color="0.1", linewidth=2)
        one.set_title(f"{each} pictures a class", fontsize=10)
        one.set_xlabel("points of top-1 above the probe", fontsize=9)
        one.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(recipes)), recipes, fontsize=9)
    axes[0].invert_yaxis()
    figure.legend(loc="upper center", ncols=len(STUDY), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("study", "check", "others", "report"))
    parser.add_argument("places", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--part", default="0/1", help="which of how many parts of the cells: 0/2 and 1/2 are all")
    options = parser.parse_args()
    if options.what == "report":
        return report(*options.places)
    part, parts = map(int, options.part.split("/"))
    return {"study": study, "check": check, "others": others}[options.what](*options.places, part, parts)


if __name__ == "__main__":
    main()
