"""Profile, sensitivities, search, replay: plans of several budgets and menus from one profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsesearch.denoising.planning import find_step_plan
from sparsesearch.denoising.replay import Replay, accept, measure_sensitivity, plans_of
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.profiling.denoising.run import Progress, Sampler, profile_transformer, silent
from sparsesearch.search_space import SearchSpace


@dataclass(frozen=True)
class Accepted:
    """A plan that won the replay on the calibration inputs.

    Attributes:
        plan: the plan, with the replayed errors of all its rivals in `provenance["replayed"]`.
        weighting: how the errors were weighed that it minimises.
        log10_error: mean logarithm of the replayed mean square error, per rival.
    """

    plan: Plan
    weighting: str
    log10_error: dict[str, float]


@dataclass(frozen=True)
class Corridor:
    """From a transformer and calibration inputs to accepted plans.

    Attributes:
        model: the transformer, in evaluation mode.
        sampler: samples the calibration inputs through it.
        request: what to profile.
        folder: where profiles go.
        progress: called with (stage, done, total).
    """

    model: Any
    sampler: Sampler
    request: StepsRequest
    folder: Path
    progress: Progress = silent

    def profile(self, *, density: float, per_head: bool = True, resume: bool = False) -> DenoisingProfile:
        """Errors of all candidates, and how much each head matters in the end around a density."""
        found = profile_transformer(
            self.model, self.sampler, self.request, self.folder / "dense", resume=resume, progress=self.progress
        )
        if bool((found.sensitivity != 1).any()):
            return found  # resumed, and measured before
        replay = Replay.of(self.model, self.sampler)
        return measure_sensitivity(found, replay, density=density, per_head=per_head, progress=self.progress)

    def search(
        self,
        profile: DenoisingProfile,
        density: float,
        *,
        space: SearchSpace | None = None,
        weightings: Sequence[str] | None = None,
        rivals: dict[str, Plan] | None = None,
    ) -> Accepted:
        """The plan whose true samples on the calibration inputs are nearest to dense, among one plan per weighting and the rivals given."""
        plans = plans_of(
            profile, lambda weight: find_step_plan(profile, density, weight=weight, space=space), weightings
        )
        plans = {**(rivals or {}), **plans}
        best, errors = accept(Replay.of(self.model, self.sampler), plans, progress=self.progress)
        logs = {name: float(error.clamp_min(1e-12).log10().mean()) for name, error in errors.items()}
        provenance = {**plans[best].provenance, "weighting": best, "replayed_log10_error": logs}
        return Accepted(plans[best].model_copy(update={"provenance": provenance}), best, logs)

    def search_again(
        self, profile: DenoisingProfile, density: float, accepted: Accepted, *, space: SearchSpace | None = None
    ) -> Accepted:
        """Profile under the accepted plan, so that errors are those of the activations it meets, and search once more.

        The sensitivities are those of the first profile. The accepted plan stays among the rivals: a worse one is refused.
        """
        name = f"under-{accepted.plan.sha256[:12]}"
        again = profile_transformer(
            self.model, self.sampler, self.request, self.folder / name, plan=accepted.plan, progress=self.progress
        ).with_sensitivity(torch.as_tensor(profile.sensitivity))
        kept = accepted.weighting.removeprefix("under plan: ")
        plans = plans_of(
            again, lambda weight: find_step_plan(again, density, weight=weight, space=space), (kept, "damped")
        )
        rivals = {accepted.weighting: accepted.plan, **{f"under plan: {name}": plan for name, plan in plans.items()}}
        best, errors = accept(Replay.of(self.model, self.sampler), rivals, progress=self.progress)
        logs = {rival: float(error.clamp_min(1e-12).log10().mean()) for rival, error in errors.items()}
        provenance = {**rivals[best].provenance, "weighting": best, "replayed_log10_error": logs}
        return Accepted(rivals[best].model_copy(update={"provenance": provenance}), best, logs)
