"""What a study varies: everything that is not decided per unit. Inside a trial the exact search decides the units."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna

from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.planning import Question, score_table, write_plan
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.reuse import Reuse
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import solve
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Granularity


@dataclass(frozen=True)
class Knobs:
    """One trial's setting. The defaults are those of `sparsesearch search`.

    Attributes:
        density: budget of the exact search, in (0, 1].
        profile: which of the study's profiles; profiles differ in block size.
        answer_weight: mixing weight of the two proxies.
        dense_first: layers at the start that stay dense.
        dense_last: layers at the end that stay dense.
        slope_cap: steepest length law b that may be chosen; 0 leaves constant windows only.
        end_share: share of calibration weight on sequences whose questions stand at the end; None weighs all sequences equally.
        refresh_period: a head that chooses by itself does so in every n-th layer, and reuses that choice in between; 1 always chooses.
    """

    density: float
    profile: int = 0
    answer_weight: float = 1.0
    dense_first: int = 0
    dense_last: int = 0
    slope_cap: float = 1.0
    end_share: float | None = None
    refresh_period: int = 1

    def params(self, profiles: Sequence[Profile], refresh_periods: bool) -> dict[str, Any]:
        """As Optuna's parameters, for enqueueing."""
        own: dict[str, Any] = {
            "density": self.density,
            "answer_weight": self.answer_weight,
            "dense_first": self.dense_first,
            "dense_last": self.dense_last,
            "slope_cap": self.slope_cap,
        }
        if len(profiles) > 1:
            own["profile"] = self.profile
        if has_styles(profiles[self.profile]):
            own["end_share"] = 0.5 if self.end_share is None else self.end_share
        if refresh_periods:
            own["refresh_period"] = self.refresh_period
        return own


def suggest(
    trial: optuna.Trial, profiles: Sequence[Profile], *, lowest: float, highest: float, refresh_periods: bool
) -> Knobs:
    """Ask a trial for a setting. At most a quarter of the layers is kept dense at either end."""
    place = trial.suggest_categorical("profile", list(range(len(profiles)))) if len(profiles) > 1 else 0
    layers = len(profiles[place].manifest.base_model.modules)
    most = max(1, layers // 4)
    return Knobs(
        density=trial.suggest_float("density", lowest, highest),
        profile=place,
        answer_weight=trial.suggest_float("answer_weight", 0.05, 20.0, log=True),
        dense_first=trial.suggest_int("dense_first", 0, most),
        dense_last=trial.suggest_int("dense_last", 0, most),
        slope_cap=trial.suggest_float("slope_cap", 0.0, 1.0),
        end_share=trial.suggest_float("end_share", 0.0, 1.0) if has_styles(profiles[place]) else None,
        refresh_period=trial.suggest_int("refresh_period", 1, layers) if refresh_periods else 1,
    )


def has_styles(profile: Profile) -> bool:
    """Whether the profile was calibrated on retrieval sequences of both styles: questions spread, and at the end."""
    kinds = profile.manifest.calibration.values()
    return profile.manifest.num_samples > 3 and all(text.startswith("needle") for text in kinds)


def solved(profile: Profile, knobs: Knobs, granularity: Granularity) -> Plan:
    """The exact search under a setting.

    Raises:
        BudgetInfeasibleError: the layers kept dense and the rules left do not fit the density.
    """
    weights = None
    if knobs.end_share is not None:
        # `calibration.load` deals three sequences with spread questions, then three with questions at the end, and so on
        at_end = [index % 6 >= 3 for index in range(profile.manifest.num_samples)]
        spread, end = (at_end.count(kind) for kind in (False, True))
        both = ((1 - knobs.end_share) / spread, knobs.end_share / end)
        weights = tuple(max(both[kind], 1e-6) for kind in at_end)
    question = Question(
        budgets=(Budget("density", knobs.density),),
        space=_menu(profile, knobs.slope_cap),
        granularity=granularity,
        answer_weight=knobs.answer_weight,
        sample_weights=weights,
    )
    dense = _dense_modules(profile, knobs)
    table = score_table(profile, question)
    free = np.array([unit.module not in dense for unit in table.units])
    table = replace(
        table, valid=table.valid & (free[:, None] | (np.arange(len(table.candidates)) == table.dense_index))
    )
    solution = solve(table, question.budgets)
    plan = write_plan(profile, question, table, solution.choice, solution)
    return with_refresh_period(plan, knobs.refresh_period)


def _dense_modules(profile: Profile, knobs: Knobs) -> frozenset[str]:
    modules = profile.manifest.base_model.modules
    return frozenset([*modules[: knobs.dense_first], *modules[len(modules) - knobs.dense_last :]])


def _menu(profile: Profile, slope_cap: float) -> SearchSpace:
    """The profile's candidates whose laws are not steeper than the cap; dense stays."""
    manifest = profile.manifest
    kept = tuple(rule for rule in manifest.candidates if isinstance(rule, Dense) or _slope(rule) <= slope_cap)
    return SearchSpace(manifest.space, "", "", manifest.block_tokens, "query_head", kept)


def _slope(rule: Rule) -> float:
    laws = [
        value for value in (getattr(rule, name) for name in type(rule).model_fields) if isinstance(value, LengthLaw)
    ]
    return max((law.b for law in laws), default=0.0)


def with_refresh_period(plan: Plan, period: int) -> Plan:
    """The plan in which heads that choose by themselves do so every `period` layers and reuse that choice in between.

    A head keeps its own rule where the head of the same index in the last refreshing layer leaves no selection.
    """
    if period < 1:
        raise SpecError(f"a refresh period must be at least one layer, but got {period}.")
    if period == 1:
        return plan
    rules, assignments = dict(plan.rules), dict(plan.assignments)
    modules = plan.base_model.modules
    for layer, module in enumerate(modules):
        source = layer - layer % period
        if source == layer or module not in assignments:
            continue
        reuse = Reuse(layer=source)
        left = plan.module_rules(modules[source])
        names = list(assignments[module])
        for head, rule in enumerate(plan.module_rules(module)):
            if rule.dynamic and head < len(left) and left[head].dynamic and not left[head].reuses:
                names[head], rules[reuse.label] = reuse.label, reuse
        assignments[module] = tuple(names)
    used = {name for names in assignments.values() for name in names}
    return plan.model_copy(
        update={"assignments": assignments, "rules": {name: rule for name, rule in rules.items() if name in used}}
    )
