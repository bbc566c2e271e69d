"""Artefacts of earlier releases stay readable, and what they recorded is what the README quotes."""

from pathlib import Path

import pytest

from sparsesearch.evaluate import Metrics
from sparsesearch.presets import preset_path
from sparsesearch.profiling.record import Profile

GOLDEN = Path(__file__).parent / "golden"


FRONTS = sorted(path for path in (GOLDEN / "quality").glob("*.json") if "-decoding-" not in path.stem)


@pytest.mark.parametrize("path", FRONTS, ids=lambda path: path.stem)
def test_measured_fronts_stay_readable(path: Path) -> None:
    metrics = Metrics.load(path)
    assert metrics.model in ("needle-7m", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert metrics.provenance["command"].startswith("sparsesearch front ")
    assert all(metrics.at(length, "dense").density == 1 for length in metrics.lengths_tokens)


def test_reference_profile_stays_readable() -> None:
    profile = Profile.load(preset_path("profiles", "needle-7m"))
    assert profile.manifest.lengths == (2048,)
    assert profile.labels[0] == "dense"


def test_readme_quotes_what_was_measured() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    metrics = Metrics.load(GOLDEN / "quality" / "needle-7m-mixture-h200.json")
    for density in ("0.15", "0.2", "0.25"):
        cell = metrics.at(2048, f"mixture @ {density}")
        assert f"| mixture | {cell.density:.2f} | {cell.needle.mean:.2f} | {cell.kl_text.mean:.3f} |" in readme
