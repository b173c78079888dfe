"""Curves as inline SVG, drawn here so that a page needs no script and no network. Colours are the page's CSS."""

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

import numpy as np

Style = Literal["line", "faint", "dashed", "points"]

_WIDTH, _HEIGHT = 440, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 26  # margins of the axes
_MOST_POINTS = 600  # of a curve: two for each pixel or so
_LOGARITHMIC = 30.0  # from this ratio of the largest value to the smallest on


class Series(NamedTuple):
    """One curve."""

    name: str
    steps: np.ndarray
    values: np.ndarray  # finite, as many
    colour: int = 0  # of the page's palette
    style: Style = "line"


def decimated(steps: np.ndarray, values: np.ndarray, most: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``most`` points that look the same: of each stretch the lowest and the highest."""
    if len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    chosen: set[int] = {0, len(values) - 1}
    for first, last in itertools.pairwise(edges.tolist()):
        part = values[first:last]
        chosen |= {first + int(part.argmin()), first + int(part.argmax())}
    places = sorted(chosen)
    return steps[places], values[places]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a window around each value, which is narrower at the ends."""
    if window <= 1 or len(values) < 3:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, len(values) - 1 - places), window // 2)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def chart(series: Sequence[Series], description: str) -> str:
    """An SVG element with axes and curves.

    Args:
        series: what to draw, the first at the bottom; those without a point are left out.
        description: for who cannot see it; must be escaped already.
    """
    drawn = [one for one in series if len(one.values)]
    if not drawn:
        return ""
    last = max(float(one.steps[-1]) for one in drawn)
    first = min(float(one.steps[0]) for one in drawn)
    values = np.concatenate([one.values for one in drawn])
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > _LOGARITHMIC
    if logarithmic:
        bottom, top = math.log10(low) - 0.05, math.log10(high) + 0.05
    else:
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        bottom, top = low - pad, high + pad
        bottom = 0.0 if low >= 0 and bottom < 0.35 * top else bottom
    across = (_WIDTH - _LEFT - _RIGHT) / max(last - first, 1.0)

    def x(step: float) -> float:
        return _LEFT + (step - first) * across if last > first else (_LEFT + _WIDTH - _RIGHT) / 2

    def y(value: float) -> float:
        height = math.log10(value) if logarithmic else value
        return _TOP + (top - height) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{description}">']
    for tick in _decades(bottom, top) if logarithmic else ticks(bottom, top):
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick_words(tick)}</text>'
        )
    for tick in ticks(first, last, 4) if last > first else [first]:
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - 9}" text-anchor="middle">{tick_words(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    for one in drawn:
        points = [(x(float(s)), y(float(v))) for s, v in zip(*decimated(one.steps, one.values), strict=True)]
        parts.append(_curve(points, one))
    return "".join([*parts, "</svg>"])


def figure(title: str, unit: str, series: Sequence[Series], *, legend: bool) -> str:
    """A chart with a title above it; nothing where no curve has a point.

    Args:
        title, unit: what is drawn, and what it is counted in.
        series: see `chart`; the last one is told to who cannot see it.
        legend: say which curve is which.
    """
    drawn = [one for one in series if len(one.values)]
    if not drawn:
        return ""
    main = drawn[-1]
    words = f"{title}: {tick_words(float(main.values[0]))} at first, {tick_words(float(main.values[-1]))} at the end"
    keys = "".join(
        f'<span class="key"><i class="c{one.colour} {one.style}"></i>{escape(one.name)}</span>'
        for one in drawn
        if one.name and legend
    )
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    caption = f"<figcaption><b>{escape(title)}</b>{unit}{keys}</figcaption>"
    return f"<figure>{caption}{chart(drawn, escape(words))}</figure>"


def raw_and_smooth(name: str, steps: np.ndarray, values: np.ndarray, colour: int) -> list[Series]:
    """A curve of many points, faint, and its mean over a fortieth of them on top."""
    window = len(values) // 40
    if window <= 1:
        return [Series(name, steps, values, colour)]
    return [
        Series("", steps, values, colour, "faint"),
        Series(f"{name} (mean over {window | 1} steps)", steps, smoothed(values, window), colour),
    ]


def _curve(points: Sequence[tuple[float, float]], one: Series) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    kind = f"c{one.colour} {one.style}"
    dots = ""
    if one.style == "points" or len(points) == 1:
        dots = "".join(f'<circle class="c{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points[:80])
    return f'<path class="curve {kind}" d="{path}"/>{dots}'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two, about ``count``."""
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten: 1, 2, 5 of each if there are few."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [f * 10.0**p for p in powers for f in factors if low <= math.log10(f * 10.0**p) <= high]


def tick_words(value: float) -> str:
    """A short number: 0.25, 12k, 1.5e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:.4g}"
