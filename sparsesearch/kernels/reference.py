"""The oracle: dense softmax under the expanded mask. Every backend equals it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.rules.base import Rest


def masked_attention(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    mask: Bool[Tensor, "*#unit S T"],
    *,
    scale: float,
) -> tuple[Float[Tensor, "*unit S D"], Float[Tensor, "*unit S"]]:
    """Softmax attention over the keys that `mask` allows, in fp64 (or in q's dtype if that is fp64 already).

    A query with no key gives 0 and LSE = -inf, never NaN.

    Returns:
        Output in q's dtype, and the natural log of the sum of exponentials of the scaled scores in fp64.
    """
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)
    return (weights @ v.double()).to(q.dtype), lse


def tile_attention(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
    rest: Rest = "drop",
) -> Float[Tensor, "*unit S D"]:
    """What a rule means: attention over its tiles, or what replaces the output when it computes none."""
    match rest:
        case "drop":
            return masked_attention(q, k, v, expand(tiles, grid), scale=scale)[0]
        case "zero":
            return torch.zeros_like(q)
        case "mean_value":
            return running_mean(v, grid).to(q.dtype)


def running_mean(v: Float[Tensor, "*unit T D"], grid: BlockGrid) -> Float[Tensor, "*unit S D"]:
    """Mean of the values each query may see, in fp64."""
    if not grid.causal:
        return v.double().mean(-2, keepdim=True).expand(*v.shape[:-2], grid.q_len, v.shape[-1])
    counts = torch.arange(1, grid.kv_len + 1, device=v.device, dtype=torch.float64)[:, None]
    return (v.double().cumsum(-2) / counts)[..., grid.q_start :, :]
