"""Small pictures with objects on the disk, the same ones in every format."""

import json

import numpy as np
from PIL import Image

CLASSES = ("block", "wedge")
FORMATS = ("coco", "yolo", "voc", "labelme")
HEIGHT, WIDTH = 40, 48


def scene(number):
    """(class, polygon (k, 2)) of each object; every sixth picture shows none, every second no wedge."""
    draw = np.random.default_rng(number)
    found = []
    for kind in CLASSES[: 1 + number % 2] if number % 6 != 5 else ():
        left, top = int(draw.integers(1, 20)), int(draw.integers(1, 12))
        shape = [(0, 0), (20, 0), (20, 15), (0, 15)] if kind == "block" else [(0, 0), (24, 5), (6, 25)]
        found.append((kind, np.add(shape, (left, top), dtype=float)))
    return found


def bounds(polygon):
    return [*polygon.min(axis=0).tolist(), *polygon.max(axis=0).tolist()]


def lay_objects(folder, form, numbers=range(6), *, outlines=True):
    """A set in one format; Pascal VOC has boxes alone."""
    below = {"coco": "images", "yolo": "images", "voc": "JPEGImages", "labelme": "."}[form]
    (folder / below).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        for kind, polygon in scene(number):
            left, top, right, bottom = map(int, bounds(polygon))
            pixels[top:bottom, left:right, CLASSES.index(kind)] += 150
        Image.fromarray(pixels).save(folder / below / f"{number:03}.png")
    globals()[f"_{form}"](folder, list(numbers), outlines)
    return folder


def coco(numbers, outlines=True, *, prefix=""):
    """COCO's file, whose categories are 0 and 7."""
    images, notes = [], []
    for number in numbers:
        images.append({"id": number, "file_name": f"{prefix}{number:03}.png", "height": HEIGHT, "width": WIDTH})
        for kind, polygon in scene(number):
            left, top, right, bottom = bounds(polygon)
            note = {"id": len(notes), "image_id": number, "category_id": 7 * CLASSES.index(kind), "iscrowd": 0}
            note["bbox"] = [left, top, right - left, bottom - top]
            note["segmentation"] = [polygon.reshape(-1).tolist()] if outlines else []
            notes.append(note)
    categories = [{"id": 7 * place, "name": name} for place, name in enumerate(CLASSES)]
    return {"images": images, "annotations": notes, "categories": categories}


def _coco(folder, numbers, outlines):
    (folder / "instances.json").write_text(json.dumps(coco(numbers, outlines)))


def _yolo(folder, numbers, outlines):
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names:\n  0: block\n  1: wedge\n")
    for number in numbers:
        lines = []
        for kind, polygon in scene(number):
            values = polygon / (WIDTH, HEIGHT)
            if not outlines:
                low, high = values.min(axis=0), values.max(axis=0)
                values = np.stack([(low + high) / 2, high - low])
            lines.append(f"{CLASSES.index(kind)} " + " ".join(f"{value:.6f}" for value in values.reshape(-1)))
        if lines:  # a picture without objects may have no file
            (folder / "labels" / f"{number:03}.txt").write_text("\n".join(lines) + "\n")


def _voc(folder, numbers, outlines):
    (folder / "Annotations").mkdir()
    for number in numbers:
        rows = []
        for kind, polygon in scene(number):
            edges = zip(("xmin", "ymin", "xmax", "ymax"), np.add(bounds(polygon), (1, 1, 0, 0)), strict=True)
            box = "".join(f"<{edge}>{value:g}</{edge}>" for edge, value in edges)
            rows.append(f"<object><name>{kind}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>")
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{number:03}.png</filename>{size}{''.join(rows)}</annotation>"
        (folder / "Annotations" / f"{number:03}.xml").write_text(text)


def _labelme(folder, numbers, outlines):
    for number in numbers:
        shapes = [
            {"label": kind, "points": polygon.tolist(), "shape_type": "polygon"}
            if outlines
            else {"label": kind, "points": np.reshape(bounds(polygon), (2, 2)).tolist(), "shape_type": "rectangle"}
            for kind, polygon in scene(number)
        ]
        said = {"imagePath": f"{number:03}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes}
        (folder / f"{number:03}.json").write_text(json.dumps(said))
