"""The predicted front of a profile beside uniform windows, as curves for the report."""

from sparsesearch.planning import Question, front_rows, score_table
from sparsesearch.profiling.record import Profile
from sparsesearch.report.plot import Curve
from sparsesearch.search.budget import Budget
from sparsesearch.shapes import Granularity


def front_curves(profile: Profile, granularity: Granularity) -> list[Curve]:
    """Predicted loss against density: the search's front, and every window of the space given to all heads alike."""
    question = Question((Budget("density", 1.0),), granularity=granularity)
    length = max(profile.manifest.lengths)
    rows = front_rows(profile, question)
    front = [(float(row[f"density@{length}"]), float(row["loss"])) for row in rows]
    table = score_table(profile, question)
    windows = []
    for column, rule in enumerate(profile.manifest.candidates):
        if rule.kind == "sink_window":
            share = table.costs["density"][:, column, -1].sum() / table.dense_cost("density")[-1]
            windows.append((float(share), float(table.loss[:, column].sum())))
    return [Curve("searched plans", sorted(set(front))), Curve("uniform windows", sorted(set(windows)), line=False)]
