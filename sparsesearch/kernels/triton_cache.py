"""Take a prompt, or one new token per sequence, into ragged caches, on the device. `cache_ops` describes the arguments."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def place_token(
    keys, values, position, sink, window, first, BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """Row of a pair's next token within its region, once the block that it pushes out has made way."""
    cols = tl.arange(0, D)
    block = position // BLOCK
    offset = position % BLOCK
    tail = sink + window - 1
    if (
        (offset == 0) & (block >= sink + window) & (window > 1)
    ):  # the last block is full: it takes the oldest one's slot
        slot = sink + (block - 1 - sink) % (window - 1)
        for row in range(0, BLOCK, ROWS):
            rows = row + tl.arange(0, ROWS)
            inside = (rows < BLOCK)[:, None] & (cols < DV)[None, :]
            source = (first + tail * BLOCK + rows)[:, None] * DV + cols[None, :]
            target = (first + slot * BLOCK + rows)[:, None] * DV + cols[None, :]
            tl.store(keys + target, tl.load(keys + source, mask=inside), mask=inside)
            tl.store(values + target, tl.load(values + source, mask=inside), mask=inside)
        tl.debug_barrier()  # the new token overwrites the first row that was copied
    return tl.minimum(block, tail) * BLOCK + offset


@triton.jit
def count_token(seen, lens, slots, pair, position, place, kept):
    """One more token was seen, and what the next one may see has grown with it if it was kept."""
    tl.debug_barrier()  # every thread has read the position
    tl.store(lens + pair, tl.where(kept, place + 1, tl.load(lens + pair)))
    tl.store(seen + pair, position + 1)
    tl.store(slots, tl.load(slots) + 1, mask=pair == 0)


@triton.jit
def append(
    k, v, keys, values, start, room, sinks, windows, seen, lens, slots, k_stride_b, k_stride_g, v_stride_b, v_stride_g, num_kv_heads,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Grid: (sequence, KV head) pairs."""
    pair = tl.program_id(0)
    batch = (pair // num_kv_heads).to(tl.int64)
    head = (pair % num_kv_heads).to(tl.int64)
    cols = tl.arange(0, D)
    real = cols < DV
    position = tl.load(seen + pair)
    window = tl.load(windows + pair)
    first = tl.load(start + pair)
    place = place_token(keys, values, position, tl.load(sinks + pair), window, first, BLOCK, ROWS, D, DV)
    kept = place < tl.where(window > 0, tl.load(room + pair), -0x40000000)  # without a window, place is negative
    at = (first + place) * DV + cols
    stored = cols < tl.where(kept, DV, 0)  # a scalar mask and a vector do not meet in the interpreter
    tl.store(keys + at, tl.load(k + batch * k_stride_b + head * k_stride_g + cols, mask=real), mask=stored)
    tl.store(values + at, tl.load(v + batch * v_stride_b + head * v_stride_g + cols, mask=real), mask=stored)
    count_token(seen, lens, slots, pair, position, place, kept)


def launch(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Tensor, room: Tensor, sinks: Tensor, windows: Tensor, seen: Tensor,
    lens: Tensor, slots: Tensor, block_tokens: int,
) -> None:  # fmt: skip
    """Shapes as in `cache_ops.append_token`."""
    head_dim = k.shape[-1]
    append[(seen.numel(),)](
        k, v, keys, values, start, room, sinks, windows, seen, lens, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k.shape[1], **constants(block_tokens, head_dim), **OPTIONS,
    )  # fmt: skip


def constants(block_tokens: int, head_dim: int) -> dict[str, int]:
    """Compile-time arguments of `append`."""
    return {"BLOCK": block_tokens, "ROWS": 16, "D": max(16, triton.next_power_of_2(head_dim)), "DV": head_dim}


OPTIONS = {"num_warps": 4}
FILL_ROWS = 64


@triton.jit
def fill(
    k, v, keys, values, start, room, sinks, windows, counts, offsets, seen, k_stride_b, k_stride_g, k_stride_t, v_stride_b, v_stride_g,
    v_stride_t, num_kv_heads, BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Copy what is kept of a prompt to where it belongs. Grid: (tiles of rows, sequence and KV head pairs)."""
    pair = tl.program_id(1)
    batch = (pair // num_kv_heads).to(tl.int64)
    head = (pair % num_kv_heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, D)
    count = tl.load(counts + batch)
    sink = tl.load(sinks + pair)
    window = tl.load(windows + pair)
    first = tl.load(start + pair)
    block = rows // BLOCK
    last = (count - 1) // BLOCK
    tail = sink + window - 1
    turn = tl.maximum(window - 1, 1)
    # a slot of the ring holds the newest full block that is as far from it as whole rounds are
    held = tl.where(block == tail, last, last - 1 - (last - 1 - block) % turn)
    moved = block >= tl.where(
        last > tail, sink, block + 1
    )  # a scalar condition and a vector do not meet in the interpreter
    position = tl.where(moved, held, block) * BLOCK + rows % BLOCK
    size = tl.where(window > 0, tl.load(room + pair), 0)
    kept = (block <= tail) & (rows < size) & (position < count)
    real = kept[:, None] & (cols < DV)[None, :]
    source = tl.load(offsets + batch) + position
    at = (first + rows)[:, None] * DV + cols[None, :]
    k_at = k + batch * k_stride_b + head * k_stride_g + source.to(tl.int64)[:, None] * k_stride_t + cols[None, :]
    v_at = v + batch * v_stride_b + head * v_stride_g + source.to(tl.int64)[:, None] * v_stride_t + cols[None, :]
    tl.store(keys + at, tl.load(k_at, mask=real), mask=real)
    tl.store(values + at, tl.load(v_at, mask=real), mask=real)
    if tl.program_id(0) == 0:
        tl.store(seen + pair, count)


def launch_fill(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Tensor, room: Tensor, sinks: Tensor, windows: Tensor, counts: Tensor,
    offsets: Tensor, seen: Tensor, block_tokens: int,
) -> None:  # fmt: skip
    """Shapes as in `cache_ops.fill_prompt`."""
    head_dim = k.shape[-1]
    fill[(triton.cdiv(k.shape[2], FILL_ROWS), seen.numel())](
        k, v, keys, values, start, room, sinks, windows, counts, offsets, seen, k.stride(0), k.stride(1), k.stride(2), v.stride(0),
        v.stride(1), v.stride(2), k.shape[1], **{**constants(block_tokens, head_dim), "ROWS": FILL_ROWS}, **OPTIONS,
    )  # fmt: skip
