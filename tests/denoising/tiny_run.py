"""A tiny random Wan transformer that samples six steps, and the profile of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.profiling.denoising.run import profile_transformer
from sparsesearch.runtime.diffusion.live import describe_transformer
from sparsesearch.search_space import SearchSpace

STEPS = 6
SPACE = """
name: tiny
source: test
description: test
unit: query_head
block_tokens: 32
candidates:
  - {kind: diagonal_band, order: [identity, axes(hwf)], reach: [{b: 0.1}, {b: 0.3}]}
  - {kind: zero}
  - {kind: mean_value}
  - {kind: calibrated_tiles, keep: [0.25, 0.5], order: [identity, "tile(2,4,4)"]}
"""


@dataclass
class Run:
    """The model and its sampler; `calls` counts runs."""

    model: Any
    noise: Tensor
    text: Tensor
    calls: int = 0

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self.calls += 1
        x = self.noise
        for step in range(STEPS):
            with self.model.cache_context("cond", step_index=step, num_inference_steps=STEPS):
                time = torch.full((len(x),), 1000 * (1 - step / STEPS))
                x = x - self.model(x, time, self.text, return_dict=False)[0] / STEPS
        return x


def make_run() -> Run:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    noise, text = torch.randn(2, 4, 5, 16, 20, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return Run(model.eval(), noise, text)


def request_of(run: Run, **changes: Any) -> StepsRequest:
    options = {"ends": (0.34, 1.0), "captured_per_range": 2, **changes}
    return StepsRequest(
        describe_transformer(run.model, "tiny"), SearchSpace.parse(SPACE, where="test"), STEPS, **options
    )


def profile(run: Run, folder: Path, **changes: Any) -> DenoisingProfile:
    return profile_transformer(run.model, run, request_of(run, **changes), folder)
