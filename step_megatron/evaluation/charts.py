"""Small charts as inline SVG, drawn here so that the report needs no plotting library and no network.

- `line_chart`: one panel of curves over steps, raw values faint and a running median on top;
- `bar_panel`: horizontal bars of shares between 0 and 1 with interval whiskers.

Colours are CSS variables of the page (`--model`, `--probe`, `--other`, `--plain`, `--ink`, `--faint`, `--grid`), so both follow
light and dark. Panels are 360 units wide, shown one to one at phone width and in a grid on wide screens: text stays readable at
both.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 360


@dataclass(frozen=True)
class Series:
    """Curve of one quantity: `points` are (step, value), in order of step; `colour` names a CSS variable without dashes.

    `band` is how far a value may be off, of every point; it is shaded. Not with a logarithmic axis.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = "model"
    smooth: bool = False
    band: Sequence[float] = ()


@dataclass(frozen=True)
class Bar:
    """Bar of a share in [0, 1]; `interval` its whisker, `value` None writes `not measured`."""

    label: str
    value: float | None
    colour: str
    interval: tuple[float, float] | None = None


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) within `[low, high]`, about `wanted` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten within `[low, high]` (logarithms too); powers of ten only on long axes."""
    factors = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [math.log10(factor) + power for power in powers for factor in factors]
    return [tick for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]


def number(value: float) -> str:
    """Short text of a number for an axis: `0.0003` as `3e-4`, `1200` as `1.2k`."""
    size = abs(value)
    if size == 0:
        return "0"
    for power, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= power:
            return f"{value / power:.3g}{suffix}"
    if size < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def running_median(values: Sequence[float], half: int) -> list[float]:
    """Median over a window of `2 * half + 1` values, shorter at the ends."""
    medians = []
    for i in range(len(values)):
        window = sorted(values[max(0, i - half) : i + half + 1])
        medians.append(window[len(window) // 2])
    return medians


def line_chart(title: str, series: Sequence[Series], unit: str = "", height: int = 210, log: bool = False) -> str:
    """One panel of curves over training steps, as an `<svg>`; values that are not finite are left out.

    Args:
        title: heading inside the panel; `unit` is written beside it.
        log: logarithmic value axis (all values must then be positive; others are left out).
    """
    curves = [(item, [(x, y) for x, y in item.points if math.isfinite(y) and (not log or y > 0)]) for item in series]
    curves = [(item, points) for item, points in curves if points]
    heading = f'<text class="t" x="2" y="15">{html.escape(title)}<tspan class="u" dx="6">{html.escape(unit)}</tspan></text>'
    if not curves:
        empty = f'<text class="l" x="{WIDTH / 2}" y="{height / 2}" text-anchor="middle">no values recorded</text>'
        return _svg(title, height, heading + empty)
    scale = math.log10 if log else float
    xs = [x for _, points in curves for x, _ in points]
    ys = [scale(y) for _, points in curves for _, y in points] + [y for item, _ in curves for _, y in _edge(item)]
    low, high = min(ys), max(ys)
    if not log and 0 <= low < 0.5 * high:
        low = 0.0
    high = high if high > low else low + max(abs(low), 1e-12)
    left, right, top, bottom = 46, 14, 28, 24
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (WIDTH - left - right),
            height - bottom - (y - low) / (high - low) * (height - top - bottom),
        )

    parts = [heading]
    for tick in log_ticks(low, high) if log else nice_ticks(low, high):
        y = at(x0, tick)[1]
        parts.append(f'<line class="g" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shown = number(10**tick if log else tick)
        parts.append(f'<text class="l" x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for tick in nice_ticks(x0, x1):
        x = at(tick, low)[0]
        parts.append(f'<text class="l" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{number(tick)}</text>')
    for item, _ in curves:
        if edge := " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in _edge(item))):
            parts.append(f'<polygon style="fill:var(--{item.colour})" opacity="0.15" points="{edge}"/>')
    for item, points in curves:
        parts.append(_curve(item, [(x, scale(y)) for x, y in points], at))
    if len(curves) > 1:
        parts.append(_legend([item for item, _ in curves], top))
    return _svg(title, height, "".join(parts))


def _edge(item: Series) -> list[tuple[float, float]]:
    """Corners of a curve's band, there and back."""
    off = list(zip(item.points, item.band, strict=True)) if item.band else []
    return [(x, y + by) for (x, y), by in off] + [(x, y - by) for (x, y), by in reversed(off)]


def _curve(item: Series, points: list[tuple[float, float]], at) -> str:
    """Polyline of a series; a smoothed one has its raw values faint beneath. The last value is its tooltip."""
    text = f"{html.escape(item.label)}: last {number(item.points[-1][1])} at step {number(item.points[-1][0])}"

    def line(values: list[tuple[float, float]], extra: str) -> str:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*value) for value in values))
        return (
            f'<polyline class="c" style="stroke:var(--{item.colour})" {extra} points="{joined}"><title>{text}</title></polyline>'
        )

    if len(points) == 1:
        x, y = at(*points[0])
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:var(--{item.colour})"><title>{text}</title></circle>'
    if not item.smooth or len(points) < 12:
        return line(points, "")
    medians = running_median([y for _, y in points], max(2, len(points) // 40))
    return line(points, 'opacity="0.3"') + line([(x, m) for (x, _), m in zip(points, medians, strict=True)], "")


def _legend(series: Sequence[Series], top: int) -> str:
    """Names of the curves, right-aligned in the upper corner, one under the other."""
    rows = []
    for i, item in enumerate(series):
        y = top + 10 + 15 * i
        rows.append(f'<text class="l" x="{WIDTH - 30}" y="{y}" text-anchor="end">{html.escape(item.label)}</text>')
        rows.append(
            f'<line class="c" style="stroke:var(--{item.colour})" x1="{WIDTH - 26}" x2="{WIDTH - 14}" y1="{y - 4}" y2="{y - 4}"/>'
        )
    return "".join(rows)


def bar_panel(title: str, note: str, bars: Sequence[Bar]) -> str:
    """Panel of horizontal bars over [0, 1] as an `<svg>`, the value at the end of each, its interval as a whisker."""
    left, right, top, row = 84, 44, 40, 24
    height = top + row * len(bars) + 20
    span = WIDTH - left - right
    parts = [
        f'<text class="t" x="2" y="15">{html.escape(title)}</text>',
        f'<text class="u" x="2" y="31">{html.escape(note)}</text>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * span
        parts.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + row * len(bars)}"/>')
        parts.append(f'<text class="l" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{tick:g}</text>')
    for i, bar in enumerate(bars):
        y = top + row * i
        parts.append(f'<text class="l" x="{left - 8}" y="{y + 16}" text-anchor="end">{html.escape(bar.label)}</text>')
        if bar.value is None:
            parts.append(f'<text class="u" x="{left + 4}" y="{y + 16}">not measured</text>')
            continue
        end = left + min(max(bar.value, 0.0), 1.0) * span
        parts.append(
            f'<rect x="{left}" y="{y + 4}" width="{max(end - left, 1):.1f}" height="{row - 8}" rx="2" '
            f'style="fill:var(--{bar.colour})">'
            f"<title>{html.escape(bar.label)} {bar.value:.3f}</title></rect>"
        )
        if bar.interval is not None:
            a, b = (left + min(max(v, 0.0), 1.0) * span for v in bar.interval)
            middle = y + row / 2
            parts.append(
                f'<path class="w" d="M{a:.1f} {middle - 4}v8m0 -4H{b:.1f}m0 -4v8">'
                f"<title>95% interval {bar.interval[0]:.3f} to {bar.interval[1]:.3f}</title></path>"
            )
        parts.append(f'<text class="v" x="{WIDTH - 4}" y="{y + 16}" text-anchor="end">{bar.value:.2f}</text>')
    return _svg(title, height, "".join(parts))


def _svg(title: str, height: int, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">{body}</svg>'
