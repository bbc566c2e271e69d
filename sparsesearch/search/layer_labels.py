"""Labels: partial plans that are extended layer by layer, and dropped where they cannot beat the best plan known or another label beats them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import monotonic

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.search.layer_dp import NONE, Lane, LanePath, cost_to_go

MAX_RIVALS = 512
SLACK = 1e-12
"""Relative excess of a limit that counts as rounding."""


@dataclass(frozen=True, eq=False)
class LanePlan:
    """Paths of all lanes, what they lose and what they cost."""

    paths: tuple[LanePath, ...]
    loss: float
    cost: Float[ndarray, " K"]


def fits(cost: ndarray, limit: Float[ndarray, " K"]) -> Bool[ndarray, "*n"]:
    """Whether costs keep every limit."""
    return np.asarray((cost <= limit * (1 + SLACK)).all(-1))


@dataclass(frozen=True, eq=False)
class _Labels:
    """Partial plans of equally many layers: the state held, what they lost and cost, and how each came about."""

    state: Int[ndarray, " n"]
    loss: Float[ndarray, " n"]
    cost: Float[ndarray, "n K"]
    parent: Int[ndarray, " n"]
    candidate: Int[ndarray, " n"]
    source: Int[ndarray, " n"]

    def take(self, index: ndarray) -> "_Labels":
        return _Labels(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: Sequence["_Labels"]) -> "_Labels":
        return _Labels(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in _Labels.__dataclass_fields__)
        )


def search_labels(
    lanes: Sequence[Lane],
    limit: Float[ndarray, " K"],
    prices: Float[ndarray, " K"],
    best: LanePlan | None,
    gap_target: float,
    max_labels: int,
    deadline: float,
) -> tuple[LanePlan | None, float, bool]:
    """The optimum, or `best` when nothing promises to beat it by more than half the target.

    Returns:
        The plan, the least that any label dropped for its promise could have lost, and whether no label was lost to the cap.
    """
    priced = [cost_to_go(lane, prices) for lane in lanes]
    least = [np.stack([cost_to_go(lane, unit, losses=False) for unit in np.eye(len(limit))], -1) for lane in lanes]
    later = np.cumsum([0.0, *(value[0, -1] for value in priced[:0:-1])])[::-1]
    later_cost = np.cumsum([0 * limit, *(value[0, -1] for value in least[:0:-1])], axis=0)[::-1]
    bar = np.inf if best is None else best.loss - 0.5 * gap_target * abs(best.loss)
    none = np.array([lanes[0].num_states - 1])
    zero = np.zeros(1, dtype=np.int64)
    labels = _Labels(none, np.zeros(1), np.zeros((1, len(limit))), zero, zero, zero)
    steps, dropped, complete = [], np.inf, True
    for index, lane in enumerate(lanes):
        labels = labels.take(np.arange(len(labels.loss)))
        labels.state[:] = lane.num_states - 1  # a lane begins with nothing held
        for layer in range(lane.num_layers):
            if monotonic() > deadline:
                return best, dropped, False
            labels = _extend(lane, layer, labels)
            ahead = priced[index][layer + 1][labels.state] + later[index]
            promise = labels.loss + labels.cost @ prices + ahead - float(prices @ limit)
            rest = labels.cost + least[index][layer + 1][labels.state] + later_cost[index]
            feasible = fits(rest, limit)
            dropped = min(dropped, float(promise[feasible & (promise >= bar)].min(initial=np.inf)))
            labels, promise = _kept(labels, promise, feasible & (promise < bar), lane, layer)
            if len(labels.loss) > max_labels:
                complete = False
                labels = labels.take(np.sort(np.argpartition(promise, max_labels)[:max_labels]))
            if not len(labels.loss):
                return best, dropped, complete
            steps.append(labels)
    winner = int(labels.loss.argmin())
    return _trace(lanes, steps, winner), dropped, complete


def _extend(lane: Lane, layer: int, labels: _Labels) -> _Labels:
    """Every label by every move: a candidate, held or not, or a reuse of what it holds."""
    emitting, parents, parts = len(lane.emitters), np.arange(len(labels.loss)), []
    for candidate in np.flatnonzero(np.isfinite(lane.loss[layer])):
        loss, cost = labels.loss + lane.loss[layer, candidate], labels.cost + lane.cost[layer, candidate]
        states = [labels.state]
        if candidate in lane.emitters:
            states.append(np.full_like(labels.state, layer * emitting + lane.emitters.index(candidate)))
        none, own = np.full_like(labels.state, NONE), np.full_like(labels.state, candidate)
        parts += [_Labels(state, loss, cost, parents, own, none) for state in states]
    if emitting and layer:
        source, emitter = np.divmod(labels.state, emitting)
        holding = np.flatnonzero(labels.state != lane.num_states - 1)
        holding = holding[np.isfinite(lane.reuse_loss[source[holding], emitter[holding], layer])]
        held = labels.take(holding)
        source, emitter = source[holding], emitter[holding]
        loss = held.loss + lane.reuse_loss[source, emitter, layer]
        cost = held.cost + lane.reuse_cost[source, emitter, layer]
        parts.append(_Labels(held.state, loss, cost, parents[holding], np.array(lane.emitters)[emitter], source))
    return _Labels.join(parts)


def _kept(
    labels: _Labels, promise: Float[ndarray, " n"], worthwhile: Bool[ndarray, " n"], lane: Lane, layer: int
) -> tuple[_Labels, Float[ndarray, " n"]]:
    """Labels that promise enough and that no other label of the same state beats; at a lane's end all states are one."""
    index = np.flatnonzero(worthwhile)
    state = labels.state[index] if layer + 1 < lane.num_layers else np.zeros(len(index), dtype=np.int64)
    order = np.lexsort((*labels.cost[index].T, labels.loss[index], state))
    index, state = index[order], state[order]
    bounds = np.flatnonzero(np.diff(state, prepend=-1, append=np.iinfo(np.int64).max))
    kept = [index[first:end][_undominated(labels.cost[index[first:end]])] for first, end in pairwise(bounds)]
    index = np.concatenate(kept) if kept else index
    return labels.take(index), promise[index]


def _undominated(cost: Float[ndarray, "n K"]) -> Bool[ndarray, " n"]:
    """Rows, in order of rising loss, that are cheaper in some resource than every row before them."""
    if cost.shape[1] == 1:
        before = np.minimum.accumulate(np.append(np.inf, cost[:-1, 0]))
        return np.asarray(cost[:, 0] < before)
    # a row that stays although it is dominated costs time only, so many rows are compared with a spread of them
    rivals = np.unique(np.linspace(0, len(cost) - 1, min(len(cost), MAX_RIVALS)).astype(np.int64))
    beaten = np.zeros(len(cost), dtype=bool)
    for first in range(0, len(cost), MAX_RIVALS):
        rows = np.arange(first, min(first + MAX_RIVALS, len(cost)))
        no_dearer = (cost[rivals, None] <= cost[rows]).all(-1)
        beaten[rows] = (no_dearer & (rivals[:, None] < rows)).any(0)
    return ~beaten


def _trace(lanes: Sequence[Lane], steps: Sequence[_Labels], winner: int) -> LanePlan:
    """Follow a label back to the first layer of the first lane."""
    candidate, source, index = [], [], winner
    for labels in reversed(steps):
        candidate.append(int(labels.candidate[index]))
        source.append(int(labels.source[index]))
        index = int(labels.parent[index])
    sizes = np.cumsum([0, *(lane.num_layers for lane in lanes)])
    chosen, sources = np.array(candidate[::-1]), np.array(source[::-1])
    paths = tuple(LanePath(chosen[a:b], sources[a:b]) for a, b in pairwise(sizes))
    return LanePlan(paths, float(steps[-1].loss[winner]), np.asarray(steps[-1].cost[winner]))
