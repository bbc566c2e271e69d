"""Attention of one layer whose heads follow rules over different token orders.

Heads of one order run in one launch: their queries, keys and values are copied into that order once, and the result is copied back. Heads in
the model's own order are read in place. `zero` and `mean_value` heads compute no tile. Other rest terms are added to what the launch returns,
before it is copied back: see `rest_terms`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.kernels.dispatch import Backend, Prefill
from sparsesearch.kernels.ordered_choice import (
    Chosen,
    ClusterMemory,
    OrderedHeads,
    choose,
    gather,
    head_indices,
    picked,
    static_levels,
    whole,
)
from sparsesearch.kernels.rest_terms import Residual, measure, with_residual, with_rest
from sparsesearch.kernels.row_copies import put_rows, take_rows
from sparsesearch.kernels.schedule import Span
from sparsesearch.order import Order
from sparsesearch.rules.base import Rule
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.zero import Zero

ChosenTiles = dict[tuple[int, Order], Chosen]
"""Choices of dynamic rules, by first batch row and order. Keep it between steps to reuse them; clear it to choose again."""

ResidualName = tuple[int, Order, Rule, tuple[int, ...]]
"""First batch row, order, rule, heads."""


@dataclass
class StepMemory:
    """What one layer keeps between the denoising steps of one pass.

    Attributes:
        step: the step of this call; None if unknown.
        chosen: tiles of dynamic rules to reuse, those missing are added; None: choose at every call.
        residuals: of `cached` heads, by first batch row, order, rule and heads.
        clusters: of queries and keys of heads in an order by content, by first batch row, order and head.
    """

    step: int | None = None
    chosen: ChosenTiles | None = None
    residuals: dict[ResidualName, Residual] = field(default_factory=dict)
    clusters: ClusterMemory = field(default_factory=dict)


def attend(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    grids: BlockGrid | Sequence[BlockGrid],
    rules: Sequence[Rule],
    *,
    scale: float,
    backend: Backend = "auto",
    memory: StepMemory | None = None,
) -> Float[Tensor, "B H S D"]:
    """Attention of every batch row, each head by its rule.

    Args:
        q: queries in the model's order; rows have contiguous elements.
        k: keys, likewise; H is a multiple of G.
        v: values, likewise.
        grids: of all batch rows, or one per row; a row's real tokens come first, and rows past its kv_len get 0.
        rules: one per query head.
        scale: factor on q·k.
        backend: see `kernels.dispatch`.
        memory: what to keep between steps; nothing by default.

    Raises:
        SpecError: the counts disagree, a rule needs a layout that a grid lacks, or a `cached` rest has no memory or step.
        UnsupportedKernelError: the backend cannot serve this call.
    """
    rows = [grids] * q.shape[0] if isinstance(grids, BlockGrid) else list(grids)
    if len(rows) != q.shape[0] or len(rules) != q.shape[1]:
        raise SpecError(
            f"there must be a grid per batch row and a rule per head, but got {len(rows)} and {len(rules)} for {tuple(q.shape)}."
        )
    if len(set(rows)) > 1:
        parts = [
            _attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], grid, rules, scale, backend, memory or StepMemory(), b)
            for b, grid in enumerate(rows)
        ]
        return torch.cat(parts)
    return _attend(q, k, v, rows[0], rules, scale, backend, memory or StepMemory(), 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: BlockGrid,
    rules: Sequence[Rule],
    scale: float,
    backend: Backend,
    memory: StepMemory,
    first_row: int,
) -> Tensor:
    """All batch rows with one grid."""
    spans = tuple(Span(grid, batch) for batch in range(q.shape[0]))
    by_order: dict[Order, list[int]] = {}
    for head, rule in enumerate(rules):
        if not rule.replaces_output:
            by_order.setdefault(rule.token_order, []).append(head)
    out: Tensor | None = None
    for order in sorted(by_order, key=lambda order: not order.is_identity):
        heads = by_order[order]
        own = [rules[head] for head in heads]
        if order.is_identity:
            # other heads compute no tile here, and get 0
            filled = [rule if rule.token_order == order and not rule.replaces_output else Zero() for rule in rules]
            out = _run(OrderedHeads(q, k, v, spans, filled, scale, backend), memory, (first_row, order))
            continue
        assert grid.layout is not None, "only rules with a layout have an order"
        group, device = q.shape[1] // k.shape[1], str(q.device)
        permutation, place = order.permutation(grid.layout, q.device), head_indices(tuple(heads), device)
        keys = head_indices(tuple(head // group for head in heads), device)
        own_q = take_rows(q, place, permutation)
        own_k, own_v = take_rows(k, keys, permutation), take_rows(v, keys, permutation)
        moved = OrderedHeads(own_q, own_k, own_v, spans, own, scale, backend)
        result = _run(moved, memory, (first_row, order))
        out = torch.zeros_like(q) if out is None else out
        put_rows(out, result, place, permutation)
    out = torch.zeros_like(q) if out is None else out
    for head, rule in enumerate(rules):
        if rule.rest == "mean_value":
            values = v[:, head // (q.shape[1] // k.shape[1]), : grid.kv_len]
            out[:, head, : grid.kv_len] = values.mean(-2, keepdim=True, dtype=torch.float32).to(out.dtype)
    return out


def _run(heads: OrderedHeads, memory: StepMemory, key: tuple[int, Order]) -> Float[Tensor, "B H S D"]:
    """Choose, launch, add rest terms; `key` names the batch rows and the order."""
    chosen = _choice(heads, memory, key) if any(rule.dynamic for rule in heads.rules) else None
    if chosen is None or chosen.q_places is None or chosen.k_places is None:
        return _computed(heads, chosen, memory, key)
    keys, values = (x.repeat_interleave(heads.group, 1) if heads.group > 1 else x for x in (heads.k, heads.v))
    moved = replace(
        heads,
        q=gather(heads.q, chosen.q_places),
        k=gather(keys, chosen.k_places),
        v=gather(values, chosen.k_places),
    )
    result = _computed(moved, chosen, memory, key)
    places = whole(chosen.q_places, result.shape[2])[..., None].expand_as(result)
    return torch.empty_like(result).scatter_(2, places, result)


def _choice(heads: OrderedHeads, memory: StepMemory, key: tuple[int, Order]) -> Chosen:
    """What dynamic rules choose now or chose before."""
    if memory.chosen is not None and key in memory.chosen:
        return memory.chosen[key]
    chosen = choose(heads, memory.clusters, key)
    if memory.chosen is not None:
        memory.chosen[key] = chosen
    return chosen


def _computed(
    heads: OrderedHeads, chosen: Chosen | None, memory: StepMemory, key: tuple[int, Order]
) -> Float[Tensor, "B H S D"]:
    # rectified weights need no log-sum-exp
    need_lse = any(rule.adds_rest and rule.rest != "rectified" for rule in heads.rules)
    choice = tuple(heads.rules) if chosen is None else chosen.tiles
    result = heads.prefill(heads.q, heads.k, heads.v, choice, need_lse=need_lse)
    for rule in dict.fromkeys(heads.rules):
        if rule.adds_rest:
            own = [head for head, other in enumerate(heads.rules) if other == rule]
            _add_rest(heads, rule, own, result, chosen, memory, key)
    return result.out


def _add_rest(
    heads: OrderedHeads,
    rule: Rule,
    own: list[int],
    result: Prefill,
    chosen: Chosen | None,
    memory: StepMemory,
    key: tuple[int, Order],
) -> None:
    """Replace the output of some heads that follow one rule."""
    grid, device = heads.grid, str(heads.q.device)
    places, groups = head_indices(tuple(own), device), [head // heads.group for head in own]
    q, k, v = picked(heads.q, own), picked(heads.k, groups), picked(heads.v, groups)
    real = slice(grid.kv_len)
    out = result.out[:, places]
    lse = out.new_zeros(out.shape[:3]) if result.lse is None else result.lse[:, places]
    if isinstance(rule, CachedRest):
        found = _cached(heads, rule, (out, lse), q, k, v, memory, (*key, rule, tuple(own)))
    else:
        levels = (
            static_levels(rule, grid, device)
            if chosen is None or not rule.dynamic
            else torch.stack([chosen.levels[head] for head in own], 1)
        )
        found = with_rest(
            rule, (out[:, :, real], lse[:, :, real]), q[:, :, real], k[:, :, real], v[:, :, real], levels, grid,
            scale=heads.scale, kernel=result.backend in ("gluon", "triton"),
        )  # fmt: skip
        if grid.kv_len < out.shape[2]:  # rows behind the sequence stay 0
            out[:, :, real] = found
            found = out
    result.out[:, places] = found


def _cached(
    heads: OrderedHeads,
    rule: CachedRest,
    computed: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: StepMemory,
    name: ResidualName,
) -> Tensor:
    """Dense at a refresh step, with the residual from then on."""
    step = memory.step
    if step is None:
        raise SpecError(
            f"{rule.label} must know the denoising step to keep its residual, but does not. Give `attend` a memory with a step; a pipeline "
            "tells it, or `applied.at_step(index, num_steps)`."
        )
    kept = memory.residuals.get(name)
    if kept is not None and 0 < step - kept.step < rule.every and kept.missing.shape == q.shape:
        return with_residual(rule, computed[0], kept, step)
    dense = heads.prefill(q, k, v, (Dense(),) * q.shape[1], need_lse=True)
    assert dense.lse is not None
    length = heads.grid.kv_len
    lse = computed[1].clone()
    lse[..., length:] = dense.lse[..., length:] = 0.0  # padding
    memory.residuals[name] = measure((computed[0], lse), (dense.out, dense.lse), step)
    return dense.out
