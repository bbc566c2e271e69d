"""What `sparsesearch bench cuts` recorded: the joint plan is faster and nearer to dense than the plans of one kind alone."""

import json
from pathlib import Path

import pytest

from sparsesearch.bench.cuts import CUTS_ONLY, JOINT, RULES_ONLY, CutRow

RECORDS = sorted((Path(__file__).parents[1] / "golden" / "pruning").glob("*.json"))


def rows(path):
    record = json.loads(path.read_text())
    assert record["format"] == "sparsesearch.bench.cuts"
    assert record["provenance"]["command"].startswith("sparsesearch bench cuts ")
    return [CutRow(**row) for row in record["rows"]]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_stay_readable(path):
    assert rows(path)


@pytest.mark.parametrize("path", [p for p in RECORDS if "joint" in p.stem], ids=lambda path: path.stem)
def test_the_joint_plan_beats_either_kind_alone(path):
    found = rows(path)
    for joint in (row for row in found if row.plan == JOINT):
        for alone in (row for row in found if row.plan in (CUTS_ONLY, RULES_ONLY) and row.budget == joint.budget):
            assert joint.distance < alone.distance
            assert joint.forward_s <= alone.forward_s * 1.03, "the clock of a shared machine"
