"""Means of all visible values, written into the heads that want them: the interpreter here, the GPU where there is one."""

import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.reference import running_mean
from sparsesearch.kernels.triton_running_mean import put_running_means

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("continued", [False, True])
def test_means_equal_the_oracle_and_other_heads_are_left_alone(
    tokens: int, dtype: torch.dtype, continued: bool
) -> None:
    """24 of 32 columns, a batch of two, values with a stride, and queries that are the last of more keys."""
    generator = torch.Generator().manual_seed(tokens)
    queries = tokens - tokens // 3 if continued else tokens
    v = torch.randn(2, tokens, 3, 24, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    out = torch.full((2, 6, queries, 24), 7.0, device=DEVICE, dtype=dtype)
    members = {0: [1], 2: [4, 5]}
    kv_heads = torch.tensor(list(members), dtype=torch.int32, device=DEVICE)
    put_running_means(v, kv_heads, torch.tensor([[1, -1], [4, 5]], dtype=torch.int32, device=DEVICE), out)
    exact = running_mean(v, BlockGrid(queries, tokens, 64))
    for kv_head, heads in members.items():
        for head in heads:
            assert (out[:, head] - exact[:, kv_head]).abs().max() <= 4 * torch.finfo(dtype).eps
    assert (out[:, [0, 2, 3]] == 7).all()
