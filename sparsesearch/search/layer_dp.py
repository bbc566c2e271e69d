"""Exact dynamic programming over layers: what each layer runs itself, and whose selection it reuses.

A lane is a chain of units, one per layer (a whole layer, or one KV group of each). At layer j a lane runs a candidate of the menu, or the
selection that an earlier layer left:

    J(j, s)      = J(j-1, s) + min( min_o w(j, o),  r(s, j) )        run o and keep s, or reuse s = (layer i, candidate e)
    J(j, (j, e)) = min_s J(j-1, s) + w(j, e)                         run e, and hold its selection from now on

w = loss + price · cost. One selection is held at a time, as in HyLRA. Given budgets, the prices are the multipliers of the Lagrangian dual, and
a label search over all lanes, pruned by the dual's cost to go, closes what the dual leaves open: it ends with the optimum, or states its gap.

Sources: the recursion generalises HyLRA, arXiv:2602.00777, algorithm 1, to measured cost and loss; constrained shortest paths by Lagrangian
bounds: Handler and Zang 1980, Networks 10; Dumitrescu and Boland 2003, Networks 42.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.errors import SpecError

NONE = -1
"""The state before anything was left."""


@dataclass(frozen=True, eq=False)
class Lane:
    """One chain of units, in layer order.

    Attributes:
        loss: of candidate o in layer j; inf where it may not be chosen.
        cost: in K resources, in absolute units.
        emitters: candidates that leave their selection behind.
        reuse_loss: of running in layer j what emitter e selected in layer i; inf where i >= j or the reuse is not allowed.
        reuse_cost: of the same.
    """

    loss: Float[ndarray, "L O"]
    cost: Float[ndarray, "L O K"]
    emitters: tuple[int, ...]
    reuse_loss: Float[ndarray, "L E L"]
    reuse_cost: Float[ndarray, "L E L K"]

    def __post_init__(self) -> None:
        layers, menu, resources = self.cost.shape
        emitting = len(self.emitters)
        if self.loss.shape != (layers, menu) or self.reuse_loss.shape != (layers, emitting, layers):
            raise SpecError(
                f"loss and reuse_loss must have shapes {(layers, menu)} and {(layers, emitting, layers)}, but have "
                f"{self.loss.shape} and {self.reuse_loss.shape}."
            )
        if self.reuse_cost.shape != (layers, emitting, layers, resources):
            raise SpecError(
                f"reuse_cost must have shape {(layers, emitting, layers, resources)}, but has {self.reuse_cost.shape}."
            )
        if not np.isfinite(self.loss).any(1).all():
            raise SpecError("every layer must have a candidate of finite loss; profile again.")
        source, _, target = np.nonzero(np.isfinite(self.reuse_loss))
        if (source >= target).any():
            raise SpecError(
                "a layer may reuse the selection of an earlier layer only, but a finite loss says otherwise."
            )
        used = [self.cost[np.isfinite(self.loss)], self.reuse_cost[np.isfinite(self.reuse_loss)]]
        if not all(np.isfinite(part).all() and (part >= 0).all() for part in used):
            raise SpecError("every allowed choice must have finite costs that are not negative; profile again.")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.loss)

    @property
    def num_states(self) -> int:
        """Selections that can be held (layer x emitter), and `NONE`, which is the last index."""
        return self.num_layers * len(self.emitters) + 1


@dataclass(frozen=True, eq=False)
class LanePath:
    """What one lane runs.

    Attributes:
        candidate: the candidate of each layer; for a layer that reuses, the emitter whose selection it runs.
        source: the layer whose selection it runs; `NONE` where it reuses nothing.
    """

    candidate: Int[ndarray, " L"]
    source: Int[ndarray, " L"]

    @property
    def reads(self) -> tuple[tuple[int, int, int], ...]:
        """(layer, source layer, emitter) of every reuse."""
        where = np.flatnonzero(self.source != NONE)
        return tuple((int(j), int(self.source[j]), int(self.candidate[j])) for j in where)

    def loss(self, lane: Lane) -> float:
        """Summed loss."""
        return float(self._pick(lane, lane.loss, lane.reuse_loss).sum())

    def cost(self, lane: Lane) -> Float[ndarray, " K"]:
        """Summed cost."""
        return np.asarray(self._pick(lane, lane.cost, lane.reuse_cost).sum(0))

    def _pick(self, lane: Lane, own: ndarray, reused: ndarray) -> ndarray:
        layers = np.arange(lane.num_layers)
        emitter = np.array(
            [lane.emitters.index(c) if s != NONE else 0 for c, s in zip(self.candidate, self.source, strict=True)]
        )
        picked = own[layers, self.candidate].copy()
        where = self.source != NONE
        picked[where] = reused[self.source[where], emitter[where], layers[where]]
        return np.asarray(picked)


@dataclass(frozen=True, eq=False)
class Moves:
    """All moves of one layer, priced: from a held selection to the next, by candidate or reuse.

    Attributes:
        stay: least weight of a move that keeps state s.
        stay_by: its candidate, or `NONE` where it reuses s.
        emit: weight of running emitter e and holding it from now on.
    """

    stay: Float[ndarray, " s"]
    stay_by: Int[ndarray, " s"]
    emit: Float[ndarray, " E"]


def priced_moves(lane: Lane, layer: int, price: Float[ndarray, " K"], *, losses: bool = True) -> Moves:
    """The moves of a layer weighed by loss + price · cost (or price · cost alone)."""
    own = lane.cost[layer] @ price + _weight(lane.loss[layer], losses)
    reuse = lane.reuse_cost[:, :, layer] @ price + _weight(lane.reuse_loss[:, :, layer], losses)
    by_reuse = np.append(reuse.ravel(), np.inf)
    best = int(own.argmin())
    return Moves(
        stay=np.minimum(by_reuse, own[best]),
        stay_by=np.where(by_reuse < own[best], NONE, best),
        emit=own[list(lane.emitters)],
    )


def _weight(loss: ndarray, losses: bool) -> ndarray:
    """The losses, or (for the cheapest path) 0 where a choice is allowed."""
    return loss if losses else np.where(np.isfinite(loss), 0.0, np.inf)


def cost_to_go(lane: Lane, price: Float[ndarray, " K"], *, losses: bool = True) -> Float[ndarray, "L1 s"]:
    """Least weight of the layers j … L-1 when state s is held before layer j."""
    count, emitting = lane.num_layers, len(lane.emitters)
    value = np.zeros((count + 1, lane.num_states))
    for layer in range(count - 1, -1, -1):
        moves = priced_moves(lane, layer, price, losses=losses)
        new = slice(layer * emitting, (layer + 1) * emitting)
        renewed = (moves.emit + value[layer + 1, new]).min() if emitting else np.inf
        value[layer] = np.minimum(moves.stay + value[layer + 1], renewed)
    return value


def priced_path(lane: Lane, price: Float[ndarray, " K"], *, losses: bool = True) -> LanePath:
    """The path of least loss + price · cost: the recursion of the module's docstring, exactly."""
    value, emitting = cost_to_go(lane, price, losses=losses), len(lane.emitters)
    candidate, source = np.zeros(lane.num_layers, dtype=np.int64), np.full(lane.num_layers, NONE)
    state = lane.num_states - 1
    for layer in range(lane.num_layers):
        moves = priced_moves(lane, layer, price, losses=losses)
        renewed = moves.emit + value[layer + 1, layer * emitting : (layer + 1) * emitting]
        if emitting and renewed.min() < moves.stay[state] + value[layer + 1, state]:
            emitter = int(renewed.argmin())
            candidate[layer], state = lane.emitters[emitter], layer * emitting + emitter
        elif moves.stay_by[state] == NONE:
            source[layer], emitter = divmod(state, emitting)
            candidate[layer] = lane.emitters[emitter]
        else:
            candidate[layer] = moves.stay_by[state]
    return LanePath(candidate, source)
