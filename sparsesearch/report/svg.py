"""The few SVG pieces every figure shares. All text is escaped here and nowhere else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'Liberation Mono','DejaVu Sans Mono',monospace"


def text(x: float, y: float, content: str, *, css: str = "", anchor: str = "start", extra: str = "") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'


def figure(width: float, height: float, body: str, *, label: str, description: str = "", style: str = "") -> str:
    """An accessible SVG element with its own coordinate system; `style` makes it stand alone."""
    css = f"<style>{style}</style>" if style else ""
    described = f"<desc>{escape(description)}</desc>" if description else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>{described}{css}{body}</svg>'
    )


_MOST_DECADES = 8


@dataclass(frozen=True)
class Axis:
    """Data values low … high along pixels start … end, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of a value."""
        if self.log:
            share = (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis; on a logarithmic one, fewer per decade the more decades there are."""
        if not self.log:
            step = _nice((self.high - self.low) / 6)
            first = math.ceil(self.low / step - 1e-9)
            return [round(index * step, 12) for index in range(first, math.floor(self.high / step + 1e-9) + 1)]
        span = self.high / self.low
        sparse: tuple[float, ...] = (1,) if span > 1e4 else (1, 3)
        steps = sparse if span > 30 else (1, 2, 5) if span > 8 else (1, 1.5, 2, 3, 4, 5, 7)
        stride = max(1, math.ceil(math.log10(span) / _MOST_DECADES))
        decades = range(
            math.floor(math.log10(self.low) / stride) * stride, math.ceil(math.log10(self.high)) + 1, stride
        )
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def spanning(values: Sequence[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds all values with a little air; `zero` makes a linear one begin at 0."""
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.35, high * 1.35, start, end, log=True)
    air = 0.06 * (high - low or abs(high) or 1.0)
    return Axis(0.0 if zero else low - air, high + air, start, end)


def _nice(step: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(step))
    return next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= step * (1 - 1e-9))
