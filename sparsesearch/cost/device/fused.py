"""The fused decoding step on a measured accelerator: the law of its products, the fit of that law, and what layers add."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from sparsesearch.cost.device.table import Correction, ShortLayers, SkinnyCost
from sparsesearch.kernels.skinny_tiling import tiling_for

SHARPNESS = 8.0
LAUNCH_S, COLUMN_S = 2e-6, 1e-9
"""Where the fit starts."""
DISTURBED = 0.3
"""Interquartile range over the median: of 36 products on an H200, one had 0.54 and four times its usual time, the others at most 0.05."""


@dataclass(frozen=True)
class MeasuredFused:
    """A device's `FusedCosts`.

    Attributes:
        skinny: of the products.
        dtype_bytes: bytes per weight.
        layer: rows -> seconds per layer.
        short: the same of small layers; None if an older calibration left them out.
        start: rows -> seconds per step.
    """

    skinny: tuple[SkinnyCost, ...]
    dtype_bytes: int
    layer: Correction
    start: Correction
    short: ShortLayers | None = None

    @property
    def most_rows(self) -> int:
        """Sequences that are decoded together at most."""
        return max(cost.rows for cost in self.skinny)

    def product_s(self, rows: int, lines: int, inner: int) -> float:
        """A product, by the cost of the way it is cut; of the most similar way where that one was not measured."""
        served = min(cost.rows for cost in self.skinny if cost.rows >= min(rows, self.most_rows))
        tiling = tiling_for(lines, inner, rows)

        def unlike(cost: SkinnyCost) -> float:
            return abs(math.log(cost.columns / tiling.columns)) + abs(math.log(cost.step_columns / tiling.inner))

        cost = min((cost for cost in self.skinny if cost.rows == served), key=unlike)
        return skinny_seconds(cost, lines, inner, self.dtype_bytes)

    def layer_s(self, rows: int, weight_bytes: float) -> float:
        """Beyond products and attention."""
        long_s = self.layer.at(rows)
        if self.short is None:
            return long_s
        return long_s + self.short.share(weight_bytes) * (self.short.seconds.at(rows) - long_s)

    def start_s(self, rows: int) -> float:
        """Beyond the layers."""
        return self.start.at(rows)


def skinny_seconds(cost: SkinnyCost, lines: int, inner: int, dtype_bytes: int) -> float:
    """Seconds of one product; the formula is that of `SkinnyCost`."""
    walk = -(-inner // cost.step_columns) * cost.step_columns * cost.column_s
    read = float(lines * inner * dtype_bytes) * cost.byte_s
    longest = max(walk, read)
    corner: float = ((walk / longest) ** SHARPNESS + (read / longest) ** SHARPNESS) ** (1 / SHARPNESS)
    return cost.launch_s + longest * corner


def fit_skinny(
    rows: Sequence[dict[str, Any]], dtype_bytes: int, read_bytes_per_s: float
) -> tuple[tuple[SkinnyCost, ...], dict[str, float]]:
    """Least squares on relative errors, per number of rows and way of cutting, and the errors that stay.

    Rows whose samples differ by more than `DISTURBED` are left out where others tell of the same cut.
    """

    def cut(row: dict[str, Any]) -> tuple[int, int, int]:
        tiling = tiling_for(row["n"], row["k"], row["m"])
        return row["m"], tiling.columns, tiling.inner

    costs, residuals = [], []
    for key, alike in groupby(sorted(rows, key=cut), key=cut):
        everything = list(alike)
        own = [row for row in everything if row.get("spread", 0.0) <= DISTURBED] or everything
        cost = _solve(
            own, dict(zip(("rows", "columns", "step_columns"), key, strict=True)), dtype_bytes, read_bytes_per_s
        )
        costs.append(cost)
        residuals += _errors(cost, own, dtype_bytes)
    if not costs:
        return (), {}
    sizes = np.abs(residuals)
    return tuple(costs), {"skinny_mape": float(sizes.mean()), "skinny_max": float(sizes.max())}


def _solve(
    rows: Sequence[dict[str, Any]], fixed: dict[str, int], dtype_bytes: int, read_bytes_per_s: float
) -> SkinnyCost:
    start = np.log([LAUNCH_S, COLUMN_S, 1 / read_bytes_per_s])

    def cost(logs: np.ndarray) -> SkinnyCost:
        launch_s, column_s, byte_s = np.exp(logs).tolist()
        return SkinnyCost(**fixed, launch_s=launch_s, column_s=column_s, byte_s=byte_s)

    def residual(logs: np.ndarray) -> np.ndarray:
        pull = 0.02 * (logs - start)  # what the cases cannot tell stays where it was
        return np.concatenate([_errors(cost(logs), rows, dtype_bytes), pull])

    return cost(least_squares(residual, start, loss="soft_l1", f_scale=0.03, max_nfev=200).x)


def _errors(cost: SkinnyCost, rows: Sequence[dict[str, Any]], dtype_bytes: int) -> list[float]:
    return [skinny_seconds(cost, row["n"], row["k"], dtype_bytes) / row["seconds"] - 1 for row in rows]
