"""The certificate: HiGHS, through scipy, on the candidates that the Lagrangian bound could not rule out.

Source: Huangfu and Hall 2018, Math. Prog. Comp. 10 (HiGHS).
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from sparsesearch.search.knapsack import Knapsack

ROW_SCALE = 1e4
"""HiGHS lets a row exceed its bound by 1e-6; limits of this size make that 1e-10 of the limit."""

OBJECTIVE_SCALE = 1e4
"""HiGHS stops at an absolute gap of 1e-6; an objective of this size makes that 1e-10 of it."""


@dataclass(frozen=True)
class Exact:
    """What HiGHS found among the kept candidates.

    Attributes:
        choice: a plan within the limits; None when it found none, or none can be better than the known one.
        bound: no plan of kept candidates within the limits loses less; inf when there is none.
        finished: False when the time ran out.
    """

    choice: Int[ndarray, " U"] | None
    bound: float
    finished: bool


def solve_exact(
    problem: Knapsack, kept: Bool[ndarray, "U C"], *, absolute_gap: float, largest: float, time_limit_s: float
) -> Exact:
    """Minimise the loss over the kept candidates.

    Args:
        problem: units, candidates and limits.
        kept: at least one candidate in every unit.
        absolute_gap: stop when loss and bound are this close.
        largest: loss of the best plan known, which sets the scale.
        time_limit_s: of HiGHS.
    """
    units, candidates = np.nonzero(kept)
    least = np.where(kept, problem.loss, np.inf).min(1)
    constant = float(least.sum())
    span = largest - constant
    if span <= 1e-14 * float(np.abs(least).sum()):  # the known plan takes the best of every unit
        return Exact(None, constant, True)
    objective = (problem.loss[units, candidates] - least[units]) * (OBJECTIVE_SCALE / span)
    one_each = sparse.csr_array((np.ones(len(units)), (units, np.arange(len(units)))), shape=(len(kept), len(units)))
    rows = problem.use[:, units, candidates] * (ROW_SCALE / problem.limit)[:, None]
    result = _milp(
        objective,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(rows, -np.inf, ROW_SCALE)],
        integrality=np.ones(len(units)),
        bounds=Bounds(0, 1),
        options={"time_limit": max(time_limit_s, 0.05), "mip_rel_gap": min(absolute_gap / span, 1.0)},
    )
    if result.status == 2:
        return Exact(None, np.inf, True)
    bound = -np.inf if result.mip_dual_bound is None else constant + result.mip_dual_bound * span / OBJECTIVE_SCALE
    choice = None
    if result.x is not None:
        taken = np.zeros(kept.shape)
        taken[units, candidates] = result.x
        choice = taken.argmax(1)
    return Exact(choice, float(bound), result.status == 0)


def least_scale_exact(
    scaled: Float[ndarray, "K U C"],
    held: Float[ndarray, "J U C"],
    kept: Bool[ndarray, "U C"],
    *,
    time_limit_s: float,
) -> Int[ndarray, " U"] | None:
    """The plan whose largest summed `scaled` use is least while every `held` one is at most 1; None if none was found."""
    units, candidates = np.nonzero(kept)
    one_each = sparse.csr_array(
        (np.ones(len(units)), (units, np.arange(len(units)))), shape=(len(kept), len(units) + 1)
    )
    minimised = np.c_[scaled[:, units, candidates], -np.ones(len(scaled))] * ROW_SCALE
    limited = np.c_[held[:, units, candidates], np.zeros(len(held))] * ROW_SCALE
    result = _milp(
        np.r_[np.zeros(len(units)), OBJECTIVE_SCALE],
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(minimised, -np.inf, 0),
            *([LinearConstraint(limited, -np.inf, ROW_SCALE)] if len(held) else []),
        ],
        integrality=np.r_[np.ones(len(units)), 0],
        bounds=Bounds(0, np.r_[np.ones(len(units)), np.inf]),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    taken = np.zeros(kept.shape)
    taken[units, candidates] = result.x[:-1]
    return np.asarray(taken.argmax(1))


def _milp(objective: Float[ndarray, " n"], **arguments: object) -> "_Result":
    with silent_stdout():
        return milp(objective, **arguments)  # type: ignore[arg-type, return-value]


class _Result:
    """The fields of scipy's result that are used here."""

    x: ndarray | None
    status: int
    mip_dual_bound: float | None


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Send what C code prints to file descriptor 1 nowhere.

    HiGHS prints debugging lines in rare cases even when told to be silent, which would spoil JSON on stdout. The C
    library's buffer is flushed at both ends, since it holds text back when stdout is a pipe.
    """
    sys.stdout.flush()
    _flush_c()
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed: nothing can be spoilt
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # os.devnull is no path of ours
            os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            _flush_c()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _flush_c() -> None:
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
