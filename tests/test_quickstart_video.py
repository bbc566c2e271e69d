"""`quickstart --video` in small: every artefact is there, the patched model runs the plan, the report shows it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")

from sparsesearch.denoising.judge import static_density
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.quickstart_video import FULL, REDUCED, Size, VideoQuickstart, quickstart_video, size_for
from sparsesearch.report.png import png
from sparsesearch.runtime.diffusion.call import hook_of
from sparsesearch.testbed.model import VideoBed, load_bed
from sparsesearch.testbed.sampling import HELD_OUT_SEED, psnr_db, sample, scenes

SIZE = Size(1, 2, 2, (0.5, 1.0), False, 4, 16, "a minute")
SPACE = """
name: small
source: test
description: test
unit: query_head
block_tokens: 32
candidates:
  - {kind: diagonal_band, reach: {b: 0.1}, order: [identity, axes(hwf)]}
  - {kind: calibrated_tiles, keep: [0.25, 0.5], order: ["tile(4,4,4)"]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VideoQuickstart]:
    folder = tmp_path_factory.mktemp("video")
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    stages: list[str] = []
    found = quickstart_video(
        folder / "out", density=0.5, space=str(folder / "space.yaml"), device="cpu", size=SIZE,
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert {"masses", "errors", "sensitivity", "replay"} <= set(stages)
    return folder / "out", found


@pytest.mark.slow
def test_every_artefact_is_there(made: tuple[Path, VideoQuickstart]) -> None:
    out, found = made
    assert Plan.load(out / "sparse_plan.json") == found.plan
    profile = DenoisingProfile.load(out / "profile" / "dense")
    assert bool((profile.sensitivity != 1).all())
    judged = json.loads((out / "judgement.json").read_text(encoding="utf-8"))
    assert set(judged["variants"]) == {"plan", "uniform", "permuted"}
    summary = found.summary()
    assert summary["density"]["plan"] <= 0.5
    assert summary["density"]["uniform"] <= 0.5
    assert summary["density"]["permuted"] == pytest.approx(summary["density"]["plan"])
    assert static_density(found.plan, profile.manifest.layout, 2) == pytest.approx(summary["density"]["plan"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<svg") >= 2
    assert "calibrated_tiles" in page
    assert page.index("<th>plan</th>") < page.index("<th>permuted</th>"), "the plan comes first"
    assert ".tick{" in page, "the map's labels have their size"
    assert f"{found.judgement.variants['plan'].values['psnr_db'][0]:.1f} dB</figcaption>" in page


@pytest.mark.slow
def test_the_patched_model_runs_the_plan(made: tuple[Path, VideoQuickstart]) -> None:
    from diffusers import WanTransformer3DModel

    out, found = made
    bed = load_bed()
    start = scenes(2, mode="t2v", seed=HELD_OUT_SEED, device="cpu", frames=4, side=16)
    dense = sample(bed, start, steps=2)
    patched = WanTransformer3DModel.from_pretrained(out / "patched")
    assert hook_of(patched) is not None
    sparse = sample(VideoBed(patched.eval(), bed.captions), start, steps=2)
    assert psnr_db(sparse, dense).tolist() == pytest.approx(
        found.judgement.variants["plan"].values["psnr_db"], abs=1e-3
    )


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="mode must be one of t2v, i2v"):
        quickstart_video(tmp_path / "out", mode="v2v")  # type: ignore[arg-type]
    (tmp_path / "report.html").touch()
    with pytest.raises(ArtifactError, match=r"must be empty or hold an interrupted quickstart, but holds report\.html"):
        quickstart_video(tmp_path)


def test_a_cpu_gets_the_reduced_run_and_is_told() -> None:
    assert size_for("cpu") is REDUCED
    assert size_for("cuda:0") is FULL
    assert "reduced" in REDUCED.expected


def test_pictures_are_png_files() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), image)
