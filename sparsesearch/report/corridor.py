"""The picture of the corridor: which stage reads which file. Drawn from the lists below, for the README."""

from dataclasses import dataclass

import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.report.palette import INK, kind_css
from sparsesearch.report.svg import FONT, MONO, figure, text
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero

_ROOM, _GAP, _LEFT, _TOP, _HEIGHT = 190.0, 46.0, 24.0, 142.0, 178.0


@dataclass(frozen=True)
class _Room:
    command: str
    what: str
    artefact: str
    inputs: tuple[str, ...] = ()


_ROOMS = (
    _Room("profile", "loss of each rule, per head", "profile/", ("model", "calibration data")),
    _Room("search", "exact, with a proven gap", "sparse_plan.json", ("search space", "cost model")),
    _Room("apply", "from_pretrained loads it", "patched/", ("model",)),
    _Room("eval", "dense and sparse in one job", "metrics.json", ("held-out data",)),
    _Room("check, report", "a gate and a page", "exit code, report.html", ("baseline",)),
)

_CSS = (
    f"text{{font-family:{FONT};fill:var(--ink)}}.command{{font:600 16px {MONO}}}.what{{font-size:12px;fill:var(--soft)}}"
    f".artefact{{font:500 12.5px {MONO};fill:var(--accent)}}.input{{font-size:12.5px;fill:var(--soft)}}"
    ".title{font-size:17px;font-weight:650}.hall{fill:var(--faint)}.room{fill:var(--card);stroke:var(--line);stroke-width:1.5}"
    ".arrow{stroke:var(--soft);stroke-width:1.8;fill:none;stroke-linecap:round;stroke-linejoin:round}.chip{fill:var(--card);stroke:var(--line)}"
    ".line{stroke:var(--accent);stroke-width:2.2;fill:none;stroke-linecap:round;stroke-linejoin:round}.dot{fill:var(--accent)}"
    ".ghost{stroke:var(--soft);stroke-width:1.6;fill:none;stroke-dasharray:3 4;stroke-linecap:round}.ok{stroke:var(--good);stroke-width:4;fill:none;"
    "stroke-linecap:round;stroke-linejoin:round}.paper{fill:var(--bg)}.soft-fill{fill:var(--line)}"
)


def corridor() -> str:
    """A stand-alone SVG."""
    width = 2 * _LEFT + len(_ROOMS) * _ROOM + (len(_ROOMS) - 1) * _GAP
    height = _TOP + _HEIGHT + 84
    icons = (_heat(), _front(), _masks(), _bars(), _tick())
    parts = [
        f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="16" class="paper"/>',
        text(_LEFT, 36, "One corridor: every stage reads files and leaves a file", css="title"),
        f'<rect x="{_LEFT - 12:.0f}" y="{_TOP + 52:.0f}" width="{width - 2 * _LEFT + 24:.0f}" height="74" rx="14" class="hall"/>',
    ]
    for index, (room, icon) in enumerate(zip(_ROOMS, icons, strict=True)):
        parts.append(_room(room, _LEFT + index * (_ROOM + _GAP), icon, last=index == len(_ROOMS) - 1))
    spoken = " ".join(
        f"{room.command} reads {', '.join(room.inputs) or 'the file before it'} and writes {room.artefact}."
        for room in _ROOMS
    )
    style = INK + kind_css(("dense", "sink_window", "zero", "mean_value")) + _CSS
    return figure(width, height, "".join(parts), label="The corridor of sparsesearch", description=spoken, style=style)


def _room(room: _Room, x: float, icon: str, *, last: bool) -> str:
    middle, floor = x + _ROOM / 2, _TOP + _HEIGHT
    parts = [f'<rect x="{x:.0f}" y="{_TOP:.0f}" width="{_ROOM:.0f}" height="{_HEIGHT:.0f}" rx="12" class="room"/>']
    parts.append(text(middle, _TOP + 30, room.command, css="command", anchor="middle"))
    parts.append(f'<g transform="translate({middle - 50:.0f} {_TOP + 46:.0f})">{icon}</g>')
    parts.append(text(middle, floor - 18, room.what, css="what", anchor="middle"))
    step = 17.0
    for line, name in enumerate(room.inputs):
        parts.append(text(middle, _TOP - 46 - step * (len(room.inputs) - 1 - line), name, css="input", anchor="middle"))
    if room.inputs:
        parts.append(_arrow(middle, _TOP - 36, middle, _TOP - 6))
    parts.append(f'<line x1="{middle:.0f}" x2="{middle:.0f}" y1="{floor:.0f}" y2="{floor + 16:.0f}" class="arrow"/>')
    parts.append(
        f'<rect x="{x + 4:.0f}" y="{floor + 16:.0f}" width="{_ROOM - 8:.0f}" height="32" rx="8" class="chip"/>'
    )
    parts.append(text(middle, floor + 37, room.artefact, css="artefact", anchor="middle"))
    if not last:
        parts.append(_arrow(x + _ROOM + 7, _TOP + 89, x + _ROOM + _GAP - 7, _TOP + 89))
    return "".join(parts)


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    head = f"M{x2 - 6:.0f} {y2 - 5:.0f}L{x2:.0f} {y2:.0f}L{x2 - 6:.0f} {y2 + 5:.0f}"
    if x1 == x2:
        head = f"M{x2 - 5:.0f} {y2 - 6:.0f}L{x2:.0f} {y2:.0f}L{x2 + 5:.0f} {y2 - 6:.0f}"
    return f'<path d="M{x1:.0f} {y1:.0f}L{x2:.0f} {y2:.0f}{head}" class="arrow"/>'


def _heat() -> str:
    """Heads by rules: losses as shades (a pattern, not data)."""
    shades = torch.rand(5, 8, generator=torch.Generator().manual_seed(4)).square().tolist()
    return "".join(
        f'<rect x="{2 + column * 12.2:.1f}" y="{6 + row * 14:.1f}" width="10.4" height="12" rx="2.5" class="dot" opacity="{0.1 + 0.9 * shade:.2f}"/>'
        for row, line in enumerate(shades)
        for column, shade in enumerate(line)
    )


def _front() -> str:
    """A front that bends below the uniform choices."""
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="3.4" class="dot"/>'
        for x, y in ((12, 16), (24, 44), (44, 60), (68, 67), (90, 70))
    )
    return f'<path d="M6 4C22 22 46 36 94 44" class="ghost"/><path d="M12 16C16 32 22 46 44 60S80 69 90 70" class="line"/>{dots}'


def _masks() -> str:
    """Three heads side by side: real masks of real rules."""
    grid = BlockGrid(10, 10, 1)
    rules: tuple[Rule, ...] = (Dense(), SinkWindow(sink=1, window=LengthLaw(a=3)), Zero(), MeanValue())
    parts = []
    for index, rule in enumerate(rules):
        x, y = (index % 2) * 53.0, (index // 2) * 40.0
        reachable, tiles = grid.reachable().tolist(), rule.select(grid).tolist()
        for row in range(10):
            for column in range(10):
                if reachable[row][column]:
                    css = f"k-{rule.kind}" if tiles[row][column] or rule.rest == "mean_value" else "soft-fill"
                    faint = ' opacity="0.35"' if rule.rest == "mean_value" else ""
                    parts.append(
                        f'<rect x="{x + column * 4.6:.1f}" y="{y + row * 3.6:.1f}" width="4" height="3" class="{css}"{faint}/>'
                    )
    return "".join(parts)


def _bars() -> str:
    """Two bars that should be equal, and one that should be shorter."""
    return (
        '<rect x="4" y="8" width="92" height="11" rx="5.5" class="soft-fill"/><rect x="4" y="23" width="90" height="11" rx="5.5" class="dot"/>'
        '<rect x="4" y="48" width="92" height="11" rx="5.5" class="soft-fill"/><rect x="4" y="63" width="44" height="11" rx="5.5" class="dot"/>'
    )


def _tick() -> str:
    """A page and a tick."""
    return (
        '<rect x="14" y="4" width="50" height="68" rx="6" class="chip"/><path d="M24 20h30M24 32h30M24 44h18" class="arrow" opacity="0.6"/>'
        '<path d="M50 54l13 13l25-31" class="ok"/>'
    )
