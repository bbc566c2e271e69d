"""The tile schedule: it computes exactly the chosen blocks, once each, and spreads them evenly."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import TILE_CASES as CASES
from prefill_cases import Case, make_call

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.errors import SpecError
from sparsesearch.kernels.deal import TILE_OVERHEAD, deal
from sparsesearch.kernels.schedule import (
    HeadTiles,
    Span,
    TileSchedule,
    TileShape,
    Workers,
    build_schedule,
    schedule_of_rules,
    spans_of_lengths,
)
from sparsesearch.kernels.tile_lists import ENTRY_SHIFT
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.sink_window import SinkWindow


def element_masks(schedule: TileSchedule, q_shape: tuple[int, int, int], num_keys: int) -> torch.Tensor:
    """[B, H, S, T] of how often each (query, key) pair is computed, by the definition of records and entries."""
    seen = torch.zeros(*q_shape, num_keys, dtype=torch.int32)
    rows, keys = schedule.shape.rows, schedule.shape.keys
    for batch, head, q_row, row_lo, row_hi, k_row, kv_len, q_pos, lo, hi, _, _ in schedule.tiles.tolist():
        for entry in schedule.entries[lo:hi].tolist():
            for row in range(row_lo, row_hi):
                first = (entry >> ENTRY_SHIFT) * keys
                limit = kv_len
                if entry & 1:
                    absent = entry >> (1 + (row >= rows // 2)) & 1
                    limit = 0 if absent else min(kv_len, q_pos + row + 1 if schedule.causal else kv_len)
                elif schedule.causal:
                    assert first + keys - 1 <= q_pos + row, "a full block must lie in the past of all its queries"
                last = min(first + keys, limit)
                if last > first:
                    seen[batch, head, q_row + row, k_row + first : k_row + last] += 1
    return seen


@pytest.mark.parametrize("shape", [TileShape(16, 16), TileShape(32, 16), TileShape(8, 8), TileShape(16, 4)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_computes_exactly_what_was_chosen(case: Case, shape: TileShape) -> None:
    call = make_call(case, head_dim=1, block=16, unit=32, dtype=torch.float32)
    schedule = build_schedule(
        call.spans, call.tiles, num_kv_heads=case.num_kv_heads, shape=shape, workers=Workers(5, 1e3), head_bytes=2
    )
    seen = element_masks(schedule, tuple(call.q.shape[:3]), call.k.shape[2])
    expected = torch.zeros_like(seen)
    for span, choice in zip(call.spans, call.tiles, strict=True):
        rows = slice(span.q_offset, span.q_offset + span.grid.q_len)
        keys = slice(span.k_offset, span.k_offset + span.grid.kv_len)
        expected[span.batch, :, rows, keys] = expand(choice.choices[list(choice.of_head)], span.grid).int()
    assert torch.equal(seen, expected)


@settings(max_examples=60, deadline=None)
@given(
    cost=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    sections=st.integers(1, 4),
    workers=st.integers(1, 17),
)
def test_deal_gives_every_tile_once_and_keeps_within_lpt(cost: list[int], sections: int, workers: int) -> None:
    costs = np.array(cost)
    section = np.arange(len(costs)) * sections // len(costs)
    order, bin_ptr, makespan = deal(costs, section, workers)
    assert sorted(order.tolist()) == list(range(len(costs)))
    assert bin_ptr[0] == 0
    assert bin_ptr[-1] == len(costs)
    loads = [float((costs[order[a:b]] + TILE_OVERHEAD).sum()) for a, b in itertools.pairwise(bin_ptr)]
    assert makespan == pytest.approx(max(loads) / np.mean(loads))
    # whoever is last started its last tile when nobody was less loaded than the average: Graham's bound
    assert max(loads) <= np.mean(loads) + max(cost) + TILE_OVERHEAD


def test_sections_run_in_order_but_for_the_lightest_tiles() -> None:
    cost = np.tile(np.arange(1, 65), 8)
    order, bin_ptr, makespan = deal(cost, np.arange(512) // 64, 16)
    assert makespan < 1.01
    for worker in range(16):
        heavy = [tile for tile in order[bin_ptr[worker] : bin_ptr[worker + 1]] if cost[tile] > 32]
        assert [tile // 64 for tile in heavy] == sorted(tile // 64 for tile in heavy)


def test_one_dense_head_among_narrow_ones_balances() -> None:
    rules = (Dense(), *(SinkWindow(sink=128, window=LengthLaw(a=512)),) * 31)
    spans = (Span(BlockGrid(8192, 8192, 128)),)
    schedule = schedule_of_rules(rules, spans, num_kv_heads=8, shape=TileShape(128, 128), workers=Workers())
    assert schedule.makespan < 1.02
    assert schedule.density == pytest.approx((64 * 65 / 2 + 31 * (64 * 5 - 10)) / (32 * 64 * 65 / 2), rel=0.02)


def test_a_tile_longer_than_an_even_share_is_cut() -> None:
    spans = spans_of_lengths([64], [64 * 50], block_tokens=64, causal=False)
    tiles = [HeadTiles(torch.ones(1, 1, 50, dtype=torch.bool), (0,))]
    schedule = build_schedule(spans, tiles, num_kv_heads=1, shape=TileShape(64, 64), workers=Workers(10))
    assert schedule.num_slots == 10
    assert len(schedule.tiles) == 10
    assert schedule.merges.tolist() == [[0, 0, 0, 0, 64, 0, 10]]
    assert sorted(schedule.tiles[:, 10].tolist()) == list(range(10))
    pieces = schedule.tiles[schedule.tiles[:, 10].argsort()]
    assert pieces[0, 8] == 0
    assert pieces[-1, 9] == 50
    assert torch.equal(pieces[1:, 8], pieces[:-1, 9])


def test_a_replaced_head_has_no_tile() -> None:
    spans = (Span(BlockGrid(100, 100, 32)),)
    schedule = schedule_of_rules(
        (Dense(), MeanValue()), spans, num_kv_heads=1, shape=TileShape(32, 32), workers=Workers(2)
    )
    assert set(schedule.tiles[:, 1].tolist()) == {0}
    assert schedule.covered_rows == 100


def test_schedules_of_rules_are_cached_and_dynamic_rules_refused() -> None:
    spans = (Span(BlockGrid(100, 100, 32)),)
    args = {"num_kv_heads": 1, "shape": TileShape(32, 32), "workers": Workers(2)}
    assert schedule_of_rules((Dense(),), spans, **args) is schedule_of_rules((Dense(),), spans, **args)
    with pytest.raises(SpecError, match="pass its tiles to build_schedule"):
        schedule_of_rules((PooledTopk(keep=LengthLaw(a=32)),), spans, **args)


def test_lists_are_shared_by_heads_and_never_grow_with_them() -> None:
    spans = (Span(BlockGrid(4096, 4096, 128)),)
    few, many = (
        schedule_of_rules((Dense(),) * heads, spans, num_kv_heads=1, shape=TileShape(128, 128), workers=Workers())
        for heads in (1, 64)
    )
    assert few.entries.numel() == many.entries.numel() == 32 * 33 // 2 + 1


@pytest.mark.parametrize("shape", [TileShape(48, 16), TileShape(64, 16), TileShape(16, 32), TileShape(16, 12)], ids=str)
def test_refuses_tiles_that_do_not_fit_the_blocks(shape: TileShape) -> None:
    spans = (Span(BlockGrid(64, 64, 16)),)
    with pytest.raises(SpecError, match="cannot run blocks of 16 tokens"):
        schedule_of_rules((Dense(),), spans, num_kv_heads=1, shape=shape, workers=Workers(2))
