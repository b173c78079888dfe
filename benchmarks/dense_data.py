"""Sets with a class for every pixel, or objects, out of published packages: what both are measured on.

    scripts/dense-data DIR

DIR/drawn: *drawn objects on photographs*. Cut-outs of Debian's openclipart (public domain), whose alpha is the exact
mask, in 8 classes, one to five of them pasted at random sizes on crops of the licensed photos of scripts/nano-data:
1,000 pictures of 224×224 to train on, 300 to measure on. Cut-outs are split before anything is composed, and photos
are: training pictures have nano-data's training photos, which the embedded model was trained on, the others its photos
for validation and testing, which it never saw. It shows that a pipeline works and which recipe does better, and nothing
about how well natural objects are told from each other.

DIR/nuclei: PyPI's stardist, one picture of nuclei under a microscope with its mask: the upper half to train on, the
lower half to measure on, in tiles of 128×128. One picture is little: a smoke test on true masks.

DIR/crowns: PyPI's deepforest, tree crowns in four pictures from the air, boxes alone: those of three to train on, that
of the fourth, another place of the site of the largest, to measure on, in tiles of 400×400. A crown of which less than
half lies in a tile is ignored there. Four pictures are little, and two of them are near each other.

Each set has train/images and val/images, the licence and a README; with train/masks, val/masks and classes.json where
pixels have classes, and train/instances.json, val/instances.json in COCO's form where there are objects; DIR/drawn also
manifest.csv, which photo and which drawings are where. Everything is drawn from fixed seeds.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from labelled_data import CLIPART, LARGEST_READ, run, wheel
from PIL import Image
from pycocotools import mask as mask_code

SIDE, TRAIN, VAL = 224, 1000, 300
_SEED = 20261130
_COVERED, _SHORTEST = (0.2, 0.95), 64  # share of its box that a cut-out fills; pixels of its shorter side
_OBJECTS, _SIZES = (1, 5), (40, 160)  # in a picture; pixels of an object's longer side
_TILE, _CROWN_TILE = 128, 400
_CROWNS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029", "SOAP_061"),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
}
_SHOWN = 12  # pixels of an object that must be seen at least


class CutOut(NamedTuple):
    """A drawing with transparency, cut to its box."""

    label: str
    name: str
    image: Image.Image  # RGBA


class Pasted(NamedTuple):
    """An object in a picture."""

    cutout: CutOut
    box: tuple[int, int, int, int]  # of what is seen: left, top, right, bottom
    mask: np.ndarray  # (SIDE, SIDE) bool, what is seen


def cut_outs(folder: Path) -> Iterator[CutOut]:
    """The drawings of Debian's openclipart-png that are one object on nothing."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size of each is looked at
    folder.mkdir()
    run("apt-get", "download", "openclipart-png=1:0.18+dfsg-19", folder=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", archive.name, "root", folder=folder)
    for label in CLIPART:
        top, seen = folder / "root/usr/share/openclipart/png" / label, set()
        for path in sorted(top.rglob("*.png")):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(path) as opened:
                if opened.width * opened.height > LARGEST_READ or "A" not in opened.getbands():
                    continue
                opened.thumbnail((4 * SIDE, 4 * SIDE))
                whole = opened.convert("RGBA")
                alpha = np.asarray(whole.getchannel("A"))
                if (box := Image.fromarray((alpha >= 128).astype(np.uint8)).getbbox()) is None:
                    continue
                covered = float((alpha[box[1] : box[3], box[0] : box[2]] >= 128).mean())
                if _COVERED[0] <= covered <= _COVERED[1] and min(box[2] - box[0], box[3] - box[1]) >= _SHORTEST:
                    name = str(path.relative_to(top).with_suffix("")).replace("/", "-")
                    yield CutOut(label, name, whole.crop(box))


def composed(photo: Image.Image, cutouts: list[CutOut], draw: np.random.Generator) -> tuple[Image.Image, list[Pasted]]:
    """A square part of a photo with objects on it; later ones hide earlier ones."""
    least = min(SIDE, *photo.size)
    side = int(draw.integers(least, max(least, min(photo.size) // 2) + 1))
    left, top = (int(draw.integers(0, edge - side + 1)) for edge in photo.size)
    picture = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    placed: list[tuple[CutOut, np.ndarray]] = []
    for _ in range(int(draw.integers(_OBJECTS[0], _OBJECTS[1] + 1))):
        label = CLIPART[int(draw.integers(len(CLIPART)))]  # classes are alike frequent, whatever there is of them
        of_class = [one for one in cutouts if one.label == label]
        cutout = of_class[int(draw.integers(len(of_class)))]
        size = int(draw.integers(*_SIZES))
        factor = size / max(cutout.image.size)
        width, height = (max(1, round(edge * factor)) for edge in cutout.image.size)
        small = cutout.image.resize((width, height), Image.Resampling.LANCZOS)
        x, y = (int(draw.integers(-edge // 4, SIDE - edge + edge // 4 + 1)) for edge in (width, height))
        canvas = Image.new("RGBA", (SIDE, SIDE))
        canvas.paste(small, (x, y))
        picture.paste(canvas, (0, 0), canvas)
        mask = np.asarray(canvas.getchannel("A")) >= 128
        placed = [(one, seen & ~mask) for one, seen in placed] + [(cutout, mask)]
    objects = []
    for cutout, mask in placed:
        if mask.sum() >= _SHOWN:
            box = Image.fromarray(mask.astype(np.uint8)).getbbox()
            assert box is not None
            objects.append(Pasted(cutout, box, mask))
    return picture, objects


def write_drawn(out: Path, packages: Path, photos: Path) -> dict[str, int]:
    """Compose and write the set of drawn objects; how many cut-outs there are of each class."""
    draw = np.random.default_rng(_SEED)
    everything = list(cut_outs(packages / "openclipart"))
    order = draw.permutation(len(everything))
    parts = {"train": [], "val": []}
    for label in CLIPART:
        of_class = [everything[index] for index in order if everything[index].label == label]
        count = len(of_class) * 4 // 5
        parts["train"] += of_class[:count]
        parts["val"] += of_class[count:]
    folders = {"train": ["train"], "val": ["val", "test"]}
    classes = ("background", *CLIPART)
    rows = []
    for side, count in (("train", TRAIN), ("val", VAL)):
        files = sorted(path for name in folders[side] for path in (photos / name).iterdir())
        opened = [Image.open(path).convert("RGB") for path in files]
        for kind in ("images", "masks"):
            (out / side / kind).mkdir(parents=True)
        boxes, pictures = [], []
        for number in range(count):
            which = int(draw.integers(len(files)))
            picture, objects = composed(opened[which], parts[side], draw)
            mask = np.zeros((SIDE, SIDE), np.uint8)
            for one in objects:
                mask[one.mask] = classes.index(one.cutout.label)
            name = f"{number:04}.png"
            picture.save(out / side / "images" / name)
            Image.fromarray(mask).save(out / side / "masks" / name)
            pictures.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
            for one in objects:
                left, top, right, bottom = one.box
                box = [left, top, right - left, bottom - top]
                row = {"id": len(boxes) + 1, "image_id": number, "category_id": classes.index(one.cutout.label)}
                code = mask_code.encode(np.asfortranarray(one.mask, np.uint8))
                row |= {"segmentation": code | {"counts": code["counts"].decode()}}
                boxes.append(row | {"bbox": box, "area": int(one.mask.sum()), "iscrowd": 0})
                rows.append((side, name, files[which].name, one.cutout.label, one.cutout.name, *one.box))
        categories = [{"id": place, "name": name} for place, name in enumerate(classes) if place]
        said = {"images": pictures, "annotations": boxes, "categories": categories}
        (out / side / "instances.json").write_text(json.dumps(said))
    with open(out / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("side", "picture", "photo", "class", "drawing", "left", "top", "right", "bottom"))
        writer.writerows(rows)
    (out / "classes.json").write_text(json.dumps({str(place): name for place, name in enumerate(classes)}))
    copyright = packages / "openclipart/root/usr/share/doc/openclipart-png/copyright"
    (out / "LICENCE").write_text(copyright.read_text() + "\nPhotos: see scripts/nano-data.toml, which names each.\n")
    return {label: sum(one.label == label for one in everything) for label in CLIPART}


def write_nuclei(out: Path, packages: Path) -> int:
    """Tiles of stardist's picture; how many nuclei there are."""
    import tifffile

    package = wheel("stardist==0.9.2", packages / "stardist")
    names = {Path(name).name: name for name in package.namelist()}
    pixels, numbers = (tifffile.imread(io.BytesIO(package.read(names[name]))) for name in ("img2d.tif", "mask2d.tif"))
    low, high = np.percentile(pixels, (0.1, 99.9))
    grey = (255 * np.clip((pixels - low) / (high - low), 0, 1)).round().astype(np.uint8)
    half = len(grey) // 2
    for side, first in (("train", 0), ("val", half)):
        for kind in ("images", "masks"):
            (out / side / kind).mkdir(parents=True)
        for top in range(first, first + half, _TILE):
            for left in range(0, grey.shape[1], _TILE):
                part = np.s_[top : top + _TILE, left : left + _TILE]
                name = f"{top:03}-{left:03}.png"
                Image.fromarray(grey[part]).save(out / side / "images" / name)
                Image.fromarray((numbers[part] > 0).astype(np.uint8)).save(out / side / "masks" / name)
    (out / "classes.json").write_text(json.dumps(["background", "nucleus"]))
    (licence,) = (name for name in package.namelist() if "LICENSE" in name)
    (out / "LICENCE").write_text(package.read(licence).decode())
    return len(np.unique(numbers)) - 1


def write_crowns(out: Path, packages: Path) -> int:
    """Tiles of deepforest's pictures; how many crowns there are."""
    package = wheel("deepforest==2.1.0", packages / "deepforest")
    names = {Path(name).name: name for name in package.namelist()}
    crowns = 0
    for side, pictures in _CROWNS.items():
        (out / side / "images").mkdir(parents=True)
        images, annotations = [], []
        for picture in pictures:
            pixels = np.asarray(Image.open(io.BytesIO(package.read(names[next(
                name for name in (f"{picture}.png", f"{picture}.tif") if name in names)]))).convert("RGB"))  # fmt: skip
            tree = ElementTree.fromstring(package.read(names[f"{picture}.xml"]))
            boxes = np.array([[float(box.findtext(edge, "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
                              for box in tree.iter("bndbox")])  # fmt: skip
            crowns += len(boxes)
            starts = [range(0, max(1, edge - _CROWN_TILE // 2), _CROWN_TILE) for edge in pixels.shape[:2]]
            for top, left in itertools.product(*starts):
                tile = pixels[top : top + _CROWN_TILE, left : left + _CROWN_TILE]
                number, (height, width) = len(images), tile.shape[:2]
                name = f"{picture}-{top:04}-{left:04}.png"
                Image.fromarray(tile).save(out / side / "images" / name)
                images.append({"id": number, "file_name": name, "width": width, "height": height})
                for x0, y0, x1, y1 in (boxes - (left, top, left, top)).tolist():
                    a, b, c, d = max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)
                    if c <= a or d <= b:
                        continue
                    row = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "area": (c - a) * (d - b)}
                    cut = int((c - a) * (d - b) < 0.5 * (x1 - x0) * (y1 - y0))
                    annotations.append(row | {"bbox": [a, b, c - a, d - b], "iscrowd": cut})
        said = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
        (out / side / "instances.json").write_text(json.dumps(said))
    (licence,) = (name for name in package.namelist() if Path(name).name.startswith("LICENSE"))
    (out / "LICENCE").write_text(package.read(licence).decode())
    return crowns


def main() -> None:
    """Build what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    out = parser.parse_args().out.resolve()
    if any((out / name).exists() for name in ("drawn", "nuclei", "crowns")):
        sys.exit(f"{out} holds a set already; name another folder, or remove it")
    with tempfile.TemporaryDirectory() as temporary:
        packages = Path(temporary)
        photos = packages / "photos"
        script = Path(__file__).resolve().parent.parent / "scripts/nano-data"
        subprocess.run((sys.executable, script, photos), check=True)
        found = write_drawn(out / "drawn", packages, photos)
        print(f"drawn: {sum(found.values()):,} cut-outs, {', '.join(f'{n} {label}' for label, n in found.items())}")
        print(f"nuclei: {write_nuclei(out / 'nuclei', packages)} of them")
        print(f"crowns: {write_crowns(out / 'crowns', packages)} of them")
    for name in ("drawn", "nuclei", "crowns"):
        part = (__doc__ or "").split(f"DIR/{name}: ")[1].split("\n\n")[0]
        (out / name / "README.md").write_text(" ".join(part.split()) + "\n")


if __name__ == "__main__":
    main()
