"""Search with index reuse: profile pairs of layers, solve over layers, profile again under the plan until it repeats.

Three objectives. `reuse`: least predicted loss within a budget, on measured loss and tiles, every candidate of the profile beside every reuse.
`hylra` and `rals`: the published ones, on overlap alone, per layer; refreshing layers run dense and leave their heaviest tiles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedModel

from sparsesearch.calibration import Sample
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.reference import DenseReference
from sparsesearch.plan import BudgetRecord, Certificate, Plan
from sparsesearch.profiling.local_model import ANSWER_KL_WEIGHT
from sparsesearch.profiling.proxies import reference_candidate
from sparsesearch.profiling.reuse import HeadMap, ReuseScores, map_heads, score_reuse
from sparsesearch.profiling.reuse_menu import ReuseMenu
from sparsesearch.profiling.run import silent
from sparsesearch.reuse_lanes import Resource, ReuseQuestion, lanes_of, resources
from sparsesearch.rules import Rule
from sparsesearch.rules.dense_source import DenseSource
from sparsesearch.rules.reuse import Reuse
from sparsesearch.search.layer_budget import LaneSolution, solve_lanes
from sparsesearch.search.layer_dp import NONE, Lane, LanePath
from sparsesearch.search.overlap_paths import ReusePath, hylra_path, rals_path

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ReusePass:
    """One round of profiling and solving.

    Attributes:
        under: what ran while it was profiled.
        loss: predicted, in the objective's unit; for the published objectives the summed overlap.
        kl_text: measured on the calibration sequences, nats per token.
        kl_answer: likewise, over answer positions.
        joint: kl_text + 0.1 kl_answer, by which the best plan is kept.
    """

    under: str
    loss: float
    kl_text: float
    kl_answer: float
    joint: float


def search_reuse(
    model: PreTrainedModel,
    question: ReuseQuestion,
    samples: Mapping[int, Sequence[Sample]],
    *,
    passes: int = 3,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Plan, list[ReusePass]]:
    """Search, re-profile under the plan, and search again until the plan repeats or the passes are spent; the best replayed plan is kept.

    Later passes enter with the mean of all passes so far: undamped re-profiling diverges.

    Args:
        model: dense, in evaluation mode.
        question: what is asked.
        samples: length in tokens -> calibration sequences.
        passes: most rounds of profiling.
        seed: of the Fisher probes.
        progress: called with (stage, done, total).

    Raises:
        BudgetInfeasibleError: no plan fits.
    """
    longest = samples[max(samples)]
    heads = map_heads(model, question.menu, longest, progress=progress)
    reference = DenseReference(model, longest)
    plans: list[Plan] = []
    rounds: list[ReusePass] = []
    scores: dict[int, ReuseScores] = {}
    norms: dict[int, tuple[float, float]] = {}
    for index in range(max(1, passes)):
        under = plans[-1] if plans else None
        for length, own in samples.items():
            fresh = score_reuse(model, question.menu, heads, own, plan=under, seed=seed, progress=progress)
            scores[length] = fresh if under is None else _mean(scores[length], fresh, index)
            norms.setdefault(length, _norms(question, fresh))
        plan, loss = _solve(question, heads, scores, norms)
        if any(plan.assignments == earlier.assignments for earlier in plans):
            break
        found = reference.compare(plan)
        joint = found.kl_text + ANSWER_KL_WEIGHT * found.kl_answer.nan_to_num()
        plans.append(plan)
        under_name = "dense" if under is None else f"the plan of pass {index}"
        kl_answer = found.kl_answer.nan_to_num().mean().item()
        rounds.append(ReusePass(under_name, loss, found.kl_text.mean().item(), kl_answer, joint.mean().item()))
    best = min(range(len(plans)), key=lambda place: rounds[place].joint)
    provenance = {"passes": [asdict(one) for one in rounds], "pass_kept": best + 1}
    plan = plans[best]
    return plan.model_copy(update={"provenance": {**plan.provenance, **provenance}}), rounds


def reused_in_decoding(plan: Plan) -> Plan:
    """The plan whose decoded tokens reuse too, wherever the source leaves, or can leave, a selection for them.

    What was profiled and replayed are prompts: the losses say nothing of it.

    Raises:
        SpecError: no source can.
    """
    modules, rules, changed = plan.base_model.modules, dict(plan.rules), 0
    sources = {source[0] for _, head, rule in plan.heads() if (source := rule.source_head(head)) is not None}

    def leaves(layer: int, head: int) -> bool:
        rule = plan.rule(modules[layer], head)
        return rule.decodes or isinstance(rule, DenseSource)

    assignments = {}
    for layer, module in enumerate(modules):
        own = list(plan.module_rules(module))
        for head, rule in enumerate(own):
            source = rule.source_head(head)
            if (isinstance(rule, DenseSource) and layer in sources) or (source and leaves(*source)):
                own[head] = rule.model_copy(update={"decode": True})
                changed += source is not None
        rules |= {rule.label: rule for rule in own}
        assignments[module] = tuple(rule.label for rule in own)
    if not changed:
        raise SpecError(
            "some head must reuse from a dense_source or bounds_topk head for decoded tokens to reuse too, but none does. Search with --objective "
            "hylra, or without --decode."
        )
    used = {name for names in assignments.values() for name in names}
    return plan.model_copy(update={"assignments": assignments, "rules": {name: rules[name] for name in sorted(used)}})


def _mean(sofar: ReuseScores, fresh: ReuseScores, count: int) -> ReuseScores:
    """The mean of `count` earlier passes and a new one."""
    names = ReuseScores.__dataclass_fields__
    return ReuseScores(*((getattr(sofar, name) * count + getattr(fresh, name)) / (count + 1) for name in names))


def _norms(question: ReuseQuestion, scores: ReuseScores) -> tuple[float, float]:
    """Text and answer loss when every unit takes the reference window, under dense."""
    place = reference_candidate(question.menu.profile)
    return max(float(scores.text[..., place].sum()), 1e-30), max(float(scores.answer[..., place].sum()), 1e-30)


def _solve(
    question: ReuseQuestion,
    heads: HeadMap,
    scores: dict[int, ReuseScores],
    norms: dict[int, tuple[float, float]],
) -> tuple[Plan, float]:
    if question.objective != "reuse":
        path = overlap_path(question, scores[max(scores)])
        return _published_plan(question, heads, path), path.total
    lengths = tuple(sorted(scores))
    lanes = lanes_of(question, heads, scores, norms)
    limited = resources(question, lengths)
    if not limited:
        raise SpecError("some budget must name a profiled length, but none does.")
    dense = sum(lane.cost[:, 0].sum(0) for lane in lanes)
    asked = [
        min(
            (own for own in question.budgets if own.metric == metric and own.holds_at(length)),
            key=lambda own: own.bound,
        )
        for metric, length in limited
    ]
    solution = solve_lanes(lanes, np.array([budget.bound for budget in asked]) * dense, asked=asked)
    return _plan(question, heads, lanes, solution, limited, solution.cost / dense), solution.loss


def overlap_path(question: ReuseQuestion, scores: ReuseScores) -> ReusePath:
    """The published objectives on the first emitter's overlaps, merged over KV groups by their mean; pairs beyond the span count 0."""
    overlap = scores.overlap[:, 0].mean(-1)
    if question.objective == "hylra":
        return hylra_path(overlap, question.threshold)
    return rals_path(overlap, question.max_refreshes)


def _published_plan(question: ReuseQuestion, heads: HeadMap, path: ReusePath) -> Plan:
    emitter = question.menu.emitters[0]
    layers = np.arange(len(path.source))
    lane = LanePath(np.full(len(layers), emitter), np.where(path.source == layers, NONE, path.source))
    provenance = {
        "least_overlap": path.least,
        "summed_overlap": path.total,
        "refreshing_layers": path.num_refreshes,
        "threshold": question.threshold if question.objective == "hylra" else None,
        "max_refreshes": question.max_refreshes if question.objective == "rals" else None,
    }
    return _written(question, heads, [lane], provenance)


def _plan(
    question: ReuseQuestion,
    heads: HeadMap,
    lanes: Sequence[Lane],
    solution: LaneSolution,
    limited: Sequence[Resource],
    used: Float[ndarray, " P"],
) -> Plan:
    plan = _written(question, heads, solution.paths, {"answer_weight": question.answer_weight})
    shares = dict(zip(limited, used.tolist(), strict=True))
    return plan.model_copy(
        update={
            "budgets": tuple(
                BudgetRecord(
                    metric=budget.metric,
                    bound=budget.bound,
                    predicted={
                        str(length): share
                        for (metric, length), share in shares.items()
                        if metric == budget.metric and budget.holds_at(length)
                    },
                    cost_model=None
                    if budget.metric == "density" or question.cost_model is None
                    else question.cost_model.name,
                )
                for budget in question.budgets
            ),
            "certificate": Certificate(
                objective="combined, with index reuse",
                loss=solution.loss,
                lower_bound=solution.lower_bound,
                gap=solution.gap,
                solver=solution.solver,
            ),
        }
    )


def _written(question: ReuseQuestion, heads: HeadMap, paths: Sequence[LanePath], provenance: dict[str, Any]) -> Plan:
    """Paths as a plan; one path over all groups of each layer, or one per lane."""
    menu = question.menu
    manifest, size = menu.profile.manifest, menu.group_size
    assignments, used = {}, {}
    for layer, module in enumerate(manifest.base_model.modules):
        names = [""] * (menu.num_groups * size)
        for lane, path in enumerate(paths):
            groups = range(menu.num_groups) if menu.unit == "layer" else [int(heads.lanes[layer, lane])]
            for head in (group * size + member for group in groups for member in range(size)):
                rule = _rule(menu, heads, layer, module, head, int(path.candidate[layer]), int(path.source[layer]))
                names[head] = rule.label
                used[rule.label] = rule
        assignments[module] = tuple(names)
    return Plan(
        base_model=manifest.base_model,
        block_tokens=manifest.block_tokens,
        unit="kv_group",
        lengths_tokens=manifest.lengths,
        rules=dict(sorted(used.items())),
        assignments=assignments,
        provenance={
            "objective": question.objective,
            "reuse_unit": menu.unit,
            "span": menu.span,
            "emitters": [menu.rules[place].label for place in menu.emitters],
            "space": manifest.space,
            "calibration": manifest.calibration,
            **{key: value for key, value in provenance.items() if value is not None},
        },
    )


def _rule(menu: ReuseMenu, heads: HeadMap, layer: int, module: str, head: int, candidate: int, source: int) -> Rule:
    if source != NONE:
        places = heads.heads(source, layer, menu.group_size)
        return Reuse(layer=source, heads=None if places == tuple(range(len(places))) else places)
    rule = menu.rules[candidate]
    return menu.profile.manifest.calibrated[rule.label][module][head] if rule.needs_calibration else rule
