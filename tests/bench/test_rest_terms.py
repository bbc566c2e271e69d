"""The bench of rest terms: its menu, and what its table says of equal work."""

import pytest

from sparsesearch.bench.rest_terms import _interpolated, candidates, table


def test_every_row_is_a_rule_of_its_own() -> None:
    rows = list(candidates())
    assert len({rule.label for _, _, rule in rows}) == len(rows)
    assert {rest for _, rest, _ in rows} >= {
        "drop",
        "means",
        "taylor",
        "rectified",
        "cached, 5 steps",
        "means of 2, 4, 8",
    }
    assert {base for base, _, _ in candidates((0.25,), ("pooled_mass",))} == {"pooled_mass tile(4,4,4)"}


def test_errors_are_compared_at_equal_work() -> None:
    points = [(0.1, 0.08), (0.2, 0.02), (0.4, 0.005)]
    assert _interpolated(points, 0.15) == pytest.approx(0.04)
    assert _interpolated(points, 0.5) is None
    rows = [
        {"base": "b", "rest": "drop", "work": 0.1, "error": 0.08},
        {"base": "b", "rest": "drop", "work": 0.2, "error": 0.02},
        {"base": "b", "rest": "taylor", "work": 0.15, "error": 0.01},
    ]
    assert table({"rows": rows}).splitlines()[-1].split()[-1] == "0.25"
