"""The legend of shape letters, and the two addresses every stage uses: an attention call and a unit.

Shape letters, in annotations and suffixes:

    B batch    H query heads    G KV heads    S queries    T keys    D head_dim
    M query blocks    N key blocks    L layers    U units    C candidates
"""

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["query_head", "kv_group"]


@dataclass(frozen=True)
class ModelGeometry:
    """How many heads of which size a model has, layer by layer, in module order.

    `modules` are the dotted paths of the attention modules; `num_heads[i]`, `num_kv_heads[i]` and `head_dim[i]` belong to `modules[i]`.
    """

    modules: tuple[str, ...]
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]

    @property
    def total_heads(self) -> int:
        """Query heads of all layers together."""
        return sum(self.num_heads)


@dataclass(frozen=True, order=True)
class Unit:
    """What receives one decision: one query head, the query heads that share one KV head, or (no heads) a whole sublayer."""

    module: str
    heads: tuple[int, ...]

    def __str__(self) -> str:
        if not self.heads:
            return self.module
        if len(self.heads) == 1:
            return f"{self.module}:{self.heads[0]}"
        return f"{self.module}:{self.heads[0]}-{self.heads[-1]}"


@dataclass(frozen=True)
class Decoding:
    """Address of the decision how a KV group decodes, where that is not the decision about its prefill."""

    unit: Unit


def units_of(geometry: ModelGeometry, granularity: Granularity) -> tuple[Unit, ...]:
    """All units of a model, in module order, then head order."""
    units = []
    for module, num_heads, num_kv_heads in zip(
        geometry.modules, geometry.num_heads, geometry.num_kv_heads, strict=True
    ):
        size = 1 if granularity == "query_head" else num_heads // num_kv_heads
        units += [Unit(module, tuple(range(first, first + size))) for first in range(0, num_heads, size)]
    return tuple(units)
