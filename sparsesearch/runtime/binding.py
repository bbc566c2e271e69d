"""Which rules an attention module follows, kept on the module itself.

A binding is one immutable attribute: it travels with `deepcopy` and `torch.save`, needs no device, and adds nothing to the state dict.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from sparsesearch.block_mask import BlockGrid
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.backends import Backend

ATTRIBUTE = "sparsesearch_binding"


@dataclass(frozen=True)
class LayerBinding:
    """The rules of one attention module's query heads.

    Attributes:
        path: the module's path in the plan, for messages.
        rules: one per query head.
        block_tokens: side of a tile.
        backend: which kernel computes the tiles.
    """

    path: str
    rules: tuple[Rule, ...]
    block_tokens: int
    backend: Backend

    @cached_property
    def groups(self) -> tuple[tuple[Rule, tuple[int, ...]], ...]:
        """Heads that follow the same rule, computed together."""
        return tuple(group_heads(self.rules, range(len(self.rules))))

    @cached_property
    def all_dense(self) -> bool:
        """Whether this module is to run as the model made it."""
        return all(isinstance(rule, Dense) for rule in self.rules)

    @cached_property
    def length_dependent(self) -> bool:
        """Whether some rule's choice depends on the prompt's length, beyond where the queries are."""
        return any(_depends_on_law(rule, self.block_tokens) for rule in set(self.rules))


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
    length = 16 * block_tokens
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(length, 4, generator=generator) for _ in range(2)) if rule.dynamic else (None, None)
    near, far = (rule.select(BlockGrid(length, length, block_tokens, law), q, k) for law in (length, 1024 * length))
    return not torch.equal(near, far)


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
    return {
        path: LayerBinding(path, plan.module_rules(path), plan.block_tokens, backend)
        for path in plan.base_model.modules
    }
