"""Schedules of 1,024 heads at 131,072 tokens, as recorded: `python -m sparsesearch.bench.schedule --json tests/golden/schedule_cpu.json`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsesearch.bench import schedule

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "schedule_cpu.json").read_text())["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['block_tokens']}-{row['tile']}-{row['rules']}")
def test_a_schedule_takes_less_than_a_second_and_never_heads_times_blocks_squared(row: dict[str, Any]) -> None:
    assert row["cpu_s"] < 1
    assert row["peak_bytes"] < 0.3 * schedule.NUM_HEADS * (schedule.TOKENS / row["block_tokens"]) ** 2
    assert row["makespan"] < 1.01


def test_the_cases_are_those_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(row["block_tokens"], tuple(row["tile"]), row["rules"]) for row in ROWS] == [
        (case.block_tokens, (case.shape.rows, case.shape.keys), case.num_rules) for case in schedule.CASES
    ]
    monkeypatch.setattr(schedule, "TOKENS", 4096)
    found = schedule.measure(replace(schedule.CASES[0], num_rules=3))
    assert found["tiles"] == schedule.NUM_HEADS * 32
    assert found["cpu_s"] > 0
