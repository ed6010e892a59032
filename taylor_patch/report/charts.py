"""Charts as inline SVG: no library, no script, colours from the page's style so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

LEFT, TOP, WIDTH, BOTTOM = 96, 12, 640, 50
"""Margins and width in SVG units; the page scales them."""

SERIES = 6
"""Number of categorical colours in the page's style (--series-0 ...)."""


def _frame(height: float, columns: int, body: str, x_label: str, y_label: str, label: str) -> str:
    total = TOP + height + BOTTOM
    # On a phone a chart of up to 20 columns fits as it is; one of more is as wide as they need, and scrolls.
    least = min(34.0, 5 + 0.8 * columns)
    return (f'<div class="scroll"><svg style="min-width: {least:.3g}rem" viewBox="0 0 {LEFT + WIDTH + 8} {total:.0f}" role="img" '
            f'aria-label="{escape(label)}">{body}'
            f'<text class="axis" x="{LEFT + WIDTH / 2}" y="{total - 6:.0f}" text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="axis" transform="translate(18 {TOP + height / 2:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text></svg></div>")


def _ticks(count: int, most: int) -> list[int]:
    """At most `most` of the positions 0 to count - 1, evenly."""
    stride = max(1, -(-count // most))
    return list(range(0, count, stride))


def _x_ticks(columns: Sequence[object], height: float) -> str:
    cell = WIDTH / max(len(columns), 1)
    return "".join(f'<text class="tick" x="{LEFT + (i + .5) * cell:.1f}" y="{TOP + height + 18:.1f}" text-anchor="middle">'
                   f"{escape(str(columns[i]))}</text>" for i in _ticks(len(columns), 16))


def grid(columns: Sequence[object], rows: Sequence[object], fill: Callable[[int, int], tuple[str, str] | None], x_label: str, y_label: str,
         label: str) -> str:
    """A cell for each (column, row): fill gives (CSS colour, what to show on hover), or None for an empty cell."""
    cell_w, cell_h = WIDTH / max(len(columns), 1), max(6.0, min(22.0, 420 / max(len(rows), 1)))
    height = cell_h * max(len(rows), 1)
    parts = []
    for i in range(len(columns)):
        for j in range(len(rows)):
            colour, title = fill(i, j) or ("var(--empty)", "exact attention")
            parts.append(f'<rect x="{LEFT + i * cell_w + .5:.1f}" y="{TOP + j * cell_h + .5:.1f}" width="{max(cell_w - 1, .5):.1f}" '
                         f'height="{cell_h - 1:.1f}" fill="{colour}"><title>{escape(title)}</title></rect>')
    parts += [f'<text class="tick" x="{LEFT - 6}" y="{TOP + (j + .5) * cell_h + 4:.1f}" text-anchor="end">{escape(str(rows[j]))}</text>'
              for j in _ticks(len(rows), 20)]
    return _frame(height, len(columns), "".join(parts) + _x_ticks(columns, height), x_label, y_label, label)


def nice(value: float) -> float:
    """The least of 1, 2, 4, 8 times a power of ten that is not below `value`: its quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * (1 - 1e-9))


def number(value: float) -> str:
    """Four digits, without an exponent where the number is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axis(low: float, high: float, height: float) -> tuple[Callable[[float], float], str]:
    """(value -> y, grid lines with their numbers) for values from low to high."""
    def y(value: float) -> float:
        return TOP + height * (1 - (value - low) / (high - low))

    marks = [low + (high - low) * part / 4 for part in range(5)]
    return y, "".join(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
                      f'<text class="tick" x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{number(mark)}</text>' for mark in marks)


def bars(columns: Sequence[object], series: Mapping[str, Sequence[float]], marks: Sequence[float | None], x_label: str, y_label: str,
         label: str) -> str:
    """Stacked bars: series name -> a value for each column. marks: a line across each column, None for none."""
    height = 200.0
    tops = [sum(values[i] for values in series.values()) for i in range(len(columns))] + [mark for mark in marks if mark is not None]
    y, parts = _axis(0.0, nice(max([*tops, 1e-9])), height)
    cell = WIDTH / max(len(columns), 1)
    for i in range(len(columns)):
        base = 0.0
        for number, (name, values) in enumerate(series.items()):
            parts += (f'<rect x="{LEFT + i * cell + 1:.1f}" width="{max(cell - 2, 1):.1f}" y="{y(base + values[i]):.1f}" '
                      f'height="{y(base) - y(base + values[i]):.1f}" fill="var(--series-{number % SERIES})">'
                      f"<title>{escape(f'{name}, {x_label} {columns[i]}: {values[i]:.3g}')}</title></rect>")
            base += values[i]
        if (mark := marks[i]) is not None:
            parts += (f'<line x1="{LEFT + i * cell:.1f}" x2="{LEFT + (i + 1) * cell:.1f}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" '
                      f'stroke="var(--ink)" stroke-width="2"><title>{escape(f"exact, {x_label} {columns[i]}: {mark:.3g}")}</title></line>')
    return _frame(height, len(columns), parts + _x_ticks(columns, height), x_label, y_label, label)


def ranges(columns: Sequence[object], values: Sequence[tuple[float, float, float]], x_label: str, y_label: str, label: str) -> str:
    """A vertical range (low, middle, high) for each column."""
    height = 200.0
    reach = nice(max([abs(v[i]) for v in values for i in (0, 2)] + [1e-9]))
    y, parts = _axis(-reach if any(v[0] < 0 for v in values) else 0.0, reach, height)
    cell = WIDTH / max(len(columns), 1)
    for i, (bottom, middle, top) in enumerate(values):
        x = LEFT + (i + .5) * cell
        parts += (f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(bottom):.1f}" y2="{y(top):.1f}" stroke="var(--series-0)" '
                     f'stroke-width="{max(2.0, min(10.0, cell * .5)):.1f}"><title>{bottom:.3g} to {top:.3g}</title></line>'
                     f'<circle cx="{x:.1f}" cy="{y(middle):.1f}" r="3" fill="var(--ink)"/>')
    return _frame(height, len(columns), parts + _x_ticks(columns, height), x_label, y_label, label)
