"""The training recipe: it learns, from its own starting point, and what it saves can be loaded."""

from pathlib import Path

import pytest
import torch

from sparsesearch.testbed.clips import render_clips
from sparsesearch.testbed.muon import orthogonalised
from sparsesearch.testbed.train import Recipe, Training, flow_loss, new_bed, noise_levels, rate_share, save_bed

TINY = Recipe(batch=4, frames=4, side=8, layers=1, heads=1, feed_forward=64, compiled=False)


def test_an_untrained_model_predicts_nothing() -> None:
    torch.manual_seed(0)
    clips = render_clips(4, frames=4, side=8, generator=torch.Generator().manual_seed(0))
    loss = flow_loss(new_bed(TINY, "cpu"), clips.video, clips.captions, TINY)
    assert 0.8 < float(loss.detach()) < 2.0  # the variance of noise plus that of the clips


def test_the_loss_falls_and_the_average_follows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    training = Training(new_bed(TINY, "cpu"), TINY)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for index in range(40):
        clips = render_clips(4, frames=4, side=8, generator=generator)
        losses.append(training.step(150 + index, 0.2, clips.video, clips.captions))
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    training.take_average()
    save_bed(training.bed, tmp_path / "model")
    assert (tmp_path / "model" / "caption_embedding.safetensors").is_file()
    from diffusers import WanTransformer3DModel

    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.proj_out.weight.float(), training.bed.transformer.proj_out.weight.float())


def test_noise_levels_cover_the_schedule() -> None:
    torch.manual_seed(0)
    levels = noise_levels(4096, "cpu")
    assert 0 <= float(levels.min()) < 0.05
    assert 0.97 < float(levels.max()) <= 1
    assert 0.6 < float(levels.mean()) < 0.75  # shift 3 moves the mean of 0.5 towards noise


@pytest.mark.parametrize(
    ("elapsed", "step", "share"), [(0.0, 0, 1 / 150), (0.3, 500, 1.0), (0.725, 500, 0.5), (1.0, 500, 0.02)]
)
def test_learning_rates_follow_the_clock(elapsed: float, step: int, share: float) -> None:
    assert rate_share(elapsed, step) == pytest.approx(share)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 16, 4), (1, 4, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
