"""What share of dense attention's tiles a plan computes, and computed."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule


@dataclass
class TileCount:
    """Tiles that dynamic rules chose in prefill calls, and tiles they could have chosen, over heads and sequences."""

    chosen: float = 0.0
    reachable: float = 0.0


def achieved_density(plan: Plan, length_tokens: int, dynamic: TileCount) -> float:
    """Tiles computed / tiles dense attention computes in one prefill, over all query heads; removed ones compute none.

    Exact for static rules, and for dynamic ones that keep all tiles at this length, which run densely and are not asked; the others enter with
    what they chose in the run that `dynamic` counted.

    Raises:
        SpecError: the plan has dynamic rules and the run counted none of their choices.
    """
    grid = BlockGrid(length_tokens, length_tokens, plan.block_tokens)
    heads = Counter(rule for module, head, rule in plan.heads() if head not in plan.removed_heads(module))
    num_dynamic = sum(count for rule, count in heads.items() if _chooses(rule, grid))
    tiles: float = sum(count for rule, count in heads.items() if rule.dynamic) - num_dynamic
    tiles += sum(density(rule.select(grid), grid) * count for rule, count in heads.items() if not rule.dynamic)
    if num_dynamic:
        if not dynamic.reachable:
            raise SpecError(
                f"the density of {num_dynamic} heads with dynamic rules must be counted in a run, but no choice was seen: the runtime did "
                "not ask the rules. Use a backend that does."
            )
        tiles += num_dynamic * dynamic.chosen / dynamic.reachable
    return tiles / plan.base_model.geometry.total_heads


@contextmanager
def counting(plan: Plan | None, count: TileCount) -> Iterator[None]:
    """Add to `count` what the plan's dynamic rules choose while the block runs.

    Only the rule knows, and only with the queries and keys of the run, so `select` of its class is watched, and the kernels that choose in its
    stead. Not for several threads at once.
    """
    kinds = {type(rule) for _, _, rule in plan.heads() if rule.dynamic} if plan is not None else set()
    with ExitStack() as undo:
        for kind in sorted(kinds, key=lambda kind: kind.__name__):
            original = kind.select
            kind.select = _watched(original, count)  # type: ignore[method-assign]
            undo.callback(setattr, kind, "select", original)
        if kinds and find_spec("triton") is not None:
            from sparsesearch.kernels.device_select import watchers

            watch = partial(_add, count)
            watchers.append(watch)
            undo.callback(watchers.remove, watch)
        yield


def _chooses(rule: Rule, grid: BlockGrid) -> bool:
    return rule.dynamic and not rule.keeps_all(grid)


def _add(count: TileCount, grid: BlockGrid, tiles: Bool[Tensor, "*unit M N"]) -> None:
    if grid.q_len == grid.kv_len:
        reachable = grid.reachable(tiles.device)
        units = tiles.numel() // reachable.numel()
        count.chosen += density(tiles, grid) * units * int(reachable.sum())
        count.reachable += units * int(reachable.sum())


def _watched(select: Callable[..., Tensor], count: TileCount) -> Callable[..., Any]:
    def watched(rule: Rule, grid: BlockGrid, q: Tensor | None = None, k: Tensor | None = None, **more: Any) -> Tensor:
        tiles = select(rule, grid, q, k, **more)
        if _chooses(rule, grid):
            _add(count, grid, tiles)
        return tiles

    return watched
