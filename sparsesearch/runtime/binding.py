"""Which rules an attention module follows, kept on the module itself.

A binding is one immutable attribute: it travels with `deepcopy` and `torch.save`, needs no device, and adds nothing to the state dict.
Layers that reuse another layer's selection share one `Selections` with it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SparseSearchError
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.backends import Backend

ATTRIBUTE = "sparsesearch_binding"
_MOST_SHAPES = 32


class Selections:
    """What the heads of one source layer left in the present forward pass, sequence by sequence.

    Filled when the source layer runs, read by the layers that reuse it, emptied before and after every forward pass.
    """

    def __init__(self, path: str, heads: frozenset[int]) -> None:
        self.path, self.heads = path, heads
        self._left: dict[tuple[int, int], tuple[BlockGrid, Tensor]] = {}

    def leave(self, sequence: int, grid: BlockGrid, heads: Sequence[int], tiles: Bool[Tensor, "b h M N"]) -> None:
        """Keep the choice of those heads that somebody reuses."""
        for index, head in enumerate(heads):
            if head in self.heads:
                self._left[sequence, head] = grid, tiles[:, index]

    def take(self, sequence: int, grid: BlockGrid, head: int, *, reader: str) -> Bool[Tensor, "b M N"]:
        """What a head left for a sequence.

        Raises:
            SparseSearchError: the source layer has not run in this forward pass, or saw the sequence otherwise.
        """
        kept = self._left.get((sequence, head))
        if kept is None or kept[0] != grid:
            saw = "left nothing" if kept is None else f"chose for {kept[0]}, not {grid}"
            raise SparseSearchError(
                f"{reader} reuses the selection of head {head} of {self.path}, which must run before it in the same forward pass, but "
                f"{saw}. Run the whole model, or search a plan without reuse."
            )
        return kept[1]

    def clear(self) -> None:
        """Forget everything."""
        self._left.clear()


class Remembered(dict[Any, Any]):
    """What calls leave behind for later calls of the same shape; neither copied nor saved with the model."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


@dataclass(frozen=True)
class LayerBinding:
    """The rules of one attention module's query heads.

    Attributes:
        path: the module's path in the plan, for messages.
        rules: one per query head.
        block_tokens: side of a tile.
        backend: which kernel computes the tiles.
        leaves: where this layer's selections are put for later layers; None when nobody reuses them.
        decode_rules: one per query head while tokens are generated; empty: the same.
        shapes: what calls of one shape need again.
        takes: per query head, whose selection it runs: where that lies, and the source's head; None for heads that choose by themselves.
    """

    path: str
    rules: tuple[Rule, ...]
    block_tokens: int
    backend: Backend
    leaves: Selections | None = field(default=None, compare=False, repr=False)
    takes: tuple[tuple[Selections, int] | None, ...] = field(default=(), compare=False, repr=False)
    decode_rules: tuple[Rule, ...] = ()
    shapes: Remembered = field(default_factory=Remembered, compare=False, repr=False)

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What an earlier call of the same shape made; the last few are kept."""
        if key not in self.shapes:
            if len(self.shapes) >= _MOST_SHAPES:
                self.shapes.pop(next(iter(self.shapes)))
            with torch.inference_mode(False):  # later calls may be outside it
                self.shapes[key] = make()
        return self.shapes[key]

    @property
    def kept_by(self) -> tuple[Rule, ...]:
        """The rules that say what is kept once the prompt has been seen: those of the tokens that are generated."""
        return self.decode_rules or self.rules

    def taken(self, sequence: int, grid: BlockGrid, heads: Sequence[int]) -> Bool[Tensor, "b h M N"]:
        """What the sources of some heads of this layer left for a sequence."""
        sources = [self.takes[head] for head in heads]
        return torch.stack(
            [
                selections.take(sequence, grid, head, reader=self.path)
                for selections, head in (source for source in sources if source is not None)
            ],
            1,
        )

    @cached_property
    def groups(self) -> tuple[tuple[Rule, tuple[int, ...]], ...]:
        """Heads that follow the same rule, computed together."""
        return tuple(group_heads(self.rules, range(len(self.rules))))

    @cached_property
    def decode_groups(self) -> tuple[tuple[Rule, tuple[int, ...]], ...]:
        """The same for the tokens that are generated."""
        return tuple(group_heads(self.kept_by, range(len(self.rules))))

    @cached_property
    def all_dense(self) -> bool:
        """Whether this module is to run as the model made it."""
        return all(isinstance(rule, Dense) for rule in (*self.rules, *self.kept_by))

    @cached_property
    def length_dependent(self) -> bool:
        """Whether some rule's choice depends on the prompt's length, beyond where the queries are."""
        return any(_depends_on_law(rule, self.block_tokens) for rule in {*self.rules, *self.kept_by})


def group_heads(rules: Iterable[Rule], heads: Iterable[int]) -> list[tuple[Rule, tuple[int, ...]]]:
    """Collect heads by rule, in order of first appearance."""
    groups: dict[Rule, list[int]] = {}
    for rule, head in zip(rules, heads, strict=True):
        groups.setdefault(rule, []).append(head)
    return [(rule, tuple(heads)) for rule, heads in groups.items()]


def evicting_rule(rules: Iterable[Rule]) -> Rule | None:
    """The rule of one KV head's query heads, if they all follow one that never returns to keys it has left behind."""
    own = set(rules)
    first = next(iter(own))
    return first if len(own) == 1 and isinstance(first, SinkWindow | Zero | MeanValue) else None


def kv_partition(rules: tuple[Rule, ...], num_kv_heads: int) -> dict[Rule | None, tuple[int, ...]]:
    """KV heads by the evicting rule that they follow; under None those that must keep everything. These come last."""
    size = len(rules) // num_kv_heads
    parts: dict[Rule | None, list[int]] = {}
    for kv_head in range(num_kv_heads):
        parts.setdefault(evicting_rule(rules[kv_head * size : (kv_head + 1) * size]), []).append(kv_head)
    full = parts.pop(None, None)
    return {rule: tuple(heads) for rule, heads in parts.items()} | ({None: tuple(full)} if full else {})


def _depends_on_law(rule: Rule, block_tokens: int) -> bool:
    """Compare the choice under two very different prompt lengths."""
    if rule.reuses:
        return False  # its source's own rule is asked
    length = 16 * block_tokens
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(length, 4, generator=generator) for _ in range(2))
    for q_len in (length, 1) if rule.decodes else (length,):
        grids = (BlockGrid(q_len, length, block_tokens, law) for law in (length, 1024 * length))
        near, far = (rule.select(grid, q[-q_len:], k) for grid in grids)
        if not torch.equal(near, far):
            return True
    return False


def binding_of(module: nn.Module) -> LayerBinding | None:
    """The module's binding, if any."""
    binding = module.__dict__.get(ATTRIBUTE)
    return binding if isinstance(binding, LayerBinding) else None


def bind(module: nn.Module, binding: LayerBinding | None) -> None:
    """Set or (None) remove a module's binding."""
    if binding is None:
        module.__dict__.pop(ATTRIBUTE, None)
    else:
        module.__dict__[ATTRIBUTE] = binding


def bindings_of(plan: Plan, backend: Backend) -> dict[str, LayerBinding]:
    """A binding per attention module of the plan's model; modules that the plan does not name are all dense."""
    modules = plan.base_model.modules
    sources = {
        (module, head): source for module, head, rule in plan.heads() if (source := rule.source_head(head)) is not None
    }
    reused = sorted(set(sources.values()))
    left = {
        layer: Selections(modules[layer], frozenset(head for one, head in reused if one == layer))
        for layer, _ in reused
    }
    bindings = {}
    for index, path in enumerate(modules):
        rules = plan.module_rules(path)
        places = [sources.get((path, head)) for head in range(len(rules))]
        takes = tuple(None if place is None else (left[place[0]], place[1]) for place in places)
        decode = tuple(plan.decode_rule(path, head) for head in range(len(rules))) if path in plan.decode else ()
        bindings[path] = LayerBinding(path, rules, plan.block_tokens, backend, left.get(index), takes, decode)
    return bindings
