"""The plan linter: what makes a plan wrong, wasteful or ambiguous although it can be read. Each check is a defect seen in a public system.

    empty_row          a query block computes no tile (DraftAttention's quantile, Radial Attention's shrinking)
    reuse_order        a reused selection has other tokens in its blocks (indices live in the order's block space)
    reuse_source       a reused selection comes from a later layer, or from a rule that leaves none (RALS against HyLRA)
    kv_saving          a rule that drops cache needs it back later, or heads of its KV group keep more (S2-Attention's check; MoA on GQA)
    text_policy        text and a rule that knows nothing of it, or frames and no layout (Sparse-vDiT leaves text unstated)
    launch_groups      more token orders in a layer than wanted: each costs copies and a launch (Sparse-vDiT's fusion)
    length_law         a law a + b·N that is negative within the plan's lengths, where it is cut to nothing (UCM's thresholds)
    cached_bytes       what `cached` rests keep between steps exceeds a limit (Re-ttention: 44 GB on HunyuanVideo)
    softmax_scale      a scale that is not 1/√head_dim (SparseD on LLaDA): `scale_finding`, for those who see the call

Densities are named by what they are a share of, see `densities`: PowerAttention's 94 % and MoA's 50 % are of different areas.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.step_schedule import StepRange

Check = Literal[
    "empty_row",
    "reuse_order",
    "reuse_source",
    "kv_saving",
    "text_policy",
    "launch_groups",
    "length_law",
    "cached_bytes",
    "softmax_scale",
]
_INDIFFERENT = ("dense", "zero", "mean_value")
_MOST_BLOCKS = 64  # causal plans are looked at on this many blocks at most: rules repeat themselves
DEFAULT_MAX_GROUPS = 4
DEFAULT_MAX_CACHED_BYTES = 8e9


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        check: which check; see the module.
        where: module and head, rule, or step range.
        message: what must hold and what does not.
    """

    check: Check
    where: str
    message: str


def lint(
    plan: Plan, *, max_groups: int = DEFAULT_MAX_GROUPS, max_cached_bytes: float = DEFAULT_MAX_CACHED_BYTES
) -> tuple[Finding, ...]:
    """Every finding of a plan, over its base assignments and each range of its schedule.

    Args:
        plan: any plan.
        max_groups: token orders that one layer may use besides the model's own.
        max_cached_bytes: what residuals may take between steps, for one sequence and one pass, in 16-bit values.
    """
    findings: list[Finding] = []
    for name, part in _parts(plan):
        findings += _reuse(part, name)
        findings += _launch_groups(part, name, max_groups)
        findings += _kv_saving(part, name)
        findings += _cached_bytes(part, name, max_cached_bytes)
    for rule in {rule.label: rule for _, part in _parts(plan) for _, _, rule in part.heads()}.values():
        findings += _rule_findings(rule, plan)
    return tuple(dict.fromkeys(findings))


def densities(plan: Plan, length_tokens: int) -> dict[str, float]:
    """Computed tiles of the static heads, over all denoising steps, over two areas that are both called density elsewhere.

    Returns:
        `reachable`: over what dense attention computes, the only density of this project; `full_square`: over all tiles, future ones too.
    """
    grid = _grid(plan.layout, length_tokens, plan.block_tokens)
    heads: Counter[Rule] = Counter()
    for part, steps in _weighted_parts(plan):
        for _, _, rule in part.heads():
            heads[rule] += 0 if rule.dynamic else steps
    computed = sum(int(rule.select(grid).sum()) * times for rule, times in heads.items() if times)
    reachable, square = int(grid.reachable().sum()), grid.num_q_blocks * grid.num_k_blocks
    count = max(heads.total(), 1)
    return {"reachable": computed / (reachable * count), "full_square": computed / (square * count)}


def scale_finding(where: str, scale: float, head_dim: int) -> Finding | None:
    """What is wrong with a softmax scale, if anything; models that mean another one (T5's 1, Gemma's) are to be told apart by the caller."""
    usual = head_dim**-0.5
    if abs(scale - usual) <= 1e-6 * usual:
        return None
    return Finding("softmax_scale", where, f"the scale must be 1/sqrt({head_dim}) = {usual:.6g}, but is {scale:.6g}")


def _parts(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The base assignments and those of every range, as plans."""
    yield "", plan.model_copy(update={"schedule": None})
    if plan.schedule is not None:
        for place, item in enumerate(plan.schedule.ranges):
            table = plan.schedule.assignments(place)
            yield (
                f"steps {item.first}-{item.end - 1}: "
                if item.chunks is None
                else f"{_chunks(item)}, steps {item.first}-{item.end - 1}: ",
                plan.model_copy(update={"assignments": table, "schedule": None}),
            )


def _weighted_parts(plan: Plan) -> Iterator[tuple[Plan, int]]:
    """The plan in every range of steps and the steps it holds; the base assignments for steps that no range covers."""
    schedule = plan.schedule
    if schedule is None:
        yield plan, 1
        return
    covered = {step for item in schedule.ranges for step in range(item.first, item.end)}
    if left := schedule.num_steps - len(covered):
        yield plan.model_copy(update={"schedule": None}), left
    for place, item in enumerate(schedule.ranges):
        part = plan.model_copy(update={"assignments": schedule.assignments(place), "schedule": None})
        yield part, item.end - item.first


def _chunks(item: StepRange) -> str:
    first, end = item.chunk_span
    return f"chunks {first} and later" if end == float("inf") else f"chunks {first}-{end - 1:g}"


def _grid(layout: Layout | None, length_tokens: int, block_tokens: int) -> BlockGrid:
    if layout is not None:
        return BlockGrid(layout.num_tokens, layout.num_tokens, block_tokens, causal=layout.causal, layout=layout)
    return BlockGrid(length_tokens, length_tokens, block_tokens)


def _reuse(plan: Plan, name: str) -> Iterator[Finding]:
    modules = plan.base_model.modules
    for module, head, rule in plan.heads():
        source = rule.source_head(head)
        if source is None:
            continue
        layer, source_head = source
        where = f"{name}{module}:{head}"
        if layer >= modules.index(module):
            yield Finding("reuse_source", where, f"the source must be an earlier layer, but is layer {layer}")
            continue
        origin = plan.rule(modules[layer], source_head)
        if not origin.dynamic or origin.reuses:
            yield Finding("reuse_source", where, f"the source must leave a selection, but its rule is {origin.label}")
        if origin.token_order != rule.token_order:
            yield Finding(
                "reuse_order", where, f"the source's order must be {rule.token_order}, but is {origin.token_order}"
            )


def _launch_groups(plan: Plan, name: str, max_groups: int) -> Iterator[Finding]:
    for module in plan.base_model.modules:
        orders = {rule.token_order for rule in plan.module_rules(module) if not rule.replaces_output}
        moved = sorted(str(order) for order in orders if not order.is_identity)
        if len(moved) > max_groups:
            yield Finding(
                "launch_groups",
                f"{name}{module}",
                f"at most {max_groups} token orders are wanted besides the model's own, but there are {len(moved)}: {', '.join(moved)}",
            )


def cached_bytes(plan: Plan) -> int:
    """Bytes that the residuals of the plan's base assignments take between steps, for one sequence and one pass, in 16-bit values."""
    tokens = plan.lengths_tokens[-1] if plan.layout is None else plan.layout.num_tokens
    sizes = dict(zip(plan.base_model.modules, plan.base_model.head_dim, strict=True))
    return sum(
        rule.bytes_per_head(tokens, sizes[module]) for module, _, rule in plan.heads() if isinstance(rule, CachedRest)
    )


def _cached_bytes(plan: Plan, name: str, limit: float) -> Iterator[Finding]:
    found = cached_bytes(plan)
    if found > limit:
        yield Finding(
            "cached_bytes",
            f"{name}all layers",
            f"cached residuals may take {limit / 1e9:.3g} GB per sequence and pass, but take {found / 1e9:.3g}",
        )


def _kv_saving(plan: Plan, name: str) -> Iterator[Finding]:
    """Heads that share a KV head must keep equally little, or nothing is saved; and what is dropped must not come back."""
    if plan.layout is not None:
        return  # a diffusion transformer has no cache
    grid = _grid(None, max(plan.lengths_tokens), plan.block_tokens)
    sizes = zip(plan.base_model.modules, plan.base_model.num_heads, plan.base_model.num_kv_heads, strict=True)
    kept: dict[Rule, int] = {}
    groups: dict[str, list[set[int]]] = defaultdict(list)
    for module, num_heads, num_kv_heads in sizes:
        rules, size = plan.module_rules(module), num_heads // num_kv_heads
        for rule in rules:
            if rule not in kept:
                kept[rule] = rule.kept_tokens(grid)
        groups[module] = [{kept[rule] for rule in rules[first : first + size]} for first in range(0, num_heads, size)]
    for module, values in groups.items():
        for group, tokens in enumerate(values):
            if plan.unit == "kv_group" and len(tokens) > 1:
                yield Finding(
                    "kv_saving",
                    f"{name}{module}, KV head {group}",
                    f"heads that share a KV head must keep equally many tokens, but keep {', '.join(map(str, sorted(tokens)))}",
                )
    short = BlockGrid(
        min(grid.kv_len, _MOST_BLOCKS * grid.block_tokens),
        min(grid.kv_len, _MOST_BLOCKS * grid.block_tokens),
        grid.block_tokens,
    )
    for rule, own in kept.items():
        if own < grid.kv_len and rule.rest == "drop" and not rule.dynamic and _comes_back(rule, short):
            yield Finding(
                "kv_saving", rule.label, "a key block that a row leaves out must stay out, but later rows read it"
            )


def _comes_back(rule: Rule, grid: BlockGrid) -> bool:
    tiles = rule.select(grid)
    below = torch.ones_like(tiles[1:]).tril(0)
    return bool((tiles[1:] & ~tiles[:-1] & below).any())


def _rule_findings(rule: Rule, plan: Plan) -> Iterator[Finding]:
    layout = plan.layout
    if rule.needs_layout and layout is None:
        yield Finding("text_policy", rule.label, "a rule over frames needs the plan's layout, which is missing")
        return
    text = layout is not None and any(segment.kind == "text" for segment in layout.segments)
    if text and not rule.needs_layout and rule.kind not in _INDIFFERENT:
        yield Finding(
            "text_policy", rule.label, "the layout has text, whose rows and columns this rule treats like any other"
        )
    for field in type(rule).model_fields:
        law = getattr(rule, field)
        if isinstance(law, LengthLaw):
            negative = [n for n in plan.lengths_tokens if law.a + law.b * n < 0]
            if negative:
                yield Finding("length_law", rule.label, f"{field} must not be negative, but is at {negative[0]} tokens")
    if not rule.dynamic and not rule.replaces_output and rule.ready:
        for length in plan.lengths_tokens if layout is None else plan.lengths_tokens[:1]:
            length = length if layout is not None else min(length, _MOST_BLOCKS * plan.block_tokens)
            if not rule.select(_grid(layout, length, plan.block_tokens)).any(-1).all():
                yield Finding("empty_row", rule.label, "every query block must compute a tile, but one has none")
                break
