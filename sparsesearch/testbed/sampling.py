"""Sampling the embedded model, and how close two videos are."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.testbed.clips import FRAMES, SIDE, render_clips
from sparsesearch.testbed.model import CONDITION_CHANNELS, VideoBed

Mode = Literal["t2v", "i2v"]
MODES: tuple[Mode, ...] = ("t2v", "i2v")
STEPS = 30
SHIFT = 3.0
"""Of the noise schedule, as in Wan 2.1 at 480p; training used it too."""

CALIBRATION_SEED, HELD_OUT_SEED = 100, 200


@dataclass(frozen=True)
class Scenes:
    """What a sampling run starts from.

    Attributes:
        captions: symbols of each clip.
        condition: mask and first frame, all zero for text to video.
        noise: where sampling starts.
        video: the rendered clip, for reference.
    """

    captions: Int[Tensor, "B 13"]
    condition: Float[Tensor, "B 4 F Y X"]
    noise: Float[Tensor, "B 3 F Y X"]
    video: Float[Tensor, "B 3 F Y X"]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: slice) -> "Scenes":
        """Some of them."""
        return Scenes(self.captions[rows], self.condition[rows], self.noise[rows], self.video[rows])


def scenes(
    count: int,
    *,
    mode: Mode,
    seed: int,
    device: torch.device | str,
    frames: int = FRAMES,
    side: int = SIDE,
) -> Scenes:
    """Draw scenes; text to video uses `seed`, image to video `seed + 1`, so that the two share no clip.

    Use CALIBRATION_SEED and HELD_OUT_SEED.
    """
    generator = torch.Generator(device=device).manual_seed(seed + (mode == "i2v"))
    clips = render_clips(count, frames=frames, side=side, device=device, generator=generator)
    noise = torch.randn(clips.video.shape, device=device, generator=generator)
    condition = torch.zeros(count, CONDITION_CHANNELS, *clips.video.shape[2:], device=device)
    if mode == "i2v":
        condition[:, :1, 0] = 1.0
        condition[:, 1:, 0] = clips.video[:, :, 0]
    return Scenes(clips.captions, condition, noise, clips.video)


def sigmas(steps: int) -> list[float]:
    """Noise levels of `steps` Euler steps, from 1 to 0, shifted towards the noisy end."""
    even = [1 - step / steps for step in range(steps + 1)]
    return [SHIFT * level / (1 + (SHIFT - 1) * level) for level in even]


@torch.no_grad()
def sample(bed: VideoBed, start: Scenes, *, steps: int = STEPS) -> Float[Tensor, "B 3 F Y X"]:
    """Euler steps of the flow from noise to video in [-1, 1].

    Every call is made inside the model's `cache_context`, as the Wan pipeline makes it, which is where a plan reads the step from.
    """
    levels, x = sigmas(steps), start.noise
    for step, (level, after) in enumerate(itertools.pairwise(levels)):
        with bed.transformer.cache_context("cond", step_index=step, num_inference_steps=steps, sigma=level):
            x = x + (after - level) * bed.velocity(x, level, start.condition, start.captions)
    return x.clamp(-1, 1)


def psnr_db(found: Float[Tensor, "B 3 F Y X"], wanted: Float[Tensor, "B 3 F Y X"]) -> Float[Tensor, " B"]:
    """Peak signal to noise ratio of each clip; the peak is 2, because pixels lie in [-1, 1]."""
    error = (found - wanted).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-12))


def ssim(found: Float[Tensor, "B 3 F Y X"], wanted: Float[Tensor, "B 3 F Y X"]) -> Float[Tensor, " B"]:
    """Structural similarity of each clip: frame by frame, Gaussian window of 11 pixels and σ 1.5, mean over colours and frames.

    Source: Wang et al. 2004, Image Quality Assessment, equations 13 to 16, K1 .01 and K2 .03.
    """
    away = torch.arange(11, device=found.device) - 5.0
    window = (-(away**2) / (2 * 1.5**2)).exp()
    window = (window[:, None] * window / window.sum() ** 2)[None, None]
    a, b = (x.transpose(1, 2).reshape(-1, 1, *x.shape[-2:]).float() for x in (found, wanted))

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, both = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.view(found.shape[0], -1).mean(1)
