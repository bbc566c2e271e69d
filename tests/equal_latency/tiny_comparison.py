"""What the tests of comparisons share: a window, a clock and prices that count tiles."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sparsesearch.comparison import TileShares
from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.runtime.fingerprint import describe

LENGTH = 512


def window(model: PreTrainedModel, tokens: int) -> Plan:
    rule = SinkWindow(sink=64, window=LengthLaw(a=tokens))
    return uniform_plan(describe(model, "tiny"), rule, block_tokens=64, lengths_tokens=(LENGTH,))


class CountedTiles:
    """Time is 0.2 + 0.8 times the share of tiles: what the cost model says of this tiny model does not matter."""

    def __init__(self, *_: Any) -> None:
        self.calls = 0

    def __call__(self, plans: Mapping[str, Plan | None], **_: Any) -> dict[str, tuple[float, ...]]:
        self.calls += 1
        return {name: (0.2 + 0.8 * self.share(plan),) * 3 for name, plan in plans.items()}

    @staticmethod
    def share(plan: Plan | None) -> float:
        return 1.0 if plan is None else TileShares(plan, LENGTH).mean([rule for _, _, rule in plan.heads()]) or 0.0


class TilePrices:
    """Seconds are tiles."""

    name, device, measured, decode_call_s = "tiles", "none", False, 0.0

    def latency_s(self, works: Sequence[UnitWork]) -> np.ndarray:
        dense = [work.query_heads * work.query_blocks * (work.query_blocks + 1) / 2 for work in works]
        return np.array(
            [w.tiles if w.kind == "tiles" else d * (w.kind == "dense") for w, d in zip(works, dense, strict=True)]
        )

    def decode_latency_s(self, works: Sequence[DecodeWork]) -> np.ndarray:
        return np.zeros(len(works))
