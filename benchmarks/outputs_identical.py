"""Whether two checkouts compute the same, byte for byte: features, 20 steps of pretraining, 20 of fine-tuning.

    python benchmarks/outputs_identical.py --before ../base --after .

Each runs the same commands on the same pictures, in processes of its own with one thread. Compared are the features of
the photos that come with maehub, every line of metrics.jsonl without what the clock decides, and the final weights.
Exits with 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

BY_THE_CLOCK = {"images_per_second", "data_wait", "memory_gb"}
TRAINING = "--steps 20 --batch-size 8 --image-size 32 --workers 0 --device cpu --seed 3 --validate-every 10 --quiet"
COMMANDS = (
    "features photos -m vit-nano -o features.npz --workers 1 --device cpu --quiet",
    f"pretrain drawings -m vit-nano -o pretrained {TRAINING}",
    f"finetune drawings -m vit-nano -o finetuned {TRAINING}",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, required=True, help="another")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = []
        for side in ("before", "after"):
            folder = Path(name, side)
            draw(folder / "drawings")
            (folder / "photos").mkdir()
            for photo in options.before.glob("maehub/assets/*.jpg"):
                (folder / "photos" / photo.name).write_bytes(photo.read_bytes())
            environment = os.environ | {"PYTHONPATH": str(getattr(options, side).resolve()), "OMP_NUM_THREADS": "1"}
            for command in COMMANDS:
                subprocess.run(
                    [sys.executable, "-m", "maehub", *command.split()], cwd=folder, env=environment, check=True
                )
            found.append(digests(folder))
    before, after = found
    print("| output | before | after | |\n|---|---|---|---|")
    for output in sorted(before | after):
        one, other = before.get(output, "–"), after.get(output, "–")
        print(f"| {output} | {one} | {other} | {'same' if one == other else 'DIFFERENT'} |")
    return int(before != after)


def draw(folder: Path) -> None:
    """24 pictures of two classes, which follow from nothing but this file."""
    rows, columns = np.mgrid[:40, :40]
    for number in range(24):
        pattern = rows * (number + 3) + columns * (number % 7) + rows * columns * (number % 2)
        path = folder / ("waves" if number % 2 else "lines") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([pattern, pattern.T, 255 - pattern], axis=2).astype(np.uint8)).save(path)


def digests(folder: Path) -> dict[str, str]:
    """The first digits of a sha256 of each output."""
    with np.load(folder / "features.npz") as table:
        found = {"features": digest(table["features"].tobytes())}
    for run in ("pretrained", "finetuned"):
        lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        kept = [{name: value for name, value in line.items() if name not in BY_THE_CLOCK} for line in lines]
        found[f"{run}, {len(kept)} lines of metrics"] = digest(json.dumps(kept, sort_keys=True).encode())
        tensors = load_file(folder / run / "model" / "model.safetensors")
        content = b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))
        found[f"{run}, {len(tensors)} tensors"] = digest(content)
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
