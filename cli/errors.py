"""The only place that turns exceptions into exit codes: 0 ok, 1 failure, 2 usage, 3 infeasible, 4 regression, 5 mismatch, 130 interrupt."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from .render import say

INTERRUPTED = 130
EXTRAS = {
    "diffusers": "diffusers",
    "optuna_dashboard": "dashboard",
    "psycopg": "postgresql",
    "redis": "redis",
    "datasets": "data",
}
"""Packages that only some commands need -> the extra that brings them."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Show a known error as one sentence on stderr and exit with its code; anything else keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            say("[red]interrupted[/]: what was finished is on disk; commands that take --resume continue from there.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            from sparsesearch.errors import SparseSearchError

            package = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
            if package in EXTRAS:
                say(f"[red]error[/]: this needs {package}: pip install 'sparsesearch\\[{EXTRAS[package]}]'.")
                raise typer.Exit(1) from error
            if not isinstance(error, SparseSearchError):
                raise
            say(f"[red]error[/]: {_escaped(str(error))}")
            raise typer.Exit(error.exit_code) from error

    return run


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
