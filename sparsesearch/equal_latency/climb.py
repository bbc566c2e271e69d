"""Moving every family's budget until its measured time is the target's."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from time import monotonic

from sparsesearch.equal_latency.ladders import Ladder
from sparsesearch.plan import Plan

Times = Mapping[str, Sequence[float]]
Clock = Callable[[Mapping[str, Plan | None]], Times]
"""Plans by name (None is dense) -> seconds of every round; round i of all plans was run together."""

MOST_STEPS = 12
"""Bounds tried without a measurement where neighbouring bounds give the same plan."""


@dataclass(frozen=True)
class Rung:
    """A plan and its time.

    Attributes:
        bound: the budget in predicted latency that it was found under, as a share of dense.
        plan: the plan.
        share: measured time over dense's: the median over rounds of both.
        error: standard error of the share.
    """

    bound: float
    plan: Plan
    share: float
    error: float = 0.0


@dataclass(frozen=True)
class Near:
    """When a measured share counts as the target.

    Attributes:
        tolerance: relative deviation from the target that is accepted.
        num_errors: so is one of so many standard errors of the measurement, where the host is too noisy to tell more; 0: never.
    """

    tolerance: float
    num_errors: float = 0.0

    def holds(self, rung: Rung, target: float) -> bool:
        """Whether its share is not known to be off."""
        return abs(rung.share - target) <= max(self.tolerance * target, self.num_errors * rung.error)

    def as_fast(self, rung: Rung, target: float, times: float = 1.0) -> bool:
        """Whether its share is not known to be above the target by more than so many times the tolerance."""
        return rung.share - target <= max(times * self.tolerance * target, self.num_errors * rung.error)


@dataclass
class _Climb:
    """One family's way to the target: the nearest plans known on either side of it, and the bound to try next."""

    ladder: Ladder
    target: float
    near: Near
    bound: float
    faster: Rung | None = None
    slower: Rung | None = None
    found: Rung | None = None
    exhausted: bool = False

    @property
    def open(self) -> bool:
        """Whether another plan is worth a measurement."""
        return self.found is None and not self.exhausted

    def propose(self) -> Plan | None:
        """The next plan to measure; None where the family has nothing between the two that are known."""
        for _ in range(MOST_STEPS):
            plan = self.ladder.at(self.bound)
            same = [side for side in (self.faster, self.slower) if side and side.plan.assignments == plan.assignments]
            if not same:
                return plan
            self._take(replace(same[0], bound=self.bound))  # measured already
            if self.found is not None:
                return None
        self.exhausted = True
        return None

    def meet(self, rung: Rung) -> None:
        """Take a measurement: settle, or move the bound."""
        if self.near.holds(rung, self.target):
            self.found = rung
        else:
            self._take(rung)

    def _take(self, rung: Rung) -> None:
        if rung.share > self.target:
            self.slower = rung
        else:
            self.faster = rung
        if ladder_ends(self.ladder, rung, self.target):
            self.found = rung
        self.bound = self._next(rung)

    def _next(self, rung: Rung) -> float:
        if self.faster is None or self.slower is None:
            return min(1.0, max(self.ladder.lowest, rung.bound * self.target / rung.share))
        low, high = self.faster, self.slower
        part = (self.target - low.share) / max(high.share - low.share, 1e-12)
        return low.bound + (high.bound - low.bound) * min(0.8, max(0.2, part))

    def settled(self, *, prefer_slower: bool) -> Rung:
        """What was found, or the nearest known plan on one side of the target."""
        sides = (self.slower, self.faster) if prefer_slower else (self.faster, self.slower)
        return self.found or next(rung for rung in sides if rung is not None)


def ladder_ends(ladder: Ladder, rung: Rung, target: float) -> bool:
    """Whether the family has no plan nearer to the target than this one, which is its fastest or its slowest."""
    return rung.bound <= ladder.lowest if rung.share > target else rung.bound >= 1.0


def climb(
    ladder_of: Mapping[str, Ladder],
    target: float,
    clock: Clock,
    *,
    favoured: Collection[str] = (),
    start: Mapping[str, float] | None = None,
    near: Near = Near(0.02),
    most_tries: int = 10,
    deadline: float = math.inf,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Rung]:
    """Every family's plan whose measured time is the target.

    Args:
        ladder_of: family -> its plans.
        target: measured time as a share of dense's.
        clock: measures plans beside dense.
        favoured: families that get their next faster plan where none comes within the tolerance; every other one gets its next slower plan,
            so that a comparison can only favour the others.
        start: family -> bound to begin with; the target itself by default.
        near: which shares are accepted.
        most_tries: plans measured per family.
        deadline: of `time.monotonic`; past it only families without any measurement get one.
        progress: called with (stage, done, total).
    """
    begin = start or {}
    climbs = {
        name: _Climb(ladder, target, near, min(1.0, max(begin.get(name, target), ladder.lowest)))
        for name, ladder in ladder_of.items()
    }
    for turn in range(most_tries):
        progress(f"latency {target:g}x", turn, most_tries)
        proposed = {name: own.propose() for name, own in climbs.items() if own.open}
        plans = {name: plan for name, plan in proposed.items() if plan is not None}
        if not plans or (turn and monotonic() > deadline):
            break
        for name, (share, error) in shares_of(clock({"dense": None, **plans})).items():
            climbs[name].meet(Rung(climbs[name].bound, plans[name], share, error))
    progress(f"latency {target:g}x", most_tries, most_tries)
    return {name: own.settled(prefer_slower=name not in favoured) for name, own in climbs.items()}


def shares_of(times: Times) -> dict[str, tuple[float, float]]:
    """Each plan's time over dense's, and the error of that."""
    return {name: share_of(own, times["dense"]) for name, own in times.items() if name != "dense"}


def share_of(own: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """Median over median, and the standard error of the rounds' ratios' median, by their quartiles: a single hiccup of the host moves neither."""
    ratios = [a / b for a, b in zip(own, dense, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return median(own) / median(dense), 1.2533 * (high - low) / 1.349 / math.sqrt(len(ratios))
