"""Prompts, their chunks and later turns of a static ragged cache: on the host, row by row, unlike the tokens that follow."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.kernels.cache_ops import fill_prompt
from sparsesearch.kernels.plain_calls import as_called
from sparsesearch.rules.base import Rule
from sparsesearch.runtime.attention import attend_heads
from sparsesearch.runtime.binding import group_heads
from sparsesearch.runtime.mask_code import Span
from sparsesearch.runtime.rule_attention import pick_heads

if TYPE_CHECKING:
    from sparsesearch.runtime.static_layer import StaticPlanLayer


def take_in_prompt(layer: "StaticPlanLayer", k: Tensor, v: Tensor, spans: Sequence[Span]) -> None:
    """Keep what later queries can reach of the first tokens, and list what the next ones will read."""
    assert layer.law_tokens is not None
    news, batch = rows_of(spans, len(k)), len(k)
    counts = dict.fromkeys(range(batch), 0) | {row: span.grid.kv_len for row, span in news}
    if any(isinstance(span.k_slots, Tensor) for span in spans):  # with gaps
        take_in_rows(layer, k, v, news)
    else:
        offsets = dict.fromkeys(range(batch), 0) | {row: span.k_slots.start or 0 for row, span in news}  # type: ignore[union-attr]
        lines = tuple(counts.values()), tuple(offsets.values())
        numbers: Tensor = layer.binding.remembered(
            ("prompt", lines, k.device), lambda: torch.tensor(lines, dtype=torch.int32, device=k.device)
        )
        as_called(fill_prompt)(
            k, v, layer.keys, layer.values, layer.layout.start, *layer.layout.limits, numbers[0], numbers[1], layer.seen,
            layer.binding.block_tokens, layer.kernel,
        )  # fmt: skip
        for row, span in news if layer.reads.queries.has_means else ():
            layer.reads.add_values(row, v[row, :, span.k_slots])
        layer.reads.bound(layer.keys, tuple(counts.items()))
    layer.reads.tabulate(layer.binding, layer.law_tokens, tuple(counts.values()), layer.max_cache_len)


def attend_chunk(
    layer: "StaticPlanLayer", q: Tensor, k: Tensor, v: Tensor, news: Sequence[tuple[int, Span]], scale: float
) -> Float[Tensor, "B H S D"]:
    """Attention of new queries over what each region keeps, laid out in order of position, and the new keys."""
    size, output = q.shape[1] // k.shape[1], torch.zeros_like(q)
    for region in layer.layout.regions(layer.keys, layer.values):
        heads = [head * size + member for head in region.kv_heads for member in range(size)]
        rules: list[Rule] = [
            layer.binding.rules[head] if region.rule is None and q.shape[2] > 1 else layer.binding.kept_by[head]
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
            groups, layer.binding, own, joined_k, joined_v, code[:, None, None], layer.law_tokens, scale, None, heads
        )
        output.index_copy_(1, torch.tensor(heads, device=q.device), part)
    layer.reads.put_means(output, v, news)
    return output


def take_in_rows(layer: "StaticPlanLayer", k: Tensor, v: Tensor, news: Sequence[tuple[int, Span]]) -> None:
    """Keep what later queries can reach of each row's new tokens."""
    for row, span in news:
        _take_in(layer, row, span.grid.q_start, k[row][:, span.q_slots], v[row][:, span.q_slots])
    layer.reads.bound(layer.keys, [(row, span.grid.kv_len) for row, span in news])


def _take_in(
    layer: "StaticPlanLayer", row: int, before: int, k: Float[Tensor, "G s D"], v: Float[Tensor, "G s D"]
) -> None:
    """Keep of one row's new keys and values, which `before` tokens precede, what later queries can reach."""
    count = before + k.shape[1]
    for region in layer.layout.regions(layer.keys, layer.values):
        new_k, new_v = (pick_heads(x[None], region.kv_heads)[0] for x in (k, v))
        if not region.rings[row].dropped(count):  # all stay where their position puts them
            region.keys[row, :, before:count], region.values[row, :, before:count] = new_k, new_v
            continue
        if before:
            old_k, old_v = region.ordered(row, before)
            new_k, new_v = torch.cat([old_k, new_k], 1), torch.cat([old_v, new_v], 1)
        region.fill(row, count, new_k, new_v, missing=region.rings[row].dropped(before))
    layer.reads.add_values(row, v)
    layer.seen.view(layer.layout.batch, -1)[row] = count


def rows_of(spans: Sequence[Span], batch: int) -> list[tuple[int, Span]]:
    """Each sequence's row, with its span."""
    return [(row, span) for span in spans for row in span.rows_among(batch)]
