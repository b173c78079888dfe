"""The paper's ablations at a size that one CPU core trains: which of them can be seen there, and which cannot.

    scripts/labelled-data LABELLED ; scripts/nano-data PHOTOS --max-side 512 --quality 92
    export OMP_NUM_THREADS=1
    python benchmarks/replication.py pretrain WORK LABELLED/openclipart PHOTOS/train
    python benchmarks/replication.py finetune WORK
    python benchmarks/replication.py report WORK

Every arm differs in one setting from the first. Within a seed all arms start from the same encoder, see the same
pictures in the same order for the same number of steps, and are judged on the same held-out drawings, which were never
pretrained on: differences are paired. An untrained encoder is the control. The learning rates were fixed before.
Reconstruction losses are not compared, since arms reconstruct different things.

``pretrain`` also does the linear probe. WORK/results.jsonl gets a line for each seed, arm and protocol as soon as it is
done, and what is there is not done again.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from maehub import load, save
from maehub.data.sources import Source, find_images
from maehub.data.splits import folds, split_labelled
from maehub.features.inference import outputs
from maehub.figures.plots import Series, curves_picture
from maehub.images.decoding import open_image
from maehub.images.preprocess import Preprocess
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.train.evaluation.linear import accuracy, best, fit_at, sweep
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.loop import finetune
from maehub.train.pretraining.config import PretrainConfig
from maehub.train.pretraining.loop import pretrain

SEEDS = (0, 1, 2)
SHARE = 0.4  # of each class, held out
ENCODER = EncoderConfig(48, 8, 3, 96, 4, 4)
PREPROCESS = Preprocess((48, 48), 8, crop_fraction=1.0)
LONGEST = {"drawings": 128, "photos": 256}  # sides of the copies that are trained on, pixels
PRETRAINING: dict[str, Any] = {
    "steps": 1000,  # about 45 passes over drawings and photos
    "batch_size": 64,
    "base_lr": 2e-3,  # 0.001 at this batch
    "target": "pixels",
    "decoder_width": 48,
    "decoder_depth": 2,
    "decoder_heads": 3,
}
FINETUNING: dict[str, Any] = {
    "recipe": "official",
    "steps": 200,
    "batch_size": 64,
    "base_lr": 2e-3,  # 0.001 at this batch
    "layer_decay": 0.75,
    "drop_path": 0.0,
    "randaugment": "none",
    "mixup": 0.0,
    "cutmix": 0.0,
    "erasing": 0.0,
    "crop_scale": (0.4, 1.0),
}
EVERYWHERE: dict[str, Any] = {"precision": "fp32", "device": "cpu", "workers": 0, "quiet": True, "overwrite": True}
PROTOCOLS = {"probe": "linear probe", "finetune": "fine-tuned"}


class Arm(NamedTuple):
    """One setting that differs from the first arm's."""

    name: str
    differs: dict[str, Any]
    probe: float | None = None  # the same difference in the paper: points of ViT-L after 800 epochs on ImageNet
    finetune: float | None = None


FIRST, CONTROL = "first", "untrained"
ARMS = (
    Arm(FIRST, {}),
    Arm("hide 25 %", {"mask_ratio": 0.25}),
    Arm("hide 50 %", {"mask_ratio": 0.5}, -3.6, 0.0),  # figure 5
    Arm("hide 90 %", {"mask_ratio": 0.9}, -7.4, -1.9),
    Arm("hide blocks, 50 %", {"strategy": "block", "mask_ratio": 0.5}, -1.2, -1.0),  # table 1f
    Arm("hide blocks, 75 %", {"strategy": "block"}, -9.6, -2.1),
    Arm("hide by a grid, 75 %", {"strategy": "grid"}, -7.5, -0.9),
    Arm("normalised pixels", {"target": "normalised_pixels"}, 0.4, 0.5),  # table 1d
    Arm("24 PCA coefficients", {"target": "pca", "pca_components": 24}, -1.2, -0.3),  # an eighth, as 96 of 768
    Arm("mask tokens in the encoder", {"mask_tokens": "encoder"}, -13.9, -0.7),  # table 1c
    Arm("decoder of 1 block", {"decoder_depth": 1}, -4.5, -0.1),  # table 1a, against 2 blocks
    Arm("decoder of 8 blocks", {"decoder_depth": 8}, 3.5, 0.0),
    Arm("crops of fixed size", {"augment": "fixed-crop"}, -0.4, -0.2),  # table 1e
    Arm("no crops, no flips", {"augment": "none"}, -7.8, -0.9),
    Arm(CONTROL, {}),
)


class Result(NamedTuple):
    """One line of results.jsonl."""

    seed: int
    arm: str
    protocol: str
    top1: float  # percent of the held-out drawings
    n: int
    seconds: float
    about: dict[str, Any]


def read_results(work: Path) -> list[Result]:
    path = work / "results.jsonl"
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def missing(work: Path, protocol: str) -> list[tuple[int, Arm]]:
    """Seeds and arms that a protocol has not been done for, seed after seed."""
    done = {(one.seed, one.arm) for one in read_results(work) if one.protocol == protocol}
    return [(seed, arm) for seed in SEEDS for arm in ARMS if (seed, arm.name) not in done]


def write(work: Path, result: Result) -> None:
    with (work / "results.jsonl").open("a") as file:
        file.write(json.dumps(result._asdict()) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {result}", flush=True)


# --- data -----------------------------------------------------------------


def prepare(folder: Path, drawings: Path, photos: Path, seed: int) -> None:
    """The split of a seed as folders, the list to pretrain on, and the encoder that all arms start from."""
    split = split_labelled(drawings, seed=seed, share=SHARE)
    for side, part in (("train", split.training), ("val", split.testing)):
        small_copies(part.samples, folder / "data" / side, LONGEST["drawings"])
    small_copies(find_images(photos), folder / "photos", LONGEST["photos"])
    names = [path.relative_to(folder) for place in ("data/train", "photos") for path in (folder / place).rglob("*.png")]
    (folder / "pretraining.txt").write_text("\n".join(map(str, sorted(names))) + "\n")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        save(Encoder(ENCODER, PREPROCESS), folder / CONTROL)  # last, since it says that all this is done


def small_copies(samples: Source, folder: Path, longest: int) -> None:
    """Pictures at the size that is needed, so that cropping them takes little time beside the network."""
    for index in range(len(samples)):
        target = (folder / os.fsdecode(samples.name(index))).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        image = open_image(samples.source(index))
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        image.save(target)


# --- protocols ------------------------------------------------------------


def pretrained(folder: Path, arm: Arm, seed: int) -> None:
    """Pretrain an arm; its model folder is ``folder / arm.name``."""
    run = folder / "run"
    settings = PRETRAINING | arm.differs
    steps = settings["steps"]
    result = pretrain(
        PretrainConfig(
            str(folder / "pretraining.txt"),
            run,
            from_=str(folder / CONTROL),
            seed=seed,
            holdout=0,
            cache=True,
            validate_every=steps,
            checkpoint_every=steps,
            **settings,
            **EVERYWHERE,
        )
    )
    if result.exit_code:  # it was told to stop
        raise SystemExit(result.exit_code)
    shutil.copy(run / "metrics.jsonl", folder / f"{arm.name}.jsonl")
    (run / "model").rename(folder / arm.name)
    shutil.rmtree(run)


def probed(folder: Path, arm: Arm, seed: int) -> Result:
    """The fast linear probe of class token and patches' mean after the last layer."""
    start = time.perf_counter()
    encoder = load(folder / arm.name)
    split = split_labelled(folder / "data")

    def features(samples: Source) -> torch.Tensor:
        def compute(images: torch.Tensor) -> torch.Tensor:
            return encoder.features(images, pool="cls+mean")

        return outputs(compute, samples, encoder.preprocess, torch.device("cpu"), workers=0, progress=False)

    inner = folds(split.training, 5, seed)  # the penalty is chosen by cross-validation of the training drawings
    known = features(split.training.samples), split.training.labels, len(split.training.classes)
    chosen = best(sweep(*known, inner))
    fit = fit_at(*known, chosen.strength)
    top1 = accuracy(fit.logits(features(split.testing.samples)), split.testing.labels)
    about = {"strength": fit.strength, "inner": chosen.accuracy}
    return Result(seed, arm.name, "probe", top1, len(split.testing), time.perf_counter() - start, about)


def finetuned(folder: Path, arm: Arm, seed: int) -> Result:
    """A short fine-tuning of the whole network."""
    start, run = time.perf_counter(), folder / "run"
    result = finetune(
        FinetuneConfig(
            str(folder / "data"),
            run,
            model=str(folder / arm.name),
            seed=seed,
            skip_twins=True,
            validate_every=FINETUNING["steps"],
            checkpoint_every=FINETUNING["steps"],
            **FINETUNING,
            **EVERYWHERE,
        )
    )
    if result.exit_code or result.scores is None:
        raise SystemExit(result.exit_code)
    shutil.rmtree(run)
    return Result(seed, arm.name, "finetune", result.scores.top1, result.scores.n, time.perf_counter() - start, {})


def pretrain_all(work: Path, drawings: Path, photos: Path) -> None:
    for seed, arm in missing(work, "probe"):
        folder, start = work / f"seed-{seed}", time.perf_counter()
        if not (folder / CONTROL).exists():
            shutil.rmtree(folder, ignore_errors=True)
            prepare(folder, drawings, photos, seed)
        if not (folder / arm.name).exists():
            pretrained(folder, arm, seed)
        result = probed(folder, arm, seed)
        write(work, result._replace(seconds=time.perf_counter() - start))


def finetune_all(work: Path) -> None:
    for seed, arm in missing(work, "finetune"):
        write(work, finetuned(work / f"seed-{seed}", arm, seed))


# --- report ---------------------------------------------------------------


class Difference(NamedTuple):
    """Points of an arm above the first one, over seeds."""

    mean: float
    deviation: float

    @property
    def resolved(self) -> bool:
        return abs(self.mean) > self.deviation


def table(results: Sequence[Result], protocol: str) -> dict[str, list[float]]:
    """Top-1 of each arm, seed after seed; arms that lack a seed are left out."""
    found = {(one.arm, one.seed): one.top1 for one in results if one.protocol == protocol}
    names = [arm.name for arm in ARMS if all((arm.name, seed) in found for seed in SEEDS)]
    return {name: [found[name, seed] for seed in SEEDS] for name in names}


def difference(values: dict[str, list[float]], arm: str) -> Difference:
    pairs = [a - b for a, b in zip(values[arm], values[FIRST], strict=True)]
    return Difference(statistics.mean(pairs), statistics.stdev(pairs))


def markdown(values: dict[str, list[float]], protocol: str) -> str:
    """One table: every arm, its difference from the first, and the paper's."""
    lines = [
        f"| {PROTOCOLS[protocol]} | top-1, % | difference | the paper's |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        if arm.name not in values:
            continue
        mean, deviation = statistics.mean(values[arm.name]), statistics.stdev(values[arm.name])
        words, paper = "", getattr(arm, protocol)
        if arm.name != FIRST:
            found = difference(values, arm.name)
            words = signed(found.mean) + f" ± {found.deviation:.1f}" + ("" if found.resolved else ", not resolved")
        lines.append(
            f"| {arm.name} | {mean:.1f} ± {deviation:.1f} | {words} | {'' if paper is None else signed(paper)} |"
        )
    return "\n".join(lines)


def signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


_INK, _SOFT, _LINE, _BLUE = (27, 31, 36), (110, 118, 128), (214, 219, 225), (31, 111, 180)


def draw(tables: dict[str, dict[str, list[float]]]) -> Image.Image:
    """Differences from the first arm: a dot for the mean, a bar for the deviation; grey where not resolved."""
    font, small = ImageFont.load_default(22), ImageFont.load_default(19)
    names = [arm.name for arm in ARMS if arm.name != FIRST]
    left, across, row, top, gap = 330, 520, 40, 60, 40
    picture = Image.new("RGB", (left + len(tables) * (across + gap), top + row * len(names) + 90), "white")
    pen = ImageDraw.Draw(picture)
    for number, name in enumerate(names):
        pen.text((left - 20, top + row * (number + 0.5)), name, _INK, font, anchor="rm")
    for column, (protocol, values) in enumerate(tables.items()):
        found = {name: difference(values, name) for name in names if name in values}
        low = math.floor(min(0, *(one.mean - one.deviation for one in found.values())) / 5) * 5
        high = math.ceil(max(1, *(one.mean + one.deviation for one in found.values())) / 5) * 5
        start = left + column * (across + gap)

        def x(value: float, start: int = start, low: int = low, high: int = high) -> float:
            return start + (value - low) / (high - low) * across

        pen.text((start, top - 32), f"{PROTOCOLS[protocol]}: points from the first arm", _INK, font, anchor="lm")
        bottom = top + row * len(names)
        for tick in range(low, high + 1, 5):
            pen.line((x(tick), top, x(tick), bottom), _SOFT if tick == 0 else _LINE, 2)
            pen.text((x(tick), bottom + 20), f"{tick:+d}" if tick else "0", _SOFT, small, anchor="mm")
        for number, name in enumerate(names):
            if name not in found:
                continue
            y, one = top + row * (number + 0.5), found[name]
            colour = _BLUE if one.resolved else _SOFT
            pen.line((x(one.mean - one.deviation), y, x(one.mean + one.deviation), y), colour, 4)
            pen.ellipse((x(one.mean) - 7, y - 7, x(one.mean) + 7, y + 7), colour)
    words = "dot: mean of the seeds; bar: standard deviation; grey: not resolved, since the bar reaches 0"
    pen.text((left, picture.height - 18), words, _SOFT, small, anchor="lm")
    return picture


def draw_ratios(tables: dict[str, dict[str, list[float]]]) -> Image.Image | None:
    """Top-1 by the share of patches that pretraining hid, one curve a protocol, as in the paper's figure 5."""
    arms = {25: "hide 25 %", 50: "hide 50 %", 75: FIRST, 90: "hide 90 %"}
    series = []
    for colour, (protocol, values) in enumerate(tables.items()):
        means = {ratio: statistics.mean(values[arm]) for ratio, arm in arms.items() if arm in values}
        steps, tops = np.array(list(means), float), np.array(list(means.values()))
        series.append(Series(PROTOCOLS[protocol], steps, tops, colour, "points"))
    return curves_picture("Top-1, %", series, under="% of the patches hidden in pretraining")


def report(work: Path) -> None:
    """Print the tables, and draw WORK/differences.png and WORK/ratios.png."""
    results = read_results(work)
    tables = {protocol: table(results, protocol) for protocol in PROTOCOLS}
    tables = {protocol: values for protocol, values in tables.items() if FIRST in values and len(values) > 1}
    if not tables:
        raise SystemExit(f"{work}: no arm has been done for all of the seeds {SEEDS} yet")
    count = {one.n for one in results}
    print(
        f"{len(SEEDS)} seeds, {'/'.join(map(str, sorted(count)))} held-out drawings each; mean ± standard deviation\n"
    )
    print(f"{FIRST}: 75 % hidden at random, pixels, a decoder of 2 blocks that gets the mask tokens, random crops\n")
    for protocol, values in tables.items():
        print(markdown(values, protocol) + "\n")
    for protocol in tables:
        seconds = [one.seconds for one in results if one.protocol == protocol]
        print(f"{protocol}: {statistics.median(seconds):.0f} s an arm and seed, median of {len(seconds)}")
    draw(tables).save(work / "differences.png")
    if ratios := draw_ratios(tables):
        ratios.save(work / "ratios.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pretrain", "finetune", "report"):
        command = commands.add_parser(name)
        command.add_argument("work", type=Path)
        if name == "pretrain":
            command.add_argument("drawings", type=Path, help="the labelled folder openclipart")
            command.add_argument("photos", type=Path, help="a folder of photos, pretrained on beside the drawings")
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    if told.command == "pretrain":
        pretrain_all(told.work, told.drawings, told.photos)
    elif told.command == "finetune":
        finetune_all(told.work)
    else:
        report(told.work)


if __name__ == "__main__":
    main()
