"""The bars on the trained model, by true sampling of held-out clips: about two minutes per mode on an H200.

    pytest -m gpu -s tests/denoising/test_bars_gpu.py

prints per-clip figures, paired differences with standard errors, and the permuted controls.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsesearch.denoising.corridor import Corridor
from sparsesearch.denoising.judge import judge, permuted_plan
from sparsesearch.denoising.replay import Replay
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.runtime.diffusion.live import describe_transformer
from sparsesearch.search_space import SearchSpace
from sparsesearch.testbed.model import MODEL, load_bed
from sparsesearch.testbed.sampling import CALIBRATION_SEED, HELD_OUT_SEED, STEPS, Mode, psnr_db, sample, scenes, ssim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BARS_DB: dict[Mode, dict[float, dict[str, float]]] = {
    "t2v": {0.35: {"sparse_vdit": 19.5, "video_mixture": 24.0}, 0.5: {"sparse_vdit": 22.0, "video_mixture": 31.0}},
    "i2v": {0.25: {"sparse_vdit": 21.5, "video_mixture": 24.5}, 0.5: {"sparse_vdit": 26.5, "video_mixture": 31.5}},
}


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_plans_reach_the_bars(mode: Mode, tmp_path: Path) -> None:
    bed = load_bed("cuda")
    spaces = {name: SearchSpace.load(name) for name in ("sparse_vdit", "video_mixture")}
    menu = {rule.label: rule for space in reversed(spaces.values()) for rule in space.candidates}
    both = replace(spaces["video_mixture"], name="both", candidates=tuple(menu.values()))
    clips = scenes(4, mode=mode, seed=CALIBRATION_SEED, device="cuda")
    held = scenes(12, mode=mode, seed=HELD_OUT_SEED, device="cuda")
    request = StepsRequest(describe_transformer(bed.transformer, MODEL), both, STEPS, ends=(0.2, 0.5, 1.0))
    corridor = Corridor(bed.transformer, lambda: sample(bed, clips, steps=STEPS), request, tmp_path)
    profile = corridor.profile(density=min(BARS_DB[mode]))
    plans: dict[str, Plan] = {}
    for density, bars in BARS_DB[mode].items():
        plans |= {f"{name} {density}": corridor.search(profile, density, space=spaces[name]).plan for name in bars}
        plans[f"permuted {density}"] = permuted_plan(plans[f"video_mixture {density}"], 0)
    replay = Replay.of(bed.transformer, lambda: sample(bed, held, steps=STEPS))
    measures = {"psnr_db": psnr_db, "ssim": ssim}
    found = judge(replay, plans, measures, layout=profile.manifest.layout, num_steps=STEPS)
    missed = []
    for density, bars in BARS_DB[mode].items():
        for name, bar in bars.items():
            variant = found.variants[f"{name} {density}"]
            reached, clips_db = variant.mean("psnr_db"), [round(value, 1) for value in variant.values["psnr_db"]]
            print(
                f"{mode} {name} {density}: density {variant.density:.4f}, {reached:.2f} dB (bar {bar}), clips {clips_db}"
            )
            assert variant.density is not None
            assert variant.density <= density + 1e-9
            missed += [f"{name} {density}: {reached:.2f} < {bar}"] if reached < bar else []
        pair = found.paired(f"video_mixture {density}", f"permuted {density}")
        print(f"{mode} {density}: mixture - permuted {pair}")
        assert pair.mean > 6 * pair.standard_error
    assert not missed
