"""A worker that is ended by the first process: quietly, with the exit code of an interruption, and only once."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from sparsesearch.studies import processes


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_worker_ends_quietly_and_a_second_signal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tidied = []

    def join(*_: Any, **__: Any) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            tidied.append(True)
        return 0

    monkeypatch.setattr(processes, "join", join)
    with pytest.raises(SystemExit) as ended:
        processes._worker("storage", "study", 1, "cpu", (), None, None)
    assert ended.value.code == 130
    assert tidied == [True]


def test_what_is_started_ignores_interrupts_but_the_first_process_does_not() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with processes._unheeded_interrupts():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
