"""Time, adjust, time again, judge: from a profile and a live model to the record of a comparison."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from sparsesearch.calibration import Sample
from sparsesearch.cost.base import CostModel
from sparsesearch.cost.predict import LayerCosts
from sparsesearch.equal_latency.climb import Rung, Times, climb, ladder_ends, shares_of
from sparsesearch.equal_latency.ladders import DEFAULT_FAMILIES, MENUS, Ladder, Replay, ladders, menu_ladders
from sparsesearch.equal_latency.record import Entry, EqualLatency
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import ApplyPlan, Comparison, DenseReference
from sparsesearch.evaluate.run import compare_all, provenance, summary
from sparsesearch.evaluate.suite import judge_tasks
from sparsesearch.evaluate.task_metrics import SuiteSpec, TaskMetrics
from sparsesearch.evaluate.timing import Part, Stopwatch
from sparsesearch.measured_front import UNIFORM
from sparsesearch.plan import Plan
from sparsesearch.profiling.local_model import ANSWER_KL_WEIGHT
from sparsesearch.profiling.record import Profile
from sparsesearch.runtime.live import apply
from sparsesearch.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
MOST_CORRECTIONS = 3
"""How often families that the final rounds put outside the tolerance are moved again."""
MOST_PROBES = 5
"""Plans of a family that are timed before each final measurement."""
MOST_REPLAYS = 6
"""Plans of a family whose schedules are replayed before anything is timed."""


@dataclass(frozen=True)
class Setting:
    """What is compared, and how carefully.

    Attributes:
        targets: measured time as shares of dense's, each in (0, 1).
        families: names of `measured_front.FAMILIES`, or uniform windows; the first is the one on trial.
        batch: prompts that are timed together; the batch's first prompt is the first held-out sequence, the others are the next ones in turn.
        part: what is held equal: the whole prefill, or the device's time in attention.
        tolerance: relative deviation from a target that counts as equal.
        rounds: interleaved measurements per plan while budgets move.
        final_rounds: of the measurement that is reported.
        time_limit_s: per target; past it budgets move no more, and families stay at the nearest plan known.
        seed: recorded.
    """

    targets: Sequence[float] = (0.5, 0.35)
    families: Sequence[str] = DEFAULT_FAMILIES
    batch: int = 1
    part: Part = "prefill"
    tolerance: float = 0.02
    rounds: int = 5
    final_rounds: int = 15
    time_limit_s: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.targets or not all(0 < target < 1 for target in self.targets):
            raise SpecError(f"targets must be shares of dense's time between 0 and 1, but got {list(self.targets)}.")
        if len(set(self.families)) < 2:
            raise SpecError(f"at least two families must be compared, but got {list(self.families)}.")
        if min(self.batch, self.rounds, self.final_rounds) < 1 or not 0 < self.tolerance < 1:
            raise SpecError(f"batch, rounds >= 1 and a tolerance in (0, 1) must hold, but got {self}.")


def compare_at_latency(
    model: "PreTrainedModel",
    profile: Profile,
    setting: Setting,
    cost_model: CostModel,
    needles: Sequence[Sample],
    text: Sequence[Sample],
    *,
    choose_on: Sequence[Sample] = (),
    suite: SuiteSpec | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    data: Mapping[str, str] | None = None,
    apply: ApplyPlan = apply,
    command: str | None = None,
    begun: EqualLatency | None = None,
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
            (`ladders.MENUS`) and the rivals whose rules it contains; none: it takes the optimum of its whole space.
        suite: long-context tasks that are judged besides; they need the model's tokenizer.
        tokenizer: the model's.
        data: description of each data set -> its id, for the record.
        apply: how a plan is put on the model.
        command: how this was started, for the record.
        begun: an earlier record of the same comparison, perhaps without its last targets: budgets start from where it ended.
        saved: given the record so far after every target and every task, so that an interrupted run loses little.
        progress: called with (stage, done, total).

    Raises:
        SpecError: a family is unknown, or its candidates were not profiled.
    """
    prompts = torch.stack([needles[row % len(needles)].input_ids for row in range(setting.batch)])
    workload = Workload(prompts.shape[1], batch=setting.batch)
    search = _Search(
        ladders(profile, setting.families, workload, cost_model),
        Stopwatch(Head(model), prompts, apply),
        setting,
        Replay(profile, workload, cost_model) if isinstance(cost_model, LayerCosts) else None,
        progress,
    )
    if choose_on:
        search.menus.update(menu_ladders(profile, setting.families[0], MENUS, workload, cost_model))
        search.reference = DenseReference(model, choose_on, apply=apply)
    stated: dict[str, Any] = {
        "model": profile.manifest.base_model.name_or_path,
        "length_tokens": workload.prompt_tokens,
        "batch": setting.batch,
        "part": setting.part,
        "tolerance": setting.tolerance,
        "cost_model": cost_model.name,
        "objective": "combined",
        "first": setting.families[0],
        "suite": suite,
        "data": dict(data or {}),
        "provenance": provenance(model, setting.seed, command),
    }
    record: EqualLatency | None = None
    for target in setting.targets:
        settled = search.settled(target, begun.bounds(target) if begun is not None else {})
        plans = settled.plans
        walls = settled.times if setting.part == "prefill" else search.stopwatch(plans, rounds=setting.rounds)
        found, density = compare_all(model, plans, [*needles, *text], apply, progress, f"judge {target:g}x")
        record = record or EqualLatency(
            dense_s=median(settled.times["dense"]),
            dense_prefill_s=median(walls["dense"]),
            dense_quality=summary(needles, found["dense"], found["dense"], density["dense"]),
            targets={},
            **stated,
        )
        record = record.with_target(target, _entries(settled, walls, found, density, needles, setting, target))
        saved(record)
        for task, cells in _tasks(model, tokenizer, suite, plans, workload.prompt_tokens, apply, progress):
            record = record.with_task(target, task, cells)
            saved(record)
    assert record is not None, "a setting has targets"
    return record


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


@dataclass(frozen=True)
class _Settled:
    """The families' plans at one target, and the rounds that say so."""

    rungs: Mapping[str, Rung]
    times: Times
    menu: str | None = None
    tried: Mapping[str, float] = field(default_factory=dict)

    @property
    def plans(self) -> dict[str, Plan | None]:
        """Dense (None) and every family's plan."""
        return {"dense": None, **{family: rung.plan for family, rung in self.rungs.items()}}


def _entries(
    settled: _Settled,
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
        share, error = _share(settled.times[family], settled.times["dense"])
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
            menu=settled.menu if family == setting.families[0] else None,
            tried=dict(settled.tried) if family == setting.families[0] else {},
        )
    return entries


def excess(found: Comparison, first: Comparison, num_needles: int) -> dict[str, Estimate]:
    """Losses of one plan minus another's on the same sequences, the needles first; positive is worse."""
    needles, text = slice(num_needles), slice(num_needles, None)
    pairs = {
        "kl": (found.kl_text - first.kl_text)[needles],
        "kl_answer": (found.kl_answer - first.kl_answer)[needles],
        "needle_error": (first.needle - found.needle)[needles],
        "heldout_loss": (found.loss - first.loss)[text],
    }
    estimates = {name: Estimate.of(values.tolist()) for name, values in pairs.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


@dataclass
class _Search:
    """What moves the families' budgets.

    Attributes:
        menus: parts of the space of the family on trial, by label; none: it is searched whole.
        reference: judges their plans.
    """

    ladder_of: Mapping[str, Ladder]
    stopwatch: Stopwatch
    setting: Setting
    replay: Replay | None
    progress: Progress
    menus: dict[str, Ladder] = field(default_factory=dict)
    reference: DenseReference | None = None

    def settled(self, target: float, start: Mapping[str, float]) -> _Settled:
        """Rungs that hold in a measurement of their own, with all families in it; the last correction stands."""
        setting, first = self.setting, self.setting.families[0]
        deadline, own = monotonic() + setting.time_limit_s, dict(self.ladder_of)
        menu, tried = None, dict[str, float]()
        if self.reference is None:
            rungs = self._climb(own, target, start, deadline)
        else:
            del own[first]
            rungs = self._climb({**self.menus, **own}, target, start, deadline)
            tried = self._judged(rungs, target)
            menu = min(tried, key=lambda name: tried[name])
            own = {name: {**own, **self.menus}[menu if name == first else name] for name in setting.families}
            rungs = {name: rungs[menu if name == first else name] for name in setting.families}
        for correction in range(MOST_CORRECTIONS):
            times = self.stopwatch(_Settled(rungs, {}).plans, rounds=setting.final_rounds, part=setting.part)
            again = shares_of(times)
            rungs = {name: replace(rungs[name], share=again[name]) for name in setting.families}
            moving = {name: ladder for name, ladder in own.items() if self._is_off(rungs[name], ladder, target)}
            if not moving or monotonic() > deadline or correction == MOST_CORRECTIONS - 1:
                break
            begin = {name: rungs[name].bound * target / rungs[name].share for name in moving}
            rungs |= self._climb(moving, target, begin, deadline)
        return _Settled(rungs, times, menu, tried)

    def _climb(
        self, ladder_of: Mapping[str, Ladder], target: float, start: Mapping[str, float], deadline: float
    ) -> dict[str, Rung]:
        """Every ladder's plan at the target's measured time; parts of the space on trial give way as it does."""
        setting = self.setting
        unknown = {name: ladder for name, ladder in ladder_of.items() if name not in start}
        return climb(
            ladder_of,
            target,
            lambda plans: self.stopwatch(plans, rounds=setting.rounds, part=setting.part),
            favoured=(setting.families[0], *self.menus),
            start={**self._replayed_start(unknown, target), **start},
            tolerance=setting.tolerance / 2,
            most_tries=MOST_PROBES,
            deadline=deadline,
            progress=self.progress,
        )

    def _judged(self, rungs: Mapping[str, Rung], target: float) -> dict[str, float]:
        """KL + 0.1 x answer KL of every part's and every searched rival's plan that is as fast as the target; of the fastest, if none is."""
        assert self.reference is not None
        usable = {name: rung for name, rung in rungs.items() if name != UNIFORM}
        fast = {name: rung for name, rung in usable.items() if rung.share <= target * (1 + self.setting.tolerance)}
        if not fast:
            name = min(self.menus, key=lambda menu: rungs[menu].share)
            fast = {name: rungs[name]}
        found = {}
        for number, (name, rung) in enumerate(fast.items()):
            self.progress(f"choose {target:g}x, {name}", number, len(fast))
            score = self.reference.score(rung.plan)
            found[name] = score["kl_text"] + ANSWER_KL_WEIGHT * score.get("kl_answer", 0.0)
        return found

    def _is_off(self, rung: Rung, ladder: Ladder, target: float) -> bool:
        """Whether a plan misses the target, and its family may have a nearer one."""
        return abs(rung.share / target - 1) > self.setting.tolerance and not ladder_ends(ladder, rung, target)

    def _replayed_start(self, ladder_of: Mapping[str, Ladder], target: float) -> dict[str, float]:
        """Bounds whose plans take the target's time by replay: what is measured then is a few per cent off, not tens."""
        replay = self.replay
        if replay is None or self.setting.part != "attention" or not ladder_of:
            return {}

        def clock(plans: Mapping[str, Plan | None]) -> Times:
            return {name: (1.0 if plan is None else replay(plan),) for name, plan in plans.items()}

        found = climb(ladder_of, target, clock, tolerance=2 * self.setting.tolerance, most_tries=MOST_REPLAYS)
        return {name: rung.bound for name, rung in found.items()}


def _share(own: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """Median over median, and the standard error of the rounds' ratios about it (of a median: 1.25 times a mean's)."""
    ratios = [a / b for a, b in zip(own, dense, strict=True)]
    mean = math.fsum(ratios) / len(ratios)
    spread = math.fsum((ratio - mean) ** 2 for ratio in ratios) / max(1, len(ratios) - 1)
    return median(own) / median(dense), 1.2533 * math.sqrt(spread / len(ratios))
