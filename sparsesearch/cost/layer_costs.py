"""What must be known of a device before whole layers, and so whole models, can be predicted."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from sparsesearch.cost.base import DecodeWork, OfDevice
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.kernels.schedule import TileSchedule, Workers


class FusedCosts(Protocol):
    """A decoding step of few rows in seven launches per layer (`runtime.fused_step`), each of which starts while the one before still runs."""

    @property
    def most_rows(self) -> int:
        """Sequences that are decoded together at most."""

    def product_s(self, rows: int, lines: int, inner: int) -> float:
        """A product with `lines` x `inner` weights, and the norm, gate or residual that it computes besides."""

    def layer_s(self, rows: int, weight_bytes: float) -> float:
        """What a layer takes beyond its products and its attention: rotation, the cache's new row, gaps; less where products are long."""

    def start_s(self, rows: int) -> float:
        """What a step takes beyond its layers and the output layer."""


class PartCosts(Protocol):
    """What layers are made of but their attention."""

    def linear_s(self, rows: int, outputs: int, inputs: int) -> float:
        """A linear layer."""

    def pointwise_s(self, name: str, elements: float) -> float:
        """Norm, rotation, gate, residual or transpose."""


class PrefillCosts(PartCosts, Protocol):
    """What a prefill is made of but its attention."""

    def prefill_relief(self, rows: int) -> float:
        """Share of the pointwise time that whole layers of so many rows do not take."""


@runtime_checkable
class LayerCosts(OfDevice, PrefillCosts, Protocol):
    """A cost model that knows whole layers: a calibrated accelerator, or a datasheet's roofline."""

    @property
    def workers(self) -> Workers:
        """What schedules are built for."""

    @property
    def kernel(self) -> Backend:
        """Whose tiles they have."""

    def attention_s(self, schedule: TileSchedule, *, num_kv_heads: int, head_dim: int) -> float:
        """One layer's prefill attention."""

    def own_dense_s(self, pairs: float, head_dim: int) -> float | None:
        """One layer's dense attention as a model without a plan runs it, over the query-key pairs of all its heads and sequences.

        None where that was not measured: then the tile kernel stands for it.
        """

    def estimator_s(self, kind: str, tokens: int, query_heads: int) -> float:
        """A dynamic rule's choice."""

    def decode_glue_s(self, batch: int, weight_bytes: float) -> float:
        """What a decoding layer takes beyond its parts; `weight_bytes` is its largest weight."""

    def decode_step_s(self, batch: int) -> float:
        """What a decoding step takes beyond its layers and the output layer."""

    def decode_turn_s(self, batch: int) -> float:
        """What passes between two decoding steps: tokens chosen and handed on, the next step started."""

    @property
    def fused(self) -> "FusedCosts | None":
        """What the fused decoding step takes; None where that was not measured."""

    def decode_attention_s(self, works: Sequence[DecodeWork]) -> float:
        """One layer's decoding attention; one work per KV head."""
