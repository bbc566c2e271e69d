"""What `sparsesearch bench cuts` recorded: the searched cut beside its baselines, and joint plans beside plans of one kind alone."""

import json
from pathlib import Path

import pytest

from sparsesearch.bench.cuts import CUTS_ONLY, JOINT, MODES, RULES_ONLY, CutRow, at_equal_time

FOLDER = Path(__file__).parents[1] / "golden" / "pruning"
RECORDS = sorted(FOLDER.glob("*.json"))


def rows(path):
    record = json.loads(path.read_text())
    assert record["format"] == "sparsesearch.bench.cuts"
    assert record["provenance"]["command"].startswith("sparsesearch bench cuts ")
    return [CutRow(**row) for row in record["rows"]]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_stay_readable(path):
    assert rows(path)


def test_the_searched_cut_keeps_the_loss_and_beats_every_baseline_at_equal_parameters():
    """20 % of the embedded model's parameters go, before any training: at most 0.15 nats, on 64 held-out sequences."""
    found = {row.plan: row for row in rows(FOLDER / "needle-cuts.json")}
    searched = found.pop("searched")
    assert searched.loss_gap <= 0.15
    assert searched.params <= 0.8
    assert {"uniform width", "magnitude", "uniform magnitude", "learned", *MODES} <= found.keys()
    for other in found.values():
        assert other.params == pytest.approx(searched.params, abs=2e-3)
        assert searched.loss_gap < other.loss_gap, other.plan
        assert searched.distance < other.distance, other.plan


def test_joint_plans_are_at_least_as_good_as_either_kind_alone():
    """Held-out distance at the same predicted budget, and at the same measured time wherever a kind has plans around it."""
    record = json.loads((FOLDER / "needle-7m-joint-cpu.json").read_text())
    assert record["provenance"]["num_sequences"] >= 16
    found = rows(FOLDER / "needle-7m-joint-cpu.json")
    for joint in (row for row in found if row.plan == JOINT):
        for alone in (row for row in found if row.plan in (CUTS_ONLY, RULES_ONLY) and row.budget == joint.budget):
            assert joint.distance <= alone.distance
    equal = at_equal_time(found)
    assert equal == record["at_equal_time"]
    compared = [(row[JOINT], row[kind]) for row in equal for kind in (CUTS_ONLY, RULES_ONLY) if row[kind] is not None]
    assert len(compared) >= 4
    assert all(joint <= alone for joint, alone in compared)


def test_smollm2_without_fifteen_percent_is_nearer_to_dense_than_uniform_magnitude():
    found = {row.plan: row for row in rows(FOLDER / "smollm2-h200.json")}
    searched, bare = found["searched"], found["searched, not refitted"]
    rival, bare_rival = found["uniform magnitude"], found["uniform magnitude, not refitted"]
    assert searched.params <= 0.85
    assert max(searched.distance / rival.distance, bare.distance / bare_rival.distance) <= 0.7, "like with like"
    assert searched.distance <= 0.7 * bare_rival.distance


def test_a_pruned_encoder_is_nearer_to_dense_than_it_was_and_healing_brings_it_nearer():
    """all-MiniLM-L6-v2 at 25 % fewer FLOPs on 256 held-out sentences (of each seed), refitted on 3,072 others, then healed twice.

    profile all-MiniLM-L6-v2 --space pruning --data text+stdlib --lengths 64 --num-samples 512 -o minilm; search minilm --budget flops=0.75x
    --lengths 32 --refit-samples 3072 -o minilm.json; apply minilm.json all-MiniLM-L6-v2 -o minilm-smaller; then the records' commands.
    """
    first, longer = (
        json.loads((FOLDER.parent / "healing" / name).read_text())
        for name in ("minilm-cpu.json", "minilm-longer-cpu.json")
    )
    earlier = {row.plan: row.distance for row in rows(FOLDER / "minilm-flops-cpu.json")}
    assert first["distance_before"] <= 0.026 < earlier["searched"]
    assert first["distance_after"] <= 0.023
    assert longer["distance_after"] <= 0.02
    for record in (first, longer):
        request = record["provenance"]["request"]
        assert (request["held_out"], request["num_sequences"]) == ("text", 256)
        assert record["recovered"] == pytest.approx(1 - record["distance_after"] / record["distance_before"])


def test_smollm2_without_fifteen_percent_is_faster_on_a_cpu():
    """A budget on FLOPs beside that on parameters makes heads go too, whose attention a parameter does not count. The refit is a short one."""
    record = FOLDER / "smollm2-cpu.json"
    searched, rival = rows(record)
    provenance = json.loads(record.read_text())["provenance"]
    assert (provenance["time_tokens"], provenance["device"][:3]) == (1024, "cpu")
    assert 0.84 <= searched.params <= 0.85
    assert searched.speed_up >= 1.12
    assert searched.distance <= 0.7 * rival.distance
