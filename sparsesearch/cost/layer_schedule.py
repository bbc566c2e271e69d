"""The tile schedule that one layer's prefill runs on a device, from the rules of its heads."""

from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.kernels.dispatch import Backend, tile_shape
from sparsesearch.kernels.schedule import HeadTiles, Span, TileSchedule, Workers, build_schedule
from sparsesearch.model_shapes import ModelShape
from sparsesearch.rules import Rule
from sparsesearch.workload import Workload

PROBE_HEAD_DIM = 16
MOST_SCHEDULED_TOKENS = (
    1 << 18
)  # beyond this, the sequences of a batch are priced one after another: each fills the device


def layer_schedule(
    rules: tuple[Rule, ...], block_tokens: int, shape: ModelShape, workload: Workload, costs: LayerCosts
) -> tuple[TileSchedule, int]:
    """The schedule of one layer's prefill, and how often it runs."""
    batch, repeats = workload.batch, 1
    if batch * workload.prompt_tokens > MOST_SCHEDULED_TOKENS:
        batch, repeats = 1, batch
    key = (
        rules,
        block_tokens,
        workload.prompt_tokens,
        batch,
        shape.num_kv_heads,
        shape.head_dim,
        costs.workers,
        costs.kernel,
    )
    return _schedule(*key), repeats


@lru_cache(maxsize=256)
def _schedule(
    rules: tuple[Rule, ...],
    block_tokens: int,
    length: int,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    workers: Workers,
    kernel: Backend,
) -> TileSchedule:
    distinct = tuple(dict.fromkeys(rules))
    grid = BlockGrid(length, length, block_tokens)
    tiles = HeadTiles(
        torch.stack([choice_of(rule, grid) for rule in distinct]), tuple(distinct.index(r) for r in rules)
    )
    return build_schedule(
        tuple(Span(grid, row) for row in range(batch)),
        [tiles] * batch,
        num_kv_heads=num_kv_heads,
        shape=tile_shape(kernel, head_dim, block_tokens),
        workers=workers,
        head_bytes=2 * head_dim,
    )


@lru_cache(maxsize=512)
def choice_of(rule: Rule, grid: BlockGrid) -> Bool[Tensor, "M N"]:
    """The tiles of one head. A dynamic rule chooses on random queries and keys: its budget is exact, its overlaps are typical."""
    if rule.replaces_output:
        return torch.zeros_like(grid.reachable())
    if not rule.dynamic:
        return rule.select(grid)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, PROBE_HEAD_DIM, generator=generator) for tokens in (grid.q_len, grid.kv_len))
    tiles = rule.select(grid, q * PROBE_HEAD_DIM**-0.5, k)
    return tiles.expand(1, grid.num_q_blocks, grid.num_k_blocks)[
        0
    ]  # a rule that keeps all may say so once for all heads
