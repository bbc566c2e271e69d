"""A worker process with a cheap objective on a synthetic score table.

Workers are forked off one server that has imported everything: a new Python that imports transformers takes seconds.
"""

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from time import sleep

import optuna

from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import solve
from sparsesearch.search.speed import synthetic_table
from sparsesearch.studies.liveness import Liveness
from sparsesearch.studies.storage import open_study
from sparsesearch.studies.work import work

QUICK = Liveness(beat_s=0.2, grace_s=2.0)


def started(storage: str, name: str, num_trials: int, inside: Connection | None = None) -> ForkServerProcess:
    """A running worker.

    Args:
        storage: of the study.
        name: of the study.
        num_trials: finished trials of the whole study.
        inside: the worker never ends its first trial, and sends that trial's number here: it waits to be killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparsesearch.studies.work", "sparsesearch.search.speed"])
    process = context.Process(target=main, args=(storage, name, num_trials, inside))
    process.start()
    return process


def main(storage: str, name: str, num_trials: int, inside: Connection | None) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = synthetic_table(num_units=32, num_candidates=8, lengths=(1024,))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        bound = trial.suggest_float("density", 0.1, 0.9)
        weight = trial.suggest_float("answer_weight", 0.01, 10.0, log=True)
        if inside is not None:
            inside.send(trial.number)
            sleep(600)
        sleep(0.05)
        found = solve(table, [Budget("density", bound)])
        return found.loss * (1 + abs(weight - 1)), found.used["density"][1024]

    work(open_study(storage, name, seed=0), objective, num_trials=num_trials, liveness=QUICK)
