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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maehub.errors import UsageError
from maehub.figures import Series, curves_picture, raw_and_smooth, reconstruct
from maehub.figures import grid as figure_grid
from maehub.files import atomic_write, read_json, sha256_file, write_json, write_text
from maehub.hub import model_info
from maehub.images import open_image
from maehub.models import Encoder, MaskedAutoencoder, Origin
from maehub.publishing.gate import Verdict, check_repository
from maehub.publishing.licences import Licence
from maehub.publishing.provenance import Provenance
from maehub.publishing.published_card import Page, published_card
from maehub.weights import write_members

_PHOTOS = tuple(Path(__file__).parents[1] / "assets" / name for name in ("cat.jpg", "coffee.jpg"))
_CHECKSUMS = "checksums.sha256"
_BASELINES = {"mean_fill": "mean colour", "interpolation": "interpolation"}
_PICTURES = "pictures"


@dataclass(frozen=True)
class Words:
    """What the author says."""

    about: str = ""
    dataset: str = ""
    pictures: tuple[Path, ...] = ()


def build_repository(
    folder: Path,
    model: Encoder | MaskedAutoencoder,
    repo_id: str,
    licence: Licence,
    provenance: Provenance,
    words: Words,
) -> Verdict:
    """Write the repository into an empty folder, and let every library that is named in it read it back.

    Args:
        folder: exists and is empty.
        model: on the CPU, in eval mode.
        repo_id: where it will lie, for the card.
        licence, provenance: of the weights.
        words: of the author.
    """
    write_members(folder, repo_id.rpartition("/")[2], model)
    figures = _draw(folder, model, repo_id.rpartition("/")[2], provenance)
    if provenance.scores:
        write_json(folder / "metrics.json", provenance.scores)
    if provenance.curve:
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in provenance.curve))
    if provenance.recipe:
        write_json(folder / "recipe.json", {"command": provenance.command, "settings": provenance.recipe})
    pictures = _copy_pictures(folder, words.pictures)
    verdict = check_repository(folder, model)
    origin = model.origin if isinstance(model, Encoder) else model.encoder.origin
    page = Page(
        repo_id,
        model.config,
        model.preprocess,
        origin,
        licence,
        provenance,
        verdict.verified,
        verdict.missing,
        base_model_of(origin),
        words.about,
        words.dataset,
        figures,
        pictures,
    )
    _rewrite(folder / "README.md", published_card(page))
    _record_verified(folder / "config.json", verdict, licence)
    lines = [f"{sha256_file(path)}  {name}" for name, path in files_of(folder).items()]
    write_text(folder / _CHECKSUMS, "\n".join(lines) + "\n")
    return verdict


def files_of(folder: Path) -> dict[str, Path]:
    """Every file, by its name in the repository, in the order of names."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def base_model_of(origin: Origin | None) -> str:
    """The Hub id of what weights were trained from; empty where it has none."""
    if origin is None:
        return ""
    try:
        sources = model_info(origin.name).sources
    except UsageError:
        name = origin.name.partition("@")[0]
        return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else ""
    return next((source.repo for source in sources if source.kind == "hub"), "")


def _draw(folder: Path, model: Encoder | MaskedAutoencoder, name: str, provenance: Provenance) -> dict[str, str]:
    """The figures of the card: role to name in the repository."""
    drawn: dict[str, Image.Image] = {}
    if isinstance(model, MaskedAutoencoder) and model.config.has_picture and model.config.encoder.channels in (1, 3):
        drawn["reconstruction"] = figure_grid([replace(reconstruct(model, photo), name=name) for photo in _PHOTOS])
    if curve := curves_picture("Loss", _loss(provenance.curve)):
        drawn["curve"] = curve
    accuracy = _series(provenance.curve, "val_top1", "top-1, % of the held-out pictures", 1)
    if accuracy and (curve := curves_picture("Accuracy", accuracy)):
        drawn["accuracy"] = curve
    if drawn:
        (folder / "figures").mkdir()
    for role, picture in drawn.items():
        picture.save(folder / "figures" / f"{role}.png")
    return {role: f"figures/{role}.png" for role in drawn}


def _loss(curve: Sequence[Mapping[str, float]]) -> list[Series]:
    steps, values = _numbers(curve, "loss")
    series = raw_and_smooth("training", steps, values, 0)
    for number, (key, words) in enumerate(_BASELINES.items()):
        steps, values = _numbers(curve, key)
        series.append(Series(words, steps, values, 2 + number))
    return [*series, *_series(curve, "val_loss", "validation", 1)]


def _series(curve: Sequence[Mapping[str, float]], key: str, words: str, colour: int) -> list[Series]:
    steps, values = _numbers(curve, key)
    return [Series(words, steps, values, colour, "points")] if len(values) else []


def _numbers(curve: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[key]) for line in curve if key in line and "step" in line]
    return np.array([step for step, _ in points], float), np.array([value for _, value in points], float)


def _copy_pictures(folder: Path, pictures: Sequence[Path]) -> tuple[str, ...]:
    """Pictures that the author named, decoded and written anew, so that nothing else that a file holds goes along."""
    names = []
    for number, path in enumerate(pictures):
        picture = open_image(path)
        names.append(f"{_PICTURES}/{number + 1}.png")
        (folder / _PICTURES).mkdir(exist_ok=True)
        picture.save(folder / names[-1])
    return tuple(names)


def _record_verified(path: Path, verdict: Verdict, licence: Licence) -> None:
    """``config.json`` names the libraries that read this very folder, and the licence."""
    values: dict[str, Any] = read_json(path)
    values["maehub"]["verified"] = {name: known for name, known in verdict.verified.items() if name != "maehub"}
    if "pretrained_cfg" in values:
        values["pretrained_cfg"]["license"] = licence.identifier
    _rewrite(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _rewrite(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
