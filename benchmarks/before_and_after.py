"""Whether this checkout is as fast as another: start-up, ViT-H ready, features of a folder, crops, pretraining steps.

    python benchmarks/before_and_after.py --before ../base [--rounds 9] [--folder WHERE]

Every measurement is a fresh process of one thread that sees one of the checkouts. The two take turns, round after
round, and the first of each turn changes with the round. A ratio is the median before, divided by the median after:
1.00 is as fast, less is slower. ViT-H has random weights (2.5 GB in --folder, or a temporary folder).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
# What a child runs; it prints seconds, or nothing where the whole process counts.
ROWS = {
    "import maehub": ["-c", "import maehub"],
    "maehub --help": ["-m", "maehub", "--help"],
    "maehub list": ["-m", "maehub", "list"],
    "ViT-H ready": "import torch; maehub.load; start = time.perf_counter(); maehub.load('./huge')",
    "features of a folder": "encoder = maehub.load('vit-nano'); start = time.perf_counter(); "
    "maehub.extract_features(encoder, 'photos', workers=1, batch_size=32, progress=False)",
    "crops": "import warnings; warnings.simplefilter('ignore'); "
    "from maehub.train.augment import Augmentation, crop; start = time.perf_counter(); "
    "[crop(path, (224, 224), 3, Augmentation(), seed) for seed in range(3) for path in glob.glob('photos/*')]",
    "pretraining steps": "maehub.train.pretrain(maehub.train.PretrainConfig(data='photos', out=Path(f'{os.getpid()}'), "
    "model='vit-nano', steps=16, batch_size=8, workers=0, image_size=(96,), device='cpu', cache=True, "
    "validate_every=1000, quiet=True)); start = time.perf_counter() - steps()",
}
FRAME = """
import glob, json, os, statistics, time
from pathlib import Path
import maehub, maehub.train
def steps():
    lines = map(json.loads, open(f"{os.getpid()}/metrics.jsonl"))
    return 8 / statistics.median([line["images_per_second"] for line in lines if "images_per_second" in line][4:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where 2.5 GB are free")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    rows = {name: row for name, row in ROWS.items() if options.only in name}
    sides = [options.before.resolve(), HERE]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        prepare(work, "ViT-H ready" in rows)
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
        for number in range(options.rounds + 1):
            for name, row in rows.items():
                for side in (0, 1) if number % 2 else (1, 0):
                    seconds = measured(row, sides[side], work)
                    if number:  # the first round fills caches
                        times[name][side].append(seconds)
    print(f"Python {sys.version.split()[0]}, {options.rounds} interleaved rounds, one thread\n")
    print("| | before, median ms | after, median ms | ratio |\n|---|---|---|---|")
    for name, both in times.items():
        before, after = (1000 * statistics.median(values) for values in both)
        print(f"| {name} | {before:.1f} | {after:.1f} | {before / after:.3f} |")


def prepare(work: Path, huge: bool) -> None:
    """Photos enlarged by different factors, and random weights of ViT-H where they are asked for."""
    (work / "photos").mkdir()
    sources = [Image.open(path).convert("RGB") for path in sorted((HERE / "maehub" / "assets").glob("*.jpg"))]
    for number in range(128):
        source = sources[number % len(sources)]
        size = (400 + number, 300 + number)
        noisy = np.asarray(source.resize(size)) + np.random.default_rng(number).normal(0, 4, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(work / "photos" / f"{number:03}.jpg", quality=92)
    if huge:
        code = (
            "import maehub, torch; from maehub.models import PRESETS; torch.manual_seed(0); "
            "maehub.save(maehub.Encoder(PRESETS['vit-h']), 'huge')"
        )
        subprocess.run([sys.executable, "-c", code], cwd=work, env=environment(HERE), check=True)


def environment(checkout: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "MAEHUB_CACHE": "/nonexistent"}
    return os.environ | offline | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def measured(row: str | list[str], checkout: Path, work: Path) -> float:
    """Seconds that a row takes in a process of its own."""
    command = row if isinstance(row, list) else ["-c", f"{FRAME}{row}; print('took', time.perf_counter() - start)"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=work, env=environment(checkout), capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{checkout}: {row}\n{done.stderr}")
    return taken if isinstance(row, list) else float(done.stdout.rsplit("took", 1)[1])


if __name__ == "__main__":
    main()
