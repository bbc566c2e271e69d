"""Curves and points with error bars: the report's figures, and stand-alone plots for a README."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsesearch.errors import SpecError
from sparsesearch.report.palette import INK, SERIES, series_css
from sparsesearch.report.svg import FONT, Axis, figure, spanning, text

_MARKS = ("circle", "square", "triangle", "diamond", "cross")


@dataclass(frozen=True)
class Curve:
    """Points (x, y) or (x, y, standard error), in order of x; joined by a line when `line`."""

    name: str
    points: Sequence[tuple[float, ...]]
    line: bool = True


@dataclass(frozen=True)
class Panel:
    """One set of axes. With `log_y`, every y must be positive; `zero_y` starts at 0; `x_range` is that of the points by default."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_y: bool = False
    zero_y: bool = False
    x_range: tuple[float, float] | None = None


PLOT_CSS = (
    f"text{{font-family:{FONT};font-size:12px;fill:var(--ink)}}.tick{{fill:var(--soft);font-size:11px}}.axis{{fill:var(--soft);font-size:12px}}"
    ".title{font-weight:600;font-size:14px}.gridline{stroke:var(--line);stroke-width:1}.frame{fill:var(--card);stroke:var(--line)}"
    ".curve{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}.mark{fill:var(--c);stroke:var(--card);stroke-width:1.5}"
    ".error{stroke:var(--c);stroke-width:1.4;opacity:.65}"
)


def plot(panels: Sequence[Panel], *, title: str, width: float = 960.0, standalone: bool = True) -> str:
    """Panels side by side with one legend above; a name has the same colour and mark in all of them.

    Args:
        panels: at least one.
        title: what the figure shows, for the reader and for screen readers.
        width: in pixels.
        standalone: carry colours and fonts, to be saved as a file of its own.

    Raises:
        SpecError: no panel, or an empty one, or a value that the axis cannot show.
    """
    _refuse_empty(panels)
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    gap, top, height = 28.0, 66.0 if standalone else 40.0, 380.0
    panel_width = (width - gap * (len(panels) - 1) - 32) / len(panels)
    body = (
        [f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="12" class="frame"/>']
        if standalone
        else []
    )
    if standalone:
        body.append(text(24, 30, title, css="title"))
    body.append(_legend(names, 24, top - 16))
    for index, panel in enumerate(panels):
        body.append(_panel(panel, names, 16 + index * (panel_width + gap), top, panel_width, height - top - 14))
    style = INK + series_css() + PLOT_CSS if standalone else ""
    return figure(width, height, "".join(body), label=title, description=_spoken(panels), style=style)


def _panel(panel: Panel, names: list[str], left: float, top: float, width: float, height: float) -> str:
    points = [point for curve in panel.curves for point in curve.points]
    start, end = left + 62, left + width - 14
    x = Axis(*panel.x_range, start, end) if panel.x_range else spanning([point[0] for point in points], start, end)
    tips = [point[1] + sign * (point[2] if len(point) > 2 else 0.0) for point in points for sign in (-1, 1)]
    if panel.log_y:
        tips = [tip for tip in tips if tip > 0]
    y = spanning(tips, top + height - 44, top + 26, log=panel.log_y, zero=panel.zero_y)
    parts = [text(left + 62, top + 12, panel.title, css="title"), _grid(x, y, panel)]
    for curve in panel.curves:
        parts.append(_curve(curve, names.index(curve.name), x, y))
    return "".join(parts)


def _grid(x: Axis, y: Axis, panel: Panel) -> str:
    parts = []
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}" class="gridline"/>')
        parts.append(text(x.start - 8, at + 4, f"{tick:g}", css="tick", anchor="end"))
    for tick in x.ticks():
        parts.append(text(x.at(tick), y.start + 18, f"{tick:g}", css="tick", anchor="middle"))
    parts.append(text((x.start + x.end) / 2, y.start + 38, panel.x_label, css="axis", anchor="middle"))
    middle = (y.start + y.end) / 2
    turned = f' transform="rotate(-90 {x.start - 48:.1f} {middle:.1f})"'
    parts.append(text(x.start - 48, middle, panel.y_label, css="axis", anchor="middle", extra=turned))
    return "".join(parts)


def _curve(curve: Curve, series: int, x: Axis, y: Axis) -> str:
    parts = [f'<g class="s{series % len(SERIES)}">']
    places = [(x.at(point[0]), y.at(point[1])) for point in curve.points]
    if curve.line and len(places) > 1:
        parts.append(f'<path class="curve" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in places)}"/>')
    for point, (px, py) in zip(curve.points, places, strict=True):
        if len(point) > 2 and point[2] > 0:
            low, high = y.at(max(point[1] - point[2], y.low)), y.at(point[1] + point[2])
            parts.append(f'<line class="error" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(_mark(series, px, py, f"{curve.name}: {point[0]:.4g}, {point[1]:.4g}"))
    return "".join(parts) + "</g>"


def _mark(series: int, x: float, y: float, tip: str) -> str:
    shape = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6"',
        "square": f'<rect x="{x - 4.2:.1f}" y="{y - 4.2:.1f}" width="8.4" height="8.4"',
        "triangle": f'<path d="M{x:.1f} {y - 5.6:.1f}l5.2 9.2h-10.4z"',
        "diamond": f'<path d="M{x:.1f} {y - 6:.1f}l5.4 6l-5.4 6l-5.4 -6z"',
        "cross": f'<path d="M{x - 5:.1f} {y - 2:.1f}h3v-3h4v3h3v4h-3v3h-4v-3h-3z"',
    }[_MARKS[series % len(_MARKS)]]
    element = shape[1:].split(" ", 1)[0]
    said = text(0, 0, tip).split(">", 1)[1].removesuffix("</text>") if tip else ""
    return f'{shape} class="mark">{f"<title>{said}</title>" if said else ""}</{element}>'


def _legend(names: list[str], x: float, y: float) -> str:
    parts = []
    for series, name in enumerate(names):
        parts.append(f'<g class="s{series % len(SERIES)}">{_mark(series, x + 6, y - 4, "")}{text(x + 18, y, name)}</g>')
        x += 40 + 6.6 * len(name)
    return "".join(parts)


def _spoken(panels: Sequence[Panel]) -> str:
    """The figure in words and numbers."""
    return " ".join(
        f"{panel.title}, {panel.y_label} against {panel.x_label}: "
        + "; ".join(
            f"{curve.name}: " + ", ".join(f"({point[0]:.3g}, {point[1]:.3g})" for point in curve.points)
            for curve in panel.curves
        )
        + "."
        for panel in panels
    )


def _refuse_empty(panels: Sequence[Panel]) -> None:
    for panel in panels:
        values = [value for curve in panel.curves for point in curve.points for value in point]
        if not values or not all(math.isfinite(value) for value in values):
            raise SpecError(f"panel {panel.title!r} must have at least one point and finite values only.")
        if panel.log_y and any(point[1] <= 0 for curve in panel.curves for point in curve.points):
            raise SpecError(
                f"panel {panel.title!r} has a logarithmic axis, so every y must be positive; leave dense (KL 0) out."
            )
    if not panels:
        raise SpecError("a plot must have at least one panel.")
