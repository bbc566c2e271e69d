"""Which running trials are really running: every worker's trial beats, and whoever sees one fall silent marks it failed and retries it.

Optuna has heartbeats for databases only, and only inside `Study.optimize`. Ours are an attribute of the trial, so they work the same in a
journal file, Redis and PostgreSQL. Clocks of different machines are never compared: a trial is stale when *this* observer has seen no
new beat for `grace_s`; a worker of this very machine whose process is gone is stale at once.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

BEAT = "sparsesearch:beat"
RETRY_OF = "sparsesearch:retry_of"
RETRIES = "sparsesearch:retries"


@dataclass(frozen=True)
class Liveness:
    """How quickly silence is noticed.

    Attributes:
        beat_s: seconds between beats; each is one write to the storage.
        grace_s: seconds without a beat after which a trial counts as dead.
        max_retries: times the same parameters are tried again.
    """

    beat_s: float = 15.0
    grace_s: float = 90.0
    max_retries: int = 2


@contextmanager
def beating(trial: Trial, liveness: Liveness) -> Iterator[None]:
    """Beat for a trial while the block runs."""
    stop, identity = Event(), own_identity()

    def beat() -> None:
        count = 0
        while True:
            count += 1
            try:
                trial.set_user_attr(BEAT, {**identity, "count": count})
            except UpdateFinishedTrialError:  # another worker took us for dead; `tell` finds out too
                return
            if stop.wait(liveness.beat_s):
                return

    thread = Thread(target=beat, daemon=True, name=f"beat of trial {trial.number}")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass
class Watch:
    """One worker's view of the others."""

    study: optuna.Study
    liveness: Liveness
    _seen: dict[int, tuple[Any, float]] = field(default_factory=dict)

    def revive(self) -> list[int]:
        """Mark the stale trials failed and enqueue them again; the numbers of those marked here."""
        marked = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_stale(trial) and mark_failed(self.study, trial.number):
                retry(self.study, trial, self.liveness.max_retries)
                marked.append(trial.number)
        return marked

    def _is_stale(self, trial: FrozenTrial) -> bool:
        beat = trial.user_attrs.get(BEAT)
        if isinstance(beat, dict) and _is_gone(beat):
            return True
        now = monotonic()
        known = self._seen.get(trial.number)
        if known is None or known[0] != beat:
            self._seen[trial.number] = beat, now
            return False
        return now - known[1] > self.liveness.grace_s


def mark_failed(study: optuna.Study, number: int) -> bool:
    """Mark a running trial failed; False when somebody else finished it first."""
    try:
        study.tell(number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):
        return False
    return True


def retry(study: optuna.Study, trial: FrozenTrial, max_retries: int) -> None:
    """Enqueue a failed trial's parameters once more, unless that was done `max_retries` times."""
    count = trial.user_attrs.get(RETRIES, 0)
    if count >= max_retries:
        return
    kept = {key: value for key, value in trial.user_attrs.items() if not key.startswith("sparsesearch:")}
    fixed = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    first = trial.user_attrs.get(RETRY_OF, trial.number)
    study.enqueue_trial(fixed, user_attrs={**kept, RETRY_OF: first, RETRIES: count + 1})


def own_identity() -> dict[str, Any]:
    """This process, told apart from every other on any machine: machine, boot, PID namespace, PID and the process's start."""
    pid = os.getpid()
    return {"machine": _machine(), "pid": pid, "started": _process(pid)[1]}


def _machine() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [platform.node()]
    if boot.exists():
        parts += [boot.read_text(encoding="ascii").strip(), str(namespace.readlink())]
    return " ".join(parts)


def _process(pid: int) -> tuple[str, int]:
    """State letter and start time of a process; ("X", 0) when there is none, ("?", 0) where that cannot be known."""
    if not Path("/proc/self/stat").exists():
        return "?", 0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[19])


def _is_gone(beat: dict[str, Any]) -> bool:
    """Whether the worker was of this machine and its process is over."""
    if beat.get("machine") != _machine():
        return False
    state, started = _process(int(beat["pid"]))
    return state in "XZ" or (state != "?" and started != beat.get("started"))
