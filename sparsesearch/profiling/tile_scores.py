"""What every candidate would change in every head of one layer, without running attention once per candidate.

Attention over any choice of tiles is a ratio of sums over tiles: with w = exp(score - row maximum),

    O_r = Σ_{j in r} (w_j V_j) / Σ_{j in r} (w_j 1).

So each strip of queries computes its tiles' numerators and denominators once, and a candidate is a 0/1 combination of them: a product of a
[candidates x tiles] matrix. Forty candidates together cost about as much as one dense attention, and nothing larger than one strip of
block_tokens queries (several such strips on a GPU, which wants large products) against all keys is ever held.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.profiling.layer_scores import LayerInput, LayerScores, add_errors, add_products
from sparsesearch.profiling.step_outputs import chooses_steps, decoded_queries, step_outputs
from sparsesearch.rules import Rule

_GROUP_NUMBERS = 1 << 27
"""fp32 numbers of the largest tensor that a group of strips makes, half a GiB; some ten of them live at once."""


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

    def sums_of(self, queries: Int[Tensor, " Q"]) -> tuple[Float[Tensor, "H n Q D"], Float[Tensor, "H n Q"]]:
        """Numerators and denominators of some of the queries, tile by tile."""
        numerator, denominator = (x.transpose(1, 2).flatten(2, 3) for x in (self.numerator, self.denominator))
        return numerator.index_select(2, queries), denominator.index_select(2, queries)

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
    scores = LayerScores.zeros(layer, len(rules), grid.num_k_blocks)
    scores.tiles += tiles.sum((-1, -2))
    replaced = {rest: [i for i, rule in enumerate(rules) if rule.rest == rest] for rest in ("zero", "mean_value")}
    stepping = [i for i, rule in enumerate(rules) if chooses_steps(rule, grid)]
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
        as_rows = products, output
        decoded = as_rows
        if stepping and len(queries := decoded_queries(layer, span)):
            stepped = step_outputs(
                [rules[i] for i in stepping], layer, grid, queries, *strips.sums_of(queries - span.start)
            )
            decoded = _replaced(as_rows, stepped, stepping, gradients, queries - span.start)
        for own_products, own_output in (as_rows, decoded) if decoded is not as_rows else (as_rows,):
            _subtract(own_products, own_output, gradients, dense, current)
        add_products(scores, products, decoded[0], layer, span)
        add_errors(scores, output, decoded[1], stepping, dense, layer, span)
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


def _replaced(
    of_rows: tuple[Float[Tensor, "H C K T"], Float[Tensor, "H C T D"]],
    stepped: Float[Tensor, "H c Q D"],
    columns: Sequence[int],
    gradients: Float[Tensor, "K H T D"],
    queries: Int[Tensor, " Q"],
) -> tuple[Float[Tensor, "H C K T"], Float[Tensor, "H C T D"]]:
    """Copies of products and outputs with those of some queries and columns in their place."""
    products, output = (x.clone() for x in of_rows)
    along = torch.einsum("khqd,hcqd->chkq", gradients.index_select(2, queries), stepped)
    for place, column in enumerate(columns):
        output[:, column, queries] = stepped[:, place]
        products[:, column, :, queries] = along[place]
    return products, output


def _subtract(
    products: Float[Tensor, "H C K T"],
    output: Float[Tensor, "H C T D"],
    gradients: Float[Tensor, "K H T D"],
    dense: Float[Tensor, "H T D"],
    current: Int[Tensor, " H"] | None,
) -> None:
    """Turn products and outputs into those of the errors, in place: against dense, or against what each head runs now."""
    if current is None:
        products -= _along(gradients, dense)[:, None]
        output -= dense[:, None]
        return
    own = torch.arange(len(output), device=output.device), current
    products -= products[own][:, None]
    output -= output[own][:, None]


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
