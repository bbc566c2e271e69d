"""The oracle: dense softmax under the expanded mask. Every backend equals it."""

import math

import torch
from jaxtyping import Bool, Float, Int16
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.errors import SpecError
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
        case _:
            raise SpecError(
                f"tiles alone do not say what {rest!r} means; see `level_attention` and the rule's own formula."
            )


def level_attention(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    levels: Int16[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
) -> tuple[Float[Tensor, "*unit S D"], Float[Tensor, "*unit S"]]:
    """What levels mean, in fp64, with the log-sum-exp: one softmax over single keys and means.

    A tile at level 1 brings its keys; one at level n > 1 the means of each n neighbouring keys of its block, with log n added to their
    scores (of the true number, where the block ends early).
    """
    keys, values, biases, seen = (
        [k.double()],
        [v.double()],
        [torch.zeros(grid.kv_len, dtype=torch.double)],
        [expand(levels == 1, grid)],
    )
    rows = torch.arange(grid.q_start, grid.kv_len) // grid.block_tokens - grid.first_q_block
    for level in [level for level in levels.unique().tolist() if level > 1]:
        for first in range(0, grid.kv_len, level):
            group = slice(first, min(first + level, grid.kv_len))
            keys.append(k[..., group, :].double().mean(-2, keepdim=True))
            values.append(v[..., group, :].double().mean(-2, keepdim=True))
            biases.append(torch.tensor([math.log(group.stop - first)], dtype=torch.double))
            seen.append((levels == level)[..., rows, first // grid.block_tokens, None])
    shape = (*levels.shape[:-2], grid.q_len)
    mask = torch.cat([part.expand(*shape, part.shape[-1]) for part in seen], -1).to(q.device)
    scores = q.double() @ torch.cat(keys, -2).transpose(-1, -2) * scale + torch.cat(biases).to(q.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)
    return weights @ torch.cat(values, -2), lse


def running_mean(v: Float[Tensor, "*unit T D"], grid: BlockGrid) -> Float[Tensor, "*unit S D"]:
    """Mean of the values each query may see, in fp64."""
    if not grid.causal:
        return v.double().mean(-2, keepdim=True).expand(*v.shape[:-2], grid.q_len, v.shape[-1])
    counts = torch.arange(1, grid.kv_len + 1, device=v.device, dtype=torch.float64)[:, None]
    return (v.double().cumsum(-2) / counts)[..., grid.q_start :, :]
