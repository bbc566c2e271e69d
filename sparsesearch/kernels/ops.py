"""The kernels as PyTorch operators: opaque to torch.compile, with shapes for tracing, safe in CUDA graphs (no host synchronisation)."""

import torch
from torch import Tensor


@torch.library.custom_op("sparsesearch::tile_prefill", mutates_args=())
def tile_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    masks: Tensor | None,
    words: Tensor | None,
    tiles: Tensor,
    entries: Tensor,
    bin_ptr: Tensor,
    merges: Tensor,
    scale: float,
    causal: bool,
    rows: int,
    keys: int,
    num_slots: int,
    covered: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Attention over a tile schedule, by kernel "gluon" or "triton": output like q, and fp32 log-sum-exp [B, H, S].

    The tensors and numbers are those of `dispatch.prefill` and `schedule.TileSchedule`. `covered` says that every row of the output is
    written by some tile; otherwise the rest is 0, with LSE -inf.
    """
    out = torch.empty_like(q) if covered else torch.zeros_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not covered:
        lse.fill_(-torch.inf)
    if bin_ptr.numel() < 2 or tiles.shape[0] == 0:
        return out, lse
    from sparsesearch.kernels import triton_prefill

    # a cut tile's pieces; merged in fp32
    parts = q.new_empty(num_slots, rows, triton_prefill.padded_head_dim(q.shape[-1]))
    lse_parts = q.new_empty(num_slots, rows, dtype=torch.float32)
    with torch.cuda.device(q.get_device()):  # Triton launches on the current device
        match kernel:
            case "gluon":
                from sparsesearch.kernels import hopper_prefill

                config = hopper_prefill.CONFIGS[q.shape[-1], keys]
                hopper_prefill.launch(
                    q, k, v, out, lse, parts, lse_parts, bias, masks, words, tiles, entries, bin_ptr, scale=scale, causal=causal, config=config
                )  # fmt: skip
            case "triton":
                triton_prefill.launch(
                    q, k, v, out, lse, parts, lse_parts, bias, masks, words, tiles, entries, bin_ptr, scale=scale, causal=causal, rows=rows, keys=keys
                )  # fmt: skip
            case _:
                raise AssertionError(kernel)
        triton_prefill.launch_merge(out, lse, parts, lse_parts, merges)
    return out, lse


@tile_prefill.register_fake
def _tile_prefill_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    masks: Tensor | None,
    words: Tensor | None,
    tiles: Tensor,
    entries: Tensor,
    bin_ptr: Tensor,
    merges: Tensor,
    scale: float,
    causal: bool,
    rows: int,
    keys: int,
    num_slots: int,
    covered: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparsesearch::ragged_decode", mutates_args=())
def ragged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_start: Tensor,
    kv_lens: Tensor,
    table: Tensor | None,
    scale: float,
    page_tokens: int,
) -> tuple[Tensor, Tensor]:
    """One query per head over ragged keys; `decode.ragged_decode` is its caller and describes the arguments."""
    from sparsesearch.kernels import triton_decode
    from sparsesearch.kernels.triton_skinny import starts_early

    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    sms = (
        torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    )  # the interpreter's, for tests
    workers = sms * triton_decode.WORKERS_PER_SM
    with torch.cuda.device(q.get_device()):
        triton_decode.launch(
            q, k, v, kv_start, kv_lens, table, out, lse,
            scale=scale, page_tokens=page_tokens, workers=workers, early=starts_early(q),
        )  # fmt: skip
    return out, lse


@ragged_decode.register_fake
def _ragged_decode_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_start: Tensor,
    kv_lens: Tensor,
    table: Tensor | None,
    scale: float,
    page_tokens: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
