"""All families at one target: budgets climb, the family on trial chooses its part, and a measurement of all of them together confirms it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

from sparsesearch.equal_latency.climb import Near, Rung, Times, climb, ladder_ends, shares_of
from sparsesearch.equal_latency.improve import improved, rivals_of
from sparsesearch.equal_latency.ladders import DEFAULT_FAMILIES, Ladder, SearchedLadder
from sparsesearch.equal_latency.menus import ANSWERS
from sparsesearch.equal_latency.replay import Replay
from sparsesearch.equal_latency.standings import Judge, Standing, chosen
from sparsesearch.equal_latency.steps import Steps
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.reference import DenseReference
from sparsesearch.evaluate.timing import Part, Stopwatch
from sparsesearch.measured_front import UNIFORM
from sparsesearch.plan import Plan

Progress = Callable[[str, int, int], None]
MOST_CORRECTIONS = 3
"""How often families that the final rounds put outside the tolerance are moved again."""
MOST_PROBES = 4
"""Plans of a family that are timed before each final measurement."""
DENSE_RUNS = 3
"""Of dense in every round on a GPU: on an H200 its attention varies by 3 per cent from run to run, a plan's by one. On a CPU dense varies less than plans."""
NUM_ERRORS = 2.0
"""On a CPU: other processes move its times by more than the tolerance, and looking for a plan nearer than that never ends."""
RIVALS_MAY_BE_SLOWER = 4.0
"""In tolerances: where no plan of theirs meets the target they get the next slower one, and are compared none the less."""
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
        time_limit_s: per target; past it no step begins, and families whose last measurement is off the target are moved once more.
        steps: how often every family's plan is improved by the loss expanded around it (`steps`), while time lasts.
        seed: recorded.
    """

    targets: Sequence[float] = (0.5, 0.35)
    families: Sequence[str] = DEFAULT_FAMILIES
    batch: int = 1
    part: Part = "prefill"
    tolerance: float = 0.005
    rounds: int = 5
    final_rounds: int = 15
    time_limit_s: float = math.inf
    steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.targets or not all(0 < target < 1 for target in self.targets):
            raise SpecError(f"targets must be shares of dense's time between 0 and 1, but got {list(self.targets)}.")
        if len(set(self.families)) < 2:
            raise SpecError(f"at least two families must be compared, but got {list(self.families)}.")
        if min(self.batch, self.rounds, self.final_rounds) < 1 or self.steps < 0 or not 0 < self.tolerance < 1:
            raise SpecError(f"batch, rounds >= 1, steps >= 0 and a tolerance in (0, 1) must hold, but got {self}.")


@dataclass(frozen=True)
class Settled:
    """The families' plans at one target, and the rounds that say so.

    Attributes:
        chosen: family -> where its plan came from, of families that chose by replaying.
        tried: family -> plan's origin -> its loss on the calibration sequences.
    """

    rungs: Mapping[str, Rung]
    times: Times
    chosen: Mapping[str, str] = field(default_factory=dict)
    tried: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def plans(self) -> dict[str, Plan | None]:
        """Dense (None) and every family's plan."""
        return {"dense": None, **{family: rung.plan for family, rung in self.rungs.items()}}


@dataclass
class Search:
    """What moves the families' budgets.

    Attributes:
        menus: parts of the space of the family on trial, by label; none: it is searched whole.
        reference: judges plans on calibration sequences; None: every family takes what its search finds.
        local: improves them; None: nothing is improved.
        dense_runs: of dense in every round of measurements.
        num_errors: standard errors of a measured share within which it counts as the target.
    """

    ladder_of: Mapping[str, Ladder]
    stopwatch: Stopwatch
    setting: Setting
    replay: Replay | None
    progress: Progress
    menus: dict[str, Ladder] = field(default_factory=dict)
    reference: DenseReference | None = None
    local: Steps | None = None
    dense_runs: int = 1
    num_errors: float = 0.0

    @property
    def _near(self) -> Near:
        return Near(self.setting.tolerance, self.num_errors)

    def settled(self, target: float, start: Mapping[str, float]) -> Settled:
        """Rungs that hold in a measurement of their own, with all families in it; the last correction stands."""
        setting, first = self.setting, self.setting.families[0]
        deadline, own = monotonic() + setting.time_limit_s, dict(self.ladder_of)
        origin, tried = dict[str, str](), dict[str, dict[str, float]]()
        if self.reference is None:
            rungs = self._climb(own, target, start, deadline)
        else:
            del own[first]
            parts = {**self.menus, **self._rivals_own(own)}
            rungs = self._climb({**parts, **own}, target, start, deadline, list(parts))
            judge = Judge(self.reference)
            standings, of_first = self._standings(judge, rungs, own, parts, target)
            standings = self._improved(standings, of_first, judge, target, deadline)
            origin, tried = {family: standing.label for family, standing in standings.items()}, judge.tried
            own |= {family: standing.ladder for family, standing in standings.items()}
            rungs |= {family: standing.rung for family, standing in standings.items()}
            rungs = {family: rungs[family] for family in setting.families}
        return self._corrected(rungs, own, target, deadline, Settled({}, {}, origin, tried))

    def _corrected(
        self, rungs: dict[str, Rung], own: Mapping[str, Ladder], target: float, deadline: float, found: Settled
    ) -> Settled:
        """The plans measured together; those off the target are moved and all measured again, and the measurement nearest to it stands.

        Past the deadline one correction is made none the less: the comparison is at equal time or it is nothing.
        """
        setting, nearest_by = self.setting, math.inf
        for correction in range(MOST_CORRECTIONS):
            times = self._rounds(Settled(rungs, {}).plans, setting.final_rounds)
            again = shares_of(times)
            rungs = {
                name: replace(rungs[name], share=share, error=error)
                for name, (share, error) in ((name, again[name]) for name in setting.families)
            }
            moving = {name: own[name] for name in rungs if self._is_off(rungs[name], own[name], target)}
            off_by = max((abs(rungs[name].share / target - 1) for name in moving), default=0.0)
            if off_by < nearest_by:
                found, nearest_by = replace(found, rungs=rungs, times=times), off_by
            if not moving or (correction and monotonic() > deadline):
                break
            begin = {name: rungs[name].bound * target / rungs[name].share for name in moving}
            moved = self._climb(moving, target, begin, math.inf)
            if not any(self._is_nearer(moved[name], rungs[name], target) for name in moving):
                break
            rungs = rungs | moved
        return found

    def _climb(
        self,
        ladder_of: Mapping[str, Ladder],
        target: float,
        start: Mapping[str, float],
        deadline: float,
        favoured: Sequence[str] = (),
    ) -> dict[str, Rung]:
        """Every ladder's plan at the target's measured time; what belongs to the family on trial gives way as it does."""
        setting = self.setting
        unknown = {name: ladder for name, ladder in ladder_of.items() if name not in start}
        return climb(
            ladder_of,
            target,
            self._clocked,
            favoured=(setting.families[0], ANSWERS, *favoured),
            start={**self._predicted_start(unknown, target), **start},
            near=self._near,
            most_tries=MOST_PROBES,
            deadline=deadline,
            progress=self.progress,
        )

    def _clocked(self, plans: Mapping[str, Plan | None]) -> Times:
        """Rounds of plans while budgets move; a plan that goes by two names is timed once."""
        name_of = {id(plan): name for name, plan in plans.items()}
        distinct = {name: plans[name] for name in name_of.values()}
        times = self._rounds(distinct, self.setting.rounds)
        return {name: times[name_of[id(plan)]] for name, plan in plans.items()}

    def _rounds(self, plans: Mapping[str, Plan | None], rounds: int) -> Times:
        return self.stopwatch(plans, rounds=rounds, part=self.setting.part, dense_runs=self.dense_runs)

    def _rivals_own(self, own: Mapping[str, Ladder]) -> dict[str, Ladder]:
        """Rivals' spaces as parts of the family on trial, whose space holds them all: it takes their plans where it has none better."""
        return {f"as {family}": ladder for family, ladder in own.items() if family not in (UNIFORM, ANSWERS)}

    def _standings(
        self,
        judge: Judge,
        rungs: Mapping[str, Rung],
        own: Mapping[str, Ladder],
        parts: Mapping[str, Ladder],
        target: float,
    ) -> tuple[dict[str, Standing], list[Standing]]:
        """Where families stand after the first climb, and what the family on trial had to choose from.

        Every searched rival that is as fast as the target, and for the family on trial what is `chosen` among the parts of its space that are as
        fast, its rivals' among them. Where none is, the fastest part says how fast.
        """
        first, fastest = self.setting.families[0], min(rungs[part].share for part in parts)
        most = max(target, fastest)
        fast = [part for part in parts if self._near.as_fast(rungs[part], most)]
        rivals = [
            family
            for family in own
            if family != UNIFORM and self._near.as_fast(rungs[family], most, times=RIVALS_MAY_BE_SLOWER)
        ]
        stage, total = f"choose {target:g}x", len(rivals) + len(fast)
        found, candidates = dict[str, Standing](), list[Standing]()
        for family in rivals:
            self.progress(stage, len(found), total)
            found[family] = judge.standing(family, family, own[family], rungs[family])
        for part in fast:
            self.progress(stage, len(rivals) + len(candidates), total)
            candidates.append(judge.standing(first, part, parts[part], rungs[part]))
        self.progress(stage, total, total)
        found[first] = chosen(candidates, rivals_of(first, found))
        if ANSWERS in found:
            assert self.local is not None, "where plans are judged they can be improved"
            # parts are replayed already: only the weight of their answers is another
            own_too = [part for part in fast if self.local.holding(ANSWERS, rungs[part].plan) is not None]
            others = [judge.standing(ANSWERS, part, parts[part], rungs[part]) for part in own_too]
            found[ANSWERS] = min((found[ANSWERS], *others), key=lambda standing: standing.mean)
        return found, candidates

    def _improved(
        self,
        standings: dict[str, Standing],
        parts: Sequence[Standing],
        judge: Judge,
        target: float,
        deadline: float,
    ) -> dict[str, Standing]:
        """As far as steps lead, while time lasts."""
        if self.local is None or not self.setting.steps:
            return standings

        def climbed(
            ladder_of: Mapping[str, Ladder], start: Mapping[str, float], favoured: Sequence[str]
        ) -> Mapping[str, Rung]:
            return self._climb(ladder_of, target, start, math.inf, favoured)

        return improved(
            standings, parts, self.local, judge, climbed,
            first=self.setting.families[0], num_steps=self.setting.steps, fast=lambda rung, gives_way: self._near.as_fast(rung, target, 1.0 if gives_way else RIVALS_MAY_BE_SLOWER), deadline=deadline,
            progress=lambda stage, done, total: self.progress(f"{stage} at {target:g}x", done, total),
        )  # fmt: skip

    def _is_nearer(self, moved: Rung, before: Rung, target: float) -> bool:
        """Whether a climb found another plan, or the same one on the target after all."""
        return (
            moved.plan.assignments != before.plan.assignments or abs(moved.share / target - 1) <= self.setting.tolerance
        )

    def _is_off(self, rung: Rung, ladder: Ladder, target: float) -> bool:
        """Whether a plan misses the target, and its family may have a nearer one."""
        return not self._near.holds(rung, target) and not ladder_ends(ladder, rung, target)

    def _predicted_start(self, ladder_of: Mapping[str, Ladder], target: float) -> dict[str, float]:
        """Bounds whose plans take the target's time as heads are priced, or else by replay: what is measured then is a few per cent off."""
        replay = self.replay
        if replay is None or self.setting.part != "attention":
            return {}
        priced = {name: own.bound_for(target) for name, own in ladder_of.items() if isinstance(own, SearchedLadder)}
        start = {name: bound for name, bound in priced.items() if bound is not None}
        others = {name: own for name, own in ladder_of.items() if name not in start}
        if not others:
            return start

        def clock(plans: Mapping[str, Plan | None]) -> Times:
            return {name: (1.0 if plan is None else replay(plan),) for name, plan in plans.items()}

        found = climb(others, target, clock, near=Near(2 * self.setting.tolerance), most_tries=MOST_REPLAYS)
        return start | {name: rung.bound for name, rung in found.items()}
