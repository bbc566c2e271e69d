"""The bench of rest terms: its menu, and what its table says of equal work."""

import json
from pathlib import Path

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


RECORD = json.loads((Path(__file__).parents[1] / "golden" / "video" / "rest-terms-cpu.json").read_text())


def test_the_record_says_where_it_comes_from_and_what_rests_are_worth() -> None:
    """One layer of the trained model at one noise level: a Taylor rest over calibrated boxes more than halves the error of its tiles."""
    assert RECORD["provenance"]["command"].startswith("python -m sparsesearch.bench.rest_terms --layers 3 --steps 12")
    found = {(row["base"], row["rest"], row["rule"].split("keep=")[-1][:4]): row for row in RECORD["rows"]}
    for keep in ("0.12", "0.25", "0.35"):
        drop, taylor = (found["calibrated_tiles tile(4,4,4)", rest, keep] for rest in ("drop", "taylor"))
        assert taylor["error"] < 0.4 * drop["error"]
        assert taylor["work"] - drop["work"] < 0.025
    assert len({row["rule"] for row in RECORD["rows"]}) == len(RECORD["rows"])
