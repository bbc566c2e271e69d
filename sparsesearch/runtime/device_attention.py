"""Attention of one call through the kernels: all heads and all sequences of a batch in one launch, in prefill and in decoding."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.device_schedule import BankedTiles, build_on_device
from sparsesearch.kernels.device_select import BatchSelector, Selector, acting_rules, watchers
from sparsesearch.kernels.dispatch import run_schedule, schedule_for, tile_shape, workers_of
from sparsesearch.kernels.schedule import Span as Place
from sparsesearch.kernels.schedule import TileSchedule
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.backends import Kernel
from sparsesearch.runtime.binding import LayerBinding
from sparsesearch.runtime.mask_code import Span
from sparsesearch.runtime.mean_heads import MeanHeads
from sparsesearch.step_blocks import page_tables


def places_of(spans: Sequence[Span], batch_size: int) -> tuple[Place, ...] | None:
    """The same sequences one by one, as kernels take them; None where a sequence has gaps or has lost its first keys."""
    places = []
    for span in spans:
        if span.k_start or isinstance(span.q_slots, Tensor) or isinstance(span.k_slots, Tensor):
            return None
        first_q, first_k = span.q_slots.start or 0, span.k_slots.start or 0
        places += [Place(span.grid, row, first_q, first_k) for row in span.rows_among(batch_size)]
    return tuple(places)


class LayerCall:
    """Prefill attention of one layer on one shape of call: made once per shape, after which a call only launches kernels.

    Heads that choose do so on the device; what other layers reuse is taken and left on the way.

    Args:
        binding: the layer's.
        rules: one per query head of the call.
        layer_heads: which heads of the layer they are; None: all of them.
        spans: the sequences.
        places: their rows, in turn; not empty.
        q: gives shapes, type and device, as does k.
        k: keys.
        kernel: what runs it.
    """

    def __init__(
        self,
        binding: LayerBinding,
        rules: tuple[Rule, ...],
        layer_heads: Sequence[int] | None,
        spans: Sequence[Span],
        places: tuple[Place, ...],
        q: Float[Tensor, "B H S D"],
        k: Float[Tensor, "B G T D"],
        kernel: Kernel,
    ) -> None:
        self.binding, self.rules, self.places, self.kernel = binding, rules, places, kernel
        self.heads = tuple(range(len(rules))) if layer_heads is None else tuple(layer_heads)
        rows = iter(places)
        self._spans = [(span.grid, tuple(next(rows) for _ in span.rows_among(len(q)))) for span in spans]
        self._shape = tile_shape(kernel, q.shape[-1], binding.block_tokens)
        self._selectors: dict[BlockGrid, Selector] = {}
        self._fixed: TileSchedule | None = None
        self._means = MeanHeads(rules, k.shape[1], q.device)
        grids = tuple(dict.fromkeys(place.grid for place in places))
        if any(rule.dynamic for rule in rules):
            self._selectors = {grid: Selector(rules, grid, k.shape[1], q.device) for grid in grids}
        self._together = self._batch_selector(q, k)
        acting = {acting_rules(rules, grid) for grid in grids}
        same = acting.pop()
        if not acting and not any(rule.dynamic for rule in same) and binding.leaves is None:
            self._fixed = schedule_for(q, k, places, same, kernel)

    def __call__(
        self, q: Float[Tensor, "B H S D"], k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"], scale: float
    ) -> Float[Tensor, "B H S D"]:
        """Output of all query heads, one rule each; 0 where there is padding."""
        out, _ = run_schedule(q, k, v, self.schedule(q, k, scale), scale=scale, kernel=self.kernel)
        self._means.put(out, v, self.places)
        return out

    def schedule(self, q: Float[Tensor, "B H S D"], k: Float[Tensor, "B G T D"], scale: float) -> TileSchedule:
        """The tiles that this call computes."""
        if self._fixed is not None and not (watchers and self._selectors):
            return self._fixed
        return self.schedule_of(self.choose(q, k, scale))

    def schedule_of(self, tiles: Sequence[BankedTiles]) -> TileSchedule:
        """The schedule of what `choose` returned."""
        return build_on_device(self.places, tiles, shape=self._shape, workers=workers_of(str(tiles[0].chosen.device)))

    def _batch_selector(self, q: Float[Tensor, "B H S D"], k: Float[Tensor, "B G T D"]) -> BatchSelector | None:
        """One choice for the whole batch: where all sequences fill their rows, and none of their heads gives or takes a selection."""
        whole = tuple(Place(self.places[0].grid, row, 0, 0) for row in range(len(q)))
        grid = whole[0].grid
        if (
            len(q) == 1
            or not self._selectors
            or self.places != whole
            or (grid.q_len, grid.kv_len) != (q.shape[2], k.shape[2])
        ):
            return None
        if self.binding.leaves is not None or any(rule.reuses for rule in self.rules):
            return None
        return BatchSelector(self.rules, grid, k.shape[1], len(q), q.device)

    def choose(self, q: Float[Tensor, "B H S D"], k: Float[Tensor, "B G T D"], scale: float) -> list[BankedTiles]:
        """One choice per place, if some rule is dynamic."""
        if self._together is not None:
            return self._together.choose(q, k, scale=scale)
        choices: list[BankedTiles] = []
        for number, (grid, places) in enumerate(self._spans):
            taken, selector = self._taken(number, grid), self._selectors[grid]
            chosen = []
            for row, place in enumerate(places):
                given = {head: self._reused(head, grid, left[row]) for head, left in taken.items()}
                own_q = sequence(q, place.batch, place.q_offset, grid.q_len)
                chosen.append(selector.choose(own_q, keys_of(k, place), scale=scale, given=given))
            self._leave(number, grid, chosen, q, k, places, scale)
            choices += chosen
        return choices

    def _reused(self, head: int, grid: BlockGrid, left: Bool[Tensor, "M N"]) -> Bool[Tensor, "M N"]:
        rule = self.rules[head]
        assert isinstance(rule, Reuse), "only such rules take"
        return rule.select(grid, left=left)

    def _taken(self, number: int, grid: BlockGrid) -> dict[int, Bool[Tensor, "b M N"]]:
        """What earlier layers left for the heads that reuse; a single query is mostly dense and needs nothing."""
        readers = [head for head, rule in enumerate(self.rules) if rule.reuses and (grid.q_len > 1 or rule.decodes)]
        return {head: self.binding.taken(number, grid, (self.heads[head],))[:, 0] for head in readers}

    def _leave(
        self,
        number: int,
        grid: BlockGrid,
        chosen: list[BankedTiles],
        q: Tensor,
        k: Tensor,
        places: Sequence[Place],
        scale: float,
    ) -> None:
        leaves, group = self.binding.leaves, q.shape[1] // k.shape[1]
        if leaves is None:
            return
        tiles = [one.per_head() for one in chosen]
        for head, rule in enumerate(self.rules):
            chooses = rule.dynamic and not rule.reuses and (grid.q_len > 1 or rule.decodes)
            if not chooses or self.heads[head] not in leaves.heads:
                continue
            left = []
            for own, place in zip(tiles, places, strict=True):
                own_q = sequence(q, place.batch, place.q_offset, grid.q_len)[head] * scale
                left.append(rule.left_behind(own[head], grid, own_q, keys_of(k, place)[head // group]))
            leaves.leave(number, grid, (self.heads[head],), torch.stack(left)[:, None])


def layer_call(
    binding: LayerBinding,
    rules: tuple[Rule, ...],
    layer_heads: Sequence[int] | None,
    spans: Sequence[Span],
    places: tuple[Place, ...],
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    kernel: Kernel,
) -> LayerCall:
    """See `LayerCall`; those of the layer's last few shapes are kept with its binding."""
    some = None if layer_heads is None else (tuple(layer_heads), rules)  # hashing rules takes longer than a launch
    counts = tuple(len(span.rows_among(len(q))) for span in spans)
    key = (places, counts, some, q.shape, k.shape, q.dtype, q.device, kernel)
    made: LayerCall = binding.remembered(
        key, lambda: LayerCall(binding, rules, layer_heads, spans, places, q, k, kernel)
    )
    return made


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
        grid, rows, first = span.grid, list(span.rows_among(len(q))), slice_start(span.k_slots)
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


def slice_start(slots: slice | Tensor) -> int:
    """First slot of a sequence without gaps."""
    assert isinstance(slots, slice)
    return slots.start or 0


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
