"""What decoding loses under windows and under Quest's choices: the record, and the plans that are compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import kendalltau
from transformers import PreTrainedModel

from sparsesearch.bench.decode_quality import FAMILIES, FORMAT, family_space, plans_of
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import load_cost_model
from sparsesearch.planning import Question
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace
from sparsesearch.workload import Workload

RECORD: dict[str, Any] = json.loads(
    Path("tests/golden/quality/needle-7m-decoding-cpu.json").read_text(encoding="utf-8")
)
ROWS = {(row["family"], row["share"]): row for row in RECORD["rows"]}
SHARES = sorted({share for _, share in ROWS})


def test_the_record_says_how_it_was_made() -> None:
    assert RECORD["format"] == FORMAT
    assert RECORD["profile"]["space"] == "mixture_served"
    assert RECORD["provenance"]["command"].startswith("python -m sparsesearch.bench.decode_quality")
    assert set(ROWS) == {(family, share) for family in FAMILIES for share in SHARES}


def test_predicted_losses_rank_measured_ones_and_have_their_size() -> None:
    """Over four decades; where hundredths of a nat are lost, errors of heads add up to twice what the sum over heads says."""
    predicted, measured = ([row[name] for row in RECORD["rows"]] for name in ("predicted_kl", "kl_text"))
    means = [found["mean"] for found in measured]
    assert kendalltau(predicted, means).statistic >= 0.9
    assert max(means) / min(means) > 1e4
    for expected, found in zip(predicted, means, strict=True):
        assert 0.7 < found / expected < 2.3


@pytest.mark.parametrize("share", SHARES)
def test_both_families_together_lose_no_more_than_either(share: float) -> None:
    """Predicted: exactly. Measured: the same plan as the better family's, or a lower mean."""
    both, *each = (ROWS[family, share] for family in FAMILIES)
    for one in each:
        assert both["loss"] <= one["loss"] + 1e-12
        assert both["tpot_share"] <= share
        assert both["kl_text"]["mean"] <= one["kl_text"]["mean"]


def test_choices_are_taken_where_they_are_best() -> None:
    """At a fifth of the time one KV head chooses, and measured less is lost; heads that only choose still find the needle there."""
    assert ROWS["windows and choices", 0.2]["kv_heads_that_choose"] == 1
    assert ROWS["windows and choices", 0.2]["kl_text"]["mean"] < ROWS["windows", 0.2]["kl_text"]["mean"]
    assert ROWS["choices", 0.2]["needle"]["mean"] == RECORD["dense_needle"]["mean"] == 1.0


def test_families_are_parts_of_one_space(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model, length = tiny("llama"), 192
    generator, answers = torch.Generator().manual_seed(0), torch.arange(length) >= length - 3
    samples = tuple(Sample(torch.randint(0, 64, (length,), generator=generator), answers, "tests") for _ in range(2))
    request = Request(
        describe(model, "tiny"), SearchSpace.load("decoding"), {length: Calibration(samples, "tests")}, num_probes=2
    )
    profile: Profile = profile_model(model, request, tmp_path / "profile")
    sizes = {family: len(family_space(profile, family).candidates) for family in FAMILIES}
    assert sizes == {"windows and choices": 13, "windows": 8, "choices": 6}
    question = Question(
        (),
        granularity="kv_group",
        decode="separate",
        cost_model=load_cost_model("roofline:h200"),
        workloads=(Workload(length, 8),),
    )
    found = {name: predicted for name, _, predicted in plans_of(profile, question, [0.1, 0.9])}
    assert not {name for name in found if name.startswith("choices, 0.1")}, "bounds and two blocks are more than that"
    for family in FAMILIES[1:]:
        assert found["windows and choices, 0.9"]["loss"] <= found[f"{family}, 0.9"]["loss"]
    assert found["windows, 0.9"]["kv_heads_that_choose"] == 0
    assert found["choices, 0.9"]["predicted_kl"] >= 0
