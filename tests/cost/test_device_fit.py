"""The fit finds the costs that made-up runs were made with, and says how far off it is."""

import numpy as np
import pytest
import torch

from sparsesearch.cost.calibrate import calibrate, short_name
from sparsesearch.cost.device import runs
from sparsesearch.cost.device.fit import case_load, fit_tiles, fitted
from sparsesearch.cost.device.model import DeviceCostModel, schedule_seconds
from sparsesearch.cost.device.tile_cases import TileCase, tile_cases
from sparsesearch.errors import SpecError
from sparsesearch.kernels.schedule import Workers
from tests.cost.device_tables import tile_cost

WORKERS = Workers(132, 6e7)
TRUTH = tile_cost()


def made_up_rows(noise: float) -> list[runs.Row]:
    rng = np.random.default_rng(0)
    rows = []
    for case in tile_cases(128, 128):
        if case.length <= 16384:
            row = {"group": "tiles", "spread": 0.01, **case.to_dict()}
            seconds = schedule_seconds(TRUTH, case_load(row, "gluon", WORKERS, 2))
            rows.append(row | {"seconds": seconds * (1 + noise * rng.standard_normal())})
    return rows


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.01), (0.02, 0.035)])
def test_costs_are_found_again(noise: float, bound: float) -> None:
    (cost,), errors = fit_tiles(made_up_rows(noise), "gluon", WORKERS, 2)
    assert errors["tiles_mape"] < bound
    assert errors["held_out_tiles_mape"] < bound
    unseen = TileCase("scatter", 32768, 128, size=9)
    load = case_load(unseen.to_dict(), "gluon", WORKERS, 2)
    assert schedule_seconds(cost, load) == pytest.approx(schedule_seconds(TRUTH, load), rel=2 * bound)


def test_every_group_of_runs_reaches_the_file() -> None:
    """Real runs of tiny shapes on the CPU, through the interpreter."""
    bench = runs.Bench("cpu", "triton", torch.float32, time_share=0.001)
    tiny = runs.RunPlan(
        tile_kinds=(), decode=((1, 64), (2, 64)), decode_head_dims=(16,), gemm_tokens=(1, 8), gemm_widths=((32, 16), (16, 32)),
        pointwise_tokens=(1, 2), estimator_tokens=(256,), peak_side=32,
    )  # fmt: skip
    cases = [TileCase("window", 128, 16, 1, 32, 2, 1), TileCase("stream", 128, 16, 1, 32, 2, 1)]
    rows = [*runs.all_runs(bench, tiny), *runs.tile_runs(bench, cases)]
    assert len(rows) == tiny.count + len(cases)
    assert {row["group"] for row in rows} == {
        "peak",
        "tiles",
        "decode",
        "gemm",
        "pointwise",
        "estimator",
        "permutation",
    }
    settings = {"name": "tiny", "device": "a CPU", "memory_bytes": 1e9, "dtype_bytes": 4, "provenance": {}}
    table = fitted(rows, kernel="triton", workers=bench.workers, **settings)  # type: ignore[arg-type]
    model = DeviceCostModel(table)
    assert {cost.kind for cost in table.estimators} == {"pooled_topk", "vertical_slash"}
    assert set(table.pointwise) == {"norm", "rotation", "gate", "residual", "transpose"}
    assert model.linear_s(8, 32, 16) == pytest.approx(next(c.points.at(8) for c in table.linear if c.outputs == 32))
    assert table.fit["tiles_mape"] < 0.5
    assert "held_out_tiles_mape" not in table.fit  # two cases are too few to leave any out


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
