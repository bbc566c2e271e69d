"""The embedded video model: its clips, its sampler, its measures, its weights."""

import pytest
import torch

from sparsesearch.presets import preset_path
from sparsesearch.runtime.diffusion.live import describe_transformer
from sparsesearch.testbed.clips import ABSENT, VOCABULARY, render_clips
from sparsesearch.testbed.model import MODEL, load_bed
from sparsesearch.testbed.sampling import psnr_db, sample, scenes, sigmas, ssim

CAPTION = [0, 7, 10, 13, 19, 33, 35, 82, 82, 82, 82, 82, 82]
PIXEL = [0.419621, -0.09791, 0.018844]
MEAN = 0.0561936


def test_clips_are_the_published_ones() -> None:
    """Pixels and captions of the first clips of seed 0, drawn when the model was trained."""
    clips = render_clips(24, generator=torch.Generator().manual_seed(0))
    assert clips.captions[0].tolist() == CAPTION
    torch.testing.assert_close(clips.video[0, :, 5, 7, 11], torch.tensor(PIXEL), atol=2e-5, rtol=0)
    assert float(clips.video.mean()) == pytest.approx(MEAN, abs=1e-5)


def test_clips_are_videos_with_captions() -> None:
    clips = render_clips(32, frames=5, side=24, generator=torch.Generator().manual_seed(3))
    assert clips.video.shape == (32, 3, 5, 24, 24)
    assert float(clips.video.abs().max()) <= 1
    assert int(clips.captions.min()) >= 0
    assert int(clips.captions.max()) < VOCABULARY
    sprites = clips.captions[:, 3] - 13 + 1
    assert ((clips.captions[:, 4:] != ABSENT).sum(1) == 3 * sprites).all()


def test_calibration_and_held_out_scenes_differ() -> None:
    drawn = [scenes(2, mode=mode, seed=seed, device="cpu") for mode in ("t2v", "i2v") for seed in (100, 200)]
    assert len({float(one.noise.sum()) for one in drawn}) == 4
    assert float(drawn[0].condition.abs().max()) == 0
    assert torch.equal(drawn[2].condition[:, 1:, 0], drawn[2].video[:, :, 0])
    assert float(drawn[2].condition[:, :, 1:].abs().max()) == 0


def test_noise_levels_fall_from_one_to_zero() -> None:
    levels = sigmas(30)
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert levels == sorted(levels, reverse=True)
    assert levels[15] == pytest.approx(0.75)  # half way at shift 3


def test_measures_of_known_pictures() -> None:
    video = torch.rand(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert psnr_db(video + 0.02, video).tolist() == pytest.approx([40.0, 40.0], abs=1e-3)
    assert ssim(video, video).tolist() == pytest.approx([1.0, 1.0])
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    near, far = (float(ssim(video + noise * size, video).mean()) for size in (0.05, 0.5))
    assert 1 > near > far > -0.1


def test_the_weights_are_whole_and_small_files() -> None:
    files = list(preset_path("models", MODEL).glob("*.safetensors"))
    assert len(files) == 3
    assert max(file.stat().st_size for file in files) <= 16 << 20
    bed = load_bed()
    assert sum(p.numel() for p in bed.transformer.parameters()) == pytest.approx(11.48e6, rel=1e-3)
    info = describe_transformer(bed.transformer, MODEL)
    assert (len(info.modules), set(info.num_heads), set(info.head_dim)) == (8, {5}, {64})


def test_the_model_predicts_the_velocity() -> None:
    """On an unseen clip of its own size the error is near the published v-MSE of .067 at σ .5 (mean of 48); an untrained model is near 1."""
    bed = load_bed()
    start = scenes(1, mode="t2v", seed=5, device="cpu")
    x = 0.5 * start.video + 0.5 * start.noise
    found = bed.velocity(x, 0.5, start.condition, start.captions)
    assert float((found - (start.noise - start.video)).square().mean()) < 0.2


def test_sampling_is_repeatable() -> None:
    bed, start = load_bed(), scenes(1, mode="i2v", seed=7, device="cpu", frames=4, side=16)
    once, twice = (sample(bed, start, steps=2) for _ in range(2))
    assert torch.equal(once, twice)
    assert once.shape == (1, 3, 4, 16, 16)
    assert float(once.abs().max()) <= 1
