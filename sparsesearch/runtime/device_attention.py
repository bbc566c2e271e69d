"""Attention of one call through the kernels: all heads and all sequences of a batch in one launch, in prefill and in decoding."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.dispatch import prefill
from sparsesearch.kernels.reference import running_mean
from sparsesearch.kernels.schedule import HeadTiles
from sparsesearch.kernels.schedule import Span as Place
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.backends import Kernel
from sparsesearch.runtime.mask_code import Span


def places_of(spans: Sequence[Span], batch_size: int) -> tuple[Place, ...] | None:
    """The same sequences one by one, as kernels take them; None where a sequence has gaps or has lost its first keys."""
    places = []
    for span in spans:
        if span.k_start or isinstance(span.q_slots, Tensor) or isinstance(span.k_slots, Tensor):
            return None
        rows = range(batch_size)[span.rows] if isinstance(span.rows, slice) else span.rows
        places += [Place(span.grid, row, span.q_slots.start or 0, span.k_slots.start or 0) for row in rows]
    return tuple(places)


def prefill_heads(
    rules: tuple[Rule, ...],
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    places: tuple[Place, ...],
    scale: float,
    kernel: Kernel,
) -> Float[Tensor, "B H S D"]:
    """Output of all query heads, one rule each; 0 where there is padding.

    Static rules run on a cached schedule. If a rule is dynamic, tiles and schedule of the layer are made on the device.
    """
    if not places:
        return torch.zeros_like(q)
    choice: tuple[Rule, ...] | list[HeadTiles] = rules
    if any(rule.dynamic for rule in rules):
        from sparsesearch.kernels.device_select import chosen_tiles

        choice = []
        for place in places:
            own_q, own_k = sequence(q, place.batch, place.q_offset, place.grid.q_len), keys_of(k, place)
            tiles = chosen_tiles(rules, place.grid, own_q, own_k, scale=scale, kernel=kernel)
            choice.append(HeadTiles(tiles, tuple(range(len(rules)))))
    out = prefill(q, k, v, places, choice, scale=scale, backend=kernel).out
    _put_means(out, rules, v, places)
    return out


def _put_means(out: Tensor, rules: tuple[Rule, ...], v: Tensor, places: tuple[Place, ...]) -> None:
    """Overwrite the heads that follow mean_value."""
    group = len(rules) // v.shape[1]
    heads: dict[int, list[int]] = {}
    for head, rule in enumerate(rules):
        if rule.rest == "mean_value":
            heads.setdefault(head // group, []).append(head)
    for place in places if heads else ():
        for kv_head, members in heads.items():
            mean = running_mean(keys_of(v, place)[kv_head], place.grid).to(out.dtype)
            for head in members:
                sequence(out, place.batch, place.q_offset, place.grid.q_len)[head] = mean


def sequence(x: Float[Tensor, "B H S D"], batch: int, first: int, count: int) -> Float[Tensor, "H s D"]:
    """A view of one sequence's rows."""
    return x[batch, :, first : first + count]


def keys_of(x: Float[Tensor, "B G T D"], place: Place) -> Float[Tensor, "G t D"]:
    """A view of one sequence's keys or values."""
    return sequence(x, place.batch, place.k_offset, place.grid.kv_len)


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
