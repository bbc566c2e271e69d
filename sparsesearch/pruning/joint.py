"""Attention rules and removals in one search.

The heads of a layer couple: which of them go is one choice (query heads per KV group must stay equal), and each of those that stay takes a
rule. A layer's attention is therefore one unit whose menu holds joint choices: for every structure, the rule assignments that no other
assignment beats in loss and in every budgeted cost. FFN widths are further units. Both losses are in nats of KL per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.planning import Question, score_table
from sparsesearch.profiling.proxies import length_terms
from sparsesearch.profiling.record import Profile
from sparsesearch.pruning.menus import Option
from sparsesearch.pruning.prices import SublayerSize, memory_bytes, params, projection_s
from sparsesearch.pruning.record import Kind, LayerShape, PruningProfile
from sparsesearch.pruning.remains import solve_with_a_head
from sparsesearch.pruning.search import (
    PruningQuestion,
    PruningTable,
    headless,
    plan_from_cut,
    pruning_table,
    size_after,
)
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.shapes import Unit

MAX_ASSIGNMENTS = 64
"""Rule assignments kept per structure of a layer; thinned evenly in cost."""

_METRICS = ("params", "flops", "memory", "latency", "density")


@dataclass(frozen=True)
class _HeadMenus:
    """Per layer, head and rule: loss and costs. Letters: H heads, C rules, P lengths."""

    loss: list[Float[ndarray, "H C"]]
    valid: list[Float[ndarray, "H C"]]
    costs: dict[str, list[Float[ndarray, "H C P"]]]


@dataclass(frozen=True)
class _Entry:
    """One joint choice of a layer's attention."""

    option: Option
    rules: tuple[int, ...]
    loss: float
    costs: dict[str, Float[ndarray, " P"]]


def find_joint(
    cuts: PruningProfile,
    attention: Profile,
    question: PruningQuestion,
    *,
    allow_cuts: bool = True,
    allow_rules: bool = True,
) -> Plan:
    """The plan of least predicted KL within the budgets.

    Args:
        cuts: menus of removals, of the same model.
        attention: scores of attention rules.
        question: budgets over params, flops, memory, latency or density; its lengths must be the attention profile's.
        allow_cuts: False searches attention rules alone, on the same table.
        allow_rules: False searches removals alone.

    Raises:
        SpecError: the profiles are of different models, or a budget's metric is not one of the five.
        BudgetInfeasibleError: no plan fits.
    """
    _check(cuts, attention, question)
    heads = _head_menus(attention, question)
    metrics = ["density", *(b.metric for b in question.budgets if b.metric != "density")]
    plain = pruning_table(cuts, _without_density(question))
    entries: list[list[_Entry]] = []
    rows: list[tuple[int, Kind]] = []
    for (index, kind), menu in zip(plain.sublayers, plain.options, strict=True):
        shape, own = cuts.manifest.layers[index], menu if allow_cuts else menu[:1]
        rows.append((index, kind))
        if kind == "attention":
            entries.append(_attention_menu(index, shape, own, heads, metrics, cuts, question, allow_rules))
        else:
            entries.append([_ffn_entry(shape, option, metrics, cuts, question) for option in own])
    table = _table(rows, entries, metrics, question)
    joint = PruningTable(table, tuple(rows), tuple(tuple(entry.option for entry in menu) for menu in entries))
    solution = solve_with_a_head(table, question.budgets, headless(cuts, joint))
    chosen = [menu[int(place)] for menu, place in zip(entries, solution.choice, strict=True)]
    rules, assignments = _assigned(attention, rows, chosen)
    return plan_from_cut(
        cuts,
        question,
        joint,
        solution.choice,
        solution,
        base_model=attention.manifest.base_model,
        block_tokens=attention.manifest.block_tokens,
        rules=rules,
        assignments=assignments,
    )


def _check(cuts: PruningProfile, attention: Profile, question: PruningQuestion) -> None:
    ours, theirs = cuts.manifest.base_model, attention.manifest.base_model
    if (ours.modules, ours.num_heads, ours.weights_sha256) != (theirs.modules, theirs.num_heads, theirs.weights_sha256):
        raise SpecError(
            "attention rules and removals must have been profiled on the same model, but were not. Profile again."
        )
    if question.lengths != attention.manifest.lengths:
        raise SpecError(
            f"the lengths must be the profiled ones {attention.manifest.lengths}, but got {question.lengths}."
        )
    for budget in question.budgets:
        if budget.metric not in _METRICS:
            raise SpecError(f"a joint budget must limit {', '.join(_METRICS)}, but got {budget}.")


def _without_density(question: PruningQuestion) -> PruningQuestion:
    kept = tuple(budget for budget in question.budgets if budget.metric != "density") or (Budget("params", 1.0),)
    return PruningQuestion(kept, question.lengths, question.criterion, question.cost_model, question.compensation)


def _head_menus(attention: Profile, question: PruningQuestion) -> _HeadMenus:
    """The attention profile's table cut into layers, with the text proxy in nats."""
    table = score_table(
        attention, Question((Budget("density", 1.0),), objective="text", cost_model=question.cost_model)
    )
    terms = [length_terms(attention, length, "query_head").proxies["text"] for length in attention.manifest.lengths]
    nats = np.mean(terms, axis=0)
    nats[:, 0] = 0.0
    ends = np.cumsum(attention.manifest.base_model.num_heads)[:-1]
    return _HeadMenus(
        np.split(nats, ends),
        np.split(table.valid, ends),
        {metric: np.split(cost, ends) for metric, cost in table.costs.items()},
    )


def _attention_menu(
    index: int,
    shape: LayerShape,
    options: Sequence[Option],
    heads: _HeadMenus,
    metrics: Sequence[str],
    cuts: PruningProfile,
    question: PruningQuestion,
    allow_rules: bool,
) -> list[_Entry]:
    """Structures times rule assignments; the first entry is the dense layer."""
    per_head: list[str] = [metric for metric in ("density", "latency") if metric in heads.costs]
    found: list[_Entry] = []
    for option in options:
        kept = [head for head in range(shape.num_heads) if head not in option.removed]
        size = size_after(shape, "attention", option.removed)
        for rules in _assignments(index, kept, heads, per_head, allow_rules):
            chosen = dict(zip(kept, rules, strict=True))
            loss = option.loss + sum(heads.loss[index][head, rule] for head, rule in chosen.items())
            own = {
                metric: sum(
                    (heads.costs[metric][index][head, rule] for head, rule in chosen.items()),
                    np.zeros(len(question.lengths)),
                )
                for metric in per_head
            }
            labels = tuple(chosen.get(head, 0) for head in range(shape.num_heads))
            costs = {metric: _cost(metric, shape, size, own, cuts, question) for metric in metrics}
            found.append(_Entry(option, labels, float(loss), costs))
    dense = next(i for i, entry in enumerate(found) if not entry.option.removed and not any(entry.rules))
    return [found[dense], *found[:dense], *found[dense + 1 :]]


def _assignments(
    index: int, kept: Sequence[int], heads: _HeadMenus, per_head: Sequence[str], allow_rules: bool
) -> list[tuple[int, ...]]:
    """Undominated rule assignments of the kept heads; all dense is always among them."""
    dense = (0,) * len(kept)
    if not kept or not allow_rules:
        return [dense]
    values, chosen = np.zeros((1, 1)), np.zeros((1, 0), dtype=np.int64)  # columns: loss, then costs
    for number, head in enumerate(kept):
        rules = np.flatnonzero(heads.valid[index][head])
        own = np.concatenate(
            [heads.loss[index][head, rules, None], *(heads.costs[metric][index][head, rules] for metric in per_head)],
            axis=1,
        )
        if number == 0:
            values = np.zeros((1, own.shape[1]))
        values = (values[:, None] + own).reshape(-1, own.shape[1])
        chosen = np.concatenate([np.repeat(chosen, len(rules), 0), np.tile(rules, len(chosen))[:, None]], axis=1)
        keep = _undominated(values)
        values, chosen = values[keep], chosen[keep]
    found = [tuple(int(rule) for rule in row) for row in chosen]
    return found if dense in found else [dense, *found]


def _undominated(values: Float[ndarray, "n k"]) -> Int[ndarray, " m"]:
    """Rows that no other row equals or beats everywhere, thinned to MAX_ASSIGNMENTS by loss along the order of summed relative cost."""
    relative = values[:, 1:] / np.maximum(values[:, 1:].max(0), 1e-300)
    order = np.lexsort((values[:, 0], relative.sum(1)))
    kept: list[int] = []
    for row in order:
        if not kept or not (values[kept] <= values[row] + 1e-15).all(1).any():
            kept.append(int(row))
    if len(kept) <= MAX_ASSIGNMENTS:
        return np.array(kept)
    places = np.linspace(0, len(kept) - 1, MAX_ASSIGNMENTS).round().astype(int)
    return np.asarray(np.array(kept)[np.unique(places)])


def _cost(
    metric: str,
    shape: LayerShape,
    size: SublayerSize,
    own: dict[str, Float[ndarray, " P"]],
    cuts: PruningProfile,
    question: PruningQuestion,
) -> Float[ndarray, " P"]:
    """A sublayer's cost at every length; `own` is what its heads spend on attention itself (absent for an FFN)."""
    manifest, lengths = cuts.manifest, question.lengths
    nothing = np.zeros(len(lengths))
    match metric:
        case "params":
            return np.full(len(lengths), params(shape, size))
        case "memory":
            sizes = [
                memory_bytes(shape, size, n, causal=manifest.causal, dtype_bytes=manifest.dtype_bytes) for n in lengths
            ]
            return np.array(sizes)
        case "flops":
            pairs = own.get("density", nothing) * 64**2  # tiles are counted in the profile's 64-token tiles
            return np.asarray([2 * n * params(shape, size) for n in lengths] + 4 * shape.head_dim * pairs)
        case "latency":
            assert question.cost_model is not None
            fixed = np.array([projection_s(shape, size, n, question.cost_model) for n in lengths])
            return np.asarray(fixed + own.get("latency", nothing))
    return own.get("density", nothing)


def _ffn_entry(
    shape: LayerShape, option: Option, metrics: Sequence[str], cuts: PruningProfile, question: PruningQuestion
) -> _Entry:
    size = size_after(shape, "feed_forward", option.removed)
    return _Entry(option, (), option.loss, {m: _cost(m, shape, size, {}, cuts, question) for m in metrics})


def _table(
    rows: Sequence[tuple[int, Kind]],
    entries: Sequence[Sequence[_Entry]],
    metrics: Sequence[str],
    question: PruningQuestion,
) -> ScoreTable:
    width = max(len(menu) for menu in entries)
    loss, valid = np.zeros((len(entries), width)), np.zeros((len(entries), width), dtype=bool)
    costs = {metric: np.zeros((len(entries), width, len(question.lengths))) for metric in metrics}
    for row, menu in enumerate(entries):
        valid[row, : len(menu)] = True
        loss[row, : len(menu)] = [max(entry.loss, 0.0) for entry in menu]
        for metric in metrics:
            costs[metric][row, : len(menu)] = [entry.costs[metric] for entry in menu]
    units = tuple(Unit(f"layers.{index}.{kind}", ()) for index, kind in rows)
    return ScoreTable(units, tuple(f"choice {i}" for i in range(width)), question.lengths, loss, costs, 0, valid)


def _assigned(
    attention: Profile, rows: Sequence[tuple[int, Kind]], chosen: Sequence[_Entry]
) -> tuple[dict[str, Rule], dict[str, tuple[str, ...]]]:
    """The chosen rules by label; removed heads are called dense, which no one will ask."""
    rules: dict[str, Rule] = {}
    assignments: dict[str, tuple[str, ...]] = {}
    for (index, kind), entry in zip(rows, chosen, strict=True):
        if kind != "attention" or not any(entry.rules):
            continue
        module, labels = attention.manifest.base_model.modules[index], []
        for head, candidate in enumerate(entry.rules):
            own = attention.rule_for(Unit(module, (head,)), candidate)[0] if candidate else Dense()
            rules[own.label] = own
            labels.append(own.label)
        assignments[module] = tuple(labels)
    return rules, assignments
