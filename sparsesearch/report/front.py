"""The predicted front of a profile beside uniform windows, as curves for the report."""

import contextlib
from collections.abc import Sequence
from typing import Any

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.evaluate import Metrics
from sparsesearch.planning import Question, front_rows, score_table
from sparsesearch.profiling.record import Profile
from sparsesearch.report.plot import Curve, Panel, plot
from sparsesearch.search.budget import Budget
from sparsesearch.shapes import Granularity

KV_LEVELS = (0.5, 0.25)
"""Shares of the dense cache at which the front is drawn besides."""


def front_curves(profile: Profile, granularity: Granularity) -> list[Curve]:
    """Predicted loss against density: the search's front, and every window of the space given to all heads alike."""
    question = Question((Budget("density", 1.0),), granularity=granularity)
    length = max(profile.manifest.lengths)
    rows = front_rows(profile, question)
    front = _points(rows, length)
    table = score_table(profile, question)
    windows = []
    for column, rule in enumerate(profile.manifest.candidates):
        if rule.kind == "sink_window":
            share = table.costs["density"][:, column, -1].sum() / table.dense_cost("density")[-1]
            windows.append((float(share), float(table.loss[:, column].sum())))
    curves = [Curve("searched plans", front), *_with_less_memory(profile, granularity, length)]
    return [*curves, Curve("uniform windows", sorted(set(windows)), line=False)]


def _with_less_memory(profile: Profile, granularity: Granularity, length: int) -> list[Curve]:
    """The front under bounds on the cache, the third axis; empty where caches are not decided per KV group."""
    curves = []
    for level in KV_LEVELS if granularity == "kv_group" else ():
        question = Question((Budget("density", 1.0), Budget("kv_fraction", level)), granularity=granularity)
        with contextlib.suppress(BudgetInfeasibleError):
            points = _points(front_rows(profile, question), length)
            curves.append(Curve(f"searched, at most {level:.0%} of the cache", points))
    return curves


def _points(rows: Sequence[dict[str, Any]], length: int) -> list[tuple[float, float]]:
    return sorted({(float(row[f"density@{length}"]), float(row["loss"])) for row in rows})


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
