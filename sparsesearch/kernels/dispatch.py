"""One entrance to every backend of prefill attention under a tile choice.

    gluon      Hopper, warp-specialised                 (ops, hopper_prefill)
    triton     any GPU Triton knows; interpreter on CPU (ops, triton_prefill)
    torch      gather and SDPA: the CPU path            (torch_gather)
    reference  the oracle, fp64                         (reference)

A backend that was asked for and cannot serve raises; `auto` takes the first of gluon, triton, torch that can and says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.errors import SpecError, UnsupportedKernelError, nearest
from sparsesearch.kernels.per_sequence import run_per_sequence, tiles_of, tiles_per_head
from sparsesearch.kernels.plain_calls import as_called
from sparsesearch.kernels.schedule import (
    HeadTiles,
    Span,
    TileSchedule,
    TileShape,
    Workers,
    build_schedule,
    schedule_of_rules,
)

if TYPE_CHECKING:
    from sparsesearch.rules.base import Rule

Backend = Literal["auto", "gluon", "triton", "torch", "reference"]
BACKENDS = ("auto", "gluon", "triton", "torch", "reference")
GLUON_HEAD_DIMS = (32, 64, 96, 128, 256)


@dataclass(frozen=True)
class Prefill:
    """What a backend returned, and which one it was.

    Attributes:
        out: like q; 0 where a query has no key, and in rows that belong to no sequence.
        lse: natural log of the sum of exponentials of scaled scores, -inf where a query has no key; None from `torch` unless
            it was asked for.
        backend: the backend that ran.
    """

    out: Float[Tensor, "B H S D"]
    lse: Float[Tensor, "B H S"] | None
    backend: Backend


def prefill(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    spans: tuple[Span, ...],
    choice: "tuple[Rule, ...] | list[HeadTiles]",
    *,
    scale: float,
    bias: Float[Tensor, "B G T"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    backend: Backend = "auto",
    need_lse: bool = False,
) -> Prefill:
    """Attention of every sequence over the tiles chosen for each query head.

    Args:
        q: queries, any strides with contiguous rows; H is a multiple of G.
        k: keys, likewise.
        v: values, likewise; rows inside a tile that is read must be finite.
        spans: where the sequences are; see `schedule.spans_of_lengths` and `schedule.spans_of_cu_seqlens`.
        choice: a tuple of one static rule per query head (the schedule is cached), or a list with the tiles of each sequence.
        scale: factor on q·k.
        bias: added to the scaled scores of a key, in fp32; log n for a pooled key that stands for n.
        softcap: no backend has it; given, it is refused.
        sinks: likewise.
        backend: see the module.
        need_lse: have the log-sum-exp from `torch` too, which is a little slower for it.

    Raises:
        UnsupportedKernelError: `backend` cannot serve this call, or none can.
        SpecError: shapes disagree.
    """
    _check(q, k, v, spans, bias)
    if softcap is not None or sinks is not None:
        name = "softcap" if softcap is not None else "attention sinks"
        raise UnsupportedKernelError(f"no kernel has {name}; leave this layer to the model's own attention.")
    masks = isinstance(choice, list) and any(one.elements is not None for one in choice)
    taken = choose_backend(q, k, v, spans, backend=backend, bias=bias is not None, masks=masks)
    lse: Tensor | None
    match taken:
        case "gluon" | "triton":
            schedule = schedule_for(q, k, spans, choice, taken)
            out, lse = run_schedule(q, k, v, schedule, scale=scale, bias=bias, kernel=taken)
        case "torch" | "reference":
            out, lse = run_per_sequence(
                q, k, v, spans, tiles_of(choice, spans), scale=scale, oracle=taken == "reference", need_lse=need_lse
            )
        case _:
            raise AssertionError(taken)
    return Prefill(out, lse, taken)


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[Span],
    *,
    backend: Backend,
    bias: bool = False,
    masks: bool = False,
) -> Backend:
    """The backend that will serve: the given one, or for `auto` the fastest that can.

    Raises:
        UnsupportedKernelError: it cannot, or none can; the message says why.
        SpecError: there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise SpecError(f"unknown backend {backend!r}.{nearest(str(backend), BACKENDS)}")
    wanted: tuple[Backend, ...] = (backend,)
    if backend == "auto":  # the interpreter serves tests that name it, not users
        wanted = ("gluon", "triton", "torch") if q.is_cuda else ("torch",)
    reasons = []
    for name in wanted:
        reason = why_not(name, q, k, v, spans[0].grid.block_tokens, bias=bias, masks=masks)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedKernelError("; ".join(reasons) + ".")


def why_not(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, block_tokens: int, *, bias: bool, masks: bool
) -> str | None:
    """Why `backend` cannot serve such a call, or None if it can."""
    strides_ok = all(x.stride(-1) == 1 for x in (q, k, v))
    match backend:
        case "gluon":
            if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9:
                return f"needs a Hopper GPU (compute capability 9.x), not {q.device}"
            if q.dtype not in (torch.bfloat16, torch.float16):
                return f"needs bf16 or fp16, not {q.dtype}"
            if q.shape[-1] not in GLUON_HEAD_DIMS:
                return f"needs head_dim in {GLUON_HEAD_DIMS}, not {q.shape[-1]}"
            if block_tokens != 64 and block_tokens % 128:
                return f"needs blocks of 64 tokens or a multiple of 128, not {block_tokens}"
            aligned = all(s > 0 and s * x.element_size() % 16 == 0 for x in (q, k, v) for s in x.stride()[:-1])
            if not strides_ok or not aligned or any(x.data_ptr() % 16 for x in (q, k, v)):
                return "needs rows that are contiguous and 16-byte aligned; call .contiguous()"
        case "triton":
            if q.device.type != "cuda" and not _interpreted():
                return f"needs a GPU, not {q.device} (TRITON_INTERPRET=1 runs it on the CPU)"
            if find_spec("triton") is None:
                return "needs triton, which is not installed"
            if block_tokens % 16:
                return f"needs blocks of a multiple of 16 tokens, not {block_tokens}"
            if not strides_ok:
                return "needs contiguous rows; call .contiguous()"
        case "torch" | "reference":
            if bias:
                return "has no per-key bias"
            if masks and backend == "torch":
                return "has no bitmaps inside tiles"
        case _:
            raise AssertionError(backend)
    return None


def schedule_for(
    q: Tensor,
    k: Tensor,
    spans: tuple[Span, ...],
    choice: "tuple[Rule, ...] | list[HeadTiles]",
    kernel: Backend,
) -> TileSchedule:
    """The tile schedule of a call: cached if the choice is by rules, built on the device if the tiles lie there."""
    shape = tile_shape(kernel, q.shape[-1], spans[0].grid.block_tokens)
    common: dict[str, Any] = {
        "num_kv_heads": k.shape[1],
        "shape": shape,
        "workers": workers_of(str(q.device)),
        "head_bytes": q.shape[-1] * q.element_size(),
        "device": str(q.device),
    }
    if isinstance(choice, list) and choice[0].choices.is_cuda:  # a dynamic rule's: the host must not wait for it
        from sparsesearch.kernels.device_schedule import build_on_device

        if any(one.elements is not None for one in choice):
            raise UnsupportedKernelError("tiles with bitmaps must be chosen on the CPU; move `choices` there.")
        return build_on_device(spans, [tiles_per_head(one) for one in choice], shape=shape, workers=common["workers"])
    if isinstance(choice, list):
        return build_schedule(spans, choice, **common)
    return schedule_of_rules(choice, spans, **common)


def tile_shape(kernel: Backend, head_dim: int, block_tokens: int) -> TileShape:
    """Tile of a kernel for a plan's blocks."""
    if kernel == "gluon":
        return TileShape(128, 64 if block_tokens == 64 or head_dim > 128 else 128)
    side = next(size for size in (128, 64, 32, 16) if block_tokens % size == 0)
    return TileShape(side, min(side, 64 if head_dim > 128 else side))


def run_schedule(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    schedule: TileSchedule,
    *,
    scale: float,
    bias: Float[Tensor, "B G T"] | None = None,
    kernel: Backend,
) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S"]]:
    """Run one kernel over a schedule that was built for its tile shape."""
    from sparsesearch.kernels.ops import tile_prefill

    result: tuple[Tensor, Tensor] = as_called(tile_prefill)(
        q,
        k,
        v,
        bias,
        schedule.masks,
        schedule.words,
        schedule.tiles,
        schedule.entries,
        schedule.bin_ptr,
        schedule.merges,
        scale,
        schedule.causal,
        schedule.shape.rows,
        schedule.shape.keys,
        schedule.num_slots,
        schedule.covered_rows == q.shape[0] * q.shape[1] * q.shape[2],
        kernel,
    )
    return result


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], bias: Tensor | None) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise SpecError(
            f"q must be [B, H, S, D] and k, v [B, G, T, D], but got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise SpecError(f"q, k and v must have one dtype, but got {q.dtype}, {k.dtype}, {v.dtype}.")
    if bias is not None and (bias.shape != k.shape[:3] or bias.dtype != torch.float32 or bias.stride(-1) != 1):
        raise SpecError(
            f"bias must be contiguous fp32 of shape {tuple(k.shape[:3])}, but got {bias.dtype} {tuple(bias.shape)}."
        )
    for span in spans:
        fits_q = span.q_offset >= 0 and span.q_offset + span.grid.q_len <= q.shape[2]
        fits_k = span.k_offset >= 0 and span.k_offset + span.grid.kv_len <= k.shape[2]
        if not fits_q or not fits_k or not 0 <= span.batch < q.shape[0]:
            raise SpecError(f"{span} must lie inside q {tuple(q.shape)} and k {tuple(k.shape)}.")


@lru_cache(maxsize=8)
def workers_of(device: str) -> Workers:
    """What a device has to run tiles on."""
    return Workers.of(device)


def _interpreted() -> bool:
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
