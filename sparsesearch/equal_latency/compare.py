"""Time, adjust, time again, judge: from a profile and a live model to the record of a comparison."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from sparsesearch.calibration import Sample
from sparsesearch.cost.base import CostModel
from sparsesearch.cost.layer_calls import CallCosts
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.equal_latency.climb import Times, share_of
from sparsesearch.equal_latency.menus import MENUS, Menu, family_ladders, menu_ladders, spaces_of
from sparsesearch.equal_latency.record import Entry, EqualLatency
from sparsesearch.equal_latency.replay import Replay
from sparsesearch.equal_latency.settle import DENSE_RUNS, NUM_ERRORS, Progress, Search, Setting, Settled
from sparsesearch.equal_latency.steps import Steps
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import ApplyPlan, Comparison, DenseReference
from sparsesearch.evaluate.run import compare_all, provenance, summary
from sparsesearch.evaluate.suite import judge_tasks
from sparsesearch.evaluate.task_metrics import SuiteSpec, TaskMetrics
from sparsesearch.evaluate.timing import Stopwatch
from sparsesearch.plan import Plan
from sparsesearch.profiling.record import Profile
from sparsesearch.refinement import true_loss
from sparsesearch.runtime.live import AppliedPlan, apply
from sparsesearch.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compare_at_latency(
    model: "PreTrainedModel",
    profile: Profile,
    setting: Setting,
    cost_model: CostModel,
    needles: Sequence[Sample],
    text: Sequence[Sample],
    *,
    choose_on: Sequence[Sample] = (),
    menus: Sequence[Menu] = MENUS,
    suite: SuiteSpec | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    data: Mapping[str, str] | None = None,
    apply: ApplyPlan = apply,
    command: str | None = None,
    begun: EqualLatency | None = None,
    settled: Callable[[float, Mapping[str, Plan]], None] = lambda target, plans: None,
    saved: Callable[[EqualLatency], None] = lambda record: None,
    progress: Progress = lambda stage, done, total: None,
) -> EqualLatency:
    """Find every family's plans at the targets, and judge all of them on the same sequences.

    Args:
        model: on the device that is timed, in evaluation mode, dense.
        profile: of this model.
        setting: targets, families, and how to measure.
        cost_model: prices the searches; its errors cost measurements, not correctness.
        needles: held-out sequences with answers, all of one length; prompts for timing come from them.
        text: held-out plain sequences of that length.
        choose_on: calibration sequences, neither profiled nor judged, on which the family on trial chooses among the parts of its space
            (`menus.MENUS`) and the rivals whose rules it contains, and on which all families' plans are improved (`Setting.steps`);
            none: every family takes the optimum of its whole space.
        menus: those parts.
        suite: long-context tasks that are judged besides; they need the model's tokenizer.
        tokenizer: the model's.
        data: description of each data set -> its id, for the record.
        apply: how a plan is put on the model.
        command: how this was started, for the record.
        begun: an earlier record, perhaps without its last targets. What it has of the same comparison on such a device is kept; otherwise budgets start
            from where it ended.
        settled: given every family's plan at a target, before it is judged.
        saved: given the record so far after every target and every task, so that an interrupted run loses little.
        progress: called with (stage, done, total).

    Raises:
        SpecError: a family is unknown, or its candidates were not profiled; steps without `choose_on`.
    """
    prompts = torch.stack([needles[row % len(needles)].input_ids for row in range(setting.batch)])
    apply = _Kept(apply)
    workload, on_gpu = Workload(prompts.shape[1], batch=setting.batch), model.device.type == "cuda"
    search = Search(
        family_ladders(profile, setting.families, workload, cost_model),
        Stopwatch(Head(model), prompts, apply),
        setting,
        Replay(profile, workload, cost_model) if isinstance(cost_model, (LayerCosts, CallCosts)) else None,
        progress,
        dense_runs=DENSE_RUNS if on_gpu else 1,
        num_errors=0.0 if on_gpu else NUM_ERRORS,
    )
    if choose_on:
        search.menus.update(menu_ladders(profile, setting.families[0], menus, workload, cost_model))
        search.reference = DenseReference(model, choose_on, apply=apply)
        spaces = spaces_of(profile, setting.families[0], search.ladder_of, workload, cost_model)
        search.local = Steps(model, profile, spaces, choose_on)
    elif setting.steps:
        raise SpecError("steps must have calibration sequences to be judged on. Give choose_on some.")
    stated: dict[str, Any] = {
        "model": profile.manifest.base_model.name_or_path,
        "length_tokens": workload.prompt_tokens,
        "batch": setting.batch,
        "part": setting.part,
        "tolerance": setting.tolerance,
        "cost_model": cost_model.name,
        "objective": "combined",
        "first": setting.families[0],
        "steps": setting.steps,
        "suite": suite,
        "data": dict(data or {}),
        "provenance": provenance(model, setting.seed, command),
    }
    record: EqualLatency | None = None
    for target in setting.targets:
        there = begun.finished(target, setting.families, stated) if begun is not None else None
        if begun is not None and there is not None:
            record = (record or begun.model_copy(update={"targets": {}})).with_target(target, there)
            continue
        at_target = search.settled(target, begun.bounds(target) if begun is not None else {})
        plans = at_target.plans
        settled(target, {family: rung.plan for family, rung in at_target.rungs.items()})
        walls = at_target.times if setting.part == "prefill" else search.stopwatch(plans, rounds=setting.rounds)
        found, density = compare_all(model, plans, [*needles, *text], apply, progress, f"judge {target:g}x")
        record = record or EqualLatency(
            dense_s=median(at_target.times["dense"]),
            dense_prefill_s=median(walls["dense"]),
            dense_quality=summary(needles, found["dense"], found["dense"], density["dense"]),
            targets={},
            **stated,
        )
        record = record.with_target(target, _entries(at_target, walls, found, density, needles, setting, target))
        saved(record)
        for task, cells in _tasks(model, tokenizer, suite, plans, workload.prompt_tokens, apply, progress):
            record = record.with_task(target, task, cells)
            saved(record)
    assert record is not None, "a setting has targets"
    return record


class _Kept:
    """Puts plans on a model, each put together once: its schedules are there again for the next set of sequences."""

    def __init__(self, apply: ApplyPlan) -> None:
        self._apply = apply
        self._known: dict[int, tuple[Plan, AbstractContextManager[Any]]] = {}

    def __call__(self, model: "PreTrainedModel", plan: Plan) -> AbstractContextManager[Any]:
        """Entered once per use; what cannot be entered again is made anew."""
        known = self._known.get(id(plan))
        if known is not None:
            return known[1]
        made = self._apply(model, plan)
        if isinstance(made, AppliedPlan):
            self._known[id(plan)] = plan, made  # holds the plan, so that no other one gets its id
        return made


def _tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    suite: SuiteSpec | None,
    plans: Mapping[str, Plan | None],
    length: int,
    apply: ApplyPlan,
    progress: Progress,
) -> Iterator[tuple[str, dict[str, TaskMetrics]]]:
    """Task by task, what every plan answers."""
    if suite is None or tokenizer is None:
        return
    for task in suite.tasks:
        alone = suite.model_copy(update={"tasks": (task,)})
        yield task, judge_tasks(model, tokenizer, plans, alone, [length], apply=apply, progress=progress)[length][task]


def _entries(
    settled: Settled,
    walls: Times,
    found: Mapping[str, Comparison],
    density: Mapping[str, float],
    needles: Sequence[Sample],
    setting: Setting,
    target: float,
) -> dict[str, Entry]:
    """What is known of every family once it is timed and judged."""
    entries = {}
    for family, rung in settled.rungs.items():
        share, error = share_of(settled.times[family], settled.times["dense"])
        entries[family] = Entry(
            bound=rung.bound,
            share=share,
            share_error=error,
            seconds=median(settled.times[family]),
            prefill_s=median(walls[family]),
            at_target=abs(share / target - 1) <= setting.tolerance,
            plan_sha256=rung.plan.sha256,
            rules=rung.plan.kind_counts(),
            quality=summary(needles, found[family], found["dense"], density[family]),
            excess=excess(found[family], found[setting.families[0]], len(needles)),
            menu=settled.chosen.get(family),
            tried=dict(settled.tried.get(family, {})),
        )
    return entries


def excess(found: Comparison, first: Comparison, num_needles: int) -> dict[str, Estimate]:
    """Losses of one plan minus another's on the same sequences, the needles first; positive is worse."""
    needles, text = slice(num_needles), slice(num_needles, None)
    pairs = {
        "kl": (found.kl_text - first.kl_text)[needles],
        "kl_answer": (found.kl_answer - first.kl_answer)[needles],
        "loss": (true_loss(found) - true_loss(first))[needles],
        "needle_error": (first.needle - found.needle)[needles],
        "heldout_loss": (found.loss - first.loss)[text],
    }
    estimates = {name: Estimate.of(values.tolist()) for name, values in pairs.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}
