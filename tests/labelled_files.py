"""Small labelled data on the disk: class folders, CSVs, tar shards, saved datasets."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from maehub.data.labels import find_labelled


def png(number=0):
    file = io.BytesIO()
    Image.new("L", (8, 6), number % 256).save(file, "PNG")
    return file.getvalue()


def read_labelled(data, **given):
    return find_labelled(data, **given).labelled


def lay(folder, *names):
    """Picture files below a folder; a name that ends with a slash is an empty folder."""
    for number, name in enumerate(names):
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def write_tar(path, members):
    """A shard of (key, class or None)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (key, label) in enumerate(members):
            parts = [(f"{key}.png", png(number))] + ([] if label is None else [(f"{key}.cls", str(label).encode())])
            for name, data in parts:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_csv(folder, text, **options):
    path = folder / "labels.csv"
    path.write_text(text, **({"encoding": "utf-8"} | options))
    return path


def table(columns, **features):
    datasets = pytest.importorskip("datasets")
    count = len(next(iter(columns.values())))
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(count)]} | columns
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for name, kind in features.items():
        made = made.cast_column(name, kind)
    return made


def words(labelled):
    """Names to classes."""
    found = {}
    for index in range(len(labelled)):
        row = labelled.labels[index]
        places = np.flatnonzero(row).tolist() if labelled.multi_label else [int(row)]
        told = [labelled.classes[place] for place in places]
        found[os.fsdecode(labelled.samples.name(index))] = told if labelled.multi_label else told[0]
    return found
