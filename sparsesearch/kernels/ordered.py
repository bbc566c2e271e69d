"""Attention of one layer whose heads follow rules over different token orders.

Heads of one order run in one launch: their queries, keys and values are copied into that order once, and the result is copied back. Heads in
the model's own order are read in place. `zero` and `mean_value` heads compute no tile. Other rest terms are added to what the launch returns,
before it is copied back: see `rest_terms`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.clustering import Clusters
from sparsesearch.errors import SpecError
from sparsesearch.kernels.dispatch import Backend, Prefill, choose_backend, prefill
from sparsesearch.kernels.rest_terms import Residual, measure, with_residual, with_rest
from sparsesearch.kernels.row_copies import put_rows, take_rows
from sparsesearch.kernels.schedule import HeadTiles, Span
from sparsesearch.order import Order
from sparsesearch.rules.base import RestRule, Rule
from sparsesearch.rules.block_mass import BlockMass
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.rules.cluster_mass import ClusterMass
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.zero import Zero


@dataclass(frozen=True)
class Chosen:
    """What dynamic rules chose: the tiles of every sequence, the levels of heads whose rest needs them, and in an order by content the places."""

    tiles: list[HeadTiles]
    levels: dict[int, Int16[Tensor, "B M N"]]
    q_places: Int[Tensor, "B H S"] | None = None
    k_places: Int[Tensor, "B H S"] | None = None

    def all_levels(self) -> Int16[Tensor, "B H M N"]:
        """The levels of every head; those whose rest needs none are at 1 where they are computed."""
        found = torch.stack([one.choices for one in self.tiles]).short()
        for head, levels in self.levels.items():
            found[:, head] = levels
        return found


ChosenTiles = dict[tuple[int, Order], Chosen]
"""Choices of dynamic rules, by first batch row and order. Keep it between steps to reuse them; clear it to choose again."""


@dataclass
class StepMemory:
    """What one layer keeps between the denoising steps of one pass.

    Attributes:
        step: the step of this call; None if unknown.
        chosen: tiles of dynamic rules to reuse, those missing are added; None: choose at every call.
        residuals: of `cached` heads, by first batch row, order, rule and heads.
        clusters: of queries and keys of heads in an order by content, by first batch row, order and head.
    """

    step: int | None = None
    chosen: ChosenTiles | None = None
    residuals: dict[tuple[int, Order, Rule, tuple[int, ...]], Residual] = field(default_factory=dict)
    clusters: dict[tuple[int, Order, int], tuple[Clusters, Clusters]] = field(default_factory=dict)


def attend(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    grids: BlockGrid | Sequence[BlockGrid],
    rules: Sequence[Rule],
    *,
    scale: float,
    backend: Backend = "auto",
    memory: StepMemory | None = None,
) -> Float[Tensor, "B H S D"]:
    """Attention of every batch row, each head by its rule.

    Args:
        q: queries in the model's order; rows have contiguous elements.
        k: keys, likewise; H is a multiple of G.
        v: values, likewise.
        grids: of all batch rows, or one per row; a row's real tokens come first, and rows past its kv_len get 0.
        rules: one per query head.
        scale: factor on q·k.
        backend: see `kernels.dispatch`.
        memory: what to keep between steps; nothing by default.

    Raises:
        SpecError: the counts disagree, a rule needs a layout that a grid lacks, or a `cached` rest has no memory or step.
        UnsupportedKernelError: the backend cannot serve this call.
    """
    rows = [grids] * q.shape[0] if isinstance(grids, BlockGrid) else list(grids)
    if len(rows) != q.shape[0] or len(rules) != q.shape[1]:
        raise SpecError(
            f"there must be a grid per batch row and a rule per head, but got {len(rows)} and {len(rules)} for {tuple(q.shape)}."
        )
    if len(set(rows)) > 1:
        parts = [
            _attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], grid, rules, scale, backend, memory or StepMemory(), b)
            for b, grid in enumerate(rows)
        ]
        return torch.cat(parts)
    return _attend(q, k, v, rows[0], rules, scale, backend, memory or StepMemory(), 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: BlockGrid,
    rules: Sequence[Rule],
    scale: float,
    backend: Backend,
    memory: StepMemory,
    first_row: int,
) -> Tensor:
    """All batch rows with one grid."""
    spans = tuple(Span(grid, batch) for batch in range(q.shape[0]))
    by_order: dict[Order, list[int]] = {}
    for head, rule in enumerate(rules):
        if not rule.replaces_output:
            by_order.setdefault(rule.token_order, []).append(head)
    out: Tensor | None = None
    for order in sorted(by_order, key=lambda order: not order.is_identity):
        heads = by_order[order]
        own = [rules[head] for head in heads]
        if order.is_identity:
            # other heads compute no tile here, and get 0
            filled = [rule if rule.token_order == order and not rule.replaces_output else Zero() for rule in rules]
            launch = _Launch(q, k, v, spans, filled, scale, backend, memory, (first_row, order))
            out = launch.run()
            continue
        assert grid.layout is not None, "only rules with a layout have an order"
        group, device = q.shape[1] // k.shape[1], str(q.device)
        permutation, place = order.permutation(grid.layout, q.device), _indices(tuple(heads), device)
        keys = _indices(tuple(head // group for head in heads), device)
        own_q = take_rows(q, place, permutation)
        own_k, own_v = take_rows(k, keys, permutation), take_rows(v, keys, permutation)
        result = _Launch(own_q, own_k, own_v, spans, own, scale, backend, memory, (first_row, order)).run()
        out = torch.zeros_like(q) if out is None else out
        put_rows(out, result, place, permutation)
    out = torch.zeros_like(q) if out is None else out
    for head, rule in enumerate(rules):
        if rule.rest == "mean_value":
            values = v[:, head // (q.shape[1] // k.shape[1]), : grid.kv_len]
            out[:, head, : grid.kv_len] = values.mean(-2, keepdim=True, dtype=torch.float32).to(out.dtype)
    return out


@lru_cache(maxsize=1024)
def _indices(heads: tuple[int, ...], device: str) -> Tensor:
    """Cached: a copy to the device would not fit into a captured graph."""
    return torch.tensor(heads, device=device)


@dataclass(frozen=True)
class _Launch:
    """Heads over one order of tokens; q, k and v are in it, `key` names the batch rows and the order."""

    q: Float[Tensor, "B H S D"]
    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S D"]
    spans: tuple[Span, ...]
    rules: list[Rule]
    scale: float
    backend: Backend
    memory: StepMemory
    key: tuple[int, Order]

    def run(self) -> Float[Tensor, "B H S D"]:
        """Choose, launch, add rest terms."""
        chosen = self._choose() if any(rule.dynamic for rule in self.rules) else None
        if chosen is None or chosen.q_places is None or chosen.k_places is None:
            return self._chosen_run(chosen)
        group = self.q.shape[1] // self.k.shape[1]
        keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (self.k, self.v))
        moved = replace(
            self,
            q=_gather(self.q, chosen.q_places),
            k=_gather(keys, chosen.k_places),
            v=_gather(values, chosen.k_places),
        )
        result = moved._chosen_run(chosen)
        places = _whole(chosen.q_places, result.shape[2])[..., None].expand_as(result)
        return torch.empty_like(result).scatter_(2, places, result)

    def _chosen_run(self, chosen: Chosen | None) -> Float[Tensor, "B H S D"]:
        # rectified weights need no log-sum-exp
        need_lse = any(rule.adds_rest and rule.rest != "rectified" for rule in self.rules)
        choice = tuple(self.rules) if chosen is None else chosen.tiles
        result = self._prefill(self.q, self.k, self.v, choice, need_lse=need_lse)
        for rule in dict.fromkeys(self.rules):
            if rule.adds_rest:
                heads = [head for head, own in enumerate(self.rules) if own == rule]
                self._add_rest(rule, heads, result, chosen)
        return result.out

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, choice: tuple[Rule, ...] | list[HeadTiles], *, need_lse: bool
    ) -> Prefill:
        return prefill(q, k, v, self.spans, choice, scale=self.scale, backend=self.backend, need_lse=need_lse)

    def _choose(self) -> Chosen:
        """The tiles of every head, chosen now or before."""
        kept = self.memory.chosen
        if kept is not None and self.key in kept:
            return kept[self.key]
        group = self.q.shape[1] // self.k.shape[1]
        grid, length = self.spans[0].grid, self.spans[0].grid.kv_len
        levels, places = [], []
        masses = self._masses() if self._has_kernel() else {}
        for head, rule in enumerate(self.rules):
            if head in masses:
                levels.append(masses[head])
                continue
            if not rule.dynamic:
                levels.append(_static_levels(rule, grid, str(self.q.device)))
                continue
            q, k = self.q[:, head, :length] * self.scale, self.k[:, head // group, :length]
            inner = _chooser(rule)
            if isinstance(inner, ClusterMass):
                name = (*self.key, head)
                found = self.memory.clusters[name] = inner.clusters(grid, q, k, self.memory.clusters.get(name))
                own = [_whole(one.order, length) for one in found]
                q, k = _gather(q, own[0]), _gather(k, own[1])
                levels.append(
                    rule.levels(grid, q, k, found) if isinstance(rule, ClusterMass) else rule.levels(grid, q, k)
                )
                places.append(own)
            else:
                levels.append(rule.levels(grid, q, k))
        shape = (len(self.spans), grid.num_q_blocks, grid.num_k_blocks)
        every = torch.stack([one.expand(shape) for one in levels], 1) == 1
        tiles = [HeadTiles(every[row], tuple(range(len(self.rules)))) for row in range(len(self.spans))]
        wanted = {head: levels[head].expand(shape) for head, rule in enumerate(self.rules) if rule.adds_rest}
        chosen = Chosen(tiles, wanted)
        if places:  # all heads of an order by content have it
            q_places, k_places = (torch.stack(own, 1) for own in zip(*places, strict=True))
            chosen = replace(chosen, q_places=q_places, k_places=k_places)
        if kept is not None:
            kept[self.key] = chosen
        return chosen

    def _has_kernel(self) -> bool:
        return choose_backend(self.q, self.k, self.v, self.spans, backend=self.backend) in ("gluon", "triton")

    def _masses(self) -> dict[int, Int16[Tensor, "B M N"]]:
        """Levels of the heads that choose by exact mass: one dense launch for their log-sum-exp, and a kernel that sums tiles."""
        from sparsesearch.kernels.triton_index import block_mass

        heads = [head for head, rule in enumerate(self.rules) if isinstance(_chooser(rule), BlockMass)]
        if not heads:
            return {}
        grid, group = self.spans[0].grid, self.q.shape[1] // self.k.shape[1]
        q, k, v = (
            _picked(x, [head // size for head in heads]) for x, size in ((self.q, 1), (self.k, group), (self.v, group))
        )
        lse = self._prefill(q, k, v, (Dense(),) * len(heads), need_lse=True).lse
        assert lse is not None
        real = slice(grid.kv_len)
        mass = torch.stack(
            [block_mass(q[b, :, real] * self.scale, k[b, :, real], lse[b, :, real], grid) for b in range(len(q))]
        )
        found = {}
        for place, head in enumerate(heads):
            rule = self.rules[head]
            chooser = _chooser(rule)
            assert isinstance(chooser, BlockMass)
            found[head] = rule.levels_of(chooser.heaviest(mass[:, place], grid), grid)
        return found

    def _add_rest(self, rule: Rule, heads: list[int], result: Prefill, chosen: Chosen | None) -> None:
        """Replace the output of some heads that follow one rule."""
        grid, group, device = self.spans[0].grid, self.q.shape[1] // self.k.shape[1], str(self.q.device)
        own, groups = _indices(tuple(heads), device), [head // group for head in heads]
        q, k, v = _picked(self.q, heads), _picked(self.k, groups), _picked(self.v, groups)
        real = slice(grid.kv_len)
        out = result.out[:, own]
        lse = out.new_zeros(out.shape[:3]) if result.lse is None else result.lse[:, own]
        if isinstance(rule, CachedRest):
            found = self._cached(rule, tuple(heads), (out, lse), q, k, v)
        else:
            levels = (
                _static_levels(rule, grid, device)
                if chosen is None or not rule.dynamic
                else torch.stack([chosen.levels[head] for head in heads], 1)
            )
            found = with_rest(
                rule, (out[:, :, real], lse[:, :, real]), q[:, :, real], k[:, :, real], v[:, :, real], levels, grid,
                scale=self.scale, kernel=result.backend in ("gluon", "triton"),
            )  # fmt: skip
            if grid.kv_len < out.shape[2]:  # rows behind the sequence stay 0
                out[:, :, real] = found
                found = out
        result.out[:, own] = found

    def _cached(
        self, rule: CachedRest, heads: tuple[int, ...], computed: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Dense at a refresh step, with the residual from then on."""
        step = self.memory.step
        if step is None:
            raise SpecError(
                f"{rule.label} must know the denoising step to keep its residual, but does not. Give `attend` a memory with a step; a pipeline "
                "tells it, or `applied.at_step(index, num_steps)`."
            )
        name = (*self.key, rule, heads)
        kept = self.memory.residuals.get(name)
        if kept is not None and 0 < step - kept.step < rule.every and kept.missing.shape == q.shape:
            return with_residual(rule, computed[0], kept, step)
        dense = self._prefill(q, k, v, (Dense(),) * len(heads), need_lse=True)
        assert dense.lse is not None
        length = self.spans[0].grid.kv_len
        lse = computed[1].clone()
        lse[..., length:] = dense.lse[..., length:] = 0.0  # padding
        self.memory.residuals[name] = measure((computed[0], lse), (dense.out, dense.lse), step)
        return dense.out


def _chooser(rule: Rule) -> Rule:
    """The rule that chooses the tiles: a rest term's inner one."""
    return rule.of if isinstance(rule, RestRule) else rule


def _picked(x: Float[Tensor, "B H S D"], heads: list[int]) -> Float[Tensor, "B h S D"]:
    """Some heads; all of them in a row are the tensor itself."""
    return x if heads == list(range(x.shape[1])) else x[:, _indices(tuple(heads), str(x.device))]


def _whole(places: Int[Tensor, "*unit n"], length: int) -> Int[Tensor, "*unit S"]:
    """Places of the first tokens, and the others where they are."""
    rest = torch.arange(places.shape[-1], length, device=places.device)
    return torch.cat([places, rest.expand(*places.shape[:-1], -1)], -1)


def _gather(x: Float[Tensor, "*unit S D"], places: Int[Tensor, "*unit n"]) -> Float[Tensor, "*unit S D"]:
    whole = _whole(places, x.shape[-2])
    return x.gather(-2, whole[..., None].expand(*whole.shape, x.shape[-1]))


@lru_cache(maxsize=256)
def _static_levels(rule: Rule, grid: BlockGrid, device: str) -> Int16[Tensor, "M N"]:
    with torch.inference_mode(False):  # kept for later calls, which may be outside it
        return rule.levels(grid).to(device)
