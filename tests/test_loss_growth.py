"""Losses beyond the profiled lengths: they grow with what is left out, and what was never left out is not chosen."""

from dataclasses import replace

import numpy as np
import pytest

from sparsesearch.cost import load_cost_model
from sparsesearch.loss_growth import beyond, decode_growth, prefill_growth
from sparsesearch.planning import Question, find_choice, write_plan
from sparsesearch.presets import preset_path
from sparsesearch.pricing import Pricer
from sparsesearch.profiling.proxies import length_terms
from sparsesearch.profiling.record import Profile
from sparsesearch.scoring import score_table
from sparsesearch.search.budget import parse_budgets
from sparsesearch.workload import Workload, parse_workloads


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Of 2048 tokens; among its candidates are windows of up to 4096 and shares of the sequence."""
    return Profile.load(preset_path("profiles", "needle-7m"))


@pytest.fixture(scope="module")
def pricer(profile: Profile) -> Pricer:
    return Pricer(profile, "kv_group")


def column(profile: Profile, label: str) -> int:
    return profile.labels.index(label)


def test_a_window_loses_in_proportion_to_the_tiles_it_leaves_out(profile: Profile, pricer: Pricer) -> None:
    growth = prefill_growth(pricer, [8192])
    window = column(profile, "sink_window(sink=64,window=1024)")
    skipped = [1 - pricer.tiles(length)[0, window] / pricer.tiles(length)[0, 0] for length in (2048, 8192)]
    assert growth[0, window] == pytest.approx(skipped[1] / skipped[0])
    assert 3 < growth[0, window] < 5
    assert (growth >= 1).all()
    share = column(profile, "sink_window(sink=64,window=0.25N)")
    assert growth[0, share] == pytest.approx(1, abs=0.1), "the same share of a longer prompt"
    assert (growth[:, 0] == 1).all()


def test_what_left_nothing_out_is_unknown_where_it_does(profile: Profile, pricer: Pricer) -> None:
    window = column(profile, "sink_window(sink=64,window=2048)")
    terms = length_terms(profile, 2048, "kv_group")
    assert (terms.tiles[:, window] == terms.tiles[:, 0]).all()
    assert np.isinf(prefill_growth(pricer, [8192])[:, window]).all()
    assert (prefill_growth(pricer, [2048])[:, window] == 1).all()
    assert np.isinf(decode_growth(pricer, [Workload(2048, 6144)])[:, window]).all()
    assert (decode_growth(pricer, [])[:, window] == 1).all()
    windows = [column(profile, f"sink_window(sink=64,window={tokens})") for tokens in (128, 512, 1024)]
    grown = decode_growth(pricer, [Workload(8192, 256)])[0, windows]
    kept = np.array([192, 576, 1088])
    assert grown == pytest.approx((1 - kept / 8448) / (1 - kept / 2048), rel=0.02)


@pytest.mark.parametrize("served", ["prompt=32768,batch=8", "prompt=2048,generate=8192", "prompt=4096"])
def test_no_plan_for_longer_prompts_is_free(profile: Profile, served: str) -> None:
    """A window of what was profiled loses nothing there, and would be the search's choice everywhere."""
    asked = Question(
        parse_budgets("latency=0.8x"), granularity="kv_group", cost_model=load_cost_model("roofline:h100"),
        workloads=parse_workloads([served]), dtype_bytes=2,
    )  # fmt: skip
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert solution.loss > 1e-8
    assert not table.valid[:, column(profile, "sink_window(sink=64,window=2048)")].any()
    assert "measured up to 2048 tokens" in plan.provenance["losses"]
    longest = max(rule.window.a for rule in plan.rules.values() if rule.kind == "sink_window")  # type: ignore[attr-defined]
    assert longest < 2048


def test_profiled_lengths_and_what_is_near_them_stay_as_measured(profile: Profile) -> None:
    assert beyond(profile, (1, 2048, 2560, 2561, 100_000, 2561)) == (2561, 100_000)
    asked = Question(parse_budgets("density=0.3"), granularity="kv_group")
    plain = score_table(profile, asked)
    near = score_table(profile, replace(asked, workloads=parse_workloads(["prompt=2048,generate=256", "prompt=256"])))
    assert (plain.loss == near.loss).all()
    assert plain.valid.all()
    window = column(profile, "sink_window(sink=64,window=2048)")
    assert (plain.loss[:, window] == 0).all(), "rounding is not a loss"
