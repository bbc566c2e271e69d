"""The command that searches a profile for the plan of least loss within a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options as o
from . import pipelines, prune
from .errors import guarded, usage
from .render import progress_bar
from .search_tables import show_search

if TYPE_CHECKING:
    from sparsesearch.plan import Plan
    from sparsesearch.planning import Question
    from sparsesearch.profiling.record import Profile


SERVED = "What is served, and where"
FOR_REMOVALS = ("criterion", "refit_samples", "uniform", "lengths")
REPLAYS = ("refine_on", "refine_sequences")
NOT_FOR_PIPELINES = ("workload", "decode", "dtype", "model_shape", "unit", "answer_weight", "pareto", *REPLAYS)
NOT_FOR_REMOVALS = (
    *("space", "workload", "decode", "dtype", "max_groups_per_layer", "model_shape", "unit", "objective"),
    *("answer_weight", "pareto", *REPLAYS),
)
"""Options of `search` that mean something only, or nothing, for a kind of profile."""


def search(
    context: typer.Context,
    profile: o.ProfileDir,
    budget: Annotated[
        list[str],
        typer.Option(
            help="density=0.25, kv_fraction=0.4, latency=0.5x, ttft=120ms, tpot=0.8x, memory=24GB; of removals params, flops; "
            "several must all hold.",
            metavar="METRIC=BOUND",
        ),
    ],
    out: o.PlanOut = Path("sparse_plan.json"),
    space: Annotated[str | None, typer.Option(help="Search only this space's rules (name or YAML file).")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="Requests: prompt=32768,generate=512,batch=8,weight=1; repeatable.", rich_help_panel=SERVED),
    ] = None,
    decode: Annotated[
        Literal["same", "separate"],
        typer.Option(help="Decode under the prefill's rules, or under rules of its own.", rich_help_panel=SERVED),
    ] = "same",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the cache; the profiled model's by default.", rich_help_panel=SERVED),
    ] = None,
    max_groups_per_layer: Annotated[
        int | None,
        typer.Option(
            help="Most different rules in a layer, for backends that launch each by itself.",
            min=1,
            rich_help_panel=SERVED,
        ),
    ] = None,
    model_shape: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the model, such as llama3-8b, for seconds and bytes of the whole; from its config by default.",
            rich_help_panel=SERVED,
        ),
    ] = None,
    unit: Annotated[o.Unit | None, typer.Option(help="What decides; the space's own by default.")] = None,
    objective: Annotated[
        Literal[
            "combined",
            "text",
            "answer",
            "output_error",
            "dropped_mass",
            "moa",
            "minference",
            "duo",
            "flexprefill",
            "xattention",
            "sparse_vdit",
            "hylra",
            "rals",
        ],
        typer.Option(
            help="Which predicted loss to minimise; from moa on those of published methods, sparse_vdit for pipelines, hylra and rals in "
            "`search-reuse`."
        ),
    ] = "combined",
    answer_weight: Annotated[float, typer.Option(help="Weight of the answer proxy in `combined`.", min=0)] = 1.0,
    device: Annotated[
        str | None,
        typer.Option(
            help="Cost model, for budgets in seconds: cpu, h200, h100, roofline:b200 or a file.", rich_help_panel=SERVED
        ),
    ] = None,
    refine: Annotated[int, typer.Option(help="Plans to replay on the model to improve the search's own.", min=0)] = 0,
    refine_on: Annotated[
        str, typer.Option(help="Calibration data, as of `profile --data`, on which --refine replays them.")
    ] = "needle",
    refine_sequences: Annotated[int, typer.Option(help="How many such sequences.", min=2)] = 6,
    max_ranges: Annotated[
        int | None,
        typer.Option(
            help="Merge ranges of steps into at most so many, by interval DP.", min=1, rich_help_panel=o.PIPELINES
        ),
    ] = None,
    model: o.OptionalModel = None,
    pareto: Annotated[
        Path | None,
        typer.Option(help="Also write the front over quality, the first budget's metric and memory as CSV."),
    ] = None,
    criterion: Annotated[
        Literal[
            "measured",
            "reconstruction",
            "fisher",
            "taylor",
            "activation_magnitude",
            "magnitude",
            "vtrans",
            "ofb",
            "sparse_then_prune",
            "learned",
        ],
        typer.Option(help="How removals are scored.", rich_help_panel=o.REMOVALS),
    ] = "measured",
    refit_samples: Annotated[
        int,
        typer.Option(
            help="Sequences on which `apply` refits what is left; 0 leaves it.", min=0, rich_help_panel=o.REMOVALS
        ),
    ] = 128,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="The same FFN width in every layer, which stock classes can load.",
            rich_help_panel=o.REMOVALS,
        ),
    ] = False,
    lengths: Annotated[
        str,
        typer.Option(help="Lengths in tokens where flops, memory and latency count.", rich_help_panel=o.REMOVALS),
    ] = "1024",
    overwrite: o.OverwritePlan = False,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Find the plan with the least loss within a budget. The proven distance from the best plan is printed."""
    from sparsesearch.errors import ArtifactError
    from sparsesearch.profiling.record import Profile
    from sparsesearch.replayed_search import search_plan

    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} must not exist yet. Pass --overwrite, or choose another -o.")
    if pipelines.is_profile(profile):
        o.refuse_given(context, "is not for diffusers pipelines", *NOT_FOR_PIPELINES, *FOR_REMOVALS)
        pipelines.search(
            profile, budget, out, space=space, objective=objective, max_ranges=max_ranges, max_orders=max_groups_per_layer,
            refine=refine, model=model, device=device or "cpu", json=json,
        )  # fmt: skip
        return
    for_pipelines = f"is for diffusers pipelines, and {profile} is the profile of none"
    o.refuse_given(context, for_pipelines, "max_ranges", *(["objective"] if objective == "sparse_vdit" else []))
    if prune.has_cuts(profile):
        o.refuse_given(context, f"is not for removals, which {profile} covers", *NOT_FOR_REMOVALS)
        prune.search_cuts(
            profile, budget, out, criterion=criterion, device=device, refit_samples=refit_samples, uniform=uniform,
            lengths=lengths, refine=refine, model=model, json=json,
        )  # fmt: skip
        return
    o.refuse_given(context, f"is for removals, and {profile} covers none", *FOR_REMOVALS)
    if objective != "combined":
        o.refuse_given(
            context, f"weighs the parts of --objective combined, and {objective} is not that", "answer_weight"
        )
    if not refine:
        o.refuse_given(context, "is for --refine, which is 0", *REPLAYS)
    opened = Profile.load(profile)
    question = _question(
        opened, budget, workload, space, unit, device, dtype, model_shape, objective=objective, answer_weight=answer_weight,
        decode=decode, max_groups_per_layer=max_groups_per_layer,
    )  # fmt: skip
    if refine:
        plan = _refined(opened, question, model, refine, refine_on, refine_sequences, seed)
    else:
        plan = search_plan(opened, question)
    plan.save(out)
    if pareto is not None:
        _write_front(opened, question, pareto)
    show_search(plan, out, json)


def _question(
    profile: "Profile",
    budget: list[str],
    workload: list[str] | None,
    space: str | None,
    unit: o.Unit | None,
    device: str | None,
    dtype: str | None,
    model_shape: str | None,
    **more: Any,
) -> "Question":
    """What the options ask."""
    from sparsesearch.cost import load_cost_model
    from sparsesearch.planning import Question
    from sparsesearch.pricing import shape_of
    from sparsesearch.scoring import DTYPE_BYTES
    from sparsesearch.search.budget import parse_budgets
    from sparsesearch.search_space import SearchSpace
    from sparsesearch.workload import parse_workloads

    with usage("--budget"):
        budgets = parse_budgets(budget)
    if own := sorted({each.metric for each in budgets} & {"params", "flops"}):
        raise typer.BadParameter(
            f"{own[0]} is for removals, and {profile.folder} covers none: profile again with --space pruning.",
            param_hint="--budget",
        )
    with usage("--workload"):
        workloads = parse_workloads(workload) if workload else ()
    menu = None if space is None else SearchSpace.load(space)
    whole = model_shape or workloads or any(each.absolute or each.metric == "memory" for each in budgets)
    return Question(
        budgets=budgets,
        space=menu,
        granularity=unit or (menu.unit if menu else "query_head"),
        cost_model=None if device is None else load_cost_model(device),
        workloads=workloads,
        dtype_bytes=None if dtype is None else DTYPE_BYTES[dtype],
        shape=shape_of(profile.manifest.base_model, model_shape) if whole else None,
        **more,
    )


def _refined(
    profile: "Profile", question: "Question", model: str | None, evaluations: int, spec: str, sequences: int, seed: int
) -> "Plan":
    from sparsesearch import calibration
    from sparsesearch.refinement import refine
    from sparsesearch.runtime.loading import load_model

    live, tokenizer = load_model(model or profile.manifest.base_model.name_or_path, with_plan=False)
    replayed = calibration.load(
        spec, tokenizer, length_tokens=max(profile.manifest.lengths), num_samples=sequences, seed=seed + 1
    )
    with progress_bar() as progress:
        plan, _ = refine(live, profile, question, replayed.samples, evaluations=evaluations, progress=progress)
    return plan.model_copy(update={"provenance": plan.provenance | {"refined_on": replayed.description}})


def _write_front(profile: "Profile", question: "Question", path: Path) -> None:
    import pandas as pd

    from sparsesearch.artifacts import write_bytes
    from sparsesearch.planning import surface_rows

    write_bytes(path, pd.DataFrame(surface_rows(profile, question)).to_csv(index=False).encode())


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("search")(guarded(search))
