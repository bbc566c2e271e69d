"""Judging plans: held-out samples under each of them beside dense ones from the same noise, clip by clip."""

from collections import Counter
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.judgement import Judgement, Variant
from sparsesearch.denoising.replay import Replay
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.menu import static_work

Measure = Callable[[Tensor, Tensor], Float[Tensor, " B"]]
"""Similarity of each found sample to the wanted one; greater is better."""


def judge(
    replay: Replay, plans: Mapping[str, Plan], measures: Mapping[str, Measure], *, layout: Layout, num_steps: int
) -> Judgement:
    """Sample under every plan and compare with dense sampling."""
    variants = {}
    for name, plan in plans.items():
        found = replay.samples(plan)
        values = {key: tuple(measure(found, replay.dense).tolist()) for key, measure in measures.items()}
        variants[name] = Variant(density=static_density(plan, layout, num_steps), values=values)
    digests = {name: {component_of(plan): plan.sha256} for name, plan in plans.items()}
    return Judgement(num_steps=num_steps, layout=layout, variants=variants, plans=digests)


def component_of(plan: Plan) -> str:
    """The transformer of a pipeline that a plan is for; `transformer` where it names none."""
    return str(plan.provenance.get("component", "transformer"))


def static_density(plan: Plan, layout: Layout, num_steps: int, *, span: tuple[int, int] | None = None) -> float | None:
    """Computed tiles over all steps, heads and layers as a share of dense attention's; None if a rule or a chunk decides.

    Args:
        plan: the plan.
        layout: tokens of a sample.
        num_steps: of the run.
        span: first and end step at which the plan's transformer is called; all by default.
    """
    chunked = plan.schedule is not None and plan.schedule.by_chunk
    if chunked or any(rule.dynamic for rule in plan.rules.values()):
        return None
    run = range(*(span or (0, num_steps)))
    places = Counter(None if plan.schedule is None else plan.schedule.range_index(step, num_steps) for step in run)
    total = 0.0
    for place, steps in places.items():
        table = plan.assignments if plan.schedule is None or place is None else plan.schedule.assignments(place)
        heads = Counter(name for names in table.values() for name in names)
        named = sum(
            static_work(plan.rules[name], layout, plan.block_tokens, steps) * count for name, count in heads.items()
        )
        unnamed = plan.base_model.geometry.total_heads - heads.total()
        total += steps * (named + unnamed) / plan.base_model.geometry.total_heads
    return total / len(run)


def difference_image(found: Float[Tensor, "3 F Y X"], wanted: Float[Tensor, "3 F Y X"]) -> Float[Tensor, "3 F Y X"]:
    """Absolute difference, four times enlarged, in [-1, 1] as pixels are."""
    return ((found - wanted).abs() * 4 - 1).clamp(-1, 1)
