"""The verdict on plans: held-out samples under each of them beside dense ones from the same noise, clip by clip."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sparsesearch.denoising.replay import Replay
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.menu import static_work
from sparsesearch.step_schedule import StepSchedule

Measure = Callable[[Tensor, Tensor], Float[Tensor, " B"]]
"""Similarity of each found sample to the wanted one; greater is better."""


class Variant(BaseModel):
    """One plan on the held-out inputs.

    Attributes:
        density: computed tiles over all steps as a share of dense attention's; None where rules choose for themselves.
        values: measure -> one value per clip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    density: float | None
    values: dict[str, tuple[float, ...]]

    def mean(self, measure: str) -> float:
        """Mean over clips."""
        return float(np.mean(self.values[measure]))


@dataclass(frozen=True)
class Paired:
    """Difference of two variants, clip by clip.

    Attributes:
        mean: of the differences.
        standard_error: of that mean; NaN for one clip.
        won: clips in which the first is better.
    """

    mean: float
    standard_error: float
    won: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.standard_error:.2f} ({self.won})"


class Judgement(BaseModel):
    """Variants judged on the same inputs.

    Attributes:
        num_steps: denoising steps.
        layout: tokens of a clip.
        variants: name -> what was found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_steps: int
    layout: Layout
    variants: dict[str, Variant]

    def paired(self, first: str, second: str, measure: str = "psnr_db") -> Paired:
        """How much better `first` is than `second`."""
        a, b = (np.array(self.variants[name].values[measure]) for name in (first, second))
        difference = a - b
        count = len(difference)
        error = float(difference.std(ddof=1) / sqrt(count)) if count > 1 else float("nan")
        return Paired(float(difference.mean()), error, int((difference > 0).sum()))


def judge(
    replay: Replay, plans: Mapping[str, Plan], measures: Mapping[str, Measure], *, layout: Layout, num_steps: int
) -> Judgement:
    """Sample under every plan and compare with dense sampling."""
    variants = {}
    for name, plan in plans.items():
        found = replay.samples(plan)
        values = {key: tuple(measure(found, replay.dense).tolist()) for key, measure in measures.items()}
        variants[name] = Variant(density=static_density(plan, layout, num_steps), values=values)
    return Judgement(num_steps=num_steps, layout=layout, variants=variants)


def static_density(plan: Plan, layout: Layout, num_steps: int) -> float | None:
    """Computed tiles over all steps, heads and layers as a share of dense attention's; None if a rule or a chunk decides."""
    chunked = plan.schedule is not None and plan.schedule.by_chunk
    if chunked or any(rule.dynamic for rule in plan.rules.values()):
        return None
    places = Counter(
        None if plan.schedule is None else plan.schedule.range_index(step, num_steps) for step in range(num_steps)
    )
    total = 0.0
    for place, steps in places.items():
        table = plan.assignments if plan.schedule is None or place is None else plan.schedule.assignments(place)
        heads = Counter(name for names in table.values() for name in names)
        named = sum(
            static_work(plan.rules[name], layout, plan.block_tokens, steps) * count for name, count in heads.items()
        )
        unnamed = plan.base_model.geometry.total_heads - heads.total()
        total += steps * (named + unnamed) / plan.base_model.geometry.total_heads
    return total / num_steps


def permuted_plan(plan: Plan, seed: int) -> Plan:
    """The same rules on other heads: in every range of steps, all of them are shuffled over layers and heads.

    A control: what is left of a plan's quality when only the amount of work is kept.
    """
    rng = np.random.default_rng(seed)

    def shuffled(table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        names = [name for heads in table.values() for name in heads]
        mixed = iter([names[place] for place in rng.permutation(len(names))])
        return {module: tuple(next(mixed) for _ in heads) for module, heads in table.items()}

    schedule = plan.schedule
    if schedule is not None:
        ranges = [
            (item.first, item.end, shuffled(schedule.assignments(place))) for place, item in enumerate(schedule.ranges)
        ]
        schedule = StepSchedule.of(schedule.num_steps, ranges, schedule.refresh)
    return plan.model_copy(
        update={"assignments": shuffled(plan.assignments), "schedule": schedule, "certificate": None, "quality": {}}
    )


def difference_image(found: Float[Tensor, "3 F Y X"], wanted: Float[Tensor, "3 F Y X"]) -> Float[Tensor, "3 F Y X"]:
    """Absolute difference, four times enlarged, in [-1, 1] as pixels are."""
    return ((found - wanted).abs() * 4 - 1).clamp(-1, 1)
