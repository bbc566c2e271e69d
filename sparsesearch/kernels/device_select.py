"""What dynamic rules choose, worked out where the queries and keys are: nothing is copied per query head, and the host never waits.

`vertical_slash` and `pooled_topk` have kernels here, launched once for all heads of a layer; every other dynamic rule runs its own `select` on
the device, one KV head at a time, so that keys are repeated for one group only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.kernels.device_schedule import BankedTiles
from sparsesearch.kernels.triton_index import pooled_means
from sparsesearch.kernels.triton_probe import keep_lines
from sparsesearch.kernels.triton_select import keep_best
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.vertical_slash import VerticalSlash

watchers: list[Callable[[BlockGrid, Bool[Tensor, "h M N"]], None]] = []
"""Called with every choice that is made here and not by a rule's own `select`; for counting, empty otherwise."""


@dataclass(frozen=True)
class _Job:
    """The heads that follow one dynamic rule.

    Attributes:
        rule: the rule.
        heads: its query heads, ascending.
        first: its first row among all that are chosen anew.
        on_device: `heads`, int32.
        kv_heads: int32, whose keys each sees.
        groups: int32, the KV heads if the heads are all that share them, else None.
        budget: key blocks per row of pooled_topk.
    """

    rule: Rule
    heads: tuple[int, ...]
    first: int
    on_device: Int[Tensor, " h"]
    kv_heads: Int[Tensor, " h"]
    groups: Int[Tensor, " g"] | None
    budget: Int[Tensor, " M"] | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.heads))


def acting_rules(rules: Sequence[Rule], grid: BlockGrid) -> tuple[Rule, ...]:
    """The rules, dense in the place of dynamic ones that choose nothing here: for a single query, unless they decode, and where laws keep all."""

    def chooses(rule: Rule) -> bool:
        return not rule.keeps_all(grid) and (grid.q_len > 1 or rule.decodes)

    return tuple(Dense() if rule.dynamic and not chooses(rule) else rule for rule in rules)


class Selector:
    """How the query heads of one layer choose their tiles on one grid.

    Made once per layer and shape: what does not depend on queries and keys lies on the device, and a call only launches kernels.

    Args:
        rules: one per query head, static or dynamic.
        grid: the sequence's blocks.
        num_kv_heads: KV heads; query heads are a multiple.
        device: where queries and keys will be.
    """

    def __init__(self, rules: Sequence[Rule], grid: BlockGrid, num_kv_heads: int, device: torch.device | str) -> None:
        self.grid, self.group, self.device = grid, len(rules) // num_kv_heads, device
        acting = acting_rules(rules, grid)
        self._num_dense = sum(one.dynamic and not other.dynamic for one, other in zip(rules, acting, strict=True))
        fixed = tuple(dict.fromkeys(rule for rule in acting if not rule.dynamic))
        self.bank = _static_bank(fixed, grid, str(device))
        row_of = [fixed.index(rule) if not rule.dynamic else 0 for rule in acting]
        jobs, self.num_chosen = [], 0
        for rule in dict.fromkeys(rule for rule in acting if rule.dynamic):
            heads = tuple(head for head, own in enumerate(acting) if own == rule)
            for place, head in enumerate(heads):
                row_of[head] = -1 - self.num_chosen - place
            jobs.append((rule, heads, self.num_chosen))
            self.num_chosen += len(heads)
        with torch.inference_mode(False):  # kept for later calls, which may be outside it
            self.row_of_head = torch.tensor(row_of, dtype=torch.int32, device=device)
            self._jobs = [self._job(*job) for job in jobs]

    def _job(self, rule: Rule, heads: tuple[int, ...], first: int) -> _Job:
        on_device = torch.tensor(heads, dtype=torch.int32, device=self.device)
        whole = len(heads) == self.group * len({head // self.group for head in heads})
        groups = torch.tensor(heads[:: self.group], dtype=torch.int32, device=self.device) // self.group
        budget = None
        if isinstance(rule, PooledTopk):
            budget = rule.keep.row_blocks(self.grid, self.device).int().flatten()
        return _Job(rule, heads, first, on_device, on_device // self.group, groups if whole else None, budget)

    def choose(
        self,
        q: Float[Tensor, "H S D"],
        k: Float[Tensor, "G T D"],
        *,
        scale: float,
        given: Mapping[int, Bool[Tensor, "M N"]] | None = None,
    ) -> BankedTiles:
        """The tiles of every query head of one sequence.

        Args:
            q: queries of the sequence, contiguous columns; without the scale.
            k: keys of the sequence, likewise.
            scale: softmax scale.
            given: tiles of the heads whose rule reuses another's choice.
        """
        grid = self.grid
        chosen = torch.empty(
            self.num_chosen, grid.num_q_blocks, grid.num_k_blocks, dtype=torch.bool, device=self.device
        )
        for job in self._jobs:
            out = chosen[job.rows]
            match job.rule:
                case VerticalSlash() as rule if grid.causal:
                    keep_lines(
                        q, k, job.on_device, job.kv_heads, grid, probe=min(rule.probe, grid.q_len), scale=scale, out=out,
                        columns=max(1, rule.vertical.blocks(grid)), diagonals=max(1, rule.slash.blocks(grid)),
                    )  # fmt: skip
                    _seen(grid, out)
                case PooledTopk() as rule:
                    self._pooled_topk(rule, job, q, k, out)
                    _seen(grid, out)
                case rule if rule.reuses:
                    for head, target in zip(job.heads, out, strict=True):
                        target.copy_((given or {})[head])
                case _:
                    self._by_rule(job, q, k, scale, out)
        if watchers and self._num_dense:
            _seen(grid, grid.reachable(self.device).expand(self._num_dense, -1, -1))
        return BankedTiles(self.bank, chosen, self.row_of_head)

    def _pooled_topk(self, rule: PooledTopk, job: _Job, q: Tensor, k: Tensor, out: Tensor) -> None:
        # the softmax scale would not change the order
        assert job.budget is not None
        grid = self.grid
        queries = pooled_means(q, grid, start=grid.q_start, heads=job.on_device)
        keys = pooled_means(k, grid, start=0, heads=job.kv_heads if job.groups is None else job.groups)
        grouped = queries.view(len(keys), -1, queries.shape[-1])  # [g, h/g·M, D]
        scores = (grouped @ keys.transpose(-1, -2)).view(out.shape)
        keep_best(scores, job.budget, grid, sink_blocks=blocks_of(rule.sink, grid.block_tokens), out=out)

    def _by_rule(self, job: _Job, q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
        by_group: dict[int, list[int]] = {}
        for place, head in enumerate(job.heads):
            by_group.setdefault(head // self.group, []).append(place)
        for kv_head, places in by_group.items():
            heads = [job.heads[place] for place in places]
            adjacent = heads[-1] - heads[0] + 1 == len(heads)
            own = q[heads[0] : heads[-1] + 1] if adjacent else torch.stack([q[head] for head in heads])
            tiles = job.rule.select(self.grid, own * scale, k[kv_head].expand(len(heads), -1, -1))
            out[places[0] : places[-1] + 1].copy_(tiles)


class BatchSelector:
    """The same choice for sequences of equal shape: a batch of B sequences of H heads is one sequence of B·H heads, so launches do not multiply.

    Args:
        rules: one per query head.
        grid: every sequence's blocks.
        num_kv_heads: KV heads of a sequence.
        batch_size: sequences.
        device: where queries and keys will be.
    """

    def __init__(
        self, rules: Sequence[Rule], grid: BlockGrid, num_kv_heads: int, batch_size: int, device: torch.device | str
    ) -> None:
        self._selector = Selector(tuple(rules) * batch_size, grid, num_kv_heads * batch_size, device)
        self._rows = self._selector.row_of_head.split(len(rules))

    def choose(self, q: Float[Tensor, "B H S D"], k: Float[Tensor, "B G T D"], *, scale: float) -> list[BankedTiles]:
        """The tiles of every query head, sequence by sequence; arguments as in `Selector.choose`."""
        tiles = self._selector.choose(q.flatten(0, 1), k.flatten(0, 1), scale=scale)
        return [BankedTiles(tiles.bank, tiles.chosen, rows) for rows in self._rows]


def _seen(grid: BlockGrid, tiles: Bool[Tensor, "h M N"]) -> None:
    for watch in watchers:
        watch(grid, tiles)


@lru_cache(maxsize=64)
def _static_bank(rules: tuple[Rule, ...], grid: BlockGrid, device: str) -> Bool[Tensor, "r M N"]:
    """One choice per static rule; layers mostly have the same ones."""
    with torch.inference_mode(False):
        if not rules:
            return torch.zeros(0, grid.num_q_blocks, grid.num_k_blocks, dtype=torch.bool, device=device)
        return torch.stack([rule.select(grid).to(device) for rule in rules])
