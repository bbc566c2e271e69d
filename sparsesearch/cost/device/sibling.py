"""A GPU that nobody has measured, whose multiprocessors somebody has: the measured table, with the other memory."""

from dataclasses import dataclass
from typing import Any

from sparsesearch.cost.device.run_plan import STEP_BLOCK_TOKENS, STEP_GROUP
from sparsesearch.cost.device.table import DecodeCost, DeviceTable, LinearCost, PairPoints, Points, rising
from sparsesearch.cost.roofline import DATASHEETS, PASSES, Datasheet
from sparsesearch.rules import rule_kinds

SIBLINGS = {"h100": "h200"}
"""GPU -> the measured one with as many multiprocessors of the same kind, clock and power limit."""
ESTIMATED_HEAD_DIM = 128
"""Of the heads that estimators were timed with."""


def sibling_table(table: DeviceTable, gpu: str) -> DeviceTable:
    """What the table would say of `gpu`, a key of `SIBLINGS`.

    Every time changes by what its roofline changes when the bandwidth goes from the measured one, B, to B·r, with r from the two
    datasheets and F the measured rate of matrix products:

        t' = t + max(flops / F, bytes / (B·r)) - max(flops / F, bytes / B)

    Launches, clocks and everything that runs from the cache stay as measured; the cache's size is the datasheet's.
    """
    memory = _OtherMemory(table, DATASHEETS[SIBLINGS[gpu]], DATASHEETS[gpu])
    share, sheet = memory.share, memory.sheet
    rates = {name: getattr(table.peaks, name) * share for name in ("copy_bytes_per_s", "read_bytes_per_s")}
    source = f"{table.device}, with {sheet.bytes_per_s / 1e12:g} TB/s and {sheet.memory_bytes / 1e9:g} GB of memory; not measured"
    changes: dict[str, Any] = {
        "name": f"derived:{gpu}",
        "device": sheet.device,
        "l2_bytes": sheet.l2_bytes,
        "cache_bytes": table.cache_bytes * sheet.l2_bytes / table.l2_bytes,
        "memory_bytes": sheet.memory_bytes,
        "peaks": table.peaks.model_copy(update=rates),
        "decode": tuple(memory.decode(cost) for cost in table.decode),
        "step_choices": tuple(
            cost.model_copy(
                update={
                    "points": memory.chosen(cost.points, cost.kind, cost.heads),
                    "many_points": cost.many_points
                    and memory.chosen(cost.many_points, cost.kind, cost.many_heads or 0),
                }
            )
            for cost in table.step_choices
        ),
        "paged_decode": tuple(memory.decode(cost) for cost in table.paged_decode),
        "linear": tuple(memory.linear(cost) for cost in table.linear),
        "pointwise": {
            name: memory.points(points, PASSES[name] * table.dtype_bytes) for name, points in table.pointwise.items()
        },
        "skinny": tuple(cost.model_copy(update={"byte_s": cost.byte_s + memory.more_s(1.0)}) for cost in table.skinny),
        "estimators": tuple(
            cost.model_copy(
                update={
                    "points": memory.estimated(cost.points, cost.heads),
                    "many_points": cost.many_points and memory.estimated(cost.many_points, cost.many_heads or 0),
                }
            )
            for cost in table.estimators
        ),
        "permutation": memory.points(table.permutation, 2),
        "provenance": table.provenance | {"derived_from": source},
    }
    return table.model_copy(update=changes)


@dataclass(frozen=True)
class _OtherMemory:
    """How a measured table's times change with the bandwidth."""

    table: DeviceTable
    measured: Datasheet
    sheet: Datasheet

    @property
    def share(self) -> float:
        """Of the measured bandwidth."""
        return self.sheet.bytes_per_s / self.measured.bytes_per_s

    def more_s(self, nbytes: float, flops: float = 0.0) -> float:
        """What moving so many bytes beside so many FLOPs takes beyond the measured time; negative where memory is faster."""
        compute_s, memory_s = (
            flops / self.table.peaks.matmul_flop_per_s,
            nbytes / self.table.peaks.read_bytes_per_s,
        )
        return max(compute_s, memory_s / self.share) - max(compute_s, memory_s)

    def points(self, points: Points, bytes_per_amount: float) -> Points:
        """A curve of work that is bound by memory."""
        return self._moved(points, [(bytes_per_amount * amount, 0.0) for amount in points.amounts])

    def decode(self, cost: DecodeCost) -> DecodeCost:
        """Keys and values are read once."""
        curves = tuple(PairPoints(pairs=c.pairs, points=self.points(c.points, 1.0)) for c in cost.curves)
        return cost.model_copy(update={"curves": curves, "byte_s": cost.byte_s + self.more_s(1.0)})

    def linear(self, cost: LinearCost) -> LinearCost:
        """Inputs, weights and outputs are moved once."""
        n, k = cost.outputs, cost.inputs
        work = [(self.table.dtype_bytes * (m * k + n * k + m * n), 2.0 * m * n * k) for m in cost.points.amounts]
        return cost.model_copy(update={"points": self._moved(cost.points, work)})

    def estimated(self, tokens: Points, heads: int) -> Points:
        """Queries and keys are read once more."""
        return self.points(tokens, 2.0 * heads * ESTIMATED_HEAD_DIM * self.table.dtype_bytes)

    def chosen(self, blocks: Points, kind: str, heads: int) -> Points:
        """The bounds of blocks are read once for the query heads of a KV head, or all keys where a rule looks at them."""
        rows = 2 if rule_kinds()[kind].reads_bounds else STEP_BLOCK_TOKENS
        row_bytes = ESTIMATED_HEAD_DIM * self.table.dtype_bytes
        return self.points(blocks, float(heads // STEP_GROUP * rows * row_bytes))

    def _moved(self, points: Points, work: list[tuple[float, float]]) -> Points:
        """The curve with (bytes, FLOPs) of every point; nothing gets shorter than a launch."""
        floor_s = min(self.table.peaks.launch_s, points.seconds[0])
        seconds = [
            max(floor_s, s + self.more_s(nbytes, flops))
            for s, (nbytes, flops) in zip(points.seconds, work, strict=True)
        ]
        return rising(list(zip(points.amounts, seconds, strict=True)))
