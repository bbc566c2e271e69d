"""From menus and a budget to a cut: one unit per sublayer, whose candidates are the joint choices of everything coupled inside it.

Heads of a KV group, KV groups of a layer and FFN widths couple inside a sublayer; its menu holds the joint choices, so the search over
sublayers stays exact on the table (search/solve.py) and proves its gap. Losses of different sublayers are added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.cost import NAME_ONE
from sparsesearch.cost.base import CostModel
from sparsesearch.cut import Compensation, Cut, LayerCut
from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.plan import BudgetRecord, Certificate, Plan
from sparsesearch.pruning.menus import Option
from sparsesearch.pruning.prices import SublayerSize, attention_s, flops, memory_bytes, params, projection_s
from sparsesearch.pruning.record import Kind, LayerShape, PruningProfile
from sparsesearch.pruning.remains import solve_with_a_head
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import Solution
from sparsesearch.shapes import Unit


@dataclass(frozen=True)
class PruningQuestion:
    """What is asked of a pruning profile.

    Attributes:
        budgets: all must hold at every length.
        lengths: where `flops`, `memory` and `latency` are counted, in tokens.
        criterion: `measured`, or a criterion of `menus.CRITERIA`.
        cost_model: prices `latency`.
        compensation: how `apply` refits the rest; None leaves it as it is.
    """

    budgets: tuple[Budget, ...]
    lengths: tuple[int, ...]
    criterion: str = "measured"
    cost_model: CostModel | None = None
    compensation: Compensation | None = None


@dataclass(frozen=True)
class PruningTable:
    """The score table, and what each of its entries removes.

    Attributes:
        scores: units x candidates; ragged menus are padded with invalid entries.
        sublayers: (layer, kind) of each unit.
        options: per unit the menu.
    """

    scores: ScoreTable
    sublayers: tuple[tuple[int, Kind], ...]
    options: tuple[tuple[Option, ...], ...]


def pruning_table(profile: PruningProfile, question: PruningQuestion) -> PruningTable:
    """Losses and costs of every option of every sublayer.

    Raises:
        SpecError: a budget names a metric that removals do not have, or a latency budget comes without a cost model.
    """
    manifest = profile.manifest
    sublayers = profile.sublayers()
    menus = [tuple(profile.options(index, kind, question.criterion)) for index, kind in sublayers]
    width = max(len(menu) for menu in menus)
    loss, valid = np.zeros((len(menus), width)), np.zeros((len(menus), width), dtype=bool)
    priced = _pricers(profile, question)
    costs = {metric: np.zeros((len(menus), width, len(question.lengths))) for metric in priced}
    for row, ((index, kind), menu) in enumerate(zip(sublayers, menus, strict=True)):
        shape = manifest.layers[index]
        valid[row, : len(menu)] = True
        loss[row, : len(menu)] = [option.loss for option in menu]
        for place, option in enumerate(menu):
            size = size_after(shape, kind, option.removed)
            for metric, price in priced.items():
                costs[metric][row, place] = [price(shape, size, length) for length in question.lengths]
    # a negative score (Fisher estimates have noise) would make the search remove for the sake of removing
    scores = ScoreTable(
        units=tuple(Unit(f"layers.{index}.{kind}", ()) for index, kind in sublayers),
        candidates=tuple(f"option {place}" for place in range(width)),
        lengths=question.lengths,
        loss=np.maximum(loss, 0.0),
        costs=costs,
        dense_index=0,
        valid=valid,
    )
    return PruningTable(scores, tuple(sublayers), tuple(menus))


def _pricers(
    profile: PruningProfile, question: PruningQuestion
) -> dict[str, Callable[[LayerShape, SublayerSize, int], float]]:
    causal, cost_model = profile.manifest.causal, question.cost_model
    dtype_bytes = profile.manifest.dtype_bytes
    known: dict[str, Callable[[LayerShape, SublayerSize, int], float]] = {
        "params": lambda shape, size, length: params(shape, size),
        "flops": lambda shape, size, length: flops(shape, size, length, causal=causal),
        "memory": lambda shape, size, length: memory_bytes(shape, size, length, causal=causal, dtype_bytes=dtype_bytes),
    }
    if cost_model is not None:
        known["latency"] = lambda shape, size, length: (
            projection_s(shape, size, length, cost_model) + attention_s(shape, size, length, cost_model, causal=causal)
        )
    for budget in question.budgets:
        if budget.absolute:
            raise SpecError(f"a budget over removals must be a share of dense such as params=0.8x, but got {budget}.")
        if budget.metric == "latency" and cost_model is None:
            raise SpecError(f"a latency budget must have a cost model. {NAME_ONE}")
        if budget.metric not in known:
            raise SpecError(
                f"a budget over removals must limit params, flops, memory or latency, but got {budget}. Search a joint profile for it."
            )
    return known


def size_after(shape: LayerShape, kind: Kind, removed: Sequence[int]) -> SublayerSize:
    """What is left of a sublayer."""
    if kind == "feed_forward":
        return SublayerSize(channels=shape.num_channels - len(removed))
    cut = LayerCut(
        num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, num_channels=0, removed_heads=tuple(removed)
    )
    return SublayerSize(heads=len(cut.kept_heads), kv_heads=len(cut.kept_groups))


def find_cut(profile: PruningProfile, question: PruningQuestion, *, tilt: float = 0.0) -> Plan:
    """The cut of least predicted loss within the budgets, as a plan.

    Args:
        profile: menus.
        question: budgets and criterion.
        tilt: losses are multiplied by exp(tilt · depth), depth 0 … 1 from the first to the last layer; the plan's certificate then speaks
            of these losses.

    Raises:
        BudgetInfeasibleError: no cut fits.
        SpecError: see `pruning_table`.
    """
    table = pruning_table(profile, question)
    depth = np.array([index for index, _ in table.sublayers]) / max(1, len(profile.manifest.layers) - 1)
    loss = table.scores.loss * np.exp(tilt * depth)[:, None] if tilt else None
    solution = solve_with_a_head(table.scores, question.budgets, headless(profile, table), loss=loss)
    return plan_from_cut(profile, question, table, solution.choice, solution, tilt=tilt)


def headless(profile: PruningProfile, table: PruningTable) -> Bool[ndarray, "U C"]:
    """Which entries leave an attention sublayer without heads."""
    found = np.zeros(table.scores.loss.shape, dtype=bool)
    for row, ((index, kind), menu) in enumerate(zip(table.sublayers, table.options, strict=True)):
        if kind == "attention":
            count = profile.manifest.layers[index].num_heads
            found[row, : len(menu)] = [len(option.removed) == count for option in menu]
    return found


def uniform_cut(profile: PruningProfile, question: PruningQuestion, *, sublayer: Kind | None = "feed_forward") -> Plan:
    """The baseline: the same share goes from every layer, just enough for the budgets.

    Args:
        profile: menus.
        question: whose criterion orders heads and channels inside a layer.
        sublayer: where the share is taken; None takes it from both.

    Raises:
        BudgetInfeasibleError: taking everything there is not enough.
    """
    table = pruning_table(profile, question)
    sizes = [np.array([len(option.removed) for option in menu]) for menu in table.options]
    for step in range(101):
        share = step / 100
        choice = np.zeros(len(sizes), dtype=np.int64)
        for row, (_, kind) in enumerate(table.sublayers):
            if sublayer in (None, kind):
                enough = np.flatnonzero(sizes[row] >= share * sizes[row].max() - 1e-9)
                choice[row] = enough[np.argmin(sizes[row][enough])]
        if all((table.scores.cost_of(b.metric, choice) <= b.bound + 1e-12).all() for b in question.budgets):
            return plan_from_cut(profile, question, table, choice, None)
    bounds = ", ".join(map(str, question.budgets))
    raise BudgetInfeasibleError(f"a uniform cut must fit {bounds}, but none does. Take it from both sublayers.")


def plan_from_cut(
    profile: PruningProfile,
    question: PruningQuestion,
    table: PruningTable,
    choice: Int[ndarray, " U"],
    solution: Solution | None,
    *,
    tilt: float = 0.0,
    **more: Any,
) -> Plan:
    """A choice of the table as a plan; attention stays dense unless `more` gives rules and assignments. `tilt` is for the record."""
    manifest = profile.manifest
    attention: dict[str, Any] = {
        "base_model": manifest.base_model,
        "block_tokens": 64,
        "unit": "query_head",
        "rules": {},
        "assignments": {},
    }
    return Plan(
        **{**attention, **more},
        lengths_tokens=question.lengths,
        budgets=tuple(_recorded(budget, question, table, choice) for budget in question.budgets),
        certificate=None
        if solution is None
        else Certificate(
            objective=f"{question.criterion} ({manifest.distance}{f', tilt {tilt:g}' if tilt else ''})",
            loss=solution.loss,
            lower_bound=solution.lower_bound,
            gap=solution.gap,
            solver=solution.solver,
        ),
        provenance={"calibration": manifest.calibration, "seed": manifest.seed, "versions": manifest.versions},
        pruning=cut_of(profile, question, table, choice),
    )


def _recorded(
    budget: Budget, question: PruningQuestion, table: PruningTable, choice: Int[ndarray, " U"]
) -> BudgetRecord:
    """A budget, and what a choice is predicted to take of it."""
    shares = table.scores.cost_of(budget.metric, choice)
    return BudgetRecord(
        metric=budget.metric,
        bound=budget.bound,
        predicted={str(length): float(share) for length, share in zip(question.lengths, shares, strict=True)},
        cost_model=question.cost_model.name if budget.metric == "latency" and question.cost_model else None,
    )


def cut_of(profile: PruningProfile, question: PruningQuestion, table: PruningTable, choice: Int[ndarray, " U"]) -> Cut:
    """What a choice removes. From the first layer that loses something, every layer is named: it is refitted."""
    removed: dict[tuple[int, Kind], tuple[int, ...]] = {
        sublayer: menu[int(place)].removed
        for sublayer, menu, place in zip(table.sublayers, table.options, choice, strict=True)
    }
    touched = [index for (index, _), gone in removed.items() if gone]
    first = min(touched, default=len(profile.manifest.layers))
    if question.compensation is not None:
        touched = list(range(first, len(profile.manifest.layers)))
    layers = {}
    for index in sorted(set(touched)):
        shape = profile.manifest.layers[index]
        layers[index] = LayerCut(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            num_channels=shape.num_channels,
            removed_heads=removed.get((index, "attention"), ()),
            removed_channels=removed.get((index, "feed_forward"), ()),
        )
    predicted: Float[ndarray, ""] = np.asarray(table.scores.loss_of(choice))
    return Cut(
        layers=layers,
        compensation=question.compensation,
        scoring={"criterion": question.criterion, "predicted": float(predicted), "distance": profile.manifest.distance},
    )
