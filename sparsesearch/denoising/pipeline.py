"""The corridor for a diffusers pipeline: one profile and one plan per transformer, calibrated on a written-down run."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from sparsesearch.artifacts import read_json, write_json
from sparsesearch.denoising.corridor import Corridor
from sparsesearch.denoising.judge import component_of
from sparsesearch.denoising.sampling_run import SamplingRun
from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError, UnsupportedModelError, first_problem
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.profiling.denoising.observe import Progress, silent
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.runtime.diffusion.families import FAMILIES
from sparsesearch.runtime.diffusion.live import apply_to_transformer, describe_transformer, transformer_sites
from sparsesearch.search_space import SearchSpace

FORMAT, SCHEMA_VERSION = "sparsesearch.pipeline-profile", "1.0"
INDEX = "pipeline.json"
Sensitivity = Literal["none", "layer", "head"]


class PipelineIndex(BaseModel):
    """What a profile of a pipeline holds besides the profiles of its transformers.

    Attributes:
        pipeline: the directory it was loaded from.
        run: what was sampled.
        components: names of its transformers; the profile of each lies in the folder of that name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    pipeline: str
    run: SamplingRun
    components: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write the index; the last step of profiling."""
        write_json(folder / INDEX, self.model_dump(mode="json"), format=FORMAT, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        try:
            return cls.model_validate(read_json(folder / INDEX, format=FORMAT, schema_version=SCHEMA_VERSION))
        except ValidationError as error:
            raise ArtifactError(f"{folder / INDEX}: {first_problem(error)} Profile again.") from error

    def profiles(self, folder: Path) -> dict[str, DenoisingProfile]:
        """The finished profiles."""
        return {name: DenoisingProfile.load(folder / name / "dense") for name in self.components}


def load_pipeline(folder: Path, *, device: str = "cpu", dtype: str = "auto") -> Any:
    """Load a diffusers pipeline without plans that it may carry; parts that its index leaves out stay out.

    Args:
        folder: directory with model_index.json.
        device: where it runs.
        dtype: of the weights; float32 on a CPU and bfloat16 elsewhere if `auto`.

    Raises:
        UnsupportedModelError: it is no pipeline directory, or has no transformer with a sparse runtime.
    """
    from diffusers import DiffusionPipeline

    from sparsesearch.runtime.diffusion.loading import without_plans

    index = folder / "model_index.json"
    if not index.is_file():
        raise UnsupportedModelError(
            f"{folder} must be a diffusers pipeline, with model_index.json, because a transformer alone cannot sample. Give the whole pipeline."
        )
    chosen = ("float32" if torch.device(device).type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    absent = {name: None for name, value in DiffusionPipeline.load_config(folder).items() if value == [None, None]}
    with without_plans():
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, chosen), **absent).to(device)
    pipeline.set_progress_bar_config(disable=True)
    transformers_of(pipeline)
    return pipeline


def transformers_of(pipeline: Any) -> dict[str, Any]:
    """Its transformers that have a sparse runtime, by component.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = {
        name: part
        for name, part in pipeline.components.items()
        if any(kind.__name__ in FAMILIES for kind in type(part).__mro__)
    }
    if not found:
        raise UnsupportedModelError(
            f"a {type(pipeline).__name__} must have one of {', '.join(FAMILIES)} to run sparse, but has none."
        )
    return found


@dataclass
class Visits:
    """When a transformer is called during a run.

    Attributes:
        counts: step -> calls.
        num_steps: of the run.
        layout: its tokens.
    """

    counts: dict[int, int] = field(default_factory=dict)
    num_steps: int = 0
    layout: Layout | None = None

    @property
    def span(self) -> tuple[int, int]:
        """First and end step."""
        return min(self.counts), max(self.counts) + 1

    def passes(self, steps: tuple[int, ...]) -> int:
        """Calls at each of these steps.

        Raises:
            SpecError: they differ.
        """
        counts = {self.counts.get(step, 0) for step in steps}
        if len(counts) > 1:
            raise SpecError(
                f"the pipeline must call its transformer equally often at all profiled steps, but does so {sorted(counts)} times. "
                "Sample without guidance that begins or ends on the way."
            )
        return counts.pop()


def sample_dense(pipeline: Any, run: SamplingRun) -> tuple[Float[Tensor, "B ..."], dict[str, Visits]]:
    """Final latents without a plan, and when each transformer was called.

    Raises:
        SpecError: the pipeline tells no steps.
    """
    visits = {name: Visits() for name in transformers_of(pipeline)}
    with ExitStack() as stack:
        for name, model in transformers_of(pipeline).items():
            dense = uniform_plan(describe_transformer(model, name), Dense(), block_tokens=64, lengths_tokens=(1,))
            applied = stack.enter_context(
                apply_to_transformer(model, dense, scheduler=pipeline.components.get("scheduler"))
            )
            applied.probe(_counting(visits[name], transformer_sites(model)[-1].path))
        latents = torch.stack([latent.float() for latent in run.sample(pipeline, "latent")])
    return latents, {name: seen for name, seen in visits.items() if seen.counts}


def _counting(visits: Visits, last: str) -> Any:
    def probe(seen: LayerCall) -> None:
        if seen.path != last:
            return
        if seen.call.step is None:
            raise SpecError(
                "the pipeline must tell the denoising step, through its scheduler or cache context, but does not."
            )
        step, visits.num_steps = seen.call.step
        visits.counts[step] = visits.counts.get(step, 0) + 1
        visits.layout = seen.call.layout

    return probe


@dataclass(frozen=True)
class PipelineCorridor:
    """From a pipeline and a run to one profile and one plan per transformer.

    Attributes:
        pipeline: the pipeline.
        source: the directory it came from.
        run: what to sample.
        folder: where profiles go.
        progress: called with (stage, done, total).
    """

    pipeline: Any
    source: Path
    run: SamplingRun
    folder: Path
    progress: Progress = silent

    def corridors(self, space: SearchSpace) -> dict[str, Corridor]:
        """One per transformer; all share the dense samples."""
        self.progress("dense samples", 0, 1)
        dense, visits = sample_dense(self.pipeline, self.run)
        self.progress("dense samples", 1, 1)
        found = {}
        for name, seen in visits.items():
            model = transformers_of(self.pipeline)[name]
            request = StepsRequest(
                describe_transformer(model, str(self.source / name)),
                space,
                seen.num_steps,
                ends=self.run.step_ranges,
                captured_per_range=self.run.captured_per_range,
                calibration=self.run.name,
                query_blocks=self.run.query_blocks,
                span=seen.span,
                bitmaps=self.run.bitmaps,
            )
            captured = tuple(step for steps in request.captured for step in steps)
            found[name] = Corridor(
                model,
                self._latents,
                replace(request, passes=seen.passes(captured)),
                self.folder / name,
                self.progress,
                self.pipeline.components.get("scheduler"),
                dense,
            )
        return found

    def profile(
        self,
        space: SearchSpace,
        *,
        sensitivity: Sensitivity = "none",
        density: float = 0.35,
        under: Mapping[str, Plan] | None = None,
        resume: bool = False,
    ) -> dict[str, DenoisingProfile]:
        """Profile every transformer; see `Corridor`.

        Args:
            space: candidates.
            sensitivity: also replay the run once per range of steps and layer, or head, to learn what its errors matter in the end.
            density: around which they are measured.
            under: plans to run meanwhile, by component.
            resume: continue an interrupted profile.
        """
        profiles = {}
        for name, corridor in self.corridors(space).items():
            plan = (under or {}).get(name)
            if sensitivity == "none" or plan is not None:
                profiles[name] = corridor.errors("dense", plan=plan, resume=resume)
            else:
                profiles[name] = corridor.profile(density=density, per_head=sensitivity == "head", resume=resume)
        PipelineIndex(pipeline=str(self.source), run=self.run, components=tuple(profiles)).save(self.folder)
        return profiles

    def _latents(self) -> Float[Tensor, "B ..."]:
        return torch.stack([latent.float() for latent in self.run.sample(self.pipeline, "latent")])


def save_plans(plans: Mapping[str, Plan], out: Path) -> None:
    """One plan as a file; those of several transformers as a directory with a file each, named by component."""
    if len(plans) == 1:
        next(iter(plans.values())).save(out)
        return
    for name, plan in plans.items():
        plan.save(out / f"{name}.json")


def load_plans(path: Path, component: str | None = None) -> dict[str, Plan]:
    """What `save_plans` wrote, by component: the one given, the one that the plan names, or `transformer`.

    Raises:
        ArtifactError: a directory holds no plans.
        PlanMismatchError: several plans were given for one component.
    """
    if not path.is_dir():
        plan = Plan.load(path)
        return {component or component_of(plan): plan}
    if component is not None:
        raise PlanMismatchError(
            f"{path} holds plans of several components. Give one of its files to apply it to {component!r} alone."
        )
    found = {file.stem: Plan.load(file) for file in sorted(path.glob("*.json"))}
    if not found:
        raise ArtifactError(f"{path} must hold plans, but has no .json file. Give what `sparsesearch search` wrote.")
    return found
