"""What `sparsesearch bench cuts` recorded: the joint plan against plans of one kind, the searched cut of a real model against magnitude."""

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


def test_smollm2_without_fifteen_percent_is_nearer_to_dense_than_uniform_magnitude():
    found = {row.plan: row for row in rows(RECORDS[0].parent / "smollm2-h200.json")}
    searched, bare = found["searched"], found["searched, not refitted"]
    rival, bare_rival = found["uniform magnitude"], found["uniform magnitude, not refitted"]
    assert searched.params <= 0.85
    assert max(searched.distance / rival.distance, bare.distance / bare_rival.distance) <= 0.7, "like with like"
    assert searched.distance <= 0.7 * bare_rival.distance
