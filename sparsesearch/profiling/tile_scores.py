"""What every candidate would change in every head of one layer, without running attention once per candidate.

Attention over any choice of tiles is a ratio of sums over tiles: with w = exp(score - row maximum),

    O_r = Σ_{j in r} (w_j V_j) / Σ_{j in r} (w_j 1).

So each strip of queries computes its tiles' numerators and denominators once, and a candidate is a 0/1 combination of them: a product of a
[candidates x tiles] matrix. Forty candidates together cost about as much as one dense attention, and nothing larger than one strip of
block_tokens queries (several such strips on a GPU, which wants large products) against all keys is ever held.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules import Rule

_GROUP_NUMBERS = 1 << 27
"""fp32 numbers of the largest tensor that a group of strips makes, half a GiB; some ten of them live at once."""
LATE_SHARE = 0.125
"""Of a sequence's queries, the share that stands for decoded ones: their context is nearly the whole prompt."""


@dataclass(frozen=True)
class LayerInput:
    """One layer's tensors for one sequence; keys and values repeated to the query heads.

    Attributes:
        probes: gradients of R scalar losses; each error's product with them is kept signed.
        answer: gradient of the answer log-odds.
        answer_ce: gradient of the answer cross-entropy.
        projection_gram: W_oᵀ W_o of each head's slice of the output projection; errors are measured behind it.
        generated: queries that count as decoding for the answer: those that hold an answer token; None for the late ones.
    """

    q: Float[Tensor, "H S D"]
    k: Float[Tensor, "H S D"]
    v: Float[Tensor, "H S D"]
    probes: Float[Tensor, "R H S D"]
    answer: Float[Tensor, "H S D"]
    answer_ce: Float[Tensor, "H S D"]
    projection_gram: Float[Tensor, "H D D"]
    sliding_window: int | None
    num_kv_heads: int
    generated: Bool[Tensor, " S"] | None = None


@dataclass
class LayerScores:
    """Sums over one sequence, per head (H) or KV group (G) and candidate (C).

    Attributes:
        fisher: Σ_n g_n·δ_n per probe; signed, so that heads of a group, or of a plan, can be added before squaring.
        answer: Σ_n (g_n·δ_n)² of the log-odds gradient.
        answer_group: the same with the heads of a KV group added inside the square.
        output_error: Σ_n |W_o δ_n|².
        output_norm: Σ_n |W_o o_n|², the scale of the above.
        kept_mass: attention mass inside the chosen tiles, averaged over queries.
        tiles: computed tiles.
        mass: attention mass per tile.
        influence: MoA's first-order influence per tile, of the answer cross-entropy.
        late_fisher: the part of `fisher` from the late queries, the last LATE_SHARE of the sequence: what decoding there adds.
        decode_answer: the part of `answer` from the generated queries.
        decode_answer_group: the part of `answer_group` from the generated queries.
    """

    fisher: Float[Tensor, "R H C"]
    answer: Float[Tensor, "H C"]
    answer_group: Float[Tensor, "G C"]
    output_error: Float[Tensor, "H C"]
    output_norm: Float[Tensor, " H"]
    kept_mass: Float[Tensor, "H C"]
    tiles: Float[Tensor, "H C"]
    mass: Float[Tensor, "H N N"]
    influence: Float[Tensor, "H N N"]
    late_fisher: Float[Tensor, "R H C"]
    decode_answer: Float[Tensor, "H C"]
    decode_answer_group: Float[Tensor, "G C"]


@dataclass(frozen=True)
class _Strips:
    """Tile sums of R rows of S = block_tokens queries against the n key blocks that the last of them can see; all 0 beyond the sequence."""

    numerator: Float[Tensor, "H R n S D"]
    denominator: Float[Tensor, "H R n S"]
    influence: Float[Tensor, "H R n"]

    @property
    def dense(self) -> Float[Tensor, "H T D"]:
        """Dense attention of the T = R·S queries."""
        output = self.numerator.sum(2) / self.denominator.sum(2)[..., None].clamp(min=1e-30)
        return output.flatten(1, 2)

    def under(self, weight: Float[Tensor, "H R C n"]) -> tuple[Float[Tensor, "H C T D"], Float[Tensor, "H C R S"]]:
        """Attention of C choices of tiles, and the denominators they keep."""
        kept = weight @ self.denominator
        output = (weight @ self.numerator.flatten(3)).unflatten(3, self.numerator.shape[3:])
        output /= kept.clamp(min=1e-30)[..., None]
        return output.transpose(1, 2).flatten(2, 3), kept.transpose(1, 2)

    def along(
        self,
        gradients: Float[Tensor, "K H T D"],
        weight: Float[Tensor, "H R C n"],
        kept: Float[Tensor, "H C R S"],
    ) -> Float[Tensor, "H C K T"]:
        """Σ_d g·O of what `under` gives, from one number per tile and query: D times less to move than the outputs."""
        rows = gradients.unflatten(2, kept.shape[2:])
        of_tiles = torch.einsum("hrnsd,khrsd->hrnks", self.numerator, rows)
        products = (weight @ of_tiles.flatten(3)).unflatten(3, of_tiles.shape[3:])
        products /= kept.transpose(1, 2).clamp(min=1e-30)[:, :, :, None]
        by_head: Tensor = products.permute(0, 2, 3, 1, 4).flatten(3, 4)
        return by_head


def late_from(length: int) -> int:
    """The first late query of a sequence."""
    return length - max(1, round(LATE_SHARE * length))


@lru_cache(maxsize=1 << 14)
def static_tiles(rule: Rule, grid: BlockGrid, device: torch.device) -> Bool[Tensor, "N N"]:
    """A static rule's tiles on a device; the same for every layer and sequence. Every head has bitmaps of its own."""
    return rule.select(grid).to(device)


def choose_tiles(rules: Sequence[Rule], layer: LayerInput, grid: BlockGrid) -> Bool[Tensor, "H C N N"]:
    """Each candidate's tiles in each head."""
    heads, device = layer.q.shape[0], layer.q.device
    votes: dict[tuple[str, Hashable], tuple[Tensor, ...]] = {}

    def chosen(rule: Rule) -> Bool[Tensor, "*#H N N"]:
        if not rule.dynamic:
            return static_tiles(rule, grid, device)
        if rule.ballot is None:
            return rule.select(grid, layer.q, layer.k).to(device)
        ballot = rule.kind_name(), rule.ballot
        if ballot not in votes:
            votes[ballot] = rule.votes(grid, layer.q, layer.k)
        return rule.chosen(grid, *votes[ballot])

    return torch.stack([mask.expand(heads, *mask.shape[-2:]) for mask in map(chosen, rules)], 1)


def score_layer(
    rules: Sequence[Rule],
    tiles: Bool[Tensor, "H C N N"],
    layer: LayerInput,
    grid: BlockGrid,
    current: Int[Tensor, " H"] | None = None,
) -> LayerScores:
    """Score all candidates of one layer on one sequence.

    Args:
        rules: C candidates, for what stands in for the tiles they drop.
        tiles: what each of them computes in each head.
        layer: the sequence's tensors.
        grid: the whole sequence against itself.
        current: which candidate each head runs now; errors are measured against its output. None: against dense.
    """
    heads, _, _ = layer.q.shape
    num_probes, count = layer.probes.shape[0], len(rules)
    zeros = partial(torch.zeros, device=layer.q.device)
    scores = LayerScores(
        fisher=zeros(num_probes, heads, count),
        answer=zeros(heads, count),
        answer_group=zeros(layer.num_kv_heads, count),
        output_error=zeros(heads, count),
        output_norm=zeros(heads),
        kept_mass=zeros(heads, count),
        tiles=tiles.sum((-1, -2)).float(),
        mass=zeros(heads, grid.num_k_blocks, grid.num_k_blocks),
        influence=zeros(heads, grid.num_k_blocks, grid.num_k_blocks),
        late_fisher=zeros(num_probes, heads, count),
        decode_answer=zeros(heads, count),
        decode_answer_group=zeros(layer.num_kv_heads, count),
    )
    replaced = {rest: [i for i, rule in enumerate(rules) if rule.rest == rest] for rest in ("zero", "mean_value")}
    positions = torch.arange(1, grid.kv_len + 1, device=layer.v.device, dtype=torch.float64)
    mean_value = (layer.v.double().cumsum(1) / positions[:, None]).float()
    for rows in _row_groups(grid, layer.v):
        span = slice(rows.start * grid.block_tokens, min(rows.stop * grid.block_tokens, grid.kv_len))
        inside = span.stop - span.start
        strips = _strips(layer, grid, rows)
        weight = tiles[:, :, rows, : rows.stop].float().transpose(1, 2)
        output, kept = strips.under(weight)
        gradients = torch.cat([layer.probes, layer.answer[None]])[:, :, span].float()
        padded = torch.nn.functional.pad(gradients, (0, 0, 0, strips.denominator.shape[1] * grid.block_tokens - inside))
        products = strips.along(padded, weight, kept)[..., :inside]
        output, dense = output[:, :, :inside], strips.dense[:, :inside]
        for rest, stand_in in (("zero", torch.zeros_like(dense)), ("mean_value", mean_value[:, span])):
            output[:, replaced[rest]] = stand_in[:, None]
            products[:, replaced[rest]] = _along(gradients, stand_in)[:, None]
        if current is None:
            products -= _along(gradients, dense)[:, None]
            output -= dense[:, None]
        else:
            own = torch.arange(heads, device=output.device), current
            products -= products[own][:, None]
            output -= output[own][:, None]
        _accumulate_products(scores, products, layer, span)
        _accumulate_errors(scores, output, dense, layer)
        total = strips.denominator.sum(2, keepdim=True).clamp(min=1e-30)
        scores.kept_mass += (kept / total.transpose(1, 2)).sum((-1, -2)) / grid.q_len
        scores.mass[:, rows, : rows.stop] = (strips.denominator / total).sum(-1)
        scores.influence[:, rows, : rows.stop] = strips.influence
    return scores


def tile_mass(
    qk: tuple[Float[Tensor, "H S D"], Float[Tensor, "H S D"]], grid: BlockGrid, sliding_window: int | None
) -> Float[Tensor, "H N N"]:
    """Attention mass per tile: each row of tiles sums to the number of queries in it."""
    q, k = qk
    mass = q.new_zeros(q.shape[0], grid.num_k_blocks, grid.num_k_blocks, dtype=torch.float32)
    for rows in _row_groups(grid, q):
        weight = _weights(q, k, rows, grid.block_tokens, sliding_window)
        attention = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        mass[:, rows, : rows.stop] = _tiled(attention, rows.stop, grid.block_tokens).sum((2, 4))
    return mass


def _row_groups(grid: BlockGrid, like: Float[Tensor, "H S D"]) -> Iterator[slice]:
    """Rows of query blocks that are scored together: one on a CPU, whose caches hold no more; elsewhere as many as the budget allows."""
    per_row = like.shape[0] * like.shape[2] * grid.kv_len
    size = 1 if like.device.type == "cpu" else max(1, _GROUP_NUMBERS // per_row)
    return (slice(row, min(row + size, grid.num_q_blocks)) for row in range(0, grid.num_q_blocks, size))


def _tiled(x: Float[Tensor, "H T K"], num_k_blocks: int, block: int) -> Float[Tensor, "H R S n B"]:
    """Rows of queries and blocks of keys; what is missing of the last block is 0."""
    padded = torch.nn.functional.pad(x, (0, num_k_blocks * block - x.shape[-1]))
    tiled: Tensor = padded.unflatten(-1, (num_k_blocks, block)).unflatten(1, (-1, block))
    return tiled


def _along(gradients: Float[Tensor, "K H T D"], output: Float[Tensor, "H T D"]) -> Float[Tensor, "H K T"]:
    """Σ_d g·O of one output."""
    return torch.einsum("khtd,htd->hkt", gradients, output)


def _accumulate_products(
    scores: LayerScores, products: Float[Tensor, "H C K T"], layer: LayerInput, span: slice
) -> None:
    """Add the products of one strip's errors with the probes and, last, with the answer's gradient."""
    late = max(0, late_from(layer.v.shape[1]) - span.start)
    probes, answer = products[:, :, :-1], products[:, :, -1]
    scores.fisher += probes.sum(-1).permute(2, 0, 1)
    scores.late_fisher += probes[..., late:].sum(-1).permute(2, 0, 1)
    squares = answer.square(), answer.unflatten(0, (layer.num_kv_heads, -1)).sum(1).square()
    scores.answer += squares[0].sum(-1)
    scores.answer_group += squares[1].sum(-1)
    if layer.generated is None:
        generated = [square[..., late:].sum(-1) for square in squares]
    else:
        generated = [square @ layer.generated[span].float() for square in squares]
    scores.decode_answer += generated[0]
    scores.decode_answer_group += generated[1]


def _accumulate_errors(
    scores: LayerScores, delta: Float[Tensor, "H C T D"], dense: Float[Tensor, "H T D"], layer: LayerInput
) -> None:
    """Add the energies of one strip's errors and outputs behind the projection."""
    flat = delta.flatten(1, 2)
    behind = flat @ layer.projection_gram
    scores.output_error += behind.mul_(flat).sum(-1).unflatten(1, delta.shape[1:3]).sum(-1)
    scores.output_norm += ((dense @ layer.projection_gram) * dense).sum((-1, -2))


def _strips(layer: LayerInput, grid: BlockGrid, rows: slice) -> _Strips:
    """Tile sums of the queries in some rows."""
    block, blocks = grid.block_tokens, rows.stop
    seen = min(blocks * block, grid.kv_len)
    weight = _weights(layer.q, layer.k, rows, block, layer.sliding_window)
    value = layer.v[:, :seen].float()
    gradient = _rows_of(layer.answer_ce, rows, block)
    tiled = _tiled(weight, blocks, block)  # H R S n B
    by_block = tiled.flatten(1, 2).transpose(1, 2)
    values = torch.nn.functional.pad(value, (0, 0, 0, blocks * block - seen)).unflatten(1, (blocks, block))
    return _Strips(
        numerator=(by_block @ values).unflatten(2, (-1, block)).transpose(1, 2).contiguous(),
        denominator=tiled.sum(-1).transpose(2, 3),
        influence=_tiled(_influence(weight, gradient, value), blocks, block).sum((2, 4)),
    )


def _rows_of(x: Float[Tensor, "H S D"], rows: slice, block: int) -> Float[Tensor, "H T D"]:
    """The queries of some rows in fp32, with zeros after the end of the sequence."""
    found = x[:, rows.start * block : rows.stop * block].float()
    return torch.nn.functional.pad(found, (0, 0, 0, (rows.stop - rows.start) * block - found.shape[1]))


def _weights(
    q: Float[Tensor, "H S D"], k: Float[Tensor, "H S D"], rows: slice, block: int, sliding_window: int | None
) -> Float[Tensor, "H T K"]:
    """exp(score - row maximum) of the queries in some rows against the keys that the last of them can see; 0 beyond the sequence."""
    length = q.shape[1]
    logits = _rows_of(q, rows, block) @ k[:, : min(rows.stop * block, length)].float().transpose(1, 2)
    q_pos = torch.arange(rows.start * block, rows.stop * block, device=logits.device)[:, None]
    k_pos = torch.arange(logits.shape[-1], device=logits.device)
    hidden = k_pos > q_pos
    if sliding_window is not None:
        hidden |= (q_pos - k_pos >= sliding_window) & (q_pos < length)
    logits = logits.masked_fill_(hidden, -torch.inf)
    weight = (logits - logits.amax(-1, keepdim=True)).exp_()
    return weight if rows.stop * block <= length else weight * (q_pos < length)


def _influence(
    weight: Float[Tensor, "H S T"], gradient: Float[Tensor, "H S D"], value: Float[Tensor, "H T D"]
) -> Float[Tensor, "H S T"]:
    """First-order loss change of deleting each attention entry, the row renormalised: -A/(1-A)·(G - Σ G·A), G = ∂L/∂A = g·v.

    Source: Fu et al. 2024, MoA, arXiv:2406.14909, equation 3.
    """
    attention = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    slope = gradient @ value.transpose(1, 2)
    centred = slope - (slope * attention).sum(-1, keepdim=True)
    # A row with a single key cannot lose it; 1 - A is kept away from 0 as in the published code.
    return -attention / (1 - attention).clamp(min=1e-6) * centred * (attention < 1 - 1e-6)
