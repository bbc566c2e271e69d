"""Replay: true sampling under a plan. The judge of every plan, and the measure of how much each head matters in the end."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.planning import write_step_plan
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.observe import Progress, Sampler, silent
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.runtime.denoisers import apply_denoiser


@dataclass(frozen=True)
class Replay:
    """What plans do to the samples.

    Attributes:
        model: the transformer.
        sampler: samples fixed inputs through it.
        dense: what it gives without a plan.
        scheduler: of the model's pipeline, where that does not tell the step itself.
    """

    model: Any
    sampler: Sampler
    dense: Float[Tensor, "B ..."]
    scheduler: Any = None

    @classmethod
    def of(cls, model: Any, sampler: Sampler) -> "Replay":
        """Sample once without a plan."""
        return cls(model, sampler, sampler())

    def samples(self, plan: Plan) -> Float[Tensor, "B ..."]:
        """What it gives under a plan."""
        with apply_denoiser(self.model, plan, scheduler=self.scheduler):
            return self.sampler()

    def error(self, plan: Plan) -> Float[Tensor, " B"]:
        """Mean square difference from dense of each sample."""
        return (self.samples(plan) - self.dense).square().flatten(1).mean(1)


def measure_sensitivity(
    profile: DenoisingProfile,
    replay: Replay,
    *,
    density: float,
    per_head: bool = True,
    progress: Progress = silent,
) -> DenoisingProfile:
    """Fill in how much the final samples change per unit of error in each range and head (or layer).

    One replay per range and head: that head alone takes the candidate of least error among those near `density`, and the mean square change
    of the samples is divided by its error. So an error counts by what becomes of it, through later layers and steps.

    Args:
        profile: the profile; saved again where it lies.
        replay: on the calibration inputs.
        density: the budget that is asked for; a perturbation of that size is what the plan will make.
        per_head: False perturbs whole layers, which takes a replay per range and layer.
        progress: called with (stage, done, total).
    """
    ranges, layers, heads, _ = profile.error.shape
    probe = _near(profile, density)
    changed, error = (torch.zeros(ranges, layers, heads, dtype=torch.double) for _ in range(2))
    groups = [[head] for head in range(heads)] if per_head else [list(range(heads))]
    todo = [(place, layer, group) for place in range(ranges) for layer in range(layers) for group in groups]
    for done, (place, layer, group) in enumerate(todo):
        progress("sensitivity", done, len(todo))
        choice = np.zeros((ranges, layers, heads), int)
        choice[place, layer, group] = probe[place, layer, group]
        plan = write_step_plan(profile, choice.ravel(), density=1.0)
        first, end = profile.manifest.ranges[place]
        columns = torch.as_tensor(probe[place, layer, group])
        share = (end - first) / profile.manifest.num_steps / len(group)
        changed[place, layer, group] = float(replay.error(plan).mean()) / len(group)
        error[place, layer, group] = float(profile.error[place, layer, group, columns].sum()) * share
    progress("sensitivity", len(todo), len(todo))
    return profile.with_sensitivity(_ratio(changed, error).float())


def _ratio(changed: Float[Tensor, "R L H"], error: Float[Tensor, "R L H"]) -> Float[Tensor, "R L H"]:
    """Changed / error per head, drawn towards the ratio of its layer's sums.

    A head whose perturbation is small says little, because its change is mostly rounding; half the layer's mean error is what it takes to be
    believed as much as the layer.
    """
    layer = changed.sum(2, keepdim=True) / error.sum(2, keepdim=True).clamp_min(1e-12)
    doubt = 0.5 * error.mean(2, keepdim=True) + 1e-12
    return (changed + layer * doubt) / (error + doubt)


def _near(profile: DenoisingProfile, density: float) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The candidate of least error among those that compute about so many tiles, per range, layer and head."""
    share = profile.tiles / profile.tiles[..., :1]
    away = (share - density).abs()
    away[..., 0] = torch.inf
    near = away <= away.amin(-1, keepdim=True) + 0.05
    return profile.error.masked_fill(~near, torch.inf).argmin(-1).numpy()
