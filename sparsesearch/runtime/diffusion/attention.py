"""One attention layer under a plan: permute once, compute the chosen tiles in one launch, permute back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.kernels.dispatch import Backend, prefill
from sparsesearch.kernels.schedule import HeadTiles, Span
from sparsesearch.layout import Layout
from sparsesearch.order import Order
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.call import Call, CallHook

Rules = tuple[Rule, ...]


@dataclass(frozen=True)
class LayerCall:
    """What a probe is shown of one self-attention call, in the model's order of tokens.

    Attributes:
        path: the attention module.
        q: queries; times `scale` they give scores.
        k: keys.
        v: values.
        scale: factor on q·k.
        rules: what the plan says for each head at this step.
        call: the forward pass.
    """

    path: str
    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B H T D"]
    v: Float[Tensor, "B H T D"]
    scale: float
    rules: Rules
    call: Call


Probe = Callable[[LayerCall], Tensor | None]


@dataclass
class SparseLayer:
    """Answers the attention calls of one module; see `specialise.Attend`.

    Attributes:
        path: the module's path in the plan.
        plan: the plan; its schedule says which rules hold at which step.
        calls: the hook that knows the call in progress.
        backend: as in `kernels.dispatch`.
        probe: shown every self-attention call; what it returns, if anything, replaces the output.
        taken: backend that served the last sparse call.
    """

    path: str
    plan: Plan
    calls: CallHook
    backend: Backend
    probe: Probe | None = None
    taken: Backend | None = None
    _kept: dict[tuple[str, int], Bool[Tensor, "B H M N"]] = field(default_factory=dict)

    @cached_property
    def rules(self) -> tuple[Rules, ...]:
        """Per range of the schedule; the last ones hold outside all ranges."""
        schedule = self.plan.schedule
        ranges = [] if schedule is None else [schedule.assignments(place) for place in range(len(schedule.ranges))]
        heads = dict(zip(self.plan.base_model.modules, self.plan.base_model.num_heads, strict=True))[self.path]
        dense = (Dense().label,) * heads
        tables = [*ranges, self.plan.assignments]
        known = {Dense().label: Dense(), **self.plan.rules}
        return tuple(tuple(known[name] for name in table.get(self.path, dense)) for table in tables)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor | None:
        """None where the model's own attention is to run: all heads dense, or a call to other keys (image prompts)."""
        call = self.calls.current
        if call is None:
            raise UnsupportedModelError(
                f"{self.path} must be called through its transformer under a sparse plan, but was called on its own."
            )
        if key.shape[2] != query.shape[2]:
            return None
        if query.shape[2] != call.layout.num_tokens:
            raise UnsupportedModelError(
                f"{self.path} must attend over the {call.layout.num_tokens} tokens of its input, but got {query.shape[2]} queries and "
                f"{key.shape[2]} keys. Remove what changes its tokens, such as token merging."
            )
        if mask is not None and call.key_lengths is None and not bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all()):
            raise UnsupportedModelError(f"{self.path}: an attention mask that is not the text's padding is not supported.")
        rules = self.rules[self._range(call)]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if self.probe is not None:
            answer = self.probe(LayerCall(self.path, query, key, value, factor, rules, call))
            if answer is not None:
                return answer
        if all(isinstance(rule, Dense) for rule in rules):
            return None
        return self._attend(query, key, value, rules, call, factor)

    def _range(self, call: Call) -> int:
        schedule = self.plan.schedule
        if schedule is None:
            return -1
        if call.step is None:
            raise UnsupportedModelError(
                "a plan with a step schedule must know the denoising step, but neither the pipeline's cache context nor its scheduler tells "
                "it. Apply the plan to the pipeline, or call `applied.at_step(index, num_steps)` before every step."
            )
        place = schedule.range_index(*call.step)
        return -1 if place is None else place

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules, call: Call, scale: float) -> Tensor:
        orders = tuple(rule.token_order for rule in rules)
        places = places_of(orders, call.layout, str(q.device))
        q, k, v = (_permuted(x, places) for x in (q, k, v))
        spans = spans_of(call, q.shape[0], self.plan.block_tokens)
        choice: Rules | list[HeadTiles] = rules
        if any(rule.dynamic for rule in rules):
            choice = self._chosen(q, k, rules, spans, call, scale)
        found = prefill(q, k, v, spans, choice, scale=scale, backend=self.backend)
        self.taken = found.backend
        for head, rule in enumerate(rules):
            if rule.rest == "mean_value":
                for span in spans:
                    length = span.grid.kv_len
                    found.out[span.batch, head, :length] = v[span.batch, head, :length].float().mean(0)
        return _restored(found.out, places)

    def _chosen(
        self, q: Tensor, k: Tensor, rules: Rules, spans: tuple[Span, ...], call: Call, scale: float
    ) -> list[HeadTiles]:
        """Tiles of every head of every sequence; dynamic ones are kept between the schedule's refresh steps."""
        schedule, kept = self.plan.schedule, (call.pass_name, self._range(call))
        fresh = schedule is None or call.step is None or schedule.refreshes(*call.step)
        old = None if fresh else self._kept.get(kept)
        if old is not None and old.shape[0] == len(spans):
            tiles = old
        else:
            tiles = tiles_of(q, k, rules, spans, scale)
            if schedule is not None and schedule.refresh:
                self._kept[kept] = tiles
        return [HeadTiles(one, tuple(range(len(rules)))) for one in tiles]


def spans_of(call: Call, batch_size: int, block_tokens: int) -> tuple[Span, ...]:
    """The sequences of a call; padding stands at their ends, in every order."""
    lengths = call.key_lengths or (call.layout.num_tokens,) * batch_size
    return _spans(call.layout, lengths, block_tokens)


@lru_cache(maxsize=64)
def _spans(layout: Layout, lengths: tuple[int, ...], block_tokens: int) -> tuple[Span, ...]:
    grids = {}
    for length in set(lengths):
        own = layout if length == layout.num_tokens else _shortened(layout, length)
        grids[length] = BlockGrid(length, length, block_tokens, causal=False, layout=own)
    return tuple(Span(grids[length], batch) for batch, length in enumerate(lengths))


def _shortened(layout: Layout, length: int) -> Layout:
    """The layout without the padding of its last segment."""
    *others, last = layout.segments
    kept = length - sum(segment.tokens for segment in others)
    if kept == 0:
        return layout.model_copy(update={"segments": tuple(others)})
    return layout.model_copy(update={"segments": (*others, last.model_copy(update={"shape": (kept,)}))})


def tiles_of(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H T D"], rules: Rules, spans: tuple[Span, ...], scale: float
) -> Bool[Tensor, "B H M N"]:
    """What every head computes in every sequence; q and k are in the rules' orders."""
    whole = spans[0].grid
    if any(span.grid != whole for span in spans):
        raise UnsupportedModelError(
            "rules that choose from queries and keys need prompts of one length in a batch, but these differ. Use batch size 1."
        )
    tiles = torch.empty(*q.shape[:2], whole.num_q_blocks, whole.num_k_blocks, dtype=torch.bool, device=q.device)
    for rule in dict.fromkeys(rules):
        heads = [head for head, own in enumerate(rules) if own == rule]
        own_q, own_k = (x[:, heads, : whole.kv_len] for x in (q, k))
        tiles[:, heads] = (rule.select(whole, own_q * scale, own_k) if rule.dynamic else rule.select(whole)).to(q.device)
    return tiles


Places = tuple[Int[Tensor, "..."], Int[Tensor, "..."]] | None


@lru_cache(maxsize=256)
def places_of(orders: tuple[Order, ...], layout: Layout, device: str) -> Places:
    """Where each head's tokens go and whence they come back: [T] if all heads share an order, else [H, T]; None if nothing moves."""
    if all(order.is_identity for order in orders):
        return None
    if len(set(orders)) == 1:
        return orders[0].permutation(layout, device), orders[0].inverse(layout, device)
    there = torch.stack([order.permutation(layout, device) for order in orders])
    return there, torch.stack([order.inverse(layout, device) for order in orders])


def _permuted(x: Float[Tensor, "B H T D"], places: Places) -> Float[Tensor, "B H T D"]:
    return x if places is None else _gathered(x, places[0])


def _restored(x: Float[Tensor, "B H T D"], places: Places) -> Float[Tensor, "B H T D"]:
    return x if places is None else _gathered(x, places[1])


def _gathered(x: Float[Tensor, "B H T D"], index: Int[Tensor, "..."]) -> Float[Tensor, "B H T D"]:
    if index.ndim == 1:
        return x.index_select(2, index)
    heads: Any = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[:, heads, index]
