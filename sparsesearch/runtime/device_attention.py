"""Attention of a prompt or chunk through the kernels: all heads and all sequences of a batch in one launch (single tokens: `device_decode`)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.device_schedule import BankedTiles, build_on_device
from sparsesearch.kernels.device_select import BatchSelector, Selector, acting_rules, watchers
from sparsesearch.kernels.dispatch import run_schedule, schedule_for, tile_shape, workers_of
from sparsesearch.kernels.schedule import Span as Place
from sparsesearch.kernels.schedule import TileSchedule
from sparsesearch.rules.base import Rule
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.backends import Kernel
from sparsesearch.runtime.binding import LayerBinding
from sparsesearch.runtime.mask_code import Span
from sparsesearch.runtime.mean_heads import MeanHeads


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
