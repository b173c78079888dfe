"""From a folder of labelled pictures to a classifier: fine-tune, look at the number, ask it about new pictures.

    python examples/finetune_folder.py labelled/ runs/small 40

labelled/ holds one folder a class. If it is not there, it is made, with a class for each of the two photos that come
with maehub and tiles of them as pictures: easy to tell apart, but it shows everything in a minute, offline. The same
run as a command: maehub finetune labelled/ -m vit-nano -o runs/small --steps 40
"""

import sys
from pathlib import Path

from PIL import Image

import maehub
from maehub.train import FinetuneConfig, finetune, predict

ASSETS = Path(maehub.__file__).parent / "assets"


def make_labelled(folder: Path, side: int = 64, most: int = 24) -> None:
    """Write tiles of the two photos, a folder for each; no two tiles share a pixel."""
    for name in ("cat", "coffee"):
        photo = Image.open(ASSETS / f"{name}.jpg").convert("RGB")
        corners = [(x, y) for y in range(0, photo.height - side, side) for x in range(0, photo.width - side, side)]
        (folder / name).mkdir(parents=True)
        for number, (left, top) in enumerate(corners[:most]):
            photo.crop((left, top, left + side, top + side)).save(folder / name / f"{number:02}.png")


def main(data: Path, run: Path, steps: int) -> None:
    if not data.exists():
        make_labelled(data)

    # Recipe, batch and split follow from the model and the data; each can be given instead.
    config = FinetuneConfig(data, run, model="vit-nano", steps=steps, resume=run.exists())
    result = finetune(config)
    if result.scores is not None:  # None where a finished run was found
        scores = result.scores
        print(scores)
        print(f"\nfrom {scores.n} pictures no more is known than {scores.low:.0f} to {scores.high:.0f} % right\n")

    classifier = maehub.load(run)  # the run folder, or its model/, which is what one would publish
    print(f"classes: {', '.join(classifier.config.class_names)}")
    print(predict(classifier, [ASSETS / "cat.jpg", ASSETS / "coffee.jpg"]))
    print(f"\ncurves, the confusion matrix and the worst mistakes: {run / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: finetune_folder.py FOLDER RUN STEPS")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
