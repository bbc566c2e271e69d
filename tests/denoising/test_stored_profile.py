"""The search on the error tensors of the trained model, as an H200 measured them: no GPU, no model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import solve
from sparsesearch.shapes import Unit

FILE = Path(__file__).parent.parent / "golden" / "video" / "wan-tiny-t2v.safetensors"
STEPS = {1: (30,), 3: (6, 9, 15)}


def stored(ranges: int, *, sensitivity: bool = False) -> ScoreTable:
    """The table of one or three ranges of steps."""
    with safe_open(FILE, "pt") as file:
        error, tiles = (file.get_tensor(f"{name}_{ranges}").double() for name in ("error", "tiles"))
        names = tuple(json.loads(file.metadata()["candidates"]))
        weight = file.get_tensor("sensitivity_1").double()[..., None] if sensitivity else torch.ones(())
    steps = torch.tensor(STEPS[ranges], dtype=torch.double)[:, None, None, None]
    loss = (error * weight * steps / 30).flatten(0, 2).numpy()
    return ScoreTable(
        units=tuple(
            Unit(f"{place}:{layer}", (head,)) for place in range(ranges) for layer in range(8) for head in range(5)
        ),
        candidates=names,
        lengths=(4096,),
        loss=loss,
        costs={"density": (tiles * steps).flatten(0, 2).numpy()[..., None]},
        dense_index=0,
        valid=np.ones_like(loss, dtype=bool),
    )


@pytest.mark.parametrize("density", [0.25, 0.35, 0.5])
@pytest.mark.parametrize("ranges", [1, 3])
def test_the_search_is_within_budget_and_near_its_bound(ranges: int, density: float) -> None:
    found = solve(stored(ranges), (Budget("density", density),))
    assert found.used["density"][4096] <= density + 1e-9
    assert found.gap <= 1e-4


@pytest.mark.parametrize("density", [0.25, 0.35, 0.5])
def test_heads_differ_so_choosing_by_head_wins(density: float) -> None:
    """The best single rule of at most that density predicts at least half as much error again; a shuffled plan several times as much."""
    table = stored(1)
    plan = solve(table, (Budget("density", density),))
    share = table.costs["density"][..., 0].mean(0) / table.costs["density"][:, 0, 0].mean()
    uniform = min(float(table.loss[:, column].sum()) for column in np.flatnonzero(share <= density))
    assert plan.loss < uniform / 1.5
    rng = np.random.default_rng(0)
    shuffled = [table.loss_of(rng.permutation(plan.choice)) for _ in range(8)]
    assert min(shuffled) > 2 * plan.loss


@pytest.mark.parametrize("density", [0.25, 0.35, 0.5])
def test_ranges_of_steps_can_only_gain(density: float) -> None:
    """One plan for all steps is among the plans of three ranges, up to the bitmaps that each range calibrates for itself."""
    one, three = (solve(stored(ranges), (Budget("density", density),)).loss for ranges in (1, 3))
    assert three < 1.05 * one


def test_sensitivity_changes_the_plan() -> None:
    plain, weighted = (solve(stored(1, sensitivity=s), (Budget("density", 0.35),)).choice for s in (False, True))
    assert 4 < int((plain != weighted).sum()) <= 40
