"""The only place that turns exceptions into exit codes: 0 ok, 1 failure, 2 usage, 3 infeasible, 4 regression, 5 mismatch, 130 interrupt."""

import functools
from collections.abc import Callable
from typing import Any

import typer
from sparsesearch_cli.render import say

INTERRUPTED = 130


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

            if not isinstance(error, SparseSearchError):
                raise
            say(f"[red]error[/]: {_escaped(str(error))}")
            raise typer.Exit(error.exit_code) from error

    return run


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
