"""One token's attention through the kernels: all heads and all sequences of a batch in one launch, and the blocks that heads choose for it."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.schedule import Span as Place
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.binding import LayerBinding
from sparsesearch.runtime.mask_code import Span
from sparsesearch.step_blocks import page_tables


def decode_heads(
    rules: tuple[Rule, ...],
    q: Float[Tensor, "B H one D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    places: tuple[Place, ...],
    scale: float,
) -> Float[Tensor, "B H one D"]:
    """Output of one new token per sequence over a cache that holds all keys: only the blocks a head may see are read.

    A mean of values is attention whose scores are all equal, so such heads attend with a zero query. Query heads of a KV head that follow one
    rule share one pass over its keys.
    """
    if not _rows_in_a_line(k) or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    size = k.shape[-1]
    reads = _reads(rules, places, k.shape[:2], (k.stride(0) // size, k.stride(1) // size), str(q.device))
    queries = q[:, :, 0]
    if any(rule.rest == "mean_value" for rule in rules):
        queries = queries * _scored(rules, str(q.device), q.dtype)[:, None]
    out, _ = ragged_decode(
        queries.contiguous(),
        _as_rows(k),
        _as_rows(v),
        reads[0],
        reads[1],
        scale=scale,
        table=reads[2],
        page_tokens=places[0].grid.block_tokens if places else 1,
    )
    return out[:, :, None]


def decode_choosing(
    binding: LayerBinding,
    rules: tuple[Rule, ...],
    layer_heads: Sequence[int] | None,
    spans: Sequence[Span],
    q: Float[Tensor, "B H one D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    scale: float,
) -> Float[Tensor, "B H one D"]:
    """Like `decode_heads`, where some rules decode: their heads read the blocks that they choose, sequence by sequence; 0 for the other heads."""
    if not _rows_in_a_line(k) or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    heads = [head for head, rule in enumerate(rules) if rule.decodes]
    size, group, block = k.shape[-1], len(rules) // k.shape[1], binding.block_tokens
    longest = max(span.grid.num_k_blocks for span in spans)
    table = torch.zeros(len(q), len(heads), longest, dtype=torch.int32, device=q.device)
    lens = torch.zeros(len(q), len(heads), dtype=torch.int32, device=q.device)
    start = torch.zeros(len(q), len(heads), dtype=torch.int64)
    for number, span in enumerate(spans):
        grid, rows, first = span.grid, list(span.rows_among(len(q))), _first_slot(span)
        for place, head in enumerate(heads):
            own_q, own_k = q[rows, head] * scale, k[rows, head // group, first : first + grid.kv_len]
            own = (head if layer_heads is None else layer_heads[head],)
            tiles = _step_choice(binding, rules[head], number, own, grid, own_q, own_k)
            newest = torch.full((len(rows),), grid.kv_len - 1, device=q.device)
            pages, counts = page_tables(tiles, newest, block)
            table[rows, place, : grid.num_k_blocks], lens[rows, place] = pages, counts
            for row in rows:
                start[row, place] = (head // group * k.stride(1) + row * k.stride(0)) // size + first
    chosen = q[:, :, 0].index_select(1, torch.tensor(heads, device=q.device)).contiguous()
    where = start.flatten().to(q.device), lens.flatten()
    out = ragged_decode(
        chosen, _as_rows(k), _as_rows(v), *where, scale=scale, table=table.flatten(0, 1), page_tokens=block
    )[0]
    return torch.zeros_like(q).index_copy(1, torch.tensor(heads, device=q.device), out[:, :, None])


def _step_choice(
    binding: LayerBinding,
    rule: Rule,
    sequence: int,
    head: tuple[int],
    grid: BlockGrid,
    q: Float[Tensor, "b one D"],
    k: Float[Tensor, "b T D"],
) -> Bool[Tensor, "b one N"]:
    """What one head chooses for a single token, or takes; left for later layers."""
    if isinstance(rule, Reuse):
        return rule.select(grid, left=binding.taken(sequence, grid, head)[:, 0].to(q.device))
    tiles = rule.select(grid, q, k).expand(len(q), 1, -1)
    if binding.leaves is not None:
        binding.leaves.leave(sequence, grid, head, rule.left_behind(tiles, grid, q, k)[:, None])
    return tiles


def _first_slot(span: Span) -> int:
    """Of a sequence without gaps."""
    assert isinstance(span.k_slots, slice)
    return span.k_slots.start or 0


def _rows_in_a_line(x: Float[Tensor, "B G T D"]) -> bool:
    """Whether all of a head's rows lie one behind the other, whole rows from the next head's: true of slices of a larger buffer too."""
    return (
        x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] and not any(stride % x.shape[-1] for stride in x.stride()[:2])
    )


def _as_rows(x: Float[Tensor, "B G T D"]) -> Float[Tensor, "rows D"]:
    batch, heads, slots, size = x.shape
    last = ((batch - 1) * x.stride(0) + (heads - 1) * x.stride(1)) // size
    return x.as_strided((last + slots, size), (size, 1))


@lru_cache(maxsize=64)
def _scored(rules: tuple[Rule, ...], device: str, dtype: torch.dtype) -> Float[Tensor, " H"]:
    with torch.inference_mode(False):
        return torch.tensor([float(rule.rest != "mean_value") for rule in rules], device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _reads(
    rules: tuple[Rule, ...], places: tuple[Place, ...], pairs: tuple[int, int], strides: tuple[int, int], device: str
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, "pairs pages"] | None]:
    """Arguments of `ragged_decode`: where each pair's keys start, how many it reads, and which blocks, if not all.

    `pairs` are batch and KV heads, `strides` the rows from one sequence and from one KV head to the next.
    """
    batch, group = pairs[0], len(rules) // pairs[1]
    packed = all(len(set(rules[head : head + group])) == 1 for head in range(0, len(rules), group))
    heads = range(0, len(rules), group if packed else 1)
    start = torch.zeros(batch, len(heads), dtype=torch.int64)
    lens = torch.zeros(batch, len(heads), dtype=torch.int32)
    pages: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.int32)] * len(heads) for _ in range(batch)]
    whole = True
    for place in places:
        for pair, head in enumerate(heads):
            rule, grid = rules[head], place.grid
            start[place.batch, pair] = place.batch * strides[0] + head // group * strides[1] + place.k_offset
            if rule.rest == "zero":
                continue
            blocks = visible_blocks(rule, grid)
            whole = whole and len(blocks) == grid.num_k_blocks
            pages[place.batch][pair] = blocks
            ragged = int(blocks[-1]) == grid.num_k_blocks - 1
            lens[place.batch, pair] = len(blocks) * grid.block_tokens - (
                -grid.kv_len % grid.block_tokens if ragged else 0
            )
    with torch.inference_mode(False):
        table = None if whole else _padded([one for row in pages for one in row]).to(device)
        return start.flatten().to(device), lens.flatten().to(device), table


@lru_cache(maxsize=4096)
def visible_blocks(rule: Rule, grid: BlockGrid) -> Int[Tensor, " blocks"]:
    """Blocks that the only query of a call sees, ascending."""
    if rule.dynamic or rule.rest == "mean_value" or isinstance(rule, Dense):
        return torch.arange(grid.num_k_blocks, dtype=torch.int32)
    return rule.select(grid)[0].nonzero()[:, 0].int()


def _padded(rows: Sequence[Int[Tensor, " n"]]) -> Int[Tensor, "rows longest"]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
