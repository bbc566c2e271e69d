"""The judge of cost models: a perfect one is perfect, a wrong one is not, and the held-out plans are what they claim."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsesearch.bench import cost
from sparsesearch.bench.cost import joined, judged_again, parts_of
from sparsesearch.bench.cost_errors import model_summary, plan_summary, predictors
from sparsesearch.bench.cost_plans import FAMILIES, HeldOutPlan, held_out_plans
from sparsesearch.cost.device.micro_bench import Bench, Row
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.errors import SpecError
from sparsesearch.kernels.schedule import Workers
from tests.cost.device_tables import device_table

MODEL = DeviceCostModel(device_table(name="h200"))
PLANS = list(held_out_plans((4096, 8192), per_shape=4))


def rows_of(seconds: list[float]) -> list[Row]:
    return [{"group": "plan", **plan.to_dict(), "seconds": s} for plan, s in zip(PLANS, seconds, strict=True)]


def test_a_perfect_model_is_perfect_and_the_baselines_are_not() -> None:
    truth = [predictors(MODEL)["ours"](plan) for plan in PLANS]
    found = plan_summary(
        [*rows_of(truth), {"group": "repeat", **PLANS[0].to_dict(), "seconds": 1.02 * truth[0]}], MODEL
    )
    ours = found["ours"]
    assert (ours["mape"], ours["p95"], ours["regret_max"]) == pytest.approx((0, 0, 0))
    assert ours["kendall_tau"] == pytest.approx(1.0)
    assert found["repeat_mape"] == pytest.approx(0.02)
    for name in ("flop_share", "roofline", "additive"):
        assert found[name]["mape"] > 0.01
        assert len(found[name]["predicted_s"]) == len(PLANS)


def test_wrong_times_are_errors_and_wrong_ranks_are_regret() -> None:
    truth = np.array([predictors(MODEL)["ours"](plan) for plan in PLANS])
    slower = plan_summary(rows_of((1.25 * truth).tolist()), MODEL)["ours"]
    assert slower["mape"] == pytest.approx(0.2)
    assert slower["kendall_tau"] == pytest.approx(1.0)
    upside_down = plan_summary(rows_of((1 / truth).tolist()), MODEL)["ours"]
    assert upside_down["kendall_tau"] == pytest.approx(-1.0)
    assert upside_down["regret_max"] > 0.1


def test_end_to_end_rows_are_judged_by_their_own_error() -> None:
    rows: list[Row] = [
        {"group": "prefill", "model": "llama3-8b", "length": 8192, "seed": -1, "seconds": 1.0},
        {"group": "decode_step", "model": "llama3-8b", "batch": 8, "kv_tokens": 8192, "seconds": 1.0},
    ]
    first = model_summary(rows, MODEL)
    exact = [row | {"seconds": result["predicted_s"]} for row, result in zip(rows, first["rows"], strict=True)]
    assert model_summary(exact, MODEL)["max"] == pytest.approx(0.0, abs=1e-12)
    assert model_summary([], MODEL) == {"rows": []}


def test_there_are_sixty_held_out_plans_over_the_stated_range() -> None:
    plans = list(held_out_plans())
    assert len(plans) == len(set(plans)) >= 60
    assert {plan.length for plan in plans} >= {4096, 131072}
    assert {plan.head_dim for plan in plans} == {64, 128}


def test_plans_are_heterogeneous_and_made_again_from_their_parameters() -> None:
    densities = []
    for plan in held_out_plans((4096,), (128,), 8):
        first, second = plan.schedule(Workers(), "gluon"), HeldOutPlan(**plan.to_dict()).schedule(Workers(), "gluon")
        assert torch.equal(first.tiles, second.tiles)
        assert torch.equal(first.entries, second.entries)
        assert len(set(plan.head_tiles().of_head)) > 1
        assert plan.head_tiles().choices.any(-1).all()  # no query without keys
        densities.append(first.density)
    assert max(densities) > 1.5 * min(densities)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_family_is_neither_nothing_nor_everything(family) -> None:  # type: ignore[no-untyped-def]
    grid = HeldOutPlan(8192, 128, 0).grid
    shares = [
        float((family(grid, np.random.default_rng(seed)) & grid.reachable()).sum() / grid.reachable().sum())
        for seed in range(5)
    ]
    assert 0.01 < np.mean(shares) < 0.7
    assert len(set(shares)) > 1


def test_another_models_predictions_keep_the_rows_and_say_who_measured(tmp_path: Path) -> None:
    rows = rows_of([1.25 * predictors(MODEL)["ours"](plan) for plan in PLANS])
    earlier = {
        "provenance": {"device": "that one", "command": "measured"},
        "rows": rows,
        "cost_model": "old",
        "format": "f",
    }
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    found = judged_again([tmp_path / "earlier.json"], MODEL)
    assert found["rows"] == rows
    assert found["cost_model"] == MODEL.name
    assert found["provenance"]["layers"]["command"] == "measured"
    assert found["plans"]["ours"]["mape"] == pytest.approx(0.2)


def test_parts_of_several_records_make_one() -> None:
    step: Row = {"group": "decode_step", "model": "llama3-8b", "batch": 8, "kv_tokens": 8192, "seconds": 1.0}
    first = {"rows": [*rows_of([1.0] * len(PLANS)), step], "provenance": {"device": "first"}}
    second = {"rows": [step | {"seconds": 2.0}], "provenance": {"device": "second"}}
    both = joined([first, second])
    assert [row["seconds"] for row in both["rows"]] == [2.0] + [1.0] * len(PLANS)
    assert {part: own["device"] for part, own in both["provenance"].items()} == {"layers": "first", "decode": "second"}
    assert joined([both, second])["provenance"] == both["provenance"]
    assert plan_summary([step], MODEL) == {"num_plans": 0}
    assert parts_of("decode,layers,decode") == ("decode", "layers")
    with pytest.raises(SpecError, match=r"decode, fused, layers, prefill, but got 'layer'\. Did you mean"):
        parts_of("layer")


def test_rows_are_written_as_they_come_fused_steps_first_and_long_prompts_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[str] = []

    def runs_of(group: str) -> Callable[..., Iterator[Row]]:
        def runs(_: object, *what: Any) -> Iterator[Row]:
            for one in what[-1]:
                groups.append(group)
                yield {"group": group, "what": str(one), "seconds": 1.0, "spread": 0.0}

        return runs

    monkeypatch.setattr(cost, "RandomLlama", lambda *_: None)
    monkeypatch.setattr(cost, "Bench", lambda *_, **settings: Bench("cpu", "triton", torch.float32))
    monkeypatch.setattr(cost, "held_out_plans", lambda per_shape: [])
    monkeypatch.setattr(cost, "provenance", lambda commands: {"command": commands})
    for name, group in (("fused_runs", "fused_step"), ("prefill_runs", "prefill"), ("decode_runs", "decode_step")):
        monkeypatch.setattr(cost, name, runs_of(group))
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["cost", "--json", str(out), "--cost-model", "h200", "--unjudged"])
    cost.main()
    written = json.loads(out.read_text())["rows"]
    assert [row["group"] for row in written] == groups
    assert list(dict.fromkeys(groups)) == ["fused_step", "prefill", "decode_step"]
    assert groups[-1] == "prefill"
    assert [row["what"] for row in written if row["group"] == "prefill"][-2:] == ["(131072, 0)", "(65536, 0)"]
