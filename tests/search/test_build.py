import numpy as np
import pytest

from sparsesearch.errors import PlanMismatchError
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.rules.dense import Dense
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.build import plan_from_choice
from sparsesearch.search.solve import solve
from sparsesearch.shapes import Unit, units_of

MODEL = BaseModelInfo(
    name_or_path="tiny", model_type="llama", modules=("a", "b"), num_heads=(4, 4), num_kv_heads=(2, 2), head_dim=(8, 8)
)


def table() -> ScoreTable:
    units = units_of(MODEL.geometry, "kv_group")
    loss = np.array([[9.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.5, 0.0], [7.0, 6.0, 0.0]])
    cost = np.broadcast_to(np.array([[0.0], [4.0], [10.0]]), (4, 3, 2)) * np.array([1.0, 3.0])
    labels = ("zero", "window", "dense")
    return ScoreTable(units, labels, (64, 128), loss, {"density": cost}, 2, np.ones((4, 3), dtype=bool))


def rules_for(unit: Unit, candidate: int) -> tuple[Rule, ...]:
    window = 64 * (1 + unit.heads[0])  # differs from unit to unit, as calibrated rules do
    kinds = [{"kind": "zero"}, {"kind": "sink_window", "window": window}, {"kind": "dense"}]
    return (parse_rule(kinds[candidate], where="test"),) * len(unit.heads)


def build(model: BaseModelInfo = MODEL, *, refined: bool = False) -> Plan:
    scores, budgets = table(), [Budget("density", 0.35, (128,))]
    solution = solve(scores, budgets, gap_target=0.0)
    choice = solution.choice.copy()
    if refined:
        choice[1] = 1
    return plan_from_choice(
        scores,
        choice,
        rules_for,
        base_model=model,
        block_tokens=64,
        granularity="kv_group",
        budgets=budgets,
        solution=solution,
        provenance={"seed": 0},
    )


def test_writes_rules_in_use_heads_of_a_group_and_what_was_proved() -> None:
    plan = build()
    assert plan.assignments == {
        "a": ("sink_window(sink=64,window=64)",) * 2 + ("zero",) * 2,
        "b": ("zero",) * 2 + ("dense",) * 2,
    }
    assert set(plan.rules) == {"sink_window(sink=64,window=64)", "zero", "dense"}
    assert plan.budgets[0].predicted == {"128": pytest.approx(0.35)}
    assert plan.certificate is not None
    assert plan.certificate.loss == pytest.approx(3.0)
    assert plan.certificate.gap == 0.0
    assert Plan.from_dict(plan.to_dict(), source="test") == plan


def test_a_refined_choice_keeps_the_bound_and_says_so() -> None:
    plan = build(refined=True)
    assert plan.certificate is not None
    assert plan.certificate.solver.endswith("+ refinement")
    assert plan.certificate.lower_bound == pytest.approx(3.0)
    assert plan.certificate.loss == pytest.approx(4.0)
    assert plan.certificate.gap == pytest.approx(0.25)


def test_heads_without_a_unit_stay_dense_and_foreign_units_are_refused() -> None:
    larger = MODEL.model_copy(update={"num_heads": (6, 4), "modules": ("a", "b")})
    plan = build(larger)
    assert plan.assignments["a"][4:] == ("dense", "dense")
    assert plan.rule("a", 5) == Dense()
    with pytest.raises(PlanMismatchError, match="unit b:0-1 must be a part of tiny"):
        build(MODEL.model_copy(update={"modules": ("a", "c")}))
