"""Keep the best key blocks of every row, on the device, without sorting.

A program finds its row's k-th largest score by setting the bits of a threshold from the top, each if at least k scores reach it (radix
selection). Ties go to the earlier block, as in a stable sort.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import UnsupportedKernelError

MOST_BLOCKS = 16384  # a row is held in registers


@triton.jit
def in_order(scores):
    """Floats as integers 0 ... 2^32 - 1 that compare alike."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def best(ordered, want):
    """Which of the entries >= 0 are the `want` largest; entries of -1 never are."""
    threshold = tl.zeros([], tl.int64)
    for bit in tl.static_range(32):
        candidate = threshold | (1 << (31 - bit))
        enough = tl.sum((ordered >= candidate).to(tl.int32), 0) >= want
        threshold = tl.where(enough, candidate, threshold)
    above = ordered > threshold
    equal = ordered == threshold
    left = want - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


@triton.jit
def _keep_best(
    scores, kept, budget, num_q_blocks, num_k_blocks, first_q_block, sink_blocks, CAUSAL: tl.constexpr, N: tl.constexpr
):
    """Grid: (query blocks, units)."""
    row = tl.program_id(0)
    at = (tl.program_id(1).to(tl.int64) * num_q_blocks + row) * num_k_blocks
    cols = tl.arange(0, N)
    inside = cols < num_k_blocks
    absolute = first_q_block + row
    reachable = inside & (cols <= absolute) if CAUSAL else inside
    ordered = in_order(tl.load(scores + at + cols, mask=inside, other=0.0))
    always = reachable & ((cols == absolute) | (cols < sink_blocks))
    ordered = tl.where(always, 0xFFFFFFFF, ordered)
    ordered = tl.where(reachable, ordered, -1)
    chosen = best(ordered, tl.load(budget + row)) | always
    tl.store(kept + at + cols, chosen.to(tl.int8), mask=inside)


def checked_columns(columns: int) -> int:
    """`columns`, if a program can hold a row of so many blocks.

    Raises:
        UnsupportedKernelError: it cannot.
    """
    if columns > MOST_BLOCKS:
        raise UnsupportedKernelError(
            f"rows of at most {MOST_BLOCKS} blocks can be chosen from, not {columns}; use larger blocks."
        )
    return columns


def keep_best(
    scores: Float[Tensor, "U M N"],
    budget: Int[Tensor, " M"],
    grid: BlockGrid,
    *,
    sink_blocks: int,
    out: Bool[Tensor, "U M N"] | None = None,
) -> Bool[Tensor, "U M N"]:
    """The `budget[p]` best reachable blocks of each row; the diagonal and the first `sink_blocks` are always in and count towards it.

    Args:
        scores: fp32, contiguous.
        budget: int32, on the scores' device.
        grid: the call's blocks.
        sink_blocks: blocks at the start that are always in.
        out: where to write; contiguous.

    Raises:
        UnsupportedKernelError: a row has more blocks than a program can hold.
    """
    units, rows, columns = scores.shape
    checked_columns(columns)
    kept = scores.new_empty(scores.shape, dtype=torch.bool) if out is None else out
    size = max(16, triton.next_power_of_2(columns))
    _keep_best[(rows, units)](
        scores, kept.view(torch.int8), budget, rows, columns, grid.first_q_block, sink_blocks, CAUSAL=grid.causal, N=size,
        num_warps=4 if size <= 2048 else 8,
    )  # fmt: skip
    return kept
