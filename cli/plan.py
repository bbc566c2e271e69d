"""Commands that read plans: explain one, compare two."""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, entries, lines, table


def diff(
    plan_a: Annotated[Path, typer.Argument(help="A plan.", metavar="PLAN_A")],
    plan_b: Annotated[Path, typer.Argument(help="The plan to compare it with.", metavar="PLAN_B")],
    json: o.Json = False,
) -> None:
    """Compare two plans for one model, head by head."""
    from dataclasses import asdict

    from sparsesearch.comparison import diff as compare
    from sparsesearch.plan import Plan

    first = Plan.load(plan_a)
    found = compare(first, Plan.load(plan_b))
    if json:
        emit_json(asdict(found))
        return
    if found.identical:
        lines(f"the plans run the same: all {found.num_heads} heads follow equal rules")
    else:
        layers = {module: index for index, module in enumerate(first.base_model.modules)}
        rows = [
            [
                f"{layers[change.module]}:{change.head}{change.steps and f', steps {change.steps}'}",
                change.before,
                change.after,
            ]
            for change in found.changes
        ]
        table(f"{len(rows)} of {found.num_heads} heads differ", ["layer:head", str(plan_a), str(plan_b)], rows)
    for name, before, after in found.other_fields:
        lines(f"{name}: {before} -> {after}")


def explain(
    plan: o.PlanFile,
    head: Annotated[str | None, typer.Argument(help="module:head or layer:head, such as 3:7")] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile directory, to list the head's alternatives.")] = None,
    json: o.Json = False,
) -> None:
    """Say what a plan does, or one of its heads. With a profile, also what that head could have done."""
    from dataclasses import asdict, replace

    from sparsesearch.explanation import PlanExplanation
    from sparsesearch.explanation import explain as run
    from sparsesearch.plan import Plan
    from sparsesearch.planning import Question, score_table
    from sparsesearch.search.budget import Budget

    opened = Plan.load(plan)
    scores = None
    if profile is not None:
        question = Question((), granularity=opened.unit)
        if opened.decode:
            question = replace(question, budgets=(Budget("kv_fraction", 1.0),), decode="separate")
        scores = score_table(o.profile_for(opened, profile), question)
    found = run(opened, head, scores=scores)
    if json:
        emit_json(asdict(found))
    elif isinstance(found, PlanExplanation):
        each = ", once in each range of steps" if found.steps else ""
        table(f"{found.num_heads} query heads{each}", ["rule", "heads"], found.kinds)
        table(
            "layers",
            ["module", "density", "rules"],
            [[m, d, ", ".join(f"{k} {n}" for k, n in kinds)] for m, d, kinds in found.layers],
        )
        if found.steps:
            shown = [[label, share, ", ".join(f"{k} {n}" for k, n in kinds)] for label, share, kinds in found.steps]
            table("denoising steps", ["steps", "density", "rules"], shown)
        if found.decoding:
            length = max(opened.lengths_tokens)
            shown = [[share.rule, share.heads, share.kept, share.read] for share in found.decoding]
            table(f"decoding at {length} tokens", ["rule", "query heads", "keys kept", "keys read"], shown)
        for name, summary in found.parts:
            lines(f"{name}: {summary}")
    else:
        entries(f"{found.module}:{found.head}", {found.rule: [found.meaning, found.source]})
        if found.removed:
            lines("the plan removes this head: nothing of the above runs")
        if found.decode_rule != found.rule:
            lines(f"while decoding: {found.decode_rule}")
        table("parameters", ["name", "value", "meaning"], found.parameters)
        table("density", ["length", "share of dense"], list(found.densities.items()))
        if found.steps:
            table("denoising steps; the above is of the first", ["steps", "rule", "share of dense"], found.steps)
        phases = ("alternatives", found.alternatives), ("alternatives while decoding", found.decode_alternatives)
        for title, own in phases:
            if own:
                rows = [[a.rule, a.loss, *a.cost.values(), "*" if a.chosen else ""] for a in own]
                table(title, ["rule", "loss", *own[0].cost, "chosen"], rows)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for name, command in (("diff", diff), ("explain", explain)):
        app.command(name)(guarded(command))
