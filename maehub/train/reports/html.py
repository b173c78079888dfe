"""What stands on the page of a run: charts, pictures and settings, as `report.html.jinja` takes them."""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from maehub.errors import DataError
from maehub.figures import Series, curves_svg
from maehub.images import open_image

_JPEG_QUALITY = 88


class Chart(NamedTuple):
    """Curves with what stands above them."""

    title: str
    unit: str
    svg: str
    keys: list[Series]  # which curve is which


class Picture(NamedTuple):
    """A picture inside the page."""

    name: str
    what: str  # it shows, for who cannot see it
    address: str = ""  # with all of its bytes; empty where the file cannot be read
    width: int = 0
    height: int = 0


class Setting(NamedTuple):
    """A setting as it is read."""

    name: str
    value: str
    marked: bool


def chart(title: str, unit: str, series: Sequence[Series], *, legend: bool) -> list[Chart]:
    """A chart of `curves_svg`; none where no curve has a point. With ``legend`` it says which curve is which."""
    svg = curves_svg(title, series)
    keys = [one for one in series if legend and one.name and len(one.values)]
    return [Chart(title, unit, svg, keys)] if svg else []


def marked_settings(settings: Mapping[str, Any], marked: Collection[str]) -> list[Setting]:
    """Settings by the names of their fields; some of them marked."""
    return [
        Setting(name.strip("_").replace("_", "-"), value_text(value), name in marked)
        for name, value in settings.items()
    ]


def value_text(value: Any) -> str:
    """The value of a setting as it is read."""
    if value is None or value in ("", []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def picture(path: Path, name: str, what: str, widest: int) -> Picture:
    """A picture of a file, made smaller where it has more than ``widest`` pixels in a row."""
    try:
        image = open_image(path).convert("RGB")
    except DataError:
        return Picture(name, what)
    width, height = image.size
    if width > widest:
        image = image.resize((widest, max(1, round(height * widest / width))), Image.Resampling.LANCZOS)
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": _JPEG_QUALITY})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    address = f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"
    return Picture(name, what, address, image.width, image.height)
