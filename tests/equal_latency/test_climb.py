"""Budgets move until measured times meet: on ladders whose true times are known, with and without steps, noise and ends."""

import random
from collections.abc import Callable, Mapping

import pytest

from sparsesearch.equal_latency.climb import Near, Rung, Times, climb, shares_of
from sparsesearch.equal_latency.settle import Search, Setting
from sparsesearch.plan import BaseModelInfo, Plan, uniform_plan
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow

INFO = BaseModelInfo(
    name_or_path="x", model_type="llama", modules=("a",), num_heads=(1,), num_kv_heads=(1,), head_dim=(8,)
)


def plan_of(width: int) -> Plan:
    rule = SinkWindow(sink=0, window=LengthLaw(a=max(1, width)))
    return uniform_plan(INFO, rule, block_tokens=1, lengths_tokens=(1000,))


def width_of(plan: Plan) -> int:
    (rule,) = plan.rules.values()
    assert isinstance(rule, SinkWindow)
    return rule.window.tokens(1000)


class Steps:
    """Plans of `count` widths; a bound takes the widest that it allows."""

    def __init__(self, count: int, lowest: float = 0.01) -> None:
        self.count, self.lowest, self.asked = count, lowest, 0

    def at(self, bound: float) -> Plan:
        self.asked += 1
        return plan_of(int(max(bound, self.lowest) * self.count) * 1000 // self.count)


class Clock:
    """True time of a width of w thousandths: the given curve, times noise, times a drift that dense shares."""

    def __init__(self, curve: Callable[[float], float], noise: float = 0.0) -> None:
        self.curve, self.noise, self.rng, self.measured = curve, noise, random.Random(0), 0

    def __call__(self, plans: Mapping[str, Plan | None]) -> Times:
        drift = self.rng.uniform(0.5, 2.0)
        self.measured += len(plans) - 1

        def once(plan: Plan | None) -> float:
            true = 1.0 if plan is None else self.curve(width_of(plan) / 1000)
            return drift * true * self.rng.uniform(1 - self.noise, 1 + self.noise)

        return {name: [once(plan) for _ in range(5)] for name, plan in plans.items()}


@pytest.mark.parametrize("curve", [lambda w: 0.1 + 0.8 * w, lambda w: w**0.5, lambda w: w**2, lambda w: 0.3 + 0.1 * w])
def test_measured_time_meets_the_target_whatever_the_model_erred(curve: Callable[[float], float]) -> None:
    target, clock = curve(0.37), Clock(curve)
    found = climb({"fine": Steps(1000)}, target, clock, near=Near(0.01))
    assert abs(found["fine"].share / target - 1) <= 0.01
    assert clock.measured <= 8


def test_noise_within_the_tolerance_does_not_keep_it_from_ending() -> None:
    found = climb({"noisy": Steps(1000)}, 0.5, Clock(lambda w: 0.2 + 0.7 * w, noise=0.01), near=Near(0.02))
    assert abs(found["noisy"].share / 0.5 - 1) <= 0.02


def test_coarse_families_give_way_to_the_others() -> None:
    ladders = {"ours": Steps(4, 0.25), "theirs": Steps(4, 0.25)}
    clock = Clock(lambda w: w)
    found = climb(ladders, 0.6, clock, favoured=("ours",), most_tries=20)
    assert found["ours"].share == pytest.approx(0.5)
    assert found["theirs"].share == pytest.approx(0.75)
    assert clock.measured <= 6, "steps are not measured twice"


def test_a_family_that_cannot_be_as_fast_stays_at_its_fastest_plan() -> None:
    found = climb({"slow": Steps(1000, lowest=0.3)}, 0.2, Clock(lambda w: w))
    assert found["slow"].share == pytest.approx(0.3, rel=0.01)


def test_a_family_that_cannot_be_as_slow_stays_at_its_slowest_plan() -> None:
    found = climb({"fast": Steps(1000)}, 0.9, Clock(lambda w: 0.5 * w))
    assert found["fast"].share == pytest.approx(0.5)


def test_shares_are_medians_over_medians() -> None:
    assert shares_of({"dense": [2.0, 2.0, 9.0], "a": [1.0, 1.0, 0.1]})["a"][0] == 0.5
    assert shares_of({"dense": [2.0, 2.0, 2.0], "a": [1.0, 1.0, 1.0]})["a"] == (0.5, 0.0)


def test_a_family_moves_only_while_it_is_known_to_be_off() -> None:
    """A host with ten per cent of noise cannot tell one per cent: most families that begin at the target stay there."""
    begin = {f"family {number}": (0.5 - 0.2) / 0.7 for number in range(40)}

    def measured(near: Near) -> int:
        noisy = Clock(lambda w: 0.2 + 0.7 * w, noise=0.1)
        climb({name: Steps(1000) for name in begin}, 0.5, noisy, start=begin, near=near)
        return noisy.measured

    assert measured(Near(0.01, num_errors=2)) < 2 * len(begin) < measured(Near(0.01))
    plan = Steps(1000).at(0.5)
    noisy, sharp, faster = Rung(0.5, plan, 0.535, 0.02), Rung(0.5, plan, 0.535, 0.001), Rung(0.5, plan, 0.3, 0.001)
    assert Near(0.01, num_errors=2).holds(noisy, 0.5)
    assert Near(0.01, num_errors=2).as_fast(noisy, 0.5)
    assert not Near(0.01, num_errors=2).holds(sharp, 0.5)
    assert not Near(0.01, num_errors=2).as_fast(sharp, 0.5)
    assert Near(0.01).as_fast(sharp, 0.5, times=7.5)
    assert not Near(0.01).holds(noisy, 0.5)
    assert not Near(0.01).holds(faster, 0.5)
    assert Near(0.01).as_fast(faster, 0.5)


def test_past_the_deadline_the_nearest_known_plan_stands() -> None:
    clock = Clock(lambda w: 0.3 + 0.7 * w)
    found = climb({"a": Steps(1000), "b": Steps(500)}, 0.5, clock, near=Near(1e-6), deadline=0.0)
    assert set(found) == {"a", "b"}
    assert clock.measured == 2, "one measurement each"


def test_of_several_joint_measurements_the_one_nearest_to_the_target_stands() -> None:
    """While budgets move the clock is right; the measurements of all plans together are off by 3, 2 and 5 per cent."""
    off, joint = iter([1.03, 0.98, 1.05]), []

    def stopwatch(plans: Mapping[str, Plan | None], *, rounds: int, **_: object) -> Times:
        by = next(off) if rounds == 9 else 1.0
        joint.extend([by] if rounds == 9 else [])
        return {name: [1.0 if plan is None else by * width_of(plan) / 1000] * 3 for name, plan in plans.items()}

    setting = Setting((0.5,), ("ours", "theirs"), rounds=1, final_rounds=9)
    search = Search({"ours": Steps(1000), "theirs": Steps(1000)}, stopwatch, setting, None, lambda *_: None)  # type: ignore[arg-type]
    found = search.settled(0.5, {})
    assert joint == [1.03, 0.98, 1.05]
    for name in setting.families:
        assert abs(found.rungs[name].share / 0.5 - 1) <= 0.03
        assert found.times[name][0] == pytest.approx(found.rungs[name].share)
