"""The measured front: what plans of several families really keep at a row of densities, on held-out sequences, in one job."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sparsesearch.errors import BudgetInfeasibleError, SpecError, nearest
from sparsesearch.evaluate import Metrics
from sparsesearch.evaluate.run import evaluate
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.planning import Question, find_choice, write_plan
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import SearchSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Granularity = Literal["query_head", "kv_group"]

UNIFORM = "uniform window"

# family -> (search space, objective, unit). DuoAttention is given our objective, which is stronger than gates trained for an hour would
# be here; MoA and MInference keep their own (first-order influence, attention recall).
FAMILIES: dict[str, tuple[str | None, str, Granularity]] = {
    "mixture": (None, "combined", "query_head"),
    "mixture, KV groups": (None, "combined", "kv_group"),
    "MoA": ("moa", "moa", "query_head"),
    "MInference": ("minference", "dropped_mass", "query_head"),
    "DuoAttention": ("duo_attention", "combined", "kv_group"),
}
ALL_FAMILIES = (*FAMILIES, UNIFORM)
_UNIFORM_BLOCKS = (1, 2, 3, 4, 6, 8, 12)


def family_plan(profile: Profile, family: str, density: float) -> Plan:
    """The family's best plan by its own objective within a density budget.

    Raises:
        SpecError: the profile lacks the family's candidates.
        BudgetInfeasibleError: the family reaches no such density.
    """
    space, objective, granularity = FAMILIES[family]
    question = Question(
        budgets=(Budget("density", density),),
        space=None if space is None else SearchSpace.load(space),
        granularity=granularity,
        objective=objective,
    )
    table, solution = find_choice(profile, question)
    return write_plan(profile, question, table, solution.choice, solution)


def front_plans(profile: Profile, families: Sequence[str], densities: Sequence[float]) -> dict[str, Plan]:
    """Plans of every family and density, named `<family> @ <setting>`; densities that a family cannot reach are left out.

    Uniform windows are not searched: they come at a row of widths.

    Raises:
        SpecError: unknown family.
    """
    plans: dict[str, Plan] = {}
    for family in families:
        if family not in ALL_FAMILIES:
            raise SpecError(f"unknown family {family!r}.{nearest(family, ALL_FAMILIES)}")
        if family == UNIFORM:
            plans |= _uniform_plans(profile)
            continue
        for density in densities:
            try:
                plans[f"{family} @ {density:g}"] = family_plan(profile, family, density)
            except BudgetInfeasibleError:
                continue
    return plans


def _uniform_plans(profile: Profile) -> dict[str, Plan]:
    manifest = profile.manifest
    widths = [blocks * manifest.block_tokens for blocks in _UNIFORM_BLOCKS]
    return {
        f"{UNIFORM} @ {width}": uniform_plan(
            manifest.base_model,
            SinkWindow(sink=64, window=LengthLaw(a=width)),
            block_tokens=manifest.block_tokens,
            lengths_tokens=manifest.lengths,
        )
        for width in widths
    }


def measure_front(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    profile: Profile,
    *,
    families: Sequence[str] = ALL_FAMILIES,
    densities: Sequence[float] = (0.15, 0.2, 0.25, 0.35, 0.5),
    lengths: Sequence[int] = (2048,),
    num_sequences: int = 96,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Metrics:
    """Evaluate every plan of `front_plans` beside dense. Times are not taken: quality only."""
    plans = front_plans(profile, families, densities)
    return evaluate(
        model,
        tokenizer,
        plans,
        lengths=lengths,
        num_sequences=num_sequences,
        seed=seed,
        timing_rounds=0,
        progress=progress,
        command=command,
        model_name=profile.manifest.base_model.name_or_path,
    )


def front_table(metrics: Metrics, length: int) -> list[dict[str, Any]]:
    """One row per plan, by family and density."""
    rows = []
    for name in metrics.variants:
        cell = metrics.at(length, name)
        family, _, setting = name.partition(" @ ")
        rows.append(
            {
                "family": family,
                "setting": setting,
                "density": cell.density,
                "needle": cell.needle.mean,
                "kl_text": cell.kl_text.mean,
                "kl_answer": cell.kl_answer.mean,
                "heldout_loss": cell.heldout_loss.mean,
            }
        )
    return rows
