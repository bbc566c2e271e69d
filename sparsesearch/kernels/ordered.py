"""Attention of one layer whose heads follow rules over different token orders.

Heads of one order run in one launch: their queries, keys and values are copied into that order once, and the result is copied back. Heads in
the model's own order are read in place. `zero` and `mean_value` heads compute no tile.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.kernels.dispatch import Backend, prefill
from sparsesearch.kernels.row_copies import put_rows, take_rows
from sparsesearch.kernels.schedule import HeadTiles, Span
from sparsesearch.order import Order
from sparsesearch.rules.base import Rule
from sparsesearch.rules.zero import Zero

ChosenTiles = dict[tuple[int, Order], list[HeadTiles]]
"""Tiles that dynamic rules chose, by first batch row and order. Keep it between steps to reuse them; clear it to choose again."""


def attend(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    grids: BlockGrid | Sequence[BlockGrid],
    rules: Sequence[Rule],
    *,
    scale: float,
    backend: Backend = "auto",
    chosen: ChosenTiles | None = None,
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
        chosen: tiles of dynamic rules to reuse; those missing are added.

    Raises:
        SpecError: the counts disagree, or a rule needs a layout that a grid lacks.
        UnsupportedKernelError: the backend cannot serve this call.
    """
    rows = [grids] * q.shape[0] if isinstance(grids, BlockGrid) else list(grids)
    if len(rows) != q.shape[0] or len(rules) != q.shape[1]:
        raise SpecError(
            f"there must be a grid per batch row and a rule per head, but got {len(rows)} and {len(rules)} for {tuple(q.shape)}."
        )
    if len(set(rows)) > 1:
        parts = [
            _attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], grid, rules, scale, backend, chosen, b)
            for b, grid in enumerate(rows)
        ]
        return torch.cat(parts)
    return _attend(q, k, v, rows[0], rules, scale, backend, chosen, 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: BlockGrid,
    rules: Sequence[Rule],
    scale: float,
    backend: Backend,
    chosen: ChosenTiles | None,
    first_row: int,
) -> Tensor:
    """All batch rows with one grid."""
    spans = tuple(Span(grid, batch) for batch in range(q.shape[0]))
    by_order: dict[Order, list[int]] = {}
    for head, rule in enumerate(rules):
        if rule.rest not in ("zero", "mean_value"):
            by_order.setdefault(rule.token_order, []).append(head)
    out: Tensor | None = None
    for order in sorted(by_order, key=lambda order: not order.is_identity):
        heads = by_order[order]
        own = [rules[head] for head in heads]
        if order.is_identity:
            # other heads compute no tile here, and get 0
            filled = [rule if rule.token_order == order and rule.rest == "drop" else Zero() for rule in rules]
            choice = _choice(q, k, spans, filled, scale, chosen, (first_row, order))
            out = prefill(q, k, v, spans, choice, scale=scale, backend=backend).out
            continue
        assert grid.layout is not None, "only rules with a layout have an order"
        group, device = q.shape[1] // k.shape[1], str(q.device)
        permutation, place = order.permutation(grid.layout, q.device), _indices(tuple(heads), device)
        keys = _indices(tuple(head // group for head in heads), device)
        own_q = take_rows(q, place, permutation)
        own_k, own_v = take_rows(k, keys, permutation), take_rows(v, keys, permutation)
        choice = _choice(own_q, own_k, spans, own, scale, chosen, (first_row, order))
        result = prefill(own_q, own_k, own_v, spans, choice, scale=scale, backend=backend).out
        out = torch.zeros_like(q) if out is None else out
        put_rows(out, result, place, permutation)
    out = torch.zeros_like(q) if out is None else out
    for head, rule in enumerate(rules):
        if rule.rest == "mean_value":
            values = v[:, head // (q.shape[1] // k.shape[1]), : grid.kv_len]
            out[:, head, : grid.kv_len] = values.mean(-2, keepdim=True, dtype=torch.float32).to(out.dtype)
    return out


@lru_cache(maxsize=1024)
def _indices(heads: tuple[int, ...], device: str) -> Tensor:
    """Cached: a copy to the device would not fit into a captured graph."""
    return torch.tensor(heads, device=device)


def _choice(
    q: Tensor,
    k: Tensor,
    spans: tuple[Span, ...],
    rules: list[Rule],
    scale: float,
    chosen: ChosenTiles | None,
    key: tuple[int, Order],
) -> tuple[Rule, ...] | list[HeadTiles]:
    """The rules themselves if all are static; else the tiles of every head, chosen now or before."""
    if not any(rule.dynamic for rule in rules):
        return tuple(rules)
    if chosen is not None and key in chosen:
        return chosen[key]
    group = q.shape[1] // k.shape[1]
    tiles = []
    for span in spans:
        grid, batch = span.grid, span.batch
        picked = [
            rule.select(
                grid,
                (q[batch, head, : grid.q_len] * scale)[None],
                k[batch, head // group, : grid.kv_len][None],
            ).expand(1, -1, -1)
            if rule.dynamic
            else rule.select(grid)[None].to(q.device)
            for head, rule in enumerate(rules)
        ]
        tiles.append(HeadTiles(torch.cat(picked), tuple(range(len(rules)))))
    if chosen is not None:
        chosen[key] = tiles
    return tiles
