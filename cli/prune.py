"""Branches of commands that remove heads and channels: profile, search, apply, validate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options as o
from .errors import usage
from .render import emit_json, lines, pairs, progress_bar, say, table

if TYPE_CHECKING:
    from sparsesearch.cut import Compensation
    from sparsesearch.plan import Plan
    from sparsesearch.pruning.quality import Batch
    from sparsesearch.pruning.record import PruningProfile
    from sparsesearch.pruning.search import PruningQuestion
    from sparsesearch.search_space import PruningMenu

MEASURED_SAMPLES = 2
WINDOW_TOKENS = 512
REFIT_SAMPLES = 128


def has_cuts(profile: Path) -> bool:
    """Whether a profile directory covers removals."""
    return (profile / "pruning.json").is_file()


def only_cuts(profile: Path) -> bool:
    """Whether it covers nothing else."""
    return has_cuts(profile) and not (profile / "profile.json").is_file()


def profile_cuts(
    name: str,
    menu: "PruningMenu",
    out: Path,
    *,
    device: str,
    dtype: str,
    data: str,
    length: int,
    num_samples: int,
    num_probes: int,
    learn_masks: int,
    resume: bool,
    seed: int,
    json: bool,
) -> None:
    """The pruning part of `profile`; text windows are at most 512 tokens long, because second moments want many different tokens."""
    from sparsesearch.pruning.data import load_batches
    from sparsesearch.pruning.models import load_prunable
    from sparsesearch.pruning.profile_run import PruningRequest, profile_pruning

    if resume and has_cuts(out):
        return
    model, tokenizer = load_prunable(name, device=o.present_device(device), dtype=dtype, with_plan=False)

    spec = "text" if data == "needle" else data
    window = min(length, WINDOW_TOKENS)
    count = num_samples * max(1, length // window)
    where: dict[str, Any] = {"data": spec, "length_tokens": window, "num_samples": count, "seed": seed}
    request = PruningRequest(
        name=name,
        menu=menu,
        batches=load_batches(model, tokenizer, spec, length_tokens=window, num_samples=count, seed=seed),
        measured_batches=load_batches(
            model, tokenizer, spec, length_tokens=window, num_samples=_measured_count(model), seed=seed + 1
        ),
        calibration=where,
        num_probes=num_probes,
        seed=seed,
        learn_masks=learn_masks,
    )
    with progress_bar() as progress:
        found = profile_pruning(model, request, out, progress=progress)
    content = {
        "model": name,
        "layers": len(found.manifest.layers),
        "calibration": where,
        "distance": found.manifest.distance,
    }
    emit_json(content) if json else pairs(f"pruning profile in {out}", content)


def _measured_count(model: Any) -> int:
    return MEASURED_SAMPLES if model.can_generate() else 32


def search_cuts(
    profile: Path,
    budget: list[str],
    out: Path,
    *,
    criterion: str,
    device: str | None,
    refit_samples: int,
    uniform: bool,
    lengths: str,
    refine: int,
    model: str | None,
    json: bool,
) -> None:
    """`search` on a profile that covers removals, alone or with attention rules."""
    from sparsesearch.cost import load_cost_model
    from sparsesearch.errors import SpecError
    from sparsesearch.profiling.record import Profile
    from sparsesearch.pruning.joint import find_joint
    from sparsesearch.pruning.record import PruningProfile
    from sparsesearch.pruning.search import PruningQuestion, find_cut, uniform_cut
    from sparsesearch.search.budget import parse_budgets

    with usage("--budget"):
        budgets = parse_budgets(budget)
    opened = PruningProfile.load(profile)
    attention = None if only_cuts(profile) else Profile.load(profile)
    question = PruningQuestion(
        budgets=budgets,
        lengths=tuple(o.parsed_lengths(lengths)) if attention is None else attention.manifest.lengths,
        criterion=criterion,
        cost_model=None if device is None else load_cost_model(device),
        compensation=refit_spec(opened, refit_samples, uniform=uniform),
    )
    if refine and (uniform or attention is not None):
        raise SpecError("--refine must be for a search of removals alone, without --uniform. Leave it out.")
    if uniform:
        plan = uniform_cut(opened, question)
    elif refine:
        plan = _refined(opened, question, model, refine)
    else:
        plan = find_cut(opened, question) if attention is None else find_joint(opened, attention, question)
    plan.save(out)
    _show_cut(plan, out, json)


def _refined(profile: "PruningProfile", question: "PruningQuestion", model: str | None, evaluations: int) -> "Plan":
    """The best of some plans, each tried on the model; what each loses is printed."""
    from sparsesearch.cut import Compensation
    from sparsesearch.pruning.data import compensation_batches
    from sparsesearch.pruning.models import load_prunable
    from sparsesearch.pruning.refine import MOST_SAMPLES, refine_cut

    live, tokenizer = load_prunable(model or profile.manifest.base_model.name_or_path, dtype="float32")
    asked = REFIT_SAMPLES if question.compensation is None else question.compensation.num_samples
    data = Compensation.model_validate(
        {**profile.manifest.calibration, "num_samples": min(MOST_SAMPLES, asked), "bias": False}
    )
    with progress_bar() as progress:
        plan, trials = refine_cut(
            live,
            profile,
            question,
            compensation_batches(live, tokenizer, data),
            evaluations=evaluations,
            progress=progress,
        )
    for trial in trials:
        say(f"tilt {trial.tilt:g}: {profile.manifest.distance} {trial.distance:.4g} on calibration data set aside")
    return plan


def _show_cut(plan: "Plan", out: Path, json: bool) -> None:
    cut = plan.pruning
    assert cut is not None
    proved = None if plan.certificate is None else plan.certificate.model_dump(mode="json")
    layers = {
        index: {"heads": len(own.kept_heads), "kv_heads": len(own.kept_groups), "channels": len(own.kept_channels)}
        for index, own in cut.layers.items()
    }
    content = {
        "plan": str(out),
        "sha256": plan.sha256,
        "budgets": [record.model_dump(mode="json") for record in plan.budgets],
        "rules": plan.kind_counts(),
        "layers": layers,
        "predicted": cut.scoring["predicted"],
        "certificate": proved,
    }
    if json:
        emit_json(content)
        return
    rows = [[r.metric, int(length), r.bound, used] for r in plan.budgets for length, used in r.predicted.items()]
    table("budgets (shares of dense)", ["metric", "length", "bound", "plan"], rows)
    table("what is left", ["layer", "heads", "KV heads", "channels"], [[i, *own.values()] for i, own in layers.items()])
    gap = (
        "not searched"
        if plan.certificate is None
        else f"proven gap {plan.certificate.gap:.2g} ({plan.certificate.solver})"
    )
    lines(
        f"predicted {cut.scoring['distance']} {cut.scoring['predicted']:.4g} before refitting together, {gap}",
        f"written: {out}",
    )


def apply_cuts(
    plan: "Plan",
    model: str,
    out: Path,
    *,
    logical: bool,
    overwrite: bool,
    allow_other_weights: bool,
    device: str,
    json: bool,
) -> None:
    """`apply` for a plan that removes."""
    from dataclasses import asdict

    from sparsesearch.pruning.export import export_pruned

    with progress_bar() as progress:
        found = export_pruned(
            plan,
            model,
            out,
            mode="logical" if logical else "physical",
            overwrite=overwrite,
            allow_other_weights=allow_other_weights,
            command=o.command_line(),
            device=o.present_device(device),
            progress=progress,
        )
    if json:
        emit_json({"checkpoint": str(out), "plan_sha256": plan.sha256, "rules": plan.kind_counts(), **asdict(found)})
        return
    loads = "" if found.layout != "per layer" else "import sparsesearch; "
    lines(
        f"written: {out} ({found.layout}; {found.parameters:,} of {found.base_parameters:,} parameters)",
        f"load it with: {loads}from_pretrained({str(out)!r})",
    )


def refit_batches(plans: dict[str, "Plan"], model: Any, tokenizer: Any) -> "list[Batch]":
    """Data for the refit of the plans that have one; all must name the same.

    Raises:
        SpecError: they name different data.
    """
    from sparsesearch.errors import SpecError
    from sparsesearch.pruning.data import compensation_batches

    specs = {plan.pruning.compensation for plan in plans.values() if plan.pruning and plan.pruning.compensation}
    if len(specs) > 1:
        raise SpecError("plans judged together must be refitted on the same data; judge them one by one.")
    return [] if not specs else compensation_batches(model, tokenizer, specs.pop())


def validate_cuts(
    profile: Path, model: str | None, *, num_plans: int, num_sequences: int, seed: int, json: bool
) -> None:
    """`validate-proxy` for removals."""
    from dataclasses import asdict

    from sparsesearch.pruning.data import load_batches
    from sparsesearch.pruning.models import load_prunable
    from sparsesearch.pruning.record import PruningProfile
    from sparsesearch.pruning.validation import validate_criteria

    opened = PruningProfile.load(profile)
    live, tokenizer = load_prunable(model or opened.manifest.base_model.name_or_path)
    where = opened.manifest.calibration
    held_out = load_batches(
        live,
        tokenizer,
        where["data"],
        length_tokens=where["length_tokens"],
        num_samples=num_sequences,
        seed=seed,
        split="heldout",
    )
    with progress_bar() as progress:
        found = validate_criteria(live, opened, held_out, num_plans=num_plans, seed=seed, progress=progress)
    if json:
        emit_json(asdict(found))
        return
    table(
        f"Kendall's tau over {len(found.single)} single cuts and {len(found.whole)} whole ones",
        ["criterion", "single cuts (refitted)", "whole cuts (not refitted)"],
        [[name, own["single"], own["whole"]] for name, own in found.tau.items()],
    )


def refit_spec(profile: "PruningProfile", samples: int, *, uniform: bool = False) -> "Compensation | None":
    """The refit that plans of a profile ask for: its own calibration data, `samples` of them.

    Uniform widths gain no biases, so that stock classes, and llama.cpp's converter, can hold them.
    """
    from sparsesearch.cut import Compensation

    bias = profile.manifest.menu.bias and not uniform
    where = {**profile.manifest.calibration, "num_samples": samples, "bias": bias}
    return Compensation.model_validate(where) if samples else None
