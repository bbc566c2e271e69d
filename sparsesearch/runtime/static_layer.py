"""One layer of a static ragged cache: memory that falls, sizes that stay, and a decoding step without the host.

It takes the place of transformers' StaticLayer when the first prompt comes, because sizes follow the prompt's length where a rule grows
with it. A prompt, its chunks and later turns are handled on the host, row by row; one new token per row goes through two operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsesearch.errors import SparseSearchError
from sparsesearch.kernels.cache_ops import append_token, fill_prompt
from sparsesearch.kernels.plain_calls import as_called
from sparsesearch.rules.base import Rule
from sparsesearch.runtime.attention import attend_heads
from sparsesearch.runtime.backends import serving_kernel
from sparsesearch.runtime.binding import LayerBinding, group_heads
from sparsesearch.runtime.handles import KeyValues
from sparsesearch.runtime.mask_code import MaskCode, Span, spans_of
from sparsesearch.runtime.rule_attention import pick_heads
from sparsesearch.runtime.static_reads import Queries, Reads
from sparsesearch.runtime.static_regions import Layout


class StaticKeyValues(KeyValues):
    """A single new token of a layer that holds its prompt is answered without the host."""

    def __init__(self, layer: "StaticPlanLayer", keys: Tensor, values: Tensor) -> None:
        super().__init__(layer, keys, values)
        self.step = self._step if layer.is_prefilled and keys.shape[2] == 1 else None

    def _step(self, query: Float[Tensor, "B H one D"], scale: float) -> Float[Tensor, "B one H D"]:
        output: Tensor = self.layer.decode(query, self.keys, self.values, scale)
        return output


class StaticPlanLayer(CacheLayerMixin):
    """What the KV heads of one layer keep, in tensors whose addresses stay as long as prompts need no more room than the first.

    Attributes:
        binding: the layer's rules.
        layout: where each KV head's rows lie, once there was a prompt.
        max_cache_len: slots of the longest sequence.
        is_prefilled: whether a prompt is there.
        keys: rows of all regions, [rows, D].
        values: likewise.
        seen: int32 [B·G], real tokens so far.
        slots: int64, slots so far, padding included.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = False
    supports_early_init = False
    keys: Tensor
    values: Tensor
    seen: Tensor
    reads: Reads
    layout: Layout

    def __init__(self, binding: LayerBinding, max_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.binding, self.max_cache_len = binding, max_tokens
        self.slots = torch.zeros((), dtype=torch.int64)
        self.is_prefilled = False
        self.law_tokens: Tensor | None = None

    def rebind(self, binding: LayerBinding) -> None:
        """Follow another plan; only while empty."""
        if binding != self.binding:
            self.binding, self.is_initialized = binding, False

    def reset(self) -> None:
        """Forget the tokens; the memory stays."""
        self.is_prefilled = False
        self.slots.zero_()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The slot counter; memory comes with the prompt."""
        if self.slots.device != key_states.device:
            self.slots = torch.zeros((), dtype=torch.int64, device=key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Hand the layer to the attention function, in the place of keys and of values."""
        if not self.is_prefilled:
            self.lazy_initialization(key_states, value_states)
        handle = StaticKeyValues(self, key_states.detach(), value_states.detach())
        if handle.step is None:  # else the operator counts
            self.slots.add_(key_states.shape[2])
        return handle, handle

    def decode(
        self, q: Float[Tensor, "B H one D"], k: Float[Tensor, "B G one D"], v: Float[Tensor, "B G one D"], scale: float
    ) -> Float[Tensor, "B one H D"]:
        """Take in one token per row and attend; nothing depends on the host."""
        reads = self.reads
        append_token(
            k, v, self.keys, self.values, self.layout.start, *self.layout.limits, self.seen, reads.lens, self.slots,
            self.binding.block_tokens, self.kernel,
        )  # fmt: skip
        return reads.attend(q[:, :, 0], v[:, :, 0], self.keys, self.values, self.seen, scale, self.kernel)[:, None]

    def attend(
        self,
        q: Float[Tensor, "B H S D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        code: MaskCode | None,
        scale: float,
    ) -> Float[Tensor, "B H S D"]:
        """A prompt, a chunk of one, or a further turn."""
        assert self.law_tokens is not None, "prepare_call sets the prompt's length before any layer runs"
        self._check_room(k.shape[2])
        slots = k.shape[2] if code is None or not self.is_prefilled else code.shape[-1] - 1
        spans = spans_of(code, self.law_tokens, len(q), q.shape[2], slots, self.binding.block_tokens)
        if self.is_prefilled:
            news = _rows_of(spans, len(q))
            output = self._attend_chunk(q, k, v, news, scale)
            self._take_in_rows(k, v, news)
            return output
        self._allocate(q, k, v)
        groups = self.binding.groups if q.shape[2] > 1 else self.binding.decode_groups
        output = attend_heads(groups, self.binding, q, k, v, code, self.law_tokens, scale, None)
        self._take_in_prompt(k, v, spans)
        self.is_prefilled = True
        return output

    def _check_room(self, new_slots: int) -> None:
        slots = int(self.slots) if self.is_prefilled else new_slots  # `update` has counted the new ones
        if slots > self.max_cache_len:
            raise SparseSearchError(
                f"a batch must fit the cache's {self.max_cache_len} slots, padding included, but needs {slots}. Make a longer cache."
            )

    def _allocate(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Give each KV head its rows; those of an earlier prompt are used again if they suffice."""
        assert self.law_tokens is not None
        batch, num_kv_heads, _, size = k.shape
        binding, laws = self.binding, tuple(self.law_tokens.tolist())
        layout: Layout = binding.remembered(
            ("layout", laws, num_kv_heads, self.max_cache_len, k.device),
            lambda: Layout.of(binding.kept_by, num_kv_heads, binding.block_tokens, laws, self.max_cache_len, k.device),
        )
        fits = self.is_initialized and len(self.keys) >= layout.num_rows and self.seen.numel() == batch * num_kv_heads
        if not fits or self.keys.dtype != k.dtype or self.keys.device != k.device or self.keys.shape[1] != size:
            self.keys, self.values = (k.new_empty(layout.num_rows, size) for _ in range(2))
            self.seen = torch.zeros(batch * num_kv_heads, dtype=torch.int32, device=k.device)
            queries: Queries = binding.remembered(
                ("queries", num_kv_heads, k.device), lambda: Queries(binding.kept_by, num_kv_heads, k.device)
            )
            self.reads = Reads(queries, layout, size)
        self.seen.zero_()
        self.reads.sums.zero_()
        self.layout = self.reads.layout = layout
        self.kernel = serving_kernel(binding.backend, q, k, v, binding.block_tokens) is not None
        self.is_initialized = True

    def _take_in_prompt(self, k: Tensor, v: Tensor, spans: Sequence[Span]) -> None:
        """Keep what later queries can reach of the first tokens, and list what the next ones will read."""
        assert self.law_tokens is not None
        news, batch = _rows_of(spans, len(k)), len(k)
        counts = dict.fromkeys(range(batch), 0) | {row: span.grid.kv_len for row, span in news}
        if any(isinstance(span.k_slots, Tensor) for span in spans):  # with gaps
            self._take_in_rows(k, v, news)
        else:
            offsets = dict.fromkeys(range(batch), 0) | {row: span.k_slots.start or 0 for row, span in news}  # type: ignore[union-attr]
            lines = tuple(counts.values()), tuple(offsets.values())
            numbers: Tensor = self.binding.remembered(
                ("prompt", lines, k.device), lambda: torch.tensor(lines, dtype=torch.int32, device=k.device)
            )
            as_called(fill_prompt)(
                k, v, self.keys, self.values, self.layout.start, *self.layout.limits, numbers[0], numbers[1], self.seen,
                self.binding.block_tokens, self.kernel,
            )  # fmt: skip
            for row, span in news if self.reads.queries.has_means else ():
                self.reads.add_values(row, v[row, :, span.k_slots])
        self.reads.tabulate(self.binding, self.law_tokens, tuple(counts.values()), self.max_cache_len)

    def _take_in_rows(self, k: Tensor, v: Tensor, news: Sequence[tuple[int, Span]]) -> None:
        for row, span in news:
            self._take_in(row, span.grid.q_start, k[row][:, span.q_slots], v[row][:, span.q_slots])

    def _take_in(self, row: int, before: int, k: Float[Tensor, "G s D"], v: Float[Tensor, "G s D"]) -> None:
        """Keep of one row's new keys and values, which `before` tokens precede, what later queries can reach."""
        count = before + k.shape[1]
        for region in self.layout.regions(self.keys, self.values):
            new_k, new_v = (pick_heads(x[None], region.kv_heads)[0] for x in (k, v))
            if not region.rings[row].dropped(count):  # all stay where their position puts them
                region.keys[row, :, before:count], region.values[row, :, before:count] = new_k, new_v
                continue
            if before:
                old_k, old_v = region.ordered(row, before)
                new_k, new_v = torch.cat([old_k, new_k], 1), torch.cat([old_v, new_v], 1)
            region.fill(row, count, new_k, new_v, missing=region.rings[row].dropped(before))
        self.reads.add_values(row, v)
        self.seen.view(self.layout.batch, -1)[row] = count

    def _attend_chunk(
        self, q: Tensor, k: Tensor, v: Tensor, news: Sequence[tuple[int, Span]], scale: float
    ) -> Float[Tensor, "B H S D"]:
        """Attention of new queries over what each region keeps, laid out in order of position, and the new keys."""
        size, output = q.shape[1] // k.shape[1], torch.zeros_like(q)
        for region in self.layout.regions(self.keys, self.values):
            heads = [head * size + member for head in region.kv_heads for member in range(size)]
            rules: list[Rule] = [
                self.binding.rules[head] if region.rule is None and q.shape[2] > 1 else self.binding.kept_by[head]
                for head in heads
            ]
            kept = {row: region.ordered(row, span.grid.q_start) for row, span in news}
            longest = max((keys.shape[1] for keys, _ in kept.values()), default=0)
            code = torch.zeros(len(q), longest + q.shape[2], dtype=torch.int32)
            shape = (len(q), len(region.kv_heads), code.shape[1], q.shape[3])
            joined_k, joined_v = q.new_zeros(shape), q.new_zeros(shape)
            for row, span in news:
                old = kept[row][0].shape[1]
                code[row, longest - old : longest] = torch.arange(1, old + 1)
                code[row, longest:][span.q_slots] = torch.arange(old + 1, old + 1 + span.grid.q_len, dtype=torch.int32)
                for target, part in zip((joined_k, joined_v), kept[row], strict=True):
                    target[row, :, longest - old : longest] = part
            for target, new in zip((joined_k, joined_v), (k, v), strict=True):
                target[:, :, longest:] = pick_heads(new, region.kv_heads)
            groups = group_heads(rules, range(len(heads)))
            own = pick_heads(q, heads)
            part = attend_heads(
                groups, self.binding, own, joined_k, joined_v, code[:, None, None], self.law_tokens, scale, None, heads
            )
            output.index_copy_(1, torch.tensor(heads, device=q.device), part)
        self.reads.put_means(output, v, news)
        return output

    def get_seq_length(self) -> Any:
        """Slots seen, padding included; a tensor once there is a prompt, as in transformers' static layers."""
        return self.slots if self.is_prefilled else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers all slots there may be."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Slots of the longest sequence."""
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Refused."""
        raise SparseSearchError(
            "a static cache that drops keys cannot take tokens back, but crop was called. Use a dynamic cache (the default of generate)."
        )

    def reorder_cache(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Rows for the next step of beam search."""
        self._choose_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._choose_rows(torch.arange(self.layout.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Int[Tensor, " b"]) -> None:
        """Some rows."""
        self._choose_rows(torch.arange(self.layout.batch)[indices.cpu()])

    def _choose_rows(self, index: Int[Tensor, " b"]) -> None:
        """Let row i be what row index[i] was; addresses stay if the batch does."""
        assert self.law_tokens is not None
        rows, there, batch = index.tolist(), index.to(self.seen.device), self.layout.batch
        before, layout = self.layout.regions(self.keys, self.values), self.layout.chosen(rows)
        seen = self.seen.view(batch, -1)[there].flatten()
        if len(rows) == batch:
            self.seen.copy_(seen)
            after = before
        else:
            self.keys, self.values = (x.new_empty(layout.num_rows, x.shape[1]) for x in (self.keys, self.values))
            self.seen, after = seen, layout.regions(self.keys, self.values)
        for old, new in zip(before, after, strict=True):
            for source, target in ((old.keys, new.keys), (old.values, new.values)):
                if source is target:
                    target.copy_(source[there])
                else:
                    torch.index_select(source, 0, there, out=target)
        self.law_tokens, self.layout = self.law_tokens[index.cpu()], layout
        self.reads.choose_rows(there, layout)

    def next_rows(self) -> Int[Tensor, " n"]:
        """Rows that the next token of each row is written to."""
        (room, sinks, windows), block = self.layout.limits, self.binding.block_tokens
        position = self.seen.long()
        place = torch.minimum(position // block, sinks + windows - 1) * block + position % block
        return (self.layout.start + place)[(windows > 0) & (place < room)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and sums held."""
        return self.keys.nbytes + self.values.nbytes + self.reads.sums.nbytes if self.is_initialized else 0


def _rows_of(spans: Sequence[Span], batch: int) -> list[tuple[int, Span]]:
    """Each sequence's row, with its span."""
    return [(row, span) for span in spans for row in span.rows_among(batch)]
