"""Refinement of a cut by true evaluations: how much more to spare the last layers than the first is tried, not assumed.

The table adds up losses of sublayers that were cut one at a time. Refitted together (`compensate`), a layer makes up for what the ones before it
lost, and nothing makes up for the last ones, so the sum overrates what cuts of the first layers cost. Losses are therefore multiplied
by exp(tilt · depth), depth 0 … 1 from the first to the last layer. The tilts give a row of plans, each of them proved best for its own
losses; each is refitted on three quarters of some calibration data, and the one nearest to dense on the last quarter is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.pruning.compensate import compensate
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.quality import Batch, dense_rows, mean_distance
from sparsesearch.pruning.record import PruningProfile
from sparsesearch.pruning.search import PruningQuestion, find_cut

TILTS = (0.0, 0.6, 1.2, 0.3, 1.8, 0.9)
"""In the order in which they are tried."""
MOST_SAMPLES = 1024
"""Calibration samples that evaluations use at most: they rank plans, the refit of the plan that is taken uses all."""
_ASIDE_EVERY = 4
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trial:
    """A plan that was evaluated.

    Attributes:
        tilt: by which it was found.
        distance: mean distance from dense on the data set aside, refitted on the rest.
    """

    tilt: float
    distance: float


def refine_cut(
    model: PreTrainedModel,
    profile: PruningProfile,
    question: PruningQuestion,
    batches: Sequence[Batch],
    *,
    evaluations: int,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Plan, list[Trial]]:
    """The best of the plans of a few tilts, and what each of them was measured to lose.

    Args:
        model: the dense model that was profiled.
        profile: of removals.
        question: budgets, criterion and refit.
        batches: calibration data; every fourth batch is set aside to judge on.
        evaluations: plans to try, at most as many as there are `TILTS`; equal plans are tried once.
        progress: called with (stage, done, total).

    Raises:
        BudgetInfeasibleError: no cut fits.
        SpecError: there are fewer than four batches, or no evaluation is asked for.
    """
    if len(batches) < _ASIDE_EVERY or evaluations < 1:
        raise SpecError(
            f"a refinement must have {_ASIDE_EVERY} batches and one evaluation, but got {len(batches)} and {evaluations}. Give more samples."
        )
    aside = list(batches[_ASIDE_EVERY - 1 :: _ASIDE_EVERY])
    rest = [batch for number, batch in enumerate(batches) if number % _ASIDE_EVERY != _ASIDE_EVERY - 1]
    dense, trials, plans = dense_rows(model, aside), list[Trial](), dict[float, Plan]()
    for number, tilt in enumerate(TILTS[:evaluations]):
        progress("evaluate plans", number, evaluations)
        plan = find_cut(profile, question, tilt=tilt)
        assert plan.pruning is not None
        if any(plan.pruning.layers == other.pruning.layers for other in plans.values() if other.pruning):
            continue
        refit = plan.pruning.compensation
        fitted = {} if refit is None else compensate(model, plan.pruning, rest, bias=refit.bias)
        with narrowed(model, plan.pruning, fitted):
            trials.append(Trial(tilt, mean_distance(model, aside, dense)))
        plans[tilt] = plan
    progress("evaluate plans", evaluations, evaluations)
    return plans[min(trials, key=lambda trial: trial.distance).tilt], trials
