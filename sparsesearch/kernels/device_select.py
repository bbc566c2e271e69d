"""What a dynamic rule chooses, worked out where the queries and keys are: nothing is copied per query head, and the host never waits.

`vertical_slash` and `pooled_topk` have kernels here; every other dynamic rule runs its own `select` on the device, one KV head at a time, so
that keys are repeated for one group only.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.kernels.dispatch import Backend, prefill
from sparsesearch.kernels.schedule import Span
from sparsesearch.kernels.triton_index import pooled_means, probe_votes
from sparsesearch.kernels.triton_select import keep_best
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.vertical_slash import VerticalSlash

watchers: list[Callable[[BlockGrid, Bool[Tensor, "h M N"]], None]] = []
"""Called with every choice that is made here and not by a rule's own `select`; for counting, empty otherwise."""


def chosen_tiles(
    rules: Sequence[Rule],
    grid: BlockGrid,
    q: Float[Tensor, "H S D"],
    k: Float[Tensor, "G T D"],
    *,
    scale: float,
    kernel: Backend,
    given: Mapping[int, Bool[Tensor, "M N"]] | None = None,
) -> Bool[Tensor, "H M N"]:
    """The tiles of every query head of one sequence.

    Args:
        rules: one per query head, static or dynamic; a dynamic one is dense for a single query, as in decoding.
        grid: the sequence's blocks.
        q: queries of the sequence, contiguous columns; without the scale.
        k: keys of the sequence, likewise.
        scale: softmax scale.
        kernel: which prefill kernel gives the log-sum-exp of the queries that vote.
        given: tiles of heads whose choice is made already.
    """
    given = given or {}
    tiles = torch.empty(len(rules), grid.num_q_blocks, grid.num_k_blocks, dtype=torch.bool, device=q.device)
    group = len(rules) // k.shape[0]
    for head, chosen in given.items():
        tiles[head] = chosen
    for rule in dict.fromkeys(rules):
        heads = [head for head, own in enumerate(rules) if own == rule and head not in given]
        if not rule.dynamic or grid.q_len == 1:
            static = _static(rule if not rule.dynamic else Dense(), grid, str(q.device))
            for head in heads:
                tiles[head] = static
            continue
        for members, kv_heads in runs(heads, group):
            own_q = (
                q[members[0] : members[-1] + 1] if _adjacent(members) else torch.stack([q[head] for head in members])
            )
            chosen = _dynamic(rule, grid, own_q, k[kv_heads], scale, kernel)
            if _adjacent(members):
                tiles[members[0] : members[-1] + 1] = chosen
            else:
                for place, head in enumerate(members):
                    tiles[head] = chosen[place]
    return tiles


def runs(heads: Sequence[int], group: int) -> list[tuple[list[int], slice]]:
    """Cut ascending query heads into parts that share consecutive KV heads evenly: whole groups side by side, or some heads of one group."""
    parts: list[tuple[list[int], slice]] = []
    by_group: dict[int, list[int]] = {}
    for head in heads:
        by_group.setdefault(head // group, []).append(head)
    for kv_head, members in by_group.items():
        if parts and len(members) == group and parts[-1][1].stop == kv_head and len(parts[-1][0]) % group == 0:
            before, kv_heads = parts.pop()
            parts.append((before + members, slice(kv_heads.start, kv_head + 1)))
        else:
            parts.append((members, slice(kv_head, kv_head + 1)))
    return parts


def _adjacent(heads: Sequence[int]) -> bool:
    return heads[-1] - heads[0] + 1 == len(heads)


@lru_cache(maxsize=256)
def _static(rule: Rule, grid: BlockGrid, device: str) -> Bool[Tensor, "M N"]:
    with torch.inference_mode(False):  # kept for later calls, which may be outside it
        return rule.select(grid).to(device)


def _dynamic(
    rule: Rule, grid: BlockGrid, q: Float[Tensor, "h S D"], k: Float[Tensor, "g T D"], scale: float, kernel: Backend
) -> Bool[Tensor, "h M N"]:
    match rule:
        case VerticalSlash():
            return _seen(grid, _vertical_slash(rule, grid, q, k, scale, kernel))
        case PooledTopk():
            return _seen(grid, _pooled_topk(rule, grid, q, k))
        case _:
            size = q.shape[0] // k.shape[0]
            parts = [
                rule.select(grid, q[first * size : (first + 1) * size] * scale, k[first].expand(size, -1, -1))
                for first in range(k.shape[0])
            ]
            return torch.cat(parts)


def _seen(grid: BlockGrid, tiles: Bool[Tensor, "h M N"]) -> Bool[Tensor, "h M N"]:
    for watch in watchers:
        watch(grid, tiles)
    return tiles


def _vertical_slash(
    rule: VerticalSlash, grid: BlockGrid, q: Tensor, k: Tensor, scale: float, kernel: Backend
) -> Bool[Tensor, "h M N"]:
    probe = min(rule.probe, grid.q_len)
    last = q[:, -probe:]
    span = Span(BlockGrid(probe, grid.kv_len, grid.block_tokens, grid.law_len))
    dense = (Dense(),) * len(q)
    lse = prefill(last[None], k[None], k[None], (span,), dense, scale=scale, backend=kernel).lse
    assert lse is not None, "both kernels give it"
    return rule.chosen(grid, *probe_votes(last * scale, k, lse[0], grid, probe=probe))


def _pooled_topk(rule: PooledTopk, grid: BlockGrid, q: Tensor, k: Tensor) -> Bool[Tensor, "h M N"]:
    # the softmax scale would not change the order
    queries, keys = pooled_means(q, grid, start=grid.q_start), pooled_means(k, grid, start=0)
    grouped = queries.view(len(k), -1, queries.shape[-1])  # [g, h/g·M, D]
    scores = (grouped @ keys.transpose(-1, -2)).view(len(q), grid.num_q_blocks, grid.num_k_blocks)
    budget = _budget(rule, grid, str(q.device))
    return keep_best(scores, budget, grid, sink_blocks=blocks_of(rule.sink, grid.block_tokens))


@lru_cache(maxsize=256)
def _budget(rule: PooledTopk, grid: BlockGrid, device: str) -> Int[Tensor, " M"]:
    with torch.inference_mode(False):
        return rule.keep.row_blocks(grid, torch.device(device)).int().flatten()
