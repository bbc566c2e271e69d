"""What families lose on calibration sequences that were neither profiled nor are judged on later, and which plan is better there."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from sparsesearch.equal_latency.climb import Rung
from sparsesearch.equal_latency.ladders import Ladder
from sparsesearch.equal_latency.menus import answer_weight_of
from sparsesearch.evaluate.reference import Comparison, DenseReference
from sparsesearch.refinement import clearly_less, true_loss

ROOM = 2.0
"""Paired standard errors by which the family on trial wants to lose less over all positions than a rival does."""


@dataclass(frozen=True)
class Standing:
    """A plan that a family could take.

    Attributes:
        label: where it came from.
        ladder: what moves its budget.
        rung: the plan and its measured time.
        loss: `refinement.true_loss` of the n calibration sequences, answers weighing as they do for the family.
        text: the part of it that is over all positions.
    """

    label: str
    ladder: Ladder
    rung: Rung
    loss: Float[Tensor, " n"]
    text: Float[Tensor, " n"]

    @property
    def mean(self) -> float:
        """Over the sequences."""
        return float(self.loss.mean())

    @property
    def kl_text(self) -> float:
        """Over all positions, mean over the sequences."""
        return float(self.text.mean())

    @property
    def at_answers(self) -> Float[Tensor, " n"]:
        """The part of the loss that is at answers."""
        return self.loss - self.text


def improves(new: Standing, old: Standing) -> bool:
    """Whether neither the loss nor its part over all positions rises, and one of the two clearly falls.

    Answers are few tokens: the loss has several times the noise of its part over all positions, which alone shows most improvements. Nor is a plan
    given up for one that is better at answers and worse everywhere else.
    """
    no_worse = new.mean <= old.mean and new.kl_text <= old.kl_text
    return no_worse and (clearly_less(new.loss, old.loss) or clearly_less(new.text, old.text))


def leads(one: Standing, rivals: Sequence[Standing]) -> bool:
    """Whether a plan loses less over all positions than every rival, by more than what the choice of sequences explains."""
    return all(clearly_less(one.text, rival.text, num_errors=ROOM) for rival in rivals)


def chosen(candidates: Sequence[Standing], rivals: Sequence[Standing]) -> Standing:
    """The plan of least loss among those that no rival beats: none loses less over all positions, nor clearly less at answers, which are few tokens.

    If any of them lead, it is among these. The weight of the answers is a convention. What is better in their sum alone is taken only where
    nothing else is left: where all candidates lose more over all positions than some rival.
    """
    text = min((rival.kl_text for rival in rivals), default=float("inf"))
    as_good = [one for one in candidates if one.kl_text <= text]
    better = [one for one in as_good if not any(clearly_less(rival.at_answers, one.at_answers) for rival in rivals)]
    leading = [one for one in better if leads(one, rivals)]
    return min(leading or better or as_good or candidates, key=lambda standing: standing.mean)


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
        found = Standing(label, ladder, rung, loss, seen.kl_text)
        self.tried.setdefault(family, {})[label] = found.mean
        return found
