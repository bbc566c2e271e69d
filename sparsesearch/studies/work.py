"""The worker: takes trials of a study until enough are finished. Any number of them, on any number of machines, share one study."""

from collections import Counter
from collections.abc import Callable, Sequence
from time import sleep

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from sparsesearch.studies.liveness import Liveness, Watch, beating, retry

Objective = Callable[[Trial], Sequence[float]]
Progress = Callable[[str, int, int], None]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def silent(stage: str, done: int, total: int) -> None:
    """The default progress callback."""


def work(
    study: optuna.Study,
    objective: Objective,
    *,
    num_trials: int,
    liveness: Liveness | None = None,
    progress: Progress = silent,
) -> int:
    """Take trials until the study has `num_trials` finished ones (complete or pruned), whoever finished them.

    A worker that finds all remaining trials taken waits for them, and takes over those whose worker dies. So the study is complete when any
    worker returns, unless several began the last trial at the same instant (then there are a few more).

    Args:
        study: opened by this process.
        objective: gives the objectives of a trial; raises `optuna.TrialPruned` to stop it. Another exception marks the trial failed and is
            raised here.
        num_trials: of the whole study.
        liveness: how quickly dead workers are noticed.
        progress: called with ("trials", finished, num_trials).

    Returns:
        Trials finished by this worker.
    """
    liveness = liveness or Liveness()
    watch, own = Watch(study, liveness), 0
    while True:
        watch.revive()
        states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
        finished = sum(states[state] for state in FINISHED)
        progress("trials", min(finished, num_trials), num_trials)
        if finished >= num_trials:
            return own
        if finished + states[TrialState.RUNNING] >= num_trials:
            sleep(min(1.0, liveness.beat_s / 4))
            continue
        own += _run_one(study, objective, liveness)


def _run_one(study: optuna.Study, objective: Objective, liveness: Liveness) -> int:
    """Ask, evaluate, tell; 1 when the result was taken."""
    trial = study.ask()
    values: Sequence[float] | None = None
    state = TrialState.COMPLETE
    try:
        with beating(trial, liveness):
            values = objective(trial)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except BaseException as error:
        _tell(study, trial, TrialState.FAIL, None)
        if isinstance(error, KeyboardInterrupt):  # not the trial's fault: leave it to whoever comes next
            frozen = next(one for one in study.get_trials(deepcopy=False) if one.number == trial.number)
            retry(study, frozen, liveness.max_retries)
        raise
    return _tell(study, trial, state, values)


def _tell(study: optuna.Study, trial: Trial, state: TrialState, values: Sequence[float] | None) -> int:
    """1 unless the trial was marked dead meanwhile: then its retry counts, not this late result."""
    try:
        study.tell(trial, values, state=state)
    except UpdateFinishedTrialError:
        return 0
    except ValueError:
        frozen = next(one for one in study.get_trials(deepcopy=False) if one.number == trial.number)
        if frozen.state.is_finished() and frozen.state is not state:
            return 0
        raise
    return 1
