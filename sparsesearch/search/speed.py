"""How fast and how tight the search is, on a synthetic table: `python -m sparsesearch.search.speed`."""

import argparse
import json
import sys
from time import perf_counter

import numpy as np

from sparsesearch.scores import WHOLE, ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.pareto import pareto
from sparsesearch.search.solve import solve
from sparsesearch.shapes import Unit

BLOCK_TOKENS = 64


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


def measure() -> dict[str, dict[str, float]]:
    """Times and gaps: the issue's bar, a harder search, a model of 70B, a video schedule, and a front of 100 points."""
    figures: dict[str, dict[str, float]] = {}
    large, huge, video = synthetic_table(), synthetic_table(5120, seed=1), video_table()
    one = [Budget("density", 0.25)]
    several = [
        Budget("density", 0.25, (4096,)),
        Budget("density", 0.2, (8192, 32768)),
        Budget("density", 0.16, (131072,)),
    ]
    three = [*several, Budget("kv_fraction", 0.22), Budget("latency", 0.24)]
    for name, table, budgets in (
        ("1024x50x4, one budget", large, one),
        ("1024x50x4, a budget per length", large, several),
        ("1024x50x4, three budgets", large, three),
        ("5120x50x4, three budgets", huge, three),
        ("72000x8 video, one budget", video, one),
        ("72000x8 video, two budgets", video, [*one, Budget("latency", 0.27)]),
    ):
        start = perf_counter()
        solution = solve(table, budgets)
        figures[name] = {"time_s": perf_counter() - start, "gap": solution.gap, "loss": solution.loss}
    start = perf_counter()
    front = pareto(large, "density", [float(bound) for bound in np.linspace(0.02, 1, 100)])
    figures["1024x50x4, front of 100"] = {
        "time_s": perf_counter() - start,
        "gap_median": float(np.median([point.gap for point in front])),
        "gap_max": max(point.gap for point in front if point.loss > 0),
    }
    return figures


def main() -> None:
    """Print the figures as one JSON object."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.stdout.write(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
