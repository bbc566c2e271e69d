"""Between a decoder's first product and its attention: norms of queries and keys, rotary positions, and the new token's place in the cache."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsesearch.kernels.triton_cache import count_token, place_token
from sparsesearch.kernels.triton_skinny import starts_early


@triton.jit
def rotated(at, gain, cos, sin, eps, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr):  # fmt: skip
    """Both halves of some heads [ROWS, HALF], at `at` one after the other: x cos + (-x_high, x_low) sin, after their RMS norm if they have one."""
    cols = tl.arange(0, HALF)
    heads = tl.arange(0, ROWS)
    inside = cols < D // 2
    real = (heads < HEADS)[:, None] & inside[None, :]
    low_at = at + heads[:, None] * D + cols[None, :]
    low = tl.load(low_at, mask=real, other=0.0).to(tl.float32)
    high = tl.load(low_at + D // 2, mask=real, other=0.0).to(tl.float32)
    if NORMED:
        factor = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)
        low = low * factor[:, None] * tl.load(gain + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        high = high * factor[:, None] * tl.load(gain + D // 2 + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_low = tl.load(cos + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + D // 2 + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + D // 2 + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def put_halves(at, low, high, heads_kept, ROWS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Write the first `heads_kept` heads that `rotated` made."""
    cols = tl.arange(0, HALF)
    heads = tl.arange(0, ROWS)
    real = (heads < heads_kept)[:, None] & (cols < D // 2)[None, :]
    low_at = at + heads[:, None] * D + cols[None, :]
    tl.store(low_at, low.to(at.dtype.element_ty), mask=real)
    tl.store(low_at + D // 2, high.to(at.dtype.element_ty), mask=real)


@triton.jit
def rotate_heads(
    qkv, cos, sin, q_gain, k_gain, q_out, keys, values, start, room, sinks, windows, seen, lens, slots,
    num_kv_heads, eps, GROUP: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORMED: tl.constexpr, CACHED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Queries, and the new key and value of one pair. Grid: (sequence, KV head) pairs."""
    if EARLY:
        gdc_launch_dependents()
    pair = tl.program_id(0)
    batch = (pair // num_kv_heads).to(tl.int64)
    head = pair % num_kv_heads
    if CACHED:  # the step before, or the prompt, has written these; no kernel of this layer has
        position = tl.load(seen + pair)
        window = tl.load(windows + pair)
        sink = tl.load(sinks + pair)
        limit = tl.where(window > 0, tl.load(room + pair), -0x40000000)  # without a window, place is negative
        first = tl.load(start + pair)
    if EARLY:
        gdc_wait()
    row = qkv + batch * (num_kv_heads * (GROUP + 2) * D)
    cos_at = cos + batch * D
    sin_at = sin + batch * D
    q_low, q_high = rotated(row + head * GROUP * D, q_gain, cos_at, sin_at, eps, GROUP, MEMBERS, D, HALF, NORMED)
    own_k = row + (num_kv_heads * GROUP + head) * D
    k_low, k_high = rotated(own_k, k_gain, cos_at, sin_at, eps, 1, 1, D, HALF, NORMED)
    cols = tl.arange(0, WIDE)
    value = tl.load(own_k + num_kv_heads * D + cols, mask=cols < D, other=0.0)
    put_halves(q_out + pair.to(tl.int64) * GROUP * D, q_low, q_high, GROUP, MEMBERS, D, HALF)
    if CACHED:
        place = place_token(keys, values, position, sink, window, first, BLOCK, ROWS, WIDE, D)
        kept = place < limit
        at = (first + place) * D
        put_halves(keys + at, k_low, k_high, tl.where(kept, 1, 0), 1, D, HALF)
        # a scalar mask and a vector do not meet in the interpreter
        tl.store(values + at + cols, value, mask=cols < tl.where(kept, D, 0))
        count_token(seen, lens, slots, pair, position, place, kept)
    else:
        put_halves(keys + pair.to(tl.int64) * D, k_low, k_high, 1, 1, D, HALF)
        tl.store(values + pair.to(tl.int64) * D + cols, value, mask=cols < D)


def launch(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, eps: float, q_out: Tensor, keys: Tensor,
    values: Tensor, cache: tuple[Tensor, ...] | None, block_tokens: int,
) -> None:  # fmt: skip
    """Shapes as in `step_ops.rotate_append`; without a cache, `keys` and `values` are the new ones."""
    batch, num_heads, head_dim = q_out.shape
    num_kv_heads = (qkv.shape[1] // head_dim - num_heads) // 2
    early = starts_early(qkv)
    limits = cache if cache is not None else (qkv,) * 7
    rotate_heads[(batch * num_kv_heads,)](
        qkv, cos, sin, qkv if q_gain is None else q_gain, qkv if k_gain is None else k_gain, q_out, keys, values, *limits,
        num_kv_heads, eps,
        **constants(num_heads // num_kv_heads, head_dim, block_tokens, normed=q_gain is not None, cached=cache is not None,
                    early=early),
        **OPTIONS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def constants(
    group: int, head_dim: int, block_tokens: int, *, normed: bool, cached: bool, early: bool
) -> dict[str, int | bool]:
    """Compile-time arguments of `rotate_heads`."""
    return {
        "GROUP": group,
        "MEMBERS": triton.next_power_of_2(group),
        "D": head_dim,
        "HALF": triton.next_power_of_2(head_dim // 2),
        "WIDE": triton.next_power_of_2(head_dim),
        "BLOCK": block_tokens,
        "ROWS": 8,
        "NORMED": normed,
        "CACHED": cached,
        "EARLY": early,
    }


OPTIONS = {"num_warps": 8}
