"""The predicted front of a profile beside uniform windows, as curves for the report."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsesearch.cost import cost_model_names, load_cost_model
from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.evaluate import Metrics
from sparsesearch.plan import Plan
from sparsesearch.planning import Question, front_rows, score_table
from sparsesearch.pricing import shape_of
from sparsesearch.profiling.record import Profile
from sparsesearch.report.plot import Curve, Panel, plot
from sparsesearch.search.budget import PRICED_BY_DEVICE, Budget
from sparsesearch.shapes import Granularity
from sparsesearch.workload import parse_workloads

KV_LEVELS = (0.5, 0.25)
"""Shares of the dense cache at which the front is drawn besides."""


@dataclass(frozen=True)
class TimedFront:
    """The front in seconds.

    Attributes:
        x_label: which seconds, of dense's, and who predicted them.
        curves: predicted loss against them.
    """

    x_label: str
    curves: list[Curve]


def front_curves(profile: Profile, granularity: Granularity) -> list[Curve]:
    """Predicted loss against density: the search's front, and every window of the space given to all heads alike."""
    question = Question((Budget("density", 1.0),), granularity=granularity)
    table = score_table(profile, question)
    windows = []
    for column, rule in enumerate(profile.manifest.candidates):
        if rule.kind == "sink_window":
            share = table.costs["density"][:, column, -1].sum() / table.dense_cost("density")[-1]
            windows.append((float(share), float(table.loss[:, column].sum())))
    return [*_fronts(profile, question), Curve("uniform windows", sorted(set(windows)), line=False)]


def timed_front(profile: Profile, plan: Plan) -> TimedFront | None:
    """The front in the seconds that the plan's own search limited first, for the workloads it was searched for; None if it limited none.

    Seconds are sums of units, as the search adds them up.
    """
    timed = next((record for record in plan.budgets if record.metric in PRICED_BY_DEVICE), None)
    if timed is None or timed.cost_model not in cost_model_names():
        return None
    costs = load_cost_model(timed.cost_model)
    workloads = parse_workloads(plan.provenance["workloads"]) if "workloads" in plan.provenance else ()
    question = Question(
        (Budget(timed.metric, 1.0),),
        granularity=plan.unit,
        cost_model=costs,
        workloads=workloads,
        decode="separate" if plan.decode else "same",
        dtype_bytes=getattr(getattr(costs, "table", None), "dtype_bytes", 2),
        shape=shape_of(plan.base_model) if workloads else None,
    )
    label = f"{timed.metric} over dense's, predicted by {timed.cost_model}"
    return TimedFront(label, _fronts(profile, question))


def _fronts(profile: Profile, question: Question) -> list[Curve]:
    """Predicted loss against the question's metric; also under bounds on the cache, the third axis, where caches are decided per KV group."""
    curves = [Curve("searched plans", _points(front_rows(profile, question), question))]
    for level in KV_LEVELS if question.granularity == "kv_group" else ():
        bounded = replace(question, budgets=(*question.budgets, Budget("kv_fraction", level)))
        with contextlib.suppress(BudgetInfeasibleError):
            points = _points(front_rows(profile, bounded), question)
            curves.append(Curve(f"searched, at most {level:.0%} of the cache", points))
    return curves


def _points(rows: Sequence[dict[str, Any]], question: Question) -> list[tuple[float, float]]:
    """At the length or workload where a plan uses most."""
    metric = f"{question.budgets[0].metric}@"
    return sorted({(max(float(row[key]) for key in row if key.startswith(metric)), float(row["loss"])) for row in rows})


def front_plot(metrics: Metrics, length: int, *, title: str) -> str:
    """A measured front as an SVG of two panels: KL to dense and needle accuracy against the density that was computed."""
    families: dict[str, list[str]] = {}
    for name in metrics.variants:
        family, separator, _ = name.partition(" @ ")
        if separator:
            families.setdefault(family, []).append(name)
    cells = {family: [metrics.at(length, name) for name in names] for family, names in families.items()}
    kl = [
        Curve(family, sorted((cell.density, cell.kl_text.mean) for cell in own if cell.kl_text.mean > 0))
        for family, own in cells.items()
    ]
    needle = [Curve(family, sorted((cell.density, cell.needle.mean) for cell in own)) for family, own in cells.items()]
    return plot(
        [
            Panel("KL to dense", "density", "nats per token", kl, log_y=True),
            Panel("needle accuracy", "density", "share of questions answered", needle, zero_y=True),
        ],
        title=title,
    )
