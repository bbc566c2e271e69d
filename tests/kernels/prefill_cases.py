"""Calls that every prefill kernel must get right, the oracle's answer, and how far from it a kernel may be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.kernels.element_mask import tiles_of_mask, window_tiles
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.kernels.schedule import HeadTiles, Span, spans_of_cu_seqlens, spans_of_lengths
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow


@dataclass(frozen=True)
class Case:
    """One call: sequences, heads, tiles. `unit` scales every length, so that small tiles see the same structure as large ones."""

    name: str
    q_lens: tuple[float, ...]
    kv_lens: tuple[float, ...]
    layout: str = "right"  # right | left | packed
    causal: bool = True
    choice: str = "random"  # random | rules | window | bitmap
    num_heads: int = 4
    num_kv_heads: int = 2
    token_major: bool = False
    bias: bool = False

    def spans(self, unit: int, block: int) -> tuple[Span, ...]:
        q_lens = [max(1, round(x * unit)) for x in self.q_lens]
        kv_lens = [max(1, round(x * unit)) for x in self.kv_lens]
        if self.layout == "packed":
            cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).tolist() for lens in (q_lens, kv_lens))
            return spans_of_cu_seqlens(cu_q, cu_k, block_tokens=block, causal=self.causal)
        pads = [max(kv_lens) - n for n in kv_lens] if self.layout == "left" else None
        return spans_of_lengths(q_lens, kv_lens, block_tokens=block, causal=self.causal, left_padding=pads)


TILE_CASES = (
    Case("one_token", (0.01,), (0.01,)),
    Case("ragged", (2.49,), (2.49,)),
    Case("exact", (3,), (3,), choice="rules"),
    Case("full", (1.6,), (2.3,), causal=False),
    Case("full_rules", (2.3,), (2.3,), causal=False, choice="rules"),
    Case("chunk", (0.7,), (3.2,)),
    Case("chunk_inside_block", (0.3, 1.1), (2.45, 3.0), choice="rules"),
    Case("last_token", (0.01,), (2.5,)),
    Case("right_padding", (2.2, 0.49, 1.0), (2.2, 0.49, 1.0)),
    Case("left_padding", (2.2, 0.49, 1.3), (2.2, 0.49, 1.3), layout="left"),
    Case("packed", (1.3, 0.02, 2.49, 1.0), (1.3, 0.02, 2.49, 1.0), layout="packed"),
    Case("packed_cross", (0.6, 1.2), (1.9, 1.5), layout="packed", choice="rules"),
    Case("multi_head", (2.2,), (2.2,), num_heads=3, num_kv_heads=3),
    Case("multi_query", (1.7,), (1.7,), num_heads=6, num_kv_heads=1, token_major=True),
    Case("token_major", (2.3, 1.2), (2.3, 1.2), token_major=True, choice="rules"),
    Case("bias", (2.3, 1.2), (2.3, 1.2), bias=True),
)
ELEMENT_CASES = (  # finer than tiles: blocks of a multiple of 32
    Case("window", (3.3,), (3.3,), choice="window"),
    Case("window_chunk", (0.7, 1.1), (3.2, 2.6), choice="window"),
    Case("bitmap", (2.2, 0.49), (2.2, 0.49), choice="bitmap", layout="left"),
    Case("bitmap_full", (0.6, 1.2), (1.9, 1.5), choice="bitmap", causal=False, layout="packed"),
)
CASES = TILE_CASES + ELEMENT_CASES


@dataclass(frozen=True)
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    spans: tuple[Span, ...]
    tiles: list[HeadTiles]
    scale: float


def random_tiles(grid: BlockGrid, count: int, generator: torch.Generator) -> Tensor:
    """Random choices with at least one tile per row, except that one row of the last choice is empty."""
    chosen = torch.rand(count, grid.num_q_blocks, grid.num_k_blocks, generator=generator) < 0.4
    chosen = (
        chosen | grid.diagonal() | (grid.k_blocks() == 0) & (torch.arange(grid.num_q_blocks)[:, None] % 2 == 0)
    ) & grid.reachable()
    if count > 1:
        chosen[-1, 0] = False
    return chosen


def make_call(
    case: Case, *, head_dim: int, block: int, unit: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    spans = case.spans(unit, block)
    batch = max(s.batch for s in spans) + 1
    q_rows = max(s.q_offset + s.grid.q_len for s in spans)
    k_rows = max(s.k_offset + s.grid.kv_len for s in spans)

    def normal(heads: int, rows: int) -> Tensor:
        x = torch.randn(batch, heads, rows, head_dim, generator=generator)
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if case.token_major else x
        return x.to(device, dtype)

    q, k, v = normal(case.num_heads, q_rows), normal(case.num_kv_heads, k_rows), normal(case.num_kv_heads, k_rows)
    bias = torch.randn(batch, case.num_kv_heads, k_rows, generator=generator).to(device) if case.bias else None
    tiles = []
    for span in spans:
        elements = None
        if case.choice == "window":
            choices, elements = window_tiles(span.grid, sink=unit // 3, window=unit + unit // 5)
        elif case.choice == "bitmap":
            shape = (3, span.grid.q_len, span.grid.kv_len)
            allowed = torch.rand(shape, generator=generator) < 0.5
            allowed[0, :, ::2] = True  # whole columns
            allowed[2, 0] = False  # a query without a key
            choices, elements = tiles_of_mask(allowed, span.grid)
        elif case.choice == "rules":
            rules = (
                Dense(),
                SinkWindow(sink=block, window=LengthLaw(a=1.5 * block)),
                SinkWindow(sink=0, window=LengthLaw(a=1)),
            )
            choices = torch.stack([rule.select(span.grid) for rule in rules])
        else:
            choices = random_tiles(span.grid, 3, generator)
        tiles.append(HeadTiles(choices, tuple(h % len(choices) for h in range(case.num_heads)), elements))
    return Call(q, k, v, bias, spans, tiles, head_dim**-0.5)


def oracle(call: Call, *, rounded: bool = False) -> tuple[Tensor, Tensor]:
    """Output and LSE in fp64. `rounded`: with the weights rounded to the inputs' type, as every low-precision kernel must."""
    out = torch.zeros(call.q.shape, dtype=torch.float64, device=call.q.device)
    lse = torch.full(call.q.shape[:3], -torch.inf, dtype=torch.float64, device=call.q.device)
    group = call.q.shape[1] // call.k.shape[1]
    for span, choice in zip(call.spans, call.tiles, strict=True):
        rows = slice(span.q_offset, span.q_offset + span.grid.q_len)
        keys = slice(span.k_offset, span.k_offset + span.grid.kv_len)
        q = call.q[span.batch, :, rows].double()
        k = call.k[span.batch, :, keys].double().repeat_interleave(group, 0)
        v = call.v[span.batch, :, keys].double().repeat_interleave(group, 0)
        mask = expand(choice.choices[list(choice.of_head)].to(q.device), span.grid)
        if choice.elements is not None:
            mask &= choice.elements.expand(len(choice.choices), span.grid)[list(choice.of_head)].to(q.device)
        if call.bias is not None:  # a bias is one more dimension of q and k
            one = torch.ones_like(q[..., :1]) / call.scale
            bias = call.bias[span.batch, :, keys].double().repeat_interleave(group, 0)
            q, k = torch.cat([q, one], -1), torch.cat([k, bias[..., None]], -1)
        exact, one_lse = (
            masked_attention(q, k, v, mask, scale=call.scale)
            if call.bias is None
            else _biased(q, k, v, mask, call.scale)
        )
        if rounded:
            scores = (q @ k.transpose(-1, -2) * call.scale).masked_fill(~mask, -torch.inf)
            top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
            weights = (scores - top).exp().float().to(call.q.dtype).double()
            exact = (weights @ v) / (scores - top).exp().sum(-1, keepdim=True).clamp(min=1e-300)
            exact = exact.to(call.q.dtype).double()
        out[span.batch, :, rows], lse[span.batch, :, rows] = exact, one_lse
    return out, lse


def _biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.where(mask, (scores - lse[..., None]).exp(), 0.0) @ v, lse


def assert_close(out: Tensor, lse: Tensor, call: Call) -> None:
    """Within twice the error that rounding weights and output to the inputs' type costs the oracle itself (fp32: sixteen ulps)."""
    exact, exact_lse = oracle(call)
    low, _ = oracle(call, rounded=True)
    assert not out.isnan().any(), f"{int(out.isnan().sum())} of {out.numel()} outputs were never written"
    assert not lse.isnan().any()
    norm = float(exact.norm()) or 1.0
    floor = 16 * torch.finfo(torch.float32).eps
    error, allowed = float((out.double() - exact).norm()) / norm, 2 * float((low - exact).norm()) / norm + floor
    assert error <= allowed, f"relative error {error:.2e} exceeds {allowed:.2e}"
    worst, most = float((out.double() - exact).abs().max()), 4 * float((low - exact).abs().max()) + floor * norm
    assert worst <= most, f"greatest error {worst:.2e} exceeds {most:.2e}"
    no_key = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, no_key), "LSE must be -inf exactly where a query has no key"
    assert not out[no_key].any(), "output must be 0 where a query has no key"
    seen = ~no_key
    if seen.any():
        # scores are sums of head_dim products in fp32, and exp2 of the special-function unit is good to 2 ulps
        torch.testing.assert_close(
            lse[seen].double(), exact_lse[seen], rtol=2e-5, atol=2e-5 if call.q.dtype == torch.float32 else 2e-4
        )
