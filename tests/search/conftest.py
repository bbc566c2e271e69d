from collections.abc import Callable

import numpy as np
import pytest

from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.shapes import Unit


def small_table(seed: int) -> tuple[ScoreTable, list[Budget]]:
    """A random table with ties, invalid entries, negative losses and per-length costs, and one to four constraints on it."""
    rng = np.random.default_rng(seed)
    num_units, num_candidates, num_lengths = rng.integers(1, 6), rng.integers(2, 6), rng.integers(1, 3)
    shape = (num_units, num_candidates, num_lengths)
    dense = int(rng.integers(num_candidates))
    metrics = ["density", "latency"][: rng.integers(1, 3)]
    costs, whole = {}, rng.random() < 0.5
    for metric in metrics:
        cost = rng.integers(0, 6, shape).astype(float) if whole else rng.random(shape)
        cost[:, dense] = 6.0 if whole else 1.0
        costs[metric] = cost
    loss = rng.integers(-2, 8, shape[:2]).astype(float) if rng.random() < 0.5 else rng.lognormal(0, 2, shape[:2])
    loss[:, dense] = 0.0
    valid = rng.random(shape[:2]) < 0.85
    valid[:, dense] = True
    loss[~valid] = np.nan
    lengths = (512, 2048)[:num_lengths]
    budgets = [Budget(metric, float(np.round(rng.uniform(0.2, 1.0), 2))) for metric in metrics]  # type: ignore[arg-type]
    if num_lengths == 2 and rng.random() < 0.5:
        budgets.append(Budget("density", float(np.round(rng.uniform(0.2, 1.0), 2)), (2048,)))
    units = tuple(Unit(f"layers.{index // 2}", (index % 2,)) for index in range(num_units))
    candidates = tuple(f"c{index}" for index in range(num_candidates))
    return ScoreTable(units, candidates, lengths, loss, costs, dense, valid), budgets


@pytest.fixture
def make_small_table() -> Callable[[int], tuple[ScoreTable, list[Budget]]]:
    return small_table
