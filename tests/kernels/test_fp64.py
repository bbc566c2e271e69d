"""The error that `bench attention` prints: against the whole oracle, and not blind to a row that was never written."""

import pytest
import torch

from sparsesearch.bench import fp64
from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow

RULES = (Dense(), SinkWindow(sink=16, window=LengthLaw(a=32)), Dense(), SinkWindow(sink=0, window=LengthLaw(a=1)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sampled", [32, 512])
def test_rows_are_those_of_the_oracle(causal: bool, sampled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp64, "SAMPLED_QUERIES", sampled)
    grid = BlockGrid(96, 96, 16, causal=causal)
    generator = torch.Generator().manual_seed(sampled)
    q, k, v = (torch.randn(1, heads, 96, 8, generator=generator) for heads in (4, 2, 2))
    exact = fp64.exact_rows(q, k, v, RULES, grid, scale=0.3)
    masks = torch.stack([expand(rule.select(grid), grid) for rule in RULES])
    whole = masked_attention(
        q[0].double(), k[0].repeat_interleave(2, 0), v[0].repeat_interleave(2, 0), masks, scale=0.3
    )[0]
    torch.testing.assert_close(exact, whole[:, -sampled:])
    assert fp64.relative_error(whole[None], exact) < 1e-14
    rounded = whole[None].bfloat16()
    assert 1e-4 < fp64.relative_error(rounded, exact) < 4e-3
    rounded[0, 1, -1, 0] = torch.nan
    assert not fp64.relative_error(rounded, exact) < 1.0
