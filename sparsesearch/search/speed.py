"""How fast and how tight the search is, on a synthetic table: `python -m sparsesearch.search.speed [--json out.json]`.

`cpu_s` is the processor time of the process, all threads together, which other jobs on the machine do not lengthen as they do `time_s`.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import TypeVar

import numpy as np
import scipy

from sparsesearch.artifacts import write_bytes
from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.scores import WHOLE, LayerMenus, ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.pareto import pareto
from sparsesearch.search.solve import solve
from sparsesearch.shapes import Decoding, Unit

BLOCK_TOKENS = 64
Result = TypeVar("Result")


def synthetic_table(
    num_units: int = 1024,
    num_candidates: int = 50,
    lengths: tuple[int, ...] = (4096, 8192, 32768, 131072),
    *,
    seed: int = 0,
) -> ScoreTable:
    """A table that resembles a profile.

    Losses fall with density, sensitivities are heavy-tailed, and laws a + b·N cost a different share at every length.
    Two fifths of the candidates cost a different amount in every unit, as dynamic and calibrated rules do; the last two
    are `zero` and `dense`. Metrics: `density` and `kv_fraction`, which rank the candidates differently, and `latency`
    with a floor per unit.
    """
    rng = np.random.default_rng(seed)
    tokens = np.array(lengths, dtype=float)
    laws = np.geomspace(0.01, 0.9, num_candidates - 2)
    elastic = rng.random(num_candidates - 2)
    share = laws * ((1 - elastic) * tokens[len(tokens) // 3] / tokens[:, None] + elastic)  # [P, C - 2]
    density = np.repeat(share.T[None], num_units, axis=0)
    dynamic = rng.random(num_candidates - 2) < 0.4
    density[:, dynamic] *= rng.lognormal(0, 0.3, (num_units, int(dynamic.sum()), 1))
    density = np.clip(density, 0.002, 1.0)
    edges = np.ones((num_units, 2, len(lengths))) * np.array([0.0, 1.0])[None, :, None]
    density = np.concatenate([density, edges], axis=1)
    sensitivity = rng.lognormal(0, 2, (num_units, 1))
    steepness = rng.uniform(0.3, 1.5, (num_units, 1))
    noise = rng.lognormal(0, 0.3, density.shape[:2])
    loss = sensitivity * (np.maximum(density.mean(-1), 1e-3) ** -steepness - 1) * noise
    loss[:, -1] = 0.0
    kept = np.minimum(1.0, density * rng.uniform(0.7, 1.3, (1, num_candidates, 1)))
    kept[:, -1] = 1.0
    tiles = (tokens / BLOCK_TOKENS) ** 2 / 2
    return ScoreTable(
        units=tuple(Unit(f"layers.{unit // 32}.self_attn", (unit % 32,)) for unit in range(num_units)),
        candidates=tuple(f"candidate_{index}" for index in range(num_candidates)),
        lengths=lengths,
        loss=loss,
        costs={
            "density": np.round(density * tiles),
            "kv_fraction": np.round(kept * tokens),
            "latency": 1e-6 * tiles * (0.02 + 0.98 * density),
        },
        dense_index=num_candidates - 1,
        valid=np.ones((num_units, num_candidates), dtype=bool),
    )


def two_phases(prefill: ScoreTable, decode: ScoreTable) -> ScoreTable:
    """Prefill and decode rules of the same units: losses and costs of the phases are summed, so each phase has its rows.

    Tiles are spent in the prefill, caches in decoding, seconds in both.
    """
    idle = {"density": decode, "kv_fraction": prefill}
    costs = {
        metric: np.concatenate([table.costs[metric] * (idle.get(metric) is not table) for table in (prefill, decode)])
        for metric in prefill.costs
    }
    units = (*prefill.units, *(Decoding(unit) for unit in decode.units))
    loss, valid = (np.concatenate([getattr(t, name) for t in (prefill, decode)]) for name in ("loss", "valid"))
    return ScoreTable(units, prefill.candidates, prefill.lengths, loss, costs, prefill.dense_index, valid)


def layered(table: ScoreTable, max_groups: int, num_heads: int = 32) -> ScoreTable:
    """The same table with at most `max_groups` rules in a layer; `zero`, the last but one, launches nothing."""
    group = np.arange(len(table.candidates))
    group[-2] = -1
    return replace(table, menus=LayerMenus(np.arange(len(table.units)) // num_heads, group, max_groups))


def infeasible_s(table: ScoreTable, budgets: list[Budget]) -> dict[str, float | str]:
    """How long it takes to find that there is no plan, and to name the smallest values."""

    def answer() -> str:
        try:
            solve(table, budgets)
        except BudgetInfeasibleError as error:
            return str(error)
        raise AssertionError("a search that must fail has found a plan")

    times, text = timed(answer)
    return {**times, "answer": text}


def timed(work: Callable[[], Result]) -> tuple[dict[str, float], Result]:
    """Seconds of the clock and of the processor, and what `work` returned."""
    start, cpu = perf_counter(), process_time()
    result = work()
    return {"time_s": perf_counter() - start, "cpu_s": process_time() - cpu}, result


def video_table(
    num_steps: int = 50, num_layers: int = 60, num_heads: int = 24, num_candidates: int = 8, *, seed: int = 0
) -> ScoreTable:
    """Steps x layers x heads of a video transformer, priced once: no sequence length, 72,000 units by default.

    Early steps are the more sensitive ones; neighbouring steps resemble each other, so many units are nearly equal.
    """
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_layers, num_heads)
    share = np.append(np.geomspace(0.03, 0.7, num_candidates - 1), 1.0)
    of_step = np.linspace(2, 0.3, num_steps)[:, None, None] ** 2
    sensitivity = of_step * rng.lognormal(0, 1.5, (1, *shape[1:])) * rng.lognormal(0, 0.05, shape)
    steepness = np.broadcast_to(rng.uniform(0.3, 1.5, (1, *shape[1:])), shape)
    loss = sensitivity.reshape(-1, 1) * (share ** -steepness.reshape(-1, 1) - 1)
    num_units = loss.shape[0]
    tiles = np.broadcast_to(np.round(1000 * share), loss.shape)[:, :, None]
    latency = 1e-6 * (30 * (share < 1) + 1000 * share) * rng.uniform(0.9, 1.1, (num_units, 1))
    return ScoreTable(
        units=tuple((step, layer, head) for step, layer, head in np.ndindex(shape)),
        candidates=tuple(f"candidate_{index}" for index in range(num_candidates)),
        lengths=(),
        loss=loss,
        costs={"density": tiles.copy(), "latency": latency[:, :, None]},
        dense_index=num_candidates - 1,
        valid=np.ones(loss.shape, dtype=bool),
        points={"density": (WHOLE,), "latency": (WHOLE,)},
    )


def measure() -> dict[str, dict[str, float | str]]:
    """Times and gaps: the stated bar, a harder search, a model of 70B, a video schedule, and a front of 100 points."""
    figures: dict[str, dict[str, float | str]] = {}
    large, huge, video = synthetic_table(), synthetic_table(5120, seed=1), video_table()
    one = [Budget("density", 0.25)]
    several = [
        Budget("density", 0.25, (4096,)),
        Budget("density", 0.2, (8192, 32768)),
        Budget("density", 0.16, (131072,)),
    ]
    three = [*several, Budget("kv_fraction", 0.22), Budget("latency", 0.24)]
    both, both_huge = two_phases(large, synthetic_table(seed=2)), two_phases(huge, synthetic_table(5120, seed=3))
    for name, table, budgets in (
        ("1024x50x4, one budget", large, one),
        ("1024x50x4, a budget per length", large, several),
        ("1024x50x4, three budgets", large, three),
        ("5120x50x4, three budgets", huge, three),
        ("1024x50x4, prefill and decode, three budgets", both, three),
        ("5120x50x4, prefill and decode, three budgets", both_huge, three),
        ("1024x50x4, two rules per layer, three budgets", layered(large, 2), three),
        ("1024x50x4, three rules per layer, three budgets", layered(large, 3), three),
        ("72000x8 video, one budget", video, one),
        ("72000x8 video, two budgets", video, [*one, Budget("latency", 0.27)]),
    ):
        times, solution = timed(partial(solve, table, budgets))
        figures[name] = {**times, "gap": solution.gap, "loss": solution.loss}
    without_zero = replace(large, valid=large.valid & (np.arange(50) >= 10) & (np.arange(50) != 48))
    figures["1024x50x4, infeasible"] = infeasible_s(without_zero, [Budget("density", 0.001)])
    conflict = [Budget("density", 0.03), Budget("kv_fraction", 0.02), Budget("latency", 0.03)]
    figures["1024x50x4, infeasible, three budgets"] = infeasible_s(without_zero, conflict)
    bounds = [float(bound) for bound in np.linspace(0.02, 1, 100)]
    times, front = timed(partial(pareto, large, "density", bounds))
    figures["1024x50x4, front of 100"] = {
        **times,
        "gap_median": float(np.median([point.gap for point in front])),
        "gap_max": max(point.gap for point in front if point.loss > 0),
    }
    return figures


def main() -> None:
    """Print the figures as one JSON object, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write them here, with the machine's name and versions")
    options = parser.parse_args()
    record = {"format": "sparsesearch.search.speed", "provenance": _provenance(), "cases": measure()}
    text = json.dumps(record, indent=1) + "\n"
    if options.json:
        write_bytes(options.json, text.encode())
    sys.stdout.write(text)


def _provenance() -> dict[str, str | int | None]:
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "command": "python -m sparsesearch.search.speed --json tests/golden/search_speed.json",
    }


if __name__ == "__main__":
    main()
