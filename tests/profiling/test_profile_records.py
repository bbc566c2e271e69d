"""What profiling large models took, as `python -m sparsesearch.bench.profiling SHAPE --json FILE` recorded it on an H200."""

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"
SAMPLES = 8


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    assert "H200" in found["device"]
    return found


def test_smollm2_within_a_minute():
    found = record("profile_smollm2_h200")
    assert (found["length_tokens"], found["samples"]) == (4096, SAMPLES)
    assert found["profile_s"] <= 60


def test_the_whole_command_with_sixteen_samples_within_a_minute():
    """From the shell's prompt to the written profile, reading the model included."""
    found = record("profile_smollm2_16_samples_h200")
    assert (found["length_tokens"], found["samples"]) == (4096, 2 * SAMPLES)
    assert found["again_after_imports_s"] < found["command_s"] <= 60


def test_8b_shape_within_five_minutes():
    """Fewer samples than eight count for as many times their whole time: fixed costs included, so the projection errs high."""
    found = record("profile_llama3_8b_h200")
    assert (found["layers"], found["length_tokens"], found["streamed"]) == (32, 8192, False)
    assert found["profile_s"] * SAMPLES / min(found["samples"], SAMPLES) <= 300
    assert found["peak_bytes"] - found["resident_bytes"] <= 12e9


def test_70b_shape_streams_within_20_gb():
    """Memory does not depend on the number of layers on disk: one is held at a time."""
    found = record("profile_llama3_70b_streamed_h200")
    assert found["streamed"]
    assert found["layers"] >= 2
    assert found["peak_bytes"] <= 20e9


def test_two_gpus_profile_as_one():
    """What several ways differ by is no more than what the same way differs by from one run to the next; both spread the work or the weights."""
    found = record("profile_two_gpus_h200")
    assert (found["gpus"], found["processes"], found["length_tokens"], found["samples"]) == (2, 2, 8192, 4)
    alone, again, shared, spread = (
        found["runs"][way] for way in ("one process", "one process again", "processes share sequences", "device map")
    )
    assert max(again["differences"].values()) <= 0.011
    for way in (shared, spread):
        for kind, noise in again["differences"].items():
            assert way["differences"][kind] <= 1.25 * noise, kind
    assert shared["profile_s"] < 0.8 * min(alone["profile_s"], again["profile_s"])
    assert len(alone["used_bytes"]) == 1
    assert max(spread["used_bytes"]) < 0.85 * alone["used_bytes"][0]
