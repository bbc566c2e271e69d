"""What every candidate would change in every head of one full (not causal) attention call.

As in `profiling.tile_scores`, a choice of tiles is a 0/1 combination of tile numerators and denominators that are computed once per query
block; so a hundred candidates cost a few dense attentions, exactly, on any device. Differs: full attention, any number of sequences, and
memory bounded whatever the length: heads and query blocks are taken in pieces. Mean keys in place of the other tiles are sums of the same kind.
"""

from collections.abc import Sequence
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
    terms: Sequence[int | None] | None = None,
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
        terms: per candidate, whether means stand for its other tiles: None no, 0 means alone, 1 with the first-order term; see
            `rules.taylor_rest`. None by default.
        real_tokens: what stands behind so many tokens is padding, neither seen nor scored; none by default.
    """
    units, length, size = q.shape
    tails = [] if terms is None else [index for index, order in enumerate(terms) if order is not None]
    firsts = torch.tensor([float(terms[index] or 0) for index in tails] if terms else [], device=q.device)
    blocks, tokens = -(-length // block_tokens), real_tokens or length
    chosen = torch.arange(blocks, device=q.device) if query_blocks is None else query_blocks.to(q.device)
    error = torch.zeros(units, tiles.shape[1], device=q.device)
    norm = torch.zeros(units, device=q.device)
    row_bytes = 4.0 * block_tokens * (size * (blocks + 3 * tiles.shape[1] + 3 * len(tails)) + 2 * blocks * len(tails))
    step = max(1, min(units, int(PIECE_BYTES / row_bytes)))
    rows = max(1, int(PIECE_BYTES / (row_bytes * step)))
    for first in range(0, units, step):
        piece = slice(first, first + step)
        keys, values = (_padded(x[piece].float(), blocks * block_tokens) for x in (k, v))
        queries = _padded(q[piece].float(), blocks * block_tokens).unflatten(1, (blocks, block_tokens)) * scale
        means = _Means.of(keys, values, tokens, block_tokens) if tails else None
        for place in chosen.split(rows):
            real = place[:, None] * block_tokens + torch.arange(block_tokens, device=q.device) < tokens
            numerator, denominator, top = _tile_sums(queries[:, place], keys, values, tokens)
            dense = numerator.sum(2) / denominator.sum(2)[..., None]
            weight = tiles[piece][:, :, place].transpose(1, 2).to(numerator.dtype)
            kept = weight @ denominator
            output = (weight @ numerator.flatten(3)).unflatten(3, numerator.shape[3:])
            if means is not None:
                more, mass, slope = means.tail(queries[:, place], top, 1 - weight[:, :, tails])
                output[:, :, tails] += more
                kept[:, :, tails] += mass
            output = output / kept[..., None].clamp(min=1e-30)
            if means is not None:
                share = (mass / kept[:, :, tails].clamp(min=1e-30))[..., None]
                output[:, :, tails] += firsts[:, None, None] * share * slope[:, :, None]
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
            weight, _ = _weights(queries[:, place], keys, tokens)
            share = weight.unflatten(-1, (blocks, block_tokens)).sum(-1) / weight.sum(-1, keepdim=True)
            mass[piece, place] = (share * real[..., None]).sum(2)
    return mass


@dataclass(frozen=True)
class _Means:
    """Mean key and value of every block, how many tokens they stand for, and H/T of `rules.taylor_rest`."""

    keys: Float[Tensor, "U N D"]
    values: Float[Tensor, "U N D"]
    counts: Float[Tensor, " N"]
    spread: Float[Tensor, "U D D"]

    @classmethod
    def of(cls, keys: Float[Tensor, "U P D"], values: Float[Tensor, "U P D"], tokens: int, block: int) -> "_Means":
        """Of the first `tokens` keys and values; what stands behind them is padding, whatever it holds."""
        blocks = keys.shape[1] // block
        counts = (tokens - torch.arange(blocks, device=keys.device) * block).clamp(0, block).float()
        real = (torch.arange(keys.shape[1], device=keys.device) < tokens)[:, None]
        keys, values = keys * real, values * real
        mean_keys, mean_values = (
            x.unflatten(1, (blocks, block)).sum(2) / counts.clamp(min=1)[:, None] for x in (keys, values)
        )
        away = (keys - mean_keys.repeat_interleave(block, 1))[:, :tokens]
        return cls(mean_keys, mean_values, counts, away.transpose(1, 2) @ values[:, :tokens] / tokens)

    def tail(
        self, queries: Float[Tensor, "U R S D"], top: Float[Tensor, "U R S 1"], rest: Float[Tensor, "U R c N"]
    ) -> tuple[Float[Tensor, "U R c S D"], Float[Tensor, "U R c S"], Float[Tensor, "U R S D"]]:
        """Numerator and mass of the means that each candidate takes, under the queries' maxima, and qᵀH/T."""
        scores = (queries.flatten(1, 2) @ self.keys.transpose(1, 2)).unflatten(1, queries.shape[1:3])
        weight = (scores - top).exp() * self.counts
        taken = weight[:, :, None] * rest[:, :, :, None]
        numerator = (taken.flatten(1, 3) @ self.values).unflatten(1, taken.shape[1:4])
        first = (queries.flatten(1, 2) @ self.spread).unflatten(1, queries.shape[1:3])
        return numerator, taken.sum(-1), first


def _tile_sums(queries: Tensor, keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator [U, R, N, S, D] and denominator [U, R, N, S] of every tile, under each query's own maximum, and that [U, R, S, 1]."""
    weight, top = _weights(queries, keys, tokens)
    block = queries.shape[2]
    tiled = weight.unflatten(-1, (-1, block)).permute(0, 3, 1, 2, 4)  # [U, N, R, S, block]
    summed = tiled.flatten(2, 3) @ values.unflatten(1, (-1, block))
    numerator = summed.unflatten(2, tiled.shape[2:4]).transpose(1, 2)
    return numerator, tiled.sum(-1).transpose(1, 2), top


def _weights(
    queries: Float[Tensor, "U R S D"], keys: Float[Tensor, "U T D"], tokens: int
) -> tuple[Float[Tensor, "U R S T"], Float[Tensor, "U R S 1"]]:
    """exp(score - row maximum), 0 for keys that are padding; and the maxima."""
    scores = (queries.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, queries.shape[1:3])
    if keys.shape[1] > tokens:
        scores[..., tokens:] = -torch.inf
    top = scores.amax(-1, keepdim=True)
    return (scores - top).exp_(), top


def _projected(delta: Float[Tensor, "U C R S D"], gram: Float[Tensor, "U D D"]) -> Float[Tensor, "U C"]:
    """Σ |W_o δ|²."""
    flat = delta.flatten(1, -2)
    return ((flat @ gram) * flat).sum(-1).view(delta.shape[0], delta.shape[1], -1).sum(-1)


def _padded(x: Float[Tensor, "U T D"], tokens: int) -> Float[Tensor, "U P D"]:
    return F.pad(x, (0, 0, 0, tokens - x.shape[1])) if x.shape[1] < tokens else x
