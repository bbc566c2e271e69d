"""Reading plans: what changed between two of them, and why a head follows its rule."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.errors import PlanMismatchError, SpecError, nearest
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule
from sparsesearch.scores import ScoreTable


@dataclass(frozen=True)
class HeadChange:
    """One query head whose rule differs."""

    module: str
    head: int
    before: str
    after: str
    density_before: float | None
    density_after: float | None


@dataclass(frozen=True)
class PlanDiff:
    """Plan b against plan a.

    Attributes:
        length_tokens: the length at which densities are stated.
        num_heads: query heads of the model.
        changes: heads whose rule differs, in model order.
        moves: (kind before, kind after) -> heads, most frequent first.
        density: static tiles of a and of b over those of dense; None where a dynamic rule decides at run time.
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
        return not self.changes and not {name for name, _, _ in self.other_fields} & {"block_tokens", *_PARTS}


@dataclass(frozen=True)
class HeadExplanation:
    """What one head does under a plan, and what it could have done.

    Attributes:
        module: dotted path.
        head: query head.
        rule: its label.
        meaning: first paragraph of the rule's docstring.
        source: the paper.
        parameters: (name, value, meaning) of each parameter.
        densities: length in tokens -> share of dense's tiles; None where the data decide.
        shares_kv_with: (head, rule) of the other query heads that read the same KV head.
        decode_rule: label of the rule for generated tokens.
        removed: whether the plan takes the head out of the model, so that no rule applies.
        alternatives: the profile's candidates for this head, least loss first; empty without scores.
    """

    module: str
    head: int
    rule: str
    meaning: str
    source: str
    parameters: tuple[tuple[str, str, str], ...]
    densities: dict[int, float | None]
    shares_kv_with: tuple[tuple[int, str], ...]
    decode_rule: str
    removed: bool
    alternatives: tuple["Alternative", ...] = ()


@dataclass(frozen=True)
class Alternative:
    """A candidate the search could choose for a unit: its predicted loss and its cost as a share of the unit's dense cost."""

    rule: str
    loss: float
    cost: dict[str, float]
    chosen: bool


@dataclass(frozen=True)
class PlanExplanation:
    """A plan at a glance.

    Attributes:
        num_heads: query heads.
        kinds: (kind, heads), most frequent first.
        densities: length in tokens -> share of dense's tiles over all heads; None where the data decide.
        layers: (module, share of dense's tiles at the longest length or None, kinds of its heads).
        dense_heads: addresses `module:head` of the heads left dense: those that the search found it could not cut.
        parts: what the plan holds besides `kinds`, as (field, summary): rules of decoding, steps, removals.
    """

    num_heads: int
    kinds: tuple[tuple[str, int], ...]
    densities: dict[int, float | None]
    layers: tuple[tuple[str, float | None, tuple[tuple[str, int], ...]], ...]
    dense_heads: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]


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
    pairs = list(zip(plan_a.heads(), plan_b.heads(), strict=True))
    changes = tuple(
        HeadChange(module, head, before.label, after.label, cost_a.of(before), cost_b.of(after))
        for (module, head, before), (_, _, after) in pairs
        if before != after
    )
    moves = Counter((before.kind, after.kind) for (_, _, before), (_, _, after) in pairs if before != after)
    return PlanDiff(
        length,
        len(pairs),
        changes,
        tuple((before, after, count) for (before, after), count in sorted(moves.items(), key=lambda m: (-m[1], m[0]))),
        (
            cost_a.mean([before for (_, _, before), _ in pairs]),
            cost_b.mean([after for _, (_, _, after) in pairs]),
        ),
        _other_fields(plan_a, plan_b),
    )


def explain(
    plan: Plan, where: str | None = None, *, scores: ScoreTable | None = None
) -> PlanExplanation | HeadExplanation:
    """Say what a plan does, as a whole or for one head.

    Args:
        plan: the plan.
        where: `module:head`, where module is a dotted path, its end, or the number of the layer; None for the whole plan.
        scores: the table the search saw, for the alternatives of that head.

    Raises:
        SpecError: no such module or head.
    """
    return _explain_plan(plan) if where is None else _explain_head(plan, *_address(plan, where), scores)


def _explain_plan(plan: Plan) -> PlanExplanation:
    rules = [rule for _, _, rule in plan.heads()]
    shares = {length: TileShares(plan, length) for length in plan.lengths_tokens}
    longest = TileShares(plan, max(plan.lengths_tokens))
    return PlanExplanation(
        len(rules),
        _counted(rules),
        {length: share.mean(rules) for length, share in shares.items()},
        tuple(
            (module, longest.mean(plan.module_rules(module)), _counted(plan.module_rules(module)))
            for module in plan.base_model.modules
        ),
        tuple(f"{module}:{head}" for module, head, rule in plan.heads() if rule.kind == "dense"),
        tuple((name, summary(plan)) for name, summary in _PARTS.items() if getattr(plan, name)),
    )


def _explain_head(plan: Plan, module: str, head: int, scores: ScoreTable | None) -> HeadExplanation:
    rules = plan.module_rules(module)
    rule = rules[head]
    index = plan.base_model.modules.index(module)
    group = plan.base_model.num_heads[index] // plan.base_model.num_kv_heads[index]
    mates = [other for other in range(head // group * group, (head // group + 1) * group) if other != head]
    return HeadExplanation(
        module,
        head,
        rule.label,
        (type(rule).__doc__ or "").strip().split("\n\n")[0],
        rule.source,
        tuple(
            (name, _shown(getattr(rule, name)), field.description or "")
            for name, field in type(rule).model_fields.items()
            if name != "kind"
        ),
        {length: TileShares(plan, length).of(rule) for length in plan.lengths_tokens},
        tuple((other, rules[other].label) for other in mates),
        plan.decode_rule(module, head).label,
        plan.pruning is not None and index in plan.pruning.layers and head in plan.pruning.layers[index].removed_heads,
        () if scores is None else _alternatives(scores, module, head, rule),
    )


def _alternatives(scores: ScoreTable, module: str, head: int, rule: Rule) -> tuple[Alternative, ...]:
    units = [index for index, unit in enumerate(scores.units) if unit.module == module and head in unit.heads]
    if not units:
        raise SpecError(f"the profile must cover {module}:{head}, but does not; give the profile the plan came from.")
    unit = units[0]
    found = [
        Alternative(
            label,
            float(scores.loss[unit, index]),
            {
                metric: float((cost[unit, index] / cost[unit, scores.dense_index]).max())
                for metric, cost in scores.costs.items()
            },
            chosen=label == rule.label or rule.label.startswith(label.removesuffix(")") + ","),
        )
        for index, label in enumerate(scores.candidates)
        if scores.valid[unit, index]
    ]
    return tuple(sorted(found, key=lambda alternative: (alternative.loss, alternative.rule)))


def _address(plan: Plan, where: str) -> tuple[str, int]:
    """Find `module:head`; a module may be given by the end of its path or by its number."""
    place, colon, head = where.rpartition(":")
    modules = plan.base_model.modules
    matches = [name for name in modules if name == place] or [name for name in modules if name.endswith(f".{place}")]
    if place.isdecimal() and int(place) < len(modules):
        matches = [modules[int(place)]]
    if not colon or len(matches) != 1:
        known = ", ".join(matches) if len(matches) > 1 else nearest(place or where, modules).strip()
        raise SpecError(f"{where!r} must be module:head and name one module. {known}")
    count = plan.base_model.num_heads[modules.index(matches[0])]
    if not head.isdecimal() or int(head) >= count:
        raise SpecError(f"{where!r} must name a query head of {matches[0]}: 0 to {count - 1}.")
    return matches[0], int(head)


class TileShares:
    """Share of dense's tiles of each rule at one length, computed once per rule; None where the data decide."""

    def __init__(self, plan: Plan, length_tokens: int) -> None:
        self._grid = BlockGrid(length_tokens, length_tokens, plan.block_tokens)
        self._known: dict[Rule, float | None] = {}

    def of(self, rule: Rule) -> float | None:
        """One head's share."""
        if rule not in self._known:
            if rule.dynamic:
                self._known[rule] = 1.0 if rule.keeps_all(self._grid) else None
            else:
                self._known[rule] = density(rule.select(self._grid), self._grid)
        return self._known[rule]

    def mean(self, rules: Sequence[Rule]) -> float | None:
        """The share of several heads together."""
        shares = [self.of(rule) for rule in rules]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if len(known) == len(shares) else None


def _other_fields(plan_a: Plan, plan_b: Plan) -> tuple[tuple[str, str, str], ...]:
    names = ("block_tokens", "unit", "lengths_tokens", "budgets")
    pairs = [(name, str(getattr(plan_a, name)), str(getattr(plan_b, name))) for name in names]
    found = [pair for pair in pairs if pair[1] != pair[2]]
    for name, summary in _PARTS.items():
        if getattr(plan_a, name) != getattr(plan_b, name):
            before, after = summary(plan_a), summary(plan_b)
            found.append((name, before, after if after != before else f"{after}, but others"))
    return tuple(found)


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


_PARTS = {"decode": _decoding, "schedule": _steps, "pruning": _removals}
"""Fields of a plan beside its assignments that change what runs -> how each is summed up."""


def _counted(rules: Sequence[Rule]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(rule.kind for rule in rules).items(), key=lambda entry: (-entry[1], entry[0])))


def _shown(value: object) -> str:
    """A parameter as text; a bitmap by its length only."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
