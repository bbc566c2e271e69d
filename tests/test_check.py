"""The gate: which figures fail it, what it writes for machines, and that a worse plan on the real model does not pass."""

from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from embedded_model import embedded, silence, silencing

from sparsesearch.check import _repeated_suite, baseline_variant, check, judge, repeated_sequences
from sparsesearch.check_result import CheckResult, Thresholds
from sparsesearch.errors import PlanMismatchError, RegressionError, SpecError
from sparsesearch.evaluate import Metrics, SuiteSpec
from sparsesearch.runtime.live import apply

LAST_LAYER = [(7, head) for head in range(8)]


def _cell(needle: float = 1.0, loss: float = 2.0, kl: float = 0.0, prefill_s: float | None = 1.0) -> dict[str, Any]:
    def estimate(mean: float, error: float = 0.01) -> dict[str, Any]:
        return {"mean": mean, "standard_error": error, "num_sequences": 96}

    return {
        "density": 0.25,
        "heldout_loss": estimate(loss),
        "heldout_loss_minus_dense": estimate(loss - 2.0),
        "kl_text": estimate(kl, 0.001),
        "kl_answer": estimate(kl, 0.001),
        "top1_agreement": estimate(0.95),
        "needle": estimate(needle),
        "needle_minus_dense": estimate(needle - 1.0),
        "needle_by_template": {},
        "needle_by_depth": {},
        "prefill_s": prefill_s,
    }


def _metrics(length: int = 1024, sha256: str = "0", **plan: Any) -> Metrics:
    results = {length: {"dense": _cell(), "plan": _cell(**plan)}}
    return Metrics.model_validate(
        {"model": "m", "results": results, "plans": {"plan": sha256}, "data": {}, "provenance": {}}
    )


def _judged(thresholds: Thresholds | None = None, **plan: Any) -> CheckResult:
    return judge(_metrics(**plan), "plan", thresholds or Thresholds())


def _failed(result: CheckResult) -> list[str]:
    return [row.figure for row in result.failed]


@pytest.mark.parametrize(
    ("thresholds", "plan", "failed"),
    [
        ({}, {"needle": 0.98}, []),
        ({}, {"needle": 0.979}, ["needle accuracy"]),
        ({}, {"loss": 2.0 / 0.98}, []),
        ({}, {"loss": 2.05}, ["held-out loss"]),
        ({"recovery": 0.9}, {"needle": 0.91, "loss": 2.2}, []),
        ({"recovery": None, "max_kl": 1.0}, {"needle": 0.0, "loss": 9.0}, []),
        ({"max_kl": 0.025}, {"kl": 0.025}, []),
        ({"max_kl": 0.025}, {"kl": 0.026}, ["KL to dense"]),
        ({"max_slowdown": 1.05}, {"prefill_s": 1.05}, []),
        ({"max_slowdown": 1.05}, {"prefill_s": 1.06}, ["prefill time / dense"]),
        ({"max_kl": 0.1}, {"needle": 0.5, "loss": 3.0, "kl": 0.2}, ["needle accuracy", "held-out loss", "KL to dense"]),
    ],
)
def test_bounds_relative_to_dense(thresholds: dict[str, Any], plan: dict[str, Any], failed: list[str]) -> None:
    assert _failed(_judged(Thresholds(**thresholds), **plan)) == failed


@pytest.mark.parametrize(
    ("plan", "failed"),
    [
        ({"kl": 0.020 + 2 * 0.001 * 2**0.5}, []),
        ({"kl": 0.0229}, ["KL to dense", "KL to dense at answers"]),
        ({"needle": 0.972}, []),
        ({"needle": 0.971}, ["needle accuracy"]),
        ({"loss": 2.028}, []),
        ({"loss": 2.029}, ["held-out loss above dense"]),
    ],
)
def test_a_baseline_allows_two_standard_errors_of_the_difference(plan: dict[str, Any], failed: list[str]) -> None:
    """Errors of 0.01 each: 2·√(0.01² + 0.01²) = 0.0283; KL's are a tenth of that."""
    baseline = _metrics(kl=0.020)
    result = judge(
        _metrics(**{"kl": 0.020, **plan}), "plan", Thresholds(recovery=None), baseline=baseline, baseline_name="plan"
    )
    assert _failed(result) == failed


def test_a_check_repeats_the_baselines_sequences() -> None:
    """A few sequences of a heavy-tailed figure say nothing of the mean over many: a plan would fail its own baseline."""
    plan = silencing()
    baseline = _metrics()
    assert repeated_sequences(None, plan) == 48
    assert repeated_sequences(baseline, plan) == 48, "not all 96"
    cells = baseline.model_dump(mode="json")
    for cell in cells["results"]["1024"].values():
        cell["needle"]["num_sequences"] = 8
    assert repeated_sequences(Metrics.model_validate(cells), plan) == 8


def test_a_baseline_of_other_lengths_is_refused() -> None:
    with pytest.raises(SpecError, match=r"must share a length.*\[2048\].*\[1024\]"):
        judge(_metrics(), "plan", Thresholds(), baseline=_metrics(length=2048), baseline_name="plan")


def test_a_baseline_of_other_lengths_is_refused_before_anything_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsesearch.check.evaluate", lambda *_, **__: pytest.fail("hours of work"))
    model, tokenizer = embedded()
    with pytest.raises(SpecError, match=r"must share a length.*\[2048\].*\[512\]"):
        check(silencing(), model, tokenizer, baseline=_metrics(length=2048), lengths=[512])


def test_a_baseline_of_other_tokens_is_refused() -> None:
    """Another tokenizer makes other data of the same description; another number of sequences is only less certain."""
    mine, theirs, more = (
        _metrics().model_copy(update={"data": data})
        for data in ({"text, 8 x 1024 tokens": "a"}, {"text, 8 x 1024 tokens": "b"}, {"text, 48 x 1024 tokens": "c"})
    )
    with pytest.raises(PlanMismatchError, match=r"'text, 8 x 1024 tokens' holds other tokens.*recorded with 'm'"):
        judge(mine, "plan", Thresholds(), baseline=theirs, baseline_name="plan")
    for baseline in (mine, more):
        assert judge(mine, "plan", Thresholds(), baseline=baseline, baseline_name="plan").passed


def test_needles_that_dense_hardly_answers_are_said_to_say_little() -> None:
    metrics = _metrics(needle=0.2)
    results = {1024: {"dense": _cell(needle=0.2), "plan": _cell(needle=0.2)}}
    mute = Metrics.model_validate(metrics.model_dump(mode="json") | {"results": results})
    found = judge(mute, "plan", Thresholds())
    assert found.passed
    assert found.needles_say_little
    assert found.rows[0].reason == "0.98 of dense, whose 0.2 says little"
    assert not _judged().needles_say_little


def test_time_must_be_measured_to_be_bounded() -> None:
    with pytest.raises(SpecError, match="timing_rounds >= 1"):
        _judged(Thresholds(max_slowdown=1.0), prefill_s=None)


def test_a_gate_without_bounds_is_refused() -> None:
    with pytest.raises(SpecError, match="must have a bound"):
        _judged(Thresholds(recovery=None))


def test_a_suite_must_repeat_what_the_baseline_judged() -> None:
    recorded = SuiteSpec(tasks=("needle", "tracking"), format="chat")
    assert _repeated_suite(None, recorded) == recorded
    wider = SuiteSpec(tasks=("needle", "tracking", "kv_recall"), format="chat", num_sequences=48)
    assert _repeated_suite(wider, recorded) == wider
    assert _repeated_suite(wider, None) == wider
    with pytest.raises(SpecError, match="leaves out tracking"):
        _repeated_suite(SuiteSpec(tasks=("needle",), format="chat"), recorded)
    with pytest.raises(SpecError, match="--format must be the baseline's, chat"):
        _repeated_suite(SuiteSpec(tasks=("needle", "tracking")), recorded)


def test_a_model_that_runs_the_plan_is_no_dense_to_compare_with() -> None:
    model, tokenizer = embedded()
    plan = silencing(*LAST_LAYER)
    with apply(model, plan), pytest.raises(SpecError, match="must run dense"):
        check(plan, model, tokenizer, lengths=[128], num_sequences=3, num_needles=1, timing_rounds=0)


def test_the_baselines_variant_is_found_by_hash_name_or_being_alone() -> None:
    plan = silencing((0, 0))
    base = _metrics()

    def with_plans(**plans: str) -> Metrics:
        return base.model_copy(update={"plans": plans})

    assert baseline_variant(with_plans(ours=plan.sha256, plan="1", other="2"), plan) == "ours"
    assert baseline_variant(with_plans(plan="1", other="2"), plan) == "plan"
    assert baseline_variant(with_plans(other="2"), plan) == "other"
    with pytest.raises(SpecError, match=r"\['a', 'b'\]"):
        baseline_variant(with_plans(a="1", b="2"), plan)


def test_a_regression_is_an_error_with_exit_code_4_that_lists_all() -> None:
    _judged().raise_if_failed()
    with pytest.raises(
        RegressionError, match=r"2 of 2 bounds do not hold:\n.*needle accuracy.*\n.*held-out loss"
    ) as caught:
        _judged(needle=0.5, loss=3.0).raise_if_failed()
    assert caught.value.exit_code == 4


def test_junit_has_one_case_per_bound_and_says_what_failed() -> None:
    result = _judged(Thresholds(max_kl=0.1), kl=0.2)
    suite = ElementTree.fromstring(result.junit_xml()).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    cases = suite.findall("testcase")
    assert len({case.get("name") for case in cases}) == 3
    (failure,) = [case.find("failure") for case in cases if case.find("failure") is not None]
    assert "0.2 <= 0.1 DOES NOT HOLD" in str(failure.get("message"))


def test_annotations_are_escaped_workflow_commands() -> None:
    (line,) = _judged(needle=0.5).annotations("profiles/a,b:c.json")
    assert line.startswith("::error file=profiles/a%2Cb%3Ac.json,title=sparsesearch%3A needle accuracy::")
    assert "\n" not in line
    assert _judged().annotations() == ["::notice title=sparsesearch check::all 2 bounds hold"]


def test_a_worse_plan_fails_the_gate_that_a_good_one_passes() -> None:
    """On the model itself: silencing the last layer's heads against silencing one head that does little."""
    torch.set_num_threads(1)
    model, tokenizer = embedded()
    settings: dict[str, Any] = {
        "lengths": [256], "num_sequences": 9, "num_needles": 1, "timing_rounds": 0, "apply": silence,
    }  # fmt: skip
    good, worse = silencing((1, 3)), silencing(*LAST_LAYER)
    recorded = check(good, model, tokenizer, thresholds=Thresholds(recovery=0.9), **settings)
    assert recorded.passed
    result = check(worse, model, tokenizer, baseline=recorded.metrics, thresholds=Thresholds(recovery=0.9), **settings)
    figures = _failed(result)
    assert {"needle accuracy", "held-out loss", "KL to dense"} <= set(figures)
    with pytest.raises(RegressionError):
        result.raise_if_failed()


def test_a_check_runs_at_the_baselines_lengths_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def evaluated(*_: Any, lengths: Any, **__: Any) -> Metrics:
        asked["lengths"] = lengths
        return _metrics(length=777)

    monkeypatch.setattr("sparsesearch.check.evaluate", evaluated)
    model, tokenizer = embedded()
    check(silencing(), model, tokenizer, baseline=_metrics(length=777))
    assert asked["lengths"] == (777,)
    check(silencing(), model, tokenizer)
    assert asked["lengths"] == (256, 512)
