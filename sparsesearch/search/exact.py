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
from sparsesearch.search.menus import Menus

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
    problem: Knapsack,
    kept: Bool[ndarray, "U C"],
    *,
    absolute_gap: float,
    largest: float,
    time_limit_s: float,
    screen: "Screen | None" = None,
) -> Exact:
    """Minimise the loss over the kept candidates.

    Args:
        problem: units, candidates and limits.
        kept: at least one candidate in every unit.
        absolute_gap: stop when loss and bound are this close.
        largest: loss of the best plan known, which sets the scale.
        time_limit_s: of HiGHS.
        screen: with menus, which of them and of their entries may still matter; None takes all.
    """
    program = choice_program(kept, problem.menus, screen)
    units, candidates = program.units, program.candidates
    least = np.where(kept, problem.loss, np.inf).min(1)
    constant = float(least.sum())
    span = largest - constant
    if span <= 1e-14 * float(np.abs(least).sum()):  # the known plan takes the best of every unit
        return Exact(None, constant, True)
    pad = program.num_columns - len(units)
    objective = np.pad((problem.loss[units, candidates] - least[units]) * (OBJECTIVE_SCALE / span), (0, pad))
    rows = np.pad(problem.use[:, units, candidates] * (ROW_SCALE / problem.limit)[:, None], ((0, 0), (0, pad)))
    result = _milp(
        objective,
        constraints=[*program.constraints(), LinearConstraint(rows, -np.inf, ROW_SCALE)],
        integrality=np.ones(program.num_columns),
        bounds=Bounds(0, 1),
        options={"time_limit": max(time_limit_s, 0.05), "mip_rel_gap": min(absolute_gap / span, 1.0)},
    )
    if result.status == 2:
        return Exact(None, np.inf, True)
    bound = -np.inf if result.mip_dual_bound is None else constant + result.mip_dual_bound * span / OBJECTIVE_SCALE
    choice = None if result.x is None else program.choice(result.x)
    return Exact(choice, float(bound), result.status == 0)


@dataclass(frozen=True, eq=False)
class Screen:
    """What the Lagrangian bound leaves open: it rises by less than `slack` when a layer must take a menu or entry.

    Attributes:
        priced: loss + λ·use.
        rise: of the bound, when a layer must take a menu.
        slack: from the bound to the best plan known.
        most: menus per layer, the best ones first; the rest are left out although they may matter.
    """

    priced: Float[ndarray, "U C"]
    rise: Float[ndarray, "L S"]
    slack: float
    most: int | None = None

    def menus_of(self, layer: int) -> list[int]:
        """The open menus of a layer."""
        opened = np.flatnonzero(self.rise[layer] <= self.slack)
        best = opened[np.argsort(self.rise[layer, opened], kind="stable")][: self.most]
        return [int(menu) for menu in np.sort(best)]

    @property
    def num_open(self) -> int:
        """Open menus of all layers."""
        return int((self.rise <= self.slack).sum())

    def entries(
        self, layer: int, menu: int, rows: Int[ndarray, " n"], on_menu: Bool[ndarray, "n C"]
    ) -> Bool[ndarray, "n C"]:
        """The open entries of a layer's units under a menu."""
        priced = np.where(on_menu, self.priced[rows], np.inf)
        return np.asarray(self.rise[layer, menu] + priced - priced.min(1, keepdims=True) <= self.slack)


@dataclass(frozen=True)
class ChoiceProgram:
    """Binaries for "one candidate per unit": x[u, c], or with menus z[l, S] and x[l, S, u, c].

    With menus, Σ_S z[l, S] = 1 and Σ_c x[l, S, u, c] = z[l, S] for every unit of the layer: the relaxation is as tight as
    the Lagrangian bound, because each layer's plans under one menu are a product of simplices.

    Attributes:
        units: of each x.
        candidates: of each x.
        equal: rows of the equalities, x first, then z.
        right: their right-hand sides.
    """

    units: Int[ndarray, " n"]
    candidates: Int[ndarray, " n"]
    equal: sparse.csr_array
    right: Float[ndarray, " m"]
    shape: tuple[int, int]

    @property
    def num_columns(self) -> int:
        """Of x and z."""
        return int(self.equal.shape[1])

    def constraints(self, extra: int = 0) -> list[LinearConstraint]:
        """The equalities, with `extra` unused columns behind them."""
        height = self.equal.shape[0]
        wide = sparse.hstack([self.equal, sparse.csr_array((height, extra))], format="csr") if extra else self.equal
        return [LinearConstraint(wide, self.right, self.right)]

    def choice(self, x: Float[ndarray, " columns"]) -> Int[ndarray, " U"]:
        """The candidate of each unit."""
        taken = np.zeros(self.shape)
        np.add.at(taken, (self.units, self.candidates), x[: len(self.units)])
        return np.asarray(taken.argmax(1))


def choice_program(kept: Bool[ndarray, "U C"], menus: Menus | None, screen: Screen | None) -> ChoiceProgram:
    """State the choice among kept candidates, under one menu per layer."""
    free = np.ones(len(kept), dtype=bool) if menus is None else menus.layer < 0
    units, candidates = np.nonzero(kept & free[:, None])
    owners = [np.cumsum(free)[units] - 1]  # row of each x
    columns_of_menu: list[int] = []
    height = int(free.sum())
    right = [np.ones(height)]
    entries = [(units, candidates)]
    for layer in range(0 if menus is None else len(menus.rows)):
        assert menus is not None
        rows = menus.rows[layer][menus.rows[layer] >= 0]
        for menu in range(menus.num_menus) if screen is None else screen.menus_of(layer):
            on_menu = kept[rows] & np.isin(menus.group[rows], [-1, *menus.all[menu].tolist()])
            if screen is not None:
                on_menu &= screen.entries(layer, menu, rows, on_menu)
            if not on_menu.any(1).all():
                continue
            place, column = np.nonzero(on_menu)
            entries.append((rows[place], column))
            owners.append(height + place)
            columns_of_menu.append(layer)
            right.append(np.zeros(len(rows)))
            height += len(rows)
    units, candidates = (np.concatenate(part) for part in zip(*entries, strict=True))
    num_layers = 0 if menus is None else len(menus.rows)
    return ChoiceProgram(
        units,
        candidates,
        _equalities(np.concatenate(owners), [len(part) for part in right], columns_of_menu, num_layers),
        np.r_[np.concatenate(right), np.ones(num_layers)],
        kept.shape,
    )


def _equalities(
    owners: Int[ndarray, " n"], heights: list[int], layer_of_menu: list[int], num_layers: int
) -> sparse.csr_array:
    """Rows Σ x = 1 or Σ x − z = 0, then Σ_S z = 1 per layer."""
    height, width = sum(heights), len(owners) + len(layer_of_menu)
    z = len(owners) + np.arange(len(layer_of_menu))
    below = np.repeat(z, heights[1:]) if layer_of_menu else np.zeros(0, dtype=np.int64)
    rows = np.r_[owners, heights[0] + np.arange(len(below)), height + np.array(layer_of_menu, dtype=np.int64)]
    columns = np.r_[np.arange(len(owners)), below, z]
    values = np.r_[np.ones(len(owners)), -np.ones(len(below)), np.ones(len(z))]
    return sparse.csr_array((values, (rows, columns)), shape=(height + num_layers, width))


def least_scale_exact(
    scaled: Float[ndarray, "K U C"],
    held: Float[ndarray, "J U C"],
    kept: Bool[ndarray, "U C"],
    menus: Menus | None = None,
    *,
    time_limit_s: float,
) -> Int[ndarray, " U"] | None:
    """The plan whose largest summed `scaled` use is least while every `held` one is at most 1; None if none was found."""
    program = choice_program(kept, menus, None)
    units, candidates, width = program.units, program.candidates, program.num_columns
    pad = np.zeros((1, width - len(units)))
    minimised = np.c_[scaled[:, units, candidates], np.repeat(pad, len(scaled), 0), -np.ones(len(scaled))] * ROW_SCALE
    limited = np.c_[held[:, units, candidates], np.repeat(pad, len(held), 0), np.zeros(len(held))] * ROW_SCALE
    result = _milp(
        np.r_[np.zeros(width), OBJECTIVE_SCALE],
        constraints=[
            *program.constraints(extra=1),
            LinearConstraint(minimised, -np.inf, 0),
            *([LinearConstraint(limited, -np.inf, ROW_SCALE)] if len(held) else []),
        ],
        integrality=np.r_[np.ones(width), 0],
        bounds=Bounds(0, np.r_[np.ones(width), np.inf]),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    return None if result.x is None else program.choice(result.x)


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
