"""The tile schedule: what every plan compiles to for a concrete shape.

A tile is `rows` queries of one head of one sequence. It has a list of key blocks (`entries`, compact, shared by all heads with the same
choice) and a place in the work list of one of the device's workers (`bin_ptr`). Any kernel of this package runs it.

Order: tiles of KV heads whose keys and values fit the L2 cache together form a section; sections follow one another, and within one the
longest tile goes first to the least loaded worker (Graham 1969, LPT; sections as in FlashAttention's SingleTileLPTScheduler). Differs: loads
carry over from section to section and the lightest tiles are dealt last, over all sections, so the sum balances although no section does.
A tile longer than an even share of all work is cut along its keys; the pieces are merged by their log-sum-exp.

All of it is vectorised over tiles: 1024 heads of 128k tokens build in under a second, and nothing of size heads x blocks² is allocated unless
every head has its own choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.kernels.deal import deal
from sparsesearch.kernels.element_mask import ElementMask
from sparsesearch.kernels.tile_lists import TileLists, num_tiles

if TYPE_CHECKING:
    from sparsesearch.rules.base import Rule

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

SPLIT_GAIN = 1.1  # cut a tile only if it is this much longer than an even share: merging costs a second launch


@dataclass(frozen=True)
class Span:
    """One unpadded sequence inside a batch.

    Attributes:
        grid: its queries, keys and causality.
        batch: its row of the batch.
        q_offset: row of its first query in q[batch].
        k_offset: row of its first key in k[batch].
    """

    grid: BlockGrid
    batch: int = 0
    q_offset: int = 0
    k_offset: int = 0


@dataclass(frozen=True)
class HeadTiles:
    """Which tiles each query head of one sequence computes.

    Attributes:
        choices: R distinct choices; a row may be empty, then its queries get 0.
        of_head: for each query head, which of them.
        elements: bitmaps inside chosen tiles, where a choice is finer than blocks.
    """

    choices: Bool[Tensor, "R M N"]
    of_head: tuple[int, ...]
    elements: ElementMask | None = None


@dataclass(frozen=True)
class TileShape:
    """Queries and keys of one kernel tile."""

    rows: int
    keys: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.keys < 1:
            raise SpecError(f"a tile must have rows and keys, but got {self.rows} x {self.keys}.")


@dataclass(frozen=True)
class Workers:
    """What the tiles are dealt to.

    Attributes:
        count: workers that run at the same time (blocks of the persistent grid).
        l2_bytes: cache they share; 0.6 of it is counted on.
    """

    count: int = 132
    l2_bytes: float = 50e6

    @classmethod
    def of(cls, device: torch.device | str, blocks_per_sm: int = 1) -> "Workers":
        """The multiprocessors and cache of a device; an H100's for the CPU, where order does not matter."""
        if torch.device(device).type != "cuda":
            return cls()
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count * blocks_per_sm, float(properties.L2_cache_size))


@dataclass(frozen=True)
class TileSchedule:
    """Tiles in the order they run, and what they compute.

    Attributes:
        tiles: int32 records, columns as in tile_lists.TILE_FIELDS, grouped by worker.
        entries: int32 key blocks of all lists.
        bin_ptr: worker w runs tiles bin_ptr[w] … bin_ptr[w + 1] - 1.
        merges: per cut tile: its record's (batch, head, q_row, row_lo, row_hi), first slot, number of slots.
        shape: queries and keys per tile.
        causal: whether partial entries are cut by causality.
        num_heads: query heads.
        num_slots: partial outputs that cut tiles need.
        num_blocks: entries computed over all tiles.
        dense_blocks: the same for dense attention.
        covered_rows: (head, query) pairs that some tile writes.
        makespan: blocks of the most loaded worker, overhead included, over an even share.
        masks: per entry and half tile, where its bitmap starts in `words`, or -1; None if no tile has one.
        words: bitmaps of all sequences.
    """

    tiles: Int[Tensor, "T 12"]
    entries: Int[Tensor, " E"]
    bin_ptr: Int[Tensor, " P1"]
    merges: Int[Tensor, "C 7"]
    shape: TileShape
    causal: bool
    num_heads: int
    num_slots: int
    num_blocks: int
    dense_blocks: int
    covered_rows: int
    makespan: float
    masks: Int[Tensor, "E 2"] | None = None
    words: Int[Tensor, "U B W"] | None = None

    @property
    def density(self) -> float:
        """Computed tiles over the tiles that dense attention computes."""
        return self.num_blocks / self.dense_blocks

    @property
    def num_workers(self) -> int:
        """Blocks of the persistent grid."""
        return self.bin_ptr.numel() - 1


def spans_of_lengths(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    block_tokens: int,
    causal: bool = True,
    left_padding: Sequence[int] | None = None,
) -> tuple[Span, ...]:
    """One sequence per batch row, padded on the right, or on the left by `left_padding[b]` keys.

    With left padding the queries of row b end where its keys end: they are the last q_lens[b] rows of q.
    """  # fmt: skip
    spans = []
    longest_q = max(q_lens)
    for batch, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        pad = left_padding[batch] if left_padding is not None else 0
        q_offset = longest_q - q_len if left_padding is not None else 0
        spans.append(Span(BlockGrid(q_len, kv_len, block_tokens, causal=causal), batch, q_offset, pad))
    return tuple(spans)


def spans_of_cu_seqlens(
    cu_q: Sequence[int], cu_k: Sequence[int], *, block_tokens: int, causal: bool = True
) -> tuple[Span, ...]:
    """Sequences packed end to end in batch row 0; sequence i has queries cu_q[i] … cu_q[i+1] - 1 and keys likewise."""
    bounds = zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    return tuple(Span(BlockGrid(q1 - q0, k1 - k0, block_tokens, causal=causal), 0, q0, k0) for q0, q1, k0, k1 in bounds)


def build_schedule(
    spans: Sequence[Span],
    head_tiles: Sequence[HeadTiles],
    *,
    num_kv_heads: int,
    shape: TileShape,
    workers: Workers,
    head_bytes: int = 256,
    device: torch.device | str = "cpu",
) -> TileSchedule:
    """Compile choices of tiles to lists and an order.

    Args:
        spans: the sequences of the batch, all causal or all full.
        head_tiles: the choice of each.
        num_kv_heads: KV heads; query heads are a multiple.
        shape: tile of the kernel that will run it. `rows` may hold one or two of the plan's blocks or divide one, `keys` must divide one.
        workers: what it runs on.
        head_bytes: bytes of one key (head_dim times element size), for the cache sections.
        device: where the tensors go.

    Raises:
        SpecError: the tile does not fit the plan's blocks, or the sequences disagree.
    """
    _require_one_batch(spans, head_tiles, num_kv_heads)
    num_heads = len(head_tiles[0].of_head)
    lists = TileLists(shape, [choice.elements for choice in head_tiles])
    group = num_heads // num_kv_heads
    records = np.concatenate(
        [lists.tiles_of(span, choice, group) for span, choice in zip(spans, head_tiles, strict=True)]
    )
    per_pair = np.repeat([num_tiles(span.grid, shape) * group for span in spans], num_kv_heads)
    pair = np.repeat(np.arange(len(per_pair)), per_pair)
    used = records[:, 9] > records[:, 8]
    if not used.all():
        records, pair = records[used], pair[used]
    covered = int((records[:, 4] - records[:, 3]).sum())
    num_blocks = int((records[:, 9] - records[:, 8]).sum())
    records, pair, merges, num_slots = _cut(records, pair, workers.count, num_blocks)
    section = _sections(
        _hot_bytes(spans, records, pair, num_kv_heads, group, shape, head_bytes), 0.6 * workers.l2_bytes
    )[pair]
    cost = (records[:, 9] - records[:, 8]).astype(np.int64)
    place, bin_ptr, makespan = deal(cost, section, workers.count)
    dense = sum(_dense_blocks(span.grid, shape) for span in spans) * num_heads

    def on_device(array: Ints) -> Tensor:
        return torch.from_numpy(array.astype(np.int32, copy=False)).to(device)

    return TileSchedule(
        tiles=on_device(records[place]),
        entries=on_device(lists.entries()),
        bin_ptr=on_device(bin_ptr),
        merges=on_device(merges),
        shape=shape,
        causal=spans[0].grid.causal,
        num_heads=num_heads,
        num_slots=num_slots,
        num_blocks=num_blocks,
        dense_blocks=dense,
        covered_rows=covered,
        makespan=makespan,
        masks=None if lists.words is None else on_device(lists.masks()),
        words=None if lists.words is None else lists.words.to(device),
    )


def _require_one_batch(spans: Sequence[Span], head_tiles: Sequence[HeadTiles], num_kv_heads: int) -> None:
    if len(spans) != len(head_tiles) or not spans:
        raise SpecError(f"there must be one choice per sequence, but got {len(head_tiles)} for {len(spans)}.")
    if len({span.grid.causal for span in spans}) > 1 or len({len(choice.of_head) for choice in head_tiles}) > 1:
        raise SpecError("all sequences of a batch must have the same causality and the same number of heads.")
    num_heads = len(head_tiles[0].of_head)
    if num_heads % num_kv_heads:
        raise SpecError(f"query heads must be a multiple of KV heads, but got {num_heads} and {num_kv_heads}.")


@lru_cache(maxsize=256)
def schedule_of_rules(
    rules: "tuple[Rule, ...]",
    spans: tuple[Span, ...],
    *,
    num_kv_heads: int,
    shape: TileShape,
    workers: Workers,
    head_bytes: int = 256,
    device: str = "cpu",
) -> TileSchedule:
    """The schedule of static rules, one per query head; built once per shape.

    Raises:
        SpecError: a rule is dynamic: its choice needs queries and keys, so build from its tiles with `build_schedule`.
    """
    for rule in rules:
        if rule.dynamic:
            raise SpecError(f"{rule.label} chooses tiles from queries and keys: pass its tiles to build_schedule.")
    distinct = tuple(dict.fromkeys(rules))
    place = {rule: index for index, rule in enumerate(distinct)}
    of_head = tuple(place[rule] for rule in rules)
    grids = {span.grid for span in spans}  # each once: the rows of a batch mostly share one
    by_grid = {grid: HeadTiles(torch.stack([r.select(grid) for r in distinct]), of_head) for grid in grids}
    return build_schedule(
        spans,
        [by_grid[span.grid] for span in spans],
        num_kv_heads=num_kv_heads,
        shape=shape,
        workers=workers,
        head_bytes=head_bytes,
        device=device,
    )


def _dense_blocks(grid: BlockGrid, shape: TileShape) -> int:
    first = np.arange(grid.q_start // shape.rows, -(-grid.kv_len // shape.rows)) * shape.rows
    reach = np.minimum(first + shape.rows, grid.kv_len) if grid.causal else np.full_like(first, grid.kv_len)
    return int((-(-reach // shape.keys)).sum())


def _cut(records: Ints, pair: Ints, workers: int, num_blocks: int) -> tuple[Ints, Ints, Ints, int]:
    """Cut tiles longer than an even share into equal pieces, each with a slot for its partial output."""
    length = records[:, 9] - records[:, 8]
    share = max(-(-num_blocks // workers), 4)
    heavy = length > SPLIT_GAIN * share
    if not heavy.any():
        return records, pair, np.zeros((0, 7), np.int64), 0
    pieces = np.where(heavy, -(-length // share), 1)
    first_slot = np.cumsum(np.where(heavy, pieces, 0)) - np.where(heavy, pieces, 0)
    owner = np.repeat(np.arange(len(records)), pieces)
    piece = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    out = records[owner]
    out[:, 8] = records[owner, 8] + length[owner] * piece // pieces[owner]
    out[:, 9] = records[owner, 8] + length[owner] * (piece + 1) // pieces[owner]
    out[:, 10] = np.where(heavy[owner], first_slot[owner] + piece, -1)
    merges = np.concatenate([records[heavy, :5], first_slot[heavy, None], pieces[heavy, None]], 1)
    return out, pair[owner], merges, int(pieces[heavy].sum())


def _hot_bytes(
    spans: Sequence[Span], records: Ints, pair: Ints, num_kv_heads: int, group: int, shape: TileShape, head_bytes: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Keys and values, in bytes, that the tiles of each (sequence, KV head) read again and again.

    All of them times the density of the densest query head: narrow windows move on and need no room in the cache.
    """
    heads = pair * group + records[:, 1] % group
    computed = np.bincount(heads, weights=records[:, 9] - records[:, 8], minlength=len(spans) * num_kv_heads * group)
    dense = np.repeat([_dense_blocks(span.grid, shape) for span in spans], num_kv_heads)
    kv_bytes = np.repeat([2.0 * span.grid.kv_len * head_bytes for span in spans], num_kv_heads)
    return np.asarray(computed.reshape(-1, group).max(1) / dense * kv_bytes, np.float64)


def _sections(kv_bytes: np.ndarray[Any, np.dtype[np.float64]], capacity: float) -> Ints:
    """Consecutive (sequence, KV head) pairs whose keys and values fit the cache share a section."""
    before = np.cumsum(kv_bytes) - kv_bytes
    return np.asarray(before // max(capacity, float(kv_bytes.max()), 1.0), np.int64)
