"""Attention of one call through the kernels: all heads and all sequences of a batch in one launch, in prefill and in decoding."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.dispatch import prefill
from sparsesearch.kernels.reference import running_mean
from sparsesearch.kernels.schedule import HeadTiles
from sparsesearch.kernels.schedule import Span as Place
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.backends import Kernel
from sparsesearch.runtime.binding import LayerBinding
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


class Chooser:
    """The tiles of a layer that has dynamic rules, worked out on the device; what other layers reuse is taken and left on the way."""

    def __init__(
        self,
        binding: LayerBinding,
        rules: tuple[Rule, ...],
        layer_heads: Sequence[int] | None,
        scale: float,
        kernel: Kernel,
    ) -> None:
        self.binding, self.rules, self.scale, self.kernel = binding, rules, scale, kernel
        self.heads = tuple(range(len(rules))) if layer_heads is None else tuple(layer_heads)

    def tiles(
        self, q: Float[Tensor, "B H S D"], k: Float[Tensor, "B G T D"], spans: Sequence[Span], places: Sequence[Place]
    ) -> list[HeadTiles]:
        """One choice per place; `places` are the rows of the spans in turn."""
        choices, rows = [], iter(places)
        for number, span in enumerate(spans):
            own = [
                next(rows)
                for _ in range(len(range(len(q))[span.rows]) if isinstance(span.rows, slice) else len(span.rows))
            ]
            taken = self._taken(number, span.grid)
            chosen = [self._of_row(q, k, place, taken, row) for row, place in enumerate(own)]
            self._leave(number, span.grid, chosen, q, k, own)
            choices += [HeadTiles(tiles, tuple(range(len(self.rules)))) for tiles in chosen]
        return choices

    def _of_row(
        self, q: Tensor, k: Tensor, place: Place, taken: dict[int, Bool[Tensor, "b M N"]], row: int
    ) -> Bool[Tensor, "H M N"]:
        from sparsesearch.kernels.device_select import chosen_tiles

        grid, own_q = place.grid, sequence(q, place.batch, place.q_offset, place.grid.q_len)
        reused = {}
        for head, left in taken.items():
            rule = self.rules[head]
            assert isinstance(rule, Reuse), "only such rules take"
            reused[head] = rule.select(grid, left=left[row])
        return chosen_tiles(
            self.rules, grid, own_q, keys_of(k, place), scale=self.scale, kernel=self.kernel, given=reused
        )

    def _taken(self, number: int, grid: BlockGrid) -> dict[int, Bool[Tensor, "b M N"]]:
        """What earlier layers left for the heads that reuse; a single query is dense and needs nothing."""
        readers = [head for head, rule in enumerate(self.rules) if rule.reuses and grid.q_len > 1]
        return {head: self.binding.taken(number, grid, (self.heads[head],))[:, 0] for head in readers}

    def _leave(
        self,
        number: int,
        grid: BlockGrid,
        chosen: list[Bool[Tensor, "H M N"]],
        q: Tensor,
        k: Tensor,
        places: list[Place],
    ) -> None:
        leaves, group = self.binding.leaves, q.shape[1] // k.shape[1]
        for head, rule in enumerate(self.rules) if leaves is not None and grid.q_len > 1 else ():
            assert leaves is not None
            if not rule.dynamic or rule.reuses or self.heads[head] not in leaves.heads:
                continue
            left = []
            for tiles, place in zip(chosen, places, strict=True):
                own_q = sequence(q, place.batch, place.q_offset, grid.q_len)[head] * self.scale
                left.append(rule.left_behind(tiles[head], grid, own_q, keys_of(k, place)[head // group]))
            leaves.leave(number, grid, (self.heads[head],), torch.stack(left)[:, None])


def prefill_heads(
    rules: tuple[Rule, ...],
    choice: tuple[Rule, ...] | list[HeadTiles],
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    places: tuple[Place, ...],
    scale: float,
    kernel: Kernel,
) -> Float[Tensor, "B H S D"]:
    """Output of all query heads, one rule each; 0 where there is padding.

    Static rules (`choice` is `rules` then) run on a cached schedule; for chosen tiles it is made on the device.
    """
    if not places:
        return torch.zeros_like(q)
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
