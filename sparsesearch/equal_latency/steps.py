"""Steps from the plan where a family stands to better ones of the same measured time.

Additive losses are taken around dense, where no head knows what the others skip. A step expands the true loss around the plan that a family
has now (`profiling.local_model`), searches the family's space again for better plans that change few units, and lets the clock decide under
which budget the new plan takes the target's time. So every plan that is compared takes the same measured time, and stays in its own space.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from numpy import ndarray

from sparsesearch.calibration import Sample
from sparsesearch.equal_latency.climb import Rung
from sparsesearch.equal_latency.ladders import Ladder, SearchedLadder
from sparsesearch.equal_latency.menus import ANSWERS, answer_weight_of
from sparsesearch.equal_latency.standings import Judge, Standing, improves
from sparsesearch.plan import Plan
from sparsesearch.profiling.local_model import loss_around
from sparsesearch.profiling.record import Profile
from sparsesearch.refinement import clearly_less, priced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (0.01, 0.03, 0.1)
"""Units that a step may change at most; the plans of all of them are timed together and judged. A price on every change keeps to it.

One price for all models does not do: between 0.1 and 2 mean absolute changes SmolLM2 (270 heads, 0.4 of dense's time) changed so much that its
loss doubled, and from 2 on needle-7m changed nothing. With shares up to 0.3, two steps took needle-7m at density 0.25 (1024 tokens) from 0.073 to 0.059 on 12
calibration sequences, and its answers' KL on held-out ones from 0.14 to 0.03. A third of the units at once made SmolLM2 worse than a tenth did."""
EXPANDED, EXPANDED_AT_ANSWERS = 8, 24
"""Calibration sequences around whose loss plans are expanded, and for the family whose answers weigh most, which are few tokens of each.

SmolLM2 at 0.4 of dense's time, KL + 2 x answer KL on calibration sequences: 24 of its own tasks, slopes shrunk (`moderation.shrunk`), took it from
0.177 to 0.129 by 1 % of the units; 8 of mixed ones, slopes as they were, from 0.157 to 0.199 by 3 %."""
BISECTIONS = 8
ENOUGH = 0.75
"""Of a share: no lower price is looked for."""
LARGEST_PRICE = 1e3
"""In mean absolute changes of the loss; the smallest is its inverse."""


@dataclass(frozen=True)
class Steps:
    """The families' whole spaces, and the sequences around whose losses plans are expanded.

    Attributes:
        model: dense, in evaluation mode.
        profile: candidates and calibrated rules.
        spaces: family -> ladders of the spaces that its plans are improved in, the smallest first.
        samples: calibration sequences; the first of them are expanded around.
    """

    model: "PreTrainedModel"
    profile: Profile
    spaces: Mapping[str, tuple[SearchedLadder, ...]]
    samples: Sequence[Sample]

    def holding(self, family: str, plan: Plan) -> tuple[SearchedLadder, Int[ndarray, " U"]] | None:
        """The smallest of a family's spaces that holds a plan, and the plan as a choice in it."""
        for space in self.spaces[family]:
            choice = space.choice_of(plan)
            if choice is not None:
                return space, choice
        return None

    def ladders(self, family: str, standing: Standing) -> tuple[dict[float, SearchedLadder], float] | None:
        """Share of units -> the space searched for the loss around a standing, and the bound at which that plan itself is allowed.

        None where no space of the family holds the plan.
        """
        found = self.holding(family, standing.rung.plan)
        if found is None:
            return None
        space, now = found
        weight = weight_of(family, standing)
        change = loss_around(
            self.model,
            standing.rung.plan,
            now.tolist(),
            self.profile,
            self.samples[: EXPANDED_AT_ANSWERS if family == ANSWERS else EXPANDED],
            space.question.granularity,
            columns=space.columns,
            answer_weight=weight,
        ).change
        bound = space.bound_of(now)

        def priced_at(price: float) -> SearchedLadder:
            loss = priced(change, now, price, frozen=now < 0)
            return space.around(loss, f"loss expanded around a replayed plan, price {price:.3g} per change", weight)

        return within_shares(priced_at, now, bound, SHARES), bound


def weight_of(family: str, standing: Standing) -> float:
    """How much answers weigh in a step: as where the plan was found, which may be a part of the space that weighs them otherwise."""
    if family == ANSWERS or not isinstance(standing.ladder, SearchedLadder):
        return answer_weight_of(family)
    return standing.ladder.question.answer_weight


def within_shares(
    priced_at: Callable[[float], SearchedLadder], now: Int[ndarray, " U"], bound: float, shares: Sequence[float]
) -> dict[float, SearchedLadder]:
    """Share -> the ladder of the lowest price, nearly, at which no more than that share of the units changes."""
    known: dict[float, tuple[int, SearchedLadder]] = {}

    def changed(price: float) -> int:
        if price not in known:
            ladder = priced_at(price)
            known[price] = int((ladder.choice_at(bound) != now).sum()), ladder
        return known[price][0]

    changed(LARGEST_PRICE)
    found = {}
    for share in shares:
        most = int(share * len(now))
        high = min((price for price, (units, _) in known.items() if units <= most), default=LARGEST_PRICE)
        low = max((price for price, (units, _) in known.items() if units > most), default=1 / LARGEST_PRICE)
        for _ in range(BISECTIONS):
            if changed(high) >= ENOUGH * most:
                break
            price = (low * high) ** 0.5
            low, high = (low, price) if changed(price) <= most else (price, high)
        found[share] = known[high][1]
    return found


Climb = Callable[[Mapping[str, Ladder], Mapping[str, float], Sequence[str]], Mapping[str, Rung]]
"""Ladders, bounds to begin with, and which ladders give way -> a plan of each at the target's measured time."""


@dataclass(frozen=True)
class Start:
    """Where a family sets out from: its own plan, or a rival's that its space holds too.

    Attributes:
        family: on whose behalf, in whose space.
        standing: the plan, judged by the family's loss.
        gives_way: whether the family gets its next faster plan where none meets the target, and otherwise the next slower one.
    """

    family: str
    standing: Standing
    gives_way: bool


def step(
    number: int,
    starts: Mapping[str, Start],
    steps: Steps,
    judge: Judge,
    climb: Climb,
    fast: Callable[[Rung, bool], bool],
) -> dict[str, Standing]:
    """The starts from which some proposal clearly improved, each with its best one.

    Args:
        number: of the step, for labels.
        starts: by what distinguishes their labels.
        steps: the families' spaces.
        judge: replays the proposals.
        climb: brings proposals to the target.
        fast: whether a plan is as fast as the target, given whether its family gives way; no other proposals are considered.
    """
    ladder_of: dict[str, Ladder] = {}
    begin: dict[str, float] = {}
    origin: dict[str, str] = {}
    for name, start in starts.items():
        made = steps.ladders(start.family, start.standing)
        if made is None:
            continue
        for share, ladder in made[0].items():
            label = f"step {number}, {share:.0%} of units{name}"
            ladder_of[label], begin[label], origin[label] = ladder, made[1], name
    rungs = climb(ladder_of, begin, [label for label, name in origin.items() if starts[name].gives_way])
    better: dict[str, Standing] = {}
    for label, rung in rungs.items():
        name = origin[label]
        start = starts[name]
        if not fast(rung, start.gives_way):
            continue
        found = judge.standing(start.family, label, ladder_of[label], rung)
        if is_better(start.family, found, start.standing) and (name not in better or found.mean < better[name].mean):
            better[name] = found
    return better


def is_better(family: str, new: Standing, old: Standing) -> bool:
    """Whether a step is worth taking: by all that a family is judged by, and by its own loss where answers are all that it is for."""
    return clearly_less(new.loss, old.loss) if family == ANSWERS else improves(new, old)
