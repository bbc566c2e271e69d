"""Time, adjust, time again, judge: from a profile and a live model to the record of a comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import monotonic
from typing import TYPE_CHECKING

import torch

from sparsesearch.calibration import Sample
from sparsesearch.cost.base import CostModel
from sparsesearch.equal_latency.climb import Rung, Times, climb, ladder_ends, shares_of
from sparsesearch.equal_latency.ladders import DEFAULT_FAMILIES, Ladder, ladders
from sparsesearch.equal_latency.record import Entry, EqualLatency
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import ApplyPlan, Comparison
from sparsesearch.evaluate.run import compare_all, provenance, summary
from sparsesearch.evaluate.suite import judge_tasks
from sparsesearch.evaluate.task_metrics import SuiteSpec, TaskMetrics
from sparsesearch.evaluate.timing import Part, prefill_seconds
from sparsesearch.plan import Plan
from sparsesearch.profiling.record import Profile
from sparsesearch.runtime.live import apply
from sparsesearch.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
MOST_CORRECTIONS = 3
"""How often families that the final rounds put outside the tolerance are moved again."""


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
    suite: SuiteSpec | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    data: Mapping[str, str] | None = None,
    apply: ApplyPlan = apply,
    command: str | None = None,
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
        suite: long-context tasks that are judged besides; they need the model's tokenizer.
        tokenizer: the model's.
        data: description of each data set -> its id, for the record.
        apply: how a plan is put on the model.
        command: how this was started, for the record.
        progress: called with (stage, done, total).

    Raises:
        SpecError: a family is unknown, or its candidates were not profiled.
    """
    prompts = torch.stack([needles[row % len(needles)].input_ids for row in range(setting.batch)])
    workload = Workload(prompts.shape[1], batch=setting.batch)
    clock = _Clock(Head(model), prompts, apply)
    ladder_of = ladders(profile, setting.families, workload, cost_model)
    chosen = {target: _climbed(ladder_of, target, clock, setting, progress) for target in setting.targets}
    plans: dict[str, Plan | None] = {"dense": None}
    plans |= {_name(target, family): rung.plan for target, own in chosen.items() for family, rung in own.items()}
    times = clock(plans, setting.final_rounds, setting.part)
    walls = times if setting.part == "prefill" else clock(plans, setting.rounds, "prefill")
    found, density = compare_all(model, plans, [*needles, *text], apply, progress, "judge")
    tasks: dict[str, dict[str, TaskMetrics]] = {}
    if suite is not None and tokenizer is not None:
        length = workload.prompt_tokens
        tasks = judge_tasks(model, tokenizer, plans, suite, [length], apply=apply, progress=progress)[length]
    quality = {name: summary(needles, own, found["dense"], density[name]) for name, own in found.items()}

    def entry(target: float, family: str) -> Entry:
        name, first = _name(target, family), _name(target, setting.families[0])
        rung, (share, error) = chosen[target][family], _share(times[name], times["dense"])
        return Entry(
            bound=rung.bound,
            share=share,
            share_error=error,
            seconds=median(times[name]),
            prefill_s=median(walls[name]),
            at_target=abs(share / target - 1) <= setting.tolerance,
            plan_sha256=rung.plan.sha256,
            rules=rung.plan.kind_counts(),
            quality=quality[name],
            excess=excess(found[name], found[first], len(needles)),
            tasks={task: cells[name] for task, cells in tasks.items()},
        )

    return EqualLatency(
        model=profile.manifest.base_model.name_or_path,
        length_tokens=workload.prompt_tokens,
        batch=setting.batch,
        part=setting.part,
        tolerance=setting.tolerance,
        cost_model=cost_model.name,
        objective="combined",
        first=setting.families[0],
        dense_s=median(times["dense"]),
        dense_prefill_s=median(walls["dense"]),
        dense_quality=quality["dense"],
        targets={
            f"{target:g}": {family: entry(target, family) for family in setting.families} for target in setting.targets
        },
        suite=suite,
        data=dict(data or {}),
        provenance=provenance(model, setting.seed, command),
    )


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


class _Clock:
    """Times plans on one batch of prompts."""

    def __init__(self, head: Head, prompts: torch.Tensor, apply: ApplyPlan) -> None:
        self._head, self._prompts, self._apply = head, prompts, apply

    def __call__(self, plans: Mapping[str, Plan | None], rounds: int, part: Part) -> Times:
        return prefill_seconds(self._head, self._prompts, plans, rounds=rounds, apply=self._apply, part=part)


def _climbed(
    ladder_of: Mapping[str, Ladder], target: float, clock: _Clock, setting: Setting, progress: Progress
) -> dict[str, Rung]:
    """Rungs that hold in a measurement of their own, with all families in it; the last correction stands."""
    chosen: dict[str, Rung] = {}
    moving, deadline = dict(ladder_of), monotonic() + setting.time_limit_s
    for _ in range(MOST_CORRECTIONS):
        chosen |= climb(
            moving,
            target,
            lambda plans: clock(plans, setting.rounds, setting.part),
            favoured=setting.families[0],
            start={name: rung.bound * target / rung.share for name, rung in chosen.items() if name in moving},
            tolerance=setting.tolerance / 2,
            deadline=deadline,
            progress=progress,
        )
        plans: dict[str, Plan | None] = {"dense": None, **{name: rung.plan for name, rung in chosen.items()}}
        again = shares_of(clock(plans, setting.final_rounds, setting.part))
        chosen = {name: Rung(rung.bound, rung.plan, again[name]) for name, rung in chosen.items()}
        off = {name for name, rung in chosen.items() if abs(rung.share / target - 1) > setting.tolerance}
        moving = {
            name: ladder
            for name, ladder in ladder_of.items()
            if name in off and not ladder_ends(ladder, chosen[name], target)
        }
        if not moving or monotonic() > deadline:
            break
    return chosen


def _share(own: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """Median over median, and the standard error of the rounds' ratios about it (of a median: 1.25 times a mean's)."""
    ratios = [a / b for a, b in zip(own, dense, strict=True)]
    mean = math.fsum(ratios) / len(ratios)
    spread = math.fsum((ratio - mean) ** 2 for ratio in ratios) / max(1, len(ratios) - 1)
    return median(own) / median(dense), 1.2533 * math.sqrt(spread / len(ratios))


def _name(target: float, family: str) -> str:
    return f"{family} @ {target:g}"
