"""The compact mask: one number per cache slot instead of one bit per query and key.

transformers hands whatever a registered mask function returns to every attention layer verbatim. Ours returns None for plain causal
attention of an unpadded batch, and else an int32 code [B, 1, 1, T]: 0 for padding and unwritten slots, 1 + position for a real token,
positions counted within the token's own sequence (so packed sequences start again at 1). Static caches, whose queries are not the last
slots, get one more column: 1 + slot of the first query. It has four dimensions because `generate` makes the masks of static caches itself and
feeds them back, and transformers leaves only four-dimensional masks as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import UnsupportedModelError

MaskCode = Int[Tensor, "B 1 1 T_or_T1"]
Slots = slice | Int[Tensor, " slots"]
_KNOWN = "sparsesearch_spans"


def mask_code(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Bool[Tensor, "B seen"] | None = None,
    *,
    device: torch.device | str = "cpu",
    **_: Any,
) -> MaskCode | None:
    """The mask function registered beside our attention function; arguments as transformers passes them.

    Raises:
        UnsupportedModelError: the mask looks ahead (images, bidirectional models), or it cuts sequences while a cache is used.
    """
    slots = torch.arange(kv_length, device=device)
    starts = _sequence_starts(mask_function, batch_size, slots + kv_offset)
    static = isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length
    if starts is None and not static and kv_offset == 0 and _all_real(attention_mask):
        return None
    if starts is not None and (static or q_length != kv_length):
        raise UnsupportedModelError(
            "packed sequences and chunked local attention must run without a cache under a sparse plan, but one is in use. "
            "Pass use_cache=False, or run the model dense."
        )
    if attention_mask is None:
        code = (slots + kv_offset + 1).expand(batch_size, -1)
    else:
        real = F.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[1]))).bool()
        code = (real.cumsum(1) * real)[:, kv_offset : kv_offset + kv_length]
    if starts is not None:
        code = (code - torch.where(starts, code - 1, 0).cummax(1).values) * (code > 0)
    if static:
        written = slots + kv_offset < q_offset + q_length
        first_query = torch.as_tensor(q_offset - kv_offset + 1, device=device).expand(batch_size, 1)
        code = torch.cat([code * written, first_query], 1)
    return code.int()[:, None, None]


def _sequence_starts(
    mask_function: Callable[..., Any], batch_size: int, slots: Int[Tensor, " T"]
) -> Bool[Tensor, "B T"] | None:
    """Where a new sequence begins inside the row; None when nowhere. Found by probing the two diagonals next to the main one."""
    if mask_function is causal_mask_function or slots.is_meta:  # a model without weights is only described
        return None
    row = torch.arange(batch_size, device=slots.device)[:, None]
    head = torch.zeros_like(row)
    previous = (slots - 1).clamp(min=int(slots[0]))
    if torch.as_tensor(mask_function(row, head, previous[None], slots[None]) & (previous < slots)).any():
        raise UnsupportedModelError(
            "a sparse plan needs causal attention, but this model's mask lets tokens look ahead. Run it dense."
        )
    joined = mask_function(row, head, slots[None], previous[None]).expand(batch_size, -1)
    return None if bool(joined.all()) else ~joined


def _all_real(attention_mask: Tensor | None) -> bool:
    if attention_mask is None or attention_mask.is_meta:
        return True
    # reading values would break a compiled graph; the code is right for unpadded batches too
    return not torch.compiler.is_compiling() and bool(attention_mask.all())


def is_mask_code(mask: Tensor) -> bool:
    """Whether a mask is ours, and not one that the user gave to the model."""
    return mask.dim() == 4 and mask.dtype == torch.int32 and mask.shape[1:3] == (1, 1)


@dataclass(frozen=True)
class Span:
    """One sequence of one or more batch rows that agree in everything: where its tokens lie, and its grid.

    Attributes:
        rows: batch rows.
        q_slots: its queries, among the call's queries.
        k_slots: its keys, among the layer's keys.
        k_start: position of the first key that is still there (sliding-window caches drop the earlier ones).
        grid: `kv_len` counts from the sequence's first real token.
    """

    rows: slice | list[int]
    q_slots: Slots
    k_slots: Slots
    k_start: int
    grid: BlockGrid

    def rows_among(self, batch_size: int) -> Sequence[int]:
        """Its batch rows, as numbers."""
        return range(batch_size)[self.rows] if isinstance(self.rows, slice) else self.rows


def spans_of(
    code: MaskCode | None,
    law_tokens: Int[Tensor, " B"] | None,
    batch_size: int,
    q_len: int,
    kv_slots: int,
    block_tokens: int,
) -> Sequence[Span]:
    """Like `spans`, but read only once from a code that lies on a device: every layer of a forward gets the same one."""
    if code is None or not code.is_cuda:
        return tuple(spans(code, law_tokens, batch_size, q_len, kv_slots, block_tokens))
    laws = None if law_tokens is None else tuple(law_tokens.tolist())
    known = code.__dict__.setdefault(_KNOWN, {})
    key = (laws, batch_size, q_len, kv_slots, block_tokens)
    if key not in known:
        known[key] = tuple(spans(code.cpu(), law_tokens, batch_size, q_len, kv_slots, block_tokens))
    return known[key]  # type: ignore[no-any-return]


def spans(
    code: MaskCode | None,
    law_tokens: Int[Tensor, " B"] | None,
    batch_size: int,
    q_len: int,
    kv_slots: int,
    block_tokens: int,
) -> Iterator[Span]:
    """Cut a call into sequences; rows with equal codes and laws stay together. Padding belongs to no span.

    Raises:
        UnsupportedModelError: a call continues a cache, but nobody says what the prompt's length was.
    """
    if code is None and (law_tokens is None or bool((law_tokens == law_tokens[0]).all())):
        law = None if law_tokens is None else int(law_tokens[0])
        grid = BlockGrid(q_len, kv_slots, block_tokens, _law_len(law, q_len, kv_slots))
        yield Span(slice(None), slice(None), slice(None), 0, grid)
        return
    lines = torch.arange(1, kv_slots + 1).expand(batch_size, -1) if code is None else code[:, 0, 0]
    laws = torch.full((batch_size, 1), -1) if law_tokens is None else law_tokens[:, None]
    table = torch.cat([laws.cpu(), lines.cpu()], 1)
    distinct, owner = torch.unique(table, dim=0, return_inverse=True)
    for index, (law, *_) in enumerate(distinct.tolist()):
        rows = (owner == index).nonzero()[:, 0].tolist()
        line = distinct[index, 1 : kv_slots + 1]
        has_offset = distinct.shape[1] > kv_slots + 1
        first_query = int(distinct[index, -1]) - 1 if has_offset else kv_slots - q_len
        for slots in _sequences(line):
            queries = slots[slots >= first_query] - first_query
            if len(queries) == 0:
                continue
            k_start, kv_len = int(line[slots[0]]) - 1, int(line[slots[-1]])
            law_len = _law_len(None if law < 0 else law, len(queries), kv_len)
            grid = BlockGrid(len(queries), kv_len, block_tokens, law_len)
            yield Span(_compact(rows, batch_size), _slots(queries, q_len), _slots(slots, kv_slots), k_start, grid)


def _law_len(law_tokens: int | None, q_len: int, kv_len: int) -> int:
    if law_tokens is not None:
        return law_tokens
    if q_len != kv_len:
        raise UnsupportedModelError(
            "the length of the prompt must be known when a sparse plan continues a cache, but this model does not pass keyword "
            "arguments on to its attention. Use generate(use_cache=False), or run the model dense."
        )
    return kv_len


def _sequences(line: Int[Tensor, " T"]) -> list[Int[Tensor, " slots"]]:
    """Slots of each sequence of one row."""
    real = line.nonzero()[:, 0]
    if len(real) == 0:
        return []
    positions = line[real]
    cuts = (positions[1:] <= positions[:-1]).nonzero()[:, 0] + 1
    return list(real.tensor_split(cuts.tolist()))


def _slots(slots: Int[Tensor, " slots"], count: int) -> Slots:
    """A slice where the slots are contiguous: then nothing is copied."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first + 1 != len(slots):
        return slots
    return slice(None) if len(slots) == count else slice(first, last + 1)


def _compact(rows: list[int], batch_size: int) -> slice | list[int]:
    if len(rows) == batch_size:
        return slice(None)
    return slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows


def element_mask(
    code: MaskCode | None, q_len: int, kv_slots: int, sliding_window: int | None, device: torch.device
) -> Bool[Tensor, "B_or_1 1 S T"] | None:
    """The mask that transformers itself would build for dense SDPA, or None where SDPA needs none."""
    window_binds = sliding_window is not None and kv_slots >= sliding_window
    if code is None and not window_binds and q_len in (1, kv_slots):
        return None
    body = torch.arange(1, kv_slots + 1, device=device)[None] if code is None else code[:, 0, 0, :kv_slots]
    if code is not None and code.shape[-1] > kv_slots:
        first_query: int | Tensor = code[0, 0, 0, -1] - 1
    else:
        first_query = kv_slots - q_len
    key = torch.arange(kv_slots, device=device)
    query = torch.arange(q_len, device=device) + first_query
    sequence = (body == 1).cumsum(1)
    mask = (key <= query[:, None]) & (body > 0)[:, None] & (sequence[:, query, None] == sequence[:, None])
    if sliding_window is not None:
        mask &= key > query[:, None] - sliding_window
    return mask[:, None]
