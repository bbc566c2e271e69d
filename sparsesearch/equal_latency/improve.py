"""Steps for all families in turn, the rivals first, so that the family on trial answers what they have become."""

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from sparsesearch.equal_latency.climb import Rung
from sparsesearch.equal_latency.menus import ANSWERS
from sparsesearch.equal_latency.standings import Judge, Standing, chosen, leads
from sparsesearch.equal_latency.steps import Climb, Start, Steps, step

HOPELESS = 2.0
"""Times the loss of the family on trial; no step on record has halved one."""


def rivals_of(first: str, standings: Mapping[str, Standing]) -> list[Standing]:
    """All but the family on trial and the mixture for answers, whose space is its own."""
    return [standing for family, standing in standings.items() if family not in (first, ANSWERS)]


def improved(
    standings: Mapping[str, Standing],
    parts: Sequence[Standing],
    steps: Steps,
    judge: Judge,
    climb: Climb,
    *,
    first: str,
    num_steps: int,
    fast: Callable[[Rung, bool], bool],
    deadline: float,
    progress: Callable[[str, int, int], None],
) -> dict[str, Standing]:
    """Where every family stands after steps, until none helps or time is over.

    Args:
        standings: where they stand before.
        parts: what the family on trial may take besides.
        steps: the families' spaces.
        judge: replays proposals.
        climb: brings them to the target's time.
        first: the family on trial. Where its plan does not lead, it also sets out from the plan of the rival that loses least over all positions.
        num_steps: at most.
        fast: whether a plan is as fast as the target, given whether its family gives way; proposals must be.
        deadline: of `time.monotonic`, past which no step begins.
        progress: called with (stage, done, total).
    """
    found, pool = dict(standings), list(parts)
    open_families = set(found)
    for number in range(1, num_steps + 1):
        if monotonic() > deadline or not open_families:
            break
        progress("steps", 2 * number - 2, 2 * num_steps)
        others = {
            f", {family}": Start(family, standing, gives_way=family == ANSWERS)
            for family, standing in found.items()
            if family in open_families - {first} and (family == ANSWERS or is_worth_steps(standing, found[first]))
        }
        better = step(number, others, steps, judge, climb, fast) if others else {}
        moved = {others[name].family: standing for name, standing in better.items()}
        found |= moved
        progress("steps", 2 * number - 1, 2 * num_steps)
        before, rivals = found[first], rivals_of(first, found)
        pool += step(number, starts_of(first, before, rivals, steps), steps, judge, climb, fast).values()
        found[first] = chosen([*pool, *rivals], rivals)
        judge.tried[first][found[first].label] = found[first].mean
        open_families = set(moved) | ({first} if found[first] is not before or moved else set())
    progress("steps", 2 * num_steps, 2 * num_steps)
    return found


def is_worth_steps(rival: Standing, own: Standing) -> bool:
    """Whether steps may bring a rival near the family on trial: not where it loses twice as much, over all positions and with answers."""
    return rival.mean <= HOPELESS * own.mean or rival.kl_text <= HOPELESS * own.kl_text


def starts_of(first: str, own: Standing, rivals: Sequence[Standing], steps: Steps) -> dict[str, Start]:
    """Of the family on trial: its plan, and the best rival's where that is not clearly worse over all positions."""
    starts = {"": Start(first, own, gives_way=True)}
    held = [rival for rival in rivals if steps.holding(first, rival.rung.plan) is not None]
    if held and not leads(own, rivals):
        best = min(held, key=lambda rival: rival.kl_text)
        if best.rung.plan.assignments != own.rung.plan.assignments:
            starts[f", from {best.label}"] = Start(first, best, gives_way=True)
    return starts
