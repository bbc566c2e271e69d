"""Profiles of a model whose prompts are padded: padding is neither seen nor scored."""

from pathlib import Path

import pytest
import torch
from tiny_models import TEXT, Tiny, hunyuan
from torch import Tensor

from sparsesearch.denoising.planning import write_step_plan
from sparsesearch.errors import SpecError
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.profiling.denoising.run import profile_transformer
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.runtime.diffusion.live import apply_to_transformer, describe_transformer, output_weights
from sparsesearch.search_space import SearchSpace

SPACE = """
name: tiny
source: test
description: test
unit: query_head
block_tokens: 16
candidates:
  - {kind: diagonal_band, order: [identity, axes(hwf)], reach: {b: 0.1}}
  - {kind: mean_value}
  - {kind: calibrated_tiles, keep: 0.4, order: "tile(2,2,2)"}
  - {kind: pooled_topk, keep: 0.5}
"""
REAL = 4


def sampler(tiny: Tiny) -> Tensor:
    outputs = []
    for step in range(2):
        with tiny.model.cache_context("cond", step_index=step, num_inference_steps=2):
            outputs.append(tiny.run())
    return torch.cat(outputs)


def profile(tiny: Tiny, folder: Path) -> DenoisingProfile:
    space = SearchSpace.parse(SPACE, where="test")
    request = StepsRequest(describe_transformer(tiny.model, "tiny"), space, 2, ends=(1.0,), captured_per_range=1)
    return profile_transformer(tiny.model, lambda: sampler(tiny), request, folder)


def test_errors_are_those_of_running_the_candidate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = hunyuan((REAL, REAL))
    made = profile(tiny, tmp_path / "p")
    captured, tokens = made.manifest.captured[0][0], made.manifest.layout.num_tokens - TEXT + REAL
    for place, path in enumerate(made.manifest.base_model.modules):
        weight = output_weights(tiny.model)[path].view(-1, 2, 16)
        for column in range(1, len(made.manifest.candidates)):
            found: list[Tensor] = []
            choice = torch.zeros(made.error.shape[:3], dtype=torch.long)
            choice[0, place] = column
            plan = write_step_plan(made, choice.flatten().numpy(), density=1.0)
            with apply_to_transformer(tiny.model, plan) as applied:
                layer = applied.layers[path]

                def probe(seen: LayerCall) -> Tensor:
                    q, k, v = (x[:, :, :tokens] for x in (seen.q, seen.k, seen.v))
                    dense = (q @ k.mT * seen.scale).softmax(-1) @ v
                    if seen.path == path and seen.call.step == (captured, 2):  # noqa: B023
                        sparse = layer.attend(seen.q, seen.k, seen.v, seen.rules, seen.call, seen.scale)[:, :, :tokens]  # noqa: B023
                        delta = torch.einsum("bhtd,ohd->bhto", sparse - dense, weight).square().sum((2, 3))  # noqa: B023
                        whole = torch.einsum("bhtd,ohd->bto", dense, weight).square().sum((1, 2))  # noqa: B023
                        found.append((delta / whole[:, None]).mean(0))  # noqa: B023
                    return torch.nn.functional.pad(dense, (0, 0, 0, TEXT - REAL))

                applied.probe(probe)
                sampler(tiny)
            torch.testing.assert_close(made.error[0, place, :, column], found[0], rtol=2e-3, atol=1e-7)


def test_what_is_padded_does_not_matter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = hunyuan((REAL, REAL))
    made = profile(tiny, tmp_path / "p")
    tiny.inputs["encoder_hidden_states"][:, REAL:] = 7.0
    torch.testing.assert_close(profile(tiny, tmp_path / "q").error, made.error, rtol=1e-4, atol=1e-8)


def test_prompts_of_different_lengths_in_one_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="one after another"):
        profile(hunyuan((3, TEXT)), tmp_path / "p")
