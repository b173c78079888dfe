"""Pictures of how a classifier does: the confusion matrix, and pictures that it gets wrong."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from maehub.errors import UsageError
from maehub.figures import as_picture, heat, new_figure, plot_style
from maehub.train.evaluation.scores import Scores
from maehub.train.evaluation.text_tables import percent, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_GREEN, _RED = (38, 128, 62), (178, 24, 24)
_INK, _GREY, _PAPER = (20, 20, 20), (95, 95, 95), (255, 255, 255)
_INK_NAME, _GREY_NAME, _LINE_NAME = "#141414", "#5f5f5f", "#e4e4e4"
_SIDE = 1300  # pixels that a matrix should have across
_LARGEST_CELL = 72
_NAMED_CELL = 13  # side from which on rows and columns have names
_RULED_CELL = 5  # side from which on there are lines between cells
_COUNTED_CELL = 16  # side from which on cells have counts
_DARK = 0.2  # share from which on a cell is dark
_LONGEST_NAME = 24  # characters
_MOST_ROWS = 2000  # that are drawn one by one
_TICKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # shares that the legend names
_LEGEND = 240
_AROUND, _MARGIN = 640, 24  # pixels: what words beside the matrix have, and what is left white around all
_THUMBNAIL, _FRAME = 200, 4


def confusion_picture(scores: Scores) -> Image.Image:
    """The confusion matrix: rows are what pictures show, columns what they are taken for.

    The colour of a cell is its share of the row, on a scale of square roots, so that rare mistakes are seen; white is
    none. Cells have their counts and classes their names where there is room, else classes have their places. A name
    that the font cannot write is its place too.

    Raises:
        UsageError: a picture may have several classes, so there is no such matrix.
    """
    if scores.confusion is None:
        raise UsageError("where a picture may have several classes there is no confusion matrix")
    counts, together = _drawable(scores.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = max(1, min(_LARGEST_CELL, _SIDE // len(counts)))
    across = cell * len(counts)
    canvas = across + 2 * _AROUND
    with plot_style(min(18, max(12, cell // 2))):
        from matplotlib.colors import ListedColormap, PowerNorm

        figure = new_figure((canvas, canvas))
        start, side = _AROUND / canvas, across / canvas
        axes = figure.add_axes((start, start, side, side))
        colours = ListedColormap(heat(1 - 0.9 * np.linspace(0, 1, 256)[None])[0] / 255)  # dark is all
        none = np.ma.masked_equal(shares, 0)
        drawn = axes.imshow(none, colours, PowerNorm(0.5, 0, 1), interpolation="nearest")
        axes.spines[["left", "top"]].set_position(("outward", 1))  # not over the first cells, which may be pixels
        _name_classes(axes, [row.name for row in scores.per_class], together, cell)
        _write_counts(axes, counts, shares, cell)
        grouped = f", {together} classes in a row" if together > 1 else ""
        axes.set_title(f"top-1 {percent(scores.top1)} of {scores.n:,} pictures", loc="left", fontsize=18, pad=14)
        axes.set_ylabel(f"what pictures show{grouped}", fontsize=14, color=_GREY_NAME, loc="bottom", labelpad=8)
        axes.set_xlabel("what they are taken for", fontsize=14, color=_GREY_NAME, loc="right", labelpad=8)
        bar = (start + side + 32 / canvas, start + side - _LEGEND / canvas, 18 / canvas, _LEGEND / canvas)
        legend = figure.colorbar(
            drawn, figure.add_axes(bar), ticks=_TICKS, format=lambda share, _: f"{100 * share:.0f} %"
        )
        legend.set_label("share of the row", fontsize=13, color=_GREY_NAME)
        legend.ax.tick_params(labelsize=13, colors=_GREY_NAME)
        for frame in (axes.spines[:], legend.outline):
            frame.set(color=_LINE_NAME, linewidth=1)
        picture = as_picture(figure)
    left, top, right, bottom = ImageChops.invert(picture).getbbox() or (0, 0, canvas, canvas)
    return picture.crop((left - _MARGIN, top - _MARGIN, right + _MARGIN, bottom + _MARGIN))


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    right: Sequence[bool],
    *,
    title: str = "",
    columns: int = 4,
) -> Image.Image:
    """Pictures in a grid, each with its caption below and in a frame: green where a model is right, red where not.

    Args:
        pictures: RGB or grey, any size: they are scaled into squares.
        captions: one each; a line break starts a new line, long lines are cut.
        right: one each.
        title: above them all.
        columns: in a row, if there are as many.
    """
    if not pictures or not len(pictures) == len(captions) == len(right):
        raise UsageError(
            f"{len(captions)} captions and {len(right)} frames are for as many pictures, not {len(pictures)}"
        )
    font, large = ImageFont.load_default(14), ImageFont.load_default(18)
    texts = [caption.split("\n") for caption in captions]
    columns = min(columns, len(pictures))
    side, line, gap = _THUMBNAIL + 2 * _FRAME, 19, 16
    step = side + 8 + line * max(map(len, texts)) + gap
    head = gap + (30 if title else 0)
    rows = -(-len(pictures) // columns)
    across = gap + columns * (side + gap)
    width = max(across, round(large.getlength(title)) + 2 * gap)
    sheet = Image.new("RGB", (width, head + rows * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), title, _INK, large)
    for number, (picture, words) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(number, columns)
        x, y = gap + column * (side + gap), head + row * step
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=_GREEN if right[number] else _RED, width=_FRAME)
        small = _scaled(picture)
        sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        for place, text in enumerate(words):
            colour = _GREY if place else _INK
            draw.text((x, y + side + 6 + place * line), _cut(text, font, side), colour, font)
    return sheet


def _drawable(confusion: np.ndarray) -> tuple[np.ndarray, int]:
    """The matrix, of very many classes with some of them together in a row; and how many are together."""
    together = -(-len(confusion) // _MOST_ROWS)
    starts = np.arange(0, len(confusion), together)
    return np.add.reduceat(np.add.reduceat(confusion, starts, axis=0), starts, axis=1), together


def _name_classes(axes: "Axes", names: Sequence[str], together: int, cell: int) -> None:
    """What stands beside rows and columns: names, or the places of some."""
    rows = -(-len(names) // together)
    if cell >= _NAMED_CELL:
        labels = dict(enumerate(_written(name, index) for index, name in enumerate(names)))
    else:
        step = next(size for size in (5, 10, 20, 50, 100, 200, 500) if size * cell >= 40)
        labels = {index: f"{index * together:,}" for index in range(0, rows, step)}
    axes.set_xticks(list(labels), list(labels.values()), rotation=90)
    axes.set_yticks(list(labels), list(labels.values()))
    axes.tick_params(length=0, pad=7, labelcolor=_INK_NAME, labeltop=True, labelbottom=False)
    if cell >= _RULED_CELL:
        edges = np.arange(0.5, rows - 1)
        axes.hlines(edges, -0.5, rows - 0.5, _LINE_NAME, linewidth=1)
        axes.vlines(edges, -0.5, rows - 0.5, _LINE_NAME, linewidth=1)


def _written(name: str, index: int) -> str:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    missing = any(not font.get_char_index(ord(character)) for character in name if character.isprintable())
    return f"class {index}" if missing else printable(name, _LONGEST_NAME)


def _cut(text: str, font: Font, width: float) -> str:
    """The text, its end replaced by dots where it is too wide."""
    text = printable(text, 200)
    if font.getlength(text) <= width:
        return text
    return next(cut for length in range(len(text), -1, -1) if font.getlength(cut := f"{text[:length]}…") <= width)


def _write_counts(axes: "Axes", counts: np.ndarray, shares: np.ndarray, cell: int) -> None:
    """The counts that are not 0, if all of them fit into their cells."""
    size = min(18, max(9, cell // 3))
    if 0.65 * size * len(str(counts.max())) > cell - 4 or cell < _COUNTED_CELL:  # a digit of the font is so wide
        return
    for row, column in np.argwhere(counts).tolist():
        colour = "white" if shares[row, column] > _DARK else _INK_NAME
        axes.text(column, row, str(counts[row, column]), color=colour, size=size, ha="center", va="center_baseline")


def _scaled(picture: Image.Image) -> Image.Image:
    """As large as fits into a square; small ones are enlarged."""
    scale = _THUMBNAIL / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
