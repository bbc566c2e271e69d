"""The command that looks for defects in a plan."""

from typing import Annotated

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, lines, table


def lint(
    plan: o.PlanFile,
    max_groups: Annotated[int, typer.Option(min=0, help="Token orders per layer besides the model's own.")] = 4,
    json: o.Json = False,
) -> None:
    """Look for defects in a plan: what can be read, but is wrong, wasteful or ambiguous."""
    from dataclasses import asdict

    from sparsesearch.errors import SpecError
    from sparsesearch.plan import Plan
    from sparsesearch.plan_lint import densities
    from sparsesearch.plan_lint import lint as run

    opened = Plan.load(plan)
    found = run(opened, max_groups=max_groups)
    shares = {} if found else densities(opened, max(opened.lengths_tokens))
    if json:
        emit_json({"findings": [asdict(finding) for finding in found], "densities": shares})
    elif found:
        table(f"{len(found)} findings", ["check", "where", "what"], [[f.check, f.where, f.message] for f in found])
    else:
        named = ", ".join(f"{share:.4g} of the {area.replace('_', ' ')}" for area, share in shares.items())
        lines(f"{plan}: no findings", f"tiles of static heads: {named}")
    if found:
        raise SpecError(
            f"{plan} must have no findings, but has {len(found)}. Correct the search space or search again."
        )


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("lint")(guarded(lint))
