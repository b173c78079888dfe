"""From a folder of labelled pictures to a classifier: fine-tune, look at the number, ask it about new pictures.

    python examples/finetune_folder.py labelled/ runs/small 60

labelled/ holds one folder a class. If it is not there, it is made, with a class for each of the two photos that come
with maehub and crops of them as pictures: easy to tell apart, but it shows everything in a minute, offline. The same
run as a command: maehub finetune labelled/ -m vit-nano -o runs/small --steps 60
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import maehub
from maehub.train import FinetuneConfig, finetune, predict

ASSETS = Path(maehub.__file__).parent / "assets"


def make_labelled(folder: Path, count: int = 24, side: int = 128) -> None:
    """Write crops of the two photos, a folder for each."""
    generator = np.random.default_rng(0)
    for name in ("cat", "coffee"):
        photo = Image.open(ASSETS / f"{name}.jpg").convert("RGB")
        (folder / name).mkdir(parents=True)
        for number in range(count):
            left, top = (int(generator.integers(0, length - side)) for length in photo.size)
            photo.crop((left, top, left + side, top + side)).save(folder / name / f"{number:02}.png")


def main(data: Path, run: Path, steps: int) -> None:
    if not data.exists():
        make_labelled(data)

    # The recipe, the batch and the split follow from the model and the data; everything can be said instead.
    config = FinetuneConfig(data, run, model="vit-nano", steps=steps, resume=run.exists())
    result = finetune(config)
    if result.scores is not None:  # None where a finished run was found
        scores = result.scores
        print(scores)
        print(f"between {scores.low:.0f} and {scores.high:.0f} % of new pictures like these {scores.n} would be right")

    classifier = maehub.load(run)  # the run folder, or its model/, which is what one would publish
    print(f"classes: {', '.join(classifier.config.class_names)}; pictures of {classifier.config.image_size} pixels")
    print(predict(classifier, [ASSETS / "cat.jpg", ASSETS / "coffee.jpg"]))
    print(f"curves, the confusion matrix and the worst mistakes: {run / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: finetune_folder.py FOLDER RUN STEPS")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
