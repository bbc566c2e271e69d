"""`bench video-quality` in small: every way to a plan and every control is judged, and the record says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from sparsesearch.bench import video_quality
from sparsesearch.bench.video_quality import run
from sparsesearch.bench.video_quality_request import MENUS, WITH_RESTS, QualityRequest
from sparsesearch.errors import ArtifactError
from sparsesearch.plan import Plan
from sparsesearch.testbed.model import VideoBed, load_bed

DENSITY = 0.8  # clips of four blocks of tokens leave bands no smaller choice


def shallow_bed(device: str) -> VideoBed:
    """Two of the eight layers: what is judged here is the record, not the model."""
    bed = load_bed(device)
    bed.transformer.blocks = bed.transformer.blocks[:2]
    return bed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("quality")
    request = QualityRequest(
        "i2v", (DENSITY,), folder, device="cpu", calibration_clips=1, held_out_clips=2, steps=2, ends=(0.5, 1.0), evaluations=0,
        slices=2, other_steps=(1,), other_frames=(8,), frames=4, side=16,
    )  # fmt: skip
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_quality, "load_bed", shallow_bed)
        record = run(request, command=["a", "b"], on_variant=lambda name, variant: names.append(name))
    assert names == list(record["variants"])
    return folder, record


@pytest.mark.slow
def test_the_record_holds_every_variant(made: tuple[Path, dict[str, Any]]) -> None:
    folder, record = made
    ways = [f"video_mixture, {way} {DENSITY}" for way in ("again", "ranges by DP", "best")]
    controls = [
        f"uniform {DENSITY}",
        f"sparse_vdit by threshold {DENSITY}",
        *(f"permuted {DENSITY} #{n}" for n in range(3)),
    ]
    menus = [f"{menu} {DENSITY}" for menu in MENUS if menu != WITH_RESTS]
    judged = set(record["variants"]) | set(record["infeasible"])
    assert judged - {f"{WITH_RESTS} {DENSITY}"} == {*ways, *controls, *menus}
    for name, variant in record["variants"].items():
        assert variant["density"] <= DENSITY + 1e-9, name
        assert len(variant["values"]["psnr_db"]) == len(variant["values"]["ssim"]) == 2
        plan = Plan.load(folder / "plans" / f"{name.replace(',', '').replace(' ', '_')}.json")
        assert plan.base_model.model_type == "WanTransformer3DModel"
    json.dumps(record)
    assert record["provenance"]["command"] == "a b"
    assert set(record["elsewhere"]) == {"1 steps, 4 frames", "2 steps, 8 frames"}


@pytest.mark.slow
def test_the_best_way_is_that_of_the_least_replayed_error(made: tuple[Path, dict[str, Any]]) -> None:
    _, record = made
    least = {name: min(way["log10_error"].values()) for name, way in record["searches"].items()}
    ours = {
        name: error
        for name, error in least.items()
        if name.startswith("video_mixture") and name != f"{WITH_RESTS} {DENSITY}"
    }
    assert ours[f"video_mixture, best {DENSITY}"] == min(ours.values())
    assert ours[f"video_mixture, again {DENSITY}"] <= ours[f"video_mixture {DENSITY}"]
    pair = record["paired_db"][f"video_mixture {DENSITY} - uniform {DENSITY}"]
    first, second = (
        record["variants"][f"{name} {DENSITY}"]["values"]["psnr_db"] for name in ("video_mixture", "uniform")
    )
    assert pair["mean"] == pytest.approx(sum(a - b for a, b in zip(first, second, strict=True)) / 2)


@pytest.mark.slow
def test_a_folder_with_a_profile_is_not_written_over(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    request = QualityRequest("i2v", (DENSITY,), folder, device="cpu", calibration_clips=1, steps=4, ends=(0.5, 1.0))
    with pytest.raises(ArtifactError, match="resume"):
        run(replace(request, frames=4, side=16))
