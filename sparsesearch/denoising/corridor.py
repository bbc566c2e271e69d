"""Profile, sensitivities, search, replay: plans of several budgets and menus from one profile."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.planning import find_step_plan
from sparsesearch.denoising.replay import Replay, measure_sensitivity
from sparsesearch.denoising.weighting import STARTS, Weighting, descend
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.observe import Progress, Sampler, silent
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.profiling.denoising.run import profile_transformer
from sparsesearch.search_space import SearchSpace


@dataclass(frozen=True)
class Accepted:
    """A plan that won the replay on the calibration inputs.

    Attributes:
        plan: the plan, with the replayed errors of all its rivals in `provenance["replayed_log10_error"]`.
        weighting: how the errors were weighed that it minimises.
        log10_error: mean logarithm of the replayed mean square error, per rival; the least is the greatest mean PSNR.
    """

    plan: Plan
    weighting: str
    log10_error: dict[str, float]

    @classmethod
    def of(cls, plans: dict[str, Plan], log10_error: dict[str, float]) -> "Accepted":
        """The best of replayed plans."""
        best = min(log10_error, key=lambda name: log10_error[name])
        provenance = {**plans[best].provenance, "weighting": best, "replayed_log10_error": log10_error}
        return cls(plans[best].model_copy(update={"provenance": provenance}), best, log10_error)


@dataclass(frozen=True)
class Corridor:
    """From a transformer and calibration inputs to accepted plans. No plan is taken by its predicted error: that only says which are worth a replay.

    Attributes:
        model: the transformer, in evaluation mode.
        sampler: samples the calibration inputs through it.
        request: what to profile.
        folder: where profiles go.
        progress: called with (stage, done, total).
        scheduler: of the model's pipeline, where that does not tell the step itself.
        dense: what the sampler gives without a plan, if it is known already.
    """

    model: Any
    sampler: Sampler
    request: StepsRequest
    folder: Path
    progress: Progress = silent
    scheduler: Any = None
    dense: Float[Tensor, "B ..."] | None = None

    @cached_property
    def replay(self) -> Replay:
        """The judge on the calibration inputs."""
        return Replay(self.model, self.sampler, self.sampler() if self.dense is None else self.dense, self.scheduler)

    def profile(self, *, density: float, per_head: bool = True, resume: bool = False) -> DenoisingProfile:
        """Errors of all candidates, and how much each head matters in the end around a density."""
        found = self.errors("dense", resume=resume)
        if bool((found.sensitivity != 1).any()):
            return found  # resumed, and measured before
        return measure_sensitivity(found, self.replay, density=density, per_head=per_head, progress=self.progress)

    def errors(self, name: str, *, plan: Plan | None = None, resume: bool = False) -> DenoisingProfile:
        """A profile without sensitivities, in the folder of that name; under a plan, if one is given."""
        return profile_transformer(
            self.model,
            self.sampler,
            self.request,
            self.folder / name,
            plan=plan,
            scheduler=self.scheduler,
            resume=resume,
            progress=self.progress,
        )

    def search(
        self,
        profile: DenoisingProfile,
        density: float,
        *,
        space: SearchSpace | None = None,
        evaluations: int = 0,
        rivals: dict[str, Plan] | None = None,
    ) -> Accepted:
        """The plan whose true samples on the calibration inputs are nearest to dense.

        Args:
            profile: errors and sensitivities.
            density: the budget.
            space: a subset of the profile's candidates.
            evaluations: replays beyond those of STARTS, for weightings around the best one.
            rivals: other plans within the budget to replay beside.
        """
        plans = dict(rivals or {})
        logs = {name: self._log10_error(plan) for name, plan in plans.items()}
        total = len(STARTS) + evaluations
        seen: dict[str, float] = {}

        def value(weighting: Weighting) -> float:
            name = str(weighting)
            if name not in logs:
                self.progress("replay", len(logs), total)
                plan = find_step_plan(profile, density, weight=weighting.of(profile), space=space)
                choice = plan.model_dump_json(include={"assignments", "schedule"})
                if choice not in seen:
                    seen[choice] = self._log10_error(plan)
                plans[name], logs[name] = plan, seen[choice]
            return logs[name]

        best = min(STARTS, key=value)
        for weighting in descend(value, best, evaluations=evaluations):
            value(weighting)
        self.progress("replay", total, total)
        return Accepted.of(plans, logs)

    def search_again(
        self,
        profile: DenoisingProfile,
        density: float,
        accepted: Accepted,
        *,
        space: SearchSpace | None = None,
        evaluations: int = 0,
    ) -> Accepted:
        """Profile under the accepted plan, so that errors are those of the activations it meets, and search once more.

        The sensitivities are those of the first profile. The accepted plan stays among the rivals: a worse one is refused.
        """
        again = self.errors(f"under-{accepted.plan.sha256[:12]}", plan=accepted.plan)
        again = again.with_sensitivity(torch.as_tensor(profile.sensitivity))
        rivals = {f"first: {accepted.weighting}": accepted.plan}
        return self.search(again, density, space=space, evaluations=evaluations, rivals=rivals)

    def _log10_error(self, plan: Plan) -> float:
        return float(self.replay.error(plan).clamp_min(1e-12).log10().mean())
