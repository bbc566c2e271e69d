"""The question asked of a profile, and its score table: losses and prices of every candidate in every unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost import NAME_ONE
from sparsesearch.cost.base import CostModel
from sparsesearch.cost.layer_calls import CallCosts
from sparsesearch.cost.layer_costs import LayerCosts, PrefillCosts
from sparsesearch.cost.layer_parts import decode_rest_s, prefill_rest_s
from sparsesearch.errors import SpecError
from sparsesearch.loss_growth import beyond, decode_growth, prefill_growth
from sparsesearch.model_shapes import ModelShape
from sparsesearch.pricing import Pricer
from sparsesearch.profiling.proxies import chooses_in_steps, objective_loss, phase_losses
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import Rule
from sparsesearch.scores import WHOLE, LayerMenus, ScoreTable
from sparsesearch.search.budget import PRICED_BY_DEVICE, Budget
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Decoding, Granularity, Unit
from sparsesearch.workload import Workload

DEFAULT_ANSWER_WEIGHT = 1.0
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Question:
    """What is asked of a profile.

    Attributes:
        budgets: all must hold at every length or workload where their metric is priced.
        space: a subset of the profile's candidates; None takes all.
        granularity: what a unit is (of the prefill, where decoding is searched separately).
        objective: a name of `proxies.OBJECTIVES`.
        answer_weight: weight of the answer proxy in `combined`.
        cost_model: prices time; needed only by such budgets. With one, no plan is predicted slower than dense.
        workloads: what will be served. Without any, everything is priced for one sequence at the profiled lengths.
        decode: `same` rule in both phases, or a `separate` one per KV group.
        dtype_bytes: bytes per cached element; None takes the profiled model's.
        shape: sizes of the model. With them `memory` includes the weights, and seconds all that is not attention, where the cost model
            knows whole layers.
        sample_weights: of the calibration sequences, in the profile's order; None weighs them equally. For one rule in both phases.
        max_groups_per_layer: most different rules (of one phase) in a layer, for backends that launch each by itself; None: any number.
    """

    budgets: tuple[Budget, ...]
    space: SearchSpace | None = None
    granularity: Granularity = "query_head"
    objective: str = "combined"
    answer_weight: float = DEFAULT_ANSWER_WEIGHT
    cost_model: CostModel | None = None
    workloads: tuple[Workload, ...] = ()
    decode: Literal["same", "separate"] = "same"
    dtype_bytes: int | None = None
    shape: ModelShape | None = None
    max_groups_per_layer: int | None = None
    sample_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.answer_weight < math.inf:
            raise SpecError(f"the weight of answers must be a number from 0 on, but got {self.answer_weight}.")

    @property
    def layer_costs(self) -> LayerCosts | None:
        """The cost model, where seconds can be those of the whole model."""
        return self.cost_model if self.shape is not None and isinstance(self.cost_model, LayerCosts) else None

    @property
    def prefill_costs(self) -> PrefillCosts | None:
        """The cost model, where seconds of a prompt can be those of the whole model: on a CPU too, whose steps are known by attention alone."""
        costs = self.cost_model
        if self.shape is not None and isinstance(costs, CallCosts) and costs.prices_layers:
            return costs
        return self.layer_costs

    @property
    def constraints(self) -> tuple[Budget, ...]:
        """The budgets, and that no phase may be slower than dense where time is known."""
        if self.cost_model is None:
            return self.budgets
        generates = any(workload.generate_tokens for workload in self.workloads)
        return (*self.budgets, Budget("ttft", 1.0), *([Budget("tpot", 1.0)] if generates else []))


def score_table(profile: Profile, question: Question) -> ScoreTable:
    """Losses and costs of the question's candidates in every unit.

    With separate decoding the prefill's units come first, then a `Decoding` per KV group: losses and costs of the two phases are summed,
    so a pair of rules is two rows and not a candidate of its own.

    Raises:
        SpecError: the space has rules that were not profiled; a budget in time has no cost model; caches are asked about per query head.
    """
    rules = profile.manifest.candidates
    columns = list(range(len(rules))) if question.space is None else profile.indices(question.space.candidates)
    metrics, lengths = _metrics(question), priced_lengths(profile, question)
    served = question.workloads or tuple(Workload(length) for length in profile.manifest.lengths)
    element_bytes = question.dtype_bytes or DTYPE_BYTES[profile.manifest.dtype]
    prefill = Pricer(profile, question.granularity, question.cost_model, element_bytes)
    decode = replace(prefill, granularity="kv_group")
    ledger = _Ledger(prefill, decode, question.decode == "separate")
    ledger.enter("density", lengths, prefill=[prefill.tiles(length) for length in lengths])
    if "kv_fraction" in metrics:
        ledger.enter("kv_fraction", lengths, decode=[decode.kept_elements(length) for length in lengths])
    if "memory" in metrics:
        prompts = [workload.prompt_tokens for workload in served]
        kv_bytes = [decode.kv_bytes(workload) for workload in served]
        weight_bytes = 0.0 if question.shape is None else float(question.shape.num_parameters * element_bytes)
        ledger.enter("memory", prompts, decode=kv_bytes, fixed=[weight_bytes] * len(prompts))
    if metrics & set(PRICED_BY_DEVICE):
        _enter_seconds(ledger, question, served)
    loss = _losses(profile, question, ledger)[:, columns]
    return ScoreTable(
        units=ledger.units,
        candidates=tuple(rules[column].label for column in columns),
        lengths=profile.manifest.lengths,
        loss=np.where(np.isfinite(loss), loss, 0.0),
        costs={metric: cost[:, columns] for metric, cost in ledger.costs.items()},
        dense_index=columns.index(0),
        valid=np.isfinite(loss),
        points=ledger.points,
        fixed=ledger.fixed,
        menus=_menus(question, ledger.units, [rules[column] for column in columns]),
    )


def _menus(question: Question, units: Sequence[Unit | Decoding], rules: Sequence[Rule]) -> LayerMenus | None:
    """One layer per module and phase, one launch group per rule; a rule that computes nothing launches nothing."""
    if question.max_groups_per_layer is None:
        return None
    places = [(True, unit.unit.module) if isinstance(unit, Decoding) else (False, unit.module) for unit in units]
    layers = {place: index for index, place in enumerate(dict.fromkeys(places))}
    group = np.array([-1 if rule.rest == "zero" else index for index, rule in enumerate(rules)])
    return LayerMenus(np.array([layers[place] for place in places]), group, question.max_groups_per_layer)


@dataclass
class _Ledger:
    """Costs of the prefill's units and of decoding: on the same rows, or on rows of its own."""

    prefill: Pricer
    decode: Pricer
    separate: bool
    costs: dict[str, Float[ndarray, "U C P"]] = field(default_factory=dict)
    points: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fixed: dict[str, Float[ndarray, " P"]] = field(default_factory=dict)

    @property
    def units(self) -> tuple[Unit | Decoding, ...]:
        """The rows."""
        own = self.prefill.units
        return (*own, *(Decoding(unit) for unit in self.decode.units)) if self.separate else own

    def enter(
        self,
        metric: str,
        points: Sequence[int],
        *,
        prefill: Sequence[Float[ndarray, "U C"]] = (),
        decode: Sequence[Float[ndarray, "G C"]] = (),
        fixed: Sequence[float] = (),
    ) -> None:
        """Price a metric at some points, in one phase or in both."""
        parts = [np.stack(part, -1) if part else None for part in (prefill, decode)]
        num_candidates = len(self.prefill.profile.manifest.candidates)
        rows = [len(self.prefill.units), len(self.decode.units)]
        first, second = (
            np.zeros((count, num_candidates, len(points))) if part is None else part
            for count, part in zip(rows, parts, strict=True)
        )
        if self.separate:
            self.costs[metric] = np.concatenate([first, second])
        else:
            self.costs[metric] = first if parts[1] is None else first + second
        if tuple(points) != self.prefill.profile.manifest.lengths:
            self.points[metric] = tuple(points)
        if any(fixed):
            self.fixed[metric] = np.array(fixed)


def _enter_seconds(ledger: _Ledger, question: Question, served: Sequence[Workload]) -> None:
    """`ttft` per workload, `tpot` per workload that generates, and `latency`: the weighted sum, or per profiled length."""
    generating = [workload for workload in served if workload.generate_tokens]
    first = [ledger.prefill.ttft_s(workload) for workload in served]
    step = [ledger.decode.tpot_s(workload) for workload in generating]
    calls_s = ledger.decode.decode_calls_s() if generating else 0.0
    rest = [_rest_s(question, workload) for workload in served]
    step_rest = [calls_s + _rest_s(question, workload, step=True) for workload in generating]
    prompts = [workload.prompt_tokens for workload in served]
    ledger.enter("ttft", prompts, prefill=first, fixed=rest)
    if generating:
        ledger.enter("tpot", [workload.prompt_tokens for workload in generating], decode=step, fixed=step_rest)
    if not question.workloads:
        ledger.enter("latency", prompts, prefill=first, fixed=rest)
        return
    total = sum(workload.weight for workload in served)
    runs = [workload.weight / total for workload in served]
    steps = [workload.weight / total * workload.generate_tokens for workload in generating]
    ledger.enter(
        "latency",
        [WHOLE],
        prefill=[np.sum([share * seconds for share, seconds in zip(runs, first, strict=True)], 0)],
        decode=[np.sum([count * seconds for count, seconds in zip(steps, step, strict=True)], 0)] if step else [],
        fixed=[float(np.dot(runs, rest) + np.dot(steps, step_rest))],
    )


def _rest_s(question: Question, workload: Workload, *, step: bool = False) -> float:
    """Seconds of everything but attention, of the prefill or of one decoding step; 0 where it is not known."""
    shape, steps, costs = question.shape, question.layer_costs, question.prefill_costs
    if step:
        return 0.0 if steps is None or shape is None else decode_rest_s(shape, steps, batch=workload.batch)
    if costs is None or shape is None:
        return 0.0
    return prefill_rest_s(shape, costs, rows=workload.batch * workload.prompt_tokens, batch=workload.batch)


def _losses(profile: Profile, question: Question, ledger: "_Ledger") -> Float[ndarray, "U C"]:
    """Losses of the ledger's rows; inf where a candidate may not be chosen."""
    prompts = beyond(profile, priced_lengths(profile, question))
    contexts = [work for work in question.workloads if beyond(profile, [work.last_context_tokens])]
    generating = [work for work in contexts if work.generate_tokens]
    growth = prefill_growth(ledger.prefill, prompts)
    if question.decode == "same":
        loss = objective_loss(
            profile,
            question.objective,
            question.granularity,
            answer_weight=question.answer_weight,
            sample_weights=question.sample_weights,
            generates=any(workload.generate_tokens for workload in question.workloads),
        )
        return _grown(loss, np.maximum(growth, decode_growth(ledger.prefill, generating)))
    if question.sample_weights is not None:
        raise SpecError(
            "calibration sequences can be weighed only where both phases share a rule. Search with --decode same."
        )
    prefill, decode = phase_losses(
        profile, question.objective, question.granularity, answer_weight=question.answer_weight
    )
    decode = _grown(decode, decode_growth(ledger.decode, generating))
    static = [not (rule.dynamic or rule.needs_calibration or rule.reuses) for rule in profile.manifest.candidates]
    stepping = chooses_in_steps(profile)
    whole = BlockGrid(*(max(profile.manifest.lengths),) * 2, profile.manifest.block_tokens)
    idle = stepping & [
        rule.keeps_all(whole) for rule in profile.manifest.candidates
    ]  # in prefill another name of dense
    prefill = np.where(idle, np.inf, _grown(prefill, growth))
    return np.concatenate([prefill, np.where(static | stepping, decode, np.inf)])


def _grown(loss: Float[ndarray, "U C"], growth: Float[ndarray, "U C"]) -> Float[ndarray, "U C"]:
    """Multiplied, where inf makes even a loss of 0 inf."""
    return np.where(np.isfinite(growth), loss * np.where(np.isfinite(growth), growth, 1.0), np.inf)


def _metrics(question: Question) -> set[str]:
    """What must be priced."""
    metrics = {"density", *(budget.metric for budget in question.constraints)}
    generates = any(workload.generate_tokens for workload in question.workloads)
    if metrics & set(PRICED_BY_DEVICE) and question.cost_model is None:
        raise SpecError(f"a {min(metrics & set(PRICED_BY_DEVICE))} budget must have a cost model. {NAME_ONE}")
    if "tpot" in metrics and not generates:
        raise SpecError("a tpot budget must have a workload that generates. Pass --workload prompt=4096,generate=256.")
    grouped = question.granularity == "kv_group" or question.decode == "separate"
    cached = metrics & {"kv_fraction", "memory"} or (generates and question.cost_model is not None)
    if cached and not grouped:
        raise SpecError(
            f"{min(metrics & {'kv_fraction', 'memory'}, default='decoding')} must be decided per KV group, because heads that share a KV "
            "head share its cache. Pass --unit kv_group or --decode separate."
        )
    return metrics


def priced_lengths(profile: Profile, question: Question) -> tuple[int, ...]:
    """Where tiles and caches are counted: the workloads' prompts or else the profiled lengths, and what a budget names besides."""
    base = {workload.prompt_tokens for workload in question.workloads} or set(profile.manifest.lengths)
    named = {
        length
        for budget in question.budgets
        if budget.metric in ("density", "kv_fraction")
        for length in budget.lengths or ()
    }
    return tuple(sorted(base | named))
