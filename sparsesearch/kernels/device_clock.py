"""The clock that a GPU's multiprocessors really had over a stretch of work, from their own counters.

A card at its power limit lowers its clock by up to a fifth, and what runs next inherits that. Times of a kernel can be compared, or
predicted, only with the clock they met. Drivers sample it every few hundred milliseconds; cycles over nanoseconds of the same
multiprocessor, read before and after, are exact for any stretch.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Int64
from torch import Tensor
from triton.language.extra.cuda import globaltimer, smid

Stamp = Int64[Tensor, "multiprocessors 2"]
"""Cycles and nanoseconds of every multiprocessor; zeros where none was read, no rows where there is no NVIDIA GPU."""


@triton.jit
def read_counters(out):
    """Grid: as many programs as multiprocessors; each writes the row of the one it is on."""
    row = out + 2 * smid()
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(row, cycles)
    tl.store(row + 1, globaltimer())


def stamp() -> Stamp:
    """Read the counters of the current GPU, in the order of the current stream; nothing waits."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return torch.zeros(0, 2, dtype=torch.int64)
    count = torch.cuda.get_device_properties("cuda").multi_processor_count
    found = torch.zeros(count, 2, dtype=torch.int64, device="cuda")
    read_counters[(count,)](found, num_warps=1)
    return found


def hz_between(before: Stamp, after: Stamp) -> float | None:
    """Mean clock in Hz between two stamps; None if no multiprocessor was read twice, or no time has passed."""
    seen = (before[:, 1] > 0) & (after[:, 1] > before[:, 1])
    if not bool(seen.any()):
        return None
    cycles, nanoseconds = (after[seen] - before[seen]).double().unbind(1)
    return float((cycles / nanoseconds).median()) * 1e9
