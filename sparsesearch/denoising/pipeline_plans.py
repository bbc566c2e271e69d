"""Plans for all transformers of a pipeline, from their profiles, and their verdict on pixels of another run."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.corridor import Corridor
from sparsesearch.denoising.judge import static_density
from sparsesearch.denoising.judgement import Judgement, Variant
from sparsesearch.denoising.pipeline import PipelineIndex, Visits, sample_dense
from sparsesearch.denoising.planning import find_step_plan
from sparsesearch.denoising.ranges import find_ranges, range_plan
from sparsesearch.denoising.sampling_run import SamplingRun
from sparsesearch.denoising.threshold import OBJECTIVE, find_threshold_plan
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.runtime.diffusion.live import apply_to_pipeline
from sparsesearch.search_space import SearchSpace
from sparsesearch.testbed.sampling import psnr_db, ssim

Plans = Mapping[str, Plan]
Objective = Literal["output_error", "sparse_vdit"]
SHOWN_SAMPLES, SHOWN_FRAMES, SHOWN_WIDTH = 4, 6, 256


def search_pipeline(
    index: PipelineIndex,
    profiles: Mapping[str, DenoisingProfile],
    density: float,
    *,
    space: SearchSpace | None = None,
    objective: Objective = "output_error",
    max_ranges: int | None = None,
    max_orders: int | None = None,
    evaluations: int = 0,
    corridors: Mapping[str, Corridor] | None = None,
) -> dict[str, Plan]:
    """One plan per transformer, each within the density over the steps at which it is called.

    Args:
        index: of the profile.
        profiles: by component.
        density: budget.
        space: a subset of the profiled candidates.
        objective: summed relative output error, solved exactly, or Sparse-vDiT's choice head by head.
        max_ranges: merge profiled ranges of steps into at most so many, where that loses least.
        max_orders: with max_ranges: at most so many token orders per layer besides the model's own.
        evaluations: replays beyond the fixed weightings of sensitivities; 0 and no corridors: take the plan of least predicted loss.
        corridors: where to replay, by component.

    Raises:
        SpecError: the options contradict each other, or the space was not profiled.
        BudgetInfeasibleError: no plan fits.
    """
    if objective == OBJECTIVE and (max_ranges is not None or corridors):
        raise SpecError(
            f"{OBJECTIVE} decides head by head on the profile's own ranges. Leave out --max-ranges and --refine."
        )
    if max_ranges is not None and corridors:
        raise SpecError(
            "a replay compares plans of the profile's own ranges. Leave out either --max-ranges or --refine."
        )
    plans = {}
    for name, profile in profiles.items():
        if objective == OBJECTIVE:
            plan = find_threshold_plan(profile, density, space=space)
        elif max_ranges is not None:
            ranges = find_ranges(profile, density, max_ranges=max_ranges, max_orders=max_orders, space=space)
            plan = range_plan(profile, density, ranges, space=space)
        elif corridors:
            plan = corridors[name].search(profile, density, space=space, evaluations=evaluations).plan
        else:
            plan = find_step_plan(profile, density, space=space)
        provenance = {**plan.provenance, "component": name, "pipeline": index.pipeline}
        plans[name] = plan.model_copy(update={"provenance": provenance})
    return plans


def judge_pipeline(
    pipeline: object, run: SamplingRun, variants: Mapping[str, Plans], *, allow_other_weights: bool = False
) -> tuple[Judgement, dict[str, Float[Tensor, "B 3 F Y X"]]]:
    """Decode every sample of a run, dense and under each variant's plans, and compare pixels; also some frames of `dense` and each variant.

    Raises:
        PlanMismatchError: a plan is not for this pipeline.
    """
    _, visits = sample_dense(pipeline, run)
    wanted = list(run.sample(pipeline, "pt"))
    frames = {"dense": _shown(wanted)}
    found = {}
    for name, plans in variants.items():
        with apply_to_pipeline(pipeline, plans, allow_other_weights=allow_other_weights):
            samples = list(run.sample(pipeline, "pt"))
        frames[name] = _shown(samples)
        pairs = [(a[None], b[None]) for a, b in zip(samples, wanted, strict=True)]
        values = {
            "psnr_db": tuple(float(psnr_db(a, b)) for a, b in pairs),
            "ssim": tuple(float(ssim(a, b)) for a, b in pairs),
        }
        found[name] = Variant(density=_density(plans, visits), values=values)
    first = next(iter(visits.values()))
    assert first.layout is not None
    digests = {name: {part: plan.sha256 for part, plan in plans.items()} for name, plans in variants.items()}
    return Judgement(num_steps=run.steps, layout=first.layout, variants=found, plans=digests), frames


def _density(plans: Plans, visits: Mapping[str, Visits]) -> float | None:
    """Computed tiles of all transformers over the run; one without a plan is dense."""
    used = whole = 0.0
    heads = {name: plan.base_model.geometry.total_heads for name, plan in plans.items()}
    for name, seen in visits.items():
        calls = sum(seen.counts.values()) * heads.get(name, max(heads.values()))
        share: float | None = 1.0
        if name in plans:
            assert seen.layout is not None
            share = static_density(plans[name], seen.layout, seen.num_steps, span=seen.span)
        if share is None:
            return None
        used, whole = used + calls * share, whole + calls
    return used / whole


def _shown(samples: list[Float[Tensor, "3 F Y X"]]) -> Float[Tensor, "B 3 F Y X"]:
    """A few frames of a few samples, not wider than a page needs."""
    shown = torch.stack(samples[:SHOWN_SAMPLES])
    places = torch.linspace(0, shown.shape[2] - 1, min(SHOWN_FRAMES, shown.shape[2])).round().long()
    shown = shown[:, :, places]
    factor = max(1, -(-shown.shape[-1] // SHOWN_WIDTH))
    return torch.nn.functional.avg_pool3d(shown, (1, factor, factor)) if factor > 1 else shown
