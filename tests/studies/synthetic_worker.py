"""A worker process with a cheap objective on a synthetic score table: `python synthetic_worker.py STORAGE NAME TRIALS [HANG_ON]`.

The trial whose number is HANG_ON, when this worker gets it, never ends: it writes its number to stdout and sleeps until it is killed.
"""

import sys
from time import sleep

import optuna

from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import solve
from sparsesearch.search.speed import synthetic_table
from sparsesearch.studies.liveness import Liveness
from sparsesearch.studies.storage import open_study
from sparsesearch.studies.work import work

QUICK = Liveness(beat_s=0.2, grace_s=2.0)


def main(storage: str, name: str, num_trials: int, hang: bool) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = synthetic_table(num_units=32, num_candidates=8, lengths=(1024,))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        bound = trial.suggest_float("density", 0.1, 0.9)
        weight = trial.suggest_float("answer_weight", 0.01, 10.0, log=True)
        if hang:
            sys.stdout.write(f"{trial.number}\n")
            sys.stdout.flush()
            sleep(600)
        sleep(0.05)
        found = solve(table, [Budget("density", bound)])
        return found.loss * (1 + abs(weight - 1)), found.used["density"][1024]

    work(open_study(storage, name, seed=0), objective, num_trials=num_trials, liveness=QUICK)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), len(sys.argv) > 4)
