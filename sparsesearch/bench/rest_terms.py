"""What rest terms are worth: output error of rules with and without them at equal work, on queries, keys and values of the embedded video model.

Run: python -m sparsesearch.bench.rest_terms --layers 1,3,5 --json OUT

One forward pass per noise level on clips mixed with noise; bitmaps are calibrated on other clips. The error of a rule is that of the layer's
output when all its heads follow it, |W_o(O - O_dense)|² / |W_o O_dense|² summed over heads, mean over clips, levels and layers. Work counts
means as 1/block of a tile and a cached residual's dense steps; see `Rule.work`. A cached residual is two sampling steps old.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsesearch.bench.timing import provenance
from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.plan import uniform_plan
from sparsesearch.profiling.denoising.menu import FlatCall, video_grid
from sparsesearch.profiling.denoising.tile_errors import tile_masses
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.runtime.diffusion.live import apply_to_transformer, describe_transformer, output_weights
from sparsesearch.testbed.model import MODEL, VideoBed, load_bed
from sparsesearch.testbed.sampling import CALIBRATION_SEED, HELD_OUT_SEED, STEPS, Mode, scenes, sigmas

BLOCK_TOKENS = 64
STEPS_SEEN = (4, 12, 22)
AGE = 2
BASES: tuple[dict[str, Any], ...] = (
    {"kind": "diagonal_band", "order": "axes(hwf)"},
    {"kind": "neighbourhood", "order": "tile(4,4,4)", "stride": "4x4x4"},
    {"kind": "calibrated_tiles"},
    {"kind": "calibrated_tiles", "order": "tile(4,4,4)"},
    {"kind": "pooled_mass", "order": "tile(4,4,4)"},
    {"kind": "block_mass", "order": "tile(4,4,4)"},
    {"kind": "cluster_mass", "by": "block", "query_clusters": 64, "key_clusters": 64},
)
SIZES: dict[str, list[dict[str, Any]]] = {
    "diagonal_band": [{"reach": {"b": b}} for b in (0.03125, 0.0625, 0.125, 0.1875, 0.28125)],
    "neighbourhood": [{"window": w} for w in ("4x4x4", "12x4x4", "4x12x12", "12x12x12")],
}
KEEPS = (0.0625, 0.125, 0.1875, 0.25, 0.35, 0.5)
PYRAMIDS = (
    "0.0625/0.0625/0.0625/0.125",
    "0.125/0.0625/0.125/0.25",
    "0.25/0.125/0.125/0.25",
    "0.0625/0/0/0.9375",
    "0.125/0/0/0.875",
)
RESTS: dict[str, dict[str, Any]] = {
    "drop": {},
    "means": {"kind": "taylor_rest", "terms": 0},
    "taylor": {"kind": "taylor_rest", "terms": 1},
    "rectified": {"kind": "rectified_rest", "gate": False},
    "rectified, gated": {"kind": "rectified_rest"},
    "cached, 5 steps": {"kind": "cached_rest"},
    "cached, 10 steps": {"kind": "cached_rest", "every": 10},
}


def candidates(
    keeps: tuple[float, ...] = KEEPS, kinds: tuple[str, ...] | None = None
) -> Iterator[tuple[str, str, Rule]]:
    """Base, rest and rule of every row; only bases of some kinds if they are named."""
    for base in BASES:
        if kinds is not None and base["kind"] not in kinds:
            continue
        name = " ".join(str(value) for key, value in base.items() if key != "stride")
        for size in SIZES.get(base["kind"], [{"keep": keep} for keep in keeps]):
            rule = {**base, **size}
            for rest, data in RESTS.items():
                if "cached" in rest and base["kind"] in ("pooled_mass", "block_mass", "cluster_mass"):
                    continue
                yield name, rest, parse_rule({**data, "of": rule} if data else rule, where="bench")
    if kinds is None or "cluster_mass" in kinds:
        for keep in keeps:
            data = {"kind": "cluster_mass", "keep": keep, "query_clusters": 32, "key_clusters": 64}
            yield "cluster_mass cluster", "drop", parse_rule(data, where="bench")
    if kinds is None or "pyramid" in kinds:
        for order, shares in itertools.product(("identity", "tile(4,4,4)"), PYRAMIDS):
            data = {"kind": "pyramid", "shares": shares, "order": order}
            yield f"pyramid {order}", "means of 2, 4, 8", parse_rule(data, where="bench")


def run(
    *,
    layers: tuple[int, ...] = (1, 3, 5),
    clips: int = 1,
    steps: tuple[int, ...] = STEPS_SEEN,
    keeps: tuple[float, ...] = KEEPS,
    kinds: tuple[str, ...] | None = None,
    mode: Mode = "t2v",
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every candidate.

    Returns:
        The record: provenance and one row per candidate with its mean work (share of dense attention's tiles) and error.
    """
    bed = load_bed(device)
    weights = output_weights(bed.transformer)
    sums = {rule.label: torch.zeros(2, dtype=torch.double) for _, _, rule in candidates(keeps, kinds)}
    for step in steps:
        seen = _calls(bed, mode, step, clips, layers, held_out=True)
        before = _calls(bed, mode, step - AGE, clips, layers, held_out=True)
        mass = _calls(bed, mode, step, clips, layers, held_out=False)
        for path in seen:
            progress(f"step {step}, {path}")
            call = seen[path]
            dense = F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)
            for _, _, rule in candidates(keeps, kinds):
                sums[rule.label] += torch.tensor(_measure(rule, call, before[path], mass[path], weights[path], dense))
    rows = []
    for base, rest, rule in candidates(keeps, kinds):
        work, error = (sums[rule.label] / (len(layers) * len(steps))).tolist()
        rows.append({"base": base, "rest": rest, "work": work, "error": error, "rule": rule.label})
    return {
        "provenance": _provenance(device),
        "layers": layers,
        "steps": steps,
        "clips": clips,
        "mode": mode,
        "rows": rows,
    }


def _provenance(device: str) -> dict[str, Any]:
    if torch.device(device).type == "cuda":
        return provenance()
    return {
        "device": device,
        "torch": torch.__version__,
        "command": " ".join(["python -m sparsesearch.bench.rest_terms", *sys.argv[1:]]),
    }


def _calls(
    bed: VideoBed, mode: Mode, step: int, clips: int, layers: tuple[int, ...], *, held_out: bool
) -> dict[str, LayerCall]:
    """Attention calls of some layers, one forward pass at one step's noise level."""
    start = scenes(clips, mode=mode, seed=HELD_OUT_SEED if held_out else CALIBRATION_SEED, device=bed.device)
    level = sigmas(STEPS)[step]
    found: dict[str, LayerCall] = {}
    info = describe_transformer(bed.transformer, MODEL)
    plan = uniform_plan(info, Dense(), block_tokens=BLOCK_TOKENS, lengths_tokens=(1,))

    def keep(seen: LayerCall) -> None:
        if info.modules.index(seen.path) in layers:
            found[seen.path] = seen

    with apply_to_transformer(bed.transformer, plan, allow_other_weights=True) as applied:
        applied.probe(keep)
        applied.at_step(step, STEPS)
        bed.velocity((1 - level) * start.video + level * start.noise, level, start.condition, start.captions)
    return found


def _measure(
    rule: Rule, seen: LayerCall, before: LayerCall, other: LayerCall, weight: Tensor, dense: Tensor
) -> tuple[float, float]:
    grid, heads = video_grid(seen.call.layout, BLOCK_TOKENS), seen.q.shape[1]
    rules: tuple[Rule, ...] = (rule,) * heads
    if rule.needs_calibration:
        q, k, _ = FlatCall.of(other).ordered(rule.token_order)
        mass = tile_masses(q, k, scale=other.scale, block_tokens=BLOCK_TOKENS).unflatten(0, (-1, heads)).mean(0)
        rules = tuple(rule.calibrated(head.cpu(), grid) for head in mass)
    memory = StepMemory(step=0, chosen={})
    if isinstance(rule, CachedRest):
        attend(before.q, before.k, before.v, grid, rules, scale=seen.scale, memory=memory)
        memory.step = AGE
    found = attend(seen.q, seen.k, seen.v, grid, rules, scale=seen.scale, memory=memory)
    levels = next(iter(memory.chosen.values())).all_levels() if memory.chosen else rules[0].levels(grid)
    work = float(rule.work(levels, grid).mean()) / float(grid.reachable().sum())
    delta, whole = (
        F.linear(x.transpose(1, 2).flatten(2).float(), weight.float()) for x in (found.float() - dense.float(), dense)
    )
    share = 1 - 1 / rule.every if isinstance(rule, CachedRest) else 1.0
    return work, share * float(delta.square().sum() / whole.square().sum())


def table(record: dict[str, Any]) -> str:
    """Per base: the error of every rest at its work, and what `drop` would need of the same work (log-linear between its sizes)."""
    lines = [f"{'base':34} {'rest':18} {'work':>6} {'error':>9}  of drop at this work"]
    for row in record["rows"]:
        drops = sorted(
            (r["work"], r["error"]) for r in record["rows"] if r["base"] == row["base"] and r["rest"] == "drop"
        )
        same = _interpolated(drops, row["work"])
        ratio = "" if same is None or row["rest"] == "drop" else f"{row['error'] / same:8.2f}"
        lines.append(f"{row['base']:34} {row['rest']:18} {row['work']:6.3f} {row['error']:9.5f}  {ratio}")
    return "\n".join(lines)


def _interpolated(points: list[tuple[float, float]], work: float) -> float | None:
    for (low, first), (high, second) in itertools.pairwise(points):
        if low <= work <= high:
            share = (work - low) / max(high - low, 1e-12)
            return float(first ** (1 - share) * second**share)
    return None


def main() -> None:
    """Entry point of `python -m sparsesearch.bench.rest_terms`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="1,3,5")
    parser.add_argument(
        "--steps", default=",".join(map(str, STEPS_SEEN)), help="sampling steps whose noise levels are looked at"
    )
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)), help="shares of tiles of the rules that have one")
    parser.add_argument("--kinds", help="kinds of the bases, separated by commas; all by default")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--mode", choices=("t2v", "i2v"), default="t2v")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    record = run(
        layers=tuple(int(layer) for layer in given.layers.split(",")), steps=tuple(int(step) for step in given.steps.split(",")),
        keeps=tuple(float(keep) for keep in given.keeps.split(",")), kinds=None if given.kinds is None else tuple(given.kinds.split(",")), clips=given.clips, mode=given.mode, device=given.device,
        progress=lambda said: print(said, file=sys.stderr),
    )  # fmt: skip
    given.json.write_text(json.dumps(record, indent=1))
    sys.stdout.write(f"{table(record)}\n")


if __name__ == "__main__":
    main()
