"""What a search found, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING

from .render import emit_json, lines, table

if TYPE_CHECKING:
    from sparsesearch.plan import BudgetRecord, Plan

ASSUMPTIONS = ("seconds", "choices", "memory", "extrapolated", "losses")
"""What a search writes into a plan's provenance about its prices and losses."""


def show_search(plan: "Plan", out: Path, json: bool) -> None:
    """Budgets, rules and what was proved, as tables or JSON."""
    from sparsesearch.cost import caveat

    certificate = plan.certificate
    assert certificate is not None
    content = {
        "plan": str(out),
        "sha256": plan.sha256,
        "rules": plan.kind_counts(),
        "budgets": [record.model_dump(mode="json") for record in plan.budgets],
        "loss": certificate.loss,
        "lower_bound": certificate.lower_bound,
        "gap": certificate.gap,
        "solver": certificate.solver,
        "assumptions": _assumptions(plan),
    }
    if json:
        emit_json(content)
        return
    rows = [
        [record.metric, length, *(None if value is None else _amount(record, value) for value in values)]
        for record in plan.budgets
        for length, used in record.predicted.items()
        for values in [(record.bound, used, record.replayed.get(length))]
    ]
    if any(record.replayed for record in plan.budgets):
        table("budgets", ["metric", "length", "bound", "sum of its units", "layers replayed"], rows)
    else:
        table("budgets", ["metric", "length", "bound", "plan"], [row[:-1] for row in rows])
    for name in sorted({record.cost_model or "" for record in plan.budgets}):
        if caveat(name):
            lines(f"{name}: {caveat(name)}")
    table("query heads per rule", ["rule", "heads"], list(plan.kind_counts().items()))
    tried = [trial for trial in plan.provenance.get("refinement", ()) if trial["accepted"]]
    lines(
        *(f"{name}: {text}." for name, text in _assumptions(plan).items()),
        f"{certificate.objective}: {certificate.loss:.4g}, proven gap {certificate.gap:.2g} ({certificate.solver})",
        *(
            f"replayed on calibration sequences: KL {tried[-1]['kl_text']:.4g} nats per token, {tried[-1]['kl_answer']:.4g} at answers"
            for _ in tried[:1]
        ),
        f"written: {out}",
    )


def _assumptions(plan: "Plan") -> dict[str, str]:
    """What the figures above rest on."""
    return {name: str(plan.provenance[name]) for name in ASSUMPTIONS if name in plan.provenance}


def _amount(record: "BudgetRecord", value: float) -> str:
    from sparsesearch.search.budget import Budget

    return Budget(record.metric, record.bound, absolute=record.absolute).amount(float(f"{value:.4g}"))
