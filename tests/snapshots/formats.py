"""Headers and layouts of what maehub writes: names of files, keys, tensors; no value and no number of bytes."""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

import maehub
from maehub import cli

HERE = "--workers 0 --device cpu --quiet".split()
TRAINING = [*HERE, *"--steps 2 --batch-size 4 --checkpoint-every 1 --keep 1 --validate-every 1".split()]
FORMS = ("maehub", "official", "timm", "transformers", "lightly", "mmpretrain", "detectron2")


def formats():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, models = _pictures(folder / "pictures"), _models(folder)
        return {
            "model folders": {kind: layout(models[kind]) for kind in models},
            "converted": _converted(folder, models["autoencoder"]),
            "packed": header(maehub.verify("vit-nano")[0].path),
            "features": _tables(folder, pictures, models["encoder"]),
            "features, unfinished": _unfinished(folder, models["encoder"]),
            "runs": _runs(folder, pictures, models["autoencoder"]),
            "evaluations": _evaluations(folder, pictures, models),
            "figures": _figures(folder),
        }


def _pictures(folder):
    """Two classes of six; one of them twice, on purpose."""
    generator = np.random.default_rng(0)
    for number in range(12):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return folder


def _models(folder):
    torch.manual_seed(0)
    small = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2}
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    encoder = maehub.EncoderConfig(**small)
    classifier = maehub.EncoderConfig(**small, classes=2, pool="mean", class_names=("a", "b"))
    models = {
        "encoder": maehub.Encoder(encoder),
        "classifier": maehub.Encoder(classifier),
        "autoencoder": maehub.MaskedAutoencoder(maehub.AutoencoderConfig(encoder, **decoder)),
        "autoencoder that transformers has not": maehub.MaskedAutoencoder(
            maehub.AutoencoderConfig(encoder, **decoder, mask_tokens="encoder")
        ),
    }
    return {kind: maehub.save(model, folder / "models" / kind) for kind, model in models.items()}


def _converted(folder, source):
    """An autoencoder in the words of other libraries."""
    return {form: layout(maehub.convert(source, folder / form, to=form).folder) for form in FORMS}


def _tables(folder, pictures, source):
    found = {}
    for ending in ("safetensors", "npz", "parquet", "csv"):
        out = folder / f"features.{ending}"
        table = maehub.extract_features(maehub.load(source), pictures, workers=0, progress=False, out=out)
        found[ending] = {"provenance": keys(table.provenance)} | _columns(out)
    return found


def _columns(path):
    if path.suffix == ".safetensors":
        return header(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: f"{arrays[name].dtype} {arrays[name].ndim}D" for name in arrays}  # text has no fixed length
    if path.suffix == ".csv":
        first, names, row = path.read_text().splitlines()[:3]
        first = " ".join(sorted(json.loads(first.removeprefix("# "))))
        return {"first line": first, "columns": names, "row": len(row.split(","))}
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    return {name: str(schema.field(name).type) for name in schema.names} | {
        "metadata": sorted(key.decode() for key in schema.metadata)
    }


def _unfinished(folder, source):
    """What lies there after the second of two pictures could not be read."""
    paths = [folder / "pictures" / "a" / "0.png", folder / "broken.png"]
    paths[1].write_bytes(b"no picture")
    try:
        maehub.extract_features(
            maehub.load(source), paths, workers=0, progress=False, out=folder / "broken.npz", batch_size=1
        )
    except maehub.MaehubError as error:
        return {"exit code": error.exit_code} | layout(folder / "broken.npz.partial")


def _runs(folder, pictures, source):
    lines = {
        "pretrain": ["pretrain", str(pictures), "--from", str(source)],
        "finetune": ["finetune", str(pictures), "-m", str(source)],
    }
    found = {}
    for name, words in lines.items():
        code = cli.main([*words, "-o", str(folder / name), *TRAINING])
        found[name] = {"exit code": code} | layout(folder / name)
    return found


def _evaluations(folder, pictures, models):
    lines = {
        "evaluate": ["evaluate", str(pictures), "-m", str(models["classifier"]), "-o", str(folder / "evaluation")],
        "predict.csv": ["predict", str(pictures), "-m", str(models["classifier"]), "-o", str(folder / "predict.csv")],
        "predict.json": ["predict", str(pictures), "-m", str(models["classifier"]), "-o", str(folder / "predict.json")],
        "probe": ["probe", str(pictures), "-m", str(models["encoder"]), "-o", str(folder / "probe")],
        "knn": ["knn", str(pictures), "-m", str(models["encoder"]), "-o", str(folder / "knn.json")],
    }
    found = {}
    for name, words in lines.items():
        code, out = cli.main([*words, *HERE]), Path(words[-1])
        found[name] = {"exit code": code} | (layout(out) if out.is_dir() else {out.name: inside(out)})
    return found


def _figures(folder):
    photo = Path(maehub.verify("vit-nano")[0].path).with_name("cat.jpg")
    out = folder / "figure.png"
    code = cli.main(["reconstruct", str(photo), "-o", str(out), "--device", "cpu", "--quiet"])
    with Image.open(out) as figure:
        return {"exit code": code, "reconstruct": "×".join(map(str, figure.size))}


# -- what is in a folder, a file, a value


def layout(folder):
    """What each file holds; without mistakes.png, which is there if there were mistakes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "mistakes.png"]
    return {str(path.relative_to(folder)): inside(path) for path in files}


def inside(path):
    if path.suffix == ".safetensors":
        return header(path)
    if path.name == "certificate.json":
        return " ".join(sorted(json.loads(path.read_text())))
    if path.suffix == ".json":
        return keys(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return sorted({" ".join(sorted(json.loads(line))) for line in path.read_text().splitlines()})
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return next(csv.reader(file))
    return ""


def header(path):
    """Tensors by type and shape, and the keys of the metadata."""
    with safe_open(path, "pt") as file:
        alike = {}
        for name in sorted(file.keys()):
            tensor = file.get_slice(name)
            alike.setdefault(" ".join([tensor.get_dtype(), *map(str, tensor.get_shape())]), []).append(name)
        found = {kind: " ".join(names) for kind, names in alike.items()}
        return found | {"metadata": " ".join(sorted(file.metadata() or {}))}


def keys(value):
    """The keys of JSON, those with no other keys below them on one line; no value, which may rest on rounding."""
    if isinstance(value, list):
        return [keys(value[0])] if value and isinstance(value[0], dict) else ""
    if not isinstance(value, dict):
        return ""
    below = {name: keys(part) for name, part in value.items()}
    line = " ".join(sorted(name for name in value if not below[name]))
    below = {name: part for name, part in below.items() if part}
    return {"": line} | below if below else line
