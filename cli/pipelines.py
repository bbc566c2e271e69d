"""What profile, search, apply, eval and report do for diffusers pipelines."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from . import options as o
from .render import emit_json, lines, pairs, progress_bar, table

if TYPE_CHECKING:
    from sparsesearch.denoising.judgement import Judgement
    from sparsesearch.plan import Plan


def is_pipeline(model: str) -> bool:
    """Whether MODEL names a diffusers directory."""
    from sparsesearch.runtime.diffusion.files import is_diffusers_directory

    return is_diffusers_directory(Path(model))


def is_profile(folder: Path) -> bool:
    """Whether PROFILE is that of a pipeline."""
    return (folder / "pipeline.json").is_file()


def is_metrics(path: Path) -> bool:
    """Whether METRICS is what `eval` wrote for a pipeline."""
    from sparsesearch.artifacts import read_text
    from sparsesearch.denoising.judgement import FORMAT

    return f'"{FORMAT}"' in read_text(path)


def is_pipeline_plan(path: Path) -> bool:
    """Whether a plan was made for a transformer of diffusers, or PLAN is a folder of such plans."""
    from sparsesearch.embedded_plan import is_checkpoint
    from sparsesearch.plan import Plan

    if path.is_dir() and not is_checkpoint(path):
        return True

    return "component" in Plan.load(path).provenance


def profile(
    model: str,
    out: Path,
    run: Path | None,
    *,
    space: str,
    sensitivity: Literal["none", "layer", "head"],
    under: Path | None,
    device: str,
    dtype: str,
    resume: bool,
    dry_run: bool,
    json: bool,
) -> None:
    """Score every candidate in every head of every transformer, while the run is sampled."""
    from sparsesearch.denoising.pipeline import PipelineCorridor, load_pipeline, load_plans
    from sparsesearch.denoising.sampling_run import SamplingRun
    from sparsesearch.search_space import SearchSpace

    if run is None:
        raise typer.BadParameter(
            "must name a YAML file with prompts, steps and size for a diffusers pipeline.", param_hint="--run"
        )
    what, menu = SamplingRun.load(run), SearchSpace.load(space)
    if dry_run:
        from sparsesearch.denoising.pipeline_estimate import estimate

        needs = estimate(Path(model), what, menu, sensitivity=sensitivity)
        emit_json(needs) if json else pairs(f"a profile of {model} needs", needs)
        return
    plans = None if under is None else load_plans(under)
    live = load_pipeline(Path(model), device=o.present_device(device), dtype=dtype)
    with progress_bar() as progress:
        found = PipelineCorridor(live, Path(model), what, out, progress).profile(
            menu,
            sensitivity=sensitivity,
            under=plans,
            resume=resume,
        )
    content = {
        name: {
            "candidates": len(profile.manifest.candidates),
            "heads": profile.manifest.base_model.geometry.total_heads,
            "tokens": profile.manifest.layout.num_tokens,
            "step ranges": [list(place) for place in profile.manifest.ranges],
            "calibration": profile.manifest.calibration,
        }
        for name, profile in found.items()
    }
    if json:
        emit_json(content)
        return
    for name, each in content.items():
        pairs(f"profile of {name} in {out}", each)


def search(
    folder: Path,
    budget: list[str],
    out: Path,
    *,
    space: str | None,
    objective: str,
    max_ranges: int | None,
    max_orders: int | None,
    refine: int,
    model: str | None,
    device: str,
    json: bool,
) -> None:
    """One plan per transformer."""
    from sparsesearch.denoising.pipeline import PipelineCorridor, PipelineIndex, load_pipeline, save_plans
    from sparsesearch.denoising.pipeline_plans import search_pipeline
    from sparsesearch.search_space import SearchSpace

    index, menu = PipelineIndex.load(folder), None if space is None else SearchSpace.load(space)
    profiles = index.profiles(folder)
    density = _density(budget)
    if objective not in ("combined", "output_error", "sparse_vdit"):
        raise typer.BadParameter(
            f"must be output_error or sparse_vdit for a pipeline's profile, but is {objective}.",
            param_hint="--objective",
        )
    options: dict[str, Any] = {
        "space": menu,
        "objective": "sparse_vdit" if objective == "sparse_vdit" else "output_error",
        "max_ranges": max_ranges,
        "max_orders": max_orders,
    }
    if refine:
        live = load_pipeline(Path(model or index.pipeline), device=o.present_device(device))
        with progress_bar() as progress:
            whole = PipelineCorridor(live, Path(index.pipeline), index.run, folder, progress)
            plans = search_pipeline(
                index,
                profiles,
                density,
                evaluations=refine,
                corridors=whole.corridors(menu or _space_of(profiles)),
                **options,
            )
    else:
        plans = search_pipeline(index, profiles, density, **options)
    save_plans(plans, out)
    _show_plans(plans, out, json)


def _density(budget: list[str]) -> float:
    """The one budget that plans of a pipeline may have."""
    from sparsesearch.search.budget import parse_budgets

    from .errors import usage

    with usage("--budget"):
        budgets = parse_budgets(budget)
    if len(budgets) != 1 or budgets[0].metric != "density":
        raise typer.BadParameter(
            f"must be a density, such as density=0.35, for a pipeline's profile, but is {', '.join(budget)}.",
            param_hint="--budget",
        )
    return budgets[0].bound


def _space_of(profiles: Any) -> Any:
    """A space of what was profiled; only its candidates matter to a replay."""
    from sparsesearch.search_space import SearchSpace

    manifest = next(iter(profiles.values())).manifest
    return SearchSpace(manifest.space, "", "", manifest.block_tokens, "query_head", manifest.candidates)


def _show_plans(plans: "dict[str, Plan]", out: Path, json: bool) -> None:
    content = {}
    for name, plan in plans.items():
        certificate, schedule = plan.certificate, plan.schedule
        content[name] = {
            "density": next(iter(plan.budgets[0].predicted.values())),
            "budget": plan.budgets[0].bound,
            "step_ranges": [[0, None]] if schedule is None else [[item.first, item.end] for item in schedule.ranges],
            "rules_at_first_step": plan.at_step(0).kind_counts(),
            "objective": plan.provenance["objective"],
            "loss": None if certificate is None else certificate.loss,
            "gap": None if certificate is None else certificate.gap,
            "sha256": plan.sha256,
        }
    if json:
        emit_json({"plans": str(out), "components": content})
        return
    for name, each in content.items():
        pairs(f"plan of {name}", each)
    lines(f"written: {out}")


def apply(
    plan: Path, model: Path, out: Path, *, component: str | None, overwrite: bool, allow_other_weights: bool, json: bool
) -> None:
    """Write a copy of a pipeline, or of one transformer, that carries its plans."""
    from sparsesearch.denoising.pipeline import load_plans
    from sparsesearch.plan import Plan
    from sparsesearch.runtime.diffusion.export import export_diffusers
    from sparsesearch.runtime.export import PLAN_FILE

    plans = load_plans(plan, component)
    whole = (model / "model_index.json").is_file()
    if not whole:
        plans = {"": next(iter(plans.values()))}
    export_diffusers(plans, model, out, overwrite=overwrite, allow_other_weights=allow_other_weights)
    plans = {name: Plan.load(out / name / PLAN_FILE) for name in plans}
    counts = {name: each.at_step(0).kind_counts() for name, each in plans.items()}
    if json:
        emit_json({"checkpoint": str(out), "plan_sha256": {n: p.sha256 for n, p in plans.items()}, "rules": counts})
        return
    for name, each in counts.items():
        sparse = sum(each.values()) - each.get("dense", 0)
        lines(f"{name or 'model'}: {sparse} of {sum(each.values())} heads changed at the first step")
    loader = "DiffusionPipeline" if whole else next(iter(plans.values())).base_model.model_type
    lines(f"written: {out}", f"load it with: import sparsesearch; {loader}.from_pretrained({str(out)!r})")


def evaluate(
    plans: list[Path],
    run: Path,
    out: Path | None,
    *,
    model: str | None,
    device: str,
    dtype: str,
    json: bool,
) -> None:
    """Compare pixels with dense sampling from the same noise, on a run of other prompts and seeds."""
    from sparsesearch.denoising.frames import save_frames
    from sparsesearch.denoising.pipeline import load_pipeline, load_plans
    from sparsesearch.denoising.pipeline_plans import judge_pipeline
    from sparsesearch.denoising.sampling_run import SamplingRun

    variants = {name: load_plans(path) for name, path in o.variant_names(plans).items()}
    first = next(iter(next(iter(variants.values())).values()))
    source = model or str(first.provenance.get("pipeline", first.base_model.name_or_path))
    live = load_pipeline(Path(source), device=o.present_device(device), dtype=dtype)
    found, frames = judge_pipeline(live, SamplingRun.load(run), variants)
    if out is not None:
        found.save(out)
        save_frames(out, frames)
    if json:
        emit_json(found.model_dump(mode="json"))
        return
    show(
        found,
        f"{source}, {len(next(iter(found.variants.values())).values['psnr_db'])} samples, {found.num_steps} steps",
    )


def show(found: "Judgement", title: str) -> None:
    """One row per variant."""
    rows = [
        [name, "by the data" if each.density is None else each.density, each.mean("psnr_db"), each.mean("ssim")]
        for name, each in found.variants.items()
    ]
    table(title, ["variant", "density, all steps", "PSNR to dense (dB)", "SSIM"], rows)


def report(plan: Path, metrics: Path, out: Path) -> None:
    """One page with frames, rule maps and every sample's verdict; the first component's plan is drawn."""
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.denoising.frames import load_frames
    from sparsesearch.denoising.judgement import Judgement
    from sparsesearch.denoising.pipeline import load_plans
    from sparsesearch.report.video import render_video

    found, plans = Judgement.load(metrics), load_plans(plan)
    variant = found.variant_of(plans)
    frames = load_frames(metrics)
    page = render_video(plans, found, frames["dense"], frames[variant], variant=variant)
    write_bytes(out, page.encode())
    lines(f"written: {out}")
