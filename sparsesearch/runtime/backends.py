"""Which kernel computes the chosen tiles: the one place where the runtime meets the kernels.

gluon, triton   every head and sequence of a call in one launch   (device_attention, device_decode)
torch           one sequence and one rule at a time: the CPU path, and wherever gradients are needed
reference       the oracle
"""

import logging
from functools import lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError, UnsupportedKernelError, nearest
from sparsesearch.kernels import reference
from sparsesearch.kernels.dispatch import why_not
from sparsesearch.kernels.torch_gather import tile_attention_masked, tile_attention_torch

Backend = Literal["auto", "gluon", "triton", "torch", "reference"]
Kernel = Literal["gluon", "triton"]
KERNELS: tuple[Kernel, ...] = ("gluon", "triton")

_log = logging.getLogger(__name__)


def checked_backend(name: str) -> Backend:
    """`name`, if it is a backend.

    Raises:
        SpecError: it is not.
    """
    for known in get_args(Backend):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise SpecError(f"unknown backend {name!r}.{nearest(name, get_args(Backend))}")


def serving_kernel(
    backend: Backend,
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    block_tokens: int,
) -> Kernel | None:
    """The kernel that takes the whole call, or None where it goes sequence by sequence through `attend_tiles`.

    `auto` takes the first of gluon and triton that can on a GPU, and torch on a CPU or where gradients flow (kernels have no backward).
    What it took is logged once per kind of call, at level INFO.

    Raises:
        UnsupportedKernelError: a kernel was asked for by name and cannot serve.
    """
    if backend in ("torch", "reference") or (backend == "auto" and not q.is_cuda):
        return None
    trained = _needs_gradients(q, k, v)
    wanted = KERNELS if backend == "auto" else tuple(name for name in KERNELS if name == backend)
    reasons = []
    for name in wanted:
        reason = "has no backward" if trained else why_not(name, q, k, v, block_tokens, bias=False, masks=False)
        if reason is None:
            _say(name, str(q.dtype), q.shape[-1], block_tokens, "")
            return name
        reasons.append(f"{name}: {reason}")
    if backend != "auto":
        raise UnsupportedKernelError("; ".join(reasons) + ". Use backend='auto', which takes what serves.")
    _say("torch", str(q.dtype), q.shape[-1], block_tokens, f" ({'; '.join(reasons)})")
    return None


@lru_cache(maxsize=256)  # so that each line is said once
def _say(name: str, dtype: str, head_dim: int, block_tokens: int, why: str) -> None:
    _log.info("attention of %s, head_dim %d, blocks of %d runs on %s%s", dtype, head_dim, block_tokens, name, why)


def attend_tiles(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
    backend: Backend,
) -> Float[Tensor, "*unit S D"]:
    """Attention of one sequence over the chosen tiles, by `reference` or else `torch`."""
    if backend == "reference":
        return reference.tile_attention(q, k, v, tiles, grid, scale=scale)
    attend = tile_attention_masked if masks_pay(q, k, v) else tile_attention_torch
    return attend(q, k, v, tiles, grid, scale=scale)


def masks_pay(*tensors: Tensor) -> bool:
    """Whether SDPA under element masks is faster than gathering: where gradients flow on a GPU."""
    return tensors[0].is_cuda and _needs_gradients(*tensors)


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
