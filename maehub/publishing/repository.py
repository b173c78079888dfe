"""The folder that is published: a model folder, and beside it figures, numbers, the recipe and checksums.

    config.json  model.safetensors  timm/model.safetensors  preprocessor_config.json     see `maehub.weights`
    README.md                 the card, see `maehub.publishing.published_card`
    figures/                  reconstructions of the photos that come with maehub, and curves
    metrics.json              what was measured on held-out pictures, where something was
    metrics.jsonl             loss and rate, a line a step, where a run wrote them
    recipe.json               the settings of the training, without paths
    checksums.sha256          of every other file, as sha256sum writes and checks them

Only these files, and pictures that the author names, are ever in it: nothing is copied from the author's folders.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from maehub.dense import Detector, Segmenter, load_detector, load_segmenter, write_beside
from maehub.errors import IntegrityError
from maehub.figures import Series, curves_picture, raw_and_smooth, reconstruct
from maehub.figures import grid as figure_grid
from maehub.files import read_json, sha256_file, write_json, write_text
from maehub.images import open_image
from maehub.models import Encoder, MaskedAutoencoder
from maehub.publishing.gate import Verdict, check_repository
from maehub.publishing.licences import Licence
from maehub.publishing.provenance import Provenance
from maehub.publishing.published_card import published_card
from maehub.weights import write_members

_PHOTOS = tuple(Path(__file__).parents[1] / "assets" / name for name in ("cat.jpg", "coffee.jpg"))


def build_repository(
    folder: Path,
    model: Encoder | MaskedAutoencoder,
    repo_id: str,
    licence: Licence,
    provenance: Provenance,
    about: str,
    dataset: str,
    pictures: Sequence[str | Path],
    dense: Segmenter | Detector | None = None,
) -> Verdict:
    """Write the repository into an empty folder, and let every library that is named in it read it back.

    The model is on the CPU, in eval mode; ``about``, ``dataset`` and ``pictures`` are what the author says.
    ``dense`` is the segmenter or detector that it is the encoder of.
    """
    name = repo_id.rpartition("/")[2]
    write_members(folder, name, model)
    if dense is not None:
        write_beside(folder, dense)
        _check_dense(folder, dense)
    figures = _draw(folder, model, name, provenance)
    if provenance.scores:
        write_json(folder / "metrics.json", provenance.scores)
    if provenance.curve:
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in provenance.curve))
    if provenance.recipe:
        write_json(folder / "recipe.json", {"command": provenance.command, "settings": provenance.recipe})
    names = [f"pictures/{number + 1}.png" for number in range(len(pictures))]
    for source, target in zip(pictures, names, strict=True):
        picture = open_image(source)  # written anew, so that nothing else that a file holds goes along
        picture.info.clear()  # where Pillow keeps profiles and texts, and writes them from
        (folder / target).parent.mkdir(exist_ok=True)
        picture.save(folder / target)
    verdict = check_repository(folder, model)
    card = published_card(repo_id, model, licence, provenance, verdict, about, dataset, figures, names, dense)
    config = read_json(folder / "config.json")
    config["maehub"]["verified"] = {library: at for library, at in verdict.verified.items() if library != "maehub"}
    if "pretrained_cfg" in config:
        config["pretrained_cfg"]["license"] = licence.identifier
    for name in ("README.md", "config.json"):  # which were those of a model folder
        (folder / name).unlink()
    write_text(folder / "README.md", card)
    write_json(folder / "config.json", config)
    lines = [f"{sha256_file(path)}  {name}" for name, path in files_of(folder).items()]
    write_text(folder / "checksums.sha256", "\n".join(lines) + "\n")
    return verdict


def _check_dense(folder: Path, dense: Segmenter | Detector) -> None:
    """See that what was written finds the same in a photo that comes with maehub."""
    if isinstance(dense, Segmenter):
        same = np.array_equal(load_segmenter(folder).predict(_PHOTOS[0]), dense.predict(_PHOTOS[0]))
    else:
        found = [one.predict(_PHOTOS[0]) for one in (load_detector(folder), dense)]
        same = np.array_equal(found[0].boxes, found[1].boxes) and np.array_equal(found[0].labels, found[1].labels)
    if not same:
        raise IntegrityError("what was written finds something else in a photo than the model; nothing was sent")


def files_of(folder: Path) -> dict[str, Path]:
    """Every file, by its name in the repository, in the order of names."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _draw(folder: Path, model: Encoder | MaskedAutoencoder, name: str, provenance: Provenance) -> dict[str, str]:
    """The figures of the card: role to name in the repository."""
    curve = provenance.curve
    drawn: dict[str, Image.Image | None] = {}
    if isinstance(model, MaskedAutoencoder) and model.config.has_picture and model.config.encoder.channels in (1, 3):
        drawn["reconstruction"] = figure_grid([replace(reconstruct(model, photo), name=name) for photo in _PHOTOS])
    loss = raw_and_smooth("training", *_numbers(curve, "loss"), 0)
    for number, (key, words) in enumerate({"mean_fill": "mean colour", "interpolation": "interpolation"}.items()):
        loss.append(Series(words, *_numbers(curve, key), 2 + number))
    loss.append(Series("validation", *_numbers(curve, "val_loss"), 1, "points"))
    right = [
        Series(f"{words}, % of the held-out pictures", *_numbers(curve, key), 1, "points")
        for key, words in (("val_top1", "top-1"), ("val_r2", "R²"), ("val_miou", "mIoU"), ("val_ap50", "AP50"))
    ]
    drawn |= {"curve": curves_picture("Loss", loss), "accuracy": curves_picture("Accuracy", right)}
    figures = {}
    for role, picture in drawn.items():
        if picture:
            figures[role] = f"figures/{role}.png"
            (folder / "figures").mkdir(exist_ok=True)
            picture.save(folder / figures[role])
    return figures


def _numbers(curve: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[key]) for line in curve if key in line and "step" in line]
    return np.array([step for step, _ in points], float), np.array([value for _, value in points], float)
