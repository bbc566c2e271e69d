"""The only place that prints: results on stdout (tables, or one JSON value), progress and messages on stderr."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]
PIPE_COLUMNS = 120
LOG_EVERY_S = 30.0


def say(text: str) -> None:
    """A message for people, on stderr."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(text)


def emit_json(content: Any) -> None:
    """One JSON value on stdout and nothing else; what is not a number is null."""
    sys.stdout.write(json.dumps(_plain(content), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A titled table on stdout; columns of numbers are right-aligned."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        numeric = all(row[index] is None or isinstance(row[index], int | float) for row in rows)
        grid.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(_text(value) for value in row))
    _show(title, grid)


def pairs(title: str, content: Mapping[str, object]) -> None:
    """Named values on stdout, one per line; a mapping or a list takes a line per entry."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in content.items():
        grid.add_row(name.replace("_", " ") if name.islower() else name, _text(value))
    _show(title, grid)


def entries(title: str, content: Mapping[str, Sequence[str]]) -> None:
    """Names on stdout, each followed by indented paragraphs."""
    from rich.padding import Padding

    console = _console()
    console.print(title, style="bold", markup=False)
    for name, paragraphs in content.items():
        console.print(name, style="bold", markup=False)
        for text in paragraphs:
            console.print(Padding(_text(text), (0, 0, 0, 4), expand=False))
    console.print()


def lines(*texts: str) -> None:
    """Plain lines on stdout."""
    sys.stdout.write("\n".join(texts) + "\n")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback drawn on stderr with the time left; where stderr is no terminal, such as in a log, a line every half minute."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LoggedProgress()
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    tasks: dict[str, Any] = {}
    with bar:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


class _LoggedProgress:
    """Lines for a log: none from a command that is done within half a minute."""

    def __init__(self) -> None:
        self._said_s = monotonic()
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say how far the stage is, unless a line was written lately."""
        now_s = monotonic()
        began_s, first = self._began.setdefault(stage, (now_s, done))
        if now_s - self._said_s < LOG_EVERY_S:
            return
        self._said_s, spent_s = now_s, now_s - began_s
        left = f", about {spent_s / (done - first) * (total - done):.0f} s left" if first < done < total else ""
        say(f"{_text(stage)}: {done} of {total} after {spent_s:.0f} s{left}")


def _show(title: str, grid: Any) -> None:
    console = _console()
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(grid)
    console.print()


def _console() -> "Console":
    """As wide as the terminal; a pipe gets COLUMNS, or enough for most tables."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_COLUMNS
    return console


def _text(value: object) -> str:
    from rich.markup import escape

    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case Mapping():
            return "\n".join(f"{name}: {_text(part)}" for name, part in value.items()) or "none"
        case list() | tuple():
            return ", ".join(_text(part) for part in value) or "none"
        case _:
            return escape(str(value))


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return str(value)
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(name): _plain(part) for name, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
        case _:
            return value
