"""Curves, drawn by matplotlib: as SVG in the colours of the page that it stands in, and as a picture."""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # it is imported where something is drawn, for it takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Literal["line", "faint", "dashed", "points"]

_PALETTE = {"ink": "#1b1f24", "soft": "#5b6470", "line": "#dfe3e8"}
# Of curves; names are those of the page.
_COLOURS = {"c0": "#1f6fb4", "c1": "#c2410c", "c2": "#6b7280", "c3": "#15803d"}
_LOOKS: dict[Style, dict[str, Any]] = {
    "line": {"linewidth": 1.8},
    "faint": {"linewidth": 1.0, "alpha": 0.28},
    "dashed": {"linewidth": 1.5, "dashes": (3.4, 2.6)},
    "points": {"linewidth": 1.8, "marker": "o", "markeredgewidth": 0},
}
_INLINE, _PICTURE = (440, 210), (900, 380)  # width, height in pixels
_MOST_POINTS, _MOST_MARKS = 600, 80  # of a curve: two points for each pixel or so
_ROUND = [1, 2, 5, 10]  # steps of ticks
_LOGARITHMIC = 30.0  # from this ratio of the largest value to the smallest on


class Series(NamedTuple):
    """One curve."""

    name: str
    steps: np.ndarray
    values: np.ndarray  # finite, as many
    colour: int = 0  # of the page's palette
    style: Style = "line"


def decimated(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `_MOST_POINTS` that look the same: of each stretch the lowest and the highest."""
    if len(values) <= _MOST_POINTS:
        return steps, values
    edges = np.linspace(0, len(values), _MOST_POINTS // 2 + 1).astype(int)
    chosen: set[int] = {0, len(values) - 1}
    for first, last in itertools.pairwise(edges.tolist()):
        part = values[first:last]
        chosen |= {first + int(part.argmin()), first + int(part.argmax())}
    order = sorted(chosen)
    return steps[order], values[order]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a window around each value, which is narrower at the ends."""
    if window <= 1 or len(values) < 3:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def raw_and_smooth(name: str, steps: np.ndarray, values: np.ndarray, colour: int) -> list[Series]:
    """A curve of many points, faint, and its mean over a fortieth of them on top."""
    window = len(values) // 40
    if window <= 1:
        return [Series(name, steps, values, colour)]
    return [
        Series("", steps, values, colour, "faint"),
        Series(f"{name} (mean over {window | 1} steps)", steps, smoothed(values, window), colour),
    ]


def curves_svg(title: str, series: Sequence[Series]) -> str:
    """Curves on one pair of axes as an SVG element, in the colours ``--c0`` … of the page; "" without a point.

    The first series is at the bottom; those without a point are left out. The title, with the ends of the last series,
    is told to who cannot see what is drawn.
    """
    drawn = [one for one in series if len(one.values)]
    if not drawn:
        return ""
    first, last = (number_text(float(drawn[-1].values[at])) for at in (0, -1))
    with _new_axes(_INLINE, 11.5, left=46, right=8, top=8, bottom=26) as (figure, axes):
        _draw(axes, drawn)
        file, written_by = io.StringIO(), dict.fromkeys(("Format", "Type", "Creator", "Date"))
        figure.savefig(file, format="svg", transparent=True, metadata=written_by)
    # What a page may not have: names, addresses and styles for all of it.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    text = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-(family|size): [^;\"]*;? ?|\s*\n\s*", " ", text)
    elements = re.sub(r"(\.\d\d)\d+(?=[ \"),;])", r"\1", text)  # of a pixel; what is written ends with <
    for name, colour in (_PALETTE | _COLOURS).items():
        elements = elements.replace(colour, f"var(--{name})")
    label = escape(f"{title}: {first} at first, {last} at the end")
    return f'<svg viewBox="0 0 {_INLINE[0]} {_INLINE[1]}" role="img" aria-label="{label}">{elements}</svg>'


def curves_picture(title: str, series: Sequence[Series]) -> Image.Image | None:
    """Curves on one pair of axes, RGB on white; None where there is no point to draw.

    The title and the names of the series stand above. A curve that starts far above the rest would flatten it: what is
    above the 99th percentile is cut off.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = [one for one in series if len(one.values)]
    if not drawn:
        return None
    with _new_axes(_PICTURE, 16, left=74, right=24, top=56, bottom=64) as (figure, axes):
        _draw(axes, drawn, 99)
        axes.set_title(title, loc="left", fontsize=19, color=_PALETTE["ink"], pad=16)
        axes.set_xlabel("step", loc="right", color=_PALETTE["soft"])
        if any(one.name for one in drawn):
            beside = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=14, columnspacing=1.4)
            beside.set_frame_on(False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


@contextmanager
def _new_axes(
    size: tuple[int, int], font_size: float, *, left: int, right: int, top: int, bottom: int
) -> Iterator[tuple["Figure", "Axes"]]:
    """Axes on an empty figure of (width, height) pixels, each of which is a point.

    Their margins are pixels, so that what is drawn does not hang on the font of a page. matplotlib is as it comes,
    whatever the user's own settings say, with text in SVG as text; restored at the end.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    ours = {"svg.fonttype": "none", "svg.hashsalt": "maehub", "font.size": font_size, "text.parse_math": False}
    ours |= {"lines.markersize": 0.45 * font_size}
    with matplotlib.style.context(["default", ours]):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        inside = (size[0] - left - right) / size[0], (size[1] - top - bottom) / size[1]
        yield figure, figure.add_axes((left / size[0], bottom / size[1], *inside))


def number_text(value: float) -> str:
    """A short number: 0.25, 12k, 1.5e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:.4g}"


def _draw(axes: "Axes", series: Sequence[Series], share: float = 100) -> None:
    """Curves and their axes; values above this percentile of them all are drawn at the upper edge."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

    axes.set_autoscale_on(False)
    values, steps = (np.concatenate([getattr(one, name) for one in series]) for name in ("values", "steps"))
    first, last = float(steps.min()), float(steps.max())
    low, high = float(values.min()), float(np.percentile(values, share))
    if low > 0 and high / low > _LOGARITHMIC:
        bottom, top = low / 1.12, high * 1.12
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,), numticks=8))
        axes.yaxis.minorticks_off()
    else:
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        bottom, top = low - pad, high + pad
        bottom = 0.0 if low >= 0 and bottom < 0.35 * top else bottom
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    for one in series:
        kept, shown = decimated(one.steps, one.values)
        look = _LOOKS["points" if len(shown) == 1 else one.style]
        colour = list(_COLOURS.values())[one.colour % len(_COLOURS)]
        every = -(-len(shown) // _MOST_MARKS)
        axes.plot(kept, np.minimum(shown, top), color=colour, label=one.name, markevery=every, clip_on=False, **look)
    axes.set_ylim(bottom, top)
    axes.set_xlim(first - (first == last), last + (first == last))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=_ROUND, integer=True) if first < last else FixedLocator([first]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axes.tick_params(left=False, bottom=False, labelcolor=_PALETTE["soft"], pad=5)
    axes.grid(axis="y", color=_PALETTE["line"], clip_on=False)
    axes.set_axisbelow(True)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_PALETTE["soft"])
