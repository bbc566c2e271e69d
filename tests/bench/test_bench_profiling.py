"""The bench of profiles on a shape that a CPU can hold, resident and from disk."""

from dataclasses import replace
from pathlib import Path

import torch

from sparsesearch.bench.profiling import profile_from_disk, profile_resident, write_random_checkpoint
from sparsesearch.bench.random_model import random_model
from sparsesearch.model_shapes import model_shape
from sparsesearch.profiling.record import Profile
from sparsesearch.runtime.loading import load_tokenizer
from sparsesearch.search_space import SearchSpace

SPACE = """
name: two
source: tests
description: a window and a template
block_tokens: 64
unit: query_head
candidates:
  - {kind: sink_window, sink: 64, window: 64}
  - {kind: fixed_blocks, keep: 0.4}
"""


def test_resident_and_from_disk(tmp_path: Path) -> None:
    shape = replace(
        model_shape("llama3-70b"), num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2,
        head_dim=8, vocab_size=4096,
    )  # fmt: skip
    tokenizer, menu = load_tokenizer("needle-7m"), SearchSpace.parse(SPACE, where="tests")
    write_random_checkpoint(shape, tmp_path / "model")
    found = profile_from_disk(
        tmp_path / "model", tokenizer, menu, length=256, samples=1, device="cpu", folder=tmp_path / "streamed"
    )
    assert found["checkpoint_bytes"] > 2 * 2 * 4096 * 32
    model = random_model(shape, device="cpu", dtype=torch.float32)
    profile_resident(model, tokenizer, menu, length=256, samples=1, folder=tmp_path / "resident")
    for name in ("streamed", "resident"):
        assert len(Profile.load(tmp_path / name).manifest.base_model.modules) == 2
