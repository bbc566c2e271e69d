"""Two calls that take turns: each time belongs to its own call, and the turns alternate."""

from collections.abc import Callable
from itertools import count

import pytest

from sparsesearch.bench import timing


def test_two_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def captured(run: Callable[[], object]) -> timing.Replay:
        return timing.Replay(run, 4 if run is short else 1)

    def event_times(replay: Callable[[], object], repeats: int) -> list[float]:
        for _ in range(repeats):
            replay()
        slower = 1 + 1e-3 * next(turn)  # the clock sinks while they run
        return [(4e-3 if replay is short else 3e-3) * slower] * repeats

    def short() -> None:
        ran.append("short")

    def long() -> None:
        ran.append("long")

    turn = count()
    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "event_times", event_times)
    own, other = (turns.seconds for turns in timing.paired(short, long, budget_s=0.07))
    assert own / other == pytest.approx(1 / 3, rel=2e-3)
    assert own == pytest.approx(1e-3, rel=0.05)
    assert ran[-6:] == ["short", "long"] * 3
    assert ran[2:].count("short") == 9  # as many turns as fit: 70 ms at 7 ms a pair, slowed


def test_of_three_every_other_turn_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def event_times(replay: Callable[[], object], repeats: int) -> list[float]:
        replay()
        return [{"a": 1.0, "b": 2.0, "c": 6.0}[ran[-1]]] * repeats

    monkeypatch.setattr(timing, "event_times", event_times)
    works = [timing.Replay(lambda name=name: ran.append(name), calls) for name, calls in (("a", 1), ("b", 2), ("c", 3))]
    assert timing.in_turns_s(*works, budget_s=0.0, least=4) == (1.0, 1.0, 2.0)
    assert "".join(ran[3:]) == "abccbaabccba"
