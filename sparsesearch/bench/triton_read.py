"""Reading at the memory's pace and nothing else: what decoding is compared with."""

import torch
import triton
import triton.language as tl
from torch import Tensor

READERS_PER_SM = 4


@triton.jit
def _read(keys, values, sums, size, BLOCK: tl.constexpr):
    """Each program reads an even share of two arrays of `size` numbers. Grid: programs."""
    share = (size + tl.num_programs(0) - 1) // tl.num_programs(0)
    start = tl.program_id(0) * share
    stop = tl.minimum(start + share, size)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        total += tl.load(keys + at, mask=inside, other=0) + tl.load(values + at, mask=inside, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def read_both(keys: Tensor, values: Tensor) -> Tensor:
    """Read two int32 arrays of one size on the GPU; returns their sum in parts, which depends on every number."""
    programs = torch.cuda.get_device_properties(keys.device).multi_processor_count * READERS_PER_SM
    sums = keys.new_empty(programs)
    _read[(programs,)](keys, values, sums, keys.numel(), BLOCK=2048, num_warps=8, num_stages=4)
    return sums
