"""How the report of a run looks: a style sheet for light and dark screens, phones and paper; tables and pictures."""

import base64
import io
from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from maehub.errors import DataError
from maehub.images import open_image

_JPEG_QUALITY = 88

STATES = {"completed": "good", "preempted": "warn", "running": "warn", "diverged": "bad", "failed": "bad"}
"""States of a run to the class of their badge."""

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8;
  --c0: #1f6fb4; --c1: #c2410c; --c2: #6b7280; --c3: #15803d; --mark: #fff4d6; --good: #15803d; --warn: #a16207;
  --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2127; --ink: #e6e9ed; --soft: #9aa4b1;
  --line: #323943; --c0: #6db3f2; --c1: #fb923c; --c2: #9ca3af; --c3: #6ee7a0; --mark: #3a3113; --good: #4ade80;
  --warn: #facc15; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { display: inline; margin: 0 10px 0 0; font-size: 26px; }
h2 { margin: 34px 0 12px; font-size: 18px; }
header p { margin: 10px 0 0; max-width: 46em; }
.badge { padding: 2px 10px; border: 1px solid currentColor; border-radius: 99px; font-size: 13px; vertical-align: 4px;
  white-space: nowrap; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); } .quiet { color: var(--soft); }
.note, .legend, footer, small { color: var(--soft); }
.legend { margin: 0 0 8px; font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; color: var(--soft); }
th, td { padding: 3px 18px 3px 0; vertical-align: top; }
tr { border-bottom: 1px solid var(--line); break-inside: avoid; }
.settings { display: block; columns: 3 250px; column-gap: 26px; font-size: 13.5px; }
.settings tbody { display: contents; }
.settings tr { display: flex; justify-content: space-between; gap: 12px; padding: 0 6px; }
.settings th, .settings td { padding: 3px 0; }
.settings td { text-align: right; }
.changed { background: var(--mark); } .changed th, .changed td { color: var(--ink); font-weight: 600; }
.classes th, .classes td { text-align: right; white-space: nowrap; }
.classes tr > :first-child, .worded tr > :last-child { text-align: left; }
.classes td, .classes tr + tr th { color: var(--ink); } .wide + .legend { margin-top: 8px; }
.classes tr + tr > th, .worded tr + tr > :last-child { white-space: normal; min-width: 10em; }
.classes td:nth-child(3) { min-width: 180px; }
.bar { float: left; width: 90px; height: 8px; margin: 7px 12px 0 0; border-radius: 4px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--c0); }
.beside { align-items: start; } .beside th { white-space: nowrap; }
.wide { overflow-x: auto; } .wide figure { min-width: 620px; }
figure { margin: 0; padding: 12px 14px; background: var(--card); border-radius: 8px; min-width: 0;
  break-inside: avoid; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; margin-bottom: 6px;
  font-size: 14px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.key { font-size: 13px; color: var(--soft); white-space: nowrap; }
.key i { display: inline-block; width: 20px; margin-right: 6px; border-top: 2px solid; vertical-align: middle; }
.key i.dashed { border-top-style: dashed; }
.key i.c0 { color: var(--c0); } .key i.c1 { color: var(--c1); } .key i.c2 { color: var(--c2); }
.key i.c3 { color: var(--c3); }
.tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.grid, .axis { stroke: var(--line); fill: none; } .axis { stroke: var(--soft); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.faint { opacity: .28; stroke-width: 1; } path.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); } path.c2 { stroke: var(--c2); }
path.c3 { stroke: var(--c3); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
circle.c3 { fill: var(--c3); }
footer { margin-top: 40px; font-size: 13px; }
@media print { :root { color-scheme: light; --paper: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444;
  --line: #cccccc; --c0: #1f6fb4; --c1: #c2410c; --c2: #6b7280; --c3: #15803d; --mark: #eeeeee; }
  main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure { border: 1px solid var(--line); }
  .figures, .pictures { grid-template-columns: 1fr 1fr; } }
"""

HEAD = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{_STYLE}</style>
"""
"""All that comes before the title."""


def section(title: str, body: str) -> str:
    """A part of the page with its heading; without a body nothing."""
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def rows(facts: Mapping[str, str]) -> str:
    """A table of names and what is said of them."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<table>{body}</table>" if body else ""


def settings_table(settings: Mapping[str, Any], changed: Collection[str], mark: str) -> str:
    """Settings in columns.

    Args:
        settings: by the names of their fields.
        changed: those that are marked.
        mark: what the mark means.
    """
    cells = []
    for name, value in settings.items():
        marked = ' class="changed"' if name in changed else ""
        label = escape(name.strip("_").replace("_", "-"))
        cells.append(f"<tr{marked}><th>{label}</th><td>{escape(value_words(value))}</td></tr>")
    if not cells:
        return ""
    return f'<p class="legend">Marked: {mark}.</p><table class="settings">{"".join(cells)}</table>'


def value_words(value: Any) -> str:
    """The value of a setting as it is read."""
    if value is None or value in ("", []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(value_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def picture(path: Path, name: str, what: str, widest: int, *, titled: bool = True) -> str:
    """A picture of a file, inside the page; where it cannot be read, a line that says so.

    Args:
        name: of the picture.
        what: it shows, for who cannot see it.
        widest: pixels; a wider one is made smaller.
        titled: its name stands above it.
    """
    try:
        image = open_image(path)
    except DataError:
        return f'<p class="note">The picture of {escape(name[:1].lower() + name[1:])} cannot be read.</p>'
    width, height = image.size
    if width > widest:
        image = image.resize((widest, max(1, round(height * widest / width))), Image.Resampling.LANCZOS)
    caption = f"<figcaption><b>{escape(name)}</b></figcaption>" if titled else ""
    return (
        f"<figure>{caption}"
        f'<img alt="{escape(what)}" width="{image.width}" height="{image.height}" '
        f'src="{_data_address(image)}"></figure>'
    )


def _data_address(image: Image.Image) -> str:
    """The picture as a data: address, PNG or JPEG, whichever is smaller."""
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": _JPEG_QUALITY})):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format=kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"
