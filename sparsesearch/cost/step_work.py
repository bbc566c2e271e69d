"""What one decoding step of a layer reads, and what its cache holds, in the words of the cost models."""

from collections.abc import Sequence

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import CostModel, DecodeWork, StepChoice
from sparsesearch.rules import Rule


def step_choice(rule: Rule, grid: BlockGrid) -> StepChoice | None:
    """The choice that a head makes for the only query of `grid`; None where its keys are known without looking at them."""
    if not rule.decodes or rule.keeps_all(grid):
        return None
    return StepChoice(rule.kind, grid.kv_len, grid.block_tokens)


def head_works(
    rules: Sequence[Rule], grid: BlockGrid, *, head_dim: int, batch: int, dtype_bytes: int
) -> tuple[DecodeWork, ...]:
    """What one KV head reads for the only query of `grid`, per sequence of `batch`; `rules` are those of its query heads.

    The query heads that do not choose share one pass over as many keys as the neediest of them needs; those that choose by one rule are one
    work.
    """
    choosing: dict[Rule, int] = {}
    shared: list[int] = []
    for rule in rules:
        if step_choice(rule, grid) is None:
            shared.append(rule.kept_tokens(grid))
        else:
            choosing[rule] = choosing.get(rule, 0) + 1
    works = [DecodeWork(max(shared), head_dim, len(shared), batch, dtype_bytes)] if shared else []
    works += [
        DecodeWork(rule.step_tokens(grid), head_dim, count, batch, dtype_bytes, step_choice(rule, grid))
        for rule, count in choosing.items()
    ]
    return tuple(works)


def cached_tokens(rules: Sequence[Rule], grid: BlockGrid) -> float:
    """Keys and values that one KV head holds per sequence after the only query of `grid`, the bounds of blocks counted as what they weigh.

    The smallest and the largest value of each channel of a block take as much room as the key and value of one token.
    """
    bounded = any(rule.reads_bounds for rule in rules)
    return max(rule.kept_tokens(grid) for rule in rules) + (grid.num_k_blocks if bounded else 0)


def unpriced(rules: Sequence[Rule], model: CostModel | None) -> tuple[str, ...]:
    """Kinds of these rules that choose while decoding and whose choice the model has no price for: it prices them as reading every key."""
    known = frozenset() if model is None else model.step_choices
    step = BlockGrid(1, 1, 1)
    return tuple(sorted({rule.kind for rule in rules if step_choice(rule, step) is not None} - known))
