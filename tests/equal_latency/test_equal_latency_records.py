"""What the committed comparisons claim: at equal measured latency the mixture loses no more than any single family, and less than uniform."""

from math import hypot
from pathlib import Path

import pytest

from sparsesearch.equal_latency.menus import ANSWERS
from sparsesearch.equal_latency.record import Entry, EqualLatency
from sparsesearch.measured_front import UNIFORM

FOLDER = Path(__file__).parents[1] / "golden" / "equal_latency"
NAMES = sorted(path.name for path in FOLDER.glob("*.json"))


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
    """Within the paired standard error."""
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
            assert rival.excess["kl"].mean >= -rival.excess["kl"].standard_error, family


@pytest.mark.parametrize("name", NAMES)
def test_no_family_is_beaten_for_being_given_less_time(name: str) -> None:
    """Beyond the error of the clock, unless what it loses is out of proportion to a tenth of the time; what cannot be made as fast is slower and
    shows no loss at equal time."""
    for _, row in rows(name):
        own = row["mixture"]
        for family, one in row.items():
            loses_twice_as_much = one.excess["kl"].mean > own.quality.kl_text.mean
            as_slow = one.share >= own.share - timing_error(own, one)
            assert family == ANSWERS or as_slow or (loses_twice_as_much and one.share > 0.9 * own.share), family


@pytest.mark.parametrize("name", NAMES)
def test_uniform_windows_lose_strictly_more(name: str) -> None:
    """By more than twice the paired standard error, though the window is the next slower one where none meets the target."""
    for _, row in rows(name):
        uniform = row[UNIFORM]
        assert uniform.excess["kl"].mean > 2 * uniform.excess["kl"].standard_error > 0


@pytest.mark.parametrize(("name", "least"), [("smollm2-earlier-h200.json", 0.95), ("smollm2-h200.json", 0.92)])
def test_the_mixture_for_answers_keeps_more_of_them_than_any_family(name: str, least: float) -> None:
    """Of the 56 questions that dense answers, at two fifths of its time: 54 before losses were moderated, 52 since; the error is about 2.

    The profile: `sparsesearch profile SmolLM2-135M-Instruct.Q4_1.gguf --block-tokens 128 --lengths 4096 --num-samples 12 --device cuda
    --dtype bfloat16 --data tasks:needle,needle_word,multikey,multikey_word:sentence`.
    """
    ((target, row),) = rows(name)
    assert target == 0.4
    assert set(row[ANSWERS].answered) == {"needle", "needle_word"}

    def kept(entry: Entry) -> float:
        dense = [found.accuracy.mean - found.accuracy_minus_dense.mean for found in entry.answered.values()]
        return sum(found.accuracy.mean for found in entry.answered.values()) / sum(dense)

    assert row[ANSWERS].at_target
    assert row[ANSWERS].share <= 0.4
    assert kept(row[ANSWERS]) >= least
    rivals = {family: kept(entry) for family, entry in row.items() if family not in ("mixture", ANSWERS)}
    assert len(rivals) == 4
    assert max(rivals.values()) < kept(row["mixture"]) < kept(row[ANSWERS])


def test_on_smollm2_no_family_loses_less_at_the_same_time() -> None:
    """All but two within half a per cent of each other's time. MoA's loss over all positions is equal within its error, at answers it is higher by
    more than twice that, and so is the loss by which plans are chosen; every other family loses more over all positions too."""
    ((_, row),) = rows("smollm2-h200.json")
    own = row["mixture"]
    for family in {"MoA", "DuoAttention", ANSWERS}:
        assert row[family].share == pytest.approx(own.share, rel=0.006)
    for family in set(row) - {"mixture", ANSWERS}:
        text, answers = (row[family].excess[loss] for loss in ("kl", "kl_answer"))
        assert text.mean + 0.1 * answers.mean > 0, family
        assert answers.mean > 2 * answers.standard_error > 0, family
        assert family == "MoA" or text.mean > 2 * text.standard_error > 0, family


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
