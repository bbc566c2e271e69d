"""What one group of KV heads keeps between calls: everything, a ring, a running sum, or nothing.

Positions count a row's real tokens from 0; -1 marks padding and empty places. Evicting stores have `SLACK_TOKENS` of room, so that assisted
decoding may take back that many tokens. A token taken back leaves stale entries behind: they are recognised by their position, because the
next call says how many real tokens came before it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.runtime.attention import attend_heads
from sparsesearch.runtime.binding import LayerBinding, group_heads
from sparsesearch.runtime.mask_code import MaskCode

SLACK_TOKENS = 32
_STRIP_TOKENS = 256


@dataclass(frozen=True)
class Call:
    """What the stores of a layer share in one call.

    Attributes:
        binding: the layer's rules.
        code: the call's mask code.
        law_tokens: the rows' prompt lengths.
        scale: softmax scale.
        before: real tokens of each row that came before this call.
        positions: position of each new token.
        is_first: whether nothing came before.
    """

    binding: LayerBinding
    code: MaskCode | None
    law_tokens: Int[Tensor, " B"]
    scale: float
    before: Int[Tensor, " B"]
    positions: Int[Tensor, "B S"]
    is_first: bool


class Store(ABC):
    """What one group of KV heads keeps: tensors whose first dimension is the batch, empty before the first call."""

    kept: tuple[Tensor, ...] = ()

    @abstractmethod
    def take_in(self, call: Call, k: Float[Tensor, "B g S D"], v: Float[Tensor, "B g S D"]) -> None:
        """Keep of the new keys and values what later queries can reach."""

    @abstractmethod
    def attend(
        self, call: Call, q: Float[Tensor, "B h S D"], k: Float[Tensor, "B g S D"], v: Float[Tensor, "B g S D"]
    ) -> Float[Tensor, "B h S D"]:
        """Output for the new queries of a call that is not the first; then the new keys and values are taken in."""

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch (beam reordering, repetition, selection)."""
        self.kept = tuple(change(tensor) for tensor in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.kept)


class FullStore(Store):
    """All keys and values; the rules choose among them. Kept: keys and values [B, g, room, D], of which the first `count` slots are written.

    Room grows by a sixteenth at a time, so that a new token does not copy the old ones.
    """

    def __init__(self, binding: LayerBinding, layer_heads: tuple[int, ...]) -> None:
        places = range(len(layer_heads))
        self.groups = group_heads((binding.rules[head] for head in layer_heads), places)
        self.decode_groups = group_heads((binding.kept_by[head] for head in layer_heads), places)
        self.layer_heads = layer_heads
        self.count = 0

    def take_in(self, call: Call, k: Tensor, v: Tensor) -> None:
        """See Store."""
        count = self.count + k.shape[2]
        self.kept = tuple(
            _appended(*pair, self.count) for pair in zip(self.kept or (k[:, :, :0], v[:, :, :0]), (k, v), strict=True)
        )
        self.count = count

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Store."""
        self.take_in(call, k, v)
        k, v = (tensor[:, :, : self.count] for tensor in self.kept)
        groups = self.groups if q.shape[2] > 1 else self.decode_groups
        return attend_heads(
            groups, call.binding, q, k, v, call.code, call.law_tokens, call.scale, None, self.layer_heads
        )

    def keep_slots(self, count: int) -> None:
        """Drop what lies behind the first `count` slots seen; stores that know positions leave that to the next call."""
        self.count = min(self.count, count)


class EmptyStore(Store):
    """Nothing: the heads' output is 0."""

    def take_in(self, call: Call, k: Tensor, v: Tensor) -> None:
        """See Store."""

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Store."""
        return torch.zeros_like(q)


class MeanStore(Store):
    """A running sum, and the last few values so that they can be taken back.

    Kept: the sum [B, g, D] in fp64, recent values [B, g, slack + 1, D] and their positions [B, slack + 1]; the last place is a dump.
    """

    def take_in(self, call: Call, k: Tensor, v: Tensor) -> None:
        """See Store."""
        total, recent, places = self._without_stale(call, v)
        address = _ring_address(call, SLACK_TOKENS, first=0, dump=SLACK_TOKENS)
        recent = _scatter(recent, 2, address[:, None, :, None].expand_as(v), v)
        total = total + _real(call, v).sum(2)
        self.kept = (total, recent, _with_positions(places, address, call.positions))

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Store."""
        total, real = self._without_stale(call, v)[0], call.positions >= 0
        counts = (call.before[:, None] + real.cumsum(1)).clamp(min=1)
        output = (total[:, :, None] + _real(call, v).cumsum(2)) / counts[:, None, :, None]
        output = torch.where(real[:, None, :, None], output, 0).to(q.dtype)
        self.take_in(call, k, v)
        return output.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def _without_stale(self, call: Call, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.kept:
            batch, heads, _, size = v.shape
            places = torch.full((batch, SLACK_TOKENS + 1), -1, device=v.device)
            return v.new_zeros(batch, heads, size).double(), v.new_zeros(batch, heads, SLACK_TOKENS + 1, size), places
        total, recent, places = self.kept
        stale = places >= call.before[:, None]
        taken_back = torch.where(stale[:, None, :, None], recent, 0).double().sum(2)
        return total - taken_back, recent, torch.where(stale, -1, places)


def _real(call: Call, v: Float[Tensor, "B g S D"]) -> Float[Tensor, "B g S D"]:
    """The new values in fp64, 0 where there is padding."""
    return torch.where((call.positions >= 0)[:, None, :, None], v, 0).double()


class RingStore(Store):
    """The first blocks of each row, and a ring of the last ones: what a sink_window rule can still reach.

    Kept: keys and values [B, g, sink + ring + 1, D] and the position in each place [B, sink + ring + 1]; the last place is a dump.
    """

    def __init__(self, rule: SinkWindow) -> None:
        self.rule = rule

    def take_in(self, call: Call, k: Tensor, v: Tensor) -> None:
        """See Store."""
        sink_tokens, windows = self._sizes(call)
        if not self.kept:
            self.kept = _empty_ring(k, v, sink_tokens + max(windows) * call.binding.block_tokens)
        keys, values, places = self.kept
        dump = places.shape[1] - 1
        address = _ring_address(call, dump - sink_tokens, first=sink_tokens, dump=dump)
        index = address[:, None, :, None].expand_as(k)
        keys, values = _scatter(keys, 2, index, k), _scatter(values, 2, index, v)
        self.kept = (keys, values, _with_positions(places, address, call.positions))

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Store."""
        sink_tokens, windows = self._sizes(call)
        window_blocks = torch.tensor(windows, device=k.device)
        if q.shape[2] == 1:
            self.take_in(call, k, v)
            keys, values, places = self.kept
            return _attend_places(call, q, keys, values, places, window_blocks, sink_tokens)
        keys, values, places = self.kept
        known = torch.where(places < call.before[:, None], places, -1)
        joined = torch.cat([keys, k], 2), torch.cat([values, v], 2), torch.cat([known, call.positions], 1)
        output = _attend_places(call, q, *joined, window_blocks, sink_tokens)
        self.take_in(call, k, v)
        return output

    def _sizes(self, call: Call) -> tuple[int, list[int]]:
        """Tokens of the sink, and blocks of each row's window."""
        block = call.binding.block_tokens
        sizes = [self.rule.blocks(BlockGrid(1, 1, block, max(law, 1))) for law in call.law_tokens.tolist()]
        return sizes[0][0] * block, [window for _, window in sizes]


def _appended(
    kept: Float[Tensor, "B g room D"], new: Float[Tensor, "B g S D"], count: int
) -> Float[Tensor, "B g room D"]:
    """`kept` with `new` behind its first `count` slots: written in place where there is room and nobody needs the old content."""
    end = count + new.shape[2]
    frozen = kept.is_inference() and not torch.is_inference_mode_enabled()
    if torch.is_grad_enabled() or count == 0:
        return torch.cat([kept[:, :, :count], new], 2)
    if end > kept.shape[2] or frozen:
        room = kept.new_empty(*kept.shape[:2], end + max(end // 16, 32), kept.shape[3])
        room[:, :, :count] = kept[:, :, :count]
        kept = room
    kept[:, :, count:end] = new
    return kept


def _empty_ring(k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, size = k.shape
    places = tokens + SLACK_TOKENS + 1
    positions = torch.full((batch, places), -1, device=k.device)
    return k.new_zeros(batch, heads, places, size), v.new_zeros(batch, heads, places, size), positions


def _attend_places(
    call: Call,
    q: Float[Tensor, "B h S D"],
    keys: Float[Tensor, "B g P D"],
    values: Float[Tensor, "B g P D"],
    positions: Int[Tensor, "B P"],
    window_blocks: Int[Tensor, " B"],
    sink_tokens: int,
) -> Float[Tensor, "B h S D"]:
    """Sink-and-window attention over keys in any order, known by their positions; strip by strip."""
    block, per_kv_head, parts = call.binding.block_tokens, q.shape[1] // keys.shape[1], []
    keys, values = keys.repeat_interleave(per_kv_head, 1), values.repeat_interleave(per_kv_head, 1)
    held = positions[:, None, :]
    for start in range(0, q.shape[2], _STRIP_TOKENS):
        own = call.positions[:, start : start + _STRIP_TOKENS, None]
        near = held // block > own // block - window_blocks[:, None, None]
        seen = (held >= 0) & (held <= own) & (near | (held < sink_tokens))
        seen = seen | (own < 0)  # padding: any finite answer, made 0 below
        queries = q[:, :, start : start + _STRIP_TOKENS]
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None], scale=call.scale)
        parts.append(torch.where(own[:, None] >= 0, output, 0))
    return torch.cat(parts, 2)


def _ring_address(call: Call, ring: int, *, first: int, dump: int) -> Int[Tensor, "B S"]:
    """Where each new token goes: its own place in the sink, its place in the ring, or nowhere.

    Only the last `ring` tokens of a row are written, so no two go to one place.
    """
    positions = call.positions
    after = call.before[:, None] + (positions >= 0).sum(1, keepdim=True)
    place = torch.where(positions < first, positions, first + positions % ring)
    dropped = (positions < 0) | ((positions >= first) & (positions < after - ring))
    return torch.where(dropped, dump, place)


def _with_positions(
    places: Int[Tensor, "B P"], address: Int[Tensor, "B S"], positions: Int[Tensor, "B S"]
) -> Int[Tensor, "B P"]:
    written = _scatter(places, 1, address, positions)
    written[:, -1] = -1
    return written


def _scatter(kept: Tensor, dim: int, index: Tensor, new: Tensor) -> Tensor:
    """Write in place, except where autograd or inference mode forbids it."""
    frozen = kept.is_inference() and not torch.is_inference_mode_enabled()
    if torch.is_grad_enabled() or frozen:
        return kept.scatter(dim, index, new)
    return kept.scatter_(dim, index, new)
