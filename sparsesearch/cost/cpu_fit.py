"""From CPU timings to a cost table, with its error on held-out cases."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.cpu_cases import Case, Grid, clock, estimators, step_group, step_rules
from sparsesearch.cost.cpu_layers import fit_layers
from sparsesearch.cost.table import CostTable, Curve, DecodeCost, TableCostModel, TileCost


def fitted(cases: Sequence[Case], shapes: Grid, dtype: torch.dtype, settings: dict[str, object]) -> CostTable:
    """Curves through what the cases took, lines for tiles and decoding, and their errors."""
    dtype_bytes = torch.finfo(dtype).bits // 8
    tiles, errors = _fit_tiles([case for case in cases if case.group == "tiles"])
    choosing = {kind: _choosing_curves([case for case in cases if case.group == kind], shapes) for kind in estimators()}
    decode = fit_decode([case for case in cases if case.group == "decode"])
    spread = [float(np.median(case.seconds)) / min(case.seconds) - 1 for case in cases]
    table = CostTable(
        name="cpu",
        device=_processor(),
        backend="torch",
        dtype_bytes=dtype_bytes,
        dense=_curves(cases, "dense", shapes),
        mean_value=_curves(cases, "mean_value", shapes),
        estimators={kind: curves[0] for kind, curves in choosing.items()},
        estimator_calls={kind: curves[1] for kind, curves in choosing.items()},
        tiles=tiles,
        layers=fit_layers(cases) if shapes.layer_rows else None,
        decode=decode,
        step_choices=fit_steps(cases, decode),
        fit={"tiles_mape": float(np.mean(errors)), "repeat_spread_median": float(np.median(spread))},
        provenance=_provenance(dtype, settings),
    )
    held_out = _held_out_errors(TableCostModel(table), cases, dtype_bytes)
    return table.model_copy(update={"fit": {**table.fit, **held_out}})


def _curves(cases: Sequence[Case], group: str, shapes: Grid) -> tuple[Curve, ...]:
    curves = []
    for head_dim in shapes.head_dims:
        own = [case for case in cases if case.group == group and case.head_dim == head_dim]
        seconds = np.maximum.accumulate([case.taken_s / case.heads for case in own])
        curves.append(
            Curve(head_dim=head_dim, tokens=tuple(case.tokens for case in own), seconds=tuple(seconds.tolist()))
        )
    return tuple(curves)


def _choosing_curves(cases: Sequence[Case], shapes: Grid) -> tuple[tuple[Curve, ...], tuple[Curve, ...]]:
    """Per head and per call, from a call of one head and one of several."""
    per_head: list[Curve] = []
    per_call: list[Curve] = []
    for head_dim in shapes.head_dims:
        head_s, call_s = [], []
        for tokens in shapes.estimator_tokens:
            own = [case for case in cases if (case.head_dim, case.tokens) == (head_dim, tokens)]
            one, many = sorted(own, key=lambda case: case.heads)
            each_s = min(max((many.taken_s - one.taken_s) / (many.heads - one.heads), 1e-9), many.taken_s / many.heads)
            head_s.append(each_s)
            call_s.append(max(many.taken_s - many.heads * each_s, 1e-9))
        for found, seconds in ((per_head, head_s), (per_call, call_s)):
            rising = tuple(np.maximum.accumulate(seconds).tolist())
            found.append(Curve(head_dim=head_dim, tokens=shapes.estimator_tokens, seconds=rising))
    return tuple(per_head), tuple(per_call)


def _fit_tiles(cases: Sequence[Case]) -> tuple[tuple[TileCost, ...], list[float]]:
    """Non-negative least squares on relative errors, per head_dim and block size."""
    fits, errors = [], []
    works = [(case.work, case.taken_s) for case in cases if case.work is not None]
    for head_dim, block in sorted({(work.head_dim, work.block_tokens) for work, _ in works}):
        own = [(work, s) for work, s in works if (work.head_dim, work.block_tokens) == (head_dim, block)]
        features = np.array(
            [[1, w.query_blocks, w.query_heads, w.query_heads * w.query_blocks, w.tiles] for w, _ in own], dtype=float
        )
        seconds = np.array([s for _, s in own])
        scale = features.mean(0)
        weights, _ = nnls(features / scale / seconds[:, None], np.ones(len(own)))
        group_s, launch_s, call_s, row_s, tile_s = (weights / scale).tolist()
        fits.append(
            TileCost(
                head_dim=head_dim,
                block_tokens=block,
                group_s=group_s,
                launch_s=launch_s,
                call_s=call_s,
                row_s=row_s,
                tile_s=max(tile_s, 1e-12),
            )
        )
        errors += np.abs(features @ (weights / scale) / seconds - 1).tolist()
    return tuple(fits), errors


def fit_decode(cases: Sequence[Case]) -> tuple[DecodeCost, ...]:
    """A line over keys, per head_dim."""
    fits = []
    for head_dim in sorted({case.head_dim for case in cases}):
        own = [case for case in cases if case.head_dim == head_dim]
        seconds = np.array([case.taken_s / case.heads for case in own])
        features = np.array([[1.0, case.tokens] for case in own])
        (head_s, key_s), _ = nnls(features / seconds[:, None], np.ones(len(own)))
        fits.append(DecodeCost(head_dim=head_dim, head_s=float(head_s), key_s=max(float(key_s), 1e-12)))
    return tuple(fits)


def fit_steps(cases: Sequence[Case], decode: Sequence[DecodeCost]) -> dict[str, tuple[Curve, ...]]:
    """What choosing adds, per query head, to reading the keys that are chosen."""
    found: dict[str, tuple[Curve, ...]] = {}
    for kind, rule in step_rules().items():
        curves = []
        for cost in decode:
            own = [case for case in cases if (case.group, case.head_dim) == (step_group(kind), cost.head_dim)]
            read_s = [cost.head_s + cost.key_s * rule.step_tokens(BlockGrid(1, case.tokens, 64)) for case in own]
            beyond = [max(case.taken_s / case.heads - s, 1e-9) for case, s in zip(own, read_s, strict=True)]
            seconds = tuple(np.maximum.accumulate(beyond).tolist()) if own else ()
            if len(own) > 1:
                tokens = tuple(case.tokens for case in own)
                curves.append(Curve(head_dim=cost.head_dim, tokens=tokens, seconds=seconds))
        if curves:
            found[kind] = tuple(curves)
    return found


def _held_out_errors(model: TableCostModel, cases: Sequence[Case], dtype_bytes: int) -> dict[str, float]:
    errors: dict[str, list[float]] = {"dense": [], "tiles": []}
    for case in cases:
        if case.group == "held_out" and case.work is not None:
            work = case.work
            errors[work.kind].append(abs(model.call_latency_s(work) / case.taken_s - 1))
    return {
        "held_out_dense_mape": float(np.mean(errors["dense"])),
        "held_out_tiles_mape": float(np.mean(errors["tiles"])),
        "held_out_tiles_max": float(np.max(errors["tiles"])),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _provenance(dtype: torch.dtype, settings: dict[str, object]) -> dict[str, object]:
    return {
        **settings,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "clock": clock().name,
    }
