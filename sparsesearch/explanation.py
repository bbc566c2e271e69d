"""What a plan does, as a whole or for one head, and what that head could have done."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sparsesearch.comparison import PARTS, TileShares, spans_of
from sparsesearch.decoding import DecodeShare, decode_shares
from sparsesearch.errors import SpecError, nearest
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule
from sparsesearch.scores import ScoreTable
from sparsesearch.shapes import Decoding


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
        steps: (range of denoising steps, rule, share of dense's tiles or None), of plans with a schedule; the rest speaks of the first range.
        alternatives: the profile's candidates for this head, least loss first; empty without scores.
        decode_alternatives: likewise for decoding, where that was searched by itself.
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
    steps: tuple[tuple[str, str, float | None], ...] = ()
    alternatives: tuple["Alternative", ...] = ()
    decode_alternatives: tuple["Alternative", ...] = ()


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
        kinds: (kind, heads), most frequent first; with a schedule, heads count once in each range of steps, here and in `layers`.
        densities: length in tokens -> share of dense's tiles over all heads; None where the data decide.
        layers: (module, share of dense's tiles at the longest length or None, kinds of its heads).
        dense_heads: addresses `module:head` of the heads left dense: those that the search found it could not cut.
        parts: what the plan holds besides `kinds`, as (field, summary): rules of decoding, steps, removals.
        steps: (range of denoising steps, share of dense's tiles or None, kinds of its heads); empty without a schedule.
        decoding: the rules of decoding at the longest length; empty where they are those of the prompt and none chooses token by token.
    """

    num_heads: int
    kinds: tuple[tuple[str, int], ...]
    densities: dict[int, float | None]
    layers: tuple[tuple[str, float | None, tuple[tuple[str, int], ...]], ...]
    dense_heads: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    steps: tuple[tuple[str, float | None, tuple[tuple[str, int], ...]], ...] = ()
    decoding: tuple[DecodeShare, ...] = ()


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
    spans = spans_of(plan)
    shares = {length: TileShares(plan, length) for length in plan.lengths_tokens}
    longest = shares[max(plan.lengths_tokens)]
    rules = {span.label: [rule for _, _, rule in span.plan.heads()] for span in spans}

    def density(share: TileShares, module: str | None = None) -> float | None:
        """Over all steps, of a layer or of all."""
        parts = [share.mean(rules[s.label] if module is None else s.plan.module_rules(module)) for s in spans]
        known = [part * span.num_steps for part, span in zip(parts, spans, strict=True) if part is not None]
        return sum(known) / sum(span.num_steps for span in spans) if len(known) == len(parts) else None

    def counted(module: str) -> tuple[tuple[str, int], ...]:
        return _counted([rule for span in spans for rule in span.plan.module_rules(module)])

    always_dense = set.intersection(
        *({(module, head) for module, head, rule in span.plan.heads() if rule.kind == "dense"} for span in spans)
    )
    return PlanExplanation(
        plan.base_model.geometry.total_heads,
        _counted([rule for own in rules.values() for rule in own]),
        {length: density(share) for length, share in shares.items()},
        tuple((module, density(longest, module), counted(module)) for module in plan.base_model.modules),
        tuple(f"{module}:{head}" for module, head, _ in plan.heads() if (module, head) in always_dense),
        tuple((name, summary(plan)) for name, summary in PARTS.items() if getattr(plan, name)),
        ()
        if plan.schedule is None
        else tuple((span.label, longest.mean(rules[span.label]), _counted(rules[span.label])) for span in spans),
        decode_shares(plan, max(plan.lengths_tokens)),
    )


def _explain_head(plan: Plan, module: str, head: int, scores: ScoreTable | None) -> HeadExplanation:
    spans, share = spans_of(plan), TileShares(plan, max(plan.lengths_tokens))
    rules = spans[0].plan.module_rules(module)
    rule = rules[head]
    index = plan.base_model.modules.index(module)
    group = plan.base_model.num_heads[index] // plan.base_model.num_kv_heads[index]
    mates = [other for other in range(head // group * group, (head // group + 1) * group) if other != head]
    by_step = [(span.label, span.plan.module_rules(module)[head]) for span in spans]
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
        spans[0].plan.decode_rule(module, head).label,
        head in plan.removed_heads(module),
        () if plan.schedule is None else tuple((label, own.label, share.of(own)) for label, own in by_step),
        *(() if scores is None else _all_alternatives(scores, plan, module, head, rule)),
    )


def _all_alternatives(
    scores: ScoreTable, plan: Plan, module: str, head: int, rule: Rule
) -> tuple[tuple[Alternative, ...], ...]:
    """Of the prefill and, where the table has rows of its own for that, of decoding."""
    prefill: list[int] = []
    decode: list[int] = []
    for index, address in enumerate(scores.units):
        unit = address.unit if isinstance(address, Decoding) else address
        if unit.module == module and head in unit.heads:
            (decode if isinstance(address, Decoding) else prefill).append(index)
    if not prefill:
        raise SpecError(f"the profile must cover {module}:{head}, but does not; give the profile the plan came from.")
    found = [_alternatives(scores, prefill[0], rule)]
    return (*found, *(_alternatives(scores, row, plan.decode_rule(module, head)) for row in decode))


def _alternatives(scores: ScoreTable, unit: int, rule: Rule) -> tuple[Alternative, ...]:
    found = [
        Alternative(
            label,
            float(scores.loss[unit, index]),
            {
                metric: float((cost[unit, index] / cost[unit, scores.dense_index]).max())
                for metric, cost in scores.costs.items()
                if (cost[unit, scores.dense_index] > 0).all()
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


def _counted(rules: Sequence[Rule]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(rule.kind for rule in rules).items(), key=lambda entry: (-entry[1], entry[0])))


def _shown(value: object) -> str:
    """A parameter as text; a bitmap by its length only."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
