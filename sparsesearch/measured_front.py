"""The measured front: what plans of several families really keep at a row of densities, on held-out sequences, in one job."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sparsesearch.errors import BudgetInfeasibleError, SpecError, nearest
from sparsesearch.evaluate import Metrics
from sparsesearch.evaluate.run import evaluate, provenance
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
    begun: Metrics | None = None,
    saved: Callable[[Metrics], None] = lambda metrics: None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Metrics:
    """Evaluate every plan of `front_plans` beside dense, family by family. Times are not taken: quality only.

    Args:
        model: a live causal LM in evaluation mode.
        tokenizer: the model's.
        profile: of this model.
        families: as in `front_plans`.
        densities: as in `front_plans`.
        lengths: tokens per sequence.
        num_sequences: needle sequences per length.
        seed: of everything that is drawn.
        command: how this was started, for the record.
        begun: what an interrupted run of the same measurement had saved; its plans are not evaluated again.
        saved: given the metrics so far after every family.
        progress: called with (stage, done, total).

    Raises:
        SpecError: unknown family, none reaches a density, or what was begun is of other sequences, another model or another machine.
    """
    plans, name = front_plans(profile, families, densities), profile.manifest.base_model.name_or_path
    asked = {**provenance(model, seed, command), "model": name}
    if begun is not None:
        _require_same(begun, asked, lengths, num_sequences)
    found = begun
    for family in families:
        there = {} if found is None else found.plans
        own = {key: plan for key, plan in plans.items() if _family_of(key) == family and there.get(key) != plan.sha256}
        if not own:
            continue
        part = evaluate(
            model,
            tokenizer,
            own,
            lengths=lengths,
            num_sequences=num_sequences,
            seed=seed,
            timing_rounds=0,
            progress=_of_all(progress, len(plans), sum(key in there for key in plans), len(own)),
            command=command,
            model_name=name,
        )
        found = part if found is None else _joined(found, part)
        saved(found)
    if found is None:
        raise SpecError(f"a plan must be measured, but no family reaches any of {list(densities)}. Ask for more.")
    return found


def _family_of(variant: str) -> str:
    return variant.partition(" @ ")[0]


def _require_same(begun: Metrics, asked: Mapping[str, Any], lengths: Sequence[int], num_sequences: int) -> None:
    """Plans of earlier metrics need no second evaluation if these are of the same sequences, model and machine."""
    there: dict[str, Any] = {
        "model": begun.model,
        **{key: begun.provenance.get(key) for key in ("device", "dtype", "seed", "versions")},
        "lengths": sorted(begun.results),
        "num_sequences": sorted({row["dense"].kl_text.num_sequences for row in begun.results.values()}),
    }
    wanted = {**asked, "lengths": sorted(set(lengths)), "num_sequences": [num_sequences]}
    for key, value in there.items():
        if value != wanted[key]:
            raise SpecError(
                f"metrics to go on from must be of {key} {wanted[key]}, but are of {value}. Measure anew, without --resume, or ask as before."
            )


def _joined(found: Metrics, part: Metrics) -> Metrics:
    """Both families' plans; dense is the same in either."""
    results = {length: {**row, **part.results[length]} for length, row in found.results.items()}
    return part.model_copy(update={"results": results, "plans": {**found.plans, **part.plans}})


def _of_all(
    progress: Callable[[str, int, int], None], num_plans: int, before: int, count: int
) -> Callable[[str, int, int], None]:
    """Progress of some of all plans, in hundredths of a plan."""

    def tell(stage: str, done: int, total: int) -> None:
        progress(stage, 100 * before + 100 * count * done // total, 100 * num_plans)

    return tell


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
