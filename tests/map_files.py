"""Small pictures with label maps on the disk."""

import json

import numpy as np
from PIL import Image

COLOURS = np.array([(30, 30, 30), (220, 40, 40), (40, 60, 220)], np.uint8)


def scene(number, size=(40, 48), classes=3):
    """A picture of coloured boxes on grey, and the places of its classes: which is which is easily told."""
    draw = np.random.default_rng(number)
    places = np.zeros(size, np.uint8)
    for place in range(1, classes):
        top, left = (int(draw.integers(0, side - 14)) for side in size)
        places[top : top + 14, left : left + 14] = place
    pixels = COLOURS[places].astype(int) + draw.integers(-20, 20, (*size, 3))
    return pixels.clip(0, 255).astype(np.uint8), places


def lay_maps(folder, count=12, *, first=0, size=(40, 48), classes=3, write=None, suffix=".png"):
    """DIR/images and DIR/masks; ``write`` makes a PIL picture of places."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels, places = scene(number, size, classes)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")
        picture = write(places) if write else Image.fromarray(places)
        picture.save(folder / "masks" / f"{number:03}{suffix}")
    return folder


def name_classes(folder, said):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(said))
    return folder
