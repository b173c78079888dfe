"""Twins across a split: photos compressed, scaled and cropped anew are found; drawings that look alike are not."""

import csv
import hashlib
import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import skimage
from labelled_files import read_labelled, write_tar
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from maehub.data.duplicates import _near, _Prints, _read, difference_hashes, find_twins
from maehub.data.labels import Labelled
from maehub.data.listing import Names
from maehub.data.sources import Samples, find_images
from maehub.errors import DataError

PHOTOS = "coffee camera astronaut ihc retina rocket chelsea moon hubble_deep_field coins cell".split()
INK = {"black": (20, 20, 20), "red": (200, 30, 30), "blue": (40, 60, 200)}


def photos():
    folder = Path(skimage.__file__).parent / "data"
    found = {name: Image.open(next(folder.glob(f"{name}.*"))).convert("RGB") for name in PHOTOS}
    for picture in found.values():
        picture.thumbnail((640, 640))
    return found | {name: Image.fromarray(image) for name, image in zip("cf", load_sample_images().images, strict=True)}


def labelled(folder, label=0):
    samples = find_images(folder)
    return Labelled(samples, np.full(len(samples), label), ("a", "b"))


def stem(samples, index):
    return os.path.basename(os.fsdecode(samples.name(index))).split(".")[0]


def named(twins, pairs):
    return {stem(twins.testing.samples, one): stem(twins.training.samples, other) for one, other in pairs}


def cropped(image, share):
    left, top = round(image.width * share), round(image.height * share)
    return image.crop((left, top, image.width - left, image.height - top))


def resized(image, scale):
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


CHANGES = {
    "compressed": (lambda image: image, {"format": "JPEG", "quality": 50}),
    "much compressed": (lambda image: image, {"format": "JPEG", "quality": 20}),
    "halved": (lambda image: resized(image, 0.5), {"format": "JPEG", "quality": 85}),
    "enlarged": (lambda image: resized(image, 1.7), {"format": "JPEG", "quality": 85}),
    "in another format": (lambda image: image, {"format": "WEBP", "quality": 80}),
    "cropped": (lambda image: cropped(image, 0.02), {"format": "JPEG", "quality": 80}),
}
NOT_WHEN_CROPPED = {"hubble_deep_field", "coins"}  # points and rims move by half a cell


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for name, image in photos().items():
        image.save(folder / f"{name}.png", compress_level=1)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_photos_that_were_saved_anew(originals, tmp_path, change):
    alter, options = CHANGES[change]
    for path in originals.iterdir():
        alter(Image.open(path)).save(tmp_path / path.name, **options)
    twins = find_twins(labelled(originals), labelled(tmp_path), workers=0)
    assert twins.exact == []
    found = named(twins, twins.near)
    assert all(name == other for name, other in found.items())
    missing = {path.stem for path in originals.iterdir()} - set(found)
    assert missing <= (NOT_WHEN_CROPPED if change == "cropped" else set())


def test_photos_are_not_twins_of_each_other(originals):
    check_none_is_a_twin(labelled(originals))


def check_none_is_a_twin(whole):
    """Each picture is compared with each other one in the split by a bit in which their numbers differ."""
    numbers = np.arange(len(whole))
    for bit in range(len(whole).bit_length()):
        sides = [whole.take(np.flatnonzero(numbers >> bit & 1 == side)) for side in (0, 1)]
        twins = find_twins(*sides, workers=0)
        assert (named(twins, twins.exact), named(twins, twins.near)) == ({}, {})


def drawings(folder):
    """Signs on white, each unlike the others to a person."""
    for number, (name, ink) in enumerate(INK.items()):
        shapes = {
            "ring": lambda draw, ink: draw.ellipse((60, 60, 240, 240), outline=ink, width=24),
            "disc": lambda draw, ink: draw.ellipse((60, 60, 240, 240), fill=ink),
            "small-disc": lambda draw, ink: draw.ellipse((120, 120, 180, 180), fill=ink),
            "square": lambda draw, ink: draw.rectangle((60, 60, 240, 240), fill=ink),
            "up": lambda draw, ink: draw.polygon([(150, 50), (250, 250), (50, 250)], fill=ink),
            "down": lambda draw, ink: draw.polygon([(150, 250), (250, 50), (50, 50)], fill=ink),
            "cross": lambda draw, ink: [draw.line((60, 60, 240, 240), ink, 26), draw.line((60, 240, 240, 60), ink, 26)],
            "plus": lambda draw, ink: [
                draw.line((150, 50, 150, 250), ink, 26),
                draw.line((50, 150, 250, 150), ink, 26),
            ],
            "bar": lambda draw, ink: draw.rectangle((50, 130, 250, 170), fill=ink),
            "pole": lambda draw, ink: draw.rectangle((130, 50, 170, 250), fill=ink),
            "corner": lambda draw, ink: draw.rectangle((20, 20, 110, 110), fill=ink),
            "face": lambda draw, ink: [
                draw.ellipse((50, 50, 250, 250), outline=ink, width=10),
                draw.ellipse((100, 110, 125, 135), fill=ink),
                draw.ellipse((175, 110, 200, 135), fill=ink),
                draw.arc((100, 120, 200, 210), 20, 160, ink, 10),
            ],
        }
        for place, (shape, paint) in enumerate(shapes.items()):
            if place % len(INK) != number:
                continue
            image = Image.new("RGB", (300, 300), "white")
            paint(ImageDraw.Draw(image), ink)
            image.save(folder / f"{shape}-{name}.png")
    return folder


def test_drawings_on_white(tmp_path):
    (tmp_path / "drawn").mkdir()
    whole = labelled(drawings(tmp_path / "drawn"))
    assert len(whole) == 12
    check_none_is_a_twin(whole)
    (tmp_path / "again").mkdir()
    for path in (tmp_path / "drawn").iterdir():
        Image.open(path).save(tmp_path / "again" / f"{path.stem}.jpg", quality=50)
    twins = find_twins(whole, labelled(tmp_path / "again"), workers=0)
    found = named(twins, twins.near)
    assert len(found) == 12
    assert all(name == other for name, other in found.items())


def test_plain_pictures_are_twins_only_if_their_files_are(tmp_path):
    for number, folder in enumerate(("one", "other")):
        (tmp_path / folder).mkdir()
        Image.new("L", (50, 50), 255).save(tmp_path / folder / "white.png")
        Image.new("L", (50 + number, 50), 200).save(tmp_path / folder / "grey.png")
    twins = find_twins(labelled(tmp_path / "one"), labelled(tmp_path / "other"), workers=0)
    assert named(twins, twins.exact) == {"white": "white"}
    assert twins.near == []


def test_what_is_said_and_written(originals, tmp_path):
    folder = tmp_path / "testing"
    folder.mkdir()
    shutil.copy(originals / "coffee.png", folder / "copy.png")
    shutil.copy(originals / "coffee.png", folder / "copy, too.png")
    Image.open(originals / "rocket.png").save(folder / "again.jpg", quality=60)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(folder / "other.png")
    training, testing = labelled(originals), labelled(folder)
    twins = find_twins(training, testing, workers=0, progress=False)
    assert named(twins, twins.exact) == {"copy": "coffee", "copy, too": "coffee"}
    assert named(twins, twins.near) == {"again": "rocket"}
    text = "Of 4 testing pictures 75.0 % are in training too: 2 the same file and 1 nearly the same picture"
    assert twins.describe() == f"{text}."
    other = find_twins(training, labelled(folder, label=1), workers=0).describe()
    assert other == f"{text}; 3 of them with another label there."
    twins.save(tmp_path / "twins.csv")
    with open(tmp_path / "twins.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["kind", "testing", "training"],
        ["exact", f"{folder}/copy, too.png", f"{originals}/coffee.png"],
        ["exact", f"{folder}/copy.png", f"{originals}/coffee.png"],
        ["near", f"{folder}/again.jpg", f"{originals}/rocket.png"],
    ]
    none = find_twins(training, testing.take(np.array([3])), workers=0)
    assert none.describe() == "None of 1 testing pictures was found in training."


def test_pictures_in_shards_and_other_processes(originals, tmp_path):
    write_tar(tmp_path / "train" / "0.tar", [(f"{number}", number % 2) for number in range(4)])
    write_tar(tmp_path / "val" / "0.tar", [(f"{number}", number % 2) for number in range(3)])
    train, val = (read_labelled(tmp_path / side) for side in ("train", "val"))
    assert find_twins(train, val, workers=0).exact == [(0, 0), (1, 1), (2, 2)]
    whole = labelled(originals)
    here, there = (find_twins(whole, whole, workers=workers) for workers in (0, 2))
    assert here.exact == there.exact == [(index, index) for index in range(len(whole))]
    assert here.near == there.near == []


def test_a_picture_that_cannot_be_read(originals, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    os.mkfifo(tmp_path / "pipe.png")
    for name, why in (("broken.jpg", "cannot be read"), ("pipe.png", "not a regular file")):
        one = Labelled(Samples(os.fsencode(tmp_path), Names.of([name.encode()])), np.zeros(1, np.int64), ("a",))
        with pytest.raises(DataError, match=rf"{name}.*{why}"):
            find_twins(labelled(originals).take(np.array([0])), one, workers=0)


def test_a_difference_hash():
    columns = np.linspace(0, 250, 36).astype(np.uint8)
    rising = np.broadcast_to(columns[None, None, :, None], (1, 32, 36, 3))
    flat = np.full((1, 32, 36, 3), 128, np.uint8)
    noisy = flat + np.random.default_rng(0).integers(0, 3, flat.shape, np.uint8)
    top = np.where(np.arange(32)[:, None, None] < 4, rising, flat)
    hashes = difference_hashes(np.concatenate([rising, rising[:, :, ::-1], flat, noisy, top]))
    assert hashes.dtype == np.uint64
    assert np.bitwise_count(hashes).tolist() == [64, 0, 0, 0, 8]


def test_many_pictures_are_compared_quickly():
    generator = np.random.default_rng(0)

    def prints(count):
        thumbnails = generator.standard_normal((count, 864), np.float32)
        thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
        return _Prints([], generator.integers(0, 2**63, count).astype(np.uint64), thumbnails)

    here, there = prints(1000), prints(5000)
    here.hashes[7], here.thumbnails[7] = there.hashes[4321] ^ np.uint64(0b1011), there.thumbnails[4321] * 0.99
    started = time.perf_counter()
    assert _near(here, there) == [(7, 4321)]
    assert time.perf_counter() - started < 10  # a quarter of a second on a free core


def test_a_file_and_its_bytes_are_the_same(originals):
    path = originals / "coffee.png"
    digest, pixels = _read(io.BytesIO(path.read_bytes()))
    assert (digest, pixels.shape) == (hashlib.sha256(path.read_bytes()).hexdigest(), (32, 36, 3))
    again, same = _read(os.fsencode(path))
    assert again == digest
    assert (pixels == same).all()
