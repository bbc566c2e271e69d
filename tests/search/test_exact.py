import subprocess
import sys

import numpy as np

from sparsesearch.search.exact import solve_exact
from sparsesearch.search.knapsack import Knapsack

PRINTS_FROM_C = """
import ctypes, sys
from sparsesearch.search.exact import silent_stdout
libc = ctypes.CDLL(None)
print("before")
libc.printf(b"kept\\n")
with silent_stdout():
    libc.printf(b"noise\\n")
print("after")
"""


CLOSED = """
import os, sys
sys.stdout.flush()
os.close(1)
with silent_stdout():
    pass
"""


def test_what_c_code_prints_does_not_reach_stdout_and_a_closed_one_is_no_error() -> None:
    code = PRINTS_FROM_C + CLOSED
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert sorted(result.stdout.split()) == ["after", "before", "kept"]
    assert result.stderr == ""


def knapsack(loss: list[list[float]], use: list[list[float]], limit: float) -> Knapsack:
    table = np.array(loss)
    index = np.broadcast_to(np.arange(table.shape[1]), table.shape)
    return Knapsack(table, np.array([use]), np.array([limit]), (("density", 1),), index, np.arange(len(table)))


def test_solves_and_proves() -> None:
    problem = knapsack([[0, 3, 9], [0, 5, 7]], [[0.5, 0.2, 0], [0.5, 0.3, 0]], 0.5)
    kept = np.ones((2, 3), dtype=bool)
    result = solve_exact(problem, kept, absolute_gap=0, largest=16, time_limit_s=10)
    assert result.choice is not None
    assert problem.loss_of(result.choice) == 7
    assert abs(result.bound - 7) < 1e-6
    assert result.finished


def test_says_when_there_is_no_plan() -> None:
    problem = knapsack([[0.0, 1.0]], [[0.5, 0.4]], 0.1)
    result = solve_exact(problem, np.ones((1, 2), dtype=bool), absolute_gap=0, largest=1, time_limit_s=10)
    assert result.choice is None
    assert result.bound == np.inf
