"""The only place that turns exceptions into exit codes: 0 ok, 1 failure, 2 usage, 3 infeasible, 4 regression, 5 mismatch, 130 interrupt."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Timer
from typing import Any

import typer

from .render import say

INTERRUPTED = 130
CONTINUES = {
    **dict.fromkeys(("profile", "heal"), "what was finished is on disk; run the command again with --resume."),
    "front": "what was finished is on disk; run the command again with --resume.",
    "tune": "finished trials are in the study; go on with --join and its name.",
    "quickstart": "what was finished is on disk; run the command again to go on.",
}
"""Command -> what to do after Ctrl-C; the others write their results last."""
EXTRAS = {
    "diffusers": "diffusers",
    "optuna_dashboard": "dashboard",
    "psycopg": "postgresql",
    "redis": "redis",
    "datasets": "data",
}
"""Packages that only some commands need -> the extra that brings them."""
PLACES = ("out", "pareto", "junit", "plot", "runs", "folder")
"""Parameters that name what a command writes."""
KEPT = (*PLACES, "measured")
"""Parameters that may name the place of a result: results themselves, and a record that is written anew."""
WRITE_FOLDERS = ("apply", "convert", "heal", "profile", "quickstart", "search", "tune")
"""Commands whose `out` may be a folder; that of the others is a file."""


def interrupt_again(ignored: Any) -> None:
    """For `sys.unraisablehook`: Ctrl-C that falls into a destructor is raised there, and Python drops it. Give it to the main thread once more."""
    if ignored.exc_type is not None and issubclass(ignored.exc_type, KeyboardInterrupt):
        Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()  # not from here, which is inside the destructor
    else:
        sys.__unraisablehook__(ignored)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Show a known error as one sentence on stderr and exit with its code; anything else keeps its traceback.

    Where results are to go is tried first, so that hours of work do not end at a folder that cannot be written.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _require_places(command.__name__, kwargs)
            with _reserved(command.__name__, kwargs):
                command(*args, **kwargs)
        except KeyboardInterrupt:
            say(
                f"[red]interrupted[/]: {CONTINUES.get(command.__name__, 'nothing half-made was left; run the command again.')}"
            )
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            told = _told(error)
            if told is None:
                raise
            message, code = told
            say(f"[red]error[/]: {_escaped(message)}")
            raise typer.Exit(code) from error

    return run


def _reserved(command: str, given: dict[str, Any]) -> AbstractContextManager[None]:
    """Its folder for this run alone: another one that resumes there, too, would take away what this one has written."""
    from sparsesearch.artifacts import reserved

    alone = os.environ.get("RANK", "0") == "0" and not given.get("dry_run")  # torchrun's processes share a folder
    return reserved(given["out"]) if command in ("profile", "quickstart") and alone else nullcontext()


def _require_places(command: str, given: dict[str, Any]) -> None:
    from sparsesearch.artifacts import require_writable

    taken = {path.resolve() for name, value in given.items() if name not in KEPT for path in _paths(value)}
    for name in PLACES:
        if isinstance(given.get(name), Path):
            folder = name == "folder" or (name == "out" and command in WRITE_FOLDERS)
            require_writable(given[name], is_file=not folder)
            if given[name].resolve() in taken:
                raise typer.BadParameter(
                    f"must be a place of its own, but {given[name]} is named twice and would be lost.",
                    param_hint=f"--{name}",
                )
            taken.add(given[name].resolve())


def _paths(value: Any) -> list[Path]:
    return [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, Path)]


def _told(error: Exception) -> tuple[str, int] | None:
    """The sentence and the exit code for an error that is no defect of ours; None for a defect."""
    from sparsesearch.errors import SparseSearchError

    if isinstance(error, SparseSearchError):
        return str(error), error.exit_code
    if isinstance(error, ImportError):
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        return None if extra is None else (f"this needs {error.name}: pip install 'sparsesearch[{extra}]'.", 1)
    reason = " ".join(str(error).split())
    match type(error).__name__:  # by name: a command that never loads torch must not load it to fail
        case "SafetensorError":
            return f"a safetensors file must be whole, but is damaged ({reason}). Fetch or make it again.", 1
        case "OutOfMemoryError":
            return (
                f"the work must fit into the device's memory, but does not: {reason} Take shorter lengths or a smaller batch.",
                1,
            )
    if isinstance(error, RuntimeError) and "can't allocate memory" in reason:  # torch's, on a CPU
        return "the work must fit into memory, but does not. Take shorter lengths or a smaller batch.", 1
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"{error.filename} must be usable, but {error.strerror or reason}. Check the path, its permissions and the disk.",
            1,
        )
    return None


@contextmanager
def usage(option: str) -> Iterator[None]:
    """Show a value that the library refuses as wrong usage of `option` (exit 2), with the command's usage line."""
    from sparsesearch.errors import SpecError

    try:
        yield
    except SpecError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
