"""The command that writes a page about a plan and what was measured of it."""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from . import pipelines
from .errors import guarded
from .render import lines


def report(
    context: typer.Context,
    plan: o.PlanFile,
    metrics: Annotated[Path, typer.Argument(help="Metrics file written by eval or quickstart.", metavar="METRICS")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path("report.html"),
    profile: Annotated[Path | None, typer.Option(help="Profile directory, for the Pareto front.")] = None,
) -> None:
    """Write one self-contained HTML page. It shows rules per head, masks, front, and predicted beside measured."""
    if pipelines.is_metrics(metrics):
        o.refuse_given(context, "is not for plans of a pipeline", "profile")
        pipelines.report(plan, metrics, out)
        return
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.evaluate import Metrics
    from sparsesearch.plan import Plan
    from sparsesearch.report import render
    from sparsesearch.report.front import front_curves, timed_front

    opened, found = Plan.load(plan), Metrics.load(metrics)
    variant = found.variant_of(opened)
    own = None if profile is None else o.profile_for(opened, profile)
    front, timed = (None, None) if own is None else (front_curves(own, opened.unit), timed_front(own, opened))
    write_bytes(out, render(opened, found, variant=variant, pareto=front, timed=timed).encode())
    lines(f"written: {out}")


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("report")(guarded(report))
