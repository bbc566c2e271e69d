"""How far the accuracy proxies can be trusted: rank agreement with the truth over whole plans."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from scipy.stats import kendalltau
from transformers import PreTrainedModel

from sparsesearch.calibration import Sample
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.reference import DenseReference
from sparsesearch.planning import Question, score_table, write_plan
from sparsesearch.profiling.proxies import PROXIES, objective_loss
from sparsesearch.profiling.record import Profile
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import solve
from sparsesearch.shapes import Granularity

_DENSITIES = (0.12, 0.5)
_NOISE = (0.0, 0.5, 1.5, 3.0)
_WEIGHTS = (0.1, 1.0, 10.0)


@dataclass(frozen=True)
class ProxyAgreement:
    """Kendall's tau of every proxy against what was measured, over the same plans.

    Attributes:
        tau: proxy -> truth -> tau-b; truths are `kl_text`, `kl_answer` and `needle` (loss of accuracy).
        plans: per plan its density and measured truths.
    """

    tau: dict[str, dict[str, float]]
    plans: list[dict[str, float]]


def validate_proxies(
    model: PreTrainedModel,
    profile: Profile,
    samples: Sequence[Sample],
    *,
    num_plans: int = 60,
    granularity: Granularity = "query_head",
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> ProxyAgreement:
    """Draw whole plans, measure each on held-out sequences, and rank the proxies.

    Plans are optima of the default objective with its losses multiplied by log-normal noise, at random densities and answer weights: from
    the best plans to nearly random ones, because agreement among bad plans alone would prove nothing.

    Raises:
        SpecError: fewer than ten plans, which give no rank correlation worth a name.
    """
    if num_plans < 10:
        raise SpecError(f"at least 10 plans must be drawn for a rank correlation, but got {num_plans}.")
    reference = DenseReference(model, samples)
    question = Question((Budget("density", 0.25),), granularity=granularity)
    table = score_table(profile, question)
    rng = np.random.default_rng(seed)
    choices, plans = [], []
    for index in range(num_plans):
        progress("validate proxies", index, num_plans)
        choice = _draw(profile, table.loss.shape, question, rng)
        measured = reference.score(write_plan(profile, question, table, choice, None))
        choices.append(choice)
        plans.append({"density": float(table.cost_of("density", choice).mean()), **measured})
    progress("validate proxies", num_plans, num_plans)
    return ProxyAgreement(_agreement(profile, granularity, choices, plans), plans)


def _draw(profile: Profile, shape: tuple[int, ...], question: Question, rng: np.random.Generator) -> Int[ndarray, " U"]:
    weight, noise = rng.choice(_WEIGHTS), rng.choice(_NOISE)
    loss = objective_loss(profile, "combined", question.granularity, answer_weight=float(weight))
    loss = loss * np.exp(rng.normal(0.0, noise, shape))
    budget = Budget("density", float(rng.uniform(*_DENSITIES)))
    return solve(score_table(profile, question), [budget], loss=loss, gap_target=1e-2).choice


def _agreement(
    profile: Profile, granularity: Granularity, choices: list[Int[ndarray, " U"]], plans: list[dict[str, float]]
) -> dict[str, dict[str, float]]:
    truths = {name: np.array([plan[name] for plan in plans]) for name in plans[0] if name != "density"}
    if "needle" in truths:
        truths["needle"] = -truths["needle"]
    predicted = {"density": -np.array([plan["density"] for plan in plans])}
    for name in ("combined", *(proxy for proxy in PROXIES if proxy != "moa")):
        loss = objective_loss(profile, name, granularity, answer_weight=1.0)
        predicted[name] = np.array([loss[np.arange(len(choice)), choice].sum() for choice in choices])
    return {
        name: {truth: float(kendalltau(values, measured).statistic) for truth, measured in truths.items()}
        for name, values in predicted.items()
    }
