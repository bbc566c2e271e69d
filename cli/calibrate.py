"""The command that measures a device."""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, pairs, progress_bar


def calibrate(
    context: typer.Context,
    device: Annotated[str, typer.Option(help="Device to measure: cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; <device>.json by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths and repeats, for a first look.")] = False,
    runs: Annotated[
        Path | None, typer.Option(help="Also write a GPU's micro-runs, from which the fit can be repeated.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure what attention costs here, and on a GPU what whole layers cost."""
    if device == "cpu":
        o.refuse_given(context, "is for a GPU, whose micro-runs are kept apart from the fit", "runs")
    from sparsesearch.cost.calibrate import calibrate as run

    path = out or Path(f"{device}.json")
    with progress_bar() as progress:
        found = run(device, out=path, quick=quick, runs_out=runs, progress=progress)
    content = found.summary()
    emit_json(content) if json else pairs(f"cost model in {path}", content)


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("calibrate")(guarded(calibrate))
