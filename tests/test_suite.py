"""Judging task by task: the score against an independent count, damage that shows in its own task, and gates per task."""

import pytest
import torch
from embedded_model import embedded, silencing

from sparsesearch.calibration.tasks import task_samples
from sparsesearch.check import check
from sparsesearch.check_result import Thresholds
from sparsesearch.evaluate import SuiteSpec
from sparsesearch.evaluate.run import evaluate
from sparsesearch.evaluate.suite import values_right
from sparsesearch.evaluate.task_metrics import TaskMetrics, retention
from sparsesearch.report import render

SPEC = SuiteSpec(tasks=("needle", "multiquery", "tracking"), num_sequences=3, generate=True)


def test_accuracy_is_what_a_plain_forward_gives() -> None:
    model, tokenizer = embedded()
    metrics = evaluate(model, tokenizer, {}, lengths=[400], num_sequences=1, timing_rounds=0, suite=SPEC)
    for task in SPEC.tasks:
        hits, samples = [], task_samples(tokenizer, task, length_tokens=400, num_samples=3, seed=0)
        for one in samples:
            ids = one.sample.input_ids
            with torch.no_grad():
                predicted = model(ids[None]).logits[0].argmax(-1)
            for segment in one.segments if task != "tracking" else ():
                hits.append(
                    torch.equal(predicted[segment.start - 1 : segment.stop - 1], ids[segment.start : segment.stop])
                )
        cell = metrics.tasks[400][task]["dense"]
        if hits:
            assert cell.accuracy.mean == pytest.approx(sum(hits) / len(hits))
            assert cell.generated is not None
            assert cell.generated.mean == pytest.approx(cell.accuracy.mean, abs=0.35), "free generation says the same"
    assert metrics.tasks[400]["needle"]["dense"].accuracy.mean >= 0.6
    assert metrics.says_little(400, "tracking")
    assert not metrics.says_little(400, "needle")


def test_a_list_may_be_named_in_any_order() -> None:
    _, tokenizer = embedded()
    (one,) = task_samples(tokenizer, "common_words", length_tokens=512, num_samples=1, seed=0)
    places = one.sample.answer_mask.nonzero()[:, 0]
    truth = one.sample.input_ids[places].clone()
    assert values_right(one, truth) == 1
    begins = [index for index, place in enumerate(places) if (one.accepted[place] >= 0).any()]
    other = truth.clone()
    other[begins[0]] = truth[begins[1]]
    assert values_right(one, other) == 1, "another word that is not named yet"
    other = truth.clone()
    other[begins[1]] = truth[begins[0]]
    assert values_right(one, other) == 0.75, "a word that is named already"
    other[begins[0]] = -5
    assert values_right(one, other) == 0.5


def test_a_plan_is_judged_and_gated_task_by_task() -> None:
    model, tokenizer = embedded()
    plans = {"mild": silencing((0, 0)), "plan": silencing(*((layer, head) for layer in range(8) for head in range(8)))}
    spec = SPEC.model_copy(update={"generate": False})
    metrics = evaluate(model, tokenizer, plans, lengths=[400], num_sequences=1, timing_rounds=0, suite=spec)
    cells = metrics.tasks[400]["needle"]
    assert cells["dense"].retention == 1
    assert cells["plan"].accuracy.mean == 0
    assert cells["plan"].retention == 0
    assert cells["plan"].accuracy_minus_dense.mean == -cells["dense"].accuracy.mean
    assert cells["plan"].kl_answer.mean > cells["mild"].kl_answer.mean > cells["dense"].kl_answer.mean == 0
    result = check(
        plans["plan"], model, tokenizer, baseline=metrics, thresholds=Thresholds(), num_sequences=1, timing_rounds=0
    )
    rows = {(row.figure, row.reason.split()[0]): row for row in result.rows}
    assert not rows["task needle", "0.98"].passed
    assert rows["task needle", "baseline"].passed
    assert ("task tracking", "0.98") not in rows, "dense hardly answers it"
    assert ("task tracking", "baseline") in rows


def test_retention_error_is_paired() -> None:
    dense = [1.0, 0.5, 0.75, 1.0]
    assert retention(dense, dense) == (1, 0)
    share, error = retention([0.5 * value for value in dense], dense)
    assert (share, error) == (pytest.approx(0.5), pytest.approx(0))
    assert retention([1.0], [0.0]) == (None, None)
    cell = TaskMetrics.of([1.0, 0.0], [1.0, 1.0], [0.0, 2.0])
    assert cell.retention == 0.5
    assert cell.retention_error == pytest.approx(0.5)
    assert cell.accuracy_minus_dense.mean == -0.5


def test_the_report_shows_every_task() -> None:
    model, tokenizer = embedded()
    plan = silencing((0, 0))
    spec = SPEC.model_copy(update={"generate": False, "num_sequences": 1})
    metrics = evaluate(model, tokenizer, {"plan": plan}, lengths=[400], num_sequences=1, timing_rounds=0, suite=spec)
    page = render(plan, metrics)
    assert "Task by task" in page
    assert "dense answers little" in page.partition("tracking")[2][:60]
    bare = metrics.model_copy(update={"tasks": {}, "suite": None})
    assert "Task by task" not in render(plan, bare)
