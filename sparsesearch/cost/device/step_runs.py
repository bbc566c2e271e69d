"""The micro-runs of rules that choose what a decoded token reads: the choice, the reading of pages, and both as held-out steps."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparsesearch.cost.device.micro_bench import Bench, Row
from sparsesearch.cost.device.run_plan import STEP_BLOCK_TOKENS as BLOCK_TOKENS
from sparsesearch.cost.device.run_plan import STEP_GROUP as GROUP
from sparsesearch.cost.device.run_plan import RunPlan, step_rules
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.page_ops import pages_by_bounds
from sparsesearch.rules import Rule
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.step_blocks import StepBlocks, page_tables

KV_HEADS = 8
HEADS = KV_HEADS * GROUP
CHOICE_DIM = 128
"""Head size of the choices; bounds are a block's share of the keys, so it matters little."""
CACHED_BLOCKS = 1024
"""Of each KV head, among which pages lie that are read: 64k tokens."""

Choose = Callable[[int], tuple[Tensor, Tensor]]


def step_runs(bench: Bench, plan: RunPlan) -> Iterator[Row]:
    """All of them."""
    for kind, rule in step_rules().items():
        for batch in plan.step_batches:
            yield from choice_runs(bench, kind, rule, batch, plan.step_blocks)
    for head_dim in plan.decode_head_dims:
        for batch in plan.step_batches:
            yield from page_runs(bench, head_dim, batch, plan.step_keys)
    for blocks in plan.step_blocks[-2:-1]:
        yield from joined_runs(bench, plan.step_batches, blocks)
    yield from held_out_runs(bench, plan.steps_held_out)


def choice_runs(bench: Bench, kind: str, rule: Rule, batch: int, blocks: Sequence[int]) -> Iterator[Row]:
    """Choosing for one token per sequence, as `runtime.step_choices` does: by kernels where there are any, else by the rule itself."""
    for count in blocks:
        if isinstance(rule, BoundsTopk):
            choose = by_bounds(bench, batch, count, 32, KV_HEADS)
        else:
            choose = _by_rule(bench, rule, batch, count)
        try:
            timed = bench.time(choose, copies=_turns(bench, batch, count), warm_s=0.02)
        except RuntimeError as error:
            yield {"group": "skipped", "name": f"{kind} in steps", "tokens": count, "error": str(error)[:200]}
            return
        yield bench.row("step_choice", timed, name=kind, batch=batch, heads=batch * HEADS, blocks=count)


def _turns(bench: Bench, batch: int, blocks: int) -> int:
    """Bounds that take turns: a model's other layers push them out of the cache."""
    return bench.copies(8.0 * batch * KV_HEADS * blocks * CHOICE_DIM, most=32)


def by_bounds(bench: Bench, batch: int, blocks: int, keep_blocks: int, kv_heads: int) -> Choose:
    """The kernels of `page_ops` for the query heads of so many KV heads, on random bounds; the newest key is the last of the last block."""
    turns = _turns(bench, batch, blocks)
    bounds = [[bench.normal(batch, kv_heads, blocks, CHOICE_DIM) for _ in "lh"] for _ in range(turns)]
    pairs, newest = batch * KV_HEADS, blocks * BLOCK_TOKENS - 1
    q, keys = bench.normal(batch, HEADS, CHOICE_DIM), bench.normal(pairs, CHOICE_DIM)
    start = torch.arange(pairs, device=bench.device) - newest  # of all keys only the newest is read
    seen, budget = (
        torch.full((n,), x, dtype=torch.int32, device=bench.device)
        for n, x in ((pairs, newest + 1), (batch, keep_blocks))
    )
    own, places = (torch.arange(count, device=bench.device) for count in (kv_heads, kv_heads * GROUP))

    def choose(copy: int) -> tuple[Tensor, Tensor]:
        where = start, seen, own, own, places, budget
        pages: tuple[Tensor, Tensor] = pages_by_bounds(q, keys, *bounds[copy], *where, 1, BLOCK_TOKENS)
        return pages

    return choose


def _by_rule(bench: Bench, rule: Rule, batch: int, blocks: int) -> Choose:
    tokens = blocks * BLOCK_TOKENS
    q, keys = bench.normal(batch, KV_HEADS, GROUP, CHOICE_DIM), bench.normal(batch, KV_HEADS, tokens, CHOICE_DIM)
    position = torch.full((batch, 1, 1, 1), tokens - 1, device=bench.device)
    step = StepBlocks(position, position + 1, BLOCK_TOKENS, blocks, keys)

    def choose(_: int) -> tuple[Tensor, Tensor]:
        return page_tables(rule.step_tiles(q, step).flatten(1, 2), position[:, 0, 0, 0], BLOCK_TOKENS)

    return choose


def page_runs(bench: Bench, head_dim: int, batch: int, keys: Sequence[int]) -> Iterator[Row]:
    """Every query head reads pages of its own, drawn anew: heads that share a KV head may agree on more of them in a trained model."""
    pairs, tokens = batch * KV_HEADS, CACHED_BLOCKS * BLOCK_TOKENS
    k, v = (bench.normal(pairs * tokens, head_dim) for _ in "kv")
    q, kv_head = bench.normal(batch, HEADS, head_dim), torch.arange(HEADS, device=bench.device) // GROUP
    start = torch.arange(pairs, device=bench.device).view(batch, -1) * tokens
    for count in keys:
        turns = bench.copies(4.0 * batch * HEADS * count * head_dim, most=8)
        tables = [_pages(bench, batch * HEADS, count // BLOCK_TOKENS) for _ in range(turns)]
        lens = torch.full((batch * HEADS,), count, dtype=torch.int32, device=bench.device)

        def read(copy: int) -> object:
            first = start.index_select(1, kv_head).flatten()
            table = tables[copy]  # noqa: B023
            return ragged_decode(
                q, k, v, first, lens, scale=head_dim**-0.5, table=table, page_tokens=BLOCK_TOKENS  # noqa: B023
            )  # fmt: skip

        timed = bench.time(read, copies=len(tables), warm_s=0.02)
        yield bench.row("paged_decode", timed, head_dim=head_dim, batch=batch, tokens=count, readers=HEADS)


def _pages(bench: Bench, readers: int, count: int) -> Tensor:
    """So many of the cached blocks for each reader, ascending."""
    order = torch.rand(readers, CACHED_BLOCKS, device=bench.device, generator=bench.generator).argsort(-1)
    return order[:, :count].sort(-1).values.int().contiguous()


def held_out_runs(bench: Bench, steps: Sequence[tuple[int, int, int]]) -> Iterator[Row]:
    """A layer's attention whose heads all choose by bounds; `steps` are (batch, blocks, keys read)."""
    for batch, blocks, keys in steps:
        choose = by_bounds(bench, batch, blocks, keys // BLOCK_TOKENS, KV_HEADS)
        pairs, tokens = batch * KV_HEADS, blocks * BLOCK_TOKENS
        k, v = (bench.normal(pairs * tokens, CHOICE_DIM) for _ in "kv")
        q, kv_head = bench.normal(batch, HEADS, CHOICE_DIM), torch.arange(HEADS, device=bench.device) // GROUP
        start = torch.arange(pairs, device=bench.device).view(batch, -1) * tokens

        def run(copy: int) -> object:
            table, lens = choose(copy)  # noqa: B023
            first = start.index_select(1, kv_head).flatten()  # noqa: B023
            scale = CHOICE_DIM**-0.5
            return ragged_decode(q, k, v, first, lens, scale=scale, table=table, page_tokens=BLOCK_TOKENS)  # noqa: B023

        timed = bench.time(run, copies=_turns(bench, batch, blocks), warm_s=0.02)
        fixed = {"name": BoundsTopk.kind_name(), "head_dim": CHOICE_DIM, "block_tokens": BLOCK_TOKENS, "readers": HEADS}
        yield bench.row("step_held_out", timed, batch=batch, blocks=blocks, tokens=keys, **fixed)


def joined_runs(bench: Bench, batches: Sequence[int], blocks: int) -> Iterator[Row]:
    """A layer of which half the KV heads stream and the query heads of the other half choose, put together as `runtime.static_reads` does it."""
    half, tokens, keys = KV_HEADS // 2, blocks * BLOCK_TOKENS, min(2048, blocks * BLOCK_TOKENS // 2)
    for batch in batches:
        choose = by_bounds(bench, batch, blocks, keys // BLOCK_TOKENS, half)
        k, v = (bench.normal(batch * KV_HEADS * tokens, CHOICE_DIM) for _ in "kv")
        q, heads = bench.normal(batch, HEADS, CHOICE_DIM), torch.arange(half * GROUP, device=bench.device)
        start = torch.arange(batch * KV_HEADS, device=bench.device).view(batch, -1) * tokens
        lens = torch.full((batch * KV_HEADS,), keys, dtype=torch.int32, device=bench.device)
        streams = (torch.arange(KV_HEADS, device=bench.device) >= half).int()
        turns = min(_turns(bench, batch, blocks), tokens // keys)
        windows = [start.flatten() + turn * keys for turn in range(turns)]

        def run(copy: int) -> object:
            own = (lens.view(batch, -1) * streams).flatten()  # noqa: B023
            scale = CHOICE_DIM**-0.5
            out = ragged_decode(q, k, v, windows[copy], own, scale=scale)[0]  # noqa: B023
            table, chosen_lens = choose(copy)  # noqa: B023
            first = start.index_select(1, heads // GROUP).flatten()  # noqa: B023
            asked = q.index_select(1, heads)  # noqa: B023
            where = {"scale": scale, "table": table, "page_tokens": BLOCK_TOKENS}
            chosen = ragged_decode(asked, k, v, first, chosen_lens, **where)[0]  # noqa: B023
            return out.index_copy_(1, heads, chosen)  # noqa: B023

        timed = bench.time(run, copies=turns, warm_s=0.02)
        fixed = {"name": BoundsTopk.kind_name(), "head_dim": CHOICE_DIM, "block_tokens": BLOCK_TOKENS}
        yield bench.row("step_joined", timed, batch=batch, blocks=blocks, tokens=keys, kv_heads=half, **fixed)
