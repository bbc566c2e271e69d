"""What a plan must beat: one rule for all heads, and its own rules on the wrong heads."""

from collections.abc import Mapping

import numpy as np

from sparsesearch.denoising.replay import Replay
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.step_schedule import StepSchedule

_REPLAYED = 3


def best_uniform(profile: DenoisingProfile, density: float, replay: Replay) -> Plan:
    """One static rule without calibration for all heads, of those within the density the one whose replay is best.

    Only the three of least predicted error are replayed.

    Raises:
        SpecError: no such rule is within the density.
    """
    manifest, errors = profile.manifest, profile.error.mean((0, 1, 2))
    share = (profile.tiles / profile.tiles[..., :1]).mean((0, 1, 2))
    known = [
        index
        for index, rule in enumerate(manifest.candidates)
        if index and not rule.dynamic and not rule.needs_calibration and float(share[index]) <= density
    ]
    if not known:
        raise SpecError(
            f"no rule of the space computes at most {density:g} of the tiles for all heads. Raise the density."
        )
    best = sorted(known, key=lambda index: float(errors[index]))[:_REPLAYED]
    plans = [
        uniform_plan(
            manifest.base_model,
            manifest.candidates[index],
            block_tokens=manifest.block_tokens,
            lengths_tokens=(manifest.layout.num_tokens,),
        )
        for index in best
    ]
    return min(plans, key=lambda plan: float(replay.error(plan).clamp_min(1e-12).log().mean()))


def permuted_plan(plan: Plan, seed: int) -> Plan:
    """The same rules on other heads: in every range of steps, all of them are shuffled over layers and heads.

    What is left of a plan's quality when only the amount of work is kept.
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
        chunks = [item.chunks or (0, None) for item in schedule.ranges] if schedule.by_chunk else None
        schedule = StepSchedule.of(schedule.num_steps, ranges, schedule.refresh, chunks)
    return plan.model_copy(
        update={"assignments": shuffled(plan.assignments), "schedule": schedule, "certificate": None, "quality": {}}
    )
