"""Prices of a CPU that runs now: its matrix products timed, its attention scaled to a measured dense layer."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional

from sparsesearch.cost.base import CostModel, UnitWork
from sparsesearch.pruning.prices import dense_work


class PricedHere:
    """A CPU's cost model with the matrix products of this machine.

    Every product a plan may need is timed once. Attention keeps the model's ratios, scaled so that a dense layer takes what it takes here,
    because the model may have been measured with other threads.
    """

    prices_layers = True

    def __init__(self, base: CostModel, *, num_heads: int, head_dim: int, tokens: int) -> None:
        self._base = base
        self.name = f"{base.name}, products timed here"
        shape = (1, num_heads, tokens, head_dim)
        q, k, v = (torch.randn(shape) for _ in range(3))
        dense_s = _best_s(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        self._scale = dense_s / (num_heads * base.unit_latency_s(dense_work(tokens, head_dim, 1)))
        self._products: dict[tuple[int, int, int], float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def unit_latency_s(self, work: UnitWork) -> float:
        """Seconds of a unit's attention."""
        return self._scale * self._base.unit_latency_s(work)

    def latency_s(self, works: Sequence[UnitWork]) -> Float[np.ndarray, " works"]:
        """The same for many units."""
        return np.asarray(self._scale * self._base.latency_s(works))

    def linear_s(self, rows: int, outputs: int, inputs: int) -> float:
        """Seconds of a product, timed when first asked for."""
        key = rows, outputs, inputs
        if key not in self._products:
            x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
            self._products[key] = _best_s(lambda: functional.linear(x, weight))
        return self._products[key]


@torch.no_grad()
def _best_s(run: Callable[[], Any], repeats: int = 5) -> float:
    """Least of some times after an untimed run."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
