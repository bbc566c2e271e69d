"""The fit finds the costs that made-up runs were made with, and says how far off it is."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sparsesearch.cost import DecodeWork, load_cost_model
from sparsesearch.cost.calibrate import calibrate, measured_rows, short_name
from sparsesearch.cost.device import compile_ahead, corrections, layer_probes, micro_bench, run_plan, runs, step_runs
from sparsesearch.cost.device.fit import fitted
from sparsesearch.cost.device.fit_tiles import boost_clock, case_load, fit_tiles
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.refit import joined, refitted
from sparsesearch.cost.device.tile_cases import TileCase, tile_cases
from sparsesearch.cost.device.tile_seconds import schedule_seconds
from sparsesearch.cost.layer_parts import fused_widths, parts_s
from sparsesearch.errors import SpecError
from sparsesearch.kernels.schedule import Workers
from sparsesearch.model_shapes import ModelShape
from tests.cost.device_tables import tile_cost

WORKERS = Workers(132, 6e7)
TRUTH = tile_cost()
READ = 4e12


@pytest.fixture(autouse=True)
def few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after the other."""
    monkeypatch.setattr(step_runs, "KV_HEADS", 2)
    monkeypatch.setattr(step_runs, "HEADS", 2 * step_runs.GROUP)


def made_up_rows(noise: float) -> list[micro_bench.Row]:
    rng = np.random.default_rng(0)
    rows = []
    for case in tile_cases(128, 128):
        if case.length <= 16384:
            row = {"group": "tiles", "spread": 0.01, **case.to_dict()}
            seconds = schedule_seconds(TRUTH, case_load(row, "gluon", WORKERS, 2), READ)
            rows.append(row | {"seconds": seconds * (1 + noise * rng.standard_normal())})
    return rows


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.01), (0.02, 0.035)])
def test_costs_are_found_again(noise: float, bound: float) -> None:
    (cost,), errors = fit_tiles(made_up_rows(noise), "gluon", WORKERS, 2, READ)
    assert errors["tiles_mape"] < bound
    assert errors["held_out_tiles_mape"] < bound
    unseen = TileCase("scatter", 32768, 128, size=9)
    load = case_load(unseen.to_dict(), "gluon", WORKERS, 2)
    assert schedule_seconds(cost, load, READ) == pytest.approx(schedule_seconds(TRUTH, load, READ), rel=2 * bound)


def test_a_clock_that_was_read_tells_replay_and_power_apart() -> None:
    """Rows of a device whose power limit was at times another one: at the clock that each met, the truth explains them all."""
    rng, rows = np.random.default_rng(0), made_up_rows(0.0)
    for row in rows:
        load = case_load(row, "gluon", WORKERS, 2)
        slowdown = float(rng.uniform(1.0, 1.25))
        row |= {"hz": 1.98e9 / slowdown, "seconds": schedule_seconds(TRUTH, load, READ, slowdown)}
    rows[0] |= {"hz": 1.98e9, "seconds": schedule_seconds(TRUTH, case_load(rows[0], "gluon", WORKERS, 2), READ, 1.0)}
    assert boost_clock(rows) == 1.98e9
    (cost,), errors = fit_tiles(rows, "gluon", WORKERS, 2, READ)
    assert errors["tiles_at_their_clock_mape"] < 0.03 < errors["tiles_mape"]
    load = case_load(TileCase("scatter", 32768, 128, size=9).to_dict(), "gluon", WORKERS, 2)
    for slowdown in (1.0, 1.2):
        found, truth = (schedule_seconds(one, load, READ, slowdown) for one in (cost, TRUTH))
        assert found == pytest.approx(truth, rel=0.04)
    assert boost_clock(made_up_rows(0.0)) is None


def test_every_group_of_runs_reaches_the_file() -> None:
    """Real runs of tiny shapes on the CPU, through the interpreter."""
    bench = micro_bench.Bench("cpu", "triton", torch.float32, time_share=0.001)
    tiny = run_plan.RunPlan(
        tile_kinds=(), dense_tokens=(32, 64), decode=((1, 64), (2, 64)), decode_few=(64,), decode_head_dims=(16,), gemm_tokens=(1, 8), gemm_widths=((32, 16), (16, 32)), skinny_rows=(1, 8), skinny=((32, 16, "normed"), (32, 16, "gated"), (16, 32, "added")),
        step_batches=(1,), step_blocks=(2, 3), step_keys=(64,), steps_held_out=((1, 2, 64),),
        pointwise_tokens=(1, 2), estimator_tokens=(256,), layer_batches=(), layer_tokens=(), peak_side=32,
    )  # fmt: skip
    cases = [TileCase("window", 128, 16, 1, 32, 2, 1), TileCase("stream", 128, 16, 1, 32, 2, 1)]
    rows = [*runs.all_runs(bench, tiny), *runs.tile_runs(bench, cases)]
    assert len(rows) == tiny.count + len(cases)
    assert {row["group"] for row in rows} == {
        "peak",
        "tiles",
        "dense",
        "decode",
        "gemm",
        "skinny",
        "pointwise",
        "estimator",
        "permutation",
        "step_choice",
        "paged_decode",
        "step_held_out",
        "step_joined",
    }
    settings = {"name": "tiny", "device": "a CPU", "memory_bytes": 1e9, "dtype_bytes": 4, "provenance": {}}
    table = fitted(rows, kernel="triton", workers=bench.workers, **settings)  # type: ignore[arg-type]
    model = DeviceCostModel(table)
    assert [(cost.head_dim, len(cost.points.amounts)) for cost in table.dense] == [(16, 2)]
    assert {cost.kind for cost in table.estimators} == set(run_plan.estimators()) >= {"pooled_topk", "vertical_slash"}
    assert set(table.pointwise) == {"norm", "rotation", "gate", "residual", "transpose"}
    assert model.linear_s(8, 32, 16) == pytest.approx(next(c.points.at(8) for c in table.linear if c.outputs == 32))
    assert table.fit["tiles_mape"] < 0.5
    assert "held_out_tiles_mape" not in table.fit  # two cases are too few to leave any out


@pytest.mark.slow
def test_calibrating_a_gpu_writes_its_model_and_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the GPU's part played by the interpreter."""
    tiny = run_plan.RunPlan(
        tile_kinds=((16, 32),), dense_tokens=(32, 64), decode=((1, 64), (2, 64)), decode_few=(64,), decode_head_dims=(16,), gemm_tokens=(1, 8), gemm_widths=((32, 16),), skinny_rows=(1, 2), skinny=((32, 16, "normed"), (32, 64, "added")),
        step_batches=(1,), step_blocks=(2, 3), step_keys=(64,), steps_held_out=(),
        pointwise_tokens=(1, 2), estimator_tokens=(128,), layer_batches=(1, 2), layer_tokens=(64, 128), peak_side=32,
        longest_tokens=0, time_share=0.001,
    )  # fmt: skip
    shape = ModelShape("probe", "llama", 2, 64, 96, 4, 2, 16, 100, False, 1e4, 1024)
    properties = SimpleNamespace(name="Some GPU 900", major=8, total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run_plan, "FULL", tiny)
    evicting = replace(shape, name="evicting", num_layers=3)
    short = replace(shape, name="short", hidden_size=32, intermediate_size=48)
    for module in (run_plan, layer_probes, corrections):
        monkeypatch.setattr(module, "PROBE", shape)
        monkeypatch.setattr(module, "EVICTING", evicting)
        monkeypatch.setattr(module, "SHORT", short)
        monkeypatch.setattr(module, "PROBE_KV_TOKENS", 64)
    monkeypatch.setattr(layer_probes, "SHORT_KV_TOKENS", 48)
    monkeypatch.setattr(micro_bench, "Bench", partial(on_cpu, micro_bench.Bench))
    monkeypatch.setattr(compile_ahead, "compile_ahead", lambda bench, plan: compiled.append(plan))
    monkeypatch.setattr(runs, "tile_cases", lambda *kind: [TileCase("window", 0, 16, 1, 32, 2, 1)])
    monkeypatch.setattr(runs, "tile_runs", lambda bench, cases: runs_of_a_window(bench))
    seen: list[tuple[str, int, int]] = []
    compiled: list[run_plan.RunPlan] = []
    model = calibrate(
        "cuda", out=tmp_path / "it.json", runs_out=tmp_path / "runs.json", dtype=torch.float32,
        progress=lambda *state: seen.append(state),
    )  # fmt: skip
    assert load_cost_model(tmp_path / "it.json") == model
    assert isinstance(model, DeviceCostModel)
    assert (model.name, model.device, model.kernel) == ("900", "Some GPU 900", "triton")
    assert np.isfinite(model.prefill_relief(64))
    if Path("/proc/uptime").exists():
        assert model.table.provenance["whole_s"] >= model.table.provenance["micro_runs_s"] - 0.1
    for correction in (model.table.decode_glue_s, model.table.decode_glue_evicting_s, model.table.decode_step_s):
        assert correction is not None
        assert correction.amounts == (1, 2)
    again = json.loads((tmp_path / "runs.json").read_text())["runs"]
    for probe in (shape, evicting, replace(evicting, num_layers=1)):  # what was measured is what is predicted
        row = next(
            r
            for r in again
            if r["group"] == "layer_decode"
            and (r["probe"], r["layers"], r["batch"]) == (probe.name, probe.num_layers, 2)
        )
        attention_s = probe.num_layers * model.decode_attention_s([DecodeWork(64, 16, 2, 2, 4)] * 2)
        own = {(r["n"], r["k"]): r["seconds"] for r in again if r["group"] == "probe_gemm" and r["m"] == 2}
        costs = Measured(model, own)
        parts = sum(parts_s(probe, costs, rows=2, last_rows=2)) + attention_s + model.decode_step_s(2)
        large = model.table.l2_bytes + 1 if probe.name == "evicting" else 0.0
        assert parts + probe.num_layers * model.decode_glue_s(2, large) == pytest.approx(row["seconds"])
    fused = model.fused
    assert fused is not None
    for probe in (replace(evicting, num_layers=1), evicting, short):
        layers = probe.num_layers
        row = next(
            r
            for r in again
            if r["group"] == "layer_fused" and (r["probe"], r["layers"], r["batch"]) == (probe.name, layers, 2)
        )
        widths = fused_widths(probe)
        layer_s = sum(fused.product_s(2, *width) for width in widths)
        layer_s += fused.layer_s(2, model.table.dtype_bytes * sum(n * k for n, k in widths))
        assert row["kv_tokens"] == (48 if probe is short else 64)
        attention_s = model.decode_attention_s([DecodeWork(row["kv_tokens"], 16, 2, 2, 4)] * 2)
        assert layers * (layer_s + attention_s) + fused.start_s(2) == pytest.approx(row["seconds"])
    for row in (r for r in again if r["group"] == "turn"):
        own = ("layer_fused", row["probe"], row["layers"], row["batch"])
        step = next(r for r in again if (r["group"], r.get("probe"), r.get("layers"), r.get("batch")) == own)
        assert model.decode_turn_s(row["batch"]) == max(0.0, row["seconds"] - step["seconds"])
    assert len(again) == model.table.provenance["micro_runs"] == len(seen) - 1
    assert compiled == [tiny]
    once_more = refitted(model.table, again)
    assert once_more.provenance["refitted"]
    assert once_more.model_copy(update={"provenance": model.table.provenance}) == model.table
    assert {"layer_decode", "layer_prefill", "tiles", "gemm", "skinny"} <= {row["group"] for row in again}


def test_cases_that_were_measured_again_replace_the_earlier_ones() -> None:
    old = [{"group": "peak", "seconds": 1.0}, *({"group": "tiles", "size": size, "seconds": 2.0} for size in (1, 2))]
    new = [{"group": "tiles", "size": 2, "seconds": 4.0}, {"group": "dense", "seconds": 5.0}]
    rows, again = joined([old, new])
    found = [(row["group"], row["seconds"]) for row in rows]
    assert found == [("peak", 1.0), ("tiles", 2.0), ("tiles", 4.0), ("dense", 5.0)]
    assert again == {"tiles", "dense"}
    assert joined([old]) == (old, set())


def test_a_calibration_cut_short_leaves_its_complete_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cut(bench: micro_bench.Bench, plan: run_plan.RunPlan) -> Iterator[micro_bench.Row]:
        yield {"group": "peak", "seconds": 1.0}
        yield {"group": "tiles", "seconds": 1.0}
        assert json.loads((tmp_path / "runs.json").read_text()) == {"runs": [{"group": "peak", "seconds": 1.0}]}
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "all_runs", cut)
    monkeypatch.setattr(compile_ahead, "compile_ahead", lambda bench, plan: None)
    bench = micro_bench.Bench("cpu", "triton", torch.float32)
    with pytest.raises(KeyboardInterrupt):
        measured_rows(bench, run_plan.QUICK, tmp_path / "runs.json", lambda *_: None)


class Measured(NamedTuple):
    """A model with some linear layers as they were measured."""

    model: DeviceCostModel
    seconds: dict[tuple[int, int], float]

    def linear_s(self, rows: int, outputs: int, inputs: int) -> float:
        return self.seconds.get((outputs, inputs)) or self.model.linear_s(rows, outputs, inputs)

    def pointwise_s(self, name: str, elements: float) -> float:
        return self.model.pointwise_s(name, elements)


def test_every_kernel_is_compiled_ahead_and_nothing_is_measured() -> None:
    bench = micro_bench.Bench("cpu", "triton", torch.float32, time_share=0.001)
    tiny = run_plan.RunPlan(
        tile_kinds=(), decode=((1, 64),), decode_few=(64,), decode_head_dims=(16,), skinny_rows=(1,), skinny=((32, 16, "normed"),),
        step_batches=(1,), step_blocks=(2, 3), step_keys=(64,), steps_held_out=((1, 2, 64),),
        estimator_tokens=(128,), layer_batches=(), layer_tokens=(),
    )  # fmt: skip
    launched: list[str] = []
    jobs = list(compile_ahead.jobs(micro_bench.CompilingBench(bench), tiny))
    rows = [row for job in jobs for row in job()]
    launched = [row["group"] for row in rows]
    steps = {"step_choice", "paged_decode", "step_joined", "step_held_out"}
    assert set(launched) == {"decode", "skinny", "estimator", "permutation"} | steps
    assert launched.count("estimator") == len(run_plan.estimators()) + len(run_plan.HAVE_KERNELS)
    assert all(math.isnan(row["seconds"]) for row in rows)
    compile_ahead.compile_ahead(bench, replace(tiny, estimator_tokens=()))


def test_probes_have_the_layers_that_fit() -> None:
    assert layer_probes.fitting(run_plan.EVICTING, 141e9, 32) == run_plan.EVICTING
    small = layer_probes.fitting(run_plan.EVICTING, 16e9, 32)
    assert 2 <= small.num_layers < 6


def on_cpu(
    bench: type[micro_bench.Bench], device: str, kernel: str, dtype: torch.dtype, **settings: Any
) -> micro_bench.Bench:
    assert (device, kernel) == ("cuda", "triton")
    return bench("cpu", "triton", dtype, **settings)


def runs_of_a_window(bench: micro_bench.Bench) -> Iterator[micro_bench.Row]:
    case = TileCase("window", 128, 16, 1, 32, 2, 1)
    timed = runs.time_schedule(bench, case.schedule(bench.workers, "triton"), 128, 16, 2, 1)
    yield bench.row("tiles", timed, **case.to_dict())


def test_a_device_that_is_not_here_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="torch finds no GPU"):
            calibrate("cuda")
    with pytest.raises(SpecError, match="cpu or cuda, but got 'tpu'"):
        calibrate("tpu")


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Somebody's GPU", "somebody-s-gpu"),
    ],
)
def test_names_are_short(product: str, name: str) -> None:
    assert short_name(product) == name
