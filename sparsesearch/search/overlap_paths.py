"""Which layers refresh and which reuse, from the overlap of their selections alone: the two published objectives.

`overlap[i, j]` is the share of layer j's own selection that layer i's selection holds, for i < j. A path says for every layer whose
selection it runs: its own (it refreshes) or that of the last layer that refreshed. Layer 0 always refreshes. A path is a row of segments, one
per refreshing layer, so both objectives are dynamic programmes over the ends of segments, in O(L²) and O(C·L²) steps.

Neither objective knows what a layer costs or loses; `layer_dp` does.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.errors import SpecError


@dataclass(frozen=True, eq=False)
class ReusePath:
    """Whose selection each layer runs.

    Attributes:
        source: the layer whose selection layer j runs; j itself where it refreshes.
        least: the smallest overlap of a layer that reuses; 1 when none does.
        total: overlaps summed over layers, 1 for each that refreshes.
    """

    source: Int[ndarray, " L"]
    least: float
    total: float

    @property
    def num_refreshes(self) -> int:
        """Layers that refresh, layer 0 included."""
        return int((self.source == np.arange(len(self.source))).sum())


def hylra_path(overlap: Float[ndarray, "L L"], threshold: float) -> ReusePath:
    """The fewest refreshing layers such that every reuse has at least `threshold` overlap; among those, the largest summed overlap.

    Source: HyLRA, arXiv:2602.00777, algorithm 1 (as described by its reviews; the text itself could not be had).

    Args:
        overlap: see the module; only entries above the diagonal are read.
        threshold: 0.85 in the paper.
    """
    _check(overlap)
    if not 0 <= threshold <= 1:
        raise SpecError(f"0 <= threshold <= 1 must hold for the overlap of a reuse, but got {threshold}.")
    least, total = _segments(overlap)
    num_layers = len(overlap)
    best = [(0, 0.0)] + [
        (num_layers + 1, 0.0)
    ] * num_layers  # refreshes, minus summed overlap, of the layers before an end
    start = np.zeros(num_layers + 1, dtype=np.int64)
    for end in range(1, num_layers + 1):
        for first in range(end):
            if least[first, end] >= threshold:
                found = (best[first][0] + 1, best[first][1] - total[first, end])
                if found < best[end]:
                    best[end], start[end] = found, first
    return _path(overlap, start)


def rals_path(overlap: Float[ndarray, "L L"], max_refreshes: int) -> ReusePath:
    """The largest least overlap with at most `max_refreshes` refreshing layers after layer 0; among those, the largest summed overlap.

    Two passes: first the best least overlap t*, then the largest sum among paths that keep t*. One pass with (least, sum) pairs in
    lexicographic order, as published, has no optimal substructure for the sum.

    Source: class RALS of unified-cache-management, `ucm/sparse/gsa_on_device/tools/main.py`. Differs: two passes.

    Args:
        overlap: see the module; only entries above the diagonal are read.
        max_refreshes: not counting layer 0, as there.
    """
    _check(overlap)
    if max_refreshes < 0:
        raise SpecError(f"max_refreshes >= 0 must hold, but got {max_refreshes}.")
    least, total = _segments(overlap)
    num_layers = len(overlap)
    count = min(max_refreshes, num_layers - 1) + 1
    bottleneck = np.full((count + 1, num_layers + 1), -np.inf)
    bottleneck[0, 0] = np.inf
    for used in range(1, count + 1):
        for end in range(1, num_layers + 1):
            bottleneck[used, end] = np.minimum(bottleneck[used - 1, :end], least[:end, end]).max()
    floor = bottleneck[1:, num_layers].max()
    summed = np.full((count + 1, num_layers + 1), -np.inf)
    summed[0, 0] = 0.0
    start = np.zeros((count + 1, num_layers + 1), dtype=np.int64)
    for used in range(1, count + 1):
        for end in range(1, num_layers + 1):
            sums = np.where(least[:end, end] >= floor, summed[used - 1, :end] + total[:end, end], -np.inf)
            start[used, end] = sums.argmax()
            summed[used, end] = sums.max()
    used = int(summed[1:, num_layers].argmax()) + 1
    return _path(overlap, start, used)


def _check(overlap: Float[ndarray, "L L"]) -> None:
    if overlap.ndim != 2 or overlap.shape[0] != overlap.shape[1] or not len(overlap):
        raise SpecError(f"overlap must be a square matrix, one row per layer, but has shape {overlap.shape}.")
    if not np.isfinite(overlap[np.triu_indices(len(overlap), 1)]).all():
        raise SpecError("every overlap of an earlier layer with a later one must be finite; profile the reuse again.")


def _segments(overlap: Float[ndarray, "L L"]) -> tuple[Float[ndarray, "L E"], Float[ndarray, "L E"]]:
    """Least and summed overlap of the layers first … end - 1 when all of them run the selection of `first`, which counts 1."""
    num_layers = len(overlap)
    least = np.full((num_layers, num_layers + 1), -np.inf)
    total = np.full((num_layers, num_layers + 1), -np.inf)
    for first in range(num_layers):
        row = np.concatenate([[1.0], overlap[first, first + 1 :]])
        least[first, first + 1 :] = np.minimum.accumulate(row)
        total[first, first + 1 :] = row.cumsum()
    return least, total


def _path(overlap: Float[ndarray, "L L"], start: Int[ndarray, "*used E"], used: int | None = None) -> ReusePath:
    """Follow the segments back from the last layer."""
    num_layers = len(overlap)
    source, end = np.zeros(num_layers, dtype=np.int64), num_layers
    while end > 0:
        first = int(start[end] if used is None else start[used, end])
        source[first:end] = first
        end, used = first, None if used is None else used - 1
    layers = np.arange(num_layers)
    found = np.where(source == layers, 1.0, overlap[source, layers])
    return ReusePath(source, float(found.min()), float(found.sum()))
