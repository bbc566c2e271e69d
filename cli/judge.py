"""Commands that judge plans: evaluate and gate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o
from . import pipelines, prune
from .errors import guarded
from .metrics_tables import show_metrics
from .render import emit_json, lines, progress_bar, say, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsesearch.check_result import CheckResult, Thresholds
    from sparsesearch.cost import CostModel
    from sparsesearch.plan import Plan


FOR_TEXT = (
    *(
        "lengths",
        "num_sequences",
        "num_needles",
        "data",
        "decode_tokens",
        "timing_rounds",
        "cost_model",
        "tasks",
        "suite",
        "task_format",
        "shots",
    ),
    *("task_sequences", "generate", "seed"),
)
"""Options of `eval` that mean nothing for plans of a pipeline, which --run judges."""
OF_TASKS = ("task_format", "shots", "task_sequences")
"""Options that mean something for --suite only."""


def evaluate(
    context: typer.Context,
    plans: Annotated[
        list[Path] | None, typer.Argument(help="One or more sparse_plan.json; none: dense alone.", metavar="[PLAN]...")
    ] = None,
    model: o.OptionalModel = None,
    lengths: Annotated[
        str | None, typer.Option(help="Lengths to judge; those of the plans by default, 2048 without plans.")
    ] = None,
    num_sequences: o.HeldOutNeedles = 96,
    num_needles: o.NumNeedles = None,
    data: o.TextData = "text",
    decode_tokens: Annotated[
        int,
        typer.Option(
            help="Decode so many of each sequence's last tokens one by one, as they would be served; agreement, KL and loss are then of these.",
            min=0,
        ),
    ] = 0,
    timing_rounds: Annotated[int, typer.Option(help="Prefill measurements per variant; 0 for none.", min=0)] = 5,
    cost_model: Annotated[
        str | None, typer.Option(help="Whose predictions stand beside the times; the device's own by default.")
    ] = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Metrics file to write; the baseline of `check`.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Also run these of lm-eval (extra lm-eval), by commas.", rich_help_panel=o.TASKS),
    ] = None,
    suite: o.Suite = None,
    task_format: o.TaskFormat = "completion",
    shots: o.Shots = 0,
    task_sequences: o.TaskSequences = 24,
    generate: o.Generate = False,
    run: o.RunFile = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Measure plans beside dense on held-out data. One job gives loss, KL to dense, needle accuracy and prefill time."""
    if run is not None:
        _require_pipeline_plans(context, plans)
        pipelines.evaluate(plans or [], run, out, model=model, device=device, dtype=dtype, json=json)
        return
    from sparsesearch.evaluate.run import evaluate as run_all
    from sparsesearch.evaluate.tasks import lm_eval_tasks
    from sparsesearch.plan import Plan
    from sparsesearch.pruning.apply import PrunedApply
    from sparsesearch.runtime.loading import load_model

    paths = plans or []
    _require_text_plans(context, paths, model, suite, timing_rounds)
    opened = {name: Plan.load(path) for name, path in o.variant_names(paths).items()}
    name = model or o.model_for(paths[0], next(iter(opened.values())))
    judged = _lengths(lengths, opened)
    live, tokenizer = load_model(name, device=o.present_device(device), dtype=dtype, with_plan=False)
    applied = PrunedApply(prune.refit_batches(opened, live, tokenizer))
    with progress_bar() as progress:
        metrics = run_all(
            live,
            tokenizer,
            opened,
            apply=applied,
            lengths=judged,
            num_sequences=num_sequences,
            num_needles=num_needles,
            data=data,
            decode_tokens=decode_tokens,
            seed=seed,
            timing_rounds=timing_rounds,
            cost_model=_priced(cost_model, live, opened, min(judged)) if timing_rounds else None,
            suite=o.parsed_suite(suite, task_format, shots, task_sequences, seed, generate=generate),
            progress=progress,
            command=o.command_line(),
            model_name=name,
        )
    if out is not None:
        metrics.save(out)
    harness = {} if tasks is None else {"lm_eval": lm_eval_tasks(live, tokenizer, opened, tasks.split(","))}
    if json:
        emit_json(metrics.model_dump(mode="json") | harness)
        return
    show_metrics(metrics)
    if harness:
        lines(str(harness["lm_eval"]))


def _require_pipeline_plans(context: typer.Context, plans: list[Path] | None) -> None:
    """Plans that --run can judge, and no option that means nothing for them."""
    if not plans:
        raise typer.BadParameter("must be named with --run: dense is what plans are compared with.", param_hint="PLAN")
    for path in plans:
        if not pipelines.is_pipeline_plan(path):
            raise typer.BadParameter(f"is for plans of diffusers pipelines, and {path} is none.", param_hint="--run")
    o.refuse_given(context, "is not for plans of a pipeline", *FOR_TEXT)


def _require_text_plans(
    context: typer.Context, plans: list[Path], model: str | None, suite: str | None, timing_rounds: int
) -> None:
    """Plans that text can judge, of a model that is named, and no option that means nothing for what is judged."""
    if plans and pipelines.is_pipeline_plan(plans[0]):
        raise typer.BadParameter(
            "must name a YAML file with held-out prompts, steps and size for plans of a pipeline.", param_hint="--run"
        )
    if not plans and model is None:
        raise typer.BadParameter("must be named where no plan names it.", param_hint="--model")
    if suite is None:
        o.refuse_given(context, "is for --suite, which was not given", *OF_TASKS, "generate")
    if not timing_rounds:
        o.refuse_given(context, "stands beside measured times, and --timing-rounds 0 measures none", "cost_model")


def _lengths(text: str | None, plans: dict[str, "Plan"]) -> list[int]:
    if text is not None:
        return o.parsed_lengths(text)
    return sorted({length for plan in plans.values() for length in plan.lengths_tokens}) or [2048]


def _priced(
    cost_model: str | None, live: "PreTrainedModel", plans: dict[str, "Plan"], length: int
) -> "CostModel | None":
    """The cost model asked for, or that of the device in the model's data type; None if nobody has measured it, or not all that the plans need.

    Asked before anything is judged: a judgement of hours must not end at a price that is missing.
    """
    from sparsesearch.cost import load_cost_model
    from sparsesearch.cost.shipped import shipped_for
    from sparsesearch.errors import SpecError
    from sparsesearch.evaluate.predicted import predicted_seconds

    found = shipped_for(live.device) if cost_model is None else load_cost_model(cost_model)
    measured_bytes = getattr(getattr(found, "table", None), "dtype_bytes", None)
    if found is None or (cost_model is None and measured_bytes != live.dtype.itemsize):
        return None
    try:
        predicted_seconds(live, plans, length, found)
    except SpecError as error:
        if cost_model is not None:
            raise
        say(f"nothing is predicted: {error}")
        return None
    return found


def check(
    context: typer.Context,
    plan: o.PlanFile,
    baseline: Annotated[Path | None, typer.Option(help="Metrics file recorded with `sparsesearch eval -o`.")] = None,
    model: o.OptionalModel = None,
    recovery: Annotated[float, typer.Option(help="Least share of dense's needle accuracy and loss.")] = 0.98,
    max_kl: Annotated[float | None, typer.Option(help="Most KL to dense over all positions, nats.")] = None,
    max_slowdown: Annotated[float | None, typer.Option(help="Most prefill time relative to dense.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Lengths to judge; those of the baseline or plan by default.")
    ] = None,
    num_sequences: Annotated[
        int | None,
        typer.Option(
            help="Held-out needle sequences per length; as many as the baseline has, at most 48, by default.", min=1
        ),
    ] = None,
    num_needles: o.NumNeedles = None,
    device: o.Device = "cpu",
    junit: Annotated[Path | None, typer.Option(help="JUnit XML file to write.")] = None,
    annotations: Annotated[bool, typer.Option("--annotations", help="Print GitHub workflow annotations.")] = False,
    suite: o.Suite = None,
    task_format: o.TaskFormat = "completion",
    shots: o.Shots = 0,
    task_sequences: o.TaskSequences = 24,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Gate for CI: exit 4 when a plan has got worse. Its bounds are relative to dense, and to a recorded baseline, whose tasks are repeated."""
    if suite is None:
        o.refuse_given(context, "is for --suite, which was not given", *OF_TASKS)
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.check import check as run
    from sparsesearch.check import repeated_sequences
    from sparsesearch.evaluate import Metrics
    from sparsesearch.plan import Plan
    from sparsesearch.runtime.loading import load_model

    opened = Plan.load(plan)
    recorded = None if baseline is None else Metrics.load(baseline)
    thresholds = _thresholds(recovery=recovery, max_kl=max_kl, max_slowdown=max_slowdown)
    name = model or o.model_for(plan, opened)
    live, tokenizer = load_model(name, device=o.present_device(device), with_plan=False)
    with progress_bar() as progress:
        result = run(
            opened,
            live,
            tokenizer,
            baseline=recorded,
            thresholds=thresholds,
            lengths=None if lengths is None else o.parsed_lengths(lengths),
            num_sequences=num_sequences or repeated_sequences(recorded, opened),
            num_needles=num_needles,
            timing_rounds=0 if max_slowdown is None else 5,
            suite=o.parsed_suite(suite, task_format, shots, task_sequences, seed, generate=False),
            seed=seed,
            progress=progress,
        )
    if junit is not None:
        write_bytes(junit, result.junit_xml().encode())
    _show_check(result, plan, annotations=annotations, json=json)
    result.raise_if_failed()


def _show_check(result: "CheckResult", plan: Path, *, annotations: bool, json: bool) -> None:
    """Every figure beside its bound."""
    columns = ("figure", "length_tokens", "measured", "bound", "reason", "verdict")
    rows = [
        [row.figure, row.length_tokens, row.measured, row.bound, row.reason, "ok" if row.passed else "REGRESSED"]
        for row in result.rows
    ]
    if json:
        emit_json({"passed": result.passed, "rows": [dict(zip(columns, row, strict=True)) for row in rows]})
        return
    table(f"check of {plan}", ["figure", "length", "measured", "bound", "why", "verdict"], rows)
    if result.needles_say_little and result.metrics.suite is None:
        say(
            "dense hardly answers needles here, so they hold the plan to nothing: add tasks that it answers, as in --suite ruler --format chat"
        )
    if annotations:
        lines(*result.annotations(str(plan)))


def _thresholds(**bounds: float | None) -> "Thresholds":
    """The bounds, or a usage error that names the one out of range."""
    from pydantic import ValidationError

    from sparsesearch.check_result import Thresholds
    from sparsesearch.errors import first_problem

    try:
        return Thresholds.model_validate(bounds)
    except ValidationError as error:
        raise typer.BadParameter(first_problem(error)) from error


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for name, command in (("eval", evaluate), ("check", check)):
        app.command(name)(guarded(command))
