"""What every candidate would change in every head of one full (not causal) attention call.

As in `profiling.tile_scores`, a choice of tiles is a 0/1 combination of tile numerators and denominators that are computed once per query
block; so a hundred candidates cost a few dense attentions, exactly, on any device. Differs: full attention, any number of sequences, and
memory bounded whatever the length: heads and query blocks are taken in pieces.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

PIECE_BYTES = 512e6


@dataclass(frozen=True)
class HeadErrors:
    """Sums over the scored queries.

    Attributes:
        error: |W_o δ|² of each candidate.
        norm: |W_o o|² of dense attention.
    """

    error: Float[Tensor, "U C"]
    norm: Float[Tensor, " U"]


def tile_errors(
    q: Float[Tensor, "U T D"],
    k: Float[Tensor, "U T D"],
    v: Float[Tensor, "U T D"],
    tiles: Bool[Tensor, "U C M N"],
    gram: Float[Tensor, "U D D"],
    *,
    scale: float,
    block_tokens: int,
    query_blocks: Int[Tensor, " Q"] | None = None,
    real_tokens: int | None = None,
) -> HeadErrors:
    """Score all candidates of U (sequence, head) pairs, all in one order of tokens.

    Args:
        q: queries.
        k: keys.
        v: values.
        tiles: what each candidate computes; a row without tiles gives 0.
        gram: W_oᵀ W_o of each pair's slice of the output projection.
        scale: factor on q·k.
        block_tokens: side of a tile.
        query_blocks: score only these; all by default.
        real_tokens: what stands behind so many tokens is padding, neither seen nor scored; none by default.
    """
    units, length, size = q.shape
    blocks, tokens = -(-length // block_tokens), real_tokens or length
    chosen = torch.arange(blocks, device=q.device) if query_blocks is None else query_blocks.to(q.device)
    error = torch.zeros(units, tiles.shape[1], device=q.device)
    norm = torch.zeros(units, device=q.device)
    row_bytes = 4.0 * block_tokens * size * (blocks + 3 * tiles.shape[1])
    step = max(1, min(units, int(PIECE_BYTES / row_bytes)))
    rows = max(1, int(PIECE_BYTES / (row_bytes * step)))
    for first in range(0, units, step):
        piece = slice(first, first + step)
        keys, values = (_padded(x[piece].float(), blocks * block_tokens) for x in (k, v))
        queries = _padded(q[piece].float(), blocks * block_tokens).unflatten(1, (blocks, block_tokens)) * scale
        for place in chosen.split(rows):
            real = place[:, None] * block_tokens + torch.arange(block_tokens, device=q.device) < tokens
            numerator, denominator = _tile_sums(queries[:, place], keys, values, tokens)
            dense = numerator.sum(2) / denominator.sum(2)[..., None]
            weight = tiles[piece][:, :, place].transpose(1, 2).to(numerator.dtype)
            kept = (weight @ denominator)[..., None].clamp(min=1e-30)
            output = (weight @ numerator.flatten(3)).unflatten(3, numerator.shape[3:]) / kept
            delta = (output - dense[:, :, None]) * real[:, None, :, None]
            error[piece] += _projected(delta.transpose(1, 2), gram[piece])
            norm[piece] += _projected((dense * real[..., None])[:, None], gram[piece])[:, 0]
    return HeadErrors(error, norm)


def tile_masses(
    q: Float[Tensor, "U T D"],
    k: Float[Tensor, "U T D"],
    *,
    scale: float,
    block_tokens: int,
    real_tokens: int | None = None,
) -> Float[Tensor, "U N N"]:
    """Attention mass per tile: each row of tiles sums to the number of (real) queries in it."""
    units, length, _size = q.shape
    blocks, tokens = -(-length // block_tokens), real_tokens or length
    mass = torch.zeros(units, blocks, blocks, device=q.device)
    step = max(1, min(units, int(PIECE_BYTES / (8.0 * block_tokens * length))))
    rows = max(1, int(PIECE_BYTES / (8.0 * block_tokens * length * step)))
    for first in range(0, units, step):
        piece = slice(first, first + step)
        keys = _padded(k[piece].float(), blocks * block_tokens)
        queries = _padded(q[piece].float(), blocks * block_tokens).unflatten(1, (blocks, block_tokens)) * scale
        for place in torch.arange(blocks, device=q.device).split(rows):
            real = place[:, None] * block_tokens + torch.arange(block_tokens, device=q.device) < tokens
            weight = _weights(queries[:, place], keys, tokens)
            share = weight.unflatten(-1, (blocks, block_tokens)).sum(-1) / weight.sum(-1, keepdim=True)
            mass[piece, place] = (share * real[..., None]).sum(2)
    return mass


def _tile_sums(queries: Tensor, keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Numerator [U, R, N, S, D] and denominator [U, R, N, S] of every tile, under each query's own maximum."""
    weight = _weights(queries, keys, tokens)
    block = queries.shape[2]
    tiled = weight.unflatten(-1, (-1, block)).permute(0, 3, 1, 2, 4)  # [U, N, R, S, block]
    summed = tiled.flatten(2, 3) @ values.unflatten(1, (-1, block))
    numerator = summed.unflatten(2, tiled.shape[2:4]).transpose(1, 2)
    return numerator, tiled.sum(-1).transpose(1, 2)


def _weights(queries: Float[Tensor, "U R S D"], keys: Float[Tensor, "U T D"], tokens: int) -> Float[Tensor, "U R S T"]:
    """exp(score - row maximum); 0 for keys that are padding."""
    scores = (queries.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, queries.shape[1:3])
    if keys.shape[1] > tokens:
        scores[..., tokens:] = -torch.inf
    weights: Tensor = (scores - scores.amax(-1, keepdim=True)).exp_()
    return weights


def _projected(delta: Float[Tensor, "U C R S D"], gram: Float[Tensor, "U D D"]) -> Float[Tensor, "U C"]:
    """Σ |W_o δ|²."""
    flat = delta.flatten(1, -2)
    return ((flat @ gram) * flat).sum(-1).view(delta.shape[0], delta.shape[1], -1).sum(-1)


def _padded(x: Float[Tensor, "U T D"], tokens: int) -> Float[Tensor, "U P D"]:
    return F.pad(x, (0, 0, 0, tokens - x.shape[1])) if x.shape[1] < tokens else x
