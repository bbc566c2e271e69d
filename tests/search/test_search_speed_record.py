"""The searches' bars, in processor seconds of the recorded run: `python -m sparsesearch.search.speed --json tests/golden/search_speed.json`."""

import json
from pathlib import Path

import pytest

from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import solve
from sparsesearch.search.speed import synthetic_table, timed, two_phases

CASES = json.loads((Path(__file__).parents[1] / "golden" / "search_speed.json").read_text())["cases"]


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("1024x50x4, three budgets", 10),
        ("1024x50x4, prefill and decode, three budgets", 10),
        ("5120x50x4, three budgets", 60),
        ("5120x50x4, prefill and decode, three budgets", 60),
    ],
)
def test_a_plan_is_found_in_time_and_proven(name: str, seconds: float) -> None:
    assert CASES[name]["cpu_s"] <= seconds
    assert CASES[name]["gap"] <= 1e-4


@pytest.mark.parametrize("name", ["1024x50x4, infeasible", "1024x50x4, infeasible, three budgets"])
def test_infeasible_is_known_within_a_second(name: str) -> None:
    assert CASES[name]["cpu_s"] < 1
    assert "smallest feasible value is" in CASES[name]["answer"] or "they fit at" in CASES[name]["answer"]


def test_the_search_is_as_tight_now() -> None:
    """A tenth of the units, both phases, three budgets: the gap that a larger table would make smaller still."""
    table = two_phases(synthetic_table(96), synthetic_table(96, seed=2))
    times, solution = timed(
        lambda: solve(table, [Budget("density", 0.25), Budget("kv_fraction", 0.22), Budget("latency", 0.24)])
    )
    assert solution.gap <= 1e-4
    assert times["cpu_s"] > 0
