"""The bars on the trained model, by true sampling of held-out clips: about two minutes per mode on an H200.

    sparsesearch bench video-quality --mode t2v

prints the same figures, per clip and paired with standard errors, and writes what lies in `tests/golden/video`.
"""

from pathlib import Path

import pytest
import torch

from sparsesearch.bench.video_quality import run
from sparsesearch.bench.video_quality_request import BARS_DB, DENSITIES, QualityRequest
from sparsesearch.testbed.sampling import Mode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_plans_reach_the_bars(mode: Mode, tmp_path: Path) -> None:
    record = run(QualityRequest(mode, DENSITIES[mode], tmp_path, other_steps=(), other_frames=(), again=False))
    missed = []
    for density, bars in BARS_DB[mode].items():
        for menu, bar in bars.items():
            variant = record["variants"][f"{menu} {density}"]
            assert variant["density"] <= density + 1e-9
            reached = sum(variant["values"]["psnr_db"]) / len(variant["values"]["psnr_db"])
            missed += [f"{menu} {density}: {reached:.2f} < {bar}"] if reached < bar else []
        pair = record["paired_db"][f"video_mixture {density} - permuted {density} #0"]
        assert pair["mean"] > 6 * pair["standard_error"]
    assert not missed
