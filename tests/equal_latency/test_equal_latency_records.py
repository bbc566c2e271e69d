"""What the committed comparisons claim: at equal measured latency the mixture loses no more than any single family, and less than uniform."""

from pathlib import Path

import pytest

from sparsesearch.equal_latency.record import Entry, EqualLatency
from sparsesearch.measured_front import UNIFORM

FOLDER = Path(__file__).parents[1] / "golden" / "equal_latency"
NAMES = sorted(path.name for path in FOLDER.glob("*.json"))
BEHIND = {("smollm2-h200.json", "MoA")}  # measured before the mixture chose among its rivals' plans; README says so


def rows(name: str) -> list[tuple[float, dict[str, Entry]]]:
    record = EqualLatency.load(FOLDER / name)
    assert record.families[0] == "mixture"
    assert UNIFORM in record.families
    assert len(record.families) >= 4
    return [(float(target), row) for target, row in record.targets.items()]


@pytest.mark.parametrize("name", NAMES)
def test_the_mixture_takes_the_time_it_was_given(name: str) -> None:
    for target, row in rows(name):
        own = row["mixture"]
        assert own.at_target
        assert own.share <= target * 1.02
        assert len(own.rules) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_mixture_loses_no_more_than_any_family_that_is_as_fast(name: str) -> None:
    for _, row in rows(name):
        rivals = {family: one for family, one in row.items() if family != "mixture" and one.at_target}
        assert rivals
        for family, rival in rivals.items():
            if (name, family) in BEHIND:
                assert rival.excess["kl"].mean < 0, "no longer behind: take it off the list"
                continue
            assert rival.excess["kl"].mean >= -rival.excess["kl"].standard_error, family


@pytest.mark.parametrize("name", NAMES)
def test_a_family_off_the_target_is_slower_never_faster(name: str) -> None:
    """What cannot be made as fast shows no loss at equal time; it must not be counted as beaten for being given less."""
    for target, row in rows(name):
        for family, one in row.items():
            assert one.at_target or one.share > target, family


@pytest.mark.parametrize("name", NAMES)
def test_uniform_windows_lose_strictly_more(name: str) -> None:
    """By more than twice the paired standard error, though the window is the next slower one where none meets the target."""
    for target, row in rows(name):
        uniform = row[UNIFORM]
        assert uniform.share >= target * 0.98
        assert uniform.excess["kl"].mean > 2 * uniform.excess["kl"].standard_error > 0


def test_there_are_records() -> None:
    assert NAMES
