"""The whole evaluation on the embedded model, and the file that keeps it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded_model import embedded, silence, silencing
from transformers import PreTrainedModel

from sparsesearch import calibration
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.evaluate import Metrics
from sparsesearch.evaluate.run import evaluate
from sparsesearch.evaluate.tasks import lm_eval_tasks

LAST_LAYER = [(7, head) for head in range(8)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    torch.set_num_threads(1)
    model, tokenizer = embedded()
    return evaluate(
        model,
        tokenizer,
        {"one": silencing((1, 3)), "last": silencing(*LAST_LAYER)},
        lengths=[256, 192],
        num_sequences=9,
        num_needles=1,
        timing_rounds=3,
        apply=silence,
        command="the test",
    )


def test_evaluation_ranks_dense_little_and_much_damage(metrics: Metrics) -> None:
    """Silencing the last layer, where the retrieval heads are, must ruin what silencing one head does not."""
    for length in (192, 256):
        dense, one, last = (metrics.at(length, name) for name in ("dense", "one", "last"))
        assert dense.needle.mean >= 0.9
        assert last.needle.mean <= dense.needle.mean - 0.5
        assert last.needle_minus_dense.mean == pytest.approx(last.needle.mean - dense.needle.mean)
        assert dense.kl_text.mean == 0.0
        assert 0 < one.kl_text.mean < last.kl_text.mean
        assert dense.heldout_loss.mean < last.heldout_loss.mean
        assert dense.heldout_loss_minus_dense.mean == 0.0
        assert last.heldout_loss_minus_dense.mean == pytest.approx(last.heldout_loss.mean - dense.heldout_loss.mean)
        assert 1 == dense.top1_agreement.mean > one.top1_agreement.mean > last.top1_agreement.mean
        assert [dense.density, one.density, last.density] == [1.0, 63 / 64, 56 / 64]


def test_evaluation_counts_every_sequence_once(metrics: Metrics) -> None:
    cell = metrics.at(256, "one")
    assert cell.needle.num_sequences == cell.kl_text.num_sequences == 9
    assert {name: part.num_sequences for name, part in cell.needle_by_template.items()} == dict.fromkeys(
        calibration.TEMPLATES, 3
    )
    assert sum(part.num_sequences for part in cell.needle_by_depth.values()) == 9
    assert len(cell.prefill_runs_s) == 3
    assert cell.prefill_s == sorted(cell.prefill_runs_s)[1]
    assert metrics.slowdown(256, "dense") == 1.0
    assert metrics.provenance["command"] == "the test"
    assert len(metrics.data) == 8


def test_depths_asked_for_are_the_depths_judged() -> None:
    model, tokenizer = embedded()
    found = evaluate(
        model,
        tokenizer,
        {},
        lengths=[256],
        num_sequences=6,
        num_needles=1,
        depths=[0.1, 0.9],
        timing_rounds=0,
        apply=silence,
    )
    by_depth = found.at(256, "dense").needle_by_depth
    assert {name: part.num_sequences for name, part in by_depth.items()} == {"0-0.2": 3, "0.8-1": 3}
    assert found.at(256, "dense").prefill_s is None


def test_same_seed_same_metrics_and_a_file_keeps_them(metrics: Metrics, tmp_path: Path) -> None:
    model, tokenizer = embedded()

    def judge() -> Metrics:
        return evaluate(
            model,
            tokenizer,
            {"one": silencing((1, 3))},
            lengths=[256],
            num_sequences=3,
            num_needles=1,
            timing_rounds=0,
            apply=silence,
        )

    assert judge() == judge()
    metrics.save(tmp_path / "metrics.json")
    assert Metrics.load(tmp_path / "metrics.json") == metrics


def test_a_damaged_metrics_file_is_refused(metrics: Metrics, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    metrics.save(path)
    text = path.read_text()
    path.write_text(text.replace('"mean": 1.0', '"mean": 0.5', 1))
    with pytest.raises(ArtifactError, match="checksum"):
        Metrics.load(path)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match="breaks off"):
        Metrics.load(path)
    path.write_text(json.dumps({**json.loads(text), "schema_version": "2.0"}))
    with pytest.raises(ArtifactError, match=r"schema_version 2\.0"):
        Metrics.load(path)


def test_a_plan_may_not_be_called_dense() -> None:
    model, tokenizer = embedded()
    with pytest.raises(SpecError, match="no plan may be called 'dense'"):
        evaluate(model, tokenizer, {"dense": silencing()}, lengths=[256], apply=silence)
    with pytest.raises(SpecError, match="at least one length"):
        evaluate(model, tokenizer, {}, lengths=[], apply=silence)


def test_unknown_cells_name_the_known_ones(metrics: Metrics) -> None:
    with pytest.raises(SpecError, match=r"\[192, 256\]"):
        metrics.at(1024, "one")
    with pytest.raises(SpecError, match="Did you mean 'last'"):
        metrics.at(256, "lost")


def test_lm_eval_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = embedded()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SpecError, match=r"pip install 'sparsesearch\[lm-eval\]'"):
        lm_eval_tasks(model, tokenizer, {}, ["hellaswag"], apply=silence)


def test_lm_eval_runs_dense_and_every_plan_on_the_live_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper must score the model while the plan is on it."""
    model, tokenizer = embedded()
    ids = calibration.load("text", tokenizer, length_tokens=64, num_samples=1, seed=0).samples[0].input_ids[None]

    class Harness:
        @staticmethod
        def simple_evaluate(*, model: Any, tasks: list[str], **_: Any) -> dict[str, Any]:
            with torch.no_grad():
                return {"results": {tasks[0]: {"loss": model.pretrained(input_ids=ids, labels=ids).loss.item()}}}

    class Wrappers:
        class HFLM:
            def __init__(self, *, pretrained: PreTrainedModel, **_: Any) -> None:
                self.pretrained = pretrained

    monkeypatch.setitem(sys.modules, "lm_eval", Harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", Wrappers)
    found = lm_eval_tasks(model, tokenizer, {"last": silencing(*LAST_LAYER)}, ["words"], apply=silence)
    assert list(found) == ["dense", "last"]
    assert found["last"]["words"]["loss"] > found["dense"]["words"]["loss"]
