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


def _depends_on_law(rule: Rule, block_tokens: int) -> bool:
    """Compare the choice under two very different prompt lengths."""
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
    return {
        path: LayerBinding(path, plan.module_rules(path), plan.block_tokens, backend)
        for path in plan.base_model.modules
    }
