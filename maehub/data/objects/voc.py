"""Objects by XML files in the form of Pascal VOC."""

from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np

from maehub.data.label_sources import label_name
from maehub.data.objects.outlines import Thing, numbers, same_size
from maehub.errors import DataError
from maehub.files import read_small
from maehub.images import Size

_EDGES = ("xmin", "ymin", "xmax", "ymax")


class _Plain(ElementTree.TreeBuilder):
    def doctype(self, *said: Any) -> NoReturn:
        raise DataError("it has a DOCTYPE, which no annotation needs, and which may name other files: take it out")


def things_of_voc(path: str, size: Size) -> list[Thing]:
    """The objects in one file. Pixels are counted from 1, and the last one belongs to the box."""
    try:
        root = ElementTree.fromstring(read_small(Path(path), DataError), ElementTree.XMLParser(target=_Plain()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise error if isinstance(error, DataError) else DataError(f"it is no well-formed XML: {error}") from error
    if root.tag != "annotation":
        raise DataError(f"it holds {root.tag!r:.40}, and Pascal VOC's files an annotation")
    said = [root.findtext(f"size/{name}", "").strip() for name in ("height", "width")]
    same_size([int(text) if text.isdecimal() else text or None for text in said], size, "itself")
    things = []
    for place, row in enumerate(root.findall("object"), 1):
        what = f"object {place}"
        label = label_name(row.findtext("name", ""))
        difficult = row.findtext("difficult", "").strip() or "0"
        if not label or difficult not in ("0", "1"):
            raise DataError(
                f"{what} has no name" if not label else f"{what}: difficult is {difficult!r:.40}, not 0 or 1"
            )
        edges = numbers([_number(row.findtext(f"bndbox/{edge}", "")) for edge in _EDGES], f"the bndbox of {what}", 4)
        things.append(Thing(what, label, edges - np.array([1.0, 1, 0, 0]), None, difficult == "1"))
    return things


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
