"""Give tiles to workers so that all finish together, with tiles that share keys close in time."""

from typing import Any, TypeAlias

import numpy as np

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

MOST_RUNS = 8192  # a run of equal tiles takes about 20 us to deal
TILE_OVERHEAD = 0.6
"""Fixed cost of a tile in blocks, as fitted on an H100 to 6-block tiles against 256-block tiles. Counters on an H200 say 1.0 (head_dim 128) and 1.25 (64);
replayed with those, this deal is within 2.6 % of an even share for the benchmark's causal plans at 8k (full 3.1 %), one by 1.0 at most 1 % better."""


def deal(cost: Ints, section: Ints, workers: int) -> tuple[Ints, Ints, float]:
    """Give tiles to workers: longest first within a section, the lightest tiles of all sections at the very end.

    Args:
        cost: blocks per tile.
        section: section per tile; lower ones run earlier.
        workers: number of workers.

    Returns:
        Order of the tiles, grouped by worker; where each worker's tiles start in it; the greatest load over an even share.
    """
    if len(cost) == 0:
        return np.zeros(0, np.int64), np.zeros(workers + 1, np.int64), 1.0
    if section.max() > 0:
        last = int(section.max())
        light = _order(
            cost * (last + 1) + (last - section)
        )  # lightest first; among equals those whose keys were read last
        share = min(0.5, float(cost.max()) * workers / max(float(cost.sum()), 1.0))
        held = light[np.cumsum(cost[light]) <= share * cost.sum()]
        section = section.copy()
        section[held] = section.max() + 1
    top = int(cost.max()) + 1
    keys = section * top + (top - 1 - cost)
    order = _order(keys)
    starts = _runs(keys[order])
    if len(starts) > MOST_RUNS:  # near-equal tiles count as equal, except in the section that evens out the loads
        level = np.where(section < section.max(), np.round(np.log(cost) / np.log(1.12)).astype(np.int64), cost)
        starts = _runs((section * top + level)[order])
    load = np.zeros(workers)
    owner = np.empty(len(order), np.int64)
    ordered = cost[order] + TILE_OVERHEAD
    for lo, hi in zip(starts, [*starts[1:], len(order)], strict=True):
        owner[lo:hi] = _deal_equal(load, ordered[lo:hi])
    bin_ptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=workers))])
    return order[_order(owner)], bin_ptr, float(load.max() / load.mean())


def _order(keys: Ints) -> Ints:
    """Stable order of keys >= 0: numpy sorts numbers of 16 bits by counting, ten times as fast as wider ones, so digit by digit."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, int(keys.max()).bit_length(), 16):
        order = order[np.argsort((keys >> shift & 0xFFFF).astype(np.uint16)[order], kind="stable")]
    return order


def _runs(keys: Ints) -> Ints:
    """Where each run of equal keys starts."""
    return np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))


def _deal_equal(load: Any, costs: Any) -> Ints:
    """Give near-equal tiles one by one to the least loaded worker; updates `load`, returns the owner of each."""
    workers, count = len(load), len(costs)
    if count <= workers:
        owner: Ints = load.argsort(kind="stable")[:count]
        if count == 1 or load[owner[-1]] <= load[owner[0]] + costs[-1]:  # nobody gets a second one
            load[owner] += costs
            return owner
    cost = float(costs.mean())
    level = (load.sum() + count * cost) / workers  # nobody starts one later than here, unless it is that busy already
    slots = np.maximum(np.ceil((max(level, float(load.min())) - load) / cost), 0).astype(np.int64) + 1
    owner = np.arange(workers).repeat(slots)
    step = np.arange(len(owner)) - (slots.cumsum() - slots).repeat(slots)
    begin = load[owner] + step * cost
    first = begin.argsort(kind="stable")[:count]
    owner = owner[first]
    load += np.bincount(owner, weights=costs, minlength=workers)
    return owner
