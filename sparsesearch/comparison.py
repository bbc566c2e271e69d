"""What changed between two plans for one model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import PlanMismatchError
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule


@dataclass(frozen=True)
class HeadChange:
    """One query head whose rule differs; `steps` is the range of denoising steps, empty without a schedule."""

    module: str
    head: int
    before: str
    after: str
    density_before: float | None
    density_after: float | None
    steps: str = ""


@dataclass(frozen=True)
class Span:
    """Denoising steps over which one table of assignments holds; without a schedule, everything."""

    label: str
    num_steps: int
    plan: Plan


@dataclass(frozen=True)
class PlanDiff:
    """Plan b against plan a.

    Attributes:
        length_tokens: the length at which densities are stated.
        num_heads: query heads of the model, once in each range of denoising steps that both plans have.
        changes: heads whose rule differs, in model order.
        moves: (kind before, kind after) -> heads, most frequent first.
        density: static tiles of a and of b over those of dense, ranges of steps counting alike; None where a dynamic rule decides at run time.
        other_fields: plan fields besides rules and assignments that differ, as (name, a, b); what is long is summed up.
    """

    length_tokens: int
    num_heads: int
    changes: tuple[HeadChange, ...]
    moves: tuple[tuple[str, str, int], ...]
    density: tuple[float | None, float | None]
    other_fields: tuple[tuple[str, str, str], ...]

    @property
    def identical(self) -> bool:
        """Whether both plans compute the same."""
        return not self.changes and not {name for name, _, _ in self.other_fields} & {"block_tokens", *PARTS}


def diff(plan_a: Plan, plan_b: Plan) -> PlanDiff:
    """Compare two plans for the same model, head by head.

    Raises:
        PlanMismatchError: their models have other modules or head counts.
    """
    if plan_a.base_model.geometry != plan_b.base_model.geometry:
        raise PlanMismatchError(
            "two plans must be for the same model to be compared, but the first is for "
            f"{plan_a.base_model.name_or_path!r} and the second for {plan_b.base_model.name_or_path!r}, whose heads differ."
        )
    length = max([*plan_a.lengths_tokens, *plan_b.lengths_tokens])
    cost_a, cost_b = TileShares(plan_a, length), TileShares(plan_b, length)
    tables = _tables(plan_a, plan_b)
    pairs = [(steps, *heads) for steps, a, b in tables for heads in zip(a.heads(), b.heads(), strict=True)]
    changes = tuple(
        HeadChange(module, head, before.label, after.label, cost_a.of(before), cost_b.of(after), steps)
        for steps, (module, head, before), (_, _, after) in pairs
        if before != after
    )
    moves = Counter((before.kind, after.kind) for _, (_, _, before), (_, _, after) in pairs if before != after)
    return PlanDiff(
        length,
        len(pairs),
        changes,
        tuple((before, after, count) for (before, after), count in sorted(moves.items(), key=lambda m: (-m[1], m[0]))),
        (
            cost_a.mean([before for _, (_, _, before), _ in pairs]),
            cost_b.mean([after for _, _, (_, _, after) in pairs]),
        ),
        _other_fields(plan_a, plan_b),
    )


def _tables(plan_a: Plan, plan_b: Plan) -> list[tuple[str, Plan, Plan]]:
    """Ranges of steps that both plans have, with what holds there; else the plans' own tables, of the steps outside all ranges."""
    a, b = spans_of(plan_a), spans_of(plan_b)
    if [span.label for span in a] != [span.label for span in b]:
        return [("", plan_a, plan_b)]
    return [(one.label, one.plan, other.plan) for one, other in zip(a, b, strict=True)]


class TileShares:
    """Share of dense's tiles of each rule at one length, computed once per rule; None where the data decide."""

    def __init__(self, plan: Plan, length_tokens: int) -> None:
        layout = plan.layout
        self._grid = BlockGrid(
            length_tokens, length_tokens, plan.block_tokens, causal=layout is None or layout.causal, layout=layout
        )
        self._known: dict[Rule, float | None] = {}

    def of(self, rule: Rule) -> float | None:
        """One head's share."""
        if rule not in self._known:
            if rule.dynamic:
                self._known[rule] = 1.0 if rule.keeps_all(self._grid) else None
            else:
                work = float(rule.work(rule.levels(self._grid), self._grid))
                self._known[rule] = work / float(self._grid.reachable().sum())
        return self._known[rule]

    def mean(self, rules: Sequence[Rule]) -> float | None:
        """The share of several heads together."""
        shares = [self.of(rule) for rule in rules]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if len(known) == len(shares) else None


def spans_of(plan: Plan) -> list[Span]:
    """The ranges of a plan's schedule, and the steps outside them, as plans without one."""
    schedule = plan.schedule
    if schedule is None:
        return [Span("", 1, plan)]
    found, outside = [], schedule.num_steps
    for place, item in enumerate(schedule.ranges):
        first, last = item.first, item.end - 1
        chunks = "" if item.chunks is None else f", chunks from {item.chunks[0]}"
        table = plan.model_copy(update={"assignments": schedule.assignments(place), "schedule": None})
        found.append(Span(f"{first}-{last}{chunks}", item.end - item.first, table))
        outside -= 0 if item.chunks is not None else item.end - item.first
    if outside and not schedule.by_chunk:
        found.append(Span("others", outside, plan.model_copy(update={"schedule": None})))
    return found


def _other_fields(plan_a: Plan, plan_b: Plan) -> tuple[tuple[str, str, str], ...]:
    names = ("block_tokens", "unit", "lengths_tokens")
    pairs = [(name, str(getattr(plan_a, name)), str(getattr(plan_b, name))) for name in names]
    pairs.append(("budgets", _budgets(plan_a), _budgets(plan_b)))
    found = [pair for pair in pairs if pair[1] != pair[2]]
    for name, summary in PARTS.items():
        if getattr(plan_a, name) != getattr(plan_b, name):
            before, after = summary(plan_a), summary(plan_b)
            found.append((name, before, after if after != before else f"{after}, but others"))
    return tuple(found)


def _budgets(plan: Plan) -> str:
    parts = []
    for record in plan.budgets:
        used = ", ".join(f"{value:.4g} at {where}" for where, value in record.predicted.items())
        parts.append(f"{record.metric}={record.bound:g} ({used})")
    return ", ".join(parts) or "none"


def _decoding(plan: Plan) -> str:
    own = sum(plan.decode_rule(module, head) != rule for module, head, rule in plan.heads())
    return f"{own} of {plan.base_model.geometry.total_heads} query heads follow another rule"


def _steps(plan: Plan) -> str:
    schedule = plan.schedule
    return "one table for all steps" if schedule is None else f"{schedule.num_steps} in {len(schedule.ranges)} ranges"


def _removals(plan: Plan) -> str:
    layers = () if plan.pruning is None else tuple(plan.pruning.layers.values())
    heads, channels = sum(len(cut.removed_heads) for cut in layers), sum(len(cut.removed_channels) for cut in layers)
    return (
        f"{heads} query heads and {channels} FFN channels go, from {len(layers)} layers" if layers else "nothing goes"
    )


PARTS = {"decode": _decoding, "schedule": _steps, "pruning": _removals}
"""Fields of a plan beside its assignments that change what runs -> how each is summed up."""
