"""One layer's prefill as the calls it is made of, for a device that works on one call at a time: heads that follow one rule share a call."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import CostModel, UnitWork, WorkKind
from sparsesearch.cost.layer_costs import PrefillCosts
from sparsesearch.cost.layer_schedule import choice_of
from sparsesearch.rules import Rule


@runtime_checkable
class CallCosts(CostModel, PrefillCosts, Protocol):
    """A cost model that knows what a call takes, however many heads share it."""

    @property
    def dtype_bytes(self) -> int:
        """Per element of what was measured."""

    @property
    def prices_layers(self) -> bool:
        """Whether it knows the rest of a prefill too."""

    def call_latency_s(self, work: UnitWork) -> float:
        """Seconds of one call of all the heads of `work`, for one sequence."""


def unit_work(rule: Rule, tiles: float, grid: BlockGrid, head_dim: int, query_heads: int, batch: int = 1) -> UnitWork:
    """What a unit under a rule computes in one prefill, in the words of the cost models; reused tiles are not chosen again."""
    kind: WorkKind = "dense" if rule.kind == "dense" else "tiles"
    match rule.rest:
        case "zero":
            kind = "zero"
        case "mean_value":
            kind = "mean_value"
    return UnitWork(
        kind=kind,
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        head_dim=head_dim,
        query_heads=query_heads,
        tiles=tiles,
        query_blocks=grid.num_q_blocks,
        block_tokens=grid.block_tokens,
        estimator=rule.kind if chooses(rule, grid) else None,
        batch=batch,
    )


def chooses(rule: Rule, grid: BlockGrid) -> bool:
    """Whether a head works out its tiles in this call: not where it reuses another's, and not where its law keeps all."""
    return rule.dynamic and not rule.reuses and not rule.keeps_all(grid)


def calls_of(rules: Sequence[Rule], tile_rules: Sequence[Rule], grid: BlockGrid, head_dim: int) -> list[UnitWork]:
    """The calls of one layer; `tile_rules` are the rules whose tiles the heads compute."""
    pairs = list(zip(rules, tile_rules, strict=True))
    counts = {pair: pairs.count(pair) for pair in dict.fromkeys(pairs)}
    return [
        unit_work(rule, count * float(choice_of(source, grid).sum()), grid, head_dim, count)
        for (rule, source), count in counts.items()
    ]
