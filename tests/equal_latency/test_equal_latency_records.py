"""What the committed comparisons claim: at equal measured latency the mixture loses no more than any single family, and less than uniform."""

from math import hypot
from pathlib import Path

import pytest

from sparsesearch.equal_latency.menus import ANSWERS
from sparsesearch.equal_latency.record import Entry, EqualLatency
from sparsesearch.measured_front import UNIFORM

FOLDER = Path(__file__).parents[1] / "golden" / "equal_latency"
ANSWERED, MULTIKEY = "smollm2-answers-h200.json", "smollm2-multikey-h200.json"
TWO_TARGETS = "smollm2-two-targets-h200.json"
"""Of a run in which any rival's mean at answers, however noisy, barred a plan: the mixture took MoA's at both."""
NAMES = sorted(path.name for path in FOLDER.glob("*.json") if path.name not in (ANSWERED, MULTIKEY))
"""Records that compare the mixture; the others are of plans for answers, found with calibration data of tasks."""


def rows(name: str) -> list[tuple[float, dict[str, Entry]]]:
    record = EqualLatency.load(FOLDER / name)
    assert record.families[0] == "mixture"
    assert UNIFORM in record.families
    assert len(record.families) >= 4
    return [(float(target), row) for target, row in record.targets.items()]


def timing_error(one: Entry, other: Entry) -> float:
    """Twice the standard error of the difference of their shares of dense's time."""
    return 2 * hypot(one.share_error, other.share_error)


@pytest.mark.parametrize("name", NAMES)
def test_the_mixture_takes_no_more_time_than_it_was_given(name: str) -> None:
    for target, row in rows(name):
        own = row["mixture"]
        assert target * 0.97 <= own.share <= target * 1.01
        assert len(own.rules) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_mixture_loses_no_more_than_any_family_that_is_as_fast(name: str) -> None:
    """Over all positions, and in the loss that plans are chosen by."""
    for _, row in rows(name):
        own = row["mixture"]
        rivals = {family: one for family, one in row.items() if family not in ("mixture", ANSWERS)}
        as_fast = {
            family: one
            for family, one in rivals.items()
            if one.at_target or one.share <= own.share + timing_error(own, one)
        }
        assert len(as_fast) >= 2
        for family, rival in as_fast.items():
            assert all(rival.excess[loss].mean >= 0 for loss in ("kl", "loss") if loss in rival.excess), family


@pytest.mark.parametrize("name", NAMES)
def test_no_family_is_beaten_for_being_given_less_time(name: str) -> None:
    """Beyond the error of the clock or the tolerance, unless what it loses is out of proportion to a tenth of the time; what cannot be made as
    fast is slower and shows no loss at equal time."""
    for _, row in rows(name):
        own = row["mixture"]
        for family, one in row.items():
            loses_twice_as_much = one.excess["kl"].mean > own.quality.kl_text.mean
            as_slow = one.at_target or one.share >= own.share - timing_error(own, one)
            assert family == ANSWERS or as_slow or (loses_twice_as_much and one.share > 0.9 * own.share), family


@pytest.mark.parametrize("name", NAMES)
def test_uniform_windows_lose_strictly_more(name: str) -> None:
    """By more than twice the paired standard error, though the window is the next slower one where none meets the target."""
    for _, row in rows(name):
        uniform = row[UNIFORM]
        assert uniform.excess["kl"].mean > 2 * uniform.excess["kl"].standard_error > 0


def kept(entry: Entry) -> float:
    """Right answers over dense's, in the tasks that dense answers at least half of."""
    dense = [found.accuracy.mean - found.accuracy_minus_dense.mean for found in entry.answered.values()]
    return sum(found.accuracy.mean for found in entry.answered.values()) / sum(dense)


def test_plans_for_answers_keep_nineteen_in_twenty_at_two_fifths_of_the_time() -> None:
    """169 for 171 right answers of dense's to 192 questions that no earlier run had seen, the standard error of either task under 3 per cent.

    The profile: `sparsesearch profile SmolLM2-135M-Instruct.Q4_1.gguf --block-tokens 128 --lengths 4096 --num-samples 16 --device cuda
    --dtype bfloat16 --data tasks:needle,needle_word:sentence`. Beside it every single family at the same time: none keeps four in five.
    """
    ((target, row),) = rows(ANSWERED)
    own = row[ANSWERS]
    assert target == 0.4
    assert own.at_target
    assert own.share <= 0.404
    assert set(own.answered) == {"needle", "needle_word"}
    for found in own.answered.values():
        assert found.accuracy.num_sequences == 96
        assert found.retention is not None
        assert found.retention_error is not None
        assert found.retention >= 0.95
        assert found.retention_error < 0.03
    assert kept(own) > 0.98
    rivals = set(row) - {"mixture", ANSWERS}
    assert rivals == {"MoA", "MInference", "DuoAttention", UNIFORM}
    assert max(kept(row[family]) for family in rivals) < 0.8 < kept(row["mixture"])
    assert all(row[family].share > 0.98 * own.share for family in rivals)


def test_calibrated_on_tasks_that_dense_does_not_answer_plans_for_answers_keep_less() -> None:
    """Half of the tasks' sequences were multi-key ones, which dense answers seldom, and the others no tasks at all: 155 for 168, still more than any family."""
    ((_, row),) = rows(MULTIKEY)
    assert set(row[ANSWERS].answered) == {"needle", "needle_word"}
    assert row[ANSWERS].at_target
    assert 0.9 < kept(row[ANSWERS]) < 0.95
    rivals = {family: kept(entry) for family, entry in row.items() if family not in ("mixture", ANSWERS)}
    assert len(rivals) == 4
    assert max(rivals.values()) < kept(row["mixture"]) < kept(row[ANSWERS])


def test_on_smollm2_every_family_loses_more_at_the_same_time() -> None:
    """At two fifths of dense's time, all but MInference within 0.6 per cent of it and the mixture in no more time than MoA; families that are near are
    improved by two steps, on calibration sequences of the wordings that are judged. MoA's KL is 3 per cent higher, its answers are level.
    66 sequences; paired errors."""
    ((target, row),) = rows("smollm2-h200.json")
    own = row["mixture"]
    assert target == 0.4
    assert own.quality.kl_text.num_sequences == 66
    assert own.share <= row["MoA"].share
    for family in ("mixture", "MoA", "DuoAttention", UNIFORM):
        assert row[family].share == pytest.approx(target, rel=0.006)
    for family in set(row) - {"mixture"}:
        for loss in ("kl", "kl_answer", "loss"):
            excess = row[family].excess[loss]
            level = (family, loss) == ("MoA", "kl_answer") and abs(excess.mean) < excess.standard_error
            assert level or excess.mean > 3 * excess.standard_error > 0, (family, loss)
    assert row["MoA"].excess["kl"].mean > 0.03 * own.quality.kl_text.mean


def test_on_smollm2_the_mixture_takes_moas_plan_where_it_knows_none_that_leads() -> None:
    """At half of the time, and in that run at two fifths too: both families' losses are the same, all others' higher. 96 sequences."""
    found = dict(rows(TWO_TARGETS))
    assert set(found) == {0.4, 0.5}
    for target, row in found.items():
        assert row["mixture"].plan_sha256 == row["MoA"].plan_sha256
        assert row["mixture"].quality.kl_text.num_sequences == 96
        for family in ("mixture", "MoA", "DuoAttention"):
            assert row[family].share == pytest.approx(target, rel=0.005)
        assert row[UNIFORM].share == pytest.approx(target, rel=0.015)
        for loss in ("kl", "kl_answer", "loss"):
            assert row["MoA"].excess[loss].mean == 0
            for family in ("MInference", "DuoAttention", UNIFORM):
                excess = row[family].excess[loss]
                assert excess.mean > 3 * excess.standard_error > 0, (family, loss)


def test_on_random_weights_in_the_8b_shape_the_mixture_beats_every_family() -> None:
    """By more than twice the paired standard error, in both losses, in no more time."""
    ((target, row),) = rows("llama3-8b-h200.json")
    assert target == 0.5
    for family in set(row) - {"mixture"}:
        for loss in ("kl", "kl_answer"):
            excess = row[family].excess[loss]
            assert excess.mean > 2 * excess.standard_error > 0, (family, loss)


def test_on_random_weights_in_the_8b_shape_minference_is_slower_and_loses_more() -> None:
    """A later run, in which a limit of 50 s ended the search for equal times: MoA took two per cent more time than the mixture, whose loss over
    all positions is then the same within the error, and less at answers; DuoAttention, 6 per cent faster, loses 2.5 times as much."""
    ((target, row),) = rows("llama3-8b-minference-h200.json")
    assert target == 0.5
    assert row["MInference"].share > 0.8
    for family in set(row) - {"mixture"}:
        for loss in ("kl", "kl_answer", "loss"):
            excess = row[family].excess[loss]
            assert excess.mean > 2 * excess.standard_error > 0 or ((family, loss) == ("MoA", "kl") and excess.mean > 0)


def test_there_are_records_of_all_three_models() -> None:
    assert {name.removesuffix("-h200.json") for name in NAMES} >= {"needle-7m", "smollm2", "llama3-8b"}
