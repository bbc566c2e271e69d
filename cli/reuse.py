"""The command that searches plans whose layers reuse each other's selections."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options as o
from .errors import guarded, usage
from .render import emit_json, lines, progress_bar, table

if TYPE_CHECKING:
    from sparsesearch.plan import Plan
    from sparsesearch.profiling.record import Profile
    from sparsesearch.profiling.reuse_menu import ReuseMenu
    from sparsesearch.reuse_lanes import ReuseQuestion

OF_OBJECTIVES = {"budget": "reuse", "cost_model": "reuse", "threshold": "hylra", "max_refreshes": "rals"}
"""Options that mean something for one objective only."""


def search_reuse(
    context: typer.Context,
    profile: o.ProfileDir,
    objective: Annotated[
        Literal["reuse", "hylra", "rals"],
        typer.Option(help="reuse: least loss in a budget. hylra, rals: the published ones, on overlap alone."),
    ] = "reuse",
    budget: Annotated[
        list[str] | None,
        typer.Option(help="density=0.25 or latency=0.5x; for --objective reuse.", metavar="METRIC=SHARE"),
    ] = None,
    out: o.PlanOut = Path("sparse_plan.json"),
    space: Annotated[str | None, typer.Option(help="Choose among this space's rules only (name or YAML file).")] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Shares of each row that a dense layer leaves for reuse, by commas; hylra and rals use the first. By default as in the "
            "profile's space, such as hylra, or 0.1,0.25."
        ),
    ] = None,
    unit: Annotated[
        Literal["layer", "kv_group"] | None,
        typer.Option(help="What decides; kv_group for reuse, layer for hylra and rals by default."),
    ] = None,
    span: Annotated[int, typer.Option(help="Layers that a selection may be carried on.", min=1)] = 7,
    threshold: Annotated[float, typer.Option(help="hylra: least overlap of a reuse.", min=0, max=1)] = 0.85,
    max_refreshes: Annotated[int, typer.Option(help="rals: refreshing layers after the first.", min=0)] = 2,
    passes: Annotated[int, typer.Option(help="Most rounds of profiling; the later ones under the plan.", min=1)] = 3,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences per length.", min=1)] = 6,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="Decoded tokens reuse too, where the source can choose for them (dense_source, bounds_topk); their loss is not measured.",
        ),
    ] = False,
    cost_model: Annotated[
        str | None, typer.Option(help="Prices latency budgets: cpu, h200, roofline:b200 or a file.")
    ] = None,
    model: o.OptionalModel = None,
    device: o.Device = "cpu",
    overwrite: o.OverwritePlan = False,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Find a plan whose layers may run an earlier layer's selection. It profiles pairs of layers and searches until the plan repeats."""
    from dataclasses import asdict

    from sparsesearch import calibration
    from sparsesearch.errors import ArtifactError
    from sparsesearch.index_reuse import reused_in_decoding
    from sparsesearch.index_reuse import search_reuse as run
    from sparsesearch.profiling.record import Profile
    from sparsesearch.runtime.loading import load_model

    for option, own in OF_OBJECTIVES.items():
        if objective != own:
            o.refuse_given(context, f"is for --objective {own}, and not for {objective}", option)
    if objective == "reuse" and not budget:
        raise typer.BadParameter("must be given, such as density=0.25.", param_hint="--budget")
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} must not exist yet. Pass --overwrite, or choose another -o.")
    opened = Profile.load(profile)
    menu = _menu(opened, space, keep, span, unit or ("kv_group" if objective == "reuse" else "layer"))
    question = _question(menu, objective, budget, cost_model, threshold=threshold, max_refreshes=max_refreshes)
    name = model or opened.manifest.base_model.name_or_path
    live, tokenizer = load_model(name, device=o.present_device(device), with_plan=False)
    samples = {
        length: calibration.load("needle", tokenizer, length_tokens=length, num_samples=num_samples, seed=seed).samples
        for length in opened.manifest.lengths
    }
    with progress_bar() as progress:
        plan, rounds = run(live, question, samples, passes=passes, seed=seed, progress=progress)
    plan = reused_in_decoding(plan) if decode else plan
    plan.save(out)
    _show(plan, [asdict(one) for one in rounds], "loss" if objective == "reuse" else "summed overlap", out, json)


def _menu(
    profile: "Profile", space: str | None, keep: str | None, span: int, unit: Literal["layer", "kv_group"]
) -> "ReuseMenu":
    """What layers may run and reuse."""
    from sparsesearch.profiling.reuse_menu import reuse_menu
    from sparsesearch.search_space import SearchSpace

    return reuse_menu(
        profile,
        None if keep is None else o.parsed_shares(keep, "--keep"),
        span=span,
        unit=unit,
        space=None if space is None else SearchSpace.load(space),
    )


def _question(
    menu: "ReuseMenu",
    objective: Literal["reuse", "hylra", "rals"],
    budget: list[str] | None,
    cost_model: str | None,
    **limits: Any,
) -> "ReuseQuestion":
    """What the options ask."""
    from sparsesearch.cost import load_cost_model
    from sparsesearch.reuse_lanes import ReuseQuestion
    from sparsesearch.search.budget import parse_budgets

    with usage("--budget"):
        budgets = parse_budgets(budget) if budget else ()
    priced = None if cost_model is None else load_cost_model(cost_model)
    return ReuseQuestion(menu, objective, budgets, cost_model=priced, **limits)


def _show(plan: "Plan", passes: list[dict[str, Any]], aim: str, out: Path, json: bool) -> None:
    gap = None if plan.certificate is None else plan.certificate.gap
    predicted = {f"{record.metric}@{n}": used for record in plan.budgets for n, used in record.predicted.items()}
    if json:
        content = {"plan": str(out), "sha256": plan.sha256, "rules": plan.kind_counts(), "predicted": predicted}
        emit_json({**content, "gap": gap, "passes": passes})
        return
    table(
        "passes",
        ["profiled under", aim, "text KL", "answer KL", "joint"],
        [list(one.values()) for one in passes],
    )
    table("query heads per rule", ["rule", "heads"], list(plan.kind_counts().items()))
    said = [f"{key} = {value:.4f}" for key, value in predicted.items()] + (
        [] if gap is None else [f"proven gap {gap:.2g}"]
    )
    lines(*([", ".join(said)] if said else []), f"kept: pass {plan.provenance['pass_kept']}; written: {out}")


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("search-reuse")(guarded(search_reuse))
