"""What families lose on calibration sequences, and steps from the plan where each of them stands.

Additive losses are taken around dense, where no head knows what the others skip. A step expands the true loss around the plan that a family
has now (`profiling.local_model`), searches the family's space again for better plans that change few units, and lets the clock decide under
which budget the new plan takes the target's time. So every plan that is compared takes the same measured time, and stays in its own space.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from sparsesearch.calibration import Sample
from sparsesearch.equal_latency.climb import Rung
from sparsesearch.equal_latency.ladders import Ladder, SearchedLadder
from sparsesearch.equal_latency.menus import ANSWERS, answer_weight_of
from sparsesearch.evaluate.reference import Comparison, DenseReference
from sparsesearch.plan import Plan
from sparsesearch.profiling.local_model import loss_around
from sparsesearch.profiling.record import Profile
from sparsesearch.refinement import clearly_less, priced, true_loss

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
LARGEST_PRICE = 1e3
"""In mean absolute changes of the loss; the smallest is its inverse."""


@dataclass(frozen=True)
class Standing:
    """A plan that a family could take.

    Attributes:
        label: where it came from.
        ladder: what moves its budget.
        rung: the plan and its measured time.
        loss: `refinement.true_loss` of the n calibration sequences, answers weighing as they do for the family.
        kl_text: the part of its mean that is over all positions.
    """

    label: str
    ladder: Ladder
    rung: Rung
    loss: Float[Tensor, " n"]
    kl_text: float

    @property
    def mean(self) -> float:
        """Over the sequences."""
        return float(self.loss.mean())

    @property
    def at_answers(self) -> float:
        """The part of the mean that is at answers."""
        return self.mean - self.kl_text


def chosen(candidates: Sequence[Standing], rivals: Sequence[Standing]) -> Standing:
    """The plan of least loss among those that no rival beats: neither over all positions nor at answers; else not over all positions.

    The weight of the answers is a convention. What is better in their sum alone is taken only where nothing else is left.
    """
    text = min((rival.kl_text for rival in rivals), default=float("inf"))
    answers = min((rival.at_answers for rival in rivals), default=float("inf"))
    as_good = [one for one in candidates if one.kl_text <= text]
    better = [one for one in as_good if one.at_answers <= answers]
    return min(better or as_good or candidates, key=lambda standing: standing.mean)


@dataclass
class Judge:
    """Replays plans on calibration sequences that were neither profiled nor are judged on later, and remembers what they lost.

    Attributes:
        reference: dense on those sequences.
        tried: family -> plan's label -> mean of the loss that the family is judged by.
    """

    reference: DenseReference
    tried: dict[str, dict[str, float]] = field(default_factory=dict)
    _seen: dict[str, Comparison] = field(default_factory=dict)

    def standing(self, family: str, label: str, ladder: Ladder, rung: Rung) -> Standing:
        """Replay a plan on behalf of a family, whose loss it is judged by."""
        digest = rung.plan.sha256
        if digest not in self._seen:  # parts may find the same plan
            self._seen[digest] = self.reference.compare(rung.plan)
        seen = self._seen[digest]
        loss = true_loss(seen, answer_weight_of(family))
        found = Standing(label, ladder, rung, loss, float(seen.kl_text.mean()))
        self.tried.setdefault(family, {})[label] = found.mean
        return found


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
        change = loss_around(
            self.model,
            standing.rung.plan,
            now.tolist(),
            self.profile,
            self.samples[: EXPANDED_AT_ANSWERS if family == ANSWERS else EXPANDED],
            space.question.granularity,
            columns=space.columns,
            answer_weight=answer_weight_of(family),
        ).change
        bound = space.bound_of(now)

        @cache  # the shares' bisections begin with the same prices
        def priced_at(price: float) -> SearchedLadder:
            loss = priced(change, now, price, frozen=now < 0)
            return space.around(loss, f"loss expanded around a replayed plan, price {price:.3g} per change")

        return {share: _within(priced_at, now, bound, share) for share in SHARES}, bound


def _within(
    priced_at: Callable[[float], SearchedLadder], now: Int[ndarray, " U"], bound: float, share: float
) -> SearchedLadder:
    """The ladder of the lowest price at which no more than a share of the units changes."""
    low, high = 1 / LARGEST_PRICE, LARGEST_PRICE
    found = priced_at(high)
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        ladder = priced_at(price)
        choice = ladder.choice_of(ladder.at(bound))
        assert choice is not None, "a ladder's plans are of its own space"
        if (choice != now).mean() <= share:
            high, found = price, ladder
        else:
            low = price
    return found


Climb = Callable[[Mapping[str, Ladder], Mapping[str, float], Sequence[str]], Mapping[str, Rung]]
"""Ladders, bounds to begin with, and which ladders give way -> a plan of each at the target's measured time."""


def step(
    number: int,
    standings: Mapping[str, Standing],
    steps: Steps,
    judge: Judge,
    climb: Climb,
    most_share: float,
    favoured: Sequence[str],
) -> dict[str, Standing]:
    """The families that some proposal clearly improved, each with its best one.

    Args:
        number: of the step, for labels.
        standings: the families that are improved.
        steps: their spaces.
        judge: replays the proposals.
        climb: brings proposals to the target.
        most_share: of dense's time; slower proposals are not considered.
        favoured: families that give way where no plan meets the target; the first of them is the one on trial.
    """
    ladder_of: dict[str, Ladder] = {}
    start: dict[str, float] = {}
    owner: dict[str, str] = {}
    for family, standing in standings.items():
        made = steps.ladders(family, standing)
        if made is None:
            continue
        for share, ladder in made[0].items():
            label = f"step {number}, {share:.0%} of units" + ("" if family == favoured[0] else f", {family}")
            ladder_of[label], start[label], owner[label] = ladder, made[1], family
    rungs = climb(ladder_of, start, [label for label, family in owner.items() if family in favoured])
    better: dict[str, Standing] = {}
    for label, rung in rungs.items():
        family = owner[label]
        if rung.share > most_share:
            continue
        found = judge.standing(family, label, ladder_of[label], rung)
        if clearly_less(found.loss, better.get(family, standings[family]).loss) or (
            family in better and found.mean < better[family].mean
        ):
            better[family] = found
    return better
