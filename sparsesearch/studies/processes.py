"""Workers as processes of this machine, each with its own copy of the model."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import optuna

from sparsesearch.studies.liveness import Liveness, own_identity
from sparsesearch.studies.storage import open_study
from sparsesearch.studies.tune import PlanObjective, StudyDescription
from sparsesearch.studies.work import Progress, silent, work

_PATIENCE_S = 10.0
_INTERRUPTED = 130


def join(
    storage: str,
    name: str,
    *,
    num_trials: int,
    device: str = "cpu",
    profiles: Sequence[Path] = (),
    model: str | None = None,
    liveness: Liveness | None = None,
    progress: Progress = silent,
) -> int:
    """Join a study and work until it has `num_trials` finished trials; how many this worker finished.

    `profiles` and `model` say where the study's own are on this machine, if not where they were on the first.

    Raises:
        SpecError: there is no such study.
        ArtifactError: the profiles here are not the study's.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    description = StudyDescription.load(open_study(storage, name, seed=0)).at(profiles, model)
    own = own_identity()
    study = open_study(storage, name, seed=(description.seed + own["pid"] + own["started"]) % 2**32)
    objective = PlanObjective.load(description, device=device)
    return work(study, objective, num_trials=num_trials, liveness=liveness, progress=progress)


def run_workers(
    storage: str,
    name: str,
    *,
    num_trials: int,
    num_workers: int,
    device: str = "cpu",
    profiles: Sequence[Path] = (),
    model: str | None = None,
    liveness: Liveness | None = None,
    progress: Progress = silent,
) -> list[int]:
    """Work with `num_workers` processes, this one included, until the study is finished; arguments as of `join`.

    Returns:
        Exit codes of the workers that failed or were killed; the others took over their trials.
    """
    context = multiprocessing.get_context("spawn")  # a forked CUDA context or thread pool does not work
    arguments = (storage, name, num_trials, device, tuple(profiles), model, liveness)
    others = [context.Process(target=_worker, args=arguments, daemon=True) for _ in range(num_workers - 1)]
    with _unheeded_interrupts():
        for process in others:
            process.start()
    try:
        join(
            storage, name, num_trials=num_trials, device=device, profiles=profiles, model=model, liveness=liveness, progress=progress
        )  # fmt: skip
        for process in others:
            process.join()
    except BaseException:
        for process in others:
            process.terminate()
        for process in others:
            process.join(timeout=_PATIENCE_S)  # so that each hands its trial back
        raise
    return [process.exitcode for process in others if process.exitcode]


@contextmanager
def _unheeded_interrupts() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, which a terminal sends to all of them: the first one ends the others."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker(
    storage: str,
    name: str,
    num_trials: int,
    device: str,
    profiles: tuple[Path, ...],
    model: str | None,
    liveness: Liveness | None,
) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        join(storage, name, num_trials=num_trials, device=device, profiles=profiles, model=model, liveness=liveness)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: the second would interrupt the tidying up
    raise KeyboardInterrupt
