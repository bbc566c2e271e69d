"""Workers as processes of this machine, each with its own copy of the model."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import optuna

from sparsesearch.errors import SparseSearchError
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
    liveness: Liveness | None = None,
    progress: Progress = silent,
) -> int:
    """Join a study and work until it has `num_trials` finished trials; how many this worker finished.

    Raises:
        SpecError: there is no such study.
        ArtifactError: the profiles here are not the study's.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    description = StudyDescription.load(open_study(storage, name, seed=0))
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
    liveness: Liveness | None = None,
    progress: Progress = silent,
) -> None:
    """Work with `num_workers` processes, this one included.

    Raises:
        SparseSearchError: the study could not be finished because every other worker failed.
    """
    context = multiprocessing.get_context("spawn")  # a forked CUDA context or thread pool does not work
    arguments = (storage, name, num_trials, device, liveness)
    others = [context.Process(target=_worker, args=arguments, daemon=True) for _ in range(num_workers - 1)]
    with _unheeded_interrupts():
        for process in others:
            process.start()
    try:
        join(storage, name, num_trials=num_trials, device=device, liveness=liveness, progress=progress)
        for process in others:
            process.join()
    except BaseException:
        for process in others:
            process.terminate()
        for process in others:
            process.join(timeout=_PATIENCE_S)  # so that each hands its trial back
        raise
    failed = [process.exitcode for process in others if process.exitcode]
    if failed:
        raise SparseSearchError(
            f"{len(failed)} of {num_workers} workers ended with {failed}; the study is finished, since the others took over their trials. "
            "Look at what they wrote above."
        )


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


def _worker(storage: str, name: str, num_trials: int, device: str, liveness: Liveness | None) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        join(storage, name, num_trials=num_trials, device=device, liveness=liveness)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: the second would interrupt the tidying up
    raise KeyboardInterrupt
