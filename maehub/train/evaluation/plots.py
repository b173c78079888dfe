"""Pictures of how a network does: confusion, numbers against true ones, and the pictures that it gets wrong."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maehub.errors import UsageError
from maehub.figures import heat
from maehub.train.evaluation.numbers import NumberScores
from maehub.train.evaluation.scores import AnyScores, Scores
from maehub.train.evaluation.text_tables import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Place = tuple[int, int]
"""Pixels from the left and from the top."""

_GREEN, _RED = (38, 128, 62), (178, 24, 24)
_INK, _GREY, _PAPER, _LINE = (20, 20, 20), (95, 95, 95), (255, 255, 255), (228, 228, 228)
_SIDE = 1300  # pixels that a matrix should have across
_LARGEST_CELL = 72
_NAMED_CELL = 13  # side from which on rows and columns have names
_RULED_CELL = 5  # side from which on there are lines between cells
_COUNTED_CELL = 16  # side from which on cells have counts
_DARK = 0.2  # share from which on a cell is dark
_LONGEST_NAME = 180  # pixels
_MOST_ROWS = 2000  # that are drawn one by one
_TICKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # shares that the legend names
_LEGEND = 240
_WORDS = 640  # pixels of what stands above
_THUMBNAIL, _FRAME = 200, 4
_PANELS = 4  # columns of numbers that are drawn


def confusion_picture(scores: Scores) -> Image.Image:
    """The confusion matrix: rows are what pictures show, columns what they are taken for.

    The colour of a cell is its share of the row, on a scale of square roots, so that rare mistakes are seen; white is
    none. Cells have their counts and classes their names where there is room, else classes have their places. A name
    that the font cannot write is its place too.
    """
    if scores.confusion is None:
        raise UsageError("where a picture may have several classes there is no confusion matrix")
    together = -(-len(scores.confusion) // _MOST_ROWS)  # of very many classes some stand together in a row
    starts = np.arange(0, len(scores.confusion), together)
    counts = np.add.reduceat(np.add.reduceat(scores.confusion, starts, axis=0), starts, axis=1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = max(1, min(_LARGEST_CELL, _SIDE // len(counts)))
    across = cell * len(counts)
    text = min(18, max(12, cell // 2))
    font, title = ImageFont.load_default(text), ImageFont.load_default(18)
    labels = _labels([row.name for row in scores.per_class], together, cell, font)
    room = round(max(font.getlength(label) for label in labels.values()))
    left, top = 32 + room, 92 + room
    width = max(left + across + 110, _WORDS)
    picture = Image.new("RGB", (width, top + max(across, _LEGEND) + 24), _PAPER)
    draw = ImageDraw.Draw(picture)

    picture.paste(_coloured(shares).resize((across, across), Image.Resampling.NEAREST), (left, top))
    for at in range(0, across, cell) if cell >= _RULED_CELL else ():
        draw.line((left, top + at, left + across, top + at), _LINE)
        draw.line((left + at, top, left + at, top + across), _LINE)
    draw.rectangle((left - 1, top - 1, left + across, top + across), outline=_LINE)
    _write_counts(draw, counts, shares, cell, (left, top))
    for place, label in labels.items():
        middle = place * cell + cell // 2
        draw.text((left - 8, top + middle), label, _INK, font, anchor="rm")
        _write_upwards(picture, label, font, (left + middle, top - 8))
    draw.text((24, 20), f"top-1 {scores.top1:.1f} % of {scores.n:,} pictures", _INK, title)
    explained = "rows: what a picture shows · columns: what it is taken for · colour: share of the row"
    grouped = f" · {together} classes in a row" if together > 1 else ""
    draw.text((24, 46), explained + grouped, _GREY, ImageFont.load_default(14))
    _write_legend(picture, (left + across + 32, top))
    return picture


def overview(scores: AnyScores) -> dict[str, Image.Image]:
    """What shows a whole measurement, by the name of its file: confusion, or predicted against true numbers."""
    if isinstance(scores, NumberScores):
        return {"scatter.png": scatter_picture(scores)}
    return {} if scores.confusion is None else {"confusion.png": confusion_picture(scores)}


def scatter_picture(scores: NumberScores) -> Image.Image:
    """Predicted against true numbers, a panel for each of at most four columns; the line is where they are equal."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert scores.points is not None
    shown = scores.columns[:_PANELS]
    with matplotlib.style.context(["default", {"font.size": 11, "text.parse_math": False}]):
        figure = Figure(figsize=(5 * len(shown), 5), dpi=100, layout="constrained")
        canvas, panels = FigureCanvasAgg(figure), figure.subplots(1, len(shown), squeeze=False)[0]
        for place, (column, axes) in enumerate(zip(shown, panels, strict=True)):
            true, said = scores.points[:, :, place]
            ends = [min(true.min(), said.min()), max(true.max(), said.max())]
            axes.plot(ends, ends, color="#6b7280", linewidth=1, linestyle="dashed")
            axes.plot(true, said, "o", color="#1f6fb4", markersize=4, alpha=0.5, markeredgewidth=0)
            axes.set_aspect("equal", adjustable="datalim")
            axes.set_title(
                f"{printable(column.name, 30)}: R² {column.r2.value:.3f}, MAE {column.mae.value:.3g}", loc="left"
            )
            axes.set_xlabel("true")
            axes.set_ylabel("predicted")
            axes.spines[["top", "right"]].set_visible(False)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    right: Sequence[bool],
    *,
    title: str = "",
    columns: int = 4,
) -> Image.Image:
    """Pictures in a grid, each with its caption below and in a frame: green where a model is right, red where not.

    Pictures are RGB or grey of any size, and scaled into squares. Long lines of a caption are cut.
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
        scale = _THUMBNAIL / max(picture.size)  # small ones are enlarged
        wide, high = (max(1, round(length * scale)) for length in picture.size)
        small = picture.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS)
        sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        for place, text in enumerate(words):
            colour = _GREY if place else _INK
            draw.text((x, y + side + 6 + place * line), _cut(text, font, side), colour, font)
    return sheet


def _coloured(shares: np.ndarray) -> Image.Image:
    """Dark is all; white is none."""
    pixels = heat(1 - 0.9 * np.sqrt(shares))
    pixels[shares == 0] = _PAPER
    return Image.fromarray(pixels)


def _labels(names: Sequence[str], together: int, cell: int, font: Font) -> dict[int, str]:
    """What stands beside which rows: names, or the places of some."""
    if cell >= _NAMED_CELL:
        unknown = bytes(font.getmask("\uffff"))
        labels = {}
        for place, name in enumerate(names):
            missing = any(bytes(font.getmask(character)) == unknown for character in set(name) - {" "})
            labels[place] = _cut(f"class {place}" if missing else printable(name), font, _LONGEST_NAME)
        return labels
    rows = -(-len(names) // together)
    step = next(size for size in (5, 10, 20, 50, 100, 200, 500) if size * cell >= 40)
    return {place: f"{place * together:,}" for place in range(0, rows, step)}


def _cut(text: str, font: Font, width: float) -> str:
    """The text, its end replaced by dots where it is too wide."""
    text = printable(text, 200)
    if font.getlength(text) <= width:
        return text
    return next(cut for length in range(len(text), -1, -1) if font.getlength(cut := f"{text[:length]}…") <= width)


def _write_counts(draw: ImageDraw.ImageDraw, counts: np.ndarray, shares: np.ndarray, cell: int, at: Place) -> None:
    """The counts that are not 0, if all of them fit into their cells."""
    font = ImageFont.load_default(min(18, max(9, cell // 3)))
    if font.getlength(str(counts.max())) > cell - 4 or cell < _COUNTED_CELL:
        return
    for row, column in np.argwhere(counts).tolist():
        colour = _PAPER if shares[row, column] > _DARK else _INK
        middle = at[0] + column * cell + cell // 2, at[1] + row * cell + cell // 2
        draw.text(middle, str(counts[row, column]), colour, font, anchor="mm")


def _write_upwards(picture: Image.Image, text: str, font: Font, at: Place) -> None:
    """Text that begins at a place and runs upwards, its middle line on it."""
    height = 2 * (round(font.getbbox("Ág")[3]) // 2 + 2)
    mask = Image.new("L", (max(1, round(font.getlength(text)) + 1), height))
    ImageDraw.Draw(mask).text((0, height // 2), text, 255, font, anchor="lm")
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    picture.paste(_INK, (at[0] - height // 2, at[1] - mask.height), mask)


def _write_legend(picture: Image.Image, at: Place) -> None:
    """The colours from none to all, beside their shares of a row."""
    font = ImageFont.load_default(13)
    draw = ImageDraw.Draw(picture)
    places = np.linspace(1, 0, _LEGEND)[:, None] ** 2
    picture.paste(_coloured(places).resize((18, _LEGEND)), at)
    draw.rectangle((at[0] - 1, at[1] - 1, at[0] + 18, at[1] + _LEGEND), outline=_LINE)
    for share in _TICKS:
        y = at[1] + round((1 - share**0.5) * (_LEGEND - 1))
        draw.line((at[0] + 18, y, at[0] + 22, y), _GREY)
        draw.text((at[0] + 26, y), f"{100 * share:.0f} %", _GREY, font, anchor="lm")
