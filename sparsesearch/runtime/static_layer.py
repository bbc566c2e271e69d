"""One layer of a static ragged cache: memory that falls, sizes that stay, and a decoding step without the host.

It takes the place of transformers' StaticLayer when the first prompt comes, because sizes follow the prompt's length where a rule grows
with it. A prompt, its chunks and later turns are handled on the host, row by row; one new token per row goes through two operators.
"""

from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsesearch.errors import SparseSearchError
from sparsesearch.kernels.cache_ops import append_token
from sparsesearch.runtime.attention import attend_heads
from sparsesearch.runtime.backends import serving_kernel
from sparsesearch.runtime.binding import LayerBinding
from sparsesearch.runtime.handles import KeyValues
from sparsesearch.runtime.mask_code import MaskCode, spans_of
from sparsesearch.runtime.static_prompts import attend_chunk, rows_of, take_in_prompt, take_in_rows
from sparsesearch.runtime.static_reads import Queries, Reads
from sparsesearch.runtime.static_regions import Layout
from sparsesearch.step_blocks import StepSelection

_CHANGES = count()


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
        mates: the layers before this one in the same cache by their modules' paths, for those that reuse. Not this one: a layer that led
            back to itself would keep its memory until Python looks for cycles.
        last_change: a number that no layer had before, whenever something else than a decoding step may have moved a tensor.
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

    def __init__(self, binding: LayerBinding, max_tokens: int, mates: "dict[str, StaticPlanLayer]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mates = dict(mates)
        mates[binding.path] = self
        self.binding, self.max_cache_len = binding, max_tokens
        self.slots = torch.zeros((), dtype=torch.int64)
        self.is_prefilled = False
        self.last_change = next(_CHANGES)
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
        self.last_change = next(_CHANGES)
        self._check_room(k.shape[2])
        slots = k.shape[2] if code is None or not self.is_prefilled else code.shape[-1] - 1
        spans = spans_of(code, self.law_tokens, len(q), q.shape[2], slots, self.binding.block_tokens)
        if self.is_prefilled:
            news = rows_of(spans, len(q))
            output = attend_chunk(self, q, k, v, news, scale)
            take_in_rows(self, k, v, news)
            return output
        self._allocate(q, k, v)
        groups = self.binding.groups if q.shape[2] > 1 else self.binding.decode_groups
        output = attend_heads(groups, self.binding, q, k, v, code, self.law_tokens, scale, None)
        take_in_prompt(self, k, v, spans)
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
                ("queries", num_kv_heads, k.device), lambda: Queries(binding, num_kv_heads, k.device)
            )
            self.reads = Reads(queries, layout, self.keys, self.max_cache_len)
        self.reads.taken = [self.selection_of(path) for path in self.reads.queries.choosers.source_paths]
        self.seen.zero_()
        self.reads.sums.zero_()
        self.layout = self.reads.layout = layout
        self.kernel = serving_kernel(binding.backend, q, k, v, binding.block_tokens) is not None
        self.is_initialized = True

    def selection_of(self, path: str) -> StepSelection:
        """What another layer of this cache leaves in each step.

        Raises:
            SparseSearchError: it holds no prompt, or leaves nothing.
        """
        source = self.mates.get(path)
        left = source.reads.left if source is not None and source.is_initialized else None
        if left is None:
            raise SparseSearchError(
                f"{self.binding.path} reuses what {path} chooses for every token, which must run before it on the same cache, but left nothing. "
                "Run the whole model."
            )
        return left

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
        self.last_change = next(_CHANGES)
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
        """Bytes of keys, values, sums and bounds held."""
        if not self.is_initialized:
            return 0
        return sum(x.nbytes for x in (self.keys, self.values, self.reads.sums, self.reads.low, self.reads.high))
